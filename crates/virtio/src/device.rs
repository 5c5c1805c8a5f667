//! What a virtio device is: [`VirtioDevice`] and [`Worker`].
//!
//! A device knows no transport, no hypervisor and no thread. While a driver uses it, its [`Worker`]s own the queues; stopping
//! them gives the queues back. Reset, pause and unplugging are that one thing.

use std::sync::Arc;

use freestone_bus::{EventFd, Irq, Wiring, Work};
use freestone_memory::GuestMem;
use freestone_snapshot::{Restoring, Saving};

use crate::queue::VirtQueue;
use crate::{DeviceControl, Result};

/// The type of a device (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceType(pub u32);

impl DeviceType {
    /// Network card.
    pub const NET: Self = Self(1);
    /// Block device.
    pub const BLOCK: Self = Self(2);
    /// Console.
    pub const CONSOLE: Self = Self(3);
    /// Entropy source.
    pub const RNG: Self = Self(4);
    /// Memory balloon.
    pub const BALLOON: Self = Self(5);
    /// Socket device.
    pub const VSOCK: Self = Self(19);
    /// Memory device.
    pub const MEM: Self = Self(24);
    /// Persistent memory.
    pub const PMEM: Self = Self(27);
}

/// What a transport must know of a device; it never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Type.
    pub device_type: DeviceType,
    /// Feature bits of the device type; the transport adds its own.
    pub features: u64,
    /// Largest size of each queue: powers of two, at most 32768.
    pub queue_max_sizes: Vec<u16>,
    /// Length of the configuration space in bytes.
    pub config_len: u32,
}

/// A queue in use, with its wires.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Number of the queue.
    pub index: u16,
    /// The queue.
    pub queue: VirtQueue,
    /// Signalled by the driver. It need not be read; watch it for edges.
    pub kick: Arc<EventFd>,
    /// The used buffer notification.
    pub irq: Irq,
}

/// What a device works with from the moment its driver is ready until it is stopped.
#[derive(Debug)]
pub struct Resources {
    /// Guest memory.
    pub mem: GuestMem,
    /// Negotiated features, with those of the transport.
    pub features: u64,
    /// The queues that the driver enabled, by rising index. Some may be missing.
    pub queues: Vec<ActiveQueue>,
    /// Reports faults and configuration changes.
    pub control: DeviceControl,
}

/// A virtio device.
///
/// The transport calls these on vCPU threads and on the machine's control thread, never on two at once.
pub trait VirtioDevice: Send {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Whether the device was configured with something possible. A transport asks once, before anything else; `name` is the
    /// device's, for messages.
    ///
    /// # Errors
    /// If not: the transport then refuses the device.
    fn check(&self, name: &str) -> Result<()> {
        let _ = name;
        Ok(())
    }

    /// The device is being plugged into a machine. A device that needs more of it than queues and an interrupt takes that here,
    /// such as address space for memory of its own. The transports' plugs call this once, before anything else.
    ///
    /// # Errors
    /// If the machine cannot give what the device needs: it is then not plugged in.
    fn attach(&mut self, wiring: &mut dyn Wiring) -> freestone_bus::Result<()> {
        let _ = wiring;
        Ok(())
    }

    /// Reads the configuration space. The transport guarantees that `offset + data.len()` is at most
    /// [`DeviceInfo::config_len`]; any offset and width inside may come.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes the configuration space, with the same guarantee. By default nothing can be written.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Whether a device that was paused could go on now.
    ///
    /// # Errors
    /// What it lacks: the machine stays paused, and nothing is lost.
    fn ready(&self) -> Result<()> {
        Ok(())
    }

    /// Makes the workers that serve the queues from now on. May come again after the workers were stopped: with the same queues
    /// (pause and resume) or with fresh ones (reset).
    ///
    /// # Errors
    /// If the device cannot work with `resources`: the driver then finds DEVICE_NEEDS_RESET.
    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>>;

    /// The driver reset the device; its workers were stopped before. State that a driver can see goes back to the start.
    fn reset(&mut self) {}

    /// Writes what the device itself remembers, beside features and queues, which the transport saves. Called while the workers
    /// are stopped. A device that remembers nothing says so by an empty function.
    ///
    /// # Errors
    /// If there is no way to save this device, which is so by default, or the state cannot be written.
    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        Err(freestone_bus::Error::NotSaved { device: state.instance().to_owned() })
    }

    /// Becomes what was saved: called once on a fresh device, before [`start`](Self::start) comes with the `features` and
    /// queues of the saved one. The state is untrusted.
    ///
    /// # Errors
    /// If the state is missing or cannot be that of this device.
    fn restore(&mut self, features: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let _ = features;
        Err(freestone_bus::Error::NotSaved { device: state.instance().to_owned() })
    }

    /// The machine ends; the workers were stopped before. Makes durable what the guest believes written.
    ///
    /// # Errors
    /// If that fails.
    fn shutdown(&mut self) -> Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for dyn VirtioDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioDevice").field("info", self.info()).finish_non_exhaustive()
    }
}

/// Work that owns queues and can give them back.
pub trait Worker: Work {
    /// The queues, with everything in flight either completed or forgotten.
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue>;
}
