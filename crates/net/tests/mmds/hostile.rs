//! A machine that means harm.

use freestone_net::mmds::{MmdsConfig, MmdsStore};
use proptest::prelude::*;
use serde_json::json;

use super::machine::{MAC, MACHINE, Machine, SERVICE};

/// A TCP segment.
#[derive(Debug, Clone, Default)]
pub struct Segment {
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    pub options: Vec<u8>,
    pub data: Vec<u8>,
}

/// The frame with a segment from the machine's `from` to the service's `to`. Checksums of TCP are left undone.
pub fn segment(from: u16, to: u16, segment: Segment) -> Vec<u8> {
    let Segment { seq, ack, flags, window, mut options, data } = segment;
    options.resize(options.len().next_multiple_of(4), 0);
    let len = u16::try_from(40 + options.len() + data.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(len.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
    ip.extend(MACHINE.octets());
    ip.extend(SERVICE.octets());
    let sum = !smoltcp_checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [[2; 6], MAC].concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(from.to_be_bytes());
    frame.extend(to.to_be_bytes());
    frame.extend(seq.to_be_bytes());
    frame.extend(ack.to_be_bytes());
    frame.push(u8::try_from((20 + options.len()) / 4 * 16).unwrap());
    frame.push(flags);
    frame.extend(window.to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(options);
    frame.extend(data);
    frame
}

fn smoltcp_checksum(data: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in data.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn machine() -> Machine {
    let store = MmdsStore::default();
    store.put(json!({"a": "b", "long": "x".repeat(40_000)})).unwrap();
    Machine::new(MmdsConfig::new(), &store)
}

/// A step of a conversation that goes wrong.
#[derive(Debug, Clone)]
enum Step {
    /// A segment near what the service expects: differences to it.
    Near { port: u16, seq: i32, ack: i32, segment: Segment },
    /// Bytes of the last frame are changed and it is sent again.
    Mutated(Vec<(usize, u8)>),
    /// The machine takes so many frames.
    Take(usize),
}

fn a_segment() -> impl Strategy<Value = Segment> {
    let flags =
        prop_oneof![Just(0x02), Just(0x10), Just(0x18), Just(0x11), Just(0x04), Just(0x14), any::<u8>()];
    let options = prop_oneof![
        Just(vec![]),
        (0u16..2000).prop_map(|mss| [&[2, 4][..], &mss.to_be_bytes()].concat()),
        (0u8..20).prop_map(|shift| vec![2, 4, 5, 0xB4, 3, 3, shift, 1, 4, 2, 1, 1]),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    let data = prop_oneof![
        Just(b"GET /long HTTP/1.1\r\n\r\n".to_vec()),
        Just(vec![]),
        prop::collection::vec(any::<u8>(), 0..3000),
    ];
    let window = prop_oneof![Just(0u16), Just(1), any::<u16>()];
    (flags, window, options, data).prop_map(|(flags, window, options, data)| Segment {
        flags,
        window,
        options,
        data,
        ..Segment::default()
    })
}

fn a_step() -> impl Strategy<Value = Step> {
    let near = || prop_oneof![4 => Just(0), 2 => -3..3i32, 1 => -70_000..70_000i32, 1 => any::<i32>()];
    prop_oneof![
        6 => (1u16..5, near(), near(), a_segment())
            .prop_map(|(port, seq, ack, segment)| Step::Near { port, seq, ack, segment }),
        1 => prop::collection::vec((0usize..80, any::<u8>()), 1..4).prop_map(Step::Mutated),
        2 => (0usize..100).prop_map(Step::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("FREESTONE_MMDS_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(256)
    ))]

    /// Whatever the machine sends, the service does not fall over, holds few frames, and answers who asks next.
    #[test]
    fn nothing_that_is_sent_ends_the_service(steps in prop::collection::vec(a_step(), 1..120)) {
        let mut machine = machine();
        // What the service expects next and has sent, by port of the machine.
        let mut expects = [(0u32, 0u32); 8];
        let mut last = segment(1, 80, Segment { flags: 2, ..Segment::default() });
        let note = |frame: &[u8], expects: &mut [(u32, u32); 8]| {
            if frame.len() >= 54 && frame[23] == 6 {
                let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
                let port = usize::from(u16::from_be_bytes([frame[36], frame[37]]) % 8);
                let head = 34 + usize::from(frame[46] >> 4) * 4;
                let len = u32::try_from(frame.len() - head).unwrap() + u32::from(frame[47] & 3 != 0);
                expects[port] = (word(42), word(38).wrapping_add(len));
            }
        };
        for step in steps {
            match step {
                Step::Near { port, seq, ack, segment: mut made } => {
                    let (next, sent) = expects[usize::from(port)];
                    made.seq = next.wrapping_add_signed(seq);
                    made.ack = sent.wrapping_add_signed(ack);
                    last = segment(port, 80, made);
                    machine.card.send(&last);
                }
                Step::Mutated(changes) => {
                    for (at, value) in changes {
                        if let Some(byte) = last.get_mut(at) {
                            *byte = value;
                        }
                    }
                    machine.card.send(&last);
                }
                Step::Take(count) => {
                    for _ in 0..count {
                        let Some(frame) = machine.card.take() else { break };
                        note(&frame, &mut expects);
                    }
                }
            }
        }
        let mut waiting = 0;
        while let Some(frame) = machine.card.take() {
            prop_assert!(frame.len() <= 1514);
            waiting += 1;
            prop_assert!(waiting < 4000);
        }
        prop_assert_eq!(machine.get("/a"), (200, "b".to_owned()));
    }
}

#[test]
fn a_machine_that_takes_nothing_makes_little_wait() {
    let mut machine = machine();
    for port in 1..2000 {
        machine.card.send(&segment(port, 80, Segment { flags: 2, window: 1000, ..Segment::default() }));
    }
    let counts = machine.port.store().counts();
    assert!(counts.rx_dropped > 1800, "{counts:?}");
    let mut frames = 0;
    while machine.card.take().is_some() {
        frames += 1;
    }
    assert!(frames < 200, "{frames}");
}
