//! What queues count, as a VMM reads it.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{TestImage, block, memory};
use freestone_bus::Device;
use freestone_memory::GuestMem;
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::{DeviceStats, VirtioMmioPlug, features};

struct Disk {
    machine: TestWiring,
    driver: MmioDriver,
    queue: DriverQueue,
    stats: DeviceStats,
    _device: Box<dyn Device>,
}

impl Disk {
    fn new(image: &Arc<TestImage>, wanted: u64) -> Self {
        let mem = memory();
        let mut machine = TestWiring::new(mem.clone());
        let plug = VirtioMmioPlug::new(block(image), "disk0");
        let stats = plug.stats();
        let device = machine.plug(plug).unwrap();
        let mut driver = MmioDriver::new(machine.mmio_device(0).unwrap());
        let queue = start(&mut driver, &mem, wanted);
        Self { machine, driver, queue, stats, _device: device }
    }

    /// Adds a read of one sector.
    fn add(&mut self) {
        let buffers =
            [Buffer::readable(0x8000, 16), Buffer::writable(0x9000, 512), Buffer::writable(0xa000, 1)];
        self.queue.add_chain(&buffers).unwrap();
    }

    /// Adds `count` reads and lets the device do them.
    fn read(&mut self, count: usize) {
        (0..count).for_each(|_| self.add());
        self.queue.publish().unwrap();
        self.driver.kick(0).unwrap();
        self.machine.run_work(10);
        assert_eq!(std::iter::from_fn(|| self.queue.used().unwrap()).count(), count);
    }
}

fn start(driver: &mut MmioDriver, mem: &GuestMem, wanted: u64) -> DriverQueue {
    driver.negotiate(wanted).unwrap();
    let queue = driver.setup_queue(mem, &mut Arena::new(0x1_0000, 0x8_0000), 0, 64).unwrap();
    driver.driver_ok().unwrap();
    queue
}

const FORMATS: [u64; 2] = [!features::RING_PACKED, u64::MAX];

#[test]
fn requests_bytes_kicks_and_interrupts_are_counted() {
    for wanted in FORMATS {
        let mut disk = Disk::new(&TestImage::new(8), wanted & !features::RING_EVENT_IDX);
        disk.read(3);
        disk.queue.suppress_interrupts().unwrap();
        disk.read(2);
        let [counts] = disk.stats.snapshot().try_into().unwrap();
        assert_eq!((counts.requests, counts.completed), (5, 5));
        assert_eq!((counts.bytes_in, counts.bytes_out), (5 * 16, 5 * 513));
        assert_eq!((counts.notifications, counts.interrupts, counts.suppressed), (2, 1, 1));
    }
}

#[test]
fn every_slow_request_is_timed_from_when_it_was_seen() {
    for wanted in FORMATS {
        let image = TestImage::new(8);
        image.set_hook(|| std::thread::sleep(Duration::from_millis(2)));
        let mut disk = Disk::new(&image, wanted);
        disk.read(5);
        let [counts] = disk.stats.snapshot().try_into().unwrap();
        assert_eq!((counts.queued.count(), counts.processing.count()), (5, 5));
        assert!(counts.processing.p50() >= Duration::from_micros(1800), "{counts}");
        // The last waited for the four before it.
        assert!(counts.queued.max() >= Duration::from_millis(8), "{counts}");
        assert!(counts.mean_latency() >= Duration::from_millis(6), "{counts}");
    }
}

#[test]
fn a_reset_of_the_device_does_not_reset_what_was_counted() {
    for wanted in FORMATS {
        let mut disk = Disk::new(&TestImage::new(8), wanted);
        disk.read(3);
        let mem = disk.queue.memory().clone();
        disk.queue = start(&mut disk.driver, &mem, wanted);
        disk.read(1);
        let [counts] = disk.stats.snapshot().try_into().unwrap();
        assert_eq!((counts.requests, counts.notifications), (4, 2));
    }
}

#[test]
fn the_statistics_outlive_the_device_and_say_whose_they_are() {
    let mut disk = Disk::new(&TestImage::new(8), u64::MAX);
    disk.read(1);
    let stats = disk.stats.clone();
    drop(disk);
    let text = stats.to_string();
    assert!(
        text.starts_with("disk0 queue 0: 1 requests (1 completed, 16 bytes in, 513 out), 1 kicks"),
        "{text}"
    );
    assert!(text.contains("; queued: mean ") && text.contains("; processing: mean "), "{text}");
}
