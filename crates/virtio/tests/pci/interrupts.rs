//! Vectors: who is interrupted, and when.

use freestone_testkit::driver::DriverTransport;

use super::{Machine, wiring};

#[test]
fn each_queue_interrupts_by_its_own_vector() {
    let mut machine = Machine::new(3);
    let mut queues = machine.start();
    for index in [2, 0, 2] {
        assert!(machine.request(&mut queues[usize::from(index)], index));
    }
    let delivered = |vector| machine.wiring.msi_count(machine.pci().message(vector));
    assert_eq!([0, 1, 2, 3].map(delivered), [0, 1, 0, 2]);
    assert_eq!(machine.wiring.msi_lost(), 0);
}

#[test]
fn queues_can_share_a_vector_or_have_none() {
    let mut machine = Machine::new(2);
    let mut queues = machine.start();
    machine.pci().set_vector(Some(0), 2).unwrap();
    for index in [0, 1] {
        assert!(machine.request(&mut queues[usize::from(index)], index));
    }
    assert_eq!(machine.wiring.msi_count(machine.pci().message(2)), 2);
    machine.pci().set_vector(Some(0), 0xffff).unwrap();
    assert!(machine.request(&mut queues[0], 0));
    assert_eq!(machine.wiring.msi_delivered().iter().map(|(_, n)| n).sum::<u64>(), 2);
}

#[test]
fn a_masked_queue_interrupts_when_it_is_unmasked() {
    let mut machine = Machine::new(1);
    let mut queues = machine.start();
    let message = machine.pci().message(1);
    machine.pci().mask_vector(1, true).unwrap();
    for _ in 0..3 {
        assert!(machine.request(&mut queues[0], 0));
    }
    assert!(machine.pci().is_pending(1).unwrap());
    assert_eq!(machine.wiring.msi_count(message), 0);
    machine.pci().mask_vector(1, false).unwrap();
    assert!(!machine.pci().is_pending(1).unwrap());
    assert_eq!(machine.wiring.msi_count(message), 1);
}

#[test]
fn a_reset_forgets_the_interrupts_that_wait() {
    let mut machine = Machine::new(1);
    let mut queues = machine.start();
    machine.pci().mask_vector(1, true).unwrap();
    assert!(machine.request(&mut queues[0], 0));
    machine.driver.reset().unwrap();
    machine.pci().mask_vector(1, false).unwrap();
    assert!(machine.wiring.msi_delivered().is_empty());
}

#[test]
fn a_machine_without_vectors_serves_requests() {
    let wirings = [wiring().without_msi(), wiring().with_msi_routes(0)];
    for wiring in wirings {
        let mut machine = Machine::on(wiring, 1);
        let mut queues = machine.start();
        assert!(machine.request(&mut queues[0], 0));
        assert_eq!(machine.driver.take_interrupt().unwrap() & 1, 1);
    }
}

#[test]
fn vectors_cost_no_route_until_a_driver_uses_them() {
    let mut machine = Machine::new(8);
    let held = machine.wiring.msi_routes().len();
    assert_eq!(held, 9, "the driver opened all of them");
    machine.pci().restore().unwrap();
    machine.start();
    assert_eq!(machine.wiring.msi_routes().len(), held, "and they are kept");
    let mut wiring = wiring();
    let fill = super::Fill::new(freestone_virtio::DeviceType::RNG, 8);
    let _device = wiring.plug(freestone_virtio::VirtioPciPlug::new(fill, "fill")).unwrap();
    assert!(wiring.msi_routes().is_empty());
}
