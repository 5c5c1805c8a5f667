//! What devices behind any transport have in common once they are plugged in, and the choice of a transport by value.

use std::io;
use std::sync::Arc;

use freestone_bus::{Device, Plug};

use crate::{DeviceStats, Error, Result, VirtioDevice, VirtioMmioPlug, VirtioPciPlug};

/// How a driver reaches a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Transport {
    /// As a function of PCI: one interrupt for each queue. The machine needs a PCI root that was plugged in before.
    #[default]
    Pci,
    /// By registers at an address that firmware tells: one interrupt line for all.
    Mmio,
}

/// Makes `device` pluggable behind `transport`; `name`, such as `virtio-blk0`, is for messages.
pub fn plug(
    transport: Transport,
    device: impl VirtioDevice + 'static,
    name: impl Into<String>,
) -> Box<dyn Plug> {
    plug_with_stats(transport, device, name).0
}

/// As [`plug`], with what the device's queues will count.
pub fn plug_with_stats(
    transport: Transport,
    device: impl VirtioDevice + 'static,
    name: impl Into<String>,
) -> (Box<dyn Plug>, DeviceStats) {
    match transport {
        Transport::Pci => {
            let plug = VirtioPciPlug::new(device, name);
            let stats = plug.stats();
            (Box::new(plug), stats)
        }
        Transport::Mmio => {
            let plug = VirtioMmioPlug::new(device, name);
            let stats = plug.stats();
            (Box::new(plug), stats)
        }
    }
}

/// A transport's side of [`Device`].
pub(crate) trait Lifecycle: Send + Sync {
    fn pause(&self);
    fn resume(&self) -> Result<()>;
    fn shutdown(&self) -> Result<()>;
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
