//! virtio-blk as its driver sees it.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use common::{HOLE, Machine, RAM_AFTER_HOLE, SEAM, TestImage, block};
use freestone_block::RawOptions;
use freestone_bus::{EventLoop, IoDevice, ManualSpawner};
use freestone_memory::{Bytes, GuestAddress};
use freestone_virtio::mmio::reg;
use freestone_virtio::{Block, BlockConfig, VirtioDevice, blk};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn bytes(machine: &Machine, addr: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    machine.mem.view().read_slice(&mut data, GuestAddress(addr)).unwrap();
    data
}

#[test]
fn a_read_brings_the_sectors_to_the_buffers_in_order() {
    let mut machine = Machine::started(&TestImage::new(100));
    let buffers = [(0x9000, 512, true), (0xa000, 100, true), (0xb000, 412, true)];
    assert_eq!(machine.block_request(IN, 7, &buffers), (OK, 1025));
    assert_eq!(bytes(&machine, 0x9000, 512), [7; 512]);
    assert_eq!(bytes(&machine, 0xa000, 100), [8; 100]);
    assert_eq!(bytes(&machine, 0xb000, 413), [vec![8; 412], vec![0]].concat());
}

#[test]
fn a_write_brings_the_buffers_to_the_sectors_in_order() {
    let image = TestImage::new(100);
    let mut machine = Machine::started(&image);
    machine.mem.view().write_slice(&[1; 500], GuestAddress(0x9000)).unwrap();
    machine.mem.view().write_slice(&[2; 524], GuestAddress(0xa000)).unwrap();
    assert_eq!(machine.block_request(OUT, 98, &[(0x9000, 500, false), (0xa000, 524, false)]), (OK, 1));
    let data = image.data.lock().unwrap();
    assert_eq!(data[98 * 512..98 * 512 + 500], [1; 500]);
    assert_eq!(data[98 * 512 + 500..], [2; 524]);
    assert_eq!(data[97 * 512..98 * 512], [97; 512]);
}

#[test]
fn a_raw_file_is_read_and_written() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [5; 4096]).unwrap();
    let image = Arc::new(RawOptions::new().open(file.path()).unwrap());
    let mut machine = Machine::new(Block::new(image, BlockConfig::new().poll(Duration::ZERO)));
    machine.start(u64::MAX);
    assert_eq!(machine.block_request(IN, 1, &[(0x9000, 1024, true)]), (OK, 1025));
    assert_eq!(bytes(&machine, 0x9000, 1024), [5; 1024]);
    machine.mem.view().write_slice(&[6; 512], GuestAddress(0x9000)).unwrap();
    assert_eq!(machine.block_request(OUT, 7, &[(0x9000, 512, false)]), (OK, 1));
    assert_eq!(machine.block_request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(std::fs::read(file.path()).unwrap(), [vec![5; 3584], vec![6; 512]].concat());
}

#[test]
fn what_the_device_wrote_is_in_the_dirty_log() {
    let mut machine = Machine::started(&TestImage::new(100));
    machine.mem.take_dirty();
    machine.block_request(IN, 0, &[(0x1_9000, 8192, true)]);
    let log = machine.mem.dirty_log().unwrap();
    assert!(log.is_dirty(GuestAddress(0x1_9000)) && log.is_dirty(GuestAddress(0x1_a000)), "data");
    assert!(log.is_dirty(GuestAddress(machine.ring.config.device)), "used ring");
    assert!(log.is_dirty(GuestAddress(0x8010)), "status");
    assert!(!log.is_dirty(GuestAddress(0x1_b000)));
}

#[test]
fn the_status_byte_need_not_have_a_descriptor_of_its_own() {
    let mut machine = Machine::started(&TestImage::new(100));
    machine.ring.write(0x8000, IN);
    machine.ring.write(0x8008, 3u64);
    machine.ring.add(&[(0x8000, 8, false), (0x8008, 8, false), (0x9000, 513, true)]);
    machine.run();
    assert_eq!(machine.ring.used()[0].1, 513);
    assert_eq!(bytes(&machine, 0x9000, 513), [vec![3; 512], vec![OK]].concat());
}

#[test]
fn a_buffer_may_span_regions_that_touch() {
    let mut machine = Machine::started(&TestImage::new(100));
    assert_eq!(machine.block_request(IN, 9, &[(SEAM - 100, 512, true)]), (OK, 513));
    assert_eq!(bytes(&machine, SEAM - 100, 512), [9; 512]);
}

#[test]
fn the_id_is_the_serial_padded_with_zeros() {
    let mut machine = Machine::started(&TestImage::new(1));
    assert_eq!(machine.block_request(GET_ID, 0, &[(0x9000, 20, true)]), (OK, 21));
    assert_eq!(bytes(&machine, 0x9000, 20), b"FREESTONE-0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_longer_id_buffer_gets_twenty_bytes() {
    let mut machine = Machine::started(&TestImage::new(1));
    machine.ring.write(0x9014, 0xaau8);
    assert_eq!(machine.block_request(GET_ID, 0, &[(0x9000, 64, true)]), (OK, 20));
    assert_eq!(bytes(&machine, 0x9014, 1), [0xaa]);
}

#[test]
fn an_id_buffer_that_is_too_short_is_refused_and_left_alone() {
    let mut machine = Machine::started(&TestImage::new(1));
    machine.ring.write(0x9000, 0xaau8);
    assert_eq!(machine.block_request(GET_ID, 0, &[(0x9000, 19, true)]), (IOERR, 0));
    assert_eq!(bytes(&machine, 0x9000, 1), [0xaa]);
}

#[test]
fn the_configuration_says_capacity_and_segments() {
    let machine = Machine::new(block(&TestImage::new(100)));
    assert_eq!((machine.read(reg::CONFIG), machine.read(reg::CONFIG + 4)), (100, 0));
    assert_eq!(machine.read(reg::CONFIG + 12), 62);
    assert_eq!(machine.read(reg::DEVICE_ID), 2);
}

#[test]
fn a_flush_reaches_the_image() {
    let image = TestImage::new(1);
    let mut machine = Machine::started(&image);
    assert_eq!(machine.block_request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(image.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn without_the_flush_feature_every_write_is_flushed() {
    let image = TestImage::new(1);
    let mut machine = Machine::new(block(&image));
    machine.start(!blk::feature::FLUSH);
    assert_eq!(machine.block_request(OUT, 0, &[(0x9000, 512, false)]), (OK, 1));
    assert_eq!(image.flushes.load(Ordering::SeqCst), 1);
    machine.start(u64::MAX);
    machine.block_request(OUT, 0, &[(0x9000, 512, false)]);
    assert_eq!(image.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    for (image, config) in [
        (TestImage::with(1, true), BlockConfig::new()),
        (TestImage::new(1), BlockConfig::new().read_only(true)),
    ] {
        let device = Block::new(image.clone(), config.queue_size(64).poll(Duration::ZERO));
        assert_eq!(device.info().features & blk::feature::RO, blk::feature::RO);
        let mut machine = Machine::new(device);
        machine.start(u64::MAX);
        assert_eq!(machine.block_request(OUT, 0, &[(0x9000, 512, false)]), (IOERR, 1));
        assert_eq!(machine.block_request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(machine.block_request(IN, 0, &[(0x9000, 512, true)]), (OK, 513));
        assert_eq!(image.entered.load(Ordering::SeqCst), 1, "only the read reaches the image");
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut machine = Machine::started(&TestImage::new(1));
    for kind in [DISCARD, WRITE_ZEROES, 2, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(machine.block_request(kind, 0, &[(0x9000, 16, false)]), (UNSUPP, 1));
    }
    assert!(!machine.needs_reset());
}

#[test]
fn a_length_that_is_not_whole_sectors_is_refused() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    assert_eq!(machine.block_request(IN, 0, &[(0x9000, 511, true)]), (IOERR, 0));
    assert_eq!(machine.block_request(IN, 0, &[(0x9000, 513, true)]), (IOERR, 0));
    assert_eq!(machine.block_request(OUT, 0, &[(0x9000, 1, false)]), (IOERR, 1));
    assert_eq!(image.entered.load(Ordering::SeqCst), 0);
}

#[test]
fn sectors_beyond_the_end_are_refused_whatever_they_overflow() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    for sector in [10, 9, 1 << 55, (1 << 55) - 1, u64::MAX, u64::MAX - 1, u64::MAX / 512] {
        assert_eq!(machine.block_request(IN, sector, &[(0x9000, 1024, true)]).0, IOERR, "{sector:#x}");
        assert_eq!(machine.block_request(OUT, sector, &[(0x9000, 1024, false)]).0, IOERR, "{sector:#x}");
    }
    assert_eq!(image.entered.load(Ordering::SeqCst), 0);
    assert_eq!(machine.block_request(IN, 8, &[(0x9000, 1024, true)]).0, OK);
}

#[test]
fn buffers_of_the_wrong_direction_are_refused() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    assert_eq!(machine.block_request(IN, 0, &[(0x9000, 512, false)]).0, IOERR);
    assert_eq!(machine.block_request(OUT, 0, &[(0x9000, 512, true)]).0, IOERR);
    assert_eq!(machine.block_request(OUT, 0, &[(0x9000, 512, false), (0xa000, 512, true)]).0, IOERR);
    assert_eq!(image.entered.load(Ordering::SeqCst), 0);
}

#[test]
fn an_error_of_the_host_is_an_error_for_the_guest() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    image.fail.store(true, Ordering::SeqCst);
    assert_eq!(machine.block_request(IN, 0, &[(0x9000, 512, true)]), (IOERR, 0));
    assert_eq!(machine.block_request(OUT, 0, &[(0x9000, 512, false)]), (IOERR, 1));
    assert_eq!(machine.block_request(FLUSH, 0, &[]), (IOERR, 1));
    image.fail.store(false, Ordering::SeqCst);
    assert_eq!(machine.block_request(IN, 0, &[(0x9000, 512, true)]), (OK, 513));
    assert!(!machine.needs_reset());
}

#[test]
fn a_file_that_shrinks_under_the_guest_gives_errors_not_zeros() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let image = Arc::new(RawOptions::new().open(file.path()).unwrap());
    let mut machine = Machine::new(Block::new(image, BlockConfig::new().poll(Duration::ZERO)));
    machine.start(u64::MAX);
    file.as_file().set_len(1024).unwrap();
    assert_eq!(machine.block_request(IN, 1, &[(0x9000, 1024, true)]).0, IOERR);
    assert_eq!(machine.block_request(IN, 1, &[(0x9000, 512, true)]).0, OK);
}

#[test]
fn a_request_without_room_for_its_status_breaks_the_device() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    machine.ring.add(&[(0x8000, 16, false)]);
    machine.run();
    machine.assert_broken_until_reset();
}

#[test]
fn a_request_with_a_short_header_breaks_the_device() {
    let mut machine = Machine::started(&TestImage::new(10));
    machine.ring.add(&[(0x8000, 15, false), (0x8010, 1, true)]);
    machine.run();
    machine.assert_broken_until_reset();
    machine.ring.add(&[(0x8000, 0, false), (0x8010, 0, true)]);
    machine.run();
    machine.assert_broken_until_reset();
}

#[test]
fn requests_before_the_malformed_one_are_completed() {
    let mut machine = Machine::started(&TestImage::new(10));
    machine.offer_block(IN, 1, &[(0x9000, 512, true)]);
    machine.ring.add(&[(HOLE, 16, false), (0x8010, 1, true)]);
    machine.run();
    assert_eq!(machine.ring.used(), [(0, 513)]);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 3);
    machine.assert_broken_until_reset();
}

#[test]
fn data_in_a_hole_or_in_the_device_s_own_registers_breaks_the_device() {
    for addr in
        [HOLE, HOLE - 256, RAM_AFTER_HOLE - 1, common::REGISTERS, common::RAM_END - 511, u64::MAX - 100]
    {
        let image = TestImage::new(10);
        let mut machine = Machine::started(&image);
        machine.offer_block(IN, 0, &[(addr, 512, true)]);
        machine.run();
        assert_eq!(image.entered.load(Ordering::SeqCst), 0, "{addr:#x}");
        machine.assert_broken_until_reset();
    }
}

#[test]
fn one_interrupt_answers_a_whole_batch() {
    let mut machine = Machine::started(&TestImage::new(10));
    for _ in 0..20 {
        machine.offer_block(IN, 1, &[(0x9000, 512, true)]);
    }
    machine.run();
    assert_eq!(machine.ring.used().len(), 20);
    assert_eq!(machine.interrupts.load(Ordering::SeqCst), 1);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 1);
    machine.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn a_step_serves_at_most_a_queue_full() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    machine.offer_block(FLUSH, 0, &[]);
    // A driver that offers the request again as soon as the device takes it.
    let ring = std::sync::Mutex::new(machine.ring.clone());
    image.set_hook(move || ring.lock().unwrap().offer(0));
    assert_eq!(machine.spawner.run(1), 1);
    let served = image.flushes.load(Ordering::SeqCst);
    // Fewer if this machine is so slow that the step took too long.
    assert!((16..=64).contains(&served), "{served}");
}

#[test]
fn the_counters_tell_what_was_done() {
    let image = TestImage::new(10);
    let device = block(&image);
    let stats = device.stats();
    let mut machine = Machine::new(device);
    machine.start(u64::MAX);
    machine.block_request(IN, 0, &[(0x9000, 1024, true)]);
    machine.block_request(OUT, 0, &[(0x9000, 512, false)]);
    machine.block_request(FLUSH, 0, &[]);
    machine.block_request(IN, 10, &[(0x9000, 512, true)]);
    let expected = "1 reads (1024 bytes), 1 writes (512 bytes), 1 flushes, 1 errors";
    assert_eq!(stats.counts().to_string(), expected);
}

#[test]
fn shutdown_flushes_the_image_unless_it_is_read_only() {
    for (read_only, flushes) in [(false, 1), (true, 0)] {
        let image = TestImage::with(1, read_only);
        let machine = Machine::started(&image);
        machine.registers.shutdown().unwrap();
        assert_eq!(image.flushes.load(Ordering::SeqCst), flushes);
        assert!(machine.spawner.is_empty());
    }
}

#[test]
fn a_failing_flush_at_shutdown_is_an_error() {
    let image = TestImage::new(1);
    let machine = Machine::started(&image);
    image.fail.store(true, Ordering::SeqCst);
    assert_eq!(machine.registers.shutdown().unwrap_err().to_string(), "cannot flush a disk");
}

#[test]
fn a_paused_device_does_nothing_and_goes_on_where_it_was() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    machine.block_request(IN, 0, &[(0x9000, 512, true)]);
    machine.registers.pause();
    machine.registers.pause();
    assert!(machine.spawner.is_empty());
    machine.offer_block(IN, 3, &[(0x9000, 512, true)]);
    machine.run();
    assert_eq!(machine.ring.used(), []);
    machine.registers.resume().unwrap();
    machine.registers.resume().unwrap();
    machine.spawner.run(10);
    assert_eq!(machine.ring.used(), [(3, 513)]);
    assert_eq!(bytes(&machine, 0x9000, 1), [3]);
}

#[test]
fn a_reset_waits_for_the_request_in_flight_and_nothing_comes_after_it() {
    let image = TestImage::new(10);
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let mut machine = Machine::on(block(&image), Arc::new(handle.clone()), ManualSpawner::new());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let worker = thread::spawn({
        let stop = stop.clone();
        move || event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap()
    });
    machine.start(u64::MAX);
    let gate = image.gate.lock().unwrap();
    machine.offer_block(IN, 5, &[(0x9000, 512, true)]);
    machine.offer_block(IN, 6, &[(0xa000, 512, true)]);
    machine.kick();
    while image.entered.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    let registers = machine.registers.clone();
    let reset = thread::spawn(move || registers.write(reg::STATUS, &[0; 4]).unwrap());
    thread::sleep(Duration::from_millis(50));
    assert!(!reset.is_finished(), "the reset did not wait");
    drop(gate);
    reset.join().unwrap();
    // The memory is the driver's own again.
    machine.mem.view().write_slice(&vec![0x77; 0x1_0000], GuestAddress(0x8000)).unwrap();
    machine.kick();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(bytes(&machine, 0x8000, 0x1_0000), vec![0x77; 0x1_0000]);
    assert_eq!(machine.status(), 0);
    stop.store(true, Ordering::SeqCst);
    handle.wake().unwrap();
    worker.join().unwrap();
}

#[test]
fn a_header_changed_after_the_offer_is_used_as_it_was_read_once() {
    let image = TestImage::new(10);
    let mut machine = Machine::started(&image);
    let mem = machine.mem.clone();
    image.set_hook(move || {
        mem.view().write_obj(OUT, GuestAddress(0x8000)).unwrap();
        mem.view().write_obj(u64::MAX, GuestAddress(0x8008)).unwrap();
    });
    assert_eq!(machine.block_request(IN, 4, &[(0x9000, 512, true)]), (OK, 513));
    assert_eq!(bytes(&machine, 0x9000, 512), [4; 512]);
}
