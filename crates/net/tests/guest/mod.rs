//! A machine for tests: smoltcp's stack, which we did not write, behind an endpoint, by frames in guest memory.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::nat::{Nat, NatHandle};
use freestone_net::{Endpoint, Frame, Offloads, Port, Received, Sent, Setup, Source, VnetHeader};
use rustix::event::epoll;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{EthernetAddress, IpCidr};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Where frames lie in guest memory: not in one piece.
const PIECES: [(u64, usize); 4] = [(0x1000, 100), (0x2_0000, 1400), (0x4_0000, 30_000), (0x6_0000, 36_000)];

/// The link: an endpoint and memory for frames.
pub struct Link {
    pub endpoint: Box<dyn Endpoint>,
    /// Watches the source as a worker does: for edges.
    watch: OwnedFd,
    _source: Source,
    mem: GuestMem,
    pub receive: Offloads,
    /// One of so many frames is lost, either way.
    pub loss: Option<u64>,
    random: u64,
    /// Frames that the machine got: their lengths and what was left to do.
    pub got: Vec<(usize, VnetHeader)>,
    /// The machine has no room for frames.
    pub deaf: bool,
    moved: bool,
}

impl Link {
    pub fn new(port: &mut dyn Port, receive: Offloads) -> Self {
        let endpoint = port.open(&Setup { pairs: 1, receive }).unwrap().pop().unwrap();
        let source = endpoint.sources().pop().unwrap();
        let watch = watch(&source);
        let mem = GuestMem::anonymous(0x10_0000).unwrap();
        let (got, random) = (Vec::new(), 0x1234_5678_9ABC_DEF1);
        Self { endpoint, watch, _source: source, mem, receive, loss: None, random, got, deaf: false, moved: false }
    }

    /// Takes the card out.
    pub fn close(&mut self) {
        self.endpoint = Box::new(Nothing);
    }

    fn lost(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.loss.is_some_and(|one_of| self.random % one_of == 0)
    }

    /// The machine sends a frame.
    pub fn send(&mut self, header: &VnetHeader, frame: &[u8]) {
        self.moved = true;
        let view = self.mem.view();
        let mut left = frame;
        let mut slices = Vec::new();
        for (at, room) in PIECES {
            let (now, rest) = left.split_at(left.len().min(room));
            view.write_slice(now, GuestAddress(at)).unwrap();
            slices.push(view.get_slice(GuestAddress(at), now.len()).unwrap());
            left = rest;
        }
        self.endpoint.transmit(header, Frame::new(&slices));
    }

    /// The machine gets a frame.
    pub fn take(&mut self) -> Option<(Vec<u8>, VnetHeader)> {
        if self.deaf {
            return None;
        }
        self.endpoint.waiting()?;
        let view = self.mem.view();
        let slices = PIECES.map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        match self.endpoint.receive(Frame::new(&slices)) {
            Received::Nothing => None,
            Received::NeedsRoom(len) => unreachable!("{len} bytes"),
            Received::Frame(len, header) => {
                self.moved = true;
                self.got.push((len, header));
                let mut frame = vec![0; len];
                assert_eq!(Frame::new(&slices).read_at(0, &mut frame), len);
                Some((frame, header))
            }
        }
    }

    /// Waits until the source says that it is worth asking, or some time passed. Returns which.
    pub fn wait(&self, time: Duration) -> bool {
        let time = rustix::event::Timespec::try_from(time).unwrap();
        let mut events = Vec::with_capacity(1);
        epoll::wait(&self.watch, rustix::buffer::spare_capacity(&mut events), Some(&time)).unwrap();
        !events.is_empty()
    }
}

fn watch(source: &Source) -> OwnedFd {
    let watch = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let fd = source.as_raw_fd();
    #[expect(unsafe_code, reason = "a raw descriptor is all that a source tells")]
    // SAFETY: the source, which keeps its descriptor open, is borrowed until after the last use.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&watch, fd, epoll::EventData::new_u64(0), flags).unwrap();
    watch
}

/// No endpoint.
struct Nothing;

impl Endpoint for Nothing {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn transmit(&mut self, _: &VnetHeader, _: Frame<'_, '_>) -> Sent {
        Sent::Done
    }
    fn waiting(&mut self) -> Option<usize> {
        None
    }
    fn receive(&mut self, _: Frame<'_, '_>) -> Received {
        Received::Nothing
    }
    fn drop_next(&mut self) {}
}

pub struct Rx(Vec<u8>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct Tx<'a>(&'a mut Link);

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        if !self.0.lost() {
            self.0.send(&VnetHeader::default(), &frame);
        }
        result
    }
}

impl Device for Link {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Rx, Tx<'_>)> {
        loop {
            let (frame, _) = self.take()?;
            if !self.lost() {
                return Some((Rx(frame), Tx(self)));
            }
        }
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Tx<'_>> {
        Some(Tx(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        if self.receive.contains(Offloads::CSUM) {
            capabilities.checksum.tcp = Checksum::Tx;
        }
        capabilities
    }
}

/// A machine with its NAT.
pub struct Guest {
    pub link: Link,
    pub nat: Nat,
    pub handle: NatHandle,
    iface: Interface,
    pub sockets: SocketSet<'static>,
    next_port: u16,
    pub buffer: usize,
}

pub const DEADLINE: Duration = Duration::from_secs(60);

impl Guest {
    pub fn new(mut nat: Nat, receive: Offloads) -> Self {
        let mut link = Link::new(&mut nat, receive);
        let now = smoltcp::time::Instant::now();
        let mut iface = Interface::new(Config::new(EthernetAddress(MAC).into()), &mut link, now);
        iface.update_ip_addrs(|addrs| {
            addrs.push("10.0.2.15/24".parse::<IpCidr>().unwrap()).unwrap();
            addrs.push("fec0::15/64".parse::<IpCidr>().unwrap()).unwrap();
        });
        iface.routes_mut().add_default_ipv4_route("10.0.2.2".parse().unwrap()).unwrap();
        iface.routes_mut().add_default_ipv6_route("fec0::2".parse().unwrap()).unwrap();
        let handle = nat.handle();
        let sockets = SocketSet::new(Vec::new());
        Self { link, nat, handle, iface, sockets, next_port: 50000, buffer: 128 << 10 }
    }

    /// The card is taken out and put in again.
    pub fn reopen(&mut self) {
        self.link.close();
        let receive = self.link.receive;
        self.link = Link::new(&mut self.nat, receive);
    }

    /// One round: everybody does what can be done. Waits a moment if nothing happened.
    pub fn step(&mut self) {
        self.link.moved = false;
        self.link.endpoint.flush();
        let now = smoltcp::time::Instant::now();
        let result = self.iface.poll(now, &mut self.link, &mut self.sockets);
        self.link.endpoint.flush();
        if !self.link.moved && result == PollResult::None {
            self.link.wait(Duration::from_millis(2));
        }
    }

    /// Goes on until `done`.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = done(self) {
                return value;
            }
            assert!(start.elapsed() < DEADLINE, "never: {what}; {:?}", self.handle.counts());
            self.step();
        }
    }

    fn new_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; self.buffer]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        self.sockets.add(socket)
    }

    /// The machine begins to connect.
    pub fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        let socket = self.new_socket();
        let from = self.next_port;
        self.next_port = if from == u16::MAX { 50000 } else { from + 1 };
        let context = self.iface.context();
        self.sockets.get_mut::<tcp::Socket<'_>>(socket).connect(context, to, from).unwrap();
        socket
    }

    /// The machine connects.
    pub fn connected(&mut self, to: SocketAddr) -> SocketHandle {
        let socket = self.connect(to);
        self.until("connected", |guest| guest.socket(socket).may_send().then_some(()));
        socket
    }

    /// The machine listens.
    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let socket = self.new_socket();
        self.socket(socket).listen(port).unwrap();
        socket
    }

    pub fn socket(&mut self, socket: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(socket)
    }

    /// Sends all of `data` and reads `want` bytes meanwhile.
    pub fn exchange(&mut self, socket: SocketHandle, data: &[u8], want: usize) -> Vec<u8> {
        let (mut sent, mut got) = (0, Vec::new());
        self.until("exchanged", |guest| {
            let socket = guest.socket(socket);
            if sent < data.len() && socket.can_send() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), got.extend_from_slice(bytes))).unwrap();
            }
            (sent == data.len() && socket.send_queue() == 0 && got.len() >= want).then_some(())
        });
        got
    }
}

/// The address by which the machine reaches `addr` of the host's loopback.
pub fn by_gateway(addr: SocketAddr) -> SocketAddr {
    let gateway: IpAddr = if addr.is_ipv4() { "10.0.2.2" } else { "fec0::2" }.parse().unwrap();
    SocketAddr::new(gateway, addr.port())
}

/// Bytes that are not alike.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
