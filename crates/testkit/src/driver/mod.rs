//! The driver's side of virtio 1.2, written from the specification and from nothing else: what a guest would do, well-behaved
//! or not.
//!
//! [`DriverQueue`] lays a virtqueue of either format out in guest memory and uses it. [`MmioDriver`] finds, negotiates and configures a
//! device behind the virtio-mmio registers. Neither checks what a hostile test asks of it: every field of the rings and
//! every register can be written with anything.

mod mmio;
mod packed;
mod queue;

pub use mmio::{MmioDriver, regs, status};
pub use packed::{packed_event, packed_flags};
pub use queue::{Arena, Buffer, Desc, DriverQueue, Used, desc_flags};

/// Feature bits that belong to the queues and the transport (virtio 1.2, section 6).
pub mod features {
    /// The driver may use indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by `used_event` and `avail_event`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows this specification and not its predecessor.
    pub const VERSION_1: u64 = 1 << 32;
    /// The packed ring format.
    pub const RING_PACKED: u64 = 1 << 34;
}
