#![expect(clippy::cast_possible_truncation, reason = "tests")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;

use super::*;
use crate::{Gso, PortInfo, PortStats};

type Packet = (VnetHeader, Vec<u8>);

/// What an endpoint of the tests has to give and has been given.
#[derive(Default)]
struct State {
    /// For the bridge.
    input: VecDeque<Packet>,
    /// From the bridge.
    output: Vec<Packet>,
    /// Frames that it takes before it is busy.
    room: usize,
    dropped: usize,
    flushes: usize,
    /// What it has to give when it is flushed after it was given something.
    answer: Option<Vec<u8>>,
    /// It says that so little will do.
    hint: Option<usize>,
}

/// An endpoint in memory.
#[derive(Clone)]
struct Memory {
    state: Arc<Mutex<State>>,
    event: Arc<OwnedFd>,
}

impl Memory {
    fn new() -> Self {
        let state = State { room: usize::MAX, ..State::default() };
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        Self { state: Arc::new(Mutex::new(state)), event: Arc::new(event) }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    fn give(&self, header: VnetHeader, bytes: &[u8]) {
        self.with(|state| state.input.push_back((header, bytes.to_vec())));
        rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
    }

    fn got(&self) -> Vec<Vec<u8>> {
        self.with(|state| state.output.iter().map(|(_, bytes)| bytes.clone()).collect())
    }
}

impl Endpoint for Memory {
    fn sources(&self) -> Vec<Source> {
        vec![self.event.clone()]
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        self.with(|state| {
            if state.room == 0 {
                return Sent::Busy;
            }
            state.room -= 1;
            let mut bytes = vec![0; frame.len()];
            frame.read_at(0, &mut bytes);
            state.output.push((*header, bytes));
            Sent::Done
        })
    }

    fn flush(&mut self) {
        self.with(|state| {
            state.flushes += 1;
            if !state.output.is_empty() {
                state.input.extend(state.answer.take().map(|bytes| (plain(), bytes)));
            }
        });
    }

    fn waiting(&mut self) -> Option<usize> {
        self.with(|state| state.hint.or(state.input.front().map(|(_, bytes)| bytes.len())))
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        self.with(|state| {
            state.hint = None;
            match state.input.front() {
                None => Received::Nothing,
                Some((_, bytes)) if bytes.len() > room.len() => Received::NeedsRoom(bytes.len()),
                Some((header, bytes)) => {
                    let (header, len) = (*header, bytes.len());
                    room.write_at(0, bytes);
                    state.input.pop_front();
                    Received::Frame(len, header)
                }
            }
        })
    }

    fn drop_next(&mut self) {
        self.with(|state| {
            state.dropped += 1;
            state.input.pop_front()
        });
    }
}

fn bridge() -> (Memory, Memory, Bridge) {
    let (a, b) = (Memory::new(), Memory::new());
    let bridge = Bridge::new(Box::new(a.clone()), Box::new(b.clone())).unwrap();
    (a, b, bridge)
}

fn plain() -> VnetHeader {
    VnetHeader::default()
}

/// A TCP segment over IPv4 of `len` bytes of data, to be cut.
fn large(len: usize) -> Packet {
    let mut bytes = vec![2; 12];
    bytes.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    bytes.extend((0..len).map(|i| i as u8));
    let header = VnetHeader {
        checksum: Some((34, 16)),
        gso: Some(Gso::Tcp4),
        gso_size: 1460,
        hdr_len: 54,
        ..VnetHeader::default()
    };
    (header, bytes)
}

#[test]
fn frames_go_both_ways_in_order() {
    let (a, b, mut bridge) = bridge();
    for i in 0..10u8 {
        a.give(plain(), &[i; 60]);
        b.give(plain(), &[100 + i; 70]);
    }
    assert!(!bridge.step());
    assert_eq!(b.got(), (0..10u8).map(|i| vec![i; 60]).collect::<Vec<_>>());
    assert_eq!(a.got(), (0..10u8).map(|i| vec![100 + i; 70]).collect::<Vec<_>>());
    assert_eq!(bridge.counts().frames, [10, 10]);
    assert_eq!(a.with(|state| state.flushes), 2, "before and after");
}

#[test]
fn a_step_is_bounded_and_says_that_there_is_more() {
    let (a, b, mut bridge) = bridge();
    for _ in 0..BUDGET + 1 {
        a.give(plain(), &[1; 60]);
    }
    assert!(bridge.step());
    assert!(b.got().len() <= BUDGET);
    assert!(!bridge.step());
    assert_eq!(b.got().len(), BUDGET + 1);
}

#[test]
fn a_frame_waits_until_the_other_side_has_room() {
    let (a, b, mut bridge) = bridge();
    b.with(|state| state.room = 2);
    for i in 0..5u8 {
        a.give(plain(), &[i; 60]);
    }
    b.give(plain(), &[9; 60]);
    assert!(!bridge.step());
    assert_eq!(b.got().len(), 2);
    assert_eq!(a.got().len(), 1, "the other direction goes on");
    assert_eq!(a.with(|state| state.input.len()), 2, "one waits in the bridge, and no more is taken");
    b.with(|state| state.room = usize::MAX);
    assert!(!bridge.step());
    assert_eq!(b.got(), (0..5u8).map(|i| vec![i; 60]).collect::<Vec<_>>());
}

#[test]
fn the_largest_frame_goes_through_and_a_larger_one_is_dropped() {
    let (a, b, mut bridge) = bridge();
    a.give(plain(), &vec![7; ROOM]);
    a.give(plain(), &vec![8; ROOM + 1]);
    a.give(plain(), &[9; 60]);
    bridge.step();
    assert_eq!(b.got(), [vec![7; ROOM], vec![9; 60]]);
    assert_eq!(a.with(|state| state.dropped), 1);
    assert_eq!(bridge.counts().dropped, [1, 0]);
}

#[test]
fn an_endpoint_that_needs_more_room_than_it_said_gets_it() {
    let (a, b, mut bridge) = bridge();
    a.give(plain(), &[7; 5000]);
    a.with(|state| state.hint = Some(100));
    bridge.step();
    assert_eq!(b.got(), [vec![7; 5000]]);
}

#[test]
fn what_the_other_side_can_do_is_left_to_it() {
    let (a, b, bridge) = bridge();
    let mut bridge = bridge.takes(Offloads::empty(), Offloads::CSUM | Offloads::TSO4);
    let (header, bytes) = large(40_000);
    a.give(header, &bytes);
    bridge.step();
    assert_eq!(b.with(|state| state.output.clone()), [(header, bytes)]);
    assert_eq!(bridge.counts().finished, [0, 0]);
}

#[test]
fn what_it_cannot_do_is_done_here_and_goes_on_after_busy() {
    let (a, b, mut bridge) = bridge();
    let (header, bytes) = large(14_600);
    a.give(header, &bytes);
    b.with(|state| state.room = 3);
    assert!(!bridge.step());
    assert_eq!(b.got().len(), 3);
    b.with(|state| state.room = usize::MAX);
    assert!(!bridge.step());
    let got = b.with(|state| state.output.clone());
    assert_eq!(got.len(), 10);
    assert!(got.iter().all(|(header, bytes)| *header == plain() && bytes.len() == 54 + 1460));
    let data: Vec<u8> = got.iter().flat_map(|(_, bytes)| bytes[54..].to_vec()).collect();
    assert_eq!(data, bytes[54..]);
    assert_eq!((bridge.counts().frames, bridge.counts().finished), ([1, 0], [1, 0]));
}

#[test]
fn a_header_that_does_not_fit_its_frame_costs_only_that_frame() {
    let (a, b, mut bridge) = bridge();
    a.give(VnetHeader { checksum: Some((60, 60)), ..plain() }, &[1; 60]);
    a.give(VnetHeader { gso: Some(Gso::Tcp4), gso_size: 0, ..plain() }, &large(9000).1);
    a.give(plain(), &[2; 60]);
    bridge.step();
    assert_eq!(b.got(), [vec![2; 60]]);
    assert_eq!(bridge.counts().dropped, [2, 0]);
}

#[test]
fn ports_are_asked_for_what_the_other_takes() {
    #[derive(Debug)]
    struct Asked(PortInfo, Option<Setup>);
    impl Port for Asked {
        fn info(&self) -> PortInfo {
            self.0
        }
        fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
            self.1 = Some(*setup);
            Ok(vec![Box::new(Memory::new())])
        }
        fn stats(&self) -> Arc<PortStats> {
            Arc::default()
        }
    }
    let all = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6;
    let mut a = Asked(PortInfo { transmit: Offloads::CSUM, receive: all, ..PortInfo::default() }, None);
    let mut b = Asked(PortInfo { transmit: all - Offloads::TSO6, receive: all, ..PortInfo::default() }, None);
    Bridge::open(&mut a, &mut b).unwrap();
    assert_eq!(a.1, Some(Setup { pairs: 1, receive: Offloads::CSUM | Offloads::TSO4 }));
    assert_eq!(b.1, Some(Setup { pairs: 1, receive: Offloads::CSUM }));
}

#[test]
fn a_thread_moves_frames_until_it_is_told_to_stop() {
    let (a, b, mut bridge) = bridge();
    let stop = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| bridge.run_until(&stop).unwrap());
        for i in 0..200u8 {
            a.give(plain(), &[i; 60]);
        }
        while b.got().len() < 200 {
            thread::yield_now();
        }
        rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
    });
    assert_eq!(bridge.counts().frames, [200, 0]);
}

#[test]
fn a_frame_that_becomes_many_takes_several_steps() {
    let (a, b, mut bridge) = bridge();
    let (mut header, bytes) = large(60_000);
    header.gso_size = 100;
    a.give(header, &bytes);
    assert!(bridge.step());
    assert_eq!(b.got().len(), BUDGET);
    assert!(bridge.step());
    assert!(!bridge.step());
    assert_eq!(b.got().len(), 600);
}

#[test]
fn what_an_endpoint_answers_when_it_is_flushed_is_not_left_behind() {
    let (a, b, mut bridge) = bridge();
    a.give(plain(), &[1; 60]);
    b.with(|state| state.answer = Some(vec![2; 60]));
    assert!(bridge.step());
    assert!(!bridge.step());
    assert_eq!(a.got(), [vec![2; 60]]);
}
