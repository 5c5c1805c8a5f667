//! ICMP echo, and errors for what cannot be reached.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::net::{RecvFlags, SendFlags};
use smoltcp::wire::checksum;

use super::admission::Admission;
use super::context::{Context, Kind, Ready};
use super::emit::{self, Header, IPV4, IPV6, UDP, protocol};
use super::flows::Flows;
use super::{FlowInfo, FlowState, link};

/// Types of messages (RFC 792, RFC 4443).
mod kind {
    pub(super) const ECHO_REPLY: u8 = 0;
    pub(super) const UNREACHABLE: u8 = 3;
    pub(super) const ECHO: u8 = 8;
    pub(super) const UNREACHABLE_V6: u8 = 1;
    pub(super) const ECHO_V6: u8 = 128;
    pub(super) const ECHO_REPLY_V6: u8 = 129;
}

/// Bytes of an echo message before its data.
const ECHO: usize = 8;
/// Bytes of a packet that an error about it shows: the error then has 576 (RFC 1812, section 4.3.2.3) or 1280 (RFC 4443, 2.4).
const SHOWN_V4: usize = 576 - IPV4 - 8;
const SHOWN_V6: usize = 1280 - IPV6 - 8;

/// Messages that are read of one socket before it is the next one's turn, and in all.
const BATCH: usize = 8;
const STEP: usize = 64;

/// Why a packet does not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// There is no way to its network.
    Network,
    /// There is nobody.
    Host,
    /// Nobody listens at its port.
    Port,
    /// It is forbidden.
    Prohibited,
}

impl Why {
    /// The code of the message (RFC 792 and RFC 1812; RFC 4443, section 3.1).
    fn code(self, v4: bool) -> u8 {
        match (self, v4) {
            (Self::Network, _) => 0,
            (Self::Host, true) => 1,
            (Self::Port, true) => 3,
            (Self::Prohibited, true) => 13,
            (Self::Prohibited, false) => 1,
            (Self::Host, false) => 3,
            (Self::Port, false) => 4,
        }
    }

    /// What an error of a socket says; `None` if it says nothing of the way.
    pub(super) fn of(error: &io::Error) -> Option<Self> {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Some(Self::Port),
            io::ErrorKind::HostUnreachable => Some(Self::Host),
            io::ErrorKind::NetworkUnreachable => Some(Self::Network),
            io::ErrorKind::PermissionDenied => Some(Self::Prohibited),
            _ => None,
        }
    }
}

/// Tells the machine that this IP packet of it does not arrive. Not for packets to several hosts, fragments but the first, and
/// ICMP other than echo requests (RFC 1122, section 3.2.2; RFC 4443, 2.4); and not more than a number of times in a second.
pub(super) fn unreachable(cx: &mut Context<'_>, packet: &[u8], why: Why) {
    let Some((from, to, shown)) = sender(packet) else { return };
    let single = match to {
        IpAddr::V4(addr) => !(addr.is_multicast() || addr.is_broadcast() || addr.is_unspecified()),
        IpAddr::V6(addr) => !(addr.is_multicast() || addr.is_unspecified()),
    };
    if !single || !link::may_send(cx.config, from) {
        return;
    }
    if !cx.link.errors.admit(cx.now) {
        return cx.stats.limited();
    }
    // That nobody listens says the host itself, all else says the router.
    let gateway = match to {
        IpAddr::V4(_) => cx.config.ipv4.map(|net| net.gateway.into()),
        IpAddr::V6(_) => cx.config.ipv6.map(|net| net.gateway.into()),
    };
    let Some(says) = (if why == Why::Port { Some(to) } else { gateway }) else { return };
    let kind = if to.is_ipv4() { kind::UNREACHABLE } else { kind::UNREACHABLE_V6 };
    let mut message = vec![kind, why.code(to.is_ipv4()), 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(shown);
    emit::icmp(cx, says, from, emit::HOPS, &mut message);
}

/// Who sent a packet, to whom, and what of it an error shows; `None` if there is no error about such.
fn sender(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    let (from, to, protocol, header, shown) = match packet.first()? >> 4 {
        4 => {
            let fixed = packet.first_chunk::<IPV4>()?;
            let [first, _, _, _, _, _, o0, o1, _, protocol, _, _, f0, f1, f2, f3, t0, t1, t2, t3] = *fixed;
            (u16::from_be_bytes([o0, o1]) & 0x1FFF == 0).then_some(())?;
            let (from, to) = (IpAddr::from([f0, f1, f2, f3]), IpAddr::from([t0, t1, t2, t3]));
            (from, to, protocol, usize::from(first & 0xF) * 4, SHOWN_V4)
        }
        6 => {
            let [_, _, _, _, _, _, next, _, addresses @ ..] = packet.first_chunk::<IPV6>()?;
            let (from, to) = (addresses.first_chunk::<16>()?, addresses.last_chunk::<16>()?);
            (IpAddr::from(*from), IpAddr::from(*to), *next, IPV6, SHOWN_V6)
        }
        _ => return None,
    };
    let echo = match protocol {
        protocol::ICMP | protocol::ICMPV6 => {
            matches!(packet.get(header), Some(&(kind::ECHO | kind::ECHO_V6)))
        }
        _ => true,
    };
    let shown = packet.get(..packet.len().min(shown))?;
    echo.then_some((from, to, shown))
}

/// The same for a UDP datagram of a flow, of which only the addresses and the length are known any more.
pub(super) fn datagram_unreachable(
    cx: &mut Context<'_>,
    from: SocketAddr,
    to: SocketAddr,
    len: usize,
    why: Why,
) {
    let udp_len = UDP.saturating_add(len);
    let header = Header { from: from.ip(), to: to.ip(), protocol: protocol::UDP, hops: emit::HOPS };
    let mut packet = emit::ip_header(&header, udp_len);
    packet.extend_from_slice(&from.port().to_be_bytes());
    packet.extend_from_slice(&to.port().to_be_bytes());
    packet.extend_from_slice(&u16::try_from(udp_len).unwrap_or(u16::MAX).to_be_bytes());
    packet.extend_from_slice(&[0; 2]);
    unreachable(cx, &packet, why);
}

/// The relay of echo requests.
#[derive(Debug)]
pub(super) struct Icmp {
    flows: Flows<Flow>,
    by_key: HashMap<Key, u32>,
    admission: Option<Admission>,
    buffer: Vec<u8>,
}

/// Who asks whom, with which identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    from: IpAddr,
    to: IpAddr,
    id: u16,
}

#[derive(Debug)]
struct Flow {
    key: Key,
    peer: IpAddr,
    socket: OwnedFd,
    since: Instant,
    last: Instant,
    sent: u64,
    received: u64,
}

impl Icmp {
    pub(super) fn new() -> Self {
        Self { flows: Flows::new(Kind::Icmp), by_key: HashMap::new(), admission: None, buffer: Vec::new() }
    }

    /// Takes an ICMP message, or an ICMPv6 one that is not of neighbour discovery. Echo requests to the NAT are answered, others
    /// passed on; all else is ignored.
    pub(super) fn packet(&mut self, cx: &mut Context<'_>, from: IpAddr, to: IpAddr, body: &[u8]) {
        let pseudo = match to {
            IpAddr::V4(_) => 0,
            IpAddr::V6(_) => emit::pseudo_header(from, to, protocol::ICMPV6, body.len()),
        };
        if checksum::combine(&[pseudo, checksum::data(body)]) != u16::MAX {
            return cx.stats.malformed();
        }
        if !link::may_send(cx.config, from) {
            return cx.stats.spoofed();
        }
        let (id, rest) = match (to, body) {
            (IpAddr::V4(_), [kind::ECHO, 0, _, _, i0, i1, rest @ ..])
            | (IpAddr::V6(_), [kind::ECHO_V6, 0, _, _, i0, i1, rest @ ..])
                if rest.len() >= 2 =>
            {
                (u16::from_be_bytes([*i0, *i1]), rest)
            }
            _ => return cx.stats.ignored(),
        };
        let key = Key { from, to, id };
        if link::serves(cx.config, to) {
            cx.stats.icmp_echoes();
            reply(cx, &key, rest);
            return;
        }
        let index = match self.by_key.get(&key) {
            Some(index) => *index,
            None => match self.open(cx, key) {
                Ok(index) => index,
                Err(Some(why)) => return echo_unreachable(cx, &key, body, why),
                Err(None) => return,
            },
        };
        let Some(flow) = self.flows.get_mut(index) else { return };
        flow.last = cx.now;
        flow.sent += body.len() as u64;
        let sent = rustix::net::send(&flow.socket, body, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        self.flows.touch(index);
        match sent.map_err(io::Error::from) {
            Ok(_) => cx.stats.icmp_echoes(),
            Err(error) => match Why::of(&error) {
                Some(why) => echo_unreachable(cx, &key, body, why),
                None => cx.stats.limited(),
            },
        }
    }

    /// Makes a flow, if it may be; or says what to tell the machine.
    fn open(&mut self, cx: &mut Context<'_>, key: Key) -> Result<u32, Option<Why>> {
        let denied = cx.config.restrict;
        let Some(peer) = cx.true_destination(key.to).filter(|_| !denied) else {
            if denied {
                cx.stats.denied()
            } else {
                cx.stats.ignored()
            }
            return Err(Some(if denied { Why::Prohibited } else { Why::Host }));
        };
        if !cx.config.policy.allows_icmp(peer) {
            cx.stats.denied();
            return Err(Some(Why::Prohibited));
        }
        let limits = &cx.config.limits;
        let admission = self.admission.get_or_insert_with(|| Admission::new(limits.new_flows));
        if limits.icmp_flows == 0 || !admission.admit(cx.now) {
            cx.stats.limited();
            return Err(None);
        }
        while self.flows.len() >= limits.icmp_flows {
            self.close_oldest();
        }
        let made = self.flows.insert(|token| {
            let socket = cx.dial.icmp(peer)?;
            cx.poll.add_readable(&socket, token)?;
            Ok(Flow { key, peer, socket, since: cx.now, last: cx.now, sent: 0, received: 0 })
        });
        match made {
            Ok(index) => {
                self.by_key.insert(key, index);
                Ok(index)
            }
            Err(error) => {
                tracing::debug!(%peer, error = &error as &dyn std::error::Error, "cannot pass on an echo request");
                cx.stats.limited();
                Err(Some(Why::of(&error).unwrap_or(Why::Host)))
            }
        }
    }

    fn close(&mut self, index: u32) {
        if let Some(flow) = self.flows.remove(index) {
            self.by_key.remove(&flow.key);
        }
    }

    fn close_oldest(&mut self) {
        if let Some((index, _)) = self.flows.oldest() {
            self.close(index);
        }
    }

    /// Something happened at a socket: reads it, as far as there is room.
    pub(super) fn ready(&mut self, cx: &mut Context<'_>, ready: Ready) {
        if let Some(index) = self.flows.at(ready.token).filter(|_| ready.readable) {
            self.flows.set_readable(index);
            self.pump(cx);
        }
    }

    /// Reads replies while there is room for them, a bounded number. Returns whether more wait: call again when frames left.
    pub(super) fn pump(&mut self, cx: &mut Context<'_>) -> bool {
        self.buffer.resize(usize::from(u16::MAX), 0);
        let mut left = STEP;
        while left > 0 && cx.out.has_room_for(64, 128 << 10) {
            let Some(index) = self.flows.next_readable() else { return false };
            let mut more = true;
            for _ in 0..BATCH {
                left = left.saturating_sub(1);
                let Some(flow) = self.flows.get_mut(index) else { break };
                let got = rustix::net::recv(&flow.socket, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT);
                match got.map_err(io::Error::from) {
                    Ok((_, len)) => {
                        flow.last = cx.now;
                        flow.received += len as u64;
                        let wanted =
                            if flow.key.to.is_ipv4() { kind::ECHO_REPLY } else { kind::ECHO_REPLY_V6 };
                        // The identifier is the socket's: the kernel saw to it that the reply is for this one.
                        if let Some([kind, 0, _, _, _, _, rest @ ..]) =
                            self.buffer.get(..len.min(self.buffer.len()))
                            && *kind == wanted
                        {
                            reply(cx, &flow.key, rest);
                        }
                    }
                    Err(error) => {
                        if let Some(why) = Why::of(&error) {
                            let (key, kind) = (flow.key, echo_kind(flow.key.to));
                            echo_unreachable(cx, &key, &[kind, 0, 0, 0, 0, 0, 0, 0], why);
                        } else {
                            more = false;
                            break;
                        }
                    }
                }
            }
            self.flows.touch(index);
            if more {
                self.flows.set_readable(index);
            }
        }
        self.flows.has_readable()
    }

    /// Ends flows that were idle too long; returns when the next one will be.
    pub(super) fn timers(&mut self, cx: &mut Context<'_>) -> Option<Instant> {
        loop {
            let (index, flow) = self.flows.oldest()?;
            let end = flow.last + cx.config.limits.udp_idle;
            if end > cx.now {
                return Some(end);
            }
            self.close(index);
        }
    }

    /// Forgets all flows.
    pub(super) fn reset(&mut self) {
        self.flows.clear();
        self.by_key.clear();
    }

    /// What there is.
    pub(super) fn flows(&self, now: Instant) -> Vec<FlowInfo> {
        let info = |flow: &Flow| FlowInfo {
            protocol: None,
            guest: SocketAddr::new(flow.key.from, flow.key.id),
            server: SocketAddr::new(flow.key.to, 0),
            peer: Some(SocketAddr::new(flow.peer, 0)),
            outgoing: true,
            state: FlowState::Open,
            sent: flow.sent,
            received: flow.received,
            age: now.saturating_duration_since(flow.since),
            idle: now.saturating_duration_since(flow.last),
        };
        self.flows.iter().map(info).collect()
    }
}

fn echo_kind(to: IpAddr) -> u8 {
    if to.is_ipv4() { kind::ECHO } else { kind::ECHO_V6 }
}

/// Sends the reply to a request, with what it says after the identifier.
fn reply(cx: &mut Context<'_>, key: &Key, rest: &[u8]) {
    let kind = if key.to.is_ipv4() { kind::ECHO_REPLY } else { kind::ECHO_REPLY_V6 };
    let mut message = Vec::with_capacity(ECHO + rest.len());
    message.extend_from_slice(&[kind, 0, 0, 0]);
    message.extend_from_slice(&key.id.to_be_bytes());
    message.extend_from_slice(rest);
    emit::icmp(cx, key.to, key.from, emit::HOPS, &mut message);
}

/// Tells the machine that a request, or what is known of it any more, does not arrive.
fn echo_unreachable(cx: &mut Context<'_>, key: &Key, message: &[u8], why: Why) {
    let protocol = if key.to.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
    let header = Header { from: key.from, to: key.to, protocol, hops: emit::HOPS };
    let mut packet = emit::ip_header(&header, message.len());
    let at = packet.len();
    packet.extend_from_slice(message.get(..message.len().min(SHOWN_V6)).unwrap_or_default());
    if let Some(id) = packet.get_mut(at + 4..at + 6) {
        id.copy_from_slice(&key.id.to_be_bytes());
    }
    unreachable(cx, &packet, why);
}

#[cfg(test)]
mod tests;
