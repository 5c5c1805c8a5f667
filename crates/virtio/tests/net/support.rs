//! A port in memory, and a machine with a driver that knows virtio-net.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use freestone_bus::{Device, EFD_NONBLOCK, EventFd};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_net::{
    Endpoint, Frame, MacAddr, Offloads, Port, PortInfo, PortStats, Received, Result, Sent, Setup, Source,
    VnetHeader,
};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::net::{NetConfig, NetHandle, feature};
use freestone_virtio::{DeviceStats, Net, NetCounts, VirtioMmioPlug, features};

pub const MEMORY: u64 = 64 << 20;
pub const HEADER: usize = 12;
pub const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// Both ring formats, with event indices and without.
pub const RINGS: [u64; 4] = [
    0,
    features::RING_EVENT_IDX,
    features::RING_PACKED,
    features::RING_PACKED | features::RING_EVENT_IDX | features::RING_INDIRECT_DESC,
];

pub type Packet = (VnetHeader, Vec<u8>);

/// What is on the other side of a [`TestPort`].
#[derive(Debug, Default)]
pub struct Wire {
    /// Frames from the machine, by endpoint.
    pub sent: Vec<Vec<Packet>>,
    /// Frames for the machine, by endpoint.
    pub inbox: Vec<VecDeque<Packet>>,
    /// Frames for the machine that were dropped.
    pub dropped: usize,
    /// So many more frames are taken from the machine, if there is a limit.
    pub room: Option<usize>,
    /// Endpoints do not know how long a frame is before they have room.
    pub blind: bool,
    /// Each frame from the machine comes back when the endpoint is flushed.
    pub echo: bool,
    /// The port refuses what the driver asks for.
    pub refuses: bool,
    pub setups: Vec<Setup>,
    pub open: usize,
    pub receive: Vec<Offloads>,
    pub active: Vec<u16>,
    pub resets: usize,
    pub flushes: usize,
    echoes: Vec<(usize, Packet)>,
}

pub type SharedWire = Arc<Mutex<Wire>>;

#[derive(Debug)]
pub struct TestPort {
    wire: SharedWire,
    pub info: PortInfo,
    stats: Arc<PortStats>,
    event: Arc<EventFd>,
}

impl TestPort {
    pub fn new() -> Self {
        let info = PortInfo {
            max_pairs: 4,
            transmit: Offloads::all(),
            receive: Offloads::all(),
            mtu: None,
            mac: Some(MAC),
        };
        Self {
            wire: SharedWire::default(),
            info,
            stats: Arc::default(),
            event: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    pub fn wire(&self) -> SharedWire {
        Arc::clone(&self.wire)
    }
}

impl Port for TestPort {
    fn info(&self) -> PortInfo {
        self.info
    }

    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        let mut wire = self.wire.lock().unwrap();
        assert_eq!(wire.open, 0, "all endpoints were dropped before");
        assert!(self.info.receive.contains(setup.receive) && setup.pairs <= self.info.max_pairs);
        wire.setups.push(*setup);
        let pairs = usize::from(setup.pairs);
        wire.open = pairs;
        let most = pairs.max(wire.inbox.len());
        wire.inbox.resize_with(most, VecDeque::new);
        wire.sent.resize_with(most, Vec::new);
        let endpoint = |index| TestEndpoint { wire: self.wire(), index, event: Arc::clone(&self.event) };
        Ok((0..pairs).map(|index| Box::new(endpoint(index)) as Box<dyn Endpoint>).collect())
    }

    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        let mut wire = self.wire.lock().unwrap();
        if wire.refuses {
            return Err(MacAddr::from_str_error());
        }
        wire.receive.push(receive);
        Ok(())
    }

    fn set_active_pairs(&mut self, pairs: u16) -> Result<()> {
        let mut wire = self.wire.lock().unwrap();
        if wire.refuses {
            return Err(MacAddr::from_str_error());
        }
        wire.active.push(pairs);
        Ok(())
    }

    fn reset(&mut self) {
        self.wire.lock().unwrap().resets += 1;
    }

    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.stats)
    }
}

/// An error, whatever it says.
trait SomeError {
    fn from_str_error() -> freestone_net::Error;
}

impl SomeError for MacAddr {
    fn from_str_error() -> freestone_net::Error {
        "refused".parse::<MacAddr>().unwrap_err()
    }
}

struct TestEndpoint {
    wire: SharedWire,
    index: usize,
    event: Arc<EventFd>,
}

impl Drop for TestEndpoint {
    fn drop(&mut self) {
        self.wire.lock().unwrap().open -= 1;
    }
}

impl Endpoint for TestEndpoint {
    fn sources(&self) -> Vec<Source> {
        vec![self.event.clone()]
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        let mut wire = self.wire.lock().unwrap();
        match &mut wire.room {
            Some(0) => return Sent::Busy,
            Some(room) => *room -= 1,
            None => {}
        }
        let mut bytes = vec![0; frame.len()];
        assert_eq!(frame.read_at(0, &mut bytes), bytes.len());
        if wire.echo {
            wire.echoes.push((self.index, (*header, bytes.clone())));
        }
        wire.sent[self.index].push((*header, bytes));
        Sent::Done
    }

    fn flush(&mut self) {
        let mut wire = self.wire.lock().unwrap();
        wire.flushes += 1;
        for (index, packet) in std::mem::take(&mut wire.echoes) {
            wire.inbox[index].push_back(packet);
        }
    }

    fn waiting(&mut self) -> Option<usize> {
        let wire = self.wire.lock().unwrap();
        if wire.blind { Some(65_550) } else { wire.inbox[self.index].front().map(|(_, bytes)| bytes.len()) }
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let mut wire = self.wire.lock().unwrap();
        let inbox = &mut wire.inbox[self.index];
        let Some((header, bytes)) = inbox.front() else { return Received::Nothing };
        if room.len() < bytes.len() {
            return Received::NeedsRoom(bytes.len());
        }
        assert_eq!(room.write_at(0, bytes), bytes.len());
        let received = Received::Frame(bytes.len(), *header);
        inbox.pop_front();
        received
    }

    fn drop_next(&mut self) {
        let mut wire = self.wire.lock().unwrap();
        wire.inbox[self.index].pop_front().unwrap();
        wire.dropped += 1;
    }
}

/// A frame of `len` bytes to `to`, with content that depends on `seed`.
pub fn frame(to: MacAddr, len: usize, seed: u8) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap() ^ seed).collect();
    for (byte, value) in bytes.iter_mut().zip(to.0.into_iter().chain([2, 0, 0, 0, 0, 1, 0x08, 0x00])) {
        *byte = value;
    }
    bytes
}

pub fn plain(bytes: Vec<u8>) -> Packet {
    (VnetHeader::default(), bytes)
}

/// What came back of a receive queue: header, number of buffers, frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Got {
    pub header: [u8; 10],
    pub buffers: u16,
    pub frame: Vec<u8>,
}

pub struct Machine {
    pub wiring: TestWiring,
    pub device: Box<dyn Device>,
    pub driver: MmioDriver,
    pub mem: GuestMem,
    pub arena: Arena,
    pub queues: Vec<DriverQueue>,
    pub handle: NetHandle,
    pub queue_stats: DeviceStats,
    pub wire: SharedWire,
    pub features: u64,
    /// Receive buffers that the device has: by queue and head.
    posted: BTreeMap<(usize, u16), Vec<Buffer>>,
}

pub fn config() -> NetConfig {
    NetConfig::new().poll(Duration::ZERO).queue_size(64)
}

impl Machine {
    pub fn new(port: TestPort, config: NetConfig) -> Self {
        let wire = port.wire();
        Self::plugged(port, wire, config)
    }

    /// With its card in any port; `wire` is only there for those of tests.
    pub fn plugged(port: impl Port + 'static, wire: SharedWire, config: NetConfig) -> Self {
        let mem = GuestMem::anonymous(MEMORY).unwrap();
        let mut wiring = TestWiring::new(mem.clone());
        let net = Net::new(port, config).unwrap();
        let handle = net.handle();
        let plug = VirtioMmioPlug::new(net, "net");
        let queue_stats = plug.stats();
        let device = wiring.plug(plug).unwrap();
        let driver = MmioDriver::new(wiring.mmio_device(0).unwrap());
        let (arena, posted) = (Arena::new(0x1_0000, MEMORY), BTreeMap::new());
        let queues = Vec::new();
        Self { wiring, device, driver, mem, arena, queues, handle, queue_stats, wire, features: 0, posted }
    }

    pub fn started(config: NetConfig, wanted: u64) -> Self {
        let mut machine = Self::new(TestPort::new(), config);
        machine.start(wanted);
        machine
    }

    /// With queues of `size`, and all that `wanted` names.
    pub fn sized(size: u16, wanted: u64) -> Self {
        Self::started(config().queue_size(size), wanted)
    }

    pub fn start(&mut self, wanted: u64) {
        self.features = self.driver.negotiate(wanted).unwrap();
        self.arena = Arena::new(0x1_0000, MEMORY);
        self.posted.clear();
        let count = self.driver.queue_count().unwrap();
        self.queues = (0..count)
            .map(|index| self.driver.setup_queue(&self.mem, &mut self.arena, index, 64).unwrap())
            .collect();
        self.driver.driver_ok().unwrap();
    }

    pub fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap()
    }

    pub fn counts(&self) -> NetCounts {
        self.handle.stats().counts()
    }

    pub fn faulted(&self) -> bool {
        self.driver.status().unwrap() & 64 != 0
    }

    pub fn run(&self) {
        assert!(self.wiring.run_work(1000) < 1000, "the device does not come to rest");
    }

    pub fn kick(&mut self, queue: usize) {
        self.queues[queue].publish().unwrap();
        self.driver.kick(u16::try_from(queue).unwrap()).unwrap();
        self.run();
    }

    /// Memory with `bytes` in pieces of such lengths, the last of which is as long as it takes.
    pub fn pieces(&mut self, bytes: &[u8], lengths: &[usize]) -> Vec<Buffer> {
        let mut rest = bytes;
        let mut buffers = Vec::new();
        for &len in lengths.iter().chain([&usize::MAX]) {
            let (piece, tail) = rest.split_at(len.min(rest.len()));
            rest = tail;
            let gpa = self.arena.alloc(piece.len().max(1) as u64, 1).unwrap();
            self.mem.view().write_slice(piece, GuestAddress(gpa)).unwrap();
            buffers.push(Buffer::readable(gpa, u32::try_from(piece.len()).unwrap()));
            if rest.is_empty() {
                break;
            }
        }
        buffers
    }

    /// Offers a frame with any header to transmit queue `queue`, in one piece.
    pub fn offer_raw(&mut self, queue: usize, header: &[u8], frame: &[u8]) -> u16 {
        let buffers = self.pieces(&[header, frame].concat(), &[]);
        self.queues[queue].add_chain(&buffers).unwrap()
    }

    pub fn offer(&mut self, queue: usize, (header, frame): &Packet) -> u16 {
        self.offer_raw(queue, &[&header.to_bytes()[..], &[0, 0]].concat(), frame)
    }

    /// Transmits one frame on the first pair, and frees its descriptors.
    pub fn send(&mut self, packet: &Packet) {
        self.offer(1, packet);
        self.kick(1);
        while self.queues[1].used().unwrap().is_some() {}
    }

    /// The frames that the port got on its first endpoint since this was asked last.
    pub fn sent(&self) -> Vec<Packet> {
        std::mem::take(&mut self.wire().sent[0])
    }

    /// Gives the device `count` receive buffers of `len` bytes on pair `pair`, and does not say so yet.
    pub fn post(&mut self, pair: usize, count: usize, len: u32) {
        for _ in 0..count {
            let gpa = self.arena.alloc(len.max(1).into(), 16).unwrap();
            self.post_chain(pair, vec![Buffer::writable(gpa, len)]);
        }
    }

    pub fn post_chain(&mut self, pair: usize, buffers: Vec<Buffer>) {
        let head = self.queues[2 * pair].add_chain(&buffers).unwrap();
        self.posted.insert((2 * pair, head), buffers);
    }

    /// Gives the first pair buffers.
    pub fn fill(&mut self, count: usize, len: u32) {
        self.post(0, count, len);
        self.kick(0);
    }

    /// A frame comes for the machine.
    pub fn arrive(&self, packet: Packet) {
        self.arrive_at(0, packet);
    }

    pub fn arrive_at(&self, pair: usize, packet: Packet) {
        self.wire().inbox[pair].push_back(packet);
        self.run();
    }

    fn next_used(&mut self, pair: usize) -> Option<Vec<u8>> {
        let used = self.queues[2 * pair].used().unwrap()?;
        let buffers = self.posted.remove(&(2 * pair, used.head)).unwrap();
        let mut bytes = Vec::new();
        for buffer in buffers {
            let mut part = vec![0; (used.len as usize - bytes.len()).min(buffer.len as usize)];
            self.mem.view().read_slice(&mut part, GuestAddress(buffer.gpa)).unwrap();
            bytes.extend(part);
        }
        assert_eq!(bytes.len(), used.len as usize, "no more is said to be written than there is room for");
        Some(bytes)
    }

    /// The frames that the driver finds in the receive queue of `pair`.
    pub fn received_at(&mut self, pair: usize) -> Vec<Got> {
        let mut all = Vec::new();
        while let Some(first) = self.next_used(pair) {
            if first.is_empty() {
                continue;
            }
            let header: [u8; 10] = first[..10].try_into().unwrap();
            let buffers = u16::from_le_bytes([first[10], first[11]]);
            let mut frame = first[HEADER..].to_vec();
            for _ in 1..buffers {
                frame.extend(self.next_used(pair).unwrap());
            }
            all.push(Got { header, buffers, frame });
        }
        all
    }

    pub fn received(&mut self) -> Vec<Got> {
        self.received_at(0)
    }

    /// The frames alone.
    pub fn frames(&mut self) -> Vec<Vec<u8>> {
        self.received().into_iter().map(|got| got.frame).collect()
    }

    /// Number of the control queue.
    pub fn control_queue(&self) -> usize {
        if self.features & feature::MQ != 0 { self.queues.len() - 1 } else { 2 }
    }

    /// Carries out a command; whether it was not refused.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        let mut chain = self.pieces(&[&[class, command], data].concat(), &[2]);
        let ack = self.arena.alloc(1, 1).unwrap();
        self.mem.view().write_obj(0xffu8, GuestAddress(ack)).unwrap();
        chain.push(Buffer::writable(ack, 1));
        let queue = self.control_queue();
        self.queues[queue].add_chain(&chain).unwrap();
        self.kick(queue);
        assert_eq!(self.queues[queue].used().unwrap().unwrap().len, 1);
        match self.mem.view().read_obj::<u8>(GuestAddress(ack)).unwrap() {
            0 => true,
            1 => false,
            other => unreachable!("the answer is {other}"),
        }
    }

    /// The configuration space.
    pub fn space(&self) -> [u8; 17] {
        let mut bytes = [0; 17];
        self.driver.read_config(0, &mut bytes).unwrap();
        bytes
    }
}
