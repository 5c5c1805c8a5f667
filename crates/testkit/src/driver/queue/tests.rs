//! Queues as their users see them.

use super::*;

fn queue(size: u16) -> (DriverQueue, Arena) {
    let mem = GuestMem::anonymous(1 << 20).unwrap();
    let mut arena = Arena::new(0x1000, 0x10_0000);
    (DriverQueue::new(&mem, &mut arena, size).unwrap(), arena)
}

/// Uses a chain as a device would.
fn use_chain(queue: &DriverQueue, head: u32, len: u32) {
    let idx = queue.used_idx().unwrap();
    let at = queue.used_addr() + 4 + 8 * u64::from(idx % queue.size());
    queue.store(at, head).unwrap();
    queue.store(at + 4, len).unwrap();
    queue.store(queue.used_addr() + 2, idx.wrapping_add(1)).unwrap();
}

#[test]
fn the_three_parts_are_aligned_and_do_not_overlap() {
    for size in [1, 2, 128, 1024] {
        let (q, _) = queue(size);
        let n = u64::from(size);
        assert!(q.desc_addr().is_multiple_of(16) && q.avail_addr().is_multiple_of(2));
        assert!(q.used_addr().is_multiple_of(4));
        assert!(q.desc_addr() + 16 * n <= q.avail_addr());
        assert!(q.avail_addr() + 6 + 2 * n <= q.used_addr());
    }
}

#[test]
fn a_chain_links_its_descriptors_in_order() {
    let (mut q, _) = queue(8);
    let head = q.add_chain(&[Buffer::readable(0x100, 16), Buffer::writable(0x200, 1)]).unwrap();
    let first = q.desc(head).unwrap();
    assert_eq!((first.addr, first.len, first.flags), (0x100, 16, desc_flags::NEXT));
    let second = q.desc(first.next).unwrap();
    assert_eq!((second.addr, second.len, second.flags), (0x200, 1, desc_flags::WRITE));
    assert_eq!(q.avail_idx().unwrap(), 0, "not published yet");
    assert!(q.publish().unwrap());
    assert_eq!(q.avail_idx().unwrap(), 1);
}

#[test]
fn an_indirect_chain_takes_one_descriptor_of_the_queue() {
    let (mut q, mut arena) = queue(2);
    let buffers = [Buffer::readable(0x100, 16), Buffer::readable(0x110, 16), Buffer::writable(0x200, 1)];
    let head = q.add_indirect(&mut arena, &buffers).unwrap();
    let desc = q.desc(head).unwrap();
    assert_eq!((desc.len, desc.flags), (48, desc_flags::INDIRECT));
    let mut bytes = [0; 16];
    q.memory().view().read_slice(&mut bytes, GuestAddress(desc.addr + 32)).unwrap();
    assert_eq!(Desc::from_bytes(bytes), Desc { addr: 0x200, len: 1, flags: desc_flags::WRITE, next: 0 });
    q.add_chain(&buffers[..1]).unwrap();
    assert!(matches!(q.add_chain(&buffers[..1]), Err(Error::Full { left: 0, .. })));
}

#[test]
fn descriptors_are_free_again_when_their_chain_is_used() {
    let (mut q, _) = queue(2);
    for round in 0..5 {
        let head = q.add_chain(&[Buffer::readable(0, 1), Buffer::writable(1, 1)]).unwrap();
        q.publish().unwrap();
        assert_eq!(q.used().unwrap(), None);
        use_chain(&q, head.into(), round);
        assert_eq!(q.used().unwrap(), Some(Used { head, len: round }));
    }
}

#[test]
fn a_used_element_that_names_no_chain_is_an_error() {
    let (mut q, _) = queue(2);
    for id in [0, 1, 2, 0x1_0000] {
        use_chain(&q, id, 0);
        assert!(matches!(q.used(), Err(Error::Protocol { .. })));
    }
}

#[test]
fn a_kick_is_wanted_as_the_device_says() {
    let (mut q, _) = queue(8);
    q.add_chain(&[Buffer::readable(0, 1)]).unwrap();
    q.store(q.used_addr(), NO_NOTIFY).unwrap();
    assert!(!q.publish().unwrap());
    let mut q = q.with_event_idx(true);
    // Event index 2: the device wants to hear of the chain with index 2, which is the third.
    q.store(q.used_addr() + 4 + 8 * 8, 2u16).unwrap();
    q.add_chain(&[Buffer::readable(0, 1)]).unwrap();
    assert!(!q.publish().unwrap());
    q.add_chain(&[Buffer::readable(0, 1)]).unwrap();
    assert!(q.publish().unwrap());
    q.add_chain(&[Buffer::readable(0, 1)]).unwrap();
    assert!(!q.publish().unwrap());
}

#[test]
fn descriptors_have_the_layout_of_the_specification() {
    let desc = Desc { addr: 0x0102_0304_0506_0708, len: 0x1112_1314, flags: 0x2122, next: 0x3132 };
    let bytes = desc.to_bytes();
    assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1, 0x14, 0x13, 0x12, 0x11, 0x22, 0x21, 0x32, 0x31]);
    assert_eq!(Desc::from_bytes(bytes), desc);
}

#[test]
fn an_arena_aligns_and_ends() {
    let mut arena = Arena::new(0x1001, 0x2000);
    assert_eq!(arena.alloc(1, 0x100).unwrap(), 0x1100);
    assert!(matches!(arena.alloc(0x1000, 1), Err(Error::Full { .. })));
    assert!(arena.alloc(u64::MAX, 16).is_err());
    assert_eq!(arena.alloc(0xeff, 1).unwrap(), 0x1101);
}
