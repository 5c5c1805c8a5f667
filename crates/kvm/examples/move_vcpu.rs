//! A guest counts on a port. In the middle its vCPU is saved and restored in a second VM, where it counts on.
//!
//! `cargo run -p freestone-kvm --example move_vcpu`

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use freestone_hypervisor::x86::{ClockPolicy, VcpuState, VmState};
use freestone_hypervisor::{CpuState, Exit, Hypervisor, MapFlags, Vcpu, Vm};
use freestone_kvm::{Kvm, KvmVcpu, KvmVm};
use freestone_memory::{Bytes, GuestAddress, GuestMem};

const PORT: u16 = 0x80;
const ENTRY: u64 = 0x1000;
const MEMORY: usize = 0x1_0000;

/// Real mode: counts in AL and at 0x2000, and says the number on the port.
const CODE: &[u8] = &[
    0xFE, 0xC0, // next: inc al
    0xFE, 0x06, 0x00, 0x20, // inc byte [0x2000]
    0xE6, 0x80, // out PORT, al
    0xEB, 0xF6, // jmp next
];

fn main() -> ExitCode {
    match Kvm::open().map_err(Into::into).and_then(|kvm| count(&kvm)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("move_vcpu: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A VM with memory, interrupt controller and one vCPU, in the order that is good for all hypervisors.
fn machine(kvm: &Kvm) -> Result<(GuestMem, KvmVm, KvmVcpu), Box<dyn Error>> {
    let memory = GuestMem::anonymous(MEMORY as u64)?;
    let vm = kvm.create_vm()?;
    for (slot, region) in (0..).zip(memory.regions()) {
        vm.map(slot, Arc::clone(region), MapFlags::empty())?;
    }
    vm.irq_chip()?;
    let vcpu = vm.create_vcpu(0)?;
    Ok((memory, vm, vcpu))
}

fn count(kvm: &Kvm) -> Result<(), Box<dyn Error>> {
    let (memory, vm, mut vcpu) = machine(kvm)?;
    memory.view().write_slice(CODE, GuestAddress(ENTRY))?;
    let mut special = vcpu.special_regs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_special_regs(&special)?;
    let mut regs = vcpu.regs()?;
    regs.rip = ENTRY;
    vcpu.set_regs(&regs)?;
    hear(&mut vcpu, "first", 3)?;

    // The last `out` is finished before the state is read: else it would be done again.
    vcpu.complete_exit()?;
    let state: VcpuState = vcpu.save()?;
    let chips: VmState = vm.state().ok_or("this hypervisor cannot save a VM")?.save()?;
    let mut pages = vec![0; MEMORY];
    memory.view().read_slice(&mut pages, GuestAddress(0))?;
    drop((vcpu, vm, memory));

    let (memory, vm, mut vcpu) = machine(kvm)?;
    memory.view().write_slice(&pages, GuestAddress(0))?;
    vcpu.restore(&state)?;
    let vm = vm.state().ok_or("this hypervisor cannot restore a VM")?;
    vm.restore(&chips)?;
    if let Some(clock) = &chips.clock {
        vm.set_clock(clock, ClockPolicy::Continue)?;
    }
    hear(&mut vcpu, "second", 3)?;
    let total: u8 = memory.view().read_obj(GuestAddress(0x2000))?;
    println!("the guest's memory says {total}");
    if total == 6 { Ok(()) } else { Err("a number is lost".into()) }
}

/// Runs until the guest has said `numbers` of them.
fn hear(vcpu: &mut KvmVcpu, vm: &str, numbers: u32) -> Result<(), Box<dyn Error>> {
    for _ in 0..numbers {
        match vcpu.run()? {
            Exit::PioWrite { port: PORT, data, .. } => println!("{vm} VM: {data:?}"),
            other => return Err(format!("the guest was not expected to do this: {other:?}").into()),
        }
    }
    Ok(())
}
