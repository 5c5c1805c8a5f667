//! The guest of the bench under Freestone: KVM backend, run loop, dispatcher, bus, device.

use std::sync::Arc;

use freestone_benches::Fallible;
use freestone_benches::image::Image;
use freestone_bus::Bus;
use freestone_guest::exits::Command;
use freestone_guest::{DONE_PORT, EXITS, PARAMS};
use freestone_hypervisor::{CpuState, Hypervisor, MapFlags, Vm};
use freestone_kvm::{Kvm, KvmVcpu, KvmVm};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_vcpu::{BootState, CpuidConfig, Dispatcher, RunLoop, Turn, configure_boot, cpuid};

use crate::Subject;
use crate::devices::{DonePort, LOCKED_MMIO, LOCKED_PORT, LockedRegister, MMIO, PORT, Register};

/// Memory of the VM, in bytes.
const MEMORY: u64 = 16 << 20;
/// How many devices beside ours are on each bus, so that there is something to look up.
const NEIGHBOURS: u16 = 8;

/// Freestone.
pub(crate) struct Whole {
    run_loop: RunLoop<KvmVcpu>,
    done: Arc<DonePort>,
    memory: GuestMem,
    _vm: KvmVm,
}

impl Whole {
    pub(crate) fn new() -> Fallible<Self> {
        let kvm = Kvm::open()?;
        let memory = GuestMem::anonymous(MEMORY)?;
        let vm = kvm.create_vm()?;
        for (slot, region) in (0..).zip(memory.regions()) {
            vm.map(slot, Arc::clone(region), MapFlags::empty())?;
        }
        // Kept by the VM.
        let _ = vm.irq_chip()?;
        let mut vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid(&cpuid::filter(&kvm.supported_cpuid()?, &CpuidConfig::new(1, 0)))?;

        let image = Image::new(EXITS).ok_or("the guest is not an image")?;
        for (gpa, data) in image.segments() {
            memory.view().write_slice(data, GuestAddress(gpa))?;
        }
        let entry = image.entry().ok_or("the image has no entry")?;
        configure_boot(&mut vcpu, &memory, &BootState::Protected32 { entry, ebx: 0, esi: 0 })?;

        let done = Arc::new(DonePort::default());
        let (pio, mmio) = buses()?;
        pio.insert(DONE_PORT.into(), 1, Arc::clone(&done) as _)?;
        let run_loop = RunLoop::new(vcpu, Dispatcher::new(pio.view(), mmio.view()));
        let mut whole = Self { run_loop, done, memory, _vm: vm };
        whole.round()?;
        Ok(whole)
    }
}

/// Ports and memory with our device in both its forms and some neighbours.
pub(crate) fn buses() -> Fallible<(Bus, Bus)> {
    let (pio, mmio) = (Bus::new(), Bus::new());
    let (free, locked) = (Arc::new(Register::default()), Arc::new(LockedRegister::default()));
    pio.insert(PORT.into(), 1, Arc::clone(&free) as _)?;
    pio.insert(LOCKED_PORT.into(), 1, Arc::clone(&locked) as _)?;
    mmio.insert(MMIO, 0x1000, free)?;
    mmio.insert(LOCKED_MMIO, 0x1000, locked)?;
    for i in 0..u64::from(NEIGHBOURS) {
        pio.insert(0x300 + 8 * i, 8, Arc::new(Register::default()))?;
        mmio.insert(MMIO + 0x10_0000 + 0x1000 * i, 0x1000, Arc::new(Register::default()))?;
    }
    Ok((pio, mmio))
}

impl Subject for Whole {
    fn command(&mut self, command: Command) -> Fallible<()> {
        Ok(self.memory.view().write_slice(&command.to_bytes(), GuestAddress(PARAMS))?)
    }

    fn round(&mut self) -> Fallible<()> {
        while !self.done.take() {
            match self.run_loop.step()? {
                Turn::Ran => {}
                other => return Err(format!("the guest ended: {other:?}").into()),
            }
        }
        if self.done.refused() { Err("the guest refused a command".into()) } else { Ok(()) }
    }
}
