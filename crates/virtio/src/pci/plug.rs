//! [`VirtioPciPlug`]: a device as a function in a machine.

use std::sync::Arc;

use freestone_bus::pci::{PciAddress, PciSegment};
use freestone_bus::{Device, Plug, Wiring};
use freestone_snapshot::{Restoring, Saving};

use super::{PciTransport, PciWiring};
use crate::plug::{Lifecycle, Parts, Plugged, bus_error};
use crate::stats::DeviceStats;
use crate::{Result, VirtioDevice};

/// A virtio device that can be plugged into a machine as a function of PCI. A PCI root must be there before it.
#[derive(Debug)]
pub struct VirtioPciPlug(Parts);

impl VirtioPciPlug {
    /// Makes `device` pluggable; `name`, such as `virtio-blk0`, is for messages.
    pub fn new(device: impl VirtioDevice + 'static, name: impl Into<String>) -> Self {
        Self(Parts::new(Box::new(device), name.into()))
    }

    /// What the device's queues will count, to be kept by whoever wants to read it.
    pub fn stats(&self) -> DeviceStats {
        self.0.stats.clone()
    }
}

impl Plug for VirtioPciPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        plug(self.0, wiring)
    }
}

/// Wires a device up as a function.
pub(crate) fn plug(mut parts: Parts, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
    let missing = || freestone_bus::Error::Missing { what: "a PCI root", device: parts.name.clone() };
    let segment = wiring.pci().ok_or_else(missing)?;
    parts.device.attach(wiring)?;
    let wires = PciWiring {
        bars: segment.bars().clone(),
        mem: wiring.memory(),
        msi: wiring.msi(),
        doorbells: wiring.doorbells(),
        spawner: parts.spawner(wiring),
    };
    let transport = PciTransport::new(&parts.name, parts.device, wires);
    let transport = Arc::new(transport.map_err(bus_error("set up a virtio device"))?);
    transport.set_stats(parts.stats);
    let address = segment.insert(&parts.name, transport.clone())?;
    Ok(Box::new(Plugged::new(parts.name, Arc::new(Placed { transport, segment, address }))))
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

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.transport.save_at(Some(self.address), state)
    }

    fn restore(&self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.transport.restore_at(Some(self.address), state)
    }

    fn unplug(&self) {
        self.segment.remove(self.address);
        self.transport.unplug();
    }
}
