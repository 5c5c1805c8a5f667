//! Faults, resets, pauses and kicks.

use super::*;

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let (recorder, machine) = recorder();
    recorder.log().refuse = true;
    start_all(&machine);
    assert!(machine.needs_reset());
    assert_eq!(machine.registers.faults(), 1);
    recorder.log().refuse = false;
    start_all(&machine);
    assert_eq!(machine.status(), 0b1111);
}

#[test]
fn a_fault_interrupts_once_and_is_counted() {
    let (recorder, machine) = running();
    let control = recorder.log().control.clone().unwrap();
    let before = machine.interrupts.load(Ordering::SeqCst);
    control.fault(&Error::Direction);
    control.fault(&Error::Direction);
    assert_eq!(machine.status(), 0b1111 | DEVICE_NEEDS_RESET);
    assert_eq!(machine.interrupts.load(Ordering::SeqCst), before + 1);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2);
    assert_eq!(machine.registers.faults(), 2);
}

#[test]
fn a_fault_from_before_a_reset_does_not_break_the_device_after_it() {
    let (recorder, machine) = running();
    let old = recorder.log().control.clone().unwrap();
    machine.set_status(0);
    start_all(&machine);
    old.fault(&Error::Direction);
    assert!(!machine.needs_reset());
}

#[test]
fn a_configuration_change_raises_the_generation_and_interrupts() {
    let (recorder, machine) = running();
    let generation = machine.read(reg::CONFIG_GENERATION);
    recorder.log().control.clone().unwrap().config_changed();
    assert_ne!(machine.read(reg::CONFIG_GENERATION), generation);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2);
    machine.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2, "the other reason was acknowledged");
    machine.write(reg::INTERRUPT_ACK, 2);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn a_reset_clears_everything_a_driver_can_see() {
    let (recorder, machine) = running();
    recorder.log().control.clone().unwrap().fault(&Error::Direction);
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
    for queue in 0..3 {
        machine.write(reg::QUEUE_SEL, queue);
        assert_eq!(machine.read(reg::QUEUE_READY), 0);
    }
    assert!(machine.spawner.is_empty());
    assert_eq!(recorder.log().resets, 2, "one at the start, one now");
    // No feature of the last driver is left over.
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.set_status(SET_UP);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_reset_of_a_device_that_never_ran_is_harmless() {
    let (recorder, machine) = recorder();
    machine.set_status(0);
    machine.set_status(ACKNOWLEDGE);
    machine.set_status(0);
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
    assert!(recorder.log().starts.is_empty());
    start_all(&machine);
    assert_eq!(machine.status(), 0b1111);
}

#[test]
fn a_reset_while_paused_leaves_nothing_to_resume() {
    let (recorder, machine) = running();
    machine.registers.pause();
    machine.set_status(0);
    machine.registers.resume().unwrap();
    assert_eq!(recorder.log().starts.len(), 1);
    assert!(machine.spawner.is_empty());
}

#[test]
fn pause_and_resume_give_the_device_the_same_queues() {
    for one_worker in [true, false] {
        let recorder = Recorder { one_worker, ..Recorder::new() };
        let machine = Machine::new(recorder.clone());
        start_all(&machine);
        machine.registers.pause();
        assert!(machine.spawner.is_empty());
        machine.registers.resume().unwrap();
        assert_eq!(recorder.starts(), [vec![0, 1, 2], vec![0, 1, 2]]);
        assert_eq!(recorder.log().resets, 1, "that of the driver at the start");
    }
}

#[test]
fn a_kick_storm_and_kicks_of_a_stopped_device_are_harmless() {
    let image = TestImage::new(4);
    let mut machine = Machine::new(block(&image));
    for _ in 0..1000 {
        machine.kick();
    }
    machine.start(u64::MAX);
    for _ in 0..1000 {
        machine.kick();
    }
    assert_eq!(machine.block_request(0, 0, &[(0x9000, 512, true)]), (0, 513));
    machine.set_status(0);
    for _ in 0..1000 {
        machine.run();
    }
    machine.assert_works_after_reset();
}
