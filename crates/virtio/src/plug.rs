//! What devices behind any transport have in common once they are plugged in, and the choice of a transport by value.

use std::io;
use std::sync::Arc;

use freestone_bus::{Device, Plug, Spawn, Wiring};
use freestone_snapshot::{Restoring, Saving};

use crate::stats::DeviceStats;
use crate::{Error, Result, VirtioDevice};

/// How a driver reaches a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Transport {
    /// As a function of PCI: one interrupt for each queue. The machine needs a PCI root that was plugged in before.
    #[default]
    Pci,
    /// By registers at an address that firmware tells: one interrupt line for all.
    Mmio,
}

/// A virtio device that can be plugged into a machine, behind the transport of choice.
#[derive(Debug)]
pub struct VirtioPlug {
    transport: Transport,
    parts: Parts,
}

impl VirtioPlug {
    /// Makes `device` pluggable behind `transport`; `name`, such as `virtio-blk0`, is for messages.
    pub fn new(transport: Transport, device: impl VirtioDevice + 'static, name: impl Into<String>) -> Self {
        Self { transport, parts: Parts::new(Box::new(device), name.into()) }
    }

    /// What the device's queues will count, to be kept by whoever wants to read it.
    pub fn stats(&self) -> DeviceStats {
        self.parts.stats.clone()
    }

    /// Has `spawner` drive the device's workers in place of the machine's.
    #[must_use]
    pub fn spawner(mut self, spawner: Arc<dyn Spawn>) -> Self {
        self.parts.spawner = Some(spawner);
        self
    }
}

impl Plug for VirtioPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        match self.transport {
            Transport::Pci => crate::pci::plug(self.parts, wiring),
            Transport::Mmio => crate::mmio::plug(self.parts, wiring),
        }
    }
}

/// What every plug of a virtio device holds.
pub(crate) struct Parts {
    pub(crate) device: Box<dyn VirtioDevice>,
    pub(crate) name: String,
    pub(crate) stats: DeviceStats,
    spawner: Option<Arc<dyn Spawn>>,
}

impl Parts {
    pub(crate) fn new(device: Box<dyn VirtioDevice>, name: String) -> Self {
        Self { stats: DeviceStats::new(&name, device.info()), device, name, spawner: None }
    }

    /// Who drives the workers in a machine.
    pub(crate) fn spawner(&self, wiring: &dyn Wiring) -> Arc<dyn Spawn> {
        self.spawner.clone().unwrap_or_else(|| wiring.spawner())
    }
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts")
            .field("name", &self.name)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// A transport's side of [`Device`].
pub(crate) trait Lifecycle: Send + Sync {
    fn pause(&self);
    fn resume(&self) -> Result<()>;
    fn shutdown(&self) -> Result<()>;
    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()>;
    fn restore(&self, state: &mut Restoring<'_>) -> freestone_bus::Result<()>;
    /// The machine takes the device away: its work ends, and nothing of it stays on a bus that a guest can find.
    fn unplug(&self);
}

/// A plugged device: what the machine keeps.
pub(crate) struct Plugged<T: Lifecycle> {
    name: String,
    transport: Arc<T>,
}

impl<T: Lifecycle> Plugged<T> {
    pub(crate) fn new(name: String, transport: Arc<T>) -> Self {
        Self { name, transport }
    }
}

impl<T: Lifecycle> Device for Plugged<T> {
    fn name(&self) -> &str {
        &self.name
    }

    fn pause(&mut self) -> freestone_bus::Result<()> {
        self.transport.pause();
        Ok(())
    }

    fn resume(&mut self) -> freestone_bus::Result<()> {
        self.transport.resume().map_err(bus_error("resume a virtio device"))
    }

    fn save(&mut self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.transport.save(state)
    }

    fn restore(&mut self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.transport.restore(state)
    }

    fn shutdown(&mut self) -> freestone_bus::Result<()> {
        self.transport.shutdown().map_err(bus_error("shut down a virtio device"))
    }
}

impl<T: Lifecycle> Drop for Plugged<T> {
    /// The bus may keep the registers alive; the device's work ends here.
    fn drop(&mut self) {
        self.transport.unplug();
    }
}

pub(crate) fn bus_error(op: &'static str) -> impl FnOnce(Error) -> freestone_bus::Error {
    move |error| match error {
        Error::Wiring(error) => error,
        error => freestone_bus::Error::Io { op, source: io::Error::other(error) },
    }
}
