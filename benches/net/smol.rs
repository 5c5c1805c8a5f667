//! The alternative to an engine of our own: a relay on the TCP sockets of `smoltcp`, as an [`Endpoint`].
//!
//! It does what such a relay must do and no more: a frame is copied out of guest memory, because that changes under one's hands
//! and smoltcp takes plain bytes; smoltcp copies its data to the socket's buffer; from there it goes to the host's socket.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use freestone_benches::Fallible;
use freestone_net::{Endpoint, Frame, Received, Sent, Source, VnetHeader};
use rustix::event::{Timespec, epoll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

/// Most frames for the guest that wait.
const MAX_WAITING: usize = 64;

/// Frames on their way, both ways, and empty buffers.
#[derive(Default)]
struct Queues {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
}

struct Rx<'a>(Vec<u8>, &'a mut Vec<Vec<u8>>);

impl RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        let result = work(&self.0);
        self.1.push(self.0);
        result
    }
}

struct Tx<'a>(&'a mut VecDeque<Vec<u8>>, Vec<u8>);

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(mut self, len: usize, work: F) -> R {
        self.1.resize(len, 0);
        let result = work(self.1.get_mut(..len).unwrap_or_default());
        self.0.push_back(self.1);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Rx<'a>;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx<'_>, Tx<'_>)> {
        let frame = self.rx.pop_front()?;
        let buffer = self.spare.pop().unwrap_or_default();
        Some((Rx(frame, &mut self.spare), Tx(&mut self.tx, buffer)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        let buffer = (self.tx.len() < MAX_WAITING).then(|| self.spare.pop().unwrap_or_default())?;
        Some(Tx(&mut self.tx, buffer))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut this = DeviceCapabilities::default();
        this.medium = Medium::Ethernet;
        this.max_transmission_unit = 65535;
        // Nobody computes checksums of what never leaves the machine.
        this.checksum = ChecksumCapabilities::ignored();
        this
    }
}

/// The relay.
pub struct SmolRelay {
    interface: Interface,
    sockets: SocketSet<'static>,
    queues: Queues,
    /// The connection that is relayed: the first.
    first: SocketHandle,
    target: SocketAddr,
    host: Option<TcpStream>,
    poll: Arc<OwnedFd>,
}

impl SmolRelay {
    /// A relay with so many sockets with such buffers, which listen on `port`. The first connection is relayed to `target`.
    pub fn new(port: u16, target: SocketAddr, sockets: usize, buffer: usize) -> Fallible<Self> {
        let mut queues = Queues::default();
        let mac = HardwareAddress::Ethernet(EthernetAddress([0x52, 0x55, 0x0A, 0, 2, 2]));
        let mut interface = Interface::new(Config::new(mac), &mut queues, Instant::now());
        interface.update_ip_addrs(|addrs| {
            let _ = addrs.push(IpCidr::new(IpAddress::v4(10, 0, 2, 2), 24));
        });
        let mut set = SocketSet::new(Vec::new());
        let mut first = None;
        for _ in 0..sockets {
            let ring = || tcp::SocketBuffer::new(vec![0; buffer]);
            let mut socket = tcp::Socket::new(ring(), ring());
            socket.set_ack_delay(None);
            socket.set_nagle_enabled(false);
            socket.listen(port).map_err(|error| format!("cannot listen: {error:?}"))?;
            let handle = set.add(socket);
            first.get_or_insert(handle);
        }
        let poll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let first = first.ok_or("no sockets")?;
        Ok(Self { interface, sockets: set, queues, first, target, host: None, poll })
    }

    /// Moves what can be moved between the first connection and its host socket; whether anything was.
    fn relay(&mut self) -> io::Result<bool> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.first);
        if !socket.may_send() {
            return Ok(false);
        }
        let mut host = match &self.host {
            Some(host) => host,
            None => {
                let host = TcpStream::connect(self.target)?;
                host.set_nonblocking(true)?;
                host.set_nodelay(true)?;
                let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
                epoll::add(&self.poll, host.as_fd(), epoll::EventData::new_u64(0), flags)?;
                self.host.insert(host)
            }
        };
        let mut moved = false;
        let mut step = |n: io::Result<usize>| {
            let n = n.unwrap_or(0);
            moved |= n > 0;
            (n, ())
        };
        if socket.can_recv() {
            let _ = socket.recv(|data| step(host.write(data)));
        }
        if socket.can_send() {
            let _ = socket.send(|room| step(host.read(room)));
        }
        Ok(moved)
    }
}

impl Endpoint for SmolRelay {
    fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(&self.poll) as Source]
    }

    fn transmit(&mut self, _: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        let mut buffer = self.queues.spare.pop().unwrap_or_default();
        buffer.resize(frame.len(), 0);
        frame.read_at(0, &mut buffer);
        self.queues.rx.push_back(buffer);
        Sent::Done
    }

    fn flush(&mut self) {
        let mut events = Vec::with_capacity(8);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&zero));
        loop {
            self.interface.poll(Instant::now(), &mut self.queues, &mut self.sockets);
            if !self.relay().unwrap_or(false) || self.queues.tx.len() >= MAX_WAITING {
                break;
            }
        }
    }

    fn waiting(&mut self) -> Option<usize> {
        self.queues.tx.front().map(Vec::len)
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let Some(frame) = self.queues.tx.pop_front() else { return Received::Nothing };
        let n = room.write_at(0, &frame);
        self.queues.spare.push(frame);
        Received::Frame(n, VnetHeader::default())
    }

    fn drop_next(&mut self) {
        self.queues.tx.pop_front();
    }
}
