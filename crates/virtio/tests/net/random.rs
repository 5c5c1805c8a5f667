//! Whatever the frames and however their chains are cut, they arrive byte for byte and in order.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_testkit::driver::Buffer;
use freestone_virtio::net::feature;
use proptest::prelude::*;

use crate::support::{HEADER, MAC, Machine, Packet, RINGS, config, frame, plain};

#[derive(Debug, Clone)]
enum Act {
    /// A frame of this length, in pieces of such lengths.
    Transmit(usize, Vec<usize>),
    /// A frame of this length arrives.
    Arrive(usize),
    /// A receive buffer in pieces of such lengths.
    Post(Vec<u32>),
    /// The port takes so many frames more.
    Room(usize),
    Kick,
    Pause,
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![5 => 14..200usize, 3 => 14..3000usize, 1 => 14..65_557usize]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (length(), prop::collection::vec(0..3000usize, 0..5)).prop_map(|(len, cut)| Act::Transmit(len, cut)),
        4 => length().prop_map(Act::Arrive),
        6 => prop::collection::vec(prop_oneof![0..20u32, 0..3000u32], 1..5).prop_map(Act::Post),
        1 => (0..5usize).prop_map(Act::Room),
        4 => Just(Act::Kick),
        1 => Just(Act::Pause),
    ]
}

/// Those of the frames that arrived: none is changed, and none overtakes another.
fn assert_in_order(wanted: &[Vec<u8>], got: &[Vec<u8>]) {
    let mut rest = wanted.iter();
    for frame in got {
        assert!(rest.any(|wanted| wanted == frame), "a frame of {} bytes comes from nowhere", frame.len());
    }
}

struct Run {
    machine: Machine,
    seed: u8,
    offered: Vec<Packet>,
    arrived: Vec<Vec<u8>>,
    got: Vec<Vec<u8>>,
}

impl Run {
    fn kick(&mut self) {
        self.machine.kick(0);
        self.machine.kick(1);
        while self.machine.queues.get_mut(1).unwrap().used().unwrap().is_some() {}
        self.got.extend(self.machine.frames());
    }

    fn perform(&mut self, act: Act) {
        self.seed = self.seed.wrapping_add(1);
        let machine = &mut self.machine;
        match act {
            Act::Transmit(len, cut) => {
                let packet = plain(frame(MAC, len, self.seed));
                let chain = machine.pieces(&[&[0; HEADER][..], &packet.1].concat(), &cut);
                // A full queue takes no more.
                if machine.queues.get_mut(1).unwrap().add_chain(&chain).is_ok() {
                    self.offered.push(packet);
                }
            }
            Act::Arrive(len) => {
                let bytes = frame(MAC, len, self.seed);
                self.arrived.push(bytes.clone());
                machine.arrive(plain(bytes));
            }
            Act::Post(lengths) => {
                let room = machine.queues.first().unwrap().in_flight() < 12;
                let parts = lengths
                    .into_iter()
                    .map(|len| Buffer::writable(machine.arena.alloc(len.max(1).into(), 1).unwrap(), len));
                let parts: Vec<_> = parts.collect();
                if room {
                    machine.post_chain(0, parts);
                }
            }
            Act::Room(frames) => machine.wire().room = Some(frames),
            Act::Kick => self.kick(),
            Act::Pause => {
                machine.device.pause().unwrap();
                machine.device.resume().unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn frames_arrive_whole_and_in_order(
        ring in prop::sample::select(RINGS.to_vec()),
        merge in any::<bool>(),
        blind in any::<bool>(),
        acts in prop::collection::vec(act(), 0..80),
    ) {
        let machine = Machine::started(config(), ring | if merge { feature::MRG_RXBUF } else { 0 });
        machine.wire().blind = blind;
        let mut run = Run { machine, seed: 0, offered: Vec::new(), arrived: Vec::new(), got: Vec::new() };
        acts.into_iter().for_each(|act| run.perform(act));
        run.machine.wire().room = None;
        run.kick();
        prop_assert_eq!(&run.machine.sent(), &run.offered);
        // With buffers enough, the rest comes as well.
        for _ in 0..100 {
            while run.machine.queues.first().unwrap().in_flight() < 16 {
                run.machine.post(0, 1, 66_000);
            }
            run.kick();
        }
        let counts = run.machine.counts();
        assert_in_order(&run.arrived, &run.got);
        prop_assert_eq!(run.got.len() as u64 + counts.rx_too_large, run.arrived.len() as u64);
        prop_assert!(!run.machine.faulted());
        let queue = run.machine.queue_stats.queues().first().unwrap().snapshot();
        prop_assert_eq!(queue.requests, queue.completed);
    }
}
