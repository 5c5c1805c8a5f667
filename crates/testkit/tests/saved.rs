//! Scripted vCPUs and VMs are saved and restored as those of a real hypervisor.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_hypervisor::x86::{ChipKind, ClockPolicy, ClockState, MpState, Msr, Regs, VmState};
use freestone_hypervisor::{CpuState, Error, Exit, Hypervisor, Vcpu, Vm};
use freestone_testkit::{Script, ScriptedHypervisor, ScriptedVm};

fn vm(script: Script) -> ScriptedVm {
    let vm = ScriptedHypervisor::new(script).non_blocking().create_vm().unwrap();
    vm.irq_chip().unwrap();
    vm
}

fn saved(vm: &ScriptedVm) -> VmState {
    vm.state().unwrap().save().unwrap()
}

#[test]
fn what_was_set_is_saved_and_restored_in_another_vm() {
    let mut vcpu = vm(Script::new()).create_vcpu(1).unwrap();
    vcpu.set_regs(&Regs { rax: 7, ..Regs::default() }).unwrap();
    vcpu.set_msrs(&[Msr { index: 0x10, value: 5 }]).unwrap();
    vcpu.set_lapic(&[9; 1024]).unwrap();
    vcpu.set_mp_state(MpState::Halted).unwrap();
    let state = vcpu.save().unwrap();
    assert_eq!((state.regs.rax, state.mp_state), (7, MpState::Halted));

    let other = vm(Script::new());
    let mut vcpu = other.create_vcpu(1).unwrap();
    assert_ne!(vcpu.save().unwrap(), state);
    vcpu.restore(&state).unwrap();
    assert_eq!(vcpu.save().unwrap(), state);
    assert!(other.probe().calls().contains(&"restore 1".to_owned()));
}

#[test]
fn vcpu_whose_last_exit_is_not_completed_is_not_saved() {
    let mut vcpu = vm(Script::new().pio_read(1, 1, 1)).create_vcpu(0).unwrap();
    assert!(matches!(vcpu.run().unwrap(), Exit::PioRead { .. }));
    assert!(matches!(vcpu.save(), Err(Error::Call { op: "saving the scripted vCPU", .. })));
    vcpu.complete_exit().unwrap();
    vcpu.save().unwrap();
}

#[test]
fn msr_that_the_host_refuses_hinders_a_restore_unless_it_is_zero() {
    let mut state = vm(Script::new()).create_vcpu(0).unwrap().save().unwrap();
    state.msrs = vec![Msr { index: 0x1a0, value: 0 }];
    let vm = ScriptedHypervisor::new(Script::new()).refuse_msrs(&[0x1a0]).create_vm().unwrap();
    vm.irq_chip().unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.restore(&state).unwrap();
    state.msrs = vec![Msr { index: 0x1a0, value: 3 }];
    let error = vcpu.restore(&state).unwrap_err();
    assert_eq!(error.to_string(), "MSR 0x1a0 cannot be set to 0x3");
}

#[test]
fn edge_that_nobody_took_is_taken_in_the_restored_vm() {
    let first = vm(Script::new());
    first.irq_chip().unwrap().unwrap().edge(5).unwrap().trigger().unwrap();
    let second = vm(Script::new().wait_irq(5).out8(1, 1).wait_irq(5).out8(1, 2));
    second.state().unwrap().restore(&saved(&first)).unwrap();
    assert_eq!(second.probe().edges(5), 0, "no device raised it here");
    let mut vcpu = second.create_vcpu(0).unwrap();
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { data: [1], .. }));
    assert!(matches!(vcpu.run().unwrap(), Exit::Interrupted), "it came once");
}

#[test]
fn what_is_saved_after_a_restore_is_what_was_restored() {
    let first = vm(Script::new());
    first.irq_chip().unwrap().unwrap().edge(3).unwrap().trigger().unwrap();
    let second = vm(Script::new());
    second.state().unwrap().restore(&saved(&first)).unwrap();
    assert_eq!(saved(&second), saved(&first));
}

#[test]
fn chips_are_refused_if_the_vm_has_none_or_they_have_another_length() {
    let state = saved(&vm(Script::new()));
    let bare = ScriptedHypervisor::new(Script::new()).without_irq_chip().create_vm().unwrap();
    assert!(saved(&bare).chips.is_empty());
    assert!(matches!(bare.state().unwrap().restore(&state), Err(Error::Unsupported(_))));
    let mut short = state.clone();
    for chip in short.chips.iter_mut().filter(|chip| chip.kind == ChipKind::Pit) {
        chip.registers.truncate(72);
    }
    let error = vm(Script::new()).state().unwrap().restore(&short).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { value: 72, .. }), "{error:?}");
}

#[test]
fn clock_is_what_was_set_and_the_policy_is_seen() {
    let vm = vm(Script::new());
    assert_eq!(vm.probe().clock(), None);
    let clock = ClockState { guest_ns: 5, host_realtime_ns: Some(6), host_tsc: Some(7) };
    vm.state().unwrap().set_clock(&clock, ClockPolicy::Advance).unwrap();
    assert_eq!(vm.probe().clock(), Some(clock));
    assert_eq!(saved(&vm).clock, Some(clock));
    assert!(vm.probe().calls().contains(&"set_clock Advance".to_owned()));
}
