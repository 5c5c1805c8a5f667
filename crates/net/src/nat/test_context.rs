//! What tests of single parts work in: a [`World`] that gives a [`Context`], and a [`FakeDial`].

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Child;
use std::time::{Duration, Instant};

use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv6Packet, Ipv4Packet, Ipv4Repr, Ipv6Packet, UdpPacket,
    UdpRepr,
};

use super::context::{Context, Link, Poll, Ready};
use super::icmp::Why;
use super::outbox::Outbox;
use super::{Dial, HostDial, NatConfig, NatStats};
use crate::{Frame, MacAddr};

/// The Ethernet address of the machine in tests.
pub(super) const GUEST: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

/// Makes sockets whose other ends the test has, and remembers for whom.
#[derive(Debug, Default)]
pub(super) struct FakeDial {
    /// What was asked for, in order.
    pub(super) udp: Vec<SocketAddr>,
    pub(super) icmp: Vec<IpAddr>,
    /// The other ends of the sockets, in order.
    pub(super) ends: Vec<UnixDatagram>,
    /// The same of TCP.
    pub(super) streams: Vec<UnixStream>,
    /// Addresses that are elsewhere in truth, on this host: real sockets are made.
    pub(super) real: HashMap<SocketAddr, SocketAddr>,
    /// Refuse all.
    pub(super) refuse: Option<io::ErrorKind>,
}

impl FakeDial {
    fn pair(&mut self) -> io::Result<OwnedFd> {
        if let Some(kind) = self.refuse {
            return Err(kind.into());
        }
        let (ours, theirs) = UnixDatagram::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        self.ends.push(theirs);
        Ok(ours.into())
    }
}

impl Dial for FakeDial {
    fn tcp(&mut self, _: SocketAddr) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        self.streams.push(theirs);
        Ok(ours.into())
    }

    fn command(&mut self, words: &[String]) -> io::Result<(OwnedFd, Child)> {
        HostDial.command(words)
    }

    fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.udp.push(to);
        let Some(to) = self.real.get(&to) else { return self.pair() };
        let socket = UdpSocket::bind(if to.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" })?;
        socket.connect(to)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }

    fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd> {
        self.icmp.push(to);
        self.pair()
    }
}

/// All that a [`Context`] borrows.
#[derive(Debug)]
pub(super) struct World {
    pub(super) now: Instant,
    pub(super) config: NatConfig,
    pub(super) link: Link,
    pub(super) dial: FakeDial,
    pub(super) poll: Poll,
    pub(super) out: Outbox,
    pub(super) stats: NatStats,
    pub(super) mem: GuestMem,
}

impl Default for World {
    fn default() -> Self {
        Self {
            now: Instant::now(),
            config: NatConfig::default(),
            link: Link { guest: GUEST, guest_v6: "fec0::15".parse().ok(), ..Link::default() },
            dial: FakeDial::default(),
            poll: Poll::new().unwrap(),
            out: Outbox::default(),
            stats: NatStats::default(),
            mem: GuestMem::anonymous(0x2_0000).unwrap(),
        }
    }
}

impl World {
    /// A world that was told so.
    pub(super) fn with(change: impl FnOnce(&mut NatConfig)) -> Self {
        let mut world = Self::default();
        change(&mut world.config);
        world
    }

    pub(super) fn cx(&mut self) -> Context<'_> {
        Context {
            now: self.now,
            config: &self.config,
            link: &mut self.link,
            dial: &mut self.dial,
            poll: &self.poll,
            out: &mut self.out,
            stats: &self.stats,
        }
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// Calls `with` with `payload` as a frame in guest memory, in two slices.
    pub(super) fn framed<R>(
        &mut self,
        payload: &[u8],
        with: impl FnOnce(&mut Context<'_>, Frame<'_, '_>) -> R,
    ) -> R {
        let mem = self.mem.clone();
        let view = mem.view();
        let (front, back) = payload.split_at(payload.len() / 3);
        let slices = [(0x1000, front), (0x8000, back)].map(|(at, part)| {
            view.write_slice(part, GuestAddress(at)).unwrap();
            view.get_slice(GuestAddress(at), part.len()).unwrap()
        });
        with(&mut self.cx(), Frame::new(&slices))
    }

    /// The frames for the machine, which are taken.
    pub(super) fn frames(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.out.pop()).map(|(frame, _)| frame).collect()
    }

    /// The only one.
    pub(super) fn frame(&mut self) -> Vec<u8> {
        let mut frames = self.frames();
        assert_eq!(frames.len(), 1, "frames");
        frames.remove(0)
    }

    /// What is ready now.
    pub(super) fn ready(&mut self) -> Vec<Ready> {
        let mut ready = Vec::new();
        self.poll.ready(&mut ready).unwrap();
        ready
    }

    /// The value of a counter.
    pub(super) fn count(&self, name: &str) -> u64 {
        self.stats.counts().named().into_iter().find(|(other, _)| *other == name).unwrap().1
    }
}

/// `len` bytes of a sequence that hardly repeats, from `start` on.
pub(super) fn pattern(start: usize, len: usize) -> Vec<u8> {
    (0..=250).cycle().skip(start % 251).take(len).collect()
}

/// An answer of the NAT, taken apart by somebody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Datagram {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) payload: Vec<u8>,
}

/// The UDP datagram in a frame for the machine, checked.
pub(super) fn datagram(frame: &[u8]) -> Datagram {
    let (from, to, protocol, payload) = packet(frame);
    assert_eq!(protocol, 17);
    let udp = UdpPacket::new_checked(payload.as_slice()).unwrap();
    let repr = UdpRepr::parse(&udp, &from.into(), &to.into(), &ChecksumCapabilities::default()).unwrap();
    Datagram {
        from: SocketAddr::new(from, repr.src_port),
        to: SocketAddr::new(to, repr.dst_port),
        payload: udp.payload().to_vec(),
    }
}

/// Addresses, protocol and payload of the IP packet in a frame for the machine, checked.
pub(super) fn packet(frame: &[u8]) -> (IpAddr, IpAddr, u8, Vec<u8>) {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(frame.payload()).unwrap();
            Ipv4Repr::parse(&ip, &ChecksumCapabilities::default()).unwrap();
            (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header().into(), ip.payload().to_vec())
        }
        _ => {
            let ip = Ipv6Packet::new_checked(frame.payload()).unwrap();
            (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header().into(), ip.payload().to_vec())
        }
    }
}

/// Why the machine is told that a packet does not arrive, by whom, and what of the packet it is shown.
pub(super) fn unreachable(frame: &[u8]) -> (Why, IpAddr, Vec<u8>) {
    let (from, to, _, message) = packet(frame);
    let why = match (from, to, message.as_slice()) {
        (IpAddr::V4(_), _, [3, code, ..]) => {
            assert!(Icmpv4Packet::new_checked(message.as_slice()).unwrap().verify_checksum());
            [(0, Why::Network), (1, Why::Host), (3, Why::Port), (13, Why::Prohibited)]
                .iter()
                .find(|of| of.0 == *code)
        }
        (IpAddr::V6(from), IpAddr::V6(to), [1, code, ..]) => {
            assert!(Icmpv6Packet::new_checked(message.as_slice()).unwrap().verify_checksum(&from, &to));
            [(0, Why::Network), (3, Why::Host), (4, Why::Port), (1, Why::Prohibited)]
                .iter()
                .find(|of| of.0 == *code)
        }
        _ => None,
    };
    (why.unwrap().1, from, message[8..].to_vec())
}
