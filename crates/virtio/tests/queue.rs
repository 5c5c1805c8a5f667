//! The split queue as a device uses it, against drivers good and bad.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{HOLE, INDIRECT, NEXT, RAM_AFTER_HOLE, RAM_END, REGISTERS, Ring, SEAM, WRITE, memory};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_virtio::{ChainBuffers, Error, QueueConfig, RingState, VirtQueue, features};

const MAX: u16 = 64;
/// Where tests put indirect tables.
const TABLE: u64 = 0x5_0000;

fn queue(ring: &Ring) -> VirtQueue {
    VirtQueue::new(ring.config, MAX, 0, &ring.mem.view()).unwrap()
}

fn set_up(size: u16) -> (GuestMem, Ring, VirtQueue) {
    let mem = memory();
    let ring = Ring::new(&mem, size);
    let queue = queue(&ring);
    (mem, ring, queue)
}

/// What one pop gives: head and (address in the first 4 GiB, length) of readable and writable buffers, or the error.
type Popped = Result<Option<(u16, Vec<usize>, Vec<usize>)>, Error>;

fn pop(queue: &mut VirtQueue, mem: &GuestMem) -> Popped {
    let view = mem.view();
    let mut buffers = ChainBuffers::new();
    let chain = queue.attach(&view)?.pop(&mut buffers)?;
    let lengths = |slices: &[freestone_memory::MemorySlice<'_>]| slices.iter().map(|s| s.len()).collect();
    Ok(chain.map(|c| (c.head(), lengths(buffers.readable()), lengths(buffers.writable()))))
}

fn pop_error(ring: &Ring) -> Error {
    pop(&mut queue(ring), &ring.mem).unwrap_err()
}

#[test]
fn an_empty_queue_gives_nothing() {
    let (mem, _, mut queue) = set_up(16);
    assert_eq!(pop(&mut queue, &mem).unwrap(), None);
}

#[test]
fn chains_come_in_the_order_they_were_offered() {
    let (mem, mut ring, mut queue) = set_up(16);
    ring.add(&[(0x8000, 16, false), (0x9000, 512, true), (0xa000, 1, true)]);
    ring.add(&[(0x8000, 8, false)]);
    assert_eq!(pop(&mut queue, &mem).unwrap(), Some((0, vec![16], vec![512, 1])));
    assert_eq!(pop(&mut queue, &mem).unwrap(), Some((3, vec![8], vec![])));
    assert_eq!(pop(&mut queue, &mem).unwrap(), None);
}

#[test]
fn a_queue_goes_round_more_than_65536_times() {
    let (mem, mut ring, mut queue) = set_up(4);
    let view = mem.view();
    let mut buffers = ChainBuffers::new();
    for n in 0..70_000u32 {
        let head = ring.add(&[(0x8000, 1, true)]);
        let mut queue = queue.attach(&view).unwrap();
        let chain = queue.pop(&mut buffers).unwrap().unwrap();
        queue.push_used(chain, n).unwrap();
        queue.publish().unwrap();
        assert_eq!(ring.used(), [(head.into(), n)]);
    }
}

#[test]
fn completions_are_seen_when_they_are_published_and_all_at_once() {
    let (mem, mut ring, mut queue) = set_up(16);
    let view = mem.view();
    let mut buffers = ChainBuffers::new();
    for _ in 0..3 {
        ring.add(&[(0x8000, 1, true)]);
    }
    let mut queue = queue.attach(&view).unwrap();
    while let Some(chain) = queue.pop(&mut buffers).unwrap() {
        queue.push_used(chain, 1).unwrap();
        assert_eq!(ring.used_index(), 0);
    }
    queue.publish().unwrap();
    assert_eq!(ring.used(), [(0, 1), (1, 1), (2, 1)]);
}

#[test]
fn chains_may_be_completed_out_of_order() {
    let (mem, mut ring, mut queue) = set_up(16);
    let view = mem.view();
    let mut buffers = ChainBuffers::new();
    for _ in 0..2 {
        ring.add(&[(0x8000, 1, true)]);
    }
    let mut queue = queue.attach(&view).unwrap();
    let first = queue.pop(&mut buffers).unwrap().unwrap();
    let second = queue.pop(&mut buffers).unwrap().unwrap();
    queue.push_used(second, 2).unwrap();
    queue.push_used(first, 1).unwrap();
    queue.publish().unwrap();
    assert_eq!(ring.used(), [(1, 2), (0, 1)]);
}

#[test]
fn the_position_survives_a_new_attachment_and_is_in_the_state() {
    let (mem, mut ring, mut queue) = set_up(16);
    ring.add(&[(0x8000, 1, true)]);
    pop(&mut queue, &mem).unwrap().unwrap();
    ring.add(&[(0x8000, 1, true)]);
    assert_eq!(queue.state().ring, RingState::Split { next_avail: 1, next_used: 0 });
    assert_eq!(pop(&mut queue, &mem).unwrap().unwrap().0, 1);
    let state = queue.state();
    assert_eq!(state.ring, RingState::Split { next_avail: 2, next_used: 0 });
    assert_eq!((state.config, state.max_size, state.event_idx), (ring.config, MAX, false));
}

#[test]
fn an_indirect_table_is_part_of_the_chain() {
    let (mem, mut ring, mut queue) = set_up(16);
    ring.descriptor(0, 0x8000, 16, NEXT, 5);
    // The write flag of an indirect descriptor is to be ignored.
    ring.descriptor(5, TABLE, 3 * 16, INDIRECT | WRITE, 0);
    ring.descriptor_in(TABLE, 0, 0x9000, 4, NEXT, 2);
    ring.descriptor_in(TABLE, 2, 0xa000, 8, NEXT | WRITE, 1);
    ring.descriptor_in(TABLE, 1, 0xb000, 1, WRITE, 77);
    ring.offer(0);
    assert_eq!(pop(&mut queue, &mem).unwrap(), Some((0, vec![16, 4], vec![8, 1])));
}

#[test]
fn an_indirect_table_may_have_as_many_descriptors_as_the_device_s_largest_queue() {
    let (mem, mut ring, mut queue) = set_up(4);
    ring.descriptor(0, TABLE, u32::from(MAX) * 16, INDIRECT, 0);
    for i in 0..MAX {
        ring.descriptor_in(TABLE, i, 0x9000, 1, if i + 1 < MAX { NEXT } else { 0 }, i + 1);
    }
    ring.offer(0);
    assert_eq!(pop(&mut queue, &mem).unwrap().unwrap().1.len(), usize::from(MAX));
}

#[test]
fn a_longer_indirect_chain_is_refused() {
    let (_, mut ring, _) = set_up(4);
    ring.descriptor(0, TABLE, u32::from(MAX + 1) * 16, INDIRECT, 0);
    for i in 0..=MAX {
        ring.descriptor_in(TABLE, i, 0x9000, 1, if i < MAX { NEXT } else { 0 }, i + 1);
    }
    ring.offer(0);
    assert!(matches!(pop_error(&ring), Error::ChainTooLong { max: MAX }));
}

#[test]
fn a_loop_of_descriptors_is_refused() {
    let (_, mut ring, _) = set_up(16);
    ring.descriptor(0, 0x8000, 1, NEXT, 1);
    ring.descriptor(1, 0x8000, 1, NEXT, 0);
    ring.offer(0);
    assert!(matches!(pop_error(&ring), Error::ChainTooLong { .. }));
}

#[test]
fn a_loop_of_empty_descriptors_is_refused() {
    let (_, mut ring, _) = set_up(16);
    ring.descriptor(3, 0x8000, 0, NEXT, 3);
    ring.offer(3);
    assert!(matches!(pop_error(&ring), Error::ChainTooLong { .. }));
}

#[test]
fn a_loop_in_an_indirect_table_is_refused() {
    let (_, mut ring, _) = set_up(16);
    ring.descriptor(0, TABLE, 32, INDIRECT, 0);
    ring.descriptor_in(TABLE, 0, 0x8000, 1, NEXT, 1);
    ring.descriptor_in(TABLE, 1, 0x8000, 1, NEXT, 0);
    ring.offer(0);
    assert!(matches!(pop_error(&ring), Error::ChainTooLong { .. }));
}

#[test]
fn indices_outside_of_the_table_are_refused() {
    let (_, mut ring, _) = set_up(16);
    ring.offer(16);
    assert!(matches!(pop_error(&ring), Error::DescriptorIndex { index: 16, size: 16 }));
    let (_, mut ring, _) = set_up(16);
    ring.descriptor(0, 0x8000, 1, NEXT, 65535);
    ring.offer(0);
    assert!(matches!(pop_error(&ring), Error::DescriptorIndex { index: 65535, size: 16 }));
    let (_, mut ring, _) = set_up(16);
    ring.descriptor(0, TABLE, 32, INDIRECT, 0);
    ring.descriptor_in(TABLE, 0, 0x8000, 1, NEXT, 2);
    ring.offer(0);
    assert!(matches!(pop_error(&ring), Error::DescriptorIndex { index: 2, size: 2 }));
}

#[test]
fn an_indirect_table_inside_another_is_refused() {
    let (_, mut ring, _) = set_up(16);
    ring.descriptor(0, TABLE, 16, INDIRECT, 0);
    ring.descriptor_in(TABLE, 0, TABLE, 16, INDIRECT, 0);
    ring.offer(0);
    assert!(pop_error(&ring).to_string().ends_with("it is inside another"));
}

#[test]
fn an_indirect_descriptor_with_a_next_one_is_refused() {
    let (_, mut ring, _) = set_up(16);
    ring.descriptor(0, TABLE, 16, INDIRECT | NEXT, 1);
    ring.offer(0);
    assert!(pop_error(&ring).to_string().ends_with("its descriptor has a next one"));
}

#[test]
fn indirect_tables_of_impossible_length_are_refused() {
    for len in [0, 1, 15, 17, 65536 * 16, u32::MAX, 0xffff_fff0] {
        let (_, mut ring, _) = set_up(16);
        ring.descriptor(0, TABLE, len, INDIRECT, 0);
        ring.offer(0);
        assert!(matches!(pop_error(&ring), Error::Indirect { .. }), "{len:#x}");
    }
}

#[test]
fn indirect_tables_outside_of_memory_are_refused() {
    for addr in [HOLE, HOLE - 16, RAM_AFTER_HOLE - 16, RAM_END - 16, REGISTERS, u64::MAX - 15, SEAM - 16] {
        let (_, mut ring, _) = set_up(16);
        ring.descriptor(0, addr, 32, INDIRECT, 0);
        ring.offer(0);
        assert!(matches!(pop_error(&ring), Error::Indirect { len: 32, .. }), "{addr:#x}");
    }
}

#[test]
fn empty_descriptors_have_no_part_whatever_their_address() {
    let (mem, mut ring, mut queue) = set_up(16);
    ring.add(&[(HOLE, 0, false), (0x8000, 4, false), (u64::MAX, 0, true), (0x9000, 1, true), (0, 0, true)]);
    assert_eq!(pop(&mut queue, &mem).unwrap(), Some((0, vec![4], vec![1])));
}

#[test]
fn buffers_outside_of_memory_are_refused() {
    for (addr, len) in [
        (HOLE, 1),
        (HOLE - 1, 2),
        (HOLE - 1, 0x20_0000),
        (RAM_AFTER_HOLE - 1, 2),
        (RAM_END - 1, 2),
        (REGISTERS, 4),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 0xfff, 0x2000),
        (0, u32::MAX),
    ] {
        let (_, mut ring, _) = set_up(16);
        ring.add(&[(addr, len, true)]);
        assert!(matches!(pop_error(&ring), Error::Buffer { .. }), "{addr:#x}+{len:#x}");
    }
}

#[test]
fn a_buffer_across_regions_that_touch_is_two_slices() {
    let (mem, mut ring, mut queue) = set_up(16);
    ring.add(&[(SEAM - 3, 10, true)]);
    assert_eq!(pop(&mut queue, &mem).unwrap(), Some((0, vec![], vec![3, 7])));
}

#[test]
fn four_gib_in_one_chain_are_refused() {
    let mem = memory();
    let mut ring = Ring::new(&mem, 4);
    let mut queue = VirtQueue::new(ring.config, 8192, 0, &mem.view()).unwrap();
    let megabyte = 1 << 20;
    let table = |count: u16, last: u32| {
        ring.descriptor(0, TABLE, u32::from(count) * 16, INDIRECT, 0);
        for i in 0..count {
            let (len, flags) = if i + 1 < count { (megabyte, NEXT) } else { (last, 0) };
            ring.descriptor_in(TABLE, i, 0, len, flags, i + 1);
        }
    };
    table(4096, megabyte - 1);
    ring.offer(0);
    assert_eq!(pop(&mut queue, &mem).unwrap().unwrap().1.len(), 4096);
    let table = |ring: &Ring, last| ring.write(TABLE + 16 * 4095 + 8, last);
    table(&ring, megabyte);
    ring.offer(0);
    assert!(matches!(pop(&mut queue, &mem).unwrap_err(), Error::ChainBytes));
}

#[test]
fn a_readable_buffer_after_a_writable_one_is_refused() {
    let (_, mut ring, _) = set_up(16);
    ring.add(&[(0x8000, 1, false), (0x9000, 1, true), (0x8000, 1, false)]);
    assert!(matches!(pop_error(&ring), Error::Direction));
}

#[test]
fn an_available_index_too_far_ahead_is_refused_and_a_full_queue_is_not() {
    let (mem, ring, mut queue) = set_up(16);
    for ahead in [17, 0x8000, 65535] {
        ring.set_avail(ahead);
        let error = pop(&mut queue, &mem).unwrap_err();
        assert!(matches!(error, Error::AvailIndex { size: 16, .. }), "{ahead}");
    }
    ring.set_avail(16);
    ring.descriptor(0, 0x8000, 1, 0, 0);
    assert!(pop(&mut queue, &mem).unwrap().is_some());
}

#[test]
fn an_available_index_that_goes_back_is_refused() {
    let (mem, mut ring, mut queue) = set_up(16);
    ring.add(&[(0x8000, 1, true)]);
    pop(&mut queue, &mem).unwrap().unwrap();
    ring.set_avail(0);
    assert!(matches!(pop(&mut queue, &mem).unwrap_err(), Error::AvailIndex { ahead: 65535, size: 16 }));
}

#[test]
fn queue_sizes_that_are_no_powers_of_two_or_too_large_are_refused() {
    let mem = memory();
    for size in [0, 3, 65, 128, 65535] {
        let config = QueueConfig { size, ..Ring::new(&mem, 16).config };
        let error = VirtQueue::new(config, MAX, 0, &mem.view()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("queue size {size} is not a power of two (any number for packed rings) from 1 to 64")
        );
    }
    for size in [1, 2, 64] {
        let config = QueueConfig { size, ..Ring::new(&mem, 16).config };
        VirtQueue::new(config, MAX, 0, &mem.view()).unwrap();
    }
}

#[test]
fn rings_that_are_misaligned_or_not_in_memory_are_refused() {
    let mem = memory();
    let good = Ring::new(&mem, 64).config;
    let bad_everywhere = [HOLE, HOLE - 16, REGISTERS, RAM_END - 16, SEAM - 16, !0xf, 1 << 63];
    let refused = |config: QueueConfig, part: &str| {
        let error = VirtQueue::new(config, MAX, 0, &mem.view()).unwrap_err().to_string();
        assert!(error.starts_with(part), "{error}");
    };
    for addr in bad_everywhere.into_iter().chain([0x1001, 0x1008]) {
        refused(QueueConfig { descriptors: addr, ..good }, "descriptor table");
    }
    for addr in bad_everywhere.into_iter().chain([0x1001]) {
        refused(QueueConfig { driver: addr, ..good }, "available ring");
    }
    for addr in bad_everywhere.into_iter().chain([0x1001, 0x1002]) {
        refused(QueueConfig { device: addr, ..good }, "used ring");
    }
}

#[test]
fn a_ring_may_end_where_memory_ends() {
    let mem = memory();
    let config = QueueConfig {
        size: 64,
        descriptors: RAM_END - 16 * 64,
        driver: HOLE - (4 + 2 * 64 + 2),
        device: SEAM - (4 + 8 * 64 + 2 + 2),
    };
    VirtQueue::new(config, MAX, 0, &mem.view()).unwrap();
    let beyond = QueueConfig { driver: config.driver + 2, ..config };
    VirtQueue::new(beyond, MAX, 0, &mem.view()).unwrap_err();
}

#[test]
fn rings_laid_over_one_another_do_no_harm_to_the_device() {
    let mem = memory();
    let base = Ring::new(&mem, 16).config;
    for (driver, device) in [(0x1_2000, 0x1_2000), (0x1000, 0x1_4000), (0x1_2000, 0x1000), (0x1000, 0x1000)] {
        let mut ring = Ring::at(&mem, QueueConfig { driver, device, ..base });
        mem.view().write_slice(&[0; 0x1000], GuestAddress(0x1000)).unwrap();
        mem.view().write_slice(&[0; 0x1000], GuestAddress(0x1_2000)).unwrap();
        let mut queue = queue(&ring);
        let view = mem.view();
        let mut buffers = ChainBuffers::new();
        ring.add(&[(0x8000, 1, true)]);
        let mut queue = queue.attach(&view).unwrap();
        for round in 0.. {
            assert!(round <= 70_000, "the device is led round for ever");
            let Ok(Some(chain)) = queue.pop(&mut buffers) else { break };
            queue.push_used(chain, 1).unwrap();
            queue.publish().unwrap();
            queue.needs_interrupt().unwrap();
            if queue.enable_kicks().is_err() {
                break;
            }
        }
    }
}

#[test]
fn without_event_indices_the_driver_s_flag_says_whether_it_wants_interrupts() {
    let (mem, mut ring, mut queue) = set_up(16);
    let view = mem.view();
    let mut buffers = ChainBuffers::new();
    let mut queue = queue.attach(&view).unwrap();
    let mut complete_one = |flags: u16| {
        ring.add(&[(0x8000, 1, true)]);
        ring.write(ring.config.driver, flags);
        let chain = queue.pop(&mut buffers).unwrap().unwrap();
        queue.push_used(chain, 0).unwrap();
        assert!(!queue.needs_interrupt().unwrap(), "nothing was published");
        queue.publish().unwrap();
        let first = queue.needs_interrupt().unwrap();
        assert!(!queue.needs_interrupt().unwrap(), "nothing new was published");
        first
    };
    assert!(complete_one(0));
    assert!(!complete_one(1));
    assert!(complete_one(0));
}

#[test]
fn with_event_indices_the_driver_names_the_completion_it_wants_to_hear_of() {
    let mem = memory();
    let mut ring = Ring::new(&mem, 16);
    let mut queue = VirtQueue::new(ring.config, MAX, features::RING_EVENT_IDX, &mem.view()).unwrap();
    let view = mem.view();
    let mut buffers = ChainBuffers::new();
    let mut queue = queue.attach(&view).unwrap();
    let mut complete = |ring: &mut Ring, count: usize| {
        for _ in 0..count {
            ring.add(&[(0x8000, 1, true)]);
            let chain = queue.pop(&mut buffers).unwrap().unwrap();
            queue.push_used(chain, 0).unwrap();
        }
        queue.publish().unwrap();
        queue.needs_interrupt().unwrap()
    };
    ring.set_used_event(0);
    assert!(complete(&mut ring, 1), "it waits for completion 0");
    assert!(!complete(&mut ring, 1), "it did not ask again");
    ring.set_used_event(4);
    assert!(!complete(&mut ring, 2), "2 and 3 are not 4");
    assert!(complete(&mut ring, 3), "4 is among 4, 5 and 6");
    // The flag means nothing now.
    ring.write(ring.config.driver, 1u16);
    ring.set_used_event(7);
    assert!(complete(&mut ring, 1));
}

#[test]
fn without_event_indices_kicks_are_switched_by_the_device_s_flag() {
    let (mem, mut ring, mut queue) = set_up(16);
    let view = mem.view();
    let mut queue = queue.attach(&view).unwrap();
    let flags = |ring: &Ring| ring.read::<u16>(ring.config.device);
    assert_eq!(flags(&ring), 0);
    queue.disable_kicks().unwrap();
    assert_eq!(flags(&ring), 1);
    ring.add(&[(0x8000, 1, true)]);
    assert!(queue.enable_kicks().unwrap(), "a request came while kicks were off");
    assert_eq!(flags(&ring), 0);
}

#[test]
fn with_event_indices_the_device_names_the_request_it_wants_to_hear_of() {
    let mem = memory();
    let mut ring = Ring::new(&mem, 16);
    let mut queue = VirtQueue::new(ring.config, MAX, features::RING_EVENT_IDX, &mem.view()).unwrap();
    let view = mem.view();
    let mut buffers = ChainBuffers::new();
    let mut queue = queue.attach(&view).unwrap();
    for n in 1..4u16 {
        ring.add(&[(0x8000, 1, true)]);
        queue.disable_kicks().unwrap();
        let _chain = queue.pop(&mut buffers).unwrap().unwrap();
        assert_eq!(ring.avail_event(), n - 1, "kicks stay where they were asked for last");
        assert!(!queue.enable_kicks().unwrap());
        assert_eq!(ring.avail_event(), n);
    }
    assert_eq!(ring.read::<u16>(ring.config.device), 0, "the flag is not used");
}
