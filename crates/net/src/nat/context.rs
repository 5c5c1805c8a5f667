//! What the parts of a NAT work with: [`Context`], and the [`Poll`] with its [`Token`]s.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll;

use super::admission::Admission;
use super::outbox::Outbox;
use super::policy::translated;
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
    /// When it was asked last which Ethernet address it has.
    pub(super) asked: Option<Instant>,
    /// It was not known, and now it is: whoever waits for it need not wait longer.
    pub(super) met: bool,
    /// The IPv6 address that the machine used last for more than the link, for connections to it; `None` until it did.
    pub(super) guest_v6: Option<Ipv6Addr>,
    /// When the next router advertisement is sent unasked; `None` until the card is there or the machine spoke IPv6.
    pub(super) advertise: Option<Instant>,
    /// How many of the next ones come soon after one another.
    pub(super) introductions: u8,
    /// The machine spoke IPv6.
    pub(super) greeted: bool,
    /// The identification of the last packet that was cut into fragments.
    pub(super) packet_id: u32,
    /// The first name server of the host, as the DNS proxy found it last.
    pub(super) name_server: Option<SocketAddr>,
    /// How many ICMP errors the machine may be told.
    pub(super) errors: Admission,
}

/// ICMP errors in a second, and at once.
const ERRORS: u32 = 1000;

impl Default for Link {
    fn default() -> Self {
        Self {
            gateway: MacAddr([0x52, 0x55, 0x0A, 0, 2, 2]),
            guest: MacAddr::BROADCAST,
            asked: None,
            met: false,
            guest_v6: None,
            advertise: None,
            introductions: 0,
            greeted: false,
            packet_id: 0,
            name_server: None,
            errors: Admission::new(ERRORS),
        }
    }
}

impl Link {
    /// The machine sent a frame from this Ethernet address.
    pub(super) fn learn(&mut self, station: MacAddr) {
        if station.is_station() {
            self.met |= !self.guest.is_station();
            self.guest = station;
        }
    }
}

impl Context<'_> {
    /// Where a packet of the machine to `to` goes in truth: the gateway is the host's loopback, and IPv4 in IPv6 is IPv4. `None`
    /// for what is no address of a single host beyond the NAT: the NAT's own network, several hosts, unspecified, loopback, and
    /// what the host's kernel might send to somebody else than it says.
    pub(super) fn true_destination(&self, to: IpAddr) -> Option<IpAddr> {
        if self.config.ipv4.is_some_and(|net| to == IpAddr::V4(net.gateway)) {
            return Some(Ipv4Addr::LOCALHOST.into());
        }
        if self.config.ipv6.is_some_and(|net| to == IpAddr::V6(net.gateway)) {
            return Some(Ipv6Addr::LOCALHOST.into());
        }
        let outside = match to.to_canonical() {
            IpAddr::V4(addr) => self.is_outside_v4(addr),
            IpAddr::V6(addr) => match translated(addr.into()) {
                Some(behind) => self.is_outside_v4(behind),
                None => self.is_outside_v6(addr),
            },
        };
        outside.then_some(to.to_canonical())
    }

    fn is_outside_v4(&self, addr: Ipv4Addr) -> bool {
        // Linux takes 0.0.0.0 for itself, and "this network" (RFC 1122) has no hosts. The rest of class E may be in use.
        !(addr.octets().starts_with(&[0])
            || addr.is_loopback()
            || addr.is_multicast()
            || addr.is_broadcast()
            || self.config.ipv4.is_some_and(|net| same_network(addr, net.gateway, net.prefix_len)))
    }

    fn is_outside_v6(&self, addr: Ipv6Addr) -> bool {
        let tunnel = match addr.segments() {
            // All that begins with eight zero bits is reserved: unspecified, loopback, IPv4-compatible (which `sit` sends to the
            // IPv4 address), IPv4-translated (SIIT), and translators with a prefix of their own (64:ff9b:1::/48), of which
            // nobody knows where the IPv4 address is.
            [first, ..] if first >> 8 == 0 => true,
            // 6to4 and Teredo go to the IPv4 address in them. Both are history.
            [0x2002, ..] | [0x2001, 0, ..] => true,
            _ => false,
        };
        !(tunnel
            || addr.is_multicast()
            || addr.is_unicast_link_local()
            || self.config.ipv6.is_some_and(|net| same_network_v6(addr, net.prefix)))
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
                let host = addr.is_loopback()
                    || addr.is_unspecified()
                    || addr.is_unicast_link_local()
                    || same_network_v6(addr, net.prefix);
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

/// Whether two addresses have the first 64 bits in common.
pub(super) fn same_network_v6(a: Ipv6Addr, b: Ipv6Addr) -> bool {
    a.to_bits() >> 64 == b.to_bits() >> 64
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
    /// Most that [`ready`](Self::ready) takes at once.
    pub(super) const MAX_READY: usize = 128;

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

    /// Watches `fd` for edges of what can be read only: of a datagram socket, each datagram that is gone is an edge of writing.
    pub(super) fn add_readable(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(token.to_u64()), flags)?)
    }

    /// Takes what is ready now, at most [`MAX_READY`](Self::MAX_READY), without waiting.
    pub(super) fn ready(&self, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut room = [const { MaybeUninit::<epoll::Event>::uninit() }; Self::MAX_READY];
        let (events, _) = epoll::wait(&self.0, &mut room, Some(&zero))?;
        ready.extend(events.iter().filter_map(|event| {
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
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_context::World;

    #[test]
    fn the_gateway_is_the_loopback_of_the_host() {
        let mut world = World::default();
        let cx = world.cx();
        let truth = |to: &str| cx.true_destination(to.parse().unwrap()).map(|addr| addr.to_string());
        assert_eq!(truth("10.0.2.2").unwrap(), "127.0.0.1");
        assert_eq!(truth("fec0::2").unwrap(), "::1");
        assert_eq!(truth("192.0.2.1").unwrap(), "192.0.2.1");
        assert_eq!(truth("169.254.169.254").unwrap(), "169.254.169.254");
        assert_eq!(truth("::ffff:192.0.2.1").unwrap(), "192.0.2.1");
        assert_eq!(truth("64:ff9b::192.0.2.1").unwrap(), "64:ff9b::c000:201");
        assert_eq!(truth("2001:db8::1").unwrap(), "2001:db8::1");
        assert_eq!(truth("fd00::1").unwrap(), "fd00::1");
    }

    #[test]
    fn what_is_no_single_host_beyond_the_nat_is_nowhere() {
        let mut world = World::default();
        let cx = world.cx();
        for to in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.9.9.9",
            "224.0.0.1",
            "239.1.1.1",
            "255.255.255.255",
            "10.0.2.3",
            "10.0.2.15",
            "10.0.2.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::192.0.2.1",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
            "::ffff:10.0.2.2",
            "::ffff:0:192.0.2.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::10.0.2.2",
            "64:ff9b:1::192.0.2.1",
            "2002:7f00:1::1",
            "2002:c000:201::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "ff02::1",
            "fe80::1",
            "fec0::3",
            "fec0::15",
        ] {
            assert_eq!(cx.true_destination(to.parse().unwrap()), None, "{to}");
        }
    }

    #[test]
    fn who_shares_an_address_with_the_link_is_seen_as_the_gateway() {
        let mut world = World::default();
        let cx = world.cx();
        for (peer, seen) in [
            ("127.0.0.1:5", "10.0.2.2:5"),
            ("10.0.2.15:5", "10.0.2.2:5"),
            ("192.0.2.1:5", "192.0.2.1:5"),
            ("[::ffff:192.0.2.1]:5", "192.0.2.1:5"),
            ("[::1]:5", "[fec0::2]:5"),
            ("[fe80::1]:5", "[fec0::2]:5"),
            ("[fec0::9]:5", "[fec0::2]:5"),
            ("[2001:db8::1]:5", "[2001:db8::1]:5"),
        ] {
            assert_eq!(cx.seen_by_guest(peer.parse().unwrap()), Some(seen.parse().unwrap()), "{peer}");
        }
    }
}
