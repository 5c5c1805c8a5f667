//! The error type of this crate.

use std::io;
use std::path::PathBuf;

/// What can go wrong with a virtio device.
///
/// Everything but [`Io`](Self::Io), [`Wiring`](Self::Wiring), [`File`](Self::File), [`PmemSize`](Self::PmemSize),
/// `Port` and [`Config`](Self::Config) is the driver's doing: the device then stops and sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The driver chose a queue size that the device does not have or that, for split rings, is no power of two.
    #[error("queue size {size} is not a power of two (any number for packed rings) from 1 to {max}")]
    QueueSize {
        /// Chosen size.
        size: u16,
        /// The device's largest.
        max: u16,
    },
    /// Part of a queue is misaligned or not in guest memory.
    #[error(
        "{part} of a queue of {size} entries at {addr:#x} is misaligned or not in one range of guest memory"
    )]
    QueueLayout {
        /// Which part.
        part: &'static str,
        /// Its guest-physical address.
        addr: u64,
        /// Entries of the queue.
        size: u16,
    },
    /// The available index ran ahead of the device by more than the queue holds.
    #[error("available index is {ahead} ahead of the device in a queue of {size} entries")]
    AvailIndex {
        /// Distance to the device's own index.
        ahead: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// The driver offered descriptors of a packed ring that the device still holds.
    #[error("descriptors were offered while the device held {held} of the queue's {size}")]
    Overrun {
        /// Descriptors of requests that were not given back.
        held: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A saved position in a packed ring is impossible.
    #[error("positions {avail} and {used} cannot be in a packed ring of {size} entries")]
    QueuePosition {
        /// Where the next request would begin.
        avail: u16,
        /// Where the next completion would go.
        used: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A descriptor index points outside of its table.
    #[error("descriptor index {index} is outside of a table of {size} entries")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A chain has more descriptors than the device's queue, or loops.
    #[error("descriptor chain has more than {max} descriptors")]
    ChainTooLong {
        /// Most descriptors there may be.
        max: u16,
    },
    /// A chain's buffers are 2^32 bytes or more in total.
    #[error("descriptor chain has more than {} bytes", u32::MAX)]
    ChainBytes,
    /// An indirect descriptor that is not allowed where it is, or whose table is empty, misshapen or too long.
    #[error("indirect table of {len} bytes at {addr:#x}: {reason}")]
    Indirect {
        /// Guest-physical address of the table.
        addr: u64,
        /// Its length in bytes.
        len: u32,
        /// Why it is refused.
        reason: &'static str,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("device-readable descriptor after a device-writable one")]
    Direction,
    /// A buffer is not in guest memory.
    #[error("buffer of {len:#x} bytes at {addr:#x} is not in guest memory")]
    Buffer {
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A request is shorter than its header or its status.
    #[error("request has {have} {direction} bytes where {want} are needed")]
    ShortRequest {
        /// `device-readable` or `device-writable`.
        direction: &'static str,
        /// Bytes there are.
        have: u64,
        /// Bytes needed.
        want: u64,
    },
    /// Guest memory did not take an access that was in range.
    #[error("cannot access guest memory of a queue")]
    Memory(#[from] freestone_memory::vm_memory::VolatileMemoryError),
    /// The host refused something.
    #[error("cannot {op}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The machine has no place for the device.
    #[error("cannot give the device a place in the machine")]
    Wiring(#[from] freestone_bus::Error),
    /// A file of a device cannot be used.
    #[error("file {path:?}: cannot {op}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was being done.
        op: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file has no size that persistent memory can have.
    #[error(
        "persistent memory {path:?} has {size} bytes, and must have a multiple of 2 MiB: the next is {}",
        size.saturating_add(1).next_multiple_of(2 << 20)
    )]
    PmemSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The port of a network card cannot be used.
    #[cfg(feature = "net")]
    #[error("cannot {op}")]
    Port {
        /// What was being done.
        op: &'static str,
        /// Why it failed.
        #[source]
        source: freestone_net::Error,
    },
    /// The device was configured with something impossible.
    #[error("device {device}: {reason}")]
    Config {
        /// Name of the device.
        device: String,
        /// What is wrong.
        reason: &'static str,
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
