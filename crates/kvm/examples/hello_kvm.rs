//! A guest of 15 instruction bytes greets through a serial port; the loop below is written against the traits, not against KVM.
//!
//! `cargo run -p freestone-kvm --example hello_kvm`

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use freestone_hypervisor::{CpuState, Exit, Hypervisor, MapFlags, Vcpu, Vm};
use freestone_kvm::Kvm;
use freestone_memory::{Bytes, GuestAddress, GuestMem};

const SERIAL: u16 = 0x3F8;
const ENTRY: u64 = 0x1000;
const TEXT: &[u8] = b"Hello from the guest\n\0";

/// Real mode: sends the bytes after the code until a zero, then halts.
const CODE: &[u8] = &[
    0xBE, 0x0F, 0x10, // mov si, text
    0xBA, 0xF8, 0x03, // mov dx, SERIAL
    0xAC, // next: lodsb
    0x84, 0xC0, // test al, al
    0x74, 0x03, // jz done
    0xEE, // out dx, al
    0xEB, 0xF8, // jmp next
    0xF4, // done: hlt
];

fn main() -> ExitCode {
    match Kvm::open().map_err(Into::into).and_then(|kvm| greet(&kvm)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello_kvm: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the guest on any hypervisor.
fn greet<H: Hypervisor>(hypervisor: &H) -> Result<(), Box<dyn Error>> {
    let memory = GuestMem::anonymous(0x1_0000)?;
    memory.view().write_slice(CODE, GuestAddress(ENTRY))?;
    memory.view().write_slice(TEXT, GuestAddress(ENTRY + CODE.len() as u64))?;

    let vm = hypervisor.create_vm()?;
    for (slot, region) in (0..).zip(memory.regions()) {
        vm.map(slot, Arc::clone(region), MapFlags::empty())?;
    }
    let mut vcpu = vm.create_vcpu(0)?;
    let mut special = vcpu.special_regs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_special_regs(&special)?;
    let mut regs = vcpu.regs()?;
    regs.rip = ENTRY;
    vcpu.set_regs(&regs)?;

    loop {
        match vcpu.run()? {
            Exit::PioWrite { port: SERIAL, data, .. } => io::stdout().write_all(data)?,
            Exit::Halt => return Ok(()),
            other => return Err(format!("the guest was not expected to do this: {other:?}").into()),
        }
    }
}
