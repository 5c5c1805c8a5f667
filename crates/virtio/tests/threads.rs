//! Driver and device on two threads: no kick and no interrupt is lost, however they race.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use common::{REGISTERS, TestImage, memory};
use freestone_bus::{EventLoop, Irq};
use freestone_memory::{Bytes, GuestAddress};
use freestone_testkit::driver::{Arena, Buffer, MmioDriver};
use freestone_virtio::{Block, BlockConfig, MmioTransport, MmioWiring, features};

const FLUSH: u32 = 4;

/// Sends 20,000 requests, up to eight at a time, sleeping until the interrupt whenever there is nothing to do.
fn race(wanted: u64, poll: Duration) {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let stop = Arc::new(AtomicBool::new(false));
    let worker = thread::spawn({
        let stop = stop.clone();
        move || event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap()
    });
    let mem = memory();
    let (interrupt, interrupts) = mpsc::channel();
    let interrupt = Mutex::new(interrupt);
    let irq = Irq::from_fn(move || interrupt.lock().unwrap().send(()).unwrap());
    let spawner = Arc::new(handle.clone());
    let wiring = MmioWiring { base: REGISTERS, mem: mem.clone(), irq, doorbells: None, spawner };
    let image = TestImage::new(1);
    let device = Block::new(image.clone(), BlockConfig::new().poll(poll));
    let registers = Arc::new(MmioTransport::new("race", Box::new(device), wiring).unwrap());
    let mut driver = MmioDriver::new(registers.clone());
    driver.negotiate(wanted).unwrap();
    let mut queue = driver.setup_queue(&mem, &mut Arena::new(0x1_0000, 0x8_0000), 0, 64).unwrap();
    driver.driver_ok().unwrap();
    mem.view().write_obj(FLUSH, GuestAddress(0x1000)).unwrap();
    // Somebody reads the statistics all the time, and with them the counters of the kicks.
    let stats = registers.stats();
    let reader = thread::spawn({
        let (stats, stop) = (stats.clone(), stop.clone());
        move || {
            while !stop.load(Ordering::SeqCst) {
                stats.snapshot();
                thread::yield_now();
            }
        }
    });

    let mut kicks = 0;
    let total = 20_000;
    let mut done = 0;
    while done < total {
        for _ in 0..=done % 8 {
            queue.add_chain(&[Buffer::readable(0x1000, 16), Buffer::writable(0x2000, 1)]).unwrap();
        }
        if queue.publish().unwrap() {
            driver.kick(0).unwrap();
            kicks += 1;
        }
        while queue.in_flight() > 0 {
            queue.want_interrupt(0).unwrap();
            fence(Ordering::SeqCst);
            let mut any = false;
            while queue.used().unwrap().is_some() {
                any = true;
                done += 1;
            }
            if !any {
                let in_time = interrupts.recv_timeout(Duration::from_secs(20));
                assert!(in_time.is_ok(), "a kick or an interrupt was lost after {done} requests");
            }
        }
    }
    assert_eq!(image.flushes.load(Ordering::SeqCst), done);
    registers.halt();
    let [counts] = stats.snapshot().try_into().unwrap();
    assert_eq!((counts.requests, counts.notifications), (done as u64, kicks));
    stop.store(true, Ordering::SeqCst);
    handle.wake().unwrap();
    worker.join().unwrap();
    reader.join().unwrap();
}

#[test]
fn nothing_is_lost_with_flags() {
    race(!features::RING_EVENT_IDX & !features::RING_PACKED, Duration::ZERO);
}

#[test]
fn nothing_is_lost_with_flags_and_polling() {
    race(!features::RING_EVENT_IDX & !features::RING_PACKED, Duration::from_micros(10));
}

#[test]
fn nothing_is_lost_with_event_indices() {
    race(!features::RING_PACKED, Duration::ZERO);
}

#[test]
fn nothing_is_lost_with_event_indices_and_polling() {
    race(!features::RING_PACKED, Duration::from_micros(10));
}

#[test]
fn nothing_is_lost_with_packed_rings_and_flags() {
    race(!features::RING_EVENT_IDX, Duration::ZERO);
}

#[test]
fn nothing_is_lost_with_packed_rings_and_flags_and_polling() {
    race(!features::RING_EVENT_IDX, Duration::from_micros(10));
}

#[test]
fn nothing_is_lost_with_packed_rings_and_event_positions() {
    race(u64::MAX, Duration::ZERO);
}

#[test]
fn nothing_is_lost_with_packed_rings_and_event_positions_and_polling() {
    race(u64::MAX, Duration::from_micros(10));
}

#[test]
fn pause_and_resume_at_any_moment_lose_no_request() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let stop = Arc::new(AtomicBool::new(false));
    let worker = thread::spawn({
        let stop = stop.clone();
        move || event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap()
    });
    let image = TestImage::new(1);
    let mut machine = common::Machine::on(
        Block::new(image.clone(), BlockConfig::new()),
        Arc::new(handle.clone()),
        freestone_bus::ManualSpawner::new(),
    );
    machine.start(u64::MAX);
    for n in 0..2000u32 {
        let head = machine.offer_block(FLUSH, 0, &[]);
        machine.kick();
        machine.registers.pause();
        let left = machine.ring.used_index();
        // While it is paused, nothing happens.
        if n % 100 == 0 {
            thread::sleep(Duration::from_millis(1));
            assert_eq!(machine.ring.used_index(), left);
        }
        machine.registers.resume().unwrap();
        let mut used = machine.ring.used();
        for _ in 0..20_000 {
            if !used.is_empty() {
                break;
            }
            thread::sleep(Duration::from_millis(1));
            used = machine.ring.used();
        }
        assert_eq!(used, [(u32::from(head), 1)]);
    }
    assert_eq!(image.flushes.load(Ordering::SeqCst), 2000);
    machine.registers.halt();
    stop.store(true, Ordering::SeqCst);
    handle.wake().unwrap();
    worker.join().unwrap();
}
