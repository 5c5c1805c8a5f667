//! The error type of this crate.

use std::io;
use std::path::PathBuf;

/// Why a machine could not be built, started or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The number of vCPUs is not possible.
    #[error("{asked} vCPUs: this hypervisor allows 1 to {max}")]
    Cpus {
        /// Number asked for.
        asked: u32,
        /// The most that is possible.
        max: u32,
    },
    /// Two devices have one name.
    #[error("two devices are named {0:?}")]
    DuplicateDevice(String),
    /// A device could not be wired, paused, resumed or shut down.
    #[error("cannot {doing} device {device}")]
    Device {
        /// What was being done.
        doing: &'static str,
        /// Name of the device, or its place in the order of plugging.
        device: String,
        /// Why not.
        #[source]
        source: freestone_bus::Error,
    },
    /// No payload was given: there is nothing to boot.
    #[error("the machine has nothing to boot: give it a payload")]
    NoPayload,
    /// The call is not possible in this state.
    #[error("cannot {doing} a machine that is {state}")]
    State {
        /// What was asked.
        doing: &'static str,
        /// The state it is in.
        state: &'static str,
    },
    /// The hypervisor cannot save a VM.
    #[error("this hypervisor cannot save a VM")]
    NotSaved,
    /// The snapshot is of another machine than the one that was built for it.
    #[error("the snapshot is of a machine with another {what}: it has {saved}, this one has {built}")]
    Differs {
        /// What differs.
        what: &'static str,
        /// In the snapshot.
        saved: String,
        /// In the machine that was built.
        built: String,
    },
    /// A difference needs the log of writes.
    #[error("nothing logs what was written since an earlier snapshot, so only a full one can be made")]
    NotTracked,
    /// A migration failed by what one side did.
    #[error("the migration failed: {reason}")]
    Migration {
        /// What happened.
        reason: String,
    },
    /// A migration failed at the one moment at which this side cannot know whether the other has the machine.
    #[error(
        "the target was told to go on and did not answer: find out whether it runs there before it is resumed here"
    )]
    Undecided {
        /// What happened.
        #[source]
        source: Box<Error>,
    },
    /// The files of a snapshot are not what was asked for.
    #[error("{path:?}: {reason}")]
    Stored {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A memory file cannot be used.
    #[error("{path:?}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: freestone_memory::Error,
    },
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] freestone_snapshot::Error),
    /// The host failed.
    #[error("cannot {op}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] freestone_memory::Error),
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] freestone_hypervisor::Error),
    /// The kernel, initrd or firmware tables.
    #[error(transparent)]
    Loader(#[from] freestone_loader::Error),
    /// vCPU set-up or run loop.
    #[error(transparent)]
    Vcpu(#[from] freestone_vcpu::Error),
    /// Buses and the event loop.
    #[error(transparent)]
    Bus(#[from] freestone_bus::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
