//! What virtio-blk offers beyond reads and writes: configuration, discard, write zeroes, cache modes, resize, several queues,
//! rate limits.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::hand::{Asked, HandImage};
use common::{Machine, Ring, memory};
use freestone_block::Engine;
use freestone_bus::{EventLoop, IoDevice, Irq, ManualSpawner};
use freestone_memory::{Bytes, GuestAddress};
use freestone_virtio::blk::{BlockConfig, CacheMode, RangeLimits, feature};
use freestone_virtio::mmio::reg;
use freestone_virtio::rate::{RateLimiter, TokenBucket};
use freestone_virtio::{Block, MmioTransport, MmioWiring, QueueConfig, VirtioDevice};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const DATA: u64 = 0x9000;
const UNMAP: u32 = 1;

fn config() -> BlockConfig {
    BlockConfig::new().queue_size(64).poll(Duration::ZERO)
}

fn started(image: &Arc<HandImage>, config: BlockConfig) -> Machine {
    let mut machine = Machine::new(Block::new(image.clone(), config));
    machine.start(u64::MAX);
    machine
}

/// Carries out a request with these ranges: sector, sectors, flags.
fn ranges(machine: &mut Machine, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
    for (at, (sector, sectors, flags)) in (DATA..).step_by(16).zip(ranges) {
        machine.ring.write(at, *sector);
        machine.ring.write(at + 8, *sectors);
        machine.ring.write(at + 12, *flags);
    }
    let len = u32::try_from(16 * ranges.len()).unwrap();
    machine.block_request(kind, 0, &[(DATA, len, false)]).0
}

fn config_u8(machine: &Machine, offset: u64) -> u8 {
    let mut value = [0];
    machine.registers.read(reg::CONFIG + offset, &mut value).unwrap();
    value[0]
}

fn config_u16(machine: &Machine, offset: u64) -> u16 {
    let mut value = [0; 2];
    machine.registers.read(reg::CONFIG + offset, &mut value).unwrap();
    u16::from_le_bytes(value)
}

fn config_u32(machine: &Machine, offset: u64) -> u32 {
    machine.read(reg::CONFIG + offset)
}

// Configuration.

#[test]
fn the_configuration_space_says_what_the_image_and_the_config_say() {
    let image = HandImage::sync(100);
    let limits = |max_sectors, max_segments| RangeLimits { max_sectors, max_segments };
    let config = config().queues(3).size_max(65536).discard(limits(1000, 4)).write_zeroes(limits(500, 2));
    let machine = Machine::new(Block::new(image, config));
    assert_eq!(machine.device_features() & 0xffff, 0b0111_1110_0100_0110);
    assert_eq!((config_u32(&machine, 0), config_u32(&machine, 4)), (100, 0));
    assert_eq!((config_u32(&machine, 8), config_u32(&machine, 12)), (65536, 62));
    assert_eq!(config_u32(&machine, 20), 512);
    assert_eq!((config_u8(&machine, 24), config_u8(&machine, 25)), (3, 0), "eight logical blocks");
    assert_eq!((config_u16(&machine, 26), config_u32(&machine, 28)), (8, 128));
    assert_eq!((config_u8(&machine, 32), config_u16(&machine, 34)), (1, 3));
    assert_eq!([36, 40, 44].map(|at| config_u32(&machine, at)), [1000, 4, 8]);
    assert_eq!([48, 52].map(|at| config_u32(&machine, at)), [500, 2]);
    assert_eq!(config_u8(&machine, 56), 1);
}

#[test]
fn what_is_not_offered_is_zero_in_the_configuration_space() {
    let machine = Machine::new(Block::new(HandImage::with(100, true, true), config()));
    let offered = feature::SEG_MAX | feature::RO | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
    assert_eq!(machine.device_features() & 0xffff, offered);
    assert_eq!(config_u32(&machine, 8), 0);
    for at in (32..60).step_by(4) {
        assert_eq!(config_u32(&machine, at), 0, "{at}");
    }
}

#[test]
fn a_disk_of_large_blocks_ends_with_a_whole_block() {
    let image = HandImage::sync(23);
    let mut machine = started(&image, config().logical_block(4096));
    assert_eq!((config_u32(&machine, 0), config_u32(&machine, 20)), (16, 4096));
    assert_eq!(config_u8(&machine, 24), 0);
    assert_eq!(machine.block_request(IN, 16, &[(DATA, 512, true)]).0, IOERR);
    // Sectors stay the unit of requests.
    assert_eq!(machine.block_request(IN, 15, &[(DATA, 512, true)]).0, OK);
}

#[test]
fn impossible_configurations_are_refused_with_a_reason() {
    let none = RangeLimits { max_sectors: 1, max_segments: 0 };
    let many = RangeLimits { max_sectors: 1, max_segments: 1025 };
    let nothing = RangeLimits { max_sectors: 0, max_segments: 1 };
    for (config, reason) in [
        (config().queues(0), "queues"),
        (config().queues(257), "queues"),
        (config().queue_size(0), "powers of two"),
        (config().queue_size(2), "powers of two"),
        (config().queue_size(48), "powers of two"),
        (config().logical_block(0), "logical blocks"),
        (config().logical_block(1024), "logical blocks"),
        (config().logical_block(4096), "not even one"),
        (config().size_max(4095), "size_max"),
        (config().discard(none), "discards"),
        (config().discard(nothing), "discards"),
        (config().write_zeroes(many), "write-zeroes"),
        (config().engine(Engine::Uring), "cannot open a disk's I/O engine"),
    ] {
        let device = Block::new(HandImage::new(7), config);
        let error = device.check("disk").unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_transport_refuses_an_impossible_device() {
    let device = Block::new(HandImage::new(1), config().queues(0));
    let wiring = MmioWiring {
        base: common::REGISTERS,
        mem: memory(),
        irq: Irq::null(),
        doorbells: None,
        spawner: Arc::new(ManualSpawner::new()),
    };
    let error = MmioTransport::new("vda", Box::new(device), wiring).unwrap_err();
    assert_eq!(error.to_string(), "device vda: a disk has 1 to 256 queues");
}

// Discard and write zeroes.

#[test]
fn the_ranges_of_a_request_are_done_in_order() {
    let image = HandImage::sync(100);
    let mut machine = started(&image, config());
    assert_eq!(ranges(&mut machine, DISCARD, &[(4, 2, 0), (90, 10, 0), (50, 0, 0), (1, 1, 0)]), OK);
    assert_eq!(image.done(), [(2048, 1024), (46080, 5120), (512, 512)].map(|(a, b)| Asked::Discard(a, b)));
}

#[test]
fn zeroes_are_written_and_may_unmap_where_the_driver_lets_them() {
    let image = HandImage::sync(100);
    let mut machine = started(&image, config());
    assert_eq!(ranges(&mut machine, WRITE_ZEROES, &[(4, 2, 0), (8, 1, UNMAP)]), OK);
    assert_eq!(image.done(), [Asked::WriteZeroes(2048, 1024, false), Asked::WriteZeroes(4096, 512, true)]);
    assert_eq!([3, 4, 5, 6, 8].map(|n| image.sector(n)[0]), [3, 0, 0, 6, 0]);
}

#[test]
fn unknown_flags_are_unsupported_and_so_is_unmap_in_a_discard() {
    let image = HandImage::sync(100);
    let mut machine = started(&image, config());
    for flag in (0..32).map(|bit| 1 << bit) {
        assert_eq!(ranges(&mut machine, DISCARD, &[(0, 1, 0), (1, 1, flag)]), UNSUPP, "{flag:#x}");
        let unmap = if flag == UNMAP { OK } else { UNSUPP };
        assert_eq!(ranges(&mut machine, WRITE_ZEROES, &[(1, 1, flag)]), unmap, "{flag:#x}");
    }
    assert_eq!(image.done(), [Asked::WriteZeroes(512, 512, true)]);
}

#[test]
fn one_bad_range_refuses_them_all() {
    let image = HandImage::sync(100);
    let limits = RangeLimits { max_sectors: 50, max_segments: 3 };
    let mut machine = started(&image, config().discard(limits).write_zeroes(limits));
    for kind in [DISCARD, WRITE_ZEROES] {
        for bad in [
            (100, 1),
            (99, 2),
            (0, 51),
            (0, u32::MAX),
            (u64::MAX, 1),
            (u64::MAX - 1, 2),
            (1 << 55, 1),
            (101, 0),
            (u64::MAX, 0),
        ] {
            assert_eq!(ranges(&mut machine, kind, &[(0, 1, 0), (bad.0, bad.1, 0)]), IOERR, "{bad:x?}");
        }
        assert_eq!(ranges(&mut machine, kind, &[(0, 1, 0); 4]), IOERR, "more than the limit");
    }
    assert_eq!(image.done(), []);
}

#[test]
fn data_that_is_no_ranges_is_refused() {
    let image = HandImage::sync(100);
    let mut machine = started(&image, config());
    for len in [1, 15, 17, 31, 16 * 17] {
        assert_eq!(machine.block_request(DISCARD, 0, &[(DATA, len, false)]).0, IOERR, "{len}");
    }
    assert_eq!(machine.block_request(DISCARD, 0, &[]).0, IOERR);
    assert_eq!(machine.block_request(WRITE_ZEROES, 0, &[(DATA, 16, true)]).0, IOERR);
    assert_eq!(machine.block_request(WRITE_ZEROES, 0, &[(DATA, 16, false), (DATA, 16, true)]).0, IOERR);
    assert_eq!(image.done(), []);
    assert!(!machine.needs_reset());
}

#[test]
fn a_range_may_be_spread_over_descriptors() {
    let image = HandImage::sync(100);
    let mut machine = started(&image, config());
    machine.ring.write(DATA, 7u64);
    machine.ring.write(DATA + 0x100, 3u64);
    assert_eq!(machine.block_request(DISCARD, 0, &[(DATA, 8, false), (DATA + 0x100, 8, false)]).0, OK);
    assert_eq!(image.done(), [Asked::Discard(3584, 1536)]);
}

#[test]
fn what_was_not_negotiated_or_is_read_only_is_unsupported() {
    let image = HandImage::sync(100);
    let mut machine = Machine::new(Block::new(image.clone(), config()));
    machine.start(!(feature::DISCARD | feature::WRITE_ZEROES));
    assert_eq!(ranges(&mut machine, DISCARD, &[(0, 1, 0)]), UNSUPP);
    assert_eq!(ranges(&mut machine, WRITE_ZEROES, &[(0, 1, 0)]), UNSUPP);
    let mut machine = started(&image, config().read_only(true));
    assert_eq!(ranges(&mut machine, DISCARD, &[(0, 1, 0)]), UNSUPP);
    assert_eq!(ranges(&mut machine, WRITE_ZEROES, &[(0, 1, 0)]), UNSUPP);
    assert_eq!(image.done(), []);
}

// Cache modes.

/// Whether a write is followed by a flush.
fn flushes(machine: &mut Machine, image: &HandImage) -> bool {
    let flushed = |image: &HandImage| image.done().iter().filter(|asked| **asked == Asked::Flush).count();
    let before = flushed(image);
    assert_eq!(machine.block_request(OUT, 1, &[(DATA, 512, false)]).0, OK);
    flushed(image) > before
}

#[test]
fn the_driver_chooses_the_cache_mode() {
    let image = HandImage::sync(10);
    let mut machine = started(&image, config());
    assert!(!flushes(&mut machine, &image));
    machine.registers.write(reg::CONFIG + 32, &[0]).unwrap();
    assert_eq!(config_u8(&machine, 32), 0);
    assert!(flushes(&mut machine, &image));
    machine.registers.pause();
    machine.registers.resume().unwrap();
    assert!(flushes(&mut machine, &image), "a pause changes nothing");
    machine.registers.write(reg::CONFIG + 32, &[2]).unwrap();
    assert_eq!(config_u8(&machine, 32), 0, "neither mode");
    machine.registers.write(reg::CONFIG + 32, &[1]).unwrap();
    assert!(!flushes(&mut machine, &image));
    machine.registers.write(reg::CONFIG + 32, &[0]).unwrap();
    machine.start(u64::MAX);
    assert!(!flushes(&mut machine, &image), "a reset changes it back");
}

#[test]
fn a_driver_that_sends_no_flushes_begins_with_write_through() {
    let image = HandImage::sync(10);
    let mut machine = Machine::new(Block::new(image.clone(), config()));
    machine.start(!feature::FLUSH);
    assert_eq!(config_u8(&machine, 32), 0);
    assert!(flushes(&mut machine, &image));
    machine.start(!(feature::FLUSH | feature::CONFIG_WCE));
    machine.registers.write(reg::CONFIG + 32, &[0]).unwrap();
    assert!(flushes(&mut machine, &image));
}

#[test]
fn write_through_by_config_cannot_be_changed() {
    let image = HandImage::sync(10);
    let mut machine = started(&image, config().cache(CacheMode::Writethrough));
    assert_eq!(machine.device_features() & (feature::FLUSH | feature::CONFIG_WCE), 0);
    for offset in [29, 30, 31, 32] {
        machine.registers.write(reg::CONFIG + offset, &[1, 1, 1, 1]).unwrap();
        assert!(flushes(&mut machine, &image));
    }
    assert!(flushes(&mut machine, &image));
    assert_eq!(ranges(&mut machine, WRITE_ZEROES, &[(0, 1, 0)]), OK);
    assert_eq!(image.done().last(), Some(&Asked::Flush), "after zeroes too");
    assert_eq!(machine.block_request(FLUSH, 0, &[]).0, OK);
}

// Resize.

#[test]
fn a_resize_changes_the_capacity_and_tells_the_driver() {
    let image = HandImage::sync(10);
    let device = Block::new(image.clone(), config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    let generation = machine.read(reg::CONFIG_GENERATION);
    image.set_size(20);
    assert_eq!(machine.block_request(IN, 15, &[(DATA, 512, true)]).0, IOERR, "nobody looked yet");
    machine.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(handle.resize().unwrap(), 20 * 512);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2);
    assert_ne!(machine.read(reg::CONFIG_GENERATION), generation);
    assert_eq!(config_u32(&machine, 0), 20);
    assert_eq!(machine.block_request(IN, 15, &[(DATA, 512, true)]).0, OK);
    image.set_size(5);
    handle.resize().unwrap();
    assert_eq!(machine.block_request(IN, 5, &[(DATA, 512, true)]).0, IOERR);
    assert_eq!(machine.block_request(IN, 4, &[(DATA, 512, true)]).0, OK);
}

#[test]
fn a_size_that_stays_is_no_news() {
    let image = HandImage::sync(10);
    let device = Block::new(image, config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    handle.resize().unwrap();
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn a_driver_that_starts_during_a_resize_is_told_when_it_is_ready_and_a_reset_one_is_not() {
    let image = HandImage::sync(10);
    let device = Block::new(image.clone(), config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.negotiate(u64::MAX);
    image.set_size(20);
    handle.resize().unwrap();
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0, "not before it is ready");
    machine.set_queue(0, machine.ring.config);
    machine.set_status(0b1111);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2);
    machine.start(u64::MAX);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0, "it has read the new capacity");
    machine.set_status(0);
    image.set_size(30);
    handle.resize().unwrap();
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn a_handle_outlives_its_device() {
    let device = Block::new(HandImage::sync(10), config());
    let handle = device.handle();
    drop(Machine::new(device));
    assert_eq!(handle.resize().unwrap(), 5120);
    handle.set_rate_limiter(None);
}

// Several queues.

/// Places for the rings of queue `n`.
fn ring(machine: &Machine, n: u64) -> Ring {
    let base = 0x10_0000 + 0x1_0000 * n;
    let (descriptors, driver, device) = (base, base + 0x1000, base + 0x2000);
    Ring::at(&machine.mem, QueueConfig { size: 64, descriptors, driver, device })
}

#[test]
fn each_queue_has_a_worker_and_threads_share_the_disk() {
    let image = HandImage::sync(200);
    let device = Block::new(image.clone(), config().queues(4));
    let stats = device.stats();
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let machine = Machine::on(device, Arc::new(handle.clone()), ManualSpawner::new());
    machine.negotiate(u64::MAX);
    let rings: Vec<_> = (0..4).map(|n| ring(&machine, n)).collect();
    (0u32..).zip(&rings).for_each(|(n, ring)| machine.set_queue(n, ring.config));
    machine.set_status(0b1111);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap());
        let drivers: Vec<_> = (0u32..)
            .zip(rings)
            .map(|(n, mut ring)| {
                let registers = machine.registers.clone();
                scope.spawn(move || {
                    let base = 0x30_0000 + 0x1_0000 * u64::from(n);
                    for round in 0..50u64 {
                        let sector = 50 * u64::from(n) + round;
                        ring.write(base + 0x1000, [u8::try_from(sector).unwrap() ^ 0xff; 8]);
                        for kind in [OUT, IN] {
                            ring.write(base, kind);
                            ring.write(base + 8, sector);
                            ring.write(base + 16, 0xffu8);
                            let data = if kind == OUT { base + 0x1000 } else { base + 0x2000 };
                            ring.add(&[(base, 16, false), (data, 512, kind == IN), (base + 16, 1, true)]);
                            registers.write(reg::QUEUE_NOTIFY, &n.to_le_bytes()).unwrap();
                            while ring.used().is_empty() {
                                thread::yield_now();
                            }
                            assert_eq!(ring.read::<u8>(base + 16), OK);
                        }
                        assert_eq!(ring.read::<u8>(base + 0x2000), u8::try_from(sector).unwrap() ^ 0xff);
                    }
                })
            })
            .collect();
        drivers.into_iter().for_each(|driver| driver.join().unwrap());
        stop.store(true, Ordering::SeqCst);
        handle.wake().unwrap();
    });
    assert_eq!((stats.counts().reads, stats.counts().writes), (200, 200));
    assert_eq!(image.sector(137)[0], 137 ^ 0xff);
}

#[test]
fn a_driver_may_use_some_of_the_queues() {
    let image = HandImage::sync(100);
    let mut machine = Machine::new(Block::new(image, config().queues(4)));
    machine.start(!feature::MQ);
    assert_eq!(machine.block_request(IN, 3, &[(DATA, 512, true)]).0, OK);
    assert_eq!(machine.spawner.len(), 1);
    machine.write(reg::QUEUE_NOTIFY, 3);
    machine.write(reg::QUEUE_NOTIFY, 4);
    assert!(!machine.needs_reset());
}

// Rate limits.

fn an_hour_for(requests: u64) -> RateLimiter {
    RateLimiter::new().ops(TokenBucket::new(requests, Duration::from_secs(3600)))
}

#[test]
fn requests_over_the_limit_wait_in_order_until_the_limit_changes() {
    let image = HandImage::sync(100);
    let device = Block::new(image.clone(), config().rate_limiter(an_hour_for(2)));
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    machine.ring.write(0x8000, IN);
    let heads: Vec<_> =
        (0..5).map(|_| u32::from(machine.ring.add(&[(0x8000, 16, false), (DATA, 513, true)]))).collect();
    machine.run();
    assert_eq!(machine.ring.used(), [(heads[0], 513), (heads[1], 513)]);
    machine.run();
    assert_eq!(machine.ring.used(), [], "a kick is no token");
    assert!(handle.throttled() > 0);
    handle.set_rate_limiter(Some(an_hour_for(1)));
    machine.spawner.run(10);
    assert_eq!(machine.ring.used(), [(heads[2], 513)]);
    handle.set_rate_limiter(None);
    machine.spawner.run(10);
    assert_eq!(machine.ring.used(), [(heads[3], 513), (heads[4], 513)]);
}

#[test]
fn bytes_are_limited_and_a_large_request_is_not_stuck() {
    let limit = RateLimiter::new().bandwidth(TokenBucket::new(1024, Duration::from_secs(3600)));
    let image = HandImage::sync(100);
    let mut machine = started(&image, config().rate_limiter(limit));
    assert_eq!(machine.block_request(FLUSH, 0, &[]).0, OK);
    assert_eq!(machine.block_request(IN, 0, &[(DATA, 512, true)]).0, OK);
    assert_eq!(machine.block_request(IN, 0, &[(DATA, 8192, true)]).0, OK);
    machine.offer_block(IN, 0, &[(DATA, 512, true)]);
    machine.run();
    assert_eq!(machine.ring.used(), [], "the next one pays for it");
}

#[test]
fn a_limit_can_be_put_on_a_device_at_work() {
    let image = HandImage::sync(100);
    let device = Block::new(image, config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    assert_eq!(machine.block_request(FLUSH, 0, &[]).0, OK);
    handle.set_rate_limiter(Some(an_hour_for(1)));
    assert_eq!(handle.rate_limiter(), Some(an_hour_for(1)));
    assert_eq!(machine.block_request(FLUSH, 0, &[]).0, OK);
    machine.offer_block(FLUSH, 0, &[]);
    machine.run();
    assert_eq!(machine.ring.used(), []);
}

#[test]
fn completions_are_taken_while_new_requests_wait_for_the_limit() {
    let image = HandImage::new(100);
    let mut machine = started(&image, config().rate_limiter(an_hour_for(1)));
    machine.offer_block(IN, 0, &[(DATA, 512, true)]);
    machine.ring.offer(0);
    machine.run();
    assert_eq!(image.under_way().len(), 1);
    image.release(0);
    machine.run();
    assert_eq!(machine.ring.used(), [(0, 513)]);
}

#[test]
fn a_throttled_device_can_be_paused_and_reset() {
    let image = HandImage::sync(100);
    let mut machine = started(&image, config().rate_limiter(an_hour_for(1)));
    for _ in 0..3 {
        machine.ring.add(&[(0x8000, 16, false), (DATA, 513, true)]);
    }
    machine.run();
    machine.registers.pause();
    machine.registers.resume().unwrap();
    machine.run();
    assert_eq!(machine.ring.used().len(), 1, "a pause brings no tokens");
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
}

#[test]
fn the_timer_wakes_a_throttled_worker_without_a_kick() {
    let image = HandImage::sync(100);
    let limit = RateLimiter::new().ops(TokenBucket::new(1, Duration::from_millis(5)));
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let device = Block::new(image, config().rate_limiter(limit));
    let control = device.handle();
    let mut machine = Machine::on(device, Arc::new(handle.clone()), ManualSpawner::new());
    let stop = Arc::new(AtomicBool::new(false));
    let worker = thread::spawn({
        let stop = stop.clone();
        move || event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap()
    });
    machine.start(u64::MAX);
    machine.mem.view().write_obj(FLUSH, GuestAddress(0x8000)).unwrap();
    for _ in 0..10 {
        machine.ring.add(&[(0x8000, 16, false), (0x8010, 1, true)]);
    }
    machine.kick();
    while machine.ring.used_index() != 10 {
        thread::yield_now();
    }
    assert!(control.throttled() > 0);
    stop.store(true, Ordering::SeqCst);
    handle.wake().unwrap();
    worker.join().unwrap();
}

// Another image.

#[test]
fn another_image_takes_the_place_of_the_first_and_the_driver_is_told_of_its_capacity() {
    let (first, second) = (HandImage::sync(10), HandImage::sync(20));
    let device = Block::new(first.clone(), config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    machine.ring.write(DATA, 0x1111_u64);
    assert_eq!(machine.block_request(OUT, 3, &[(DATA, 512, false)]).0, OK);
    machine.write(reg::INTERRUPT_ACK, 1);
    let old = handle.replace(second.clone()).unwrap();
    assert_eq!((freestone_block::Image::size(&*old), config_u32(&machine, 0)), (10 * 512, 20));
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2);
    machine.ring.write(DATA, 0x2222_u64);
    assert_eq!(machine.block_request(OUT, 15, &[(DATA, 512, false)]).0, OK);
    assert_eq!((first.sector(3)[0], second.sector(3)[0], second.sector(15)[0]), (0x11, 3, 0x22));
    assert!(first.done().iter().any(|asked| matches!(asked, Asked::Flush)), "nobody would flush it later");
    drop(old);
    assert_eq!(Arc::strong_count(&first), 1, "the device let it go");
}

#[test]
fn an_image_that_cannot_do_what_the_disk_offers_is_refused() {
    let device = Block::new(HandImage::sync(10), config());
    let handle = device.handle();
    let read_only = common::TestImage::with(10, true);
    assert!(handle.replace(read_only).unwrap_err().to_string().contains("read-only"));
    let plain = common::TestImage::new(10);
    assert!(handle.replace(plain.clone()).unwrap_err().to_string().contains("discard"));
    let other = Block::new(plain, config().logical_block(4096));
    let small = common::TestImage::new(1);
    assert!(other.handle().replace(small).is_err());
}

#[test]
fn a_read_only_disk_takes_any_image_and_stays_read_only() {
    let device = Block::new(common::TestImage::with(10, true), config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    handle.replace(common::TestImage::new(10)).unwrap();
    assert_eq!(machine.block_request(OUT, 0, &[(DATA, 512, false)]).0, IOERR);
    assert_eq!(machine.block_request(IN, 0, &[(DATA, 512, true)]).0, OK);
}

#[test]
fn an_image_that_is_replaced_while_nothing_works_is_there_when_it_works_again() {
    let device = Block::new(HandImage::sync(10), config());
    let handle = device.handle();
    let mut machine = Machine::new(device);
    handle.replace(HandImage::sync(30)).unwrap();
    machine.start(u64::MAX);
    assert_eq!(config_u32(&machine, 0), 30);
    assert_eq!(machine.block_request(IN, 29, &[(DATA, 512, true)]).0, OK);
}
