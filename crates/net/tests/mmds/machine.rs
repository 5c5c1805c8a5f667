//! A machine for these tests: smoltcp's stack with Ethernet, behind an endpoint, and a port that remembers what it was given.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::mmds::{MmdsConfig, MmdsPort, MmdsStore};
use freestone_net::{
    Endpoint, Frame, Offloads, Port, PortInfo, PortStats, Received, Result, Sent, Setup, Source, VnetHeader,
};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Address};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub const MACHINE: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
pub const SERVICE: Ipv4Address = Ipv4Address::new(169, 254, 169, 254);

/// A port that keeps what the machine sends, and gives what it is told to.
#[derive(Debug, Clone, Default)]
pub struct Inner(pub Arc<Mutex<Frames>>);

#[derive(Debug, Default)]
pub struct Frames {
    pub sent: Vec<(VnetHeader, Vec<u8>)>,
    pub give: VecDeque<Vec<u8>>,
    pub resets: u32,
}

impl Port for Inner {
    fn info(&self) -> PortInfo {
        PortInfo { max_pairs: 2, transmit: Offloads::CSUM | Offloads::TSO4, ..PortInfo::default() }
    }
    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        Ok((0..setup.pairs).map(|_| Box::new(InnerEnd(self.clone())) as Box<dyn Endpoint>).collect())
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().resets += 1;
    }
    fn stats(&self) -> Arc<PortStats> {
        Arc::default()
    }
}

struct InnerEnd(Inner);

impl Endpoint for InnerEnd {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        let mut bytes = vec![0; frame.len()];
        frame.read_at(0, &mut bytes);
        self.0.0.lock().unwrap().sent.push((*header, bytes));
        Sent::Done
    }
    fn waiting(&mut self) -> Option<usize> {
        self.0.0.lock().unwrap().give.front().map(Vec::len)
    }
    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let mut frames = self.0.0.lock().unwrap();
        match frames.give.pop_front() {
            Some(frame) if frame.len() > room.len() => {
                let len = frame.len();
                frames.give.push_front(frame);
                Received::NeedsRoom(len)
            }
            Some(frame) => Received::Frame(room.write_at(0, &frame), VnetHeader::default()),
            None => Received::Nothing,
        }
    }
    fn drop_next(&mut self) {
        self.0.0.lock().unwrap().give.pop_front();
    }
}

/// The card's side of endpoints: frames by guest memory.
pub struct Card {
    pub ends: Vec<Box<dyn Endpoint>>,
    mem: GuestMem,
    /// The endpoint that the machine sends by.
    pub by: usize,
    /// What a header of sent frames says.
    pub header: VnetHeader,
}

impl Card {
    pub fn new(port: &mut dyn Port, pairs: u16) -> Self {
        let ends = port.open(&Setup { pairs, receive: Offloads::empty() }).unwrap();
        let mem = GuestMem::anonymous(0x10_0000).unwrap();
        Self { ends, mem, by: 0, header: VnetHeader::default() }
    }

    pub fn send(&mut self, frame: &[u8]) {
        let view = self.mem.view();
        let (first, second) = frame.split_at(frame.len().min(20));
        view.write_slice(first, GuestAddress(0x1000)).unwrap();
        view.write_slice(second, GuestAddress(0x2000)).unwrap();
        let slices = [(0x1000, first.len()), (0x2000, second.len())]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        assert_eq!(self.ends[self.by].transmit(&self.header, Frame::new(&slices)), Sent::Done);
    }

    /// The next frame for the machine, by its first pair of queues.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        self.ends.iter_mut().for_each(|end| end.flush());
        let len = self.ends[0].waiting()?;
        let view = self.mem.view();
        let room = [view.get_slice(GuestAddress(0x4_0000), len).unwrap()];
        match self.ends[0].receive(Frame::new(&room)) {
            Received::Frame(len, header) => {
                assert_eq!(header, VnetHeader::default());
                let mut frame = vec![0; len];
                Frame::new(&room).read_at(0, &mut frame);
                Some(frame)
            }
            other => panic!("{other:?}"),
        }
    }
}

/// The machine's stack.
pub struct Machine {
    pub card: Card,
    pub inner: Inner,
    pub port: MmdsPort,
    interface: Interface,
    pub sockets: SocketSet<'static>,
    next_port: u16,
    now: i64,
}

impl Machine {
    pub fn new(config: MmdsConfig, store: &MmdsStore) -> Self {
        let inner = Inner::default();
        let mut port = MmdsPort::new(Box::new(inner.clone()), config, store.clone()).unwrap();
        let mut card = Card::new(&mut port, 2);
        let settings = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        let mut interface = Interface::new(settings, &mut card, Instant::ZERO);
        // Everything is on the link, as by a route to the address with no gateway.
        interface.update_ip_addrs(|ips| ips.push(IpCidr::new(IpAddress::Ipv4(MACHINE), 0)).unwrap());
        Self { card, inner, port, interface, sockets: SocketSet::new(vec![]), next_port: 40000, now: 0 }
    }

    pub fn connect(&mut self) -> SocketHandle {
        let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(buffer(8192), buffer(8192));
        self.next_port += 1;
        socket.connect(self.interface.context(), (SERVICE, 80), self.next_port).unwrap();
        self.sockets.add(socket)
    }

    pub fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Both sides do what they can.
    pub fn poll(&mut self) {
        self.now += 1000;
        let now = Instant::from_micros(self.now);
        self.interface.poll(now, &mut self.card, &mut self.sockets);
    }

    pub fn poll_often(&mut self) {
        (0..20).for_each(|_| self.poll());
    }

    /// Sends `text` and returns what came until the service said so or `enough` holds.
    pub fn talk(&mut self, handle: SocketHandle, text: &[u8], enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let (mut got, mut left) = (Vec::new(), text);
        for _ in 0..2000 {
            self.poll();
            let socket = self.socket(handle);
            if !left.is_empty() && socket.can_send() {
                left = &left[socket.send_slice(left).unwrap()..];
            }
            while let Ok(len @ 1..) = socket.recv(|data| {
                got.extend_from_slice(data);
                (data.len(), data.len())
            }) {
                let _ = len;
            }
            if enough(&got) || !socket.may_recv() && socket.state() != tcp::State::SynSent {
                break;
            }
        }
        got
    }

    /// One request on a connection of its own, that the machine closes; returns status, head and body.
    pub fn ask(&mut self, request: &str) -> (u16, String, String) {
        let handle = self.connect();
        let got = self.talk(handle, request.as_bytes(), complete);
        self.socket(handle).close();
        self.poll_often();
        self.sockets.remove(handle);
        split(&got)
    }

    pub fn get(&mut self, path: &str) -> (u16, String) {
        let (status, _, body) = self.ask(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        (status, body)
    }
}

/// Whether a whole answer is there.
pub fn complete(got: &[u8]) -> bool {
    let text = String::from_utf8_lossy(got);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let len = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
    body.len() >= len.parse().unwrap()
}

pub fn split(got: &[u8]) -> (u16, String, String) {
    let text = String::from_utf8(got.to_vec()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    (head["HTTP/1.1 ".len()..][..3].parse().unwrap(), head.to_owned(), body.to_owned())
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a mut Card);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.take()?;
        Some((Rx(frame), Tx(self)))
    }
    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(self))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        // It leaves the checksum of TCP undone, and checks what it gets.
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}
