//! The report of a guest that cannot go on.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_hypervisor::x86::{Regs, SpecialRegs};
use freestone_hypervisor::{CpuState, Hypervisor, InstructionBytes, Vm};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_testkit::{RepeatVcpu, Script, ScriptedHypervisor, ScriptedVcpu};
use freestone_vcpu::{BootState, Crash, StopReason, configure_boot};

fn booted(state: &BootState) -> (ScriptedVcpu, GuestMem) {
    let mem = GuestMem::anonymous(4 << 20).unwrap();
    let mut vcpu = ScriptedHypervisor::new(Script::new()).create_vm().unwrap().create_vcpu(0).unwrap();
    configure_boot(&mut vcpu, &mem, state).unwrap();
    (vcpu, mem)
}

#[test]
fn the_bytes_at_the_instruction_pointer_are_found_through_page_tables() {
    let (vcpu, mem) = booted(&BootState::Long64 { entry: 0x10_0000, rsi: 0 });
    mem.view().write_slice(&[0x48, 0x0f, 0xc7, 0x0f], GuestAddress(0x10_0000)).unwrap();
    let instruction = InstructionBytes::new(&[0x48, 0x0f, 0xc7, 0x0f]);
    let crash = Crash::collect(&vcpu, &mem, StopReason::InternalError { suberror: 1, instruction });
    assert_eq!(crash.rip_gpa, Ok(0x10_0000));
    assert_eq!(crash.code[..4], [0x48, 0x0f, 0xc7, 0x0f]);
    let report = crash.to_string();
    for part in [
        "vCPU 0",
        "cannot be emulated",
        "[48 0f c7 0f]",
        "guest-physical 0x100000: 48 0f c7 0f",
        "cr3",
        "r15",
    ] {
        assert!(report.contains(part), "{part} is missing in\n{report}");
    }
}

#[test]
fn the_segment_base_counts_in_real_mode() {
    let (vcpu, mem) = booted(&BootState::Real16 { segment: 0x1000, offset: 0x20 });
    mem.view().write_obj(0x0b0fu16, GuestAddress(0x1_0020)).unwrap();
    let crash = Crash::collect(&vcpu, &mem, StopReason::Shutdown);
    assert_eq!((crash.rip_gpa.clone(), &crash.code[..2]), (Ok(0x1_0020), &[0x0f, 0x0b][..]));
}

#[test]
fn the_summary_is_one_line_with_vcpu_reason_and_place() {
    let (vcpu, mem) = booted(&BootState::Protected32 { entry: 0x1234, ebx: 0, esi: 0 });
    let crash = Crash::collect(&vcpu, &mem, StopReason::Shutdown);
    assert_eq!(crash.summary(), "vCPU 0: triple fault (rip 0x1234)");
}

#[test]
fn an_instruction_pointer_that_means_nothing_is_reported_as_such() {
    let (mut vcpu, mem) = booted(&BootState::Long64 { entry: 0x10_0000, rsi: 0 });
    vcpu.set_regs(&Regs { rip: 0xffff_ffff_8100_0000, ..Regs::default() }).unwrap();
    let crash = Crash::collect(&vcpu, &mem, StopReason::Shutdown);
    assert!(crash.rip_gpa.unwrap_err().contains("not present"));
    assert!(crash.code.is_empty());
    vcpu.set_special_regs(&SpecialRegs {
        cr0: 1 << 31,
        cr3: u64::MAX,
        cr4: 0x20,
        efer: 0x500,
        ..SpecialRegs::default()
    })
    .unwrap();
    let crash = Crash::collect(&vcpu, &mem, StopReason::Shutdown);
    assert!(crash.to_string().contains("no code at the instruction pointer"));
}

#[test]
fn code_at_the_end_of_memory_is_shown_as_far_as_it_goes() {
    let (mut vcpu, mem) = booted(&BootState::Protected32 { entry: 0, ebx: 0, esi: 0 });
    vcpu.set_regs(&Regs { rip: (4 << 20) - 3, ..Regs::default() }).unwrap();
    assert_eq!(Crash::collect(&vcpu, &mem, StopReason::Shutdown).code.len(), 3);
}

#[test]
fn a_report_is_made_even_if_the_registers_cannot_be_read() {
    let mem = GuestMem::anonymous(1 << 20).unwrap();
    let crash = Crash::collect(&RepeatVcpu::pio_read(0), &mem, StopReason::Unhandled { reason: 7 });
    assert_eq!(crash.summary(), "vCPU 0: unknown exit reason 7 of the hypervisor");
    assert!(crash.to_string().contains("not readable"));
}
