//! The error type of this crate.

use std::io;

/// What can go wrong when devices, buses and interrupts are wired together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A range is empty or wraps round the end of its address space.
    #[error("address range of {len:#x} bytes at {base:#x} is empty or wraps")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A range is taken already.
    #[error("address range of {len:#x} bytes at {base:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the device that is there.
        other: u64,
    },
    /// No address, interrupt line or other resource of this kind is left.
    #[error("no {what} left for device {device}")]
    Exhausted {
        /// Kind of resource.
        what: &'static str,
        /// Device that asked.
        device: String,
    },
    /// A device asked for something the machine does not have.
    #[error("device {device} needs {what}, which this machine does not have")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// Device that asked.
        device: String,
    },
    /// A function of PCI was given something that its configuration space cannot hold.
    #[error("PCI configuration space cannot hold {what} {value:#x}")]
    PciConfig {
        /// What it is.
        what: &'static str,
        /// Its number or value.
        value: u64,
    },
    /// A device cannot be saved: it does not say how.
    #[error("device {device} has no way to save its state")]
    NotSaved {
        /// The device.
        device: String,
    },
    /// A saved state cannot be that of this device, or of this machine.
    #[error("the saved state of device {device} does not fit: {what} {value:#x}")]
    BadState {
        /// The device.
        device: String,
        /// What of it, and why.
        what: &'static str,
        /// The value in the saved state.
        value: u64,
    },
    /// A device cannot be saved or restored while it works.
    #[error("cannot {op} device {device} while it works: it must be paused, or new")]
    Busy {
        /// What was being done: `save` or `restore`.
        op: &'static str,
        /// The device.
        device: String,
    },
    /// A state cannot be written to a snapshot, or read from it.
    #[error("cannot {op} the state of a device")]
    State {
        /// What was being done.
        op: &'static str,
        /// Why not.
        #[source]
        source: freestone_snapshot::Error,
    },
    /// An operation of the host failed.
    #[error("cannot {op}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Wraps an error of the snapshot with what was being done: `save` or `restore`.
    pub fn state(op: &'static str) -> impl FnOnce(freestone_snapshot::Error) -> Self {
        move |source| Self::State { op, source }
    }

    /// Wraps an error of the host with what was being done.
    pub fn io(op: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { op, source }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
