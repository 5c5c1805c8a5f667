//! The queues' registers.

use super::*;

#[test]
fn each_queue_has_its_own_registers() {
    let (_, machine) = recorder();
    let max = |queue| {
        machine.write(reg::QUEUE_SEL, queue);
        (machine.read(reg::QUEUE_NUM_MAX), machine.read(reg::QUEUE_READY))
    };
    assert_eq!([max(0), max(1), max(2)], [(64, 0), (16, 0), (8, 0)]);
    machine.negotiate(u64::MAX);
    machine.set_queue(1, config(&machine, 16));
    assert_eq!([max(0), max(1), max(2)], [(64, 0), (16, 1), (8, 0)]);
}

#[test]
fn a_queue_that_does_not_exist_reads_as_absent_and_takes_no_writes() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    for queue in [3, 4, 0xffff, 0x1_0000, 0x1_0001, u32::MAX] {
        machine.set_queue(queue, config(&machine, 8));
        assert_eq!((machine.read(reg::QUEUE_NUM_MAX), machine.read(reg::QUEUE_READY)), (0, 0), "{queue:#x}");
        machine.write(reg::QUEUE_READY, 0);
    }
    machine.set_status(SET_UP | DRIVER_OK);
    assert_eq!(recorder.starts(), [Vec::<u16>::new()]);
    assert!(!machine.needs_reset());
}

#[test]
fn kicks_of_queues_that_do_not_exist_are_ignored() {
    let (_, machine) = running();
    for queue in [3, 0xffff, 0x1_0000, u32::MAX] {
        machine.write(reg::QUEUE_NOTIFY, queue);
    }
    assert!(!machine.needs_reset());
}

#[test]
fn a_queue_s_registers_cannot_be_changed_while_it_is_enabled() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, config(&machine, 64));
    machine.write(reg::QUEUE_NUM, 3);
    machine.write(reg::QUEUE_DESC_LOW, u32::try_from(HOLE).unwrap());
    machine.set_status(SET_UP | DRIVER_OK);
    assert!(!machine.needs_reset());
    assert_eq!(recorder.starts(), [vec![0]]);
}

#[test]
fn registers_changed_after_activation_have_no_effect() {
    let image = TestImage::new(4);
    let mut machine = Machine::started(&image);
    let junk = QueueConfig { size: 3, descriptors: u64::MAX, driver: HOLE, device: 1 };
    machine.set_queue(0, junk);
    machine.registers.pause();
    machine.set_queue(0, junk);
    machine.registers.resume().unwrap();
    assert_eq!(machine.block_request(0, 1, &[(0x9000, 512, true)]), (0, 513));
}

#[test]
fn a_queue_can_be_set_up_again_before_the_driver_is_ready() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, QueueConfig { size: 5, ..config(&machine, 8) });
    machine.write(reg::QUEUE_READY, 0);
    assert_eq!(machine.read(reg::QUEUE_READY), 0);
    machine.set_queue(0, config(&machine, 8));
    machine.set_status(SET_UP | DRIVER_OK);
    assert!(!machine.needs_reset());
    assert_eq!(recorder.starts(), [vec![0]]);
}

#[test]
fn no_queue_can_be_enabled_after_the_driver_is_ready() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, config(&machine, 64));
    machine.set_status(SET_UP | DRIVER_OK);
    machine.set_queue(1, config(&machine, 16));
    assert_eq!(machine.read(reg::QUEUE_READY), 0);
    assert_eq!(recorder.starts(), [vec![0]]);
}

#[test]
fn a_queue_disabled_while_it_runs_is_taken_from_the_device() {
    for one_worker in [true, false] {
        let recorder = Recorder { one_worker, ..Recorder::new() };
        let machine = Machine::new(recorder.clone());
        start_all(&machine);
        machine.write(reg::QUEUE_SEL, 1);
        machine.write(reg::QUEUE_READY, 0);
        machine.write(reg::QUEUE_READY, 0);
        assert_eq!(machine.read(reg::QUEUE_READY), 0);
        assert_eq!(recorder.starts(), [vec![0, 1, 2], vec![0, 2]]);
        assert!(!machine.needs_reset());
    }
}

#[test]
fn a_queue_disabled_while_the_device_is_paused_does_not_come_back() {
    let (recorder, machine) = running();
    machine.registers.pause();
    machine.write(reg::QUEUE_SEL, 0);
    machine.write(reg::QUEUE_READY, 0);
    assert_eq!(recorder.log().starts.len(), 1);
    machine.registers.resume().unwrap();
    assert_eq!(recorder.starts(), [vec![0, 1, 2], vec![1, 2]]);
}

#[test]
fn a_queue_that_cannot_work_breaks_the_device_at_activation() {
    let bad = [
        QueueConfig { size: 0, descriptors: 0x1000, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 128, descriptors: 0x1000, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 7, descriptors: 0x1000, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 8, descriptors: HOLE, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 8, descriptors: 0x1000, driver: 0x2001, device: 0x3000 },
        QueueConfig { size: 8, descriptors: 0x1000, driver: 0x2000, device: u64::MAX - 3 },
    ];
    for config in bad {
        let image = TestImage::new(4);
        let mut machine = Machine::new(block(&image));
        machine.negotiate(u64::MAX);
        machine.set_queue(0, config);
        machine.set_status(SET_UP | DRIVER_OK);
        assert_eq!(machine.status(), 0b1111 | DEVICE_NEEDS_RESET, "{config:?}");
        assert!(machine.spawner.is_empty());
        machine.assert_broken_until_reset();
    }
}

#[test]
fn queue_sizes_that_do_not_fit_the_register_are_not_cut_to_size() {
    let (_, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, config(&machine, 8));
    machine.write(reg::QUEUE_READY, 0);
    machine.write(reg::QUEUE_NUM, 0x1_0008);
    machine.write(reg::QUEUE_READY, 1);
    machine.set_status(SET_UP | DRIVER_OK);
    assert!(machine.needs_reset());
}
