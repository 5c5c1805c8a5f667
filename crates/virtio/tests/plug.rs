//! A virtio device plugged into a machine.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Ring, TestImage, block, memory};
use freestone_bus::{Description, Device, Resource};
use freestone_memory::layout::MMIO_START;
use freestone_testkit::TestWiring;
use freestone_virtio::mmio::reg;
use freestone_virtio::{VirtioMmioPlug, features};

const BASE: u64 = MMIO_START;

fn write(wiring: &TestWiring, register: u64, value: u32) {
    wiring.guest_mmio_write(BASE + register, &value.to_le_bytes()).unwrap();
}

/// Plugs a disk in and plays its driver up to DRIVER_OK.
fn started(mut wiring: TestWiring, image: &Arc<TestImage>) -> (TestWiring, Box<dyn Device>, Ring) {
    let device = wiring.plug(VirtioMmioPlug::new(block(image), "virtio-blk0")).unwrap();
    let ring = start(&wiring);
    (wiring, device, ring)
}

fn start(wiring: &TestWiring) -> Ring {
    let ring = Ring::new(&freestone_bus::Wiring::memory(wiring), 64);
    for (register, value) in [
        (reg::STATUS, 0),
        (reg::STATUS, 1),
        (reg::STATUS, 3),
        (reg::DRIVER_FEATURES_SEL, 1),
        (reg::DRIVER_FEATURES, u32::try_from(features::VERSION_1 >> 32).unwrap()),
        (reg::STATUS, 11),
        (reg::QUEUE_NUM, 64),
        (reg::QUEUE_DESC_LOW, u32::try_from(ring.config.descriptors).unwrap()),
        (reg::QUEUE_DRIVER_LOW, u32::try_from(ring.config.driver).unwrap()),
        (reg::QUEUE_DEVICE_LOW, u32::try_from(ring.config.device).unwrap()),
        (reg::QUEUE_READY, 1),
        (reg::STATUS, 15),
    ] {
        write(wiring, register, value);
    }
    ring
}

#[test]
fn the_device_is_described_as_an_acpi_virtio_device() {
    let (wiring, device, _) = started(TestWiring::new(memory()), &TestImage::new(1));
    let resources = vec![Resource::Mmio { base: BASE, len: 0x1000 }, Resource::Irq { gsi: 5 }];
    assert_eq!(wiring.descriptions(), [Description { hid: "LNRO0005", resources }]);
    assert_eq!(device.name(), "virtio-blk0");
    assert_eq!(wiring.mmio_range(0), Some((BASE, 0x1000)));
}

#[test]
fn requests_are_kicked_and_answered_with_and_without_doorbells() {
    for wiring in [TestWiring::new(memory()), TestWiring::new(memory()).with_doorbells()] {
        let image = TestImage::new(1);
        let (wiring, _device, mut ring) = started(wiring, &image);
        ring.write(0x8000, 4u32);
        ring.add(&[(0x8000, 16, false), (0x8010, 1, true)]);
        write(&wiring, reg::QUEUE_NOTIFY, 0);
        wiring.run_work(10);
        assert_eq!(image.flushes.load(Ordering::SeqCst), 1);
        assert_eq!(ring.used(), [(0, 1)]);
        assert_eq!(wiring.edges(5), 1);
    }
}

#[test]
fn doorbells_are_bound_while_the_driver_uses_the_device() {
    let (wiring, mut device, _) = started(TestWiring::new(memory()).with_doorbells(), &TestImage::new(1));
    assert_eq!(wiring.doorbells_bound(), 1);
    device.pause().unwrap();
    assert_eq!(wiring.doorbells_bound(), 1, "kicks are remembered during a pause");
    device.resume().unwrap();
    write(&wiring, reg::STATUS, 0);
    assert_eq!(wiring.doorbells_bound(), 0);
    start(&wiring);
    assert_eq!(wiring.doorbells_bound(), 1);
    device.shutdown().unwrap();
    assert_eq!(wiring.doorbells_bound(), 0);
}

#[test]
fn pausing_stops_the_work_and_resuming_goes_on() {
    let image = TestImage::new(1);
    let (wiring, mut device, mut ring) = started(TestWiring::new(memory()), &image);
    device.pause().unwrap();
    assert!(wiring.manual_spawner().is_empty());
    ring.write(0x8000, 4u32);
    ring.add(&[(0x8000, 16, false), (0x8010, 1, true)]);
    device.resume().unwrap();
    wiring.run_work(10);
    assert_eq!(ring.used(), [(0, 1)]);
}

#[test]
fn the_work_ends_with_the_device() {
    let (wiring, device, _) = started(TestWiring::new(memory()).with_doorbells(), &TestImage::new(1));
    assert_eq!((wiring.manual_spawner().len(), wiring.doorbells_bound()), (1, 1));
    drop(device);
    assert_eq!((wiring.manual_spawner().len(), wiring.doorbells_bound()), (0, 0));
}

#[test]
fn each_device_gets_addresses_and_a_line_of_its_own() {
    let mut wiring = TestWiring::new(memory());
    let image = TestImage::new(1);
    let _a = wiring.plug(VirtioMmioPlug::new(block(&image), "a")).unwrap();
    let _b = wiring.plug(VirtioMmioPlug::new(block(&image), "b")).unwrap();
    assert_eq!(wiring.mmio_range(1), Some((BASE + 0x1000, 0x1000)));
    assert_eq!(wiring.lines(), [5, 6]);
}

#[test]
fn a_machine_without_free_lines_refuses_the_device() {
    let mut wiring = TestWiring::new(memory());
    let image = TestImage::new(1);
    let mut devices = Vec::new();
    while let Ok(device) = wiring.plug(VirtioMmioPlug::new(block(&image), "many")) {
        devices.push(device);
        assert!(devices.len() < 100, "lines never run out");
    }
    assert_eq!(devices.len(), wiring.lines().len());
}
