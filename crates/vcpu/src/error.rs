//! The error type of this crate.

use std::io;
use std::time::Duration;

use freestone_memory::vm_memory::GuestMemoryError;

/// What can go wrong when a vCPU is configured or driven.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The hypervisor refused or failed.
    #[error("cannot {op}")]
    Hypervisor {
        /// What was being done.
        op: &'static str,
        /// The hypervisor's reason.
        #[source]
        source: freestone_hypervisor::Error,
    },
    /// Boot data does not fit into guest memory.
    #[error("cannot write the {what} to guest memory at {gpa:#x}")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// First guest-physical address.
        gpa: u64,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
    /// The boot page tables could not be built.
    #[error("cannot build the boot page tables at {gpa:#x}")]
    PageTables {
        /// Guest-physical address of the root.
        gpa: u64,
        /// Why not.
        #[source]
        source: freestone_memory::Error,
    },
    /// An address does not fit the processor mode in which the guest starts.
    #[error("{what} {value:#x} does not fit a {mode} start: the limit is {limit:#x}")]
    Address {
        /// Which address.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The mode.
        mode: &'static str,
        /// The largest value.
        limit: u64,
    },
    /// A CPU template that makes no sense, or not on this host.
    #[error("CPU template: {what} {value:?}: {reason}")]
    Template {
        /// What part of it.
        what: &'static str,
        /// As it was given.
        value: String,
        /// What is wrong with it, or what it must be.
        reason: &'static str,
    },
    /// The hypervisor does not have a register of a CPU template, or not with that value.
    #[error("CPU template: cannot {op} MSR {index:#x}")]
    TemplateMsr {
        /// What was being done.
        op: &'static str,
        /// Number of the register.
        index: u32,
        /// The hypervisor's reason.
        #[source]
        source: freestone_hypervisor::Error,
    },
    /// A vCPU did not acknowledge a request in time.
    #[error("vCPU {index} did not {what} within {waited:?}")]
    Timeout {
        /// Number of the vCPU.
        index: u32,
        /// What it was asked to do.
        what: &'static str,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The host gives no thread.
    #[error("cannot start the thread of vCPU {index}")]
    Thread {
        /// Number of the vCPU.
        index: u32,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The vCPU's state was asked for while it was not paused.
    #[error("vCPU {index} is not paused")]
    NotPaused {
        /// Number of the vCPU.
        index: u32,
    },
    /// A saved state has a value that no vCPU or VM has.
    #[error("the saved {what} is {value:#x}: {reason}")]
    Saved {
        /// Which value.
        what: &'static str,
        /// The value, or how many there are.
        value: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A state is of a kind that this version cannot save.
    #[error("{0} cannot be saved")]
    Unsaved(&'static str),
    /// The thread of a vCPU panicked, which is a defect of a device model or of this crate.
    #[error("the thread of vCPU {index} panicked")]
    Panicked {
        /// Number of the vCPU.
        index: u32,
    },
}

impl Error {
    /// Wraps an error of the hypervisor with what was being done.
    pub(crate) fn hv(op: &'static str) -> impl FnOnce(freestone_hypervisor::Error) -> Self {
        move |source| Self::Hypervisor { op, source }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
