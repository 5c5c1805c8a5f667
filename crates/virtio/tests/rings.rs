//! Both ring formats under any interleaving of driver and device: what goes in comes out, once, in order, and the same.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, VecDeque};

use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_testkit::driver::{Arena, Buffer, DriverQueue};
use freestone_virtio::{Chain, ChainBuffers, QueueConfig, VirtQueue, features};
use proptest::prelude::*;

const MEMORY: u64 = 1 << 20;
const MAX: u16 = 64;
/// Where the first bytes of requests are: their numbers.
const NUMBERS: u64 = 0x8_0000;
const DATA: u64 = 0x9_0000;

/// Something that the driver or the device does.
#[derive(Debug, Clone)]
enum Act {
    /// A request of so many more readable and writable buffers, by an indirect table or not.
    Add(usize, usize, bool),
    Offer,
    Pop,
    /// Gives back one of the requests that the device holds.
    Push(usize, u32),
    Publish,
    Interrupt,
    Kicks(bool),
    Used,
    WantInterrupt(u16),
    SuppressInterrupts,
    /// The device goes on from its saved state, if it holds nothing.
    Restore,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0..3usize, 0..3usize, any::<bool>()).prop_map(|(r, w, indirect)| Act::Add(r, w, indirect)),
        5 => Just(Act::Offer),
        6 => Just(Act::Pop),
        6 => (any::<prop::sample::Index>(), any::<u32>()).prop_map(|(i, len)| Act::Push(i.index(64), len)),
        4 => Just(Act::Publish),
        2 => Just(Act::Interrupt),
        2 => any::<bool>().prop_map(Act::Kicks),
        6 => Just(Act::Used),
        1 => (0..4u16).prop_map(Act::WantInterrupt),
        1 => Just(Act::SuppressInterrupts),
        1 => Just(Act::Restore),
    ]
}

/// What somebody saw.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Full,
    Popped { number: u32, readable: u32, writable: u32 },
    Nothing,
    Used { number: u32, len: u32 },
}

/// A driver and a device on one queue.
struct Pair {
    mem: GuestMem,
    tables: Arena,
    driver: DriverQueue,
    queue: VirtQueue,
    numbers: BTreeMap<u16, u32>,
    next_number: u32,
    held: Vec<(u32, Chain)>,
    // What must come.
    added: VecDeque<u32>,
    offered: VecDeque<u32>,
    pushed: VecDeque<(u32, u32)>,
    published: VecDeque<(u32, u32)>,
}

impl Pair {
    fn new(size: u16, bits: u64) -> Self {
        let mem = GuestMem::anonymous(MEMORY).unwrap();
        let mut arena = Arena::new(0x1000, 0x1_0000);
        let driver = DriverQueue::negotiated(&mem, &mut arena, size, bits).unwrap();
        let (descriptors, device) = (driver.desc_addr(), driver.used_addr());
        let config = QueueConfig { size, descriptors, driver: driver.avail_addr(), device };
        let queue = VirtQueue::new(config, MAX, bits, &mem.view()).unwrap();
        Self {
            mem,
            tables: Arena::new(0x1_0000, NUMBERS),
            driver,
            queue,
            numbers: BTreeMap::new(),
            next_number: 0,
            held: Vec::new(),
            added: VecDeque::new(),
            offered: VecDeque::new(),
            pushed: VecDeque::new(),
            published: VecDeque::new(),
        }
    }

    fn add(&mut self, readable: usize, writable: usize, indirect: bool) -> Option<Seen> {
        let number = self.next_number;
        let at = NUMBERS + 4 * u64::from(number);
        self.mem.view().write_obj(number, GuestAddress(at)).unwrap();
        let mut buffers = vec![Buffer::readable(at, 4)];
        buffers.resize(1 + readable, Buffer::readable(DATA, 10));
        buffers.resize(1 + readable + writable, Buffer::writable(DATA, 100));
        let added = if indirect {
            self.driver.add_indirect(&mut self.tables, &buffers)
        } else {
            self.driver.add_chain(&buffers)
        };
        let Ok(head) = added else { return Some(Seen::Full) };
        self.next_number += 1;
        assert_eq!(self.numbers.insert(head, number), None, "the id of a request that is in flight");
        self.added.push_back(number);
        None
    }

    fn pop(&mut self) -> Seen {
        let view = self.mem.view();
        let mut buffers = ChainBuffers::new();
        let Some(chain) = self.queue.attach(&view).unwrap().pop(&mut buffers).unwrap() else {
            assert_eq!(self.offered.front(), None);
            return Seen::Nothing;
        };
        let mut number = [0; 4];
        buffers.read(&mut number).unwrap();
        let number = u32::from_le_bytes(number);
        assert_eq!(Some(number), self.offered.pop_front());
        self.held.push((number, chain));
        Seen::Popped { number, readable: buffers.readable_len(), writable: buffers.writable_len() }
    }

    fn used(&mut self) -> Seen {
        let Some(used) = self.driver.used().unwrap() else {
            assert_eq!(self.published.front(), None);
            return Seen::Nothing;
        };
        let number = self.numbers.remove(&used.head).unwrap();
        assert_eq!(Some((number, used.len)), self.published.pop_front());
        Seen::Used { number, len: used.len }
    }

    fn act(&mut self, act: &Act) -> Option<Seen> {
        let mem = self.mem.clone();
        let view = mem.view();
        match *act {
            Act::Add(readable, writable, indirect) => return self.add(readable, writable, indirect),
            Act::Offer => {
                self.driver.publish().unwrap();
                self.offered.append(&mut self.added);
            }
            Act::Pop => return Some(self.pop()),
            Act::Push(index, len) => {
                if !self.held.is_empty() {
                    let (number, chain) = self.held.remove(index % self.held.len());
                    self.queue.attach(&view).unwrap().push_used(chain, len).unwrap();
                    self.pushed.push_back((number, len));
                }
            }
            Act::Publish => {
                self.queue.attach(&view).unwrap().publish().unwrap();
                self.published.append(&mut self.pushed);
            }
            Act::Interrupt => drop(self.queue.attach(&view).unwrap().needs_interrupt().unwrap()),
            Act::Kicks(true) => {
                let more = self.queue.attach(&view).unwrap().enable_kicks().unwrap();
                assert_eq!(more, !self.offered.is_empty());
            }
            Act::Kicks(false) => self.queue.attach(&view).unwrap().disable_kicks().unwrap(),
            Act::Used => return Some(self.used()),
            Act::WantInterrupt(ahead) => self.driver.want_interrupt(ahead).unwrap(),
            Act::SuppressInterrupts => self.driver.suppress_interrupts().unwrap(),
            Act::Restore => {
                if self.held.is_empty() && self.pushed.is_empty() {
                    self.queue = VirtQueue::restore(self.queue.state(), &view).unwrap();
                }
            }
        }
        None
    }

    /// Lets everything that is under way come to its end.
    fn finish(&mut self) {
        self.act(&Act::Offer);
        while self.pop() != Seen::Nothing {}
        while !self.held.is_empty() {
            self.act(&Act::Push(0, 1));
        }
        self.act(&Act::Publish);
        while self.used() != Seen::Nothing {}
        assert!(self.numbers.is_empty(), "a request was lost");
        assert_eq!(self.driver.in_flight(), 0);
    }
}

fn run(size: u16, bits: u64, acts: &[Act]) -> Vec<Option<Seen>> {
    let mut pair = Pair::new(size, bits);
    let seen = acts.iter().map(|act| pair.act(act)).collect();
    pair.finish();
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_formats_give_the_same_for_the_same_script(
        size in prop::sample::select(vec![1u16, 2, 4, 8, 64]),
        event_idx in any::<bool>(),
        acts in prop::collection::vec(act(), 0..300),
    ) {
        let bits = if event_idx { features::RING_EVENT_IDX } else { 0 };
        let split = run(size, bits, &acts);
        prop_assert_eq!(split, run(size, bits | features::RING_PACKED, &acts));
    }

    #[test]
    fn packed_rings_of_any_size_keep_every_request(
        size in 1..=MAX,
        event_idx in any::<bool>(),
        acts in prop::collection::vec(act(), 0..300),
    ) {
        run(size, features::RING_PACKED | if event_idx { features::RING_EVENT_IDX } else { 0 }, &acts);
    }

    #[test]
    fn a_driver_that_looks_when_it_was_interrupted_misses_nothing(
        size in prop::sample::select(vec![1u16, 2, 4, 8, 64]),
        packed in any::<bool>(),
        event_idx in any::<bool>(),
        batches in prop::collection::vec(1..9u16, 1..100),
    ) {
        let bits = [(packed, features::RING_PACKED), (event_idx, features::RING_EVENT_IDX)];
        let bits = bits.into_iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum();
        let mut pair = Pair::new(size, bits);
        let mem = pair.mem.clone();
        let view = mem.view();
        for batch in batches {
            pair.driver.want_interrupt(0).unwrap();
            for _ in 0..batch.min(size) {
                pair.add(0, 0, false);
            }
            let mut queue = pair.queue.attach(&view).unwrap();
            prop_assert!(!queue.enable_kicks().unwrap());
            prop_assert!(pair.driver.publish().unwrap(), "the device asked for a kick");
            queue.disable_kicks().unwrap();
            pair.offered.append(&mut pair.added);
            while pair.pop() != Seen::Nothing {}
            while !pair.held.is_empty() {
                pair.act(&Act::Push(0, 1));
            }
            pair.act(&Act::Publish);
            prop_assert!(pair.queue.attach(&view).unwrap().needs_interrupt().unwrap());
            while pair.used() != Seen::Nothing {}
        }
    }

    #[test]
    fn a_packed_ring_of_nonsense_ends_by_itself(
        size in 1..=MAX,
        descriptors in prop::collection::vec(
            (0..MEMORY + 0x1000, prop_oneof![0..0x100u32, any::<u32>()], any::<u16>(), any::<u16>()),
            usize::from(MAX),
        ),
        sane in any::<bool>(),
        event in any::<u32>(),
        delay in 0..4usize,
    ) {
        let mut pair = Pair::new(size, features::RING_PACKED | features::RING_EVENT_IDX);
        let view = pair.mem.view();
        for (slot, (addr, len, id, flags)) in (0..size).zip(descriptors) {
            // Of the flags most are reserved; one in two is available on the first lap.
            let flags = if sane { flags & 0x83 } else { flags };
            let desc = freestone_testkit::driver::Desc { addr, len, flags, next: id };
            pair.driver.set_desc(slot, desc).unwrap();
        }
        pair.driver.set_driver_event(event).unwrap();
        let mut queue = pair.queue.attach(&view).unwrap();
        let mut buffers = ChainBuffers::new();
        let mut held = VecDeque::new();
        let mut taken = 0;
        loop {
            match queue.pop(&mut buffers) {
                Ok(Some(chain)) => held.push_back(chain),
                _ if held.is_empty() => break,
                _ => {}
            }
            taken += 1;
            prop_assert!(taken <= 1000, "the device is led round for ever");
            if held.len() > delay || taken > 500 {
                let Some(chain) = held.pop_front() else { break };
                queue.push_used(chain, 1).unwrap();
                queue.publish().unwrap();
                queue.needs_interrupt().unwrap();
                queue.enable_kicks().unwrap();
            }
        }
    }
}
