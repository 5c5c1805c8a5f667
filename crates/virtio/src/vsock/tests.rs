//! The protocol against a model: a host side in memory, a guest that follows the rules, and one that follows none.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freestone_bus::Source;
use proptest::prelude::*;

use super::endpoint::{Endpoint, Limits};
use super::host::{HostEvent, HostSide, StreamId};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op, shutdown};
use super::ring::CREDIT;
use super::stats::VsockStats;
use super::worker::lock;
use super::{Vsock, VsockConfig, feature};
use crate::device::VirtioDevice;
use crate::state_tests::{restore, save};

const CID: u64 = 3;
const MAX_CONNECTIONS: usize = 4;
/// Nobody listens at ports from here on.
const CLOSED: u32 = 100;

/// One stream: what the device wrote, what it can read, and what the peer allows.
#[derive(Debug, Default)]
struct Stream {
    written: Vec<u8>,
    room: usize,
    to_read: VecDeque<u8>,
    ended: bool,
    write_ended: bool,
}

#[derive(Debug, Default)]
struct World {
    next: u64,
    streams: HashMap<StreamId, Stream>,
    events: Vec<HostEvent>,
}

#[derive(Debug, Clone, Default)]
struct Memory(Arc<Mutex<World>>);

impl Memory {
    fn with<R>(&self, f: impl FnOnce(&mut World) -> R) -> R {
        f(&mut self.0.lock().unwrap())
    }
}

impl HostSide for Memory {
    fn connect(&mut self, port: u32) -> io::Result<StreamId> {
        if port >= CLOSED {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.with(|world| {
            world.next += 1;
            let id = StreamId(world.next);
            world.streams.insert(id, Stream::default());
            Ok(id)
        })
    }

    fn accepted(&mut self, _stream: StreamId, _host_port: u32) -> io::Result<()> {
        Ok(())
    }

    fn read(&mut self, stream: StreamId, to: &mut [u8]) -> io::Result<usize> {
        self.with(|world| {
            let stream = world.streams.get_mut(&stream).expect("an open stream");
            let n = to.len().min(stream.to_read.len());
            if n == 0 && !stream.ended {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            to.iter_mut().zip(stream.to_read.drain(..n)).for_each(|(to, from)| *to = from);
            Ok(n)
        })
    }

    fn write(&mut self, stream: StreamId, from: &[u8]) -> io::Result<usize> {
        self.with(|world| {
            let stream = world.streams.get_mut(&stream).expect("an open stream");
            assert!(!stream.write_ended, "no data after the end of data");
            let n = from.len().min(stream.room);
            if n == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            stream.room -= n;
            stream.written.extend(&from[..n]);
            Ok(n)
        })
    }

    fn shutdown(&mut self, stream: StreamId, how: Shutdown) {
        self.with(|world| {
            let stream = world.streams.get_mut(&stream).expect("an open stream");
            stream.write_ended |= how != Shutdown::Read;
        });
    }

    fn close(&mut self, stream: StreamId) {
        assert!(self.with(|world| world.streams.remove(&stream)).is_some(), "streams are closed once");
    }

    fn poll(&mut self, events: &mut Vec<HostEvent>) -> bool {
        events.append(&mut self.with(|world| std::mem::take(&mut world.events)));
        false
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
}

fn endpoint() -> (Endpoint, Memory) {
    let memory = Memory::default();
    let limits = Limits { cid: CID, max_connections: MAX_CONNECTIONS, timeout: Duration::from_secs(1) };
    (Endpoint::new(Box::new(memory.clone()), limits, Arc::<VsockStats>::default()), memory)
}

fn header(host_port: u32, guest_port: u32, op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 1 << 16,
        ..Header::default()
    }
}

/// What is done to a connection of a guest that follows the rules.
#[derive(Debug, Clone)]
enum Step {
    GuestSends(u32),
    HostTakes(usize),
    HostSends(usize),
    GuestTakes,
    Receive(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u32..5000).prop_map(Step::GuestSends),
        (1usize..20_000).prop_map(Step::HostTakes),
        (1usize..20_000).prop_map(Step::HostSends),
        Just(Step::GuestTakes),
        (1usize..5000).prop_map(Step::Receive),
    ]
}

/// The model of one connection: two pipes, and what each side was told of the other's room.
#[derive(Debug, Default)]
struct Model {
    to_host: Vec<u8>,
    to_guest: Vec<u8>,
    got: Vec<u8>,
    sent: u32,
    room: u32,
    taken: u32,
    peer_room: u32,
    peer_taken: u32,
    next: u8,
}

impl Model {
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n)
            .map(|_| {
                self.next = self.next.wrapping_add(1);
                self.next
            })
            .collect()
    }

    fn header(&self, op: u16) -> Header {
        Header { buf_alloc: self.room, fwd_cnt: self.taken, ..header(1, 7, op) }
    }

    /// Takes all packets there are, with `room` bytes of data in each.
    fn receive(&mut self, endpoint: &mut Endpoint, room: usize) {
        while endpoint.prepare() {
            let (header, data) = endpoint.take(room).unwrap();
            (self.peer_room, self.peer_taken) = (header.buf_alloc, header.fwd_cnt);
            assert!(data.len() <= room);
            self.got.extend(data);
            let waiting = u32::try_from(self.got.len()).unwrap() - self.taken;
            assert!(waiting <= self.room, "the guest has no room for {waiting} bytes");
            assert_ne!(header.op, op::RST);
        }
    }

    fn apply(&mut self, step: &Step, endpoint: &mut Endpoint, memory: &Memory, stream: StreamId) {
        match *step {
            Step::GuestSends(n) => {
                let n = n.min(self.peer_room - (self.sent - self.peer_taken));
                let data = self.bytes(n as usize);
                self.sent += n;
                self.to_host.extend(&data);
                endpoint.receive(&Header { len: n, ..self.header(op::RW) }, &mut &*data).unwrap();
                endpoint.flush();
            }
            Step::HostTakes(n) => memory.with(|world| {
                world.streams.get_mut(&stream).unwrap().room += n;
                world.events.push(HostEvent::Ready { stream, readable: false, writable: true });
            }),
            Step::HostSends(n) => {
                let data = self.bytes(n);
                self.to_guest.extend(&data);
                memory.with(|world| {
                    world.streams.get_mut(&stream).unwrap().to_read.extend(data);
                    world.events.push(HostEvent::Ready { stream, readable: true, writable: false });
                });
            }
            Step::GuestTakes => {
                self.taken = u32::try_from(self.got.len()).unwrap();
                endpoint.receive(&self.header(op::CREDIT_UPDATE), &mut &[][..]).unwrap();
            }
            Step::Receive(room) => self.receive(endpoint, room),
        }
        endpoint.poll_host();
    }

    fn check(&self, memory: &Memory, stream: StreamId) {
        memory.with(|world| {
            let written = &world.streams[&stream].written;
            assert!(self.to_host.starts_with(written), "what the host reads is what the guest wrote");
            assert!(self.to_host.len() - written.len() <= CREDIT as usize, "the buffer is bounded");
        });
        assert!(self.to_guest.starts_with(&self.got), "what the guest reads is what the host wrote");
    }
}

/// A packet of a guest that follows no rules, or something else that happens.
#[derive(Debug, Clone)]
enum Chaos {
    Packet { header: Header, payload: usize },
    Connect(u32),
    Ready(u64),
    HungUp(u64),
    Receive(usize),
    Later(u64),
}

fn chaos() -> impl Strategy<Value = Chaos> {
    // Ports where somebody listens, where nobody does, and those of connections that the host opens.
    let host_port = prop_oneof![90u32..104, 1u32 << 30..(1 << 30) + 6];
    let packet = (host_port, 0u32..4, 0u16..9, 0u32..4, 0u32..70_000, any::<(u32, u32)>(), 0usize..70_000);
    let packet = packet.prop_map(|(host_port, guest_port, op, flags, len, (buf_alloc, fwd_cnt), payload)| {
        let header = Header { flags, len, buf_alloc, fwd_cnt, ..header(host_port, guest_port, op) };
        Chaos::Packet { header, payload }
    });
    prop_oneof![
        6 => packet,
        2 => (0u32..4).prop_map(Chaos::Connect),
        2 => (0u64..12).prop_map(Chaos::Ready),
        1 => (0u64..12).prop_map(Chaos::HungUp),
        3 => (1usize..5000).prop_map(Chaos::Receive),
        1 => (0u64..700).prop_map(Chaos::Later),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn both_pipes_carry_every_byte_in_order_and_within_the_credit(
        room in 1u32..100_000,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let (mut endpoint, memory) = endpoint();
        let mut model = Model { room, ..Model::default() };
        endpoint.receive(&model.header(op::REQUEST), &mut &[][..]).unwrap();
        model.receive(&mut endpoint, 1000);
        let stream = StreamId(1);
        for step in &steps {
            model.apply(step, &mut endpoint, &memory, stream);
            model.check(&memory, stream);
        }
        // When both sides take all they get, all arrives.
        for _ in 0..model.to_guest.len() + 2 {
            if model.got.len() == model.to_guest.len() {
                break;
            }
            model.apply(&Step::GuestTakes, &mut endpoint, &memory, stream);
            model.apply(&Step::Receive(5000), &mut endpoint, &memory, stream);
        }
        model.apply(&Step::HostTakes(1 << 20), &mut endpoint, &memory, stream);
        prop_assert_eq!(&model.got, &model.to_guest);
        let written = memory.with(|world| world.streams[&stream].written.clone());
        prop_assert_eq!(written, model.to_host);
    }

    #[test]
    fn nonsense_leaves_no_stream_behind_and_nothing_unbounded(
        all in prop::collection::vec(chaos(), 1..200),
    ) {
        let (mut endpoint, memory) = endpoint();
        let mut now = Instant::now();
        for event in all {
            match event {
                Chaos::Packet { header, payload } => {
                    if endpoint.takes_packets() {
                        endpoint.receive(&header, &mut &*vec![0; payload]).unwrap();
                        endpoint.flush();
                    }
                }
                Chaos::Connect(port) => memory.with(|world| {
                    world.next += 1;
                    let stream = StreamId(world.next);
                    world.streams.insert(stream, Stream { room: 100_000, ..Stream::default() });
                    world.events.push(HostEvent::Connect { stream, port });
                }),
                Chaos::Ready(stream) => memory.with(|world| {
                    if let Some(stream) = world.streams.get_mut(&StreamId(stream)) {
                        stream.to_read.extend([1; 100]);
                        stream.room += 10_000;
                    }
                    let stream = StreamId(stream);
                    world.events.push(HostEvent::Ready { stream, readable: true, writable: true });
                }),
                Chaos::HungUp(stream) => memory.with(|world| {
                    if let Some(stream) = world.streams.get_mut(&StreamId(stream)) {
                        stream.ended = true;
                    }
                    world.events.push(HostEvent::HungUp(StreamId(stream)));
                }),
                Chaos::Receive(room) => {
                    for _ in 0..20 {
                        if !endpoint.prepare() {
                            break;
                        }
                        let (header, data) = endpoint.take(room).unwrap();
                        prop_assert!(data.len() <= room && data.len() == header.len as usize);
                        prop_assert!(header.op == op::SHUTDOWN || header.flags == 0);
                        prop_assert!(header.flags & !shutdown::BOTH == 0);
                    }
                }
                Chaos::Later(ms) => {
                    now += Duration::from_millis(ms);
                    endpoint.begin(now);
                }
            }
            endpoint.poll_host();
            let streams = memory.with(|world| world.streams.len());
            prop_assert!(streams <= MAX_CONNECTIONS, "{} streams", streams);
        }
        endpoint.reset();
        prop_assert_eq!(memory.with(|world| world.streams.len()), 0);
        prop_assert!(!endpoint.wants_buffers() && endpoint.next_deadline().is_none());
    }
}

#[test]
fn a_restored_device_has_no_connections_and_tells_its_guest_so() {
    let (saved, host) = (vsock(u32::MAX - 1), Memory::default());
    lock(&saved.endpoint).begin(Instant::now());
    let state = save(&saved);
    assert!(state.is_empty(), "nothing of it survives");
    let mut restored = Vsock::new(host, VsockConfig::new(77)).unwrap();
    restore(&mut restored, feature::STREAM, &state).unwrap();
    assert!(lock(&restored.endpoint).transport_reset_is_due());
    let mut cid = [0; 8];
    restored.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 77, "another CID, if the machine has another");
    restored.reset();
    assert!(!lock(&restored.endpoint).transport_reset_is_due(), "the next driver has no connections");
    assert!(!lock(&saved.endpoint).transport_reset_is_due(), "what was saved goes on");
}

fn vsock(cid: u32) -> Vsock {
    Vsock::new(Memory::default(), VsockConfig::new(cid)).unwrap()
}
