//! The error type of this crate.

use freestone_memory::vm_memory::GuestMemoryError;

/// What can go wrong on the driver's side of a test.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Guest memory cannot be read or written there.
    #[error("cannot access {len:#x} bytes of guest memory at {gpa:#x}")]
    Memory {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
    /// A register access was refused by the device.
    #[error("the device refused to {op} of {len} bytes at register {offset:#x}")]
    Register {
        /// `read` or `write`.
        op: &'static str,
        /// Offset of the register.
        offset: u64,
        /// Width in bytes.
        len: usize,
        /// The device's reason.
        #[source]
        source: freestone_bus::AccessError,
    },
    /// No room is left: descriptors of a queue, or memory of an arena.
    #[error("no {what} left: {wanted} wanted, {left} free")]
    Full {
        /// What has run out.
        what: &'static str,
        /// How much was asked for.
        wanted: u64,
        /// How much there is.
        left: u64,
    },
    /// The device does not do what the specification asks of it.
    #[error("{what}: {detail} (virtio 1.2, section {section})")]
    Protocol {
        /// The step or the check.
        what: &'static str,
        /// What was seen.
        detail: String,
        /// Section of the specification.
        section: &'static str,
    },
    /// A device could not be plugged in.
    #[error("cannot plug the device in")]
    Plug(#[source] freestone_bus::Error),
    /// A device failed in its lifecycle.
    #[error("device {device} failed to {op}")]
    Lifecycle {
        /// Name of the device.
        device: String,
        /// `pause`, `resume`, `save`, `restore` or `shutdown`.
        op: &'static str,
        /// The device's reason.
        #[source]
        source: freestone_bus::Error,
    },
}

impl Error {
    pub(crate) fn protocol(what: &'static str, section: &'static str, detail: impl Into<String>) -> Self {
        Self::Protocol { what, detail: detail.into(), section }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
