//! The packed queue as a device uses it, against drivers good and bad.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_testkit::driver::{Arena, Buffer, Desc, DriverQueue, desc_flags, packed_event, packed_flags};
use freestone_virtio::{
    ChainBuffers, Error, QueueConfig, QueueState, RingPosition, RingState, VirtQueue, features,
};

const MAX: u16 = 64;
const MEMORY: u64 = 4 << 20;
const AVAIL: u16 = packed_flags::AVAIL;
const USED: u16 = packed_flags::USED;
const ONE: Buffer = Buffer::writable(0x10_0000, 1);

/// What one pop gives: the id and the lengths of readable and writable buffers.
type Popped = Result<Option<(u16, Vec<usize>, Vec<usize>)>, Error>;

struct Fixture {
    mem: GuestMem,
    arena: Arena,
    driver: DriverQueue,
    queue: VirtQueue,
}

fn config(driver: &DriverQueue) -> QueueConfig {
    QueueConfig {
        size: driver.size(),
        descriptors: driver.desc_addr(),
        driver: driver.avail_addr(),
        device: driver.used_addr(),
    }
}

fn set_up(size: u16, bits: u64) -> Fixture {
    let bits = bits | features::RING_PACKED;
    let mem = GuestMem::anonymous(MEMORY).unwrap();
    let mut arena = Arena::new(0x1000, 0x10_0000);
    let driver = DriverQueue::negotiated(&mem, &mut arena, size, bits).unwrap();
    let queue = VirtQueue::new(config(&driver), MAX, bits, &mem.view()).unwrap();
    Fixture { mem, arena, driver, queue }
}

impl Fixture {
    /// Takes one request.
    fn pop(&mut self) -> Popped {
        let view = self.mem.view();
        let mut buffers = ChainBuffers::new();
        let chain = self.queue.attach(&view)?.pop(&mut buffers)?;
        let lengths = |slices: &[freestone_memory::MemorySlice<'_>]| slices.iter().map(|s| s.len()).collect();
        Ok(chain.map(|c| (c.head(), lengths(buffers.readable()), lengths(buffers.writable()))))
    }

    /// Takes and completes everything with `len`; returns whether the driver wants an interrupt.
    fn serve(&mut self, len: u32) -> bool {
        let view = self.mem.view();
        let mut buffers = ChainBuffers::new();
        let mut queue = self.queue.attach(&view).unwrap();
        while let Some(chain) = queue.pop(&mut buffers).unwrap() {
            queue.push_used(chain, len).unwrap();
        }
        queue.publish().unwrap();
        queue.needs_interrupt().unwrap()
    }

    fn add(&mut self, count: usize) {
        for _ in 0..count {
            self.driver.add_chain(&[ONE]).unwrap();
        }
        self.driver.publish().unwrap();
    }

    /// Writes descriptors by hand from slot 0 on.
    fn write(&self, descriptors: &[Desc]) {
        for (slot, desc) in (0..).zip(descriptors) {
            self.driver.set_desc(slot, *desc).unwrap();
        }
    }
}

fn desc(len: u32, flags: u16, id: u16) -> Desc {
    Desc { addr: 0x10_0000, len, flags, next: id }
}

#[test]
fn requests_come_in_the_order_of_the_ring_with_the_id_of_their_last_descriptor() {
    let mut f = set_up(8, 0);
    f.write(&[
        desc(16, desc_flags::NEXT | AVAIL, 1),
        desc(5, desc_flags::WRITE | AVAIL, 77),
        desc(8, AVAIL, 3),
    ]);
    assert_eq!(f.pop().unwrap(), Some((77, vec![16], vec![5])));
    assert_eq!(f.pop().unwrap(), Some((3, vec![8], vec![])));
    assert_eq!(f.pop().unwrap(), None);
}

#[test]
fn a_ring_of_any_size_goes_round_many_times() {
    for size in [1, 2, 3, 7, 64] {
        let mut f = set_up(size, 0);
        for n in 1..1000 {
            let count = usize::from(size.min(3));
            let id = f.driver.add_chain(&vec![ONE; count]).unwrap();
            f.driver.publish().unwrap();
            f.serve(n);
            let used = f.driver.used().unwrap().unwrap();
            assert_eq!((used.head, used.len), (id, n), "size {size}");
        }
    }
}

#[test]
fn completions_are_seen_when_they_are_published_and_all_at_once() {
    let mut f = set_up(8, 0);
    f.add(3);
    let view = f.mem.view();
    let mut buffers = ChainBuffers::new();
    let mut queue = f.queue.attach(&view).unwrap();
    while let Some(chain) = queue.pop(&mut buffers).unwrap() {
        queue.push_used(chain, 1).unwrap();
        assert_eq!(f.driver.used().unwrap(), None);
    }
    queue.publish().unwrap();
    assert_eq!(std::iter::from_fn(|| f.driver.used().unwrap()).count(), 3);
}

#[test]
fn a_completion_skips_the_descriptors_of_its_own_request() {
    let mut f = set_up(8, 0);
    let long = f.driver.add_chain(&[ONE; 3]).unwrap();
    let short = f.driver.add_chain(&[ONE]).unwrap();
    f.driver.publish().unwrap();
    let view = f.mem.view();
    let mut buffers = ChainBuffers::new();
    let mut queue = f.queue.attach(&view).unwrap();
    let first = queue.pop(&mut buffers).unwrap().unwrap();
    let second = queue.pop(&mut buffers).unwrap().unwrap();
    queue.push_used(second, 2).unwrap();
    queue.push_used(first, 1).unwrap();
    queue.publish().unwrap();
    // The short one stands at 0 and skips one, so the long one stands at 1.
    assert_eq!((f.driver.desc(0).unwrap().next, f.driver.desc(1).unwrap().next), (short, long));
    let used = std::iter::from_fn(|| f.driver.used().unwrap()).map(|u| (u.head, u.len)).collect::<Vec<_>>();
    assert_eq!(used, [(short, 2), (long, 1)]);
}

#[test]
fn a_used_descriptor_says_whether_its_length_counts() {
    let mut f = set_up(4, 0);
    f.add(1);
    f.serve(0);
    assert_eq!(f.driver.desc(0).unwrap().flags, AVAIL | USED);
    f.add(1);
    f.serve(5);
    assert_eq!(f.driver.desc(1).unwrap().flags, AVAIL | USED | desc_flags::WRITE);
}

#[test]
fn all_descriptors_of_an_indirect_table_count_and_next_means_nothing_there() {
    let mut f = set_up(4, features::RING_INDIRECT_DESC);
    let table = f.arena.alloc(48, 16).unwrap();
    for (n, flags, len) in
        [(0, 0, 16), (1, desc_flags::NEXT | desc_flags::WRITE, 4), (2, desc_flags::WRITE, 1)]
    {
        let at = GuestAddress(table + 16 * n);
        f.mem.view().write_slice(&desc(len, flags, 9).to_packed_bytes(), at).unwrap();
    }
    f.write(&[Desc { addr: table, len: 48, flags: desc_flags::INDIRECT | AVAIL, next: 6 }]);
    assert_eq!(f.pop().unwrap(), Some((6, vec![16], vec![4, 1])));
}

#[test]
fn an_indirect_table_may_be_as_long_as_the_device_s_largest_queue_and_no_longer() {
    let mut f = set_up(4, features::RING_INDIRECT_DESC);
    f.driver.add_indirect(&mut f.arena, &[ONE; MAX as usize]).unwrap();
    f.driver.add_indirect(&mut f.arena, &[ONE; MAX as usize + 1]).unwrap();
    f.driver.publish().unwrap();
    assert_eq!(f.pop().unwrap().unwrap().2.len(), usize::from(MAX));
    assert!(matches!(f.pop().unwrap_err(), Error::ChainTooLong { max: MAX }));
}

#[test]
fn indirect_descriptors_that_are_not_allowed_are_errors() {
    use desc_flags::{INDIRECT, NEXT};
    for (len, flags) in [(0, 0), (17, 0), (16, NEXT), (16 * 65536, 0)] {
        let mut f = set_up(4, 0);
        f.write(&[desc(len, INDIRECT | flags | AVAIL, 0), desc(1, AVAIL, 0)]);
        assert!(matches!(f.pop().unwrap_err(), Error::Indirect { .. }), "{len} {flags}");
    }
    let mut f = set_up(4, 0);
    f.mem.view().write_slice(&desc(16, INDIRECT, 0).to_packed_bytes(), GuestAddress(0x10_0000)).unwrap();
    f.write(&[desc(16, INDIRECT | AVAIL, 0)]);
    assert!(matches!(f.pop().unwrap_err(), Error::Indirect { .. }), "inside another");
}

#[test]
fn a_chain_that_never_ends_is_an_error() {
    let mut f = set_up(7, 0);
    f.write(&[desc(1, desc_flags::NEXT | AVAIL, 0); 7]);
    assert!(matches!(f.pop().unwrap_err(), Error::ChainTooLong { max: 7 }));
}

#[test]
fn descriptors_that_the_device_still_holds_cannot_be_offered_again() {
    let mut f = set_up(2, 0);
    f.write(&[desc(1, AVAIL, 0), desc(1, AVAIL, 1)]);
    assert!(f.pop().unwrap().is_some() && f.pop().unwrap().is_some());
    f.write(&[desc(1, USED, 0)]);
    assert!(matches!(f.pop().unwrap_err(), Error::Overrun { held: 2, size: 2 }));
}

#[test]
fn flags_that_are_not_those_of_an_available_descriptor_are_no_request() {
    for flags in [0, USED, AVAIL | USED, USED | 7] {
        let mut f = set_up(4, 0);
        f.write(&[desc(1, flags, 0)]);
        assert_eq!(f.pop().unwrap(), None, "{flags:#x}");
    }
}

#[test]
fn sizes_are_from_one_to_the_device_s_largest() {
    let f = set_up(4, 0);
    let new = |size, max| {
        let config = QueueConfig { size, ..config(&f.driver) };
        VirtQueue::new(config, max, features::RING_PACKED, &f.mem.view())
    };
    for (size, max) in [(0, 64), (65, 64), (0x8001, 0x8000), (u16::MAX, u16::MAX)] {
        assert!(matches!(new(size, max).unwrap_err(), Error::QueueSize { .. }), "{size}");
    }
    for size in [1, 3, 63, 64] {
        assert_eq!(new(size, 64).unwrap().size(), size);
    }
    new(0x8000, 0x8000).unwrap();
}

#[test]
fn areas_that_are_misaligned_or_not_in_memory_are_refused() {
    let f = set_up(4, 0);
    let good = config(&f.driver);
    let refused = |config: QueueConfig| {
        let error = VirtQueue::new(config, MAX, features::RING_PACKED, &f.mem.view()).unwrap_err();
        assert!(matches!(error, Error::QueueLayout { .. }), "{error}");
    };
    for addr in [MEMORY, MEMORY - 16, u64::MAX - 15, 0x1008, 0x1001] {
        refused(QueueConfig { descriptors: addr, ..good });
    }
    for addr in [MEMORY, MEMORY - 2, u64::MAX - 3, 0x1002] {
        refused(QueueConfig { driver: addr, ..good });
        refused(QueueConfig { device: addr, ..good });
    }
}

#[test]
fn areas_laid_over_one_another_do_no_harm_to_the_device() {
    let ring = 0x1000;
    for (driver, device) in [(ring, ring), (ring + 12, ring + 28), (0x2000, ring + 12), (ring + 12, 0x2000)] {
        let mem = GuestMem::anonymous(MEMORY).unwrap();
        let config = QueueConfig { size: 4, descriptors: ring, driver, device };
        let bits = features::RING_PACKED | features::RING_EVENT_IDX;
        let mut queue = VirtQueue::new(config, MAX, bits, &mem.view()).unwrap();
        for slot in 0..4 {
            let at = GuestAddress(ring + 16 * slot);
            mem.view().write_slice(&desc(1, AVAIL, 0).to_packed_bytes(), at).unwrap();
        }
        let view = mem.view();
        let mut buffers = ChainBuffers::new();
        let mut queue = queue.attach(&view).unwrap();
        for round in 0.. {
            assert!(round < 100, "the device is led round for ever");
            let Ok(Some(chain)) = queue.pop(&mut buffers) else { break };
            queue.push_used(chain, 1).unwrap();
            queue.publish().unwrap();
            queue.needs_interrupt().unwrap();
            queue.enable_kicks().unwrap();
            queue.disable_kicks().unwrap();
        }
    }
}

#[test]
fn the_driver_says_by_flags_whether_it_wants_interrupts() {
    for (event, wanted) in [
        (packed_event::ENABLE, true),
        (packed_event::DISABLE, false),
        // A position without EVENT_IDX, and what means nothing: better one too many.
        (packed_event::DESC | 3, true),
        (3 << 16, true),
    ] {
        let mut f = set_up(8, 0);
        f.driver.set_driver_event(event).unwrap();
        assert!(!f.serve(0), "nothing was published");
        f.add(1);
        assert_eq!(f.serve(0), wanted, "{event:#x}");
    }
}

#[test]
fn with_event_indices_the_driver_names_the_descriptor_it_wants_to_hear_of() {
    let mut f = set_up(5, features::RING_EVENT_IDX);
    let used = |f: &mut Fixture, count| {
        f.add(count);
        let wanted = f.serve(0);
        while f.driver.used().unwrap().is_some() {}
        wanted
    };
    let at = |slot: u32, wrap: bool| packed_event::DESC | slot | if wrap { packed_event::WRAP } else { 0 };
    f.driver.set_driver_event(at(2, true)).unwrap();
    assert!(!used(&mut f, 2), "0 and 1 are not 2");
    assert!(used(&mut f, 1));
    assert!(!used(&mut f, 2), "3 and 4: it did not ask again");
    f.driver.set_driver_event(at(1, false)).unwrap();
    assert!(used(&mut f, 3), "1 is among 0, 1 and 2 of the second lap");
    f.driver.set_driver_event(at(0, true)).unwrap();
    assert!(!used(&mut f, 2));
    assert!(used(&mut f, 1), "0 of the third lap");
    f.driver.set_driver_event(at(0x7fff, true)).unwrap();
    assert!(!used(&mut f, 3), "no such descriptor");
    f.driver.set_driver_event(at(0x7fff, true)).unwrap();
    assert!(used(&mut f, 5), "a whole lap passes every position");
}

#[test]
fn kicks_are_switched_by_the_device_s_flags() {
    for (bits, wanted) in [(0, packed_event::ENABLE), (features::RING_EVENT_IDX, packed_event::DESC)] {
        let mut f = set_up(3, bits);
        for n in 0..7 {
            let (slot, wrap) = (n % 3, n / 3 % 2 == 0);
            let view = f.mem.view();
            let mut queue = f.queue.attach(&view).unwrap();
            assert!(!queue.enable_kicks().unwrap());
            let position = if bits == 0 { 0 } else { slot | if wrap { packed_event::WRAP } else { 0 } };
            assert_eq!(f.driver.device_event().unwrap(), wanted | position);
            queue.disable_kicks().unwrap();
            assert_eq!(f.driver.device_event().unwrap(), packed_event::DISABLE);
            f.driver.add_chain(&[ONE]).unwrap();
            assert!(!f.driver.publish().unwrap());
            assert!(queue.enable_kicks().unwrap(), "a request came while kicks were off");
            f.serve(0);
            f.driver.used().unwrap().unwrap();
        }
    }
}

#[test]
fn a_queue_goes_on_from_its_state() {
    let mut f = set_up(3, 0);
    for n in 0..10 {
        f.add(2);
        f.serve(1);
        let gone = 2 * (n + 1);
        let next = RingPosition { slot: gone % 3, wrap: gone / 3 % 2 == 0 };
        let state = f.queue.state();
        assert_eq!(state.ring, RingState::Packed { next_avail: next, next_used: next });
        f.queue = VirtQueue::restore(state, &f.mem.view()).unwrap();
        assert!(f.driver.used().unwrap().is_some() && f.driver.used().unwrap().is_some());
    }
}

#[test]
fn a_state_with_impossible_positions_is_refused() {
    let f = set_up(3, 0);
    let start = RingPosition::START;
    for (next_avail, next_used) in [
        (RingPosition { slot: 3, ..start }, start),
        (start, RingPosition { slot: u16::MAX, ..start }),
        (start, RingPosition { slot: 1, ..start }),
        (RingPosition { slot: 2, wrap: false }, RingPosition { slot: 1, wrap: true }),
    ] {
        let ring = RingState::Packed { next_avail, next_used };
        let error = VirtQueue::restore(QueueState { ring, ..f.queue.state() }, &f.mem.view()).unwrap_err();
        assert!(matches!(error, Error::QueuePosition { .. }), "{next_avail:?} {next_used:?}");
    }
}
