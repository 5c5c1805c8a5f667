//! A machine with a PCI root and two virtio devices, and what a guest sees of it through the ports 0xcf8 and 0xcfc.
//!
//! `cargo run -p freestone-virtio --example lspci`

use std::error::Error;

use freestone_bus::BusView;
use freestone_devices::PciRootPlug;
use freestone_memory::GuestMem;
use freestone_testkit::TestWiring;
use freestone_virtio::{
    DeviceInfo, DeviceType, Resources, Result, Transport, VirtioDevice, VirtioPlug, Worker,
};

/// A device that never answers.
struct Silent(DeviceInfo);

impl Silent {
    fn new(device_type: DeviceType, queues: usize) -> Self {
        Self(DeviceInfo { device_type, features: 0, queue_max_sizes: vec![64; queues], config_len: 8 })
    }
}

impl VirtioDevice for Silent {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn start(&mut self, _resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        Ok(Vec::new())
    }
}

/// Reads 32 bits of configuration space by configuration mechanism 1.
fn config(ports: &mut BusView, device: u32, register: u32) -> std::result::Result<u32, Box<dyn Error>> {
    let mut data = [0; 4];
    ports.write(0xcf8, &(1 << 31 | device << 11 | register & 0xfc).to_le_bytes())?;
    ports.read(0xcfc, &mut data)?;
    Ok(u32::from_le_bytes(data))
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let mut machine = TestWiring::new(GuestMem::anonymous(1 << 20)?);
    let _root = machine.plug(PciRootPlug::new())?;
    let _net = machine.plug(VirtioPlug::new(Transport::Pci, Silent::new(DeviceType::NET, 3), "net0"))?;
    let _rng = machine.plug(VirtioPlug::new(Transport::Pci, Silent::new(DeviceType::RNG, 1), "rng0"))?;

    let mut ports = machine.pio_bus().view();
    for device in 0..32 {
        let id = config(&mut ports, device, 0x00)?;
        if id == u32::MAX {
            continue;
        }
        let class = config(&mut ports, device, 0x08)? >> 8;
        println!("00:{device:02x}.0 {:04x}:{:04x} class {class:06x}", id & 0xffff, id >> 16);
        println!("    BAR 0 at {:#x}", config(&mut ports, device, 0x10)?);
        let mut at = config(&mut ports, device, 0x34)? & 0xff;
        while at != 0 {
            let header = config(&mut ports, device, at)?;
            match header & 0xff {
                0x09 => {
                    let (kind, place) = (header >> 24, config(&mut ports, device, at + 8)?);
                    println!("    capability {at:#04x}: virtio structure {kind} at {place:#x}");
                }
                0x11 => println!("    capability {at:#04x}: MSI-X, {} vectors", (header >> 16 & 0x7ff) + 1),
                other => println!("    capability {at:#04x}: ID {other:#x}"),
            }
            at = header >> 8 & 0xff;
        }
    }
    Ok(())
}
