//! Boots a guest that does not exist: it writes to its memory, kicks a device by a doorbell and waits for the interrupt.
//!
//! `cargo run --example scripted_vm`

use std::error::Error;
use std::sync::Arc;

use freestone_bus::{EFD_NONBLOCK, EventFd, IoAddr};
use freestone_hypervisor::{Exit, Hypervisor, MapFlags, Vcpu, Vm};
use freestone_memory::GuestMem;
use freestone_testkit::{Script, ScriptedHypervisor};

const DOORBELL: u64 = 0xd000_0050;

fn main() -> Result<(), Box<dyn Error>> {
    let script = Script::new()
        .mem_write(0x1000, b"request")
        .mmio_write32(DOORBELL, 0)
        .wait_irq(5)
        .expect_mem(0x2000, b"answer")
        .print(0x3f8, "done\n")
        .halt();
    let hypervisor = ScriptedHypervisor::new(script);
    let vm = hypervisor.create_vm()?;

    // Memory first, then the interrupt controller, then vCPUs: the order that is good for every hypervisor.
    let memory = GuestMem::anonymous(1 << 20)?;
    for (slot, region) in (0..).zip(memory.regions()) {
        vm.map(slot, Arc::clone(region), MapFlags::LOG_DIRTY)?;
    }
    let irq = vm.irq_chip()?.ok_or("no interrupt controller")?.edge(5)?;
    let kick = EventFd::new(EFD_NONBLOCK)?;
    let _bell = vm.doorbells().ok_or("no doorbells")?.bind(IoAddr::Mmio(DOORBELL), Some(0), &kick)?;
    let mut vcpu = vm.create_vcpu(0)?;

    // A device on a thread of its own: answers when it is kicked.
    let device = std::thread::spawn(move || -> std::io::Result<()> {
        use freestone_memory::{Bytes, GuestAddress};
        while kick.read().is_err() {
            std::thread::yield_now();
        }
        memory.view().write_slice(b"answer", GuestAddress(0x2000)).map_err(std::io::Error::other)?;
        irq.trigger()
    });

    loop {
        match vcpu.run()? {
            Exit::PioWrite { data, .. } => print!("{}", String::from_utf8_lossy(data)),
            Exit::Halt => break,
            other => println!("{other:?}"),
        }
    }
    device.join().map_err(|_| "the device panicked")??;

    let probe = hypervisor.probe();
    println!("asked of the VM: {:?}", probe.calls());
    for record in probe.records(0) {
        println!("seen by the guest: {record:?}");
    }
    let dirty = vm.dirty_log().ok_or("no dirty log")?.take(0)?;
    println!("pages the guest wrote: {}", dirty.iter().map(|w| w.count_ones()).sum::<u32>());
    Ok(())
}
