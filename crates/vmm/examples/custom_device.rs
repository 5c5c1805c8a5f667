//! A device of our own, memory-mapped, in a machine that runs without any hypervisor.
//!
//! The device adds up what the guest writes to it. The "guest" is a script, so this runs anywhere; with
//! `Kvm::open()` in place of the scripted hypervisor the same device serves a real one.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use freestone_testkit::{Script, ScriptedHypervisor};
use freestone_vmm::bus::{self, Access, AccessError, Device, IoDevice, Plug, Wiring};
use freestone_vmm::loader::FlatMode;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::{MachineBuilder, Payload};

/// Where the device stands.
const BASE: u64 = 0xe000_0000;

/// One register of 32 bits: writes add to it, reads give the sum. No lock, so two vCPUs may be in it at once.
#[derive(Default)]
struct Adder(AtomicU32);

impl IoDevice for Adder {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        if offset != 0 {
            return Err(AccessError::NoRegister);
        }
        let data: &mut [u8; 4] = data.try_into().map_err(|_| AccessError::Width)?;
        *data = self.0.load(Ordering::Relaxed).to_le_bytes();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        if offset != 0 {
            return Err(AccessError::NoRegister);
        }
        let data: [u8; 4] = data.try_into().map_err(|_| AccessError::Width)?;
        self.0.fetch_add(u32::from_le_bytes(data), Ordering::Relaxed);
        Ok(())
    }
}

/// Puts an [`Adder`] into a machine.
struct AdderPlug(Arc<Adder>);

impl Plug for AdderPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> bus::Result<Box<dyn Device>> {
        wiring.mmio(BASE, 4, Arc::clone(&self.0) as _)?;
        Ok(self)
    }
}

impl Device for AdderPlug {
    fn name(&self) -> &str {
        "adder"
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Script::new().mmio_write32(BASE, 40).mmio_write32(BASE, 2).expect_mmio32(BASE, 42).halt();
    let hypervisor = ScriptedHypervisor::new(guest).without_irq_chip();
    let adder = Arc::new(Adder::default());
    let mut machine = MachineBuilder::new(&hypervisor)
        .memory(GuestMem::anonymous(1 << 20)?)
        .device(AdderPlug(Arc::clone(&adder)))
        .payload(Payload::Flat { bytes: (&[0xf4]).into(), at: 0x1000, mode: FlatMode::Real16 })
        .build()?;
    println!("{}; the sum is {}", machine.run()?, adder.0.load(Ordering::Relaxed));
    if let Some(wrong) = hypervisor.probe().mismatches().first() {
        return Err(wrong.clone().into());
    }
    Ok(())
}
