//! Connections under attack, by a clock that the test sets.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use freestone_memory::{GuestAddress, GuestMemoryBackend};
use proptest::prelude::*;

use super::*;
use crate::nat::admission::share_of_files;
use crate::nat::context::Kind;
use crate::nat::test_context::{World, pattern};
use crate::nat::{Forward, GuestForward, GuestTarget, Protocol};

const SYN: Flags = Flags::SYN;
const ACK: Flags = Flags::ACK;

/// A segment for the machine.
#[derive(Debug, Clone, Copy)]
struct Got {
    port: u16,
    segment: Segment,
    len: u32,
}

/// A machine without a stack.
struct Guest {
    world: World,
    tcp: Tcp,
}

impl Guest {
    fn new(change: impl FnOnce(&mut NatConfig)) -> Self {
        let world = World::with(change);
        let tcp = Tcp::new(&world.config);
        Self { world, tcp }
    }

    fn send(&mut self, port: u16, (seq, ack): (u32, u32), flags: Flags, window: u16, data: &[u8]) {
        let mut bytes = [port.to_be_bytes(), 80u16.to_be_bytes()].concat();
        bytes.extend(seq.to_be_bytes());
        bytes.extend(ack.to_be_bytes());
        bytes.extend([5 << 4, flags.bits()]);
        bytes.extend(window.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(data);
        let (from, to) = ("10.0.2.15".parse().unwrap(), "192.0.2.1".parse().unwrap());
        let (world, tcp) = (&mut self.world, &mut self.tcp);
        world.framed(&bytes, |cx, frame| {
            tcp.packet(cx, from, to, &bytes[..bytes.len().min(100)], frame);
        });
    }

    /// One step of the engine. Returns when the next is due.
    fn step(&mut self) -> Option<Instant> {
        for ready in self.world.ready() {
            match ready.token.kind {
                Kind::Tcp => self.tcp.ready(&mut self.world.cx(), ready),
                _ => self.tcp.knock(ready),
            }
        }
        let next = self.tcp.timers(&mut self.world.cx());
        self.tcp.flush(&mut self.world.cx());
        next
    }

    fn parse(frame: &[u8]) -> Got {
        let (segment, len) = Segment::parse(&frame[34..]).unwrap();
        Got { port: segment.to, segment, len: u32::try_from(frame.len() - 34 - len).unwrap() }
    }

    /// All that is there for the machine.
    fn take(&mut self) -> Vec<Got> {
        let frames = self.world.frames();
        // Not those of ICMP.
        let mut got: Vec<_> =
            frames.iter().filter(|frame| frame[23] == 6).map(|frame| Self::parse(frame)).collect();
        let mem = self.world.mem.clone();
        let view = mem.view();
        while self.tcp.waiting(Offloads::empty()).is_some() {
            let slices = [view.get_slice(GuestAddress(0x1_0000), 2000).unwrap()];
            let room = Frame::new(&slices);
            if let Received::Frame(len, _) = self.tcp.receive(&mut self.world.cx(), room, Offloads::empty()) {
                let mut bytes = vec![0; len];
                room.read_at(0, &mut bytes);
                got.push(Self::parse(&bytes));
            }
        }
        got
    }

    /// Connects from `port`; returns what the machine sends next, and acknowledges.
    fn open(&mut self, port: u16) -> (u32, u32) {
        self.send(port, (1000, 0), SYN, 65535, &[]);
        self.step();
        let answer = self.take().into_iter().rfind(|got| got.port == port).unwrap().segment;
        assert!(answer.has(SYN) && answer.has(ACK));
        let numbers = (1001, answer.seq.0.wrapping_add(1));
        self.send(port, numbers, ACK, 65535, &[]);
        numbers
    }

    /// Lets time pass until there are no connections, with a machine and hosts that do nothing more. Returns how long that took.
    fn wait_for_the_end(&mut self) -> Duration {
        let start = self.world.now;
        for _ in 0..10_000 {
            let next = self.step();
            self.take();
            if self.tcp.table.len() == 0 {
                assert_eq!((self.tcp.queues.buffered, self.tcp.queues.timers.next()), (0, None));
                return self.world.now - start;
            }
            self.world.now = self.world.now.max(next.expect("nothing will ever end it"));
        }
        panic!("{:?}", self.tcp.flows(self.world.now));
    }
}

fn bytes_of(limits: &Limits) -> usize {
    limits.total_buffer + limits.tcp_flows * 4096
}

#[test]
fn a_host_that_reads_slowly_loses_nothing_after_both_sides_are_done() {
    let mut guest = Guest::new(|_| {});
    let (mut seq, mut ack) = guest.open(4000);
    let far = guest.world.dial.streams.remove(0);
    // More than the host's socket takes.
    let mut sent = Vec::new();
    for _ in 0..2000 {
        let data = pattern(sent.len(), 1400);
        guest.send(4000, (seq, ack), ACK, 65535, &data);
        guest.step();
        seq = guest.take().last().unwrap().segment.ack.0;
        sent.extend(data);
        sent.truncate(usize::try_from(seq - 1001).unwrap());
        if guest.tcp.queues.buffered > 50_000 {
            break;
        }
    }
    assert!(guest.tcp.queues.buffered > 50_000, "{}", guest.tcp.queues.buffered);
    guest.send(4000, (seq, ack), ACK | Flags::FIN, 65535, &[]);
    far.shutdown(Shutdown::Write).unwrap();
    guest.step();
    for got in guest.take() {
        ack = ack.wrapping_add(got.len + u32::from(got.segment.has(Flags::FIN)));
    }
    guest.send(4000, (seq + 1, ack), ACK, 65535, &[]);
    let mut received = Vec::new();
    let mut piece = vec![0; 20_000];
    while let Ok(n) = (&far).read(&mut piece) {
        if n == 0 {
            break;
        }
        received.extend_from_slice(&piece[..n]);
        guest.world.pass(Duration::from_secs(20));
        guest.step();
        assert_eq!(guest.tcp.table.len() == 0, guest.tcp.queues.buffered == 0);
    }
    assert!(received == sent, "{} of {}", received.len(), sent.len());
}

#[test]
fn those_whose_hosts_do_not_read_leave_the_others_room() {
    let mut guest = Guest::new(|config| config.limits.total_buffer = 40_000);
    let (mut seq, ack) = guest.open(4000);
    for _ in 0..3000 {
        guest.send(4000, (seq, ack), ACK, 65535, &[7; 1400]);
        guest.step();
        let last = guest.take().last().unwrap().segment;
        if last.ack.0 == seq {
            break;
        }
        seq = last.ack.0;
    }
    assert!((39_000..=40_000).contains(&guest.tcp.queues.buffered), "{}", guest.tcp.queues.buffered);
    let numbers = guest.open(4001);
    guest.send(4001, numbers, ACK, 65535, &[9; 1000]);
    guest.step();
    let last = guest.take().last().unwrap().segment;
    assert_eq!(last.ack.0, numbers.0 + 1000);
    assert!(last.window > 0);
    let mut bytes = [0; 2000];
    assert_eq!((&guest.world.dial.streams[1]).read(&mut bytes).unwrap(), 1000);
}

#[test]
fn programs_are_few_at_once_and_in_a_second() {
    let mut guest = Guest::new(|config| {
        config.restrict = true;
        let target = GuestTarget::Command(vec!["cat".to_owned()]);
        let server = "192.0.2.1:80".parse().unwrap();
        config.guest_forwards.push(GuestForward { protocol: Protocol::Tcp, server, target });
    });
    for port in 4000..4100 {
        guest.send(port, (1, 0), SYN, 65535, &[]);
    }
    assert_eq!((guest.tcp.table.len(), guest.world.count("limited")), (64, 36));
    for port in 4000..4064 {
        guest.send(port, (2, 0), Flags::RST, 0, &[]);
    }
    assert_eq!(guest.tcp.table.len(), 0);
    guest.send(5000, (1, 0), SYN, 65535, &[]);
    assert_eq!(guest.tcp.table.len(), 0);
    guest.world.pass(Duration::from_secs(1));
    guest.send(5000, (1, 0), SYN, 65535, &[]);
    assert_eq!(guest.tcp.table.len(), 1);
}

#[test]
fn connections_take_no_more_than_half_of_the_files_of_the_process() {
    let guest = Guest::new(|config| config.limits.tcp_flows = usize::MAX);
    assert!(guest.tcp.max_flows <= share_of_files(2));
}

#[test]
fn a_connection_ends_in_whatever_state_the_machine_leaves_it() {
    let longest = Limits::default().tcp_idle + Limits::default().tcp_handshake;
    type Leave = dyn Fn(&mut Guest);
    let states: [(&str, &Leave); 8] = [
        ("its SYN was answered", &|guest| {
            guest.send(4000, (1000, 0), SYN, 65535, &[]);
            guest.step();
        }),
        ("the host decides nothing", &|guest| {
            guest.send(4000, (1000, 0), SYN, 65535, &[]);
            // Nobody hears that it decided.
            guest.world.ready();
        }),
        ("open", &|guest| _ = guest.open(4000)),
        ("the machine acknowledges nothing", &|guest| {
            guest.open(4000);
            (&guest.world.dial.streams[0]).write_all(&[1; 5000]).unwrap();
        }),
        ("its window is closed", &|guest| {
            let numbers = guest.open(4000);
            guest.send(4000, numbers, ACK, 0, &[]);
            (&guest.world.dial.streams[0]).write_all(&[1; 5000]).unwrap();
        }),
        ("the machine is done, the host is not", &|guest| {
            let numbers = guest.open(4000);
            guest.send(4000, numbers, ACK | Flags::FIN, 65535, &[]);
        }),
        ("the host is done, the machine does not say that it knows", &|guest| {
            guest.open(4000);
            guest.world.dial.streams.clear();
        }),
        ("both are done, the machine does not say that it knows", &|guest| {
            let numbers = guest.open(4000);
            guest.send(4000, numbers, ACK | Flags::FIN, 65535, &[]);
            guest.world.dial.streams.clear();
        }),
    ];
    for (state, leave) in states {
        let mut guest = Guest::new(|_| {});
        leave(&mut guest);
        assert_eq!(guest.tcp.table.len(), 1, "{state}");
        let took = guest.wait_for_the_end();
        assert!(took <= longest, "{state}: {took:?}");
    }
}

#[test]
fn a_forward_to_a_machine_that_does_not_answer_ends() {
    let mut guest = Guest::new(|_| {});
    let forward: Forward = "tcp:127.0.0.1:0-:22".parse().unwrap();
    let addr = guest.tcp.listen(&guest.world.cx(), &forward).unwrap();
    let mut host = TcpStream::connect(addr).unwrap();
    guest.step();
    assert_eq!(guest.tcp.table.len(), 1);
    assert!(guest.wait_for_the_end() <= Limits::default().tcp_handshake);
    assert!(host.read(&mut [0]).is_err(), "it was not told");
}

#[test]
fn a_forward_at_all_addresses_of_ipv6_is_none_of_ipv4() {
    let mut guest = Guest::new(|_| {});
    let forward: Forward = "tcp:[::]:0-:22".parse().unwrap();
    let Ok(addr) = guest.tcp.listen(&guest.world.cx(), &forward) else {
        eprintln!("there is no IPv6 here");
        return;
    };
    TcpStream::connect(("127.0.0.1", addr.port())).unwrap_err();
    TcpStream::connect(("::1", addr.port())).unwrap();
}

/// What somebody does next.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// The machine sends: port, difference to the right numbers, flags, window, bytes.
    Send(u16, i16, i16, u8, u16, u16),
    /// A host writes, reads or closes.
    Write(usize, u16),
    Read(usize, u16),
    Close(usize),
    /// Time passes.
    Pass(u32),
    Step,
    Take,
}

fn act() -> impl Strategy<Value = Act> {
    let near = || prop_oneof![4 => Just(0i16), 1 => any::<i16>(), 1 => -2i16..3];
    let flags = prop_oneof![
        4 => Just(0x10u8),
        2 => Just(0x02),
        1 => Just(0x11),
        1 => Just(0x04),
        1 => any::<u8>(),
    ];
    let window = prop_oneof![Just(0u16), Just(1), Just(65535), any::<u16>()];
    let bytes = prop_oneof![Just(0u16), Just(1), 0u16..1500, Just(9000)];
    prop_oneof![
        8 => (0u16..6, near(), near(), flags, window, bytes)
            .prop_map(|(port, seq, ack, flags, window, len)| Act::Send(port, seq, ack, flags, window, len)),
        2 => (any::<usize>(), 0u16..60_000).prop_map(|(which, len)| Act::Write(which, len)),
        2 => (any::<usize>(), any::<u16>()).prop_map(|(which, len)| Act::Read(which, len)),
        1 => any::<usize>().prop_map(Act::Close),
        1 => prop_oneof![0u32..3000, Just(40_000), Just(7_300_000)].prop_map(Act::Pass),
        3 => Just(Act::Step),
        4 => Just(Act::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_all_stays_bounded_and_ends(acts in proptest::collection::vec(act(), 1..250)) {
        let mut guest = Guest::new(|config| {
            let limits = &mut config.limits;
            (limits.tcp_flows, limits.tcp_buffer, limits.total_buffer) = (4, 4096, 6000);
        });
        // What the machine sends next and acknowledges, by port.
        let mut numbers = [(1000u32, 0u32); 6];
        for act in acts {
            match act {
                Act::Send(port, seq, ack, flags, window, len) => {
                    let (right_seq, right_ack) = numbers[usize::from(port)];
                    let numbers = (
                        right_seq.wrapping_add_signed(seq.into()),
                        right_ack.wrapping_add_signed(ack.into()),
                    );
                    let data = vec![3; len.into()];
                    guest.send(port, numbers, Flags::from_bits_retain(flags), window, &data);
                }
                Act::Write(which, len) => {
                    let streams = &guest.world.dial.streams;
                    if let Some(at) = which.checked_rem(streams.len()) {
                        let _ = (&streams[at]).write(&vec![5; len.into()]);
                    }
                }
                Act::Read(which, len) => {
                    let streams = &guest.world.dial.streams;
                    if let Some(at) = which.checked_rem(streams.len()) {
                        let _ = (&streams[at]).read(&mut vec![0; len.into()]);
                    }
                }
                Act::Close(which) => {
                    let streams = &mut guest.world.dial.streams;
                    if let Some(at) = which.checked_rem(streams.len()) {
                        streams.remove(at);
                    }
                }
                Act::Pass(millis) => guest.world.pass(Duration::from_millis(millis.into())),
                Act::Step => _ = guest.step(),
                Act::Take => {
                    for got in guest.take() {
                        let more = got.len + u32::from(got.segment.has(SYN)) + u32::from(got.segment.has(Flags::FIN));
                        let next = got.segment.seq.0.wrapping_add(more);
                        numbers[usize::from(got.port)] = (got.segment.ack.0, next);
                    }
                }
            }
            let (tcp, limits) = (&guest.tcp, &guest.world.config.limits);
            prop_assert!(tcp.table.len() <= limits.tcp_flows);
            let pending: usize = tcp.table.iter().map(|flow| flow.pending.len()).sum();
            prop_assert_eq!(tcp.queues.buffered, pending);
            prop_assert!(pending <= bytes_of(limits));
            for flow in tcp.table.iter() {
                prop_assert!(flow.pending.len() <= limits.tcp_buffer);
                prop_assert!(flow.una.since(flow.nxt) <= 0 && flow.nxt.since(flow.max) <= 0, "{flow:?}");
                prop_assert!(flow.rcv_edge.since(flow.rcv_nxt) >= 0, "{flow:?}");
                prop_assert!(flow.timer.is_some(), "{flow:?}");
            }
            prop_assert!(tcp.queues.ready.len() <= tcp.table.len());
            prop_assert!(tcp.queues.touched.len() <= tcp.table.len());
        }
        guest.wait_for_the_end();
    }
}
