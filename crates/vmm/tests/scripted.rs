//! The life of a machine on a scripted hypervisor: no /dev/kvm is needed.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use freestone_testkit::{Op, Script, ScriptedHypervisor};
use freestone_vmm::devices::{PowerPlug, PvPanicPlug, RESET_PORT, RESET_VALUE, S5_TYPE, SLEEP_CONTROL_PORT};
use freestone_vmm::hypervisor::SystemEvent;
use freestone_vmm::loader::FlatMode;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::{Attention, Error, ExitReason, Machine, MachineBuilder, Payload, State};

/// `SLP_EN` of SLEEP_CONTROL_REG (ACPI 6.5, section 4.8.3.7).
const SLP_EN: u8 = 1 << 5;

fn payload() -> Payload {
    Payload::Flat { bytes: (&[0xf4]).into(), at: 0x1000, mode: FlatMode::Real16 }
}

fn builder(hypervisor: &ScriptedHypervisor) -> MachineBuilder<'_, ScriptedHypervisor> {
    MachineBuilder::new(hypervisor)
        .memory(GuestMem::anonymous(1 << 20).unwrap())
        .device(PowerPlug::new())
        .device(PvPanicPlug::new())
        .payload(payload())
}

fn run(script: Script) -> ExitReason {
    let hypervisor = ScriptedHypervisor::new(script);
    let mut machine = builder(&hypervisor).build().unwrap();
    let reason = machine.run().unwrap();
    assert_eq!(machine.state(), State::Stopped);
    reason
}

/// A machine whose guest stays inside until it is kicked.
fn waiting() -> Machine<ScriptedHypervisor> {
    let hypervisor =
        ScriptedHypervisor::new(Script::new().op(Op::WaitKick).op(Op::WaitKick).op(Op::WaitKick));
    let mut machine = builder(&hypervisor).build().unwrap();
    machine.start().unwrap();
    machine
}

#[test]
fn a_guest_that_sleeps_for_good_powers_the_machine_off() {
    let script = Script::new().out8(SLEEP_CONTROL_PORT, S5_TYPE << 2 | SLP_EN).op(Op::WaitKick);
    assert!(matches!(run(script), ExitReason::PowerOff));
}

#[test]
fn a_write_to_the_reset_register_resets() {
    let script = Script::new().out8(RESET_PORT, RESET_VALUE).op(Op::WaitKick);
    assert!(matches!(run(script), ExitReason::Reset));
}

#[test]
fn a_reset_after_a_reported_panic_is_a_panic() {
    let script = Script::new().out8(0x505, 1).out8(RESET_PORT, RESET_VALUE).op(Op::WaitKick);
    assert!(matches!(run(script), ExitReason::Panicked));
}

#[test]
fn system_events_of_the_hypervisor_end_the_machine_as_devices_do() {
    assert!(matches!(run(Script::new().op(Op::SystemEvent(SystemEvent::Shutdown))), ExitReason::PowerOff));
    assert!(matches!(run(Script::new().op(Op::SystemEvent(SystemEvent::Reset))), ExitReason::Reset));
}

#[test]
fn a_triple_fault_is_a_crash_with_a_report() {
    let reason = run(Script::new().shutdown());
    assert!(reason.to_string().contains("triple fault"), "{reason}");
}

#[test]
fn an_internal_error_shows_the_instruction() {
    let reason = run(Script::new().internal_error(1, &[0x0f, 0xc7, 0x0f]));
    let ExitReason::Crashed(crash) = &reason else { panic!("{reason}") };
    assert!(reason.to_string().contains("0f c7 0f"), "{reason}");
    assert!(crash.to_string().contains("rip"), "{crash}");
}

#[test]
fn a_failing_hypervisor_ends_the_machine_with_its_reason() {
    let reason = run(Script::new().op(Op::Fail("KVM_RUN")));
    assert!(
        matches!(&reason, ExitReason::Failed { vcpu: 0, error } if error.contains("KVM_RUN")),
        "{reason}"
    );
}

#[test]
fn a_machine_without_interrupts_ends_when_all_vcpus_have_halted() {
    let scripts = vec![Script::new().halt(), Script::new().halt()];
    let hypervisor = ScriptedHypervisor::with_scripts(scripts).without_irq_chip();
    let mut machine = MachineBuilder::new(&hypervisor)
        .cpus(2)
        .memory(GuestMem::anonymous(1 << 20).unwrap())
        .payload(payload())
        .build()
        .unwrap();
    assert!(matches!(machine.run().unwrap(), ExitReason::Halted));
}

#[test]
fn a_handle_stops_a_machine_from_another_thread() {
    let mut machine = waiting();
    let handle = machine.handle();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        handle.stop();
    });
    assert!(matches!(machine.wait().unwrap(), ExitReason::Stopped));
    thread.join().unwrap();
    machine.stop().unwrap();
}

#[test]
fn every_call_in_every_state_has_its_documented_answer() {
    let mut machine = waiting();
    assert!(matches!(machine.start(), Err(Error::State { state: "running", .. })));
    machine.resume().unwrap();
    machine.pause().unwrap();
    assert_eq!(machine.state(), State::Paused);
    machine.pause().unwrap();
    assert!(matches!(machine.wait(), Err(Error::State { state: "paused", .. })));
    machine.resume().unwrap();
    assert_eq!(machine.state(), State::Running);
    machine.stop().unwrap();
    machine.stop().unwrap();
    for answer in [machine.start(), machine.pause(), machine.resume(), machine.wait().map(drop)] {
        assert!(matches!(answer, Err(Error::State { state: "stopped", .. })));
    }
}

#[test]
fn a_machine_that_never_ran_can_be_stopped_and_dropped() {
    let hypervisor = ScriptedHypervisor::new(Script::new());
    let mut machine = builder(&hypervisor).build().unwrap();
    assert!(matches!(machine.pause(), Err(Error::State { state: "created", .. })));
    machine.stop().unwrap();
    drop(builder(&hypervisor).build().unwrap());
}

#[test]
fn too_few_and_too_many_vcpus_are_refused_with_the_number() {
    let hypervisor = ScriptedHypervisor::new(Script::new()).max_vcpus(4);
    for cpus in [0, 5] {
        let error = builder(&hypervisor).cpus(cpus).build().unwrap_err();
        assert_eq!(error.to_string(), format!("{cpus} vCPUs: this hypervisor allows 1 to 4"));
    }
}

#[test]
fn a_machine_needs_something_to_boot() {
    let hypervisor = ScriptedHypervisor::new(Script::new());
    assert!(matches!(MachineBuilder::new(&hypervisor).build(), Err(Error::NoPayload)));
}

#[test]
fn exits_are_counted_only_when_asked_for() {
    let script = || Script::new().out8(0x80, 1).out8(0x80, 2).halt();
    let stats = |on| {
        let hypervisor = ScriptedHypervisor::new(script()).without_irq_chip();
        let mut machine = builder_without_chip(&hypervisor).stats(on).build().unwrap();
        machine.run().unwrap();
        machine.stats()
    };
    assert!(stats(false).is_empty());
    let stats = stats(true);
    assert_eq!(stats.len(), 1);
    assert_eq!(stats[0].count(freestone_vmm::hypervisor::ExitReason::PioWrite), 2);
    assert_eq!(stats[0].total(), 3);
}

fn builder_without_chip(hypervisor: &ScriptedHypervisor) -> MachineBuilder<'_, ScriptedHypervisor> {
    MachineBuilder::new(hypervisor).memory(GuestMem::anonymous(1 << 20).unwrap()).payload(payload())
}

#[test]
fn a_machine_whose_guest_has_ended_is_not_saved() {
    let script = Script::new().out8(SLEEP_CONTROL_PORT, S5_TYPE << 2 | SLP_EN).op(Op::WaitKick);
    let hypervisor = ScriptedHypervisor::new(script);
    let mut machine = builder(&hypervisor).build().unwrap();
    machine.start().unwrap();
    while !machine.has_ended() {
        std::thread::yield_now();
    }
    machine.pause().unwrap();
    let error = machine.paused().unwrap().save().unwrap_err();
    assert_eq!(error.to_string(), "cannot save a machine that is at its guest's end");
    assert!(matches!(machine.attend().unwrap(), Attention::Ended(ExitReason::PowerOff)));
}
