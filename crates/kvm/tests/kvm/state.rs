//! Registers and what else makes up the state of a vCPU; and the report on the host.

use freestone_hypervisor::x86::{CpuidLeaf, MpState, Msr, Regs};
use freestone_hypervisor::{CpuState, Error, Hypervisor, Vm};
use freestone_kvm::probe::probe;

use crate::common::*;

const TSC: u32 = 0x10;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const EFER: u32 = 0xC000_0080;

#[test]
fn general_registers_read_back_as_set() {
    let Some(kvm) = kvm("general_registers_read_back_as_set") else { return };
    let mut vcpu = Machine::new(&kvm, &[]).vcpu(0);
    let regs = Regs {
        rax: 1,
        rbx: 2,
        rcx: 3,
        rdx: 4,
        rsi: 5,
        rdi: 6,
        rsp: 7,
        rbp: 8,
        r8: 9,
        r9: 10,
        r10: 11,
        r11: 12,
        r12: 13,
        r13: 14,
        r14: 15,
        r15: u64::MAX,
        rip: 0x1234,
        rflags: 0x202,
    };
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.regs().unwrap(), regs);
}

#[test]
fn special_registers_read_back_as_set() {
    let Some(kvm) = kvm("special_registers_read_back_as_set") else { return };
    let machine = Machine::new(&kvm, &[]);
    let mut vcpu = machine.vcpu(0);
    set_long_mode(&machine, &mut vcpu, Regs::default());
    let mut special = vcpu.special_regs().unwrap();
    special.gdt.base = 0x500;
    special.gdt.limit = 0x1F;
    special.cr2 = 0xDEAD_B000;
    special.fs.base = 0x1_2345_6789;
    vcpu.set_special_regs(&special).unwrap();
    assert_eq!(vcpu.special_regs().unwrap(), special);
}

#[test]
fn special_registers_that_cannot_be_are_refused() {
    let Some(kvm) = kvm("special_registers_that_cannot_be_are_refused") else { return };
    let mut vcpu = Machine::new(&kvm, &[]).vcpu(0);
    let mut special = vcpu.special_regs().unwrap();
    special.cr4 = u64::MAX;
    let error = vcpu.set_special_regs(&special).unwrap_err();
    assert!(matches!(error, Error::Call { op: "KVM_SET_SREGS", .. }), "{error:?}");
}

#[test]
fn msrs_read_back_as_set_in_any_number() {
    let Some(kvm) = kvm("msrs_read_back_as_set_in_any_number") else { return };
    let mut vcpu = Machine::new(&kvm, &[]).vcpu(0);
    let pair = [Msr { index: SYSENTER_CS, value: 0x10 }, Msr { index: SYSENTER_ESP, value: 0x8000 }];
    vcpu.set_msrs(&pair.repeat(150)).unwrap();
    let mut read = pair.map(|msr| Msr { value: 0, ..msr }).repeat(150);
    vcpu.msrs(&mut read).unwrap();
    assert_eq!(read, pair.repeat(150));
}

#[test]
fn msr_that_takes_no_such_value_is_named() {
    let Some(kvm) = kvm("msr_that_takes_no_such_value_is_named") else { return };
    let mut vcpu = Machine::new(&kvm, &[]).vcpu(0);
    let msrs = [Msr { index: SYSENTER_CS, value: 1 }, Msr { index: EFER, value: u64::MAX }];
    let error = vcpu.set_msrs(&msrs).unwrap_err();
    assert_eq!(error.to_string(), "MSR 0xc0000080 cannot be written");
}

#[test]
fn msr_that_does_not_exist_is_named() {
    let test = "msr_that_does_not_exist_is_named";
    let Some(kvm) = kvm(test) else { return };
    if std::fs::read_to_string("/sys/module/kvm/parameters/ignore_msrs").is_ok_and(|s| s.starts_with('Y')) {
        return skip(test, "this host's KVM ignores unknown MSRs (ignore_msrs=1)");
    }
    let vcpu = Machine::new(&kvm, &[]).vcpu(0);
    let mut msrs = [TSC, 0xDEAD_0000, SYSENTER_CS].map(|index| Msr { index, value: 0 });
    let error = vcpu.msrs(&mut msrs).unwrap_err();
    assert!(matches!(error, Error::Msr { index: 0xDEAD_0000, access: "read" }), "{error:?}");
}

#[test]
fn supported_cpuid_is_told_and_can_be_set() {
    let Some(kvm) = kvm("supported_cpuid_is_told_and_can_be_set") else { return };
    let leaves = kvm.supported_cpuid().unwrap();
    assert!(leaves.iter().any(|leaf| leaf.function == 0 && leaf.eax > 0));
    assert!(leaves.iter().any(|leaf| leaf.indexed && leaf.index > 0));
    assert_eq!(kvm.clone().supported_cpuid().unwrap(), leaves);
    Machine::new(&kvm, &[]).vcpu(0).set_cpuid(&leaves).unwrap();
}

#[test]
fn supported_cpuid_has_the_name_of_the_processor_and_its_deadline_timer() {
    let Some(kvm) = kvm("supported_cpuid_has_the_name_of_the_processor_and_its_deadline_timer") else {
        return;
    };
    let leaves = kvm.supported_cpuid().unwrap();
    let leaf = |function| leaves.iter().find(|leaf| leaf.function == function);
    let name = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let name =
        name.lines().find_map(|l| l.strip_prefix("model name")).unwrap().trim_start_matches(['\t', ':', ' ']);
    let first = leaf(0x8000_0002).unwrap().eax.to_le_bytes();
    assert!(name.as_bytes().starts_with(&first), "{name} {first:?}");
    let deadline = probe().capabilities.iter().any(|c| c.name == "KVM_CAP_TSC_DEADLINE_TIMER" && c.present());
    assert_eq!(leaf(1).unwrap().ecx & 1 << 24 != 0, deadline);
}

#[test]
fn too_many_cpuid_leaves_are_refused() {
    let Some(kvm) = kvm("too_many_cpuid_leaves_are_refused") else { return };
    let error = Machine::new(&kvm, &[]).vcpu(0).set_cpuid(&[CpuidLeaf::default(); 257]).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { value: 257, .. }), "{error:?}");
}

#[test]
fn guest_sees_the_cpuid_that_was_set() {
    let test = "guest_sees_the_cpuid_that_was_set";
    let Some(kvm) = kvm(test) else { return };
    // mov eax, 0x40000000; cpuid; hlt
    let machine = Machine::new(&kvm, &[0x66, 0xB8, 0, 0, 0, 0x40, 0x0F, 0xA2, 0xF4]);
    let mut vcpu = machine.vcpu(0);
    let leaf = CpuidLeaf { function: 0x4000_0000, eax: 1, ebx: 2, ecx: 3, edx: 4, ..CpuidLeaf::default() };
    vcpu.set_cpuid(&[leaf]).unwrap();
    run_to_halt(&mut vcpu, |exit| panic!("{exit:?}"));
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rax, regs.rbx, regs.rcx, regs.rdx), (1, 2, 3, 4));
}

#[test]
fn mp_state_reads_back_as_set() {
    let Some(kvm) = kvm("mp_state_reads_back_as_set") else { return };
    let machine = Machine::new(&kvm, &[]);
    machine.vm.irq_chip().unwrap();
    let mut vcpu = machine.vcpu(0);
    for state in [MpState::Halted, MpState::Uninitialized, MpState::Runnable] {
        vcpu.set_mp_state(state).unwrap();
        assert_eq!(vcpu.mp_state().unwrap(), state);
    }
}

#[test]
fn local_apic_reads_back_as_set() {
    /// Task priority and initial timer count: offsets of registers.
    const TPR: usize = 0x80;
    const SPURIOUS: usize = 0xF0;
    let Some(kvm) = kvm("local_apic_reads_back_as_set") else { return };
    let machine = Machine::new(&kvm, &[]);
    machine.vm.irq_chip().unwrap();
    let _boot = machine.vcpu(0);
    let mut vcpu = machine.vcpu(1);
    let mut lapic = vcpu.lapic().unwrap();
    assert_eq!(lapic[0x20..0x24], [0, 0, 0, 1], "APIC ID");
    lapic[TPR] = 0x20;
    lapic[SPURIOUS..SPURIOUS + 2].copy_from_slice(&[0xFF, 0x01]);
    vcpu.set_lapic(&lapic).unwrap();
    let read = vcpu.lapic().unwrap();
    assert_eq!((read[TPR], &read[SPURIOUS..SPURIOUS + 2]), (0x20, &[0xFF, 0x01][..]));
}

#[test]
fn without_interrupt_controller_there_is_no_local_apic() {
    let Some(kvm) = kvm("without_interrupt_controller_there_is_no_local_apic") else { return };
    let vcpu = Machine::new(&kvm, &[]).vcpu(0);
    assert!(matches!(vcpu.lapic().unwrap_err(), Error::Call { op: "KVM_GET_LAPIC", .. }));
}

#[test]
fn probe_agrees_with_what_can_be_opened() {
    let Some(kvm) = kvm("probe_agrees_with_what_can_be_opened") else { return };
    let report = probe();
    assert!(report.usable(), "{report}");
    assert_eq!(report.api_version, Some(12));
    assert_eq!(report.max_vcpus, Some(kvm.max_vcpus() as usize));
    assert!(report.modules.iter().any(|module| module == "kvm"));
    let irqfd = report.capabilities.iter().find(|c| c.name == "KVM_CAP_IRQFD").unwrap();
    assert!(irqfd.required && irqfd.present());
    assert!(report.to_string().contains("KVM_CAP_IRQFD"));
}
