//! What the parts of a NAT work with: [`Context`], and the [`Poll`] with its [`Token`]s.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll;

use super::outbox::Outbox;
use super::{Dial, NatConfig, NatStats};
use crate::MacAddr;

/// What every part is given for each thing it does.
#[derive(Debug)]
pub(super) struct Context<'a> {
    /// The time of this step.
    pub(super) now: Instant,
    /// As the NAT was told.
    pub(super) config: &'a NatConfig,
    /// Who is who on the link.
    pub(super) link: &'a mut Link,
    /// Makes sockets.
    pub(super) dial: &'a mut dyn Dial,
    /// Watches them.
    pub(super) poll: &'a Poll,
    /// Frames for the machine.
    pub(super) out: &'a mut Outbox,
    /// Counts.
    pub(super) stats: &'a NatStats,
}

/// Who is who on the link between the machine and its NAT.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    /// The gateway, and all others that the machine sees: 52:55:0a:00:02:02, as QEMU's.
    pub(super) gateway: MacAddr,
    /// The machine, from the last frame that it sent; everybody until then.
    pub(super) guest: MacAddr,
    /// The IPv6 address that the machine used last for more than the link, for connections to it; `None` until it did.
    pub(super) guest_v6: Option<Ipv6Addr>,
}

impl Default for Link {
    fn default() -> Self {
        Self { gateway: MacAddr([0x52, 0x55, 0x0A, 0, 2, 2]), guest: MacAddr::BROADCAST, guest_v6: None }
    }
}

impl Context<'_> {
    /// Where a packet of the machine to `to` goes in truth: the gateway is the host's loopback, and IPv4 in IPv6 is IPv4. `None`
    /// for what is no address of a single host beyond the NAT: the NAT's own network, several hosts, unspecified, loopback.
    pub(super) fn true_destination(&self, to: IpAddr) -> Option<IpAddr> {
        if self.config.ipv4.is_some_and(|net| to == IpAddr::V4(net.gateway)) {
            return Some(Ipv4Addr::LOCALHOST.into());
        }
        if self.config.ipv6.is_some_and(|net| to == IpAddr::V6(net.gateway)) {
            return Some(Ipv6Addr::LOCALHOST.into());
        }
        match to.to_canonical() {
            IpAddr::V4(addr) => {
                let outside = !(addr.is_unspecified()
                    || addr.is_loopback()
                    || addr.is_multicast()
                    || addr.is_broadcast()
                    || addr.octets().starts_with(&[0])
                    || self.config.ipv4.is_some_and(|net| same_network(addr, net.gateway, net.prefix_len)));
                outside.then_some(addr.into())
            }
            IpAddr::V6(addr) => {
                let prefix = |addr: Ipv6Addr| addr.to_bits() >> 64;
                let outside = !(addr.is_unspecified()
                    || addr.is_loopback()
                    || addr.is_multicast()
                    || addr.is_unicast_link_local()
                    || self.config.ipv6.is_some_and(|net| prefix(addr) == prefix(net.prefix)));
                outside.then_some(addr.into())
            }
        }
    }

    /// How the machine sees somebody of the host's side who comes to it: the host itself, which is loopback or shares an address
    /// with the link, is the gateway.
    pub(super) fn seen_by_guest(&self, peer: SocketAddr) -> Option<SocketAddr> {
        let ip = match peer.ip().to_canonical() {
            IpAddr::V4(addr) => {
                let net = self.config.ipv4?;
                let host = addr.is_loopback()
                    || addr.is_unspecified()
                    || same_network(addr, net.gateway, net.prefix_len);
                IpAddr::V4(if host { net.gateway } else { addr })
            }
            IpAddr::V6(addr) => {
                let net = self.config.ipv6?;
                let host = addr.is_loopback() || addr.is_unspecified() || addr.is_unicast_link_local();
                IpAddr::V6(if host { net.gateway } else { addr })
            }
        };
        Some(SocketAddr::new(ip, peer.port()))
    }
}

/// Whether two addresses have the first `prefix_len` bits in common.
pub(super) fn same_network(a: Ipv4Addr, b: Ipv4Addr, prefix_len: u8) -> bool {
    let shift = 32u32.saturating_sub(prefix_len.into());
    let net = |addr: Ipv4Addr| u32::from(addr).checked_shr(shift).unwrap_or(0);
    net(a) == net(b)
}

/// Which part a socket belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A connection.
    Tcp = 0,
    /// A UDP flow.
    Udp = 1,
    /// An echo flow.
    Icmp = 2,
    /// A listening socket of a forward.
    Listener = 3,
    /// A UDP socket of a forward.
    Forward = 4,
    /// A query of the DNS proxy.
    Dns = 5,
    /// The timer.
    Timer = 6,
    /// Somebody used the handle.
    Wake = 7,
}

/// What [`Poll`] says is ready: the part, and the index of the socket there. A part that uses an index again checks by
/// `generation` that an event is not of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) generation: u16,
    pub(super) index: u32,
}

impl Token {
    fn to_u64(self) -> u64 {
        (self.kind as u64) << 48 | u64::from(self.generation) << 32 | u64::from(self.index)
    }

    fn from_u64(value: u64) -> Option<Self> {
        let kinds = [
            Kind::Tcp,
            Kind::Udp,
            Kind::Icmp,
            Kind::Listener,
            Kind::Forward,
            Kind::Dns,
            Kind::Timer,
            Kind::Wake,
        ];
        let kind = *kinds.get(usize::try_from(value >> 48).ok()?)?;
        let generation = u16::try_from((value >> 32) & 0xFFFF).ok()?;
        let index = u32::try_from(value & 0xFFFF_FFFF).ok()?;
        Some(Self { kind, generation, index })
    }
}

/// Events of one socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) token: Token,
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The other side is done: there is nothing behind what can be read.
    pub(super) hangup: bool,
    /// An error, or both sides hung up.
    pub(super) closed: bool,
}

/// Watches all sockets of a NAT, for edges; itself a source.
#[derive(Debug, Clone)]
pub(super) struct Poll(Arc<OwnedFd>);

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?)))
    }

    pub(super) fn source(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Watches `fd` for edges, both ways, until it is closed.
    pub(super) fn add(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(token.to_u64()), flags)?)
    }

    /// Takes what is ready now, at most as much as `events` has room for, without waiting.
    pub(super) fn ready(&self, events: &mut Vec<epoll::Event>) -> io::Result<impl Iterator<Item = Ready>> {
        events.clear();
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.0, rustix::buffer::spare_capacity(events), Some(&zero))?;
        Ok(events.iter().filter_map(|event| {
            let (flags, data) = (event.flags, event.data);
            let has = |wanted| flags.intersects(wanted);
            let closed = has(epoll::EventFlags::ERR | epoll::EventFlags::HUP);
            Some(Ready {
                token: Token::from_u64(data.u64())?,
                readable: closed || has(epoll::EventFlags::IN | epoll::EventFlags::RDHUP),
                writable: closed || has(epoll::EventFlags::OUT),
                hangup: has(epoll::EventFlags::RDHUP | epoll::EventFlags::HUP),
                closed,
            })
        }))
    }
}
