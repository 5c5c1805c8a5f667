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
    /// Wraps an error of the host with what was being done.
    pub fn io(op: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { op, source }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
