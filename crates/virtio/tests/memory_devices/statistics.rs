//! The statistics of virtio-balloon, which the device asks for and the driver answers when it likes.

use std::time::{Duration, Instant};

use freestone_bus::EventLoop;
use freestone_memory::{Bytes, GuestAddress};
use freestone_testkit::driver::Buffer;
use freestone_virtio::{Balloon, BalloonConfig, BalloonHandle};

use super::support::{REQUEST, Rig};

const STATISTICS: usize = 2;

fn started() -> (Rig, BalloonHandle) {
    let balloon = Balloon::new(BalloonConfig::new()).unwrap();
    let handle = balloon.handle();
    (Rig::new(balloon), handle)
}

/// Puts a buffer with these statistics into the queue.
fn offer(rig: &mut Rig, entries: &[(u16, u64)]) {
    let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat();
    let bytes: Vec<u8> = entries.iter().flat_map(entry).collect();
    rig.mem.view().write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
    rig.offer(STATISTICS, &[Buffer::readable(REQUEST, u32::try_from(bytes.len()).unwrap())]);
    rig.kick(STATISTICS);
}

#[test]
fn before_the_driver_said_anything_there_are_no_statistics() {
    let (_rig, handle) = started();
    assert_eq!(handle.statistics(), None);
}

#[test]
fn each_tag_has_its_field_and_the_order_does_not_matter() {
    let (mut rig, handle) = started();
    let entries: Vec<(u16, u64)> = (0..10).rev().map(|tag| (tag, 100 + u64::from(tag))).collect();
    offer(&mut rig, &entries);
    let s = handle.statistics().unwrap();
    let fields = [
        s.swap_in,
        s.swap_out,
        s.major_faults,
        s.minor_faults,
        s.free,
        s.total,
        s.available,
        s.caches,
        s.huge_pages_allocated,
        s.huge_pages_failed,
    ];
    assert_eq!(fields.to_vec(), (100..110).map(Some).collect::<Vec<_>>());
}

#[test]
fn unknown_tags_and_part_of_an_entry_are_ignored() {
    let (mut rig, handle) = started();
    let bytes =
        [&77u16.to_le_bytes()[..], &1u64.to_le_bytes(), &4u16.to_le_bytes(), &9u64.to_le_bytes(), &[5, 0, 1]];
    rig.mem.view().write_slice(&bytes.concat(), GuestAddress(REQUEST)).unwrap();
    rig.offer(STATISTICS, &[Buffer::readable(REQUEST, 23)]);
    rig.kick(STATISTICS);
    let statistics = handle.statistics().unwrap();
    assert_eq!((statistics.free, statistics.total), (Some(9), None));
}

#[test]
fn a_buffer_full_of_statistics_is_read_only_so_far() {
    let (mut rig, handle) = started();
    let mut entries = vec![(99, 0); 64];
    entries.push((4, 1));
    offer(&mut rig, &entries);
    assert_eq!(handle.statistics().unwrap().free, None);
}

#[test]
fn the_device_keeps_the_buffer_until_the_host_asks() {
    let (mut rig, handle) = started();
    offer(&mut rig, &[(4, 1)]);
    assert!(rig.used(STATISTICS).is_empty());
    handle.request_statistics();
    rig.settle();
    assert_eq!(rig.used(STATISTICS), [0]);
    offer(&mut rig, &[(4, 2)]);
    assert_eq!(handle.statistics().unwrap().free, Some(2));
    assert!(rig.used(STATISTICS).is_empty());
    assert_eq!(handle.counts().statistics, 2);
}

#[test]
fn a_request_waits_for_a_slow_driver_and_several_are_one() {
    let (mut rig, handle) = started();
    for _ in 0..5 {
        handle.request_statistics();
        rig.settle();
    }
    offer(&mut rig, &[(4, 1)]);
    assert_eq!(rig.used(STATISTICS), [0]);
    offer(&mut rig, &[(4, 2)]);
    assert!(rig.used(STATISTICS).is_empty());
}

#[test]
fn a_flood_of_buffers_waits_in_the_queue() {
    let (mut rig, handle) = started();
    for value in 0..50 {
        offer(&mut rig, &[(4, value)]);
    }
    assert_eq!((handle.counts().statistics, rig.used(STATISTICS).len()), (1, 0));
    handle.request_statistics();
    rig.settle();
    assert_eq!((handle.counts().statistics, rig.used(STATISTICS).len()), (2, 1));
}

#[test]
fn an_empty_buffer_is_statistics_that_say_nothing() {
    let (mut rig, handle) = started();
    rig.offer(STATISTICS, &[Buffer::readable(REQUEST, 0)]);
    rig.kick(STATISTICS);
    assert_eq!(handle.statistics(), Some(freestone_virtio::BalloonStatistics::default()));
}

#[test]
fn a_pause_gives_the_buffer_back_so_that_statistics_go_on() {
    let (mut rig, handle) = started();
    offer(&mut rig, &[(4, 1)]);
    rig.device.pause().unwrap();
    rig.device.resume().unwrap();
    rig.settle();
    assert_eq!(rig.used(STATISTICS), [0]);
    offer(&mut rig, &[(4, 2)]);
    handle.request_statistics();
    rig.settle();
    assert_eq!(rig.used(STATISTICS), [0]);
}

#[test]
fn a_reset_forgets_the_statistics() {
    let (mut rig, handle) = started();
    offer(&mut rig, &[(4, 1)]);
    rig.start(u64::MAX);
    assert_eq!(handle.statistics(), None);
    offer(&mut rig, &[(4, 3)]);
    assert_eq!(handle.statistics().unwrap().free, Some(3));
}

#[test]
fn with_an_interval_the_device_asks_again_and_again() {
    let (mut rig, handle) = started();
    handle.set_statistics_interval(Some(Duration::ZERO)).unwrap();
    let start = Instant::now();
    while handle.counts().statistics < 5 {
        offer(&mut rig, &[(4, 1)]);
        while rig.used(STATISTICS).is_empty() {
            assert!(start.elapsed() < Duration::from_secs(60), "the device never asks");
            rig.settle();
        }
    }
    handle.set_statistics_interval(None).unwrap();
    offer(&mut rig, &[(4, 1)]);
    rig.settle();
    assert!(rig.used(STATISTICS).is_empty());
}

#[test]
fn the_timer_wakes_an_event_loop_each_time() {
    use std::sync::Arc;

    use freestone_bus::{IoDevice, Irq};
    use freestone_memory::GuestMem;
    use freestone_testkit::driver::{Arena, MmioDriver};
    use freestone_virtio::{MmioTransport, MmioWiring};

    let mut event_loop = EventLoop::new().unwrap();
    let mem = GuestMem::anonymous(4 << 20).unwrap();
    let balloon = Balloon::new(BalloonConfig::new()).unwrap();
    let handle = balloon.handle();
    let spawner = Arc::new(event_loop.handle());
    let wiring = MmioWiring { base: 0, mem: mem.clone(), irq: Irq::null(), doorbells: None, spawner };
    let registers = Arc::new(MmioTransport::new("balloon", Box::new(balloon), wiring).unwrap());
    let mut driver = MmioDriver::new(registers as Arc<dyn IoDevice>);
    driver.negotiate(u64::MAX).unwrap();
    let mut arena = Arena::new(0x1_0000, 1 << 20);
    let mut queues: Vec<_> =
        (0..5).map(|index| driver.setup_queue(&mem, &mut arena, index, 16).unwrap()).collect();
    driver.driver_ok().unwrap();
    handle.set_statistics_interval(Some(Duration::from_millis(1))).unwrap();
    for round in 1..=4 {
        queues[STATISTICS].add_chain(&[Buffer::readable(REQUEST, 10)]).unwrap();
        queues[STATISTICS].publish().unwrap();
        driver.kick(2).unwrap();
        // Only the timer can end this wait.
        while queues[STATISTICS].used().unwrap().is_none() {
            event_loop.run_once(60_000).unwrap();
        }
        assert_eq!(handle.counts().statistics, round);
    }
}

#[test]
fn statistics_and_a_request_for_them_outlive_the_machine() {
    let (mut rig, handle) = started();
    offer(&mut rig, &[(4, 7)]);
    rig.used(STATISTICS);
    let next = || {
        let balloon = Balloon::new(BalloonConfig::new()).unwrap();
        (balloon.handle(), balloon)
    };
    let (after, balloon) = next();
    rig.move_on(balloon);
    assert_eq!(after.statistics(), handle.statistics());
    assert_eq!(rig.used(STATISTICS).len(), 1, "the buffer went back, or there would be no more statistics");
    // Nobody can be asked now.
    after.request_statistics();
    rig.settle();
    let (last, balloon) = next();
    rig.move_on(balloon);
    offer(&mut rig, &[(4, 8)]);
    assert_eq!(rig.used(STATISTICS).len(), 1, "the request was waiting");
    assert_eq!(last.statistics().unwrap().free, Some(8));
}
