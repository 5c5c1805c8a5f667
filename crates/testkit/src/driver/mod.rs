//! The driver's side of virtio 1.2, written from the specification and from nothing else: what a guest would do, well-behaved
//! or not.
//!
//! [`DriverQueue`] lays a virtqueue of either format out in guest memory and uses it. [`VirtioDriver`] finds, negotiates and
//! configures a device, behind the virtio-mmio registers ([`MmioDriver`]) or as a function of PCI ([`PciDriver`]). Neither checks
//! what a hostile test asks of it: every field of the rings and every register can be written with anything.

mod mmio;
mod packed;
mod pci;
mod queue;
mod transport;

pub use mmio::{MmioDriver, MmioRegisters, regs};
pub use packed::{packed_event, packed_flags};
pub use pci::{PciDriver, PciPart, PciRegisters, common};
pub use queue::{Arena, Buffer, Desc, DriverQueue, Used, desc_flags};
pub use transport::{DriverTransport, Registers, VirtioDriver};

/// A part of a queue, as registers name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueuePart {
    /// The descriptors.
    Descriptors,
    /// What the driver writes: the avail ring.
    Driver,
    /// What the device writes: the used ring.
    Device,
}

/// Bits of the device status (2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u32 = 4;
    /// The features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on before a reset.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

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
