//! Negotiation: the status field and the features.

use super::*;

#[test]
fn the_registers_identify_a_version_2_device() {
    let (_, machine) = recorder();
    assert_eq!(machine.read(reg::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(machine.read(reg::VERSION), 2);
    assert_eq!(machine.read(reg::DEVICE_ID), 42);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn the_device_offers_its_own_features_and_those_of_the_transport() {
    let (_, machine) = recorder();
    assert_eq!(machine.device_features(), 1 << 3 | 1 << 40 | 1 << 28 | 1 << 29 | 1 << 32 | 1 << 34);
    machine.write(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(machine.read(reg::DEVICE_FEATURES), 0);
    machine.write(reg::DEVICE_FEATURES_SEL, u32::MAX);
    assert_eq!(machine.read(reg::DEVICE_FEATURES), 0);
}

#[test]
fn a_driver_that_keeps_the_order_gets_a_running_device() {
    let (recorder, machine) = running();
    assert_eq!(machine.status(), 0b1111);
    assert_eq!(recorder.starts(), [vec![0, 1, 2]]);
    let negotiated = recorder.log().starts.first().unwrap().0;
    assert_eq!(negotiated, machine.device_features() & !features::RING_PACKED);
    assert_eq!(machine.spawner.len(), 1);
}

#[test]
fn several_status_bits_may_be_written_at_once() {
    let (recorder, machine) = recorder();
    machine.set_status(0);
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.set_driver_features(features::VERSION_1);
    machine.set_status(SET_UP | DRIVER_OK);
    assert_eq!(machine.status(), 0b1111);
    assert_eq!(recorder.starts(), [Vec::<u16>::new()], "no queue was enabled");
}

#[test]
fn status_bits_out_of_order_are_not_set() {
    let (recorder, machine) = recorder();
    for value in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | FEATURES_OK | DRIVER_OK] {
        machine.set_status(value);
        assert_eq!(machine.status(), 0, "{value:#x}");
    }
    machine.set_status(ACKNOWLEDGE | FEATURES_OK | DRIVER_OK);
    assert_eq!(machine.status(), ACKNOWLEDGE);
    machine.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
    assert!(recorder.log().starts.is_empty());
}

#[test]
fn status_bits_can_only_be_cleared_by_a_reset() {
    let (recorder, machine) = running();
    for value in [ACKNOWLEDGE, DRIVER_OK, FEATURES_OK | DRIVER] {
        machine.set_status(value);
        assert_eq!(machine.status(), 0b1111);
    }
    assert_eq!(recorder.log().starts.len(), 1);
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
}

#[test]
fn status_bits_that_the_driver_does_not_own_cannot_be_set() {
    let (_, machine) = recorder();
    machine.set_status(0x70 | ACKNOWLEDGE);
    assert_eq!(machine.status(), ACKNOWLEDGE);
    machine.write(reg::STATUS, 0xffff_ff00 | u32::from(DRIVER));
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_driver_that_gave_up_gets_no_further() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_status(SET_UP | FAILED);
    machine.set_status(SET_UP | FAILED | DRIVER_OK);
    assert_eq!(machine.status(), SET_UP | FAILED);
    assert!(recorder.log().starts.is_empty());
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for unknown in [1 << 0, 1 << 35, 1 << 63] {
        let (_, machine) = recorder();
        machine.set_status(ACKNOWLEDGE | DRIVER);
        machine.set_driver_features(features::VERSION_1 | unknown);
        machine.set_status(SET_UP);
        assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER, "{unknown:#x}");
        // The driver may think again.
        machine.set_driver_features(features::VERSION_1);
        machine.set_status(SET_UP);
        assert_eq!(machine.status(), SET_UP);
    }
}

#[test]
fn features_beyond_bit_63_are_not_accepted() {
    let (_, machine) = recorder();
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.write(reg::DRIVER_FEATURES_SEL, 7);
    machine.write(reg::DRIVER_FEATURES, 1);
    machine.set_driver_features(features::VERSION_1);
    machine.set_status(SET_UP);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_legacy_driver_is_not_accepted() {
    let (_, machine) = recorder();
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.set_driver_features(1 << 3);
    machine.set_status(SET_UP);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn features_changed_after_negotiation_are_ignored() {
    let (recorder, machine) = recorder();
    machine.negotiate(features::VERSION_1);
    machine.set_driver_features(u64::MAX);
    machine.set_status(SET_UP | DRIVER_OK);
    machine.set_driver_features(0);
    machine.registers.pause();
    machine.registers.resume().unwrap();
    let log = recorder.log();
    assert!(log.starts.iter().all(|(bits, _)| *bits == features::VERSION_1), "{:?}", log.starts);
}
