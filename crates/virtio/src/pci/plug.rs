//! [`VirtioPciPlug`]: a device as a function in a machine.

use std::sync::Arc;

use freestone_bus::pci::{PciAddress, PciSegment};
use freestone_bus::{Device, Plug, Wiring};

use super::{PciTransport, PciWiring};
use crate::plug::{Lifecycle, Plugged, bus_error};
use crate::{DeviceStats, Result, VirtioDevice};

/// A virtio device that can be plugged into a machine as a function of PCI. A PCI root must be there before it.
#[derive(Debug)]
pub struct VirtioPciPlug {
    device: Box<dyn VirtioDevice>,
    name: String,
    stats: DeviceStats,
}

impl VirtioPciPlug {
    /// Makes `device` pluggable; `name`, such as `virtio-blk0`, is for messages.
    pub fn new(device: impl VirtioDevice + 'static, name: impl Into<String>) -> Self {
        let name = name.into();
        Self { stats: DeviceStats::new(&name, device.info()), device: Box::new(device), name }
    }

    /// What the device's queues will count, to be kept by whoever wants to read it.
    pub fn stats(&self) -> DeviceStats {
        self.stats.clone()
    }
}

impl Plug for VirtioPciPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let Self { device, name, stats } = *self;
        let missing = || freestone_bus::Error::Missing { what: "a PCI root", device: name.clone() };
        let segment = wiring.pci().ok_or_else(missing)?;
        let parts = PciWiring {
            bars: segment.bars().clone(),
            mem: wiring.memory(),
            msi: wiring.msi(),
            doorbells: wiring.doorbells(),
            spawner: wiring.spawner(),
        };
        let transport = PciTransport::new(&name, device, parts);
        let transport = Arc::new(transport.map_err(bus_error("set up a virtio device"))?.with_stats(stats));
        let address = segment.insert(&name, transport.clone())?;
        Ok(Box::new(Plugged::new(name, Arc::new(Placed { transport, segment, address }))))
    }
}

/// A function in its place.
struct Placed {
    transport: Arc<PciTransport>,
    segment: Arc<PciSegment>,
    address: PciAddress,
}

impl Lifecycle for Placed {
    fn pause(&self) {
        self.transport.pause();
    }

    fn resume(&self) -> Result<()> {
        self.transport.resume()
    }

    fn shutdown(&self) -> Result<()> {
        self.transport.shutdown()
    }

    fn unplug(&self) {
        self.segment.remove(self.address);
        self.transport.unplug();
    }
}
