//! virtio-blk on an engine with many requests under way: they complete late, out of order, with errors, and in the middle of
//! pauses and resets.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::Machine;
use common::hand::{Asked, HandImage};
use freestone_bus::{EventLoop, IoDevice, LoopHandle, ManualSpawner};
use freestone_memory::{Bytes, GuestAddress};
use freestone_virtio::blk::{BlockConfig, CacheMode, feature};
use freestone_virtio::mmio::reg;
use freestone_virtio::{Block, features};
use proptest::prelude::*;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;

const OK: u8 = 0;
const IOERR: u8 = 1;
/// The status of a request that was not answered.
const NONE: u8 = 0xff;

fn config() -> BlockConfig {
    BlockConfig::new().queue_size(64).poll(Duration::ZERO)
}

fn started(image: &Arc<HandImage>, config: BlockConfig) -> Machine {
    let mut machine = Machine::new(Block::new(image.clone(), config));
    machine.start(u64::MAX);
    machine
}

/// Tells the other threads of a test to end, also when the test fails: a scope waits for them.
struct Stop<'a>(&'a AtomicBool, LoopHandle);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        self.1.wake().unwrap();
    }
}

/// Where request `n` has its header; 16 bytes later its status, and its data elsewhere.
fn header(n: u64) -> u64 {
    0x8000 + 32 * n
}

fn data(n: u64) -> u64 {
    0x2_0000 + 512 * n
}

/// Offers request `n`: sector `n` to or from its own buffer. Requests use three descriptors at most.
fn offer(machine: &mut Machine, n: u64, kind: u32) -> u32 {
    machine.ring.write(header(n), kind);
    machine.ring.write(header(n) + 8, n);
    machine.ring.write(header(n) + 16, NONE);
    let mut chain = vec![(header(n), 16, false)];
    match kind {
        IN => chain.push((data(n), 512, true)),
        OUT => chain.push((data(n), 512, false)),
        _ => {}
    }
    chain.push((header(n) + 16, 1, true));
    u32::from(machine.ring.add(&chain))
}

fn offer_all(machine: &mut Machine, requests: Range<u64>, kind: u32) {
    for n in requests {
        offer(machine, n, kind);
    }
}

fn status(machine: &Machine, n: u64) -> u8 {
    machine.ring.read(header(n) + 16)
}

fn buffer(machine: &Machine, n: u64) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    machine.mem.view().read_slice(&mut bytes, GuestAddress(data(n))).unwrap();
    bytes
}

#[test]
fn requests_are_answered_in_the_order_in_which_they_complete() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    let heads: Vec<_> = (1..4).map(|n| offer(&mut machine, n, IN)).collect();
    machine.run();
    assert_eq!(machine.ring.used(), []);
    assert_eq!([1, 2, 3].map(|n| status(&machine, n)), [NONE; 3]);
    image.release(2);
    machine.spawner.run(10);
    assert_eq!(machine.ring.used(), [(heads[2], 513)]);
    assert_eq!([1, 2, 3].map(|n| status(&machine, n)), [NONE, NONE, OK]);
    image.release(0);
    machine.spawner.run(10);
    image.release(0);
    machine.spawner.run(10);
    assert_eq!(machine.ring.used(), [(heads[0], 513), (heads[1], 513)]);
    for n in 1..4 {
        assert_eq!(buffer(&machine, n), [u8::try_from(n).unwrap(); 512]);
    }
}

#[test]
fn a_batch_is_submitted_at_once_and_completions_found_together_are_one_interrupt() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    offer_all(&mut machine, 0..20, IN);
    machine.run();
    assert_eq!((image.under_way().len(), image.commits()), (20, 1));
    assert_eq!(machine.interrupts.load(Ordering::SeqCst), 0);
    image.release_all();
    machine.spawner.run(10);
    assert_eq!(machine.ring.used().len(), 20);
    assert_eq!(machine.interrupts.load(Ordering::SeqCst), 1);
}

#[test]
fn an_error_goes_to_its_own_request_and_is_counted() {
    let image = HandImage::new(100);
    let device = Block::new(image.clone(), config());
    let stats = device.stats();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    offer_all(&mut machine, 0..3, IN);
    machine.run();
    image.fail(1);
    image.release_all();
    machine.spawner.run(10);
    assert_eq!([0, 1, 2].map(|n| status(&machine, n)), [OK, IOERR, OK]);
    let counts = stats.counts();
    assert_eq!((counts.reads, counts.errors, counts.host_errors), (2, 1, 1));
}

#[test]
fn a_write_through_write_is_answered_after_its_own_flush() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config().cache(CacheMode::Writethrough));
    offer(&mut machine, 1, OUT);
    machine.run();
    image.release(0);
    machine.spawner.run(10);
    assert_eq!(image.under_way(), [Asked::Flush]);
    assert_eq!((machine.ring.used(), status(&machine, 1)), (vec![], NONE));
    image.release(0);
    machine.spawner.run(10);
    assert_eq!((machine.ring.used().len(), status(&machine, 1)), (1, OK));
}

#[test]
fn a_write_through_write_fails_when_its_write_or_its_flush_does() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config().cache(CacheMode::Writethrough));
    offer(&mut machine, 1, OUT);
    offer(&mut machine, 2, OUT);
    machine.run();
    image.fail(0);
    image.release(0);
    machine.spawner.run(10);
    assert_eq!(image.under_way(), [Asked::Flush], "only for the write that succeeded");
    image.fail(0);
    machine.spawner.run(10);
    assert_eq!([1, 2].map(|n| status(&machine, n)), [IOERR; 2]);
}

#[test]
fn the_ranges_of_a_discard_go_one_after_the_other_and_stop_at_an_error() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    for (i, sector) in [10u64, 20, 30].into_iter().enumerate() {
        machine.ring.write(data(0) + 16 * i as u64, sector);
        machine.ring.write(data(0) + 16 * i as u64 + 8, 2u64);
    }
    machine.offer_block(DISCARD, 0, &[(data(0), 48, false)]);
    machine.run();
    assert_eq!(image.under_way(), [Asked::Discard(5120, 1024)]);
    image.release(0);
    machine.spawner.run(10);
    assert_eq!(image.under_way(), [Asked::Discard(10240, 1024)]);
    image.fail(0);
    machine.spawner.run(10);
    assert_eq!(image.under_way(), []);
    assert_eq!((machine.ring.used().len(), machine.ring.read::<u8>(0x8010)), (1, IOERR));
}

#[test]
fn a_pause_at_any_point_completes_what_is_under_way_and_the_rest_comes_after_it() {
    for released in 0..=6 {
        let image = HandImage::new(100);
        let mut machine = started(&image, config().cache(CacheMode::Writethrough));
        image.completes_when_waited_for.store(true, Ordering::SeqCst);
        offer_all(&mut machine, 0..3, OUT);
        offer_all(&mut machine, 3..6, IN);
        machine.run();
        for _ in 0..released {
            image.release(0);
        }
        machine.registers.pause();
        assert_eq!(image.under_way(), []);
        assert_eq!(machine.ring.used().len(), 6, "{released} released");
        assert_eq!(machine.interrupts.load(Ordering::SeqCst), 1);
        assert!((0..6).all(|n| status(&machine, n) == OK));
        assert_eq!(image.done().iter().filter(|asked| **asked == Asked::Flush).count(), 3);
        offer(&mut machine, 7, IN);
        machine.registers.resume().unwrap();
        machine.spawner.run(10);
        image.release(0);
        machine.spawner.run(10);
        assert_eq!(machine.ring.used().len(), 1);
    }
}

#[test]
fn a_reset_at_any_point_leaves_nothing_under_way_and_the_device_as_good_as_new() {
    for released in 0..=3 {
        let image = HandImage::new(100);
        let mut machine = started(&image, config());
        image.completes_when_waited_for.store(true, Ordering::SeqCst);
        offer_all(&mut machine, 0..3, IN);
        machine.run();
        for _ in 0..released {
            image.release(0);
        }
        machine.set_status(0);
        assert_eq!(image.under_way(), []);
        // The memory is the driver's own again.
        machine.mem.view().write_slice(&[0x77; 0x2000], GuestAddress(data(0))).unwrap();
        machine.spawner.run(10);
        assert_eq!(buffer(&machine, 0), [0x77; 512]);
        image.sync.store(true, Ordering::SeqCst);
        machine.assert_works_after_reset();
    }
}

#[test]
fn a_reset_waits_until_the_engine_lets_go_of_guest_memory() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    offer_all(&mut machine, 0..2, IN);
    machine.run();
    let registers = machine.registers.clone();
    let reset = thread::spawn(move || registers.write(reg::STATUS, &[0; 4]).unwrap());
    while image.waits.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    image.release(1);
    while image.waits.load(Ordering::SeqCst) < 2 {
        thread::yield_now();
    }
    assert!(!reset.is_finished(), "the reset did not wait for the second request");
    image.release(0);
    reset.join().unwrap();
    assert_eq!(machine.status(), 0);
}

#[test]
fn requests_under_way_end_on_the_image_they_began_on_when_it_is_replaced() {
    let (first, second) = (HandImage::new(100), HandImage::sync(100));
    let device = Block::new(first.clone(), config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    machine.ring.write(data(0), 0xAAAA_u64);
    offer(&mut machine, 0, OUT);
    machine.run();
    handle.replace(second.clone()).unwrap();
    offer(&mut machine, 1, OUT);
    thread::scope(|scope| {
        let step = scope.spawn(|| machine.run());
        while first.waits.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        assert!(second.done().is_empty(), "the first image still has work");
        first.release(0);
        step.join().unwrap();
    });
    machine.run();
    let writes = |image: &HandImage| image.done().iter().filter(|a| matches!(a, Asked::Write(..))).count();
    assert_eq!((writes(&first), writes(&second)), (1, 1));
    assert_eq!((status(&machine, 0), status(&machine, 1)), (OK, OK));
}

#[test]
fn a_queue_that_is_disabled_gets_its_requests_back_first() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    image.completes_when_waited_for.store(true, Ordering::SeqCst);
    offer(&mut machine, 1, IN);
    machine.run();
    machine.write(reg::QUEUE_SEL, 0);
    machine.write(reg::QUEUE_READY, 0);
    assert_eq!((machine.ring.used().len(), status(&machine, 1)), (1, OK));
}

#[test]
fn a_device_that_is_taken_away_leaves_nothing_under_way() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    image.completes_when_waited_for.store(true, Ordering::SeqCst);
    offer_all(&mut machine, 0..5, OUT);
    machine.run();
    machine.registers.shutdown().unwrap();
    assert_eq!(image.under_way(), []);
    assert_eq!(image.done().last(), Some(&Asked::Flush), "what was written is durable");
}

#[test]
fn a_malformed_request_after_good_ones_lets_those_end_before_the_reset_does() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    image.completes_when_waited_for.store(true, Ordering::SeqCst);
    offer(&mut machine, 1, IN);
    machine.ring.add(&[(common::HOLE, 16, false), (0x8010, 1, true)]);
    machine.run();
    assert!(machine.needs_reset());
    assert_eq!(image.under_way().len(), 1);
    // The device leaves the queue alone.
    image.release(0);
    machine.run();
    assert_eq!(machine.ring.used(), []);
    image.sync.store(true, Ordering::SeqCst);
    machine.assert_broken_until_reset();
}

#[test]
fn descriptors_offered_again_while_they_are_under_way_do_not_pile_up_on_the_host() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    offer(&mut machine, 1, IN);
    for _ in 0..10 {
        (0..63).for_each(|_| machine.ring.offer(0));
        machine.run();
    }
    assert_eq!(image.under_way().len(), 64);
    assert_eq!(machine.ring.used_index(), 0);
}

#[test]
fn a_full_worker_goes_on_when_there_is_room_again() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    offer(&mut machine, 1, IN);
    (0..63).for_each(|_| machine.ring.offer(0));
    machine.run();
    machine.ring.offer(0);
    machine.run();
    assert_eq!(image.under_way().len(), 64);
    image.release(5);
    machine.spawner.run(10);
    assert_eq!((image.under_way().len(), machine.ring.used_index()), (64, 1));
    image.release_all();
    machine.spawner.run(10);
    assert_eq!(machine.ring.used_index(), 65);
}

#[test]
fn an_engine_with_less_room_than_the_queue_has_requests_serves_them_all() {
    let image = HandImage::new(100);
    image.room.store(3, Ordering::SeqCst);
    image.completes_when_waited_for.store(true, Ordering::SeqCst);
    let mut machine = started(&image, config());
    offer_all(&mut machine, 0..20, IN);
    machine.run();
    image.release_all();
    machine.spawner.run(10);
    assert_eq!(machine.ring.used().len(), 20);
    assert!((0..20).all(|n| status(&machine, n) == OK));
}

#[test]
fn a_refused_commit_is_tried_again() {
    let image = HandImage::new(100);
    image.failing_commits.store(3, Ordering::SeqCst);
    let mut machine = started(&image, config());
    offer(&mut machine, 1, IN);
    machine.run();
    assert_eq!(image.under_way().len(), 1);
    image.release(0);
    machine.spawner.run(10);
    assert_eq!(status(&machine, 1), OK);
}

#[test]
fn an_engine_that_cannot_be_waited_for_costs_the_driver_its_device_and_nobody_else_anything() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    offer(&mut machine, 1, IN);
    machine.run();
    image.broken.store(true, Ordering::SeqCst);
    machine.registers.pause();
    assert!(machine.needs_reset());
    assert_eq!(machine.ring.used(), []);
    image.broken.store(false, Ordering::SeqCst);
    image.sync.store(true, Ordering::SeqCst);
    machine.assert_works_after_reset();
}

#[test]
fn completions_wake_the_worker_on_an_event_loop() {
    let image = HandImage::new(100);
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let device = Block::new(image.clone(), config());
    let mut machine = Machine::on(device, Arc::new(handle.clone()), ManualSpawner::new());
    let stop = Arc::new(AtomicBool::new(false));
    let worker = thread::spawn({
        let stop = stop.clone();
        move || event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap()
    });
    machine.start(u64::MAX);
    for n in 0..50 {
        offer(&mut machine, n % 20, IN);
        machine.kick();
        while image.under_way().is_empty() {
            thread::yield_now();
        }
        image.release(0);
        while machine.ring.used().is_empty() {
            thread::yield_now();
        }
    }
    stop.store(true, Ordering::SeqCst);
    handle.wake().unwrap();
    worker.join().unwrap();
}

#[test]
fn a_flush_is_the_engine_s_own_business() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config());
    offer(&mut machine, 1, OUT);
    offer(&mut machine, 2, FLUSH);
    machine.run();
    assert_eq!(image.under_way().len(), 2, "it waits for no write that is under way");
    image.release(1);
    machine.spawner.run(10);
    assert_eq!([1, 2].map(|n| status(&machine, n)), [NONE, OK]);
}

#[test]
fn nothing_is_lost_when_completions_and_pauses_come_from_other_threads() {
    let image = HandImage::new(100);
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let device = Block::new(image.clone(), config().poll(Duration::from_micros(10)));
    let mut machine = Machine::on(device, Arc::new(handle.clone()), ManualSpawner::new());
    machine.start(u64::MAX);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap());
        // The engine: the newest first.
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                match image.under_way().len() {
                    0 => thread::yield_now(),
                    n => image.release(n - 1),
                }
            }
        });
        let _stop = Stop(&stop, handle);
        offer_all(&mut machine, 0..20, IN);
        machine.kick();
        let mut answered = 0;
        while answered < 2000 {
            let used = machine.ring.used();
            if used.is_empty() {
                thread::yield_now();
                continue;
            }
            for (head, len) in used {
                assert_eq!(len, 513);
                answered += 1;
                machine.ring.offer(u16::try_from(head).unwrap());
            }
            // One kick is enough, also while the device is about to pause.
            machine.kick();
            if answered % 7 == 0 {
                machine.registers.pause();
                machine.registers.resume().unwrap();
            }
        }
        machine.registers.pause();
        assert_eq!(machine.ring.used().len(), image.done().len() - answered);
    });
}

#[derive(Debug, Clone)]
enum Step {
    Offer(u32),
    Run,
    Release(usize),
    Fail(usize),
    PauseAndResume,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => prop::sample::select(vec![IN, OUT, FLUSH]).prop_map(Step::Offer),
        3 => Just(Step::Run),
        3 => any::<usize>().prop_map(Step::Release),
        1 => any::<usize>().prop_map(Step::Fail),
        1 => Just(Step::PauseAndResume),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever happens when, every request is answered exactly once, and not before it is done.
    #[test]
    fn every_request_is_answered_once(steps in steps(), write_through: bool, event_idx: bool) {
        let image = HandImage::new(100);
        let mut machine = Machine::new(Block::new(image.clone(), config()));
        let without = if write_through { feature::FLUSH | feature::CONFIG_WCE } else { 0 }
            | if event_idx { 0 } else { features::RING_EVENT_IDX };
        machine.start(!without);
        image.completes_when_waited_for.store(true, Ordering::SeqCst);
        let (mut offered, mut failed) = (Vec::new(), 0);
        for step in steps {
            match step {
                // The ring has room for 21 requests of three descriptors that are never taken back.
                Step::Offer(kind) if offered.len() < 21 => {
                    let n = offered.len() as u64;
                    offered.push(offer(&mut machine, n, kind));
                }
                Step::Offer(_) => {}
                Step::Run => machine.run(),
                Step::Release(index) if !image.under_way().is_empty() => image.release(index % image.under_way().len()),
                Step::Fail(index) if !image.under_way().is_empty() => {
                    failed += 1;
                    image.fail(index % image.under_way().len());
                }
                Step::Release(_) | Step::Fail(_) => {}
                Step::PauseAndResume => {
                    machine.registers.pause();
                    machine.registers.resume().unwrap();
                }
            }
        }
        machine.run();
        machine.registers.pause();
        prop_assert!(!machine.needs_reset());
        let mut used: Vec<_> = machine.ring.used().into_iter().map(|(head, _)| head).collect();
        used.sort_unstable();
        offered.sort_unstable();
        prop_assert_eq!(&used, &offered);
        let statuses: Vec<_> = (0..offered.len() as u64).map(|n| status(&machine, n)).collect();
        prop_assert!(statuses.iter().all(|status| [OK, IOERR].contains(status)));
        prop_assert_eq!(statuses.iter().filter(|status| **status == IOERR).count(), failed);
    }
}
