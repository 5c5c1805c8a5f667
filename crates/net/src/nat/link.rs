//! ARP and IPv6 neighbour discovery with router advertisements.
//!
//! On the link are the machine and the NAT, which is the gateway, the name server and the servers of guest forwards, all with one
//! Ethernet address. Nobody answers for any other address: a machine may take a free one, and finds it free.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use smoltcp::wire::checksum;

use super::NatConfig;
use super::context::{Context, Link, same_network, same_network_v6};
use super::emit;
use crate::MacAddr;

/// The router's own address.
pub(super) const ROUTER: Ipv6Addr = Ipv6Addr::new(0xFE80, 0, 0, 0, 0, 0, 0, 2);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xFF02, 0, 0, 0, 0, 0, 0, 1);

/// Seconds for which a router advertisement says that the router and its name server are there; the most that RFC 4861 (6.2.1)
/// knows.
const ROUTER_LIFETIME: u16 = 9000;
/// Time between advertisements that nobody asked for.
const ADVERTISE_EVERY: Duration = Duration::from_secs(600);
/// When the card is there, so many come soon, the first after a moment in which a driver gets ready (RFC 4861, section 6.2.4).
const INTRODUCTIONS: u8 = 3;
const INTRODUCE_AFTER: Duration = Duration::from_secs(1);
const INTRODUCE_EVERY: Duration = Duration::from_secs(16);
/// Seconds for which addresses of the prefix may be used, and may be used for something new.
const VALID: u32 = 86_400;
const PREFERRED: u32 = 14_400;

/// How often the machine is asked for its Ethernet address at most.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Hops of neighbour discovery: a packet with fewer came from elsewhere (RFC 4861, section 7.1).
const HOPS: u8 = 255;

/// Types of ICMPv6 messages (RFC 4861, section 4).
pub(super) mod kind {
    pub(in super::super) const ROUTER_SOLICITATION: u8 = 133;
    pub(in super::super) const ROUTER_ADVERTISEMENT: u8 = 134;
    pub(in super::super) const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub(in super::super) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
}

/// Whether the NAT has this address on the link.
pub(super) fn serves(config: &NatConfig, addr: IpAddr) -> bool {
    let named = match addr {
        IpAddr::V4(addr) => config.ipv4.is_some_and(|net| addr == net.gateway || addr == net.dns),
        IpAddr::V6(addr) => {
            config.ipv6.is_some_and(|net| addr == net.gateway || addr == net.dns || addr == ROUTER)
        }
    };
    let guest = config.ipv4.is_some_and(|net| addr == IpAddr::V4(net.guest));
    named || (!guest && config.guest_forwards.iter().any(|forward| forward.server.ip() == addr))
}

/// Whether the machine may send from this address: it is of the NAT's network, and not the NAT's own.
pub(super) fn may_send(config: &NatConfig, from: IpAddr) -> bool {
    let on_link = match from {
        IpAddr::V4(addr) => config.ipv4.is_some_and(|net| {
            let hosts = u32::MAX.checked_shr(net.prefix_len.into()).unwrap_or(0);
            let host = addr.to_bits() & hosts;
            same_network(addr, net.gateway, net.prefix_len) && (hosts <= 1 || (host != 0 && host != hosts))
        }),
        IpAddr::V6(addr) => config.ipv6.is_some_and(|net| {
            addr.is_unicast_link_local() || (same_network_v6(addr, net.prefix) && addr != net.prefix)
        }),
    };
    on_link && !serves(config, from)
}

/// Reads an ARP packet (RFC 826) and answers for the addresses of the NAT.
pub(super) fn arp(cx: &mut Context<'_>, packet: &[u8]) {
    let Some((header, rest)) = packet.split_at_checked(8) else { return cx.stats.malformed() };
    // Ethernet, IPv4, and the lengths of their addresses; a request or a reply.
    let [0, 1, 8, 0, 6, 4, 0, operation @ (1 | 2)] = *header else { return cx.stats.malformed() };
    let Some((addresses, _)) = rest.split_first_chunk::<20>() else { return cx.stats.malformed() };
    let [m0, m1, m2, m3, m4, m5, s0, s1, s2, s3, _, _, _, _, _, _, t0, t1, t2, t3] = *addresses;
    let (sender_mac, sender) = (MacAddr([m0, m1, m2, m3, m4, m5]), Ipv4Addr::new(s0, s1, s2, s3));
    let target = Ipv4Addr::new(t0, t1, t2, t3);
    if !sender_mac.is_station() {
        return cx.stats.malformed();
    }
    // Who probes whether an address is free has none yet (RFC 5227).
    if !sender.is_unspecified() && !may_send(cx.config, sender.into()) {
        return cx.stats.spoofed();
    }
    cx.link.learn(sender_mac);
    if operation != 1 || target == sender || !serves(cx.config, target.into()) {
        return;
    }
    let mut reply = [0, 1, 8, 0, 6, 4, 0, 2].to_vec();
    reply.extend_from_slice(&cx.link.gateway.0);
    reply.extend_from_slice(&target.octets());
    reply.extend_from_slice(&sender_mac.0);
    reply.extend_from_slice(&sender.octets());
    emit::arp(cx, sender_mac, &reply);
}

/// Asks the machine, which has the address `addr`, for its Ethernet address, if that is not known.
///
/// It is not when a forward leads to a machine that has said nothing yet. One that starts says enough, but one that was restored is
/// silent until it has something to say, and does not take a connection that comes by broadcast (RFC 1122, section 4.2.3.10).
pub(super) fn find(cx: &mut Context<'_>, addr: IpAddr) {
    if cx.link.guest.is_station() || cx.link.asked.is_some_and(|at| cx.now < at + ASK_EVERY) {
        return;
    }
    cx.link.asked = Some(cx.now);
    let gateway = cx.link.gateway;
    match addr {
        IpAddr::V4(addr) => {
            let Some(net) = cx.config.ipv4 else { return };
            let mut request = vec![0, 1, 8, 0, 6, 4, 0, 1];
            request.extend_from_slice(&gateway.0);
            request.extend_from_slice(&net.gateway.octets());
            request.extend_from_slice(&[0; 6]);
            request.extend_from_slice(&addr.octets());
            emit::arp(cx, MacAddr::BROADCAST, &request);
        }
        IpAddr::V6(addr) => {
            let mut message = vec![kind::NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
            message.extend_from_slice(&addr.octets());
            message.extend_from_slice(&[1, 1]);
            message.extend_from_slice(&gateway.0);
            // The group of all who may have this address (RFC 4291, section 2.7.1).
            let group = 0xFF02 << 112 | 0x0001_FF00_0000 | addr.to_bits() & 0xFF_FFFF;
            emit::icmp(cx, ROUTER.into(), Ipv6Addr::from_bits(group).into(), HOPS, &mut message);
        }
    }
}

/// The machine sent a packet from this address: connections to it will go there.
pub(super) fn learn_v6(cx: &mut Context<'_>, from: Ipv6Addr) {
    if may_send(cx.config, from.into()) && !from.is_unicast_link_local() {
        cx.link.guest_v6 = Some(from);
    }
}

/// Reads an ICMPv6 message other than echo: neighbour and router solicitations are answered (RFC 4861), all else is ignored.
pub(super) fn icmpv6(cx: &mut Context<'_>, src: Ipv6Addr, dst: Ipv6Addr, body: &[u8]) {
    if cx.config.ipv6.is_none() {
        return cx.stats.ignored();
    }
    let pseudo = emit::pseudo_header(src.into(), dst.into(), emit::protocol::ICMPV6, body.len());
    if checksum::combine(&[pseudo, checksum::data(body)]) != u16::MAX {
        return cx.stats.malformed();
    }
    if !src.is_unspecified() && !may_send(cx.config, src.into()) {
        return cx.stats.spoofed();
    }
    learn_v6(cx, src);
    let asked = match body {
        [kind::NEIGHBOUR_SOLICITATION, 0, _, _, rest @ ..] => {
            neighbour_solicitation(cx, src, rest);
            false
        }
        [kind::ROUTER_SOLICITATION, 0, ..] => true,
        [kind::ROUTER_SOLICITATION..=kind::NEIGHBOUR_ADVERTISEMENT, ..] => false,
        _ => {
            cx.stats.ignored();
            false
        }
    };
    if asked {
        advertise_to(cx, if src.is_unspecified() { ALL_NODES } else { src });
    }
    if !std::mem::replace(&mut cx.link.greeted, true) {
        // Its first word: somebody who never asks learns of the router as well.
        if !asked {
            advertise_to(cx, ALL_NODES);
        }
        cx.link.advertise.get_or_insert(cx.now + ADVERTISE_EVERY);
    }
}

/// `rest` begins with four reserved bytes, then the target, then options.
fn neighbour_solicitation(cx: &mut Context<'_>, src: Ipv6Addr, rest: &[u8]) {
    let Some(target) = rest.get(4..).and_then(<[u8]>::first_chunk::<16>) else { return cx.stats.malformed() };
    let target = Ipv6Addr::from(*target);
    if target.is_multicast() {
        return cx.stats.malformed();
    }
    if !serves(cx.config, target.into()) {
        // Who asks whether nobody has an address is about to take it (RFC 4862, section 5.4).
        if src.is_unspecified() && cx.link.guest_v6.is_none() {
            learn_v6(cx, target);
        }
        return;
    }
    let router = cx.config.ipv6.is_some_and(|net| target == net.gateway || target == ROUTER);
    let solicited = !src.is_unspecified();
    let flags = u8::from(router) << 7 | u8::from(solicited) << 6 | 1 << 5;
    let mut message = vec![kind::NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message.extend_from_slice(&[2, 1]);
    message.extend_from_slice(&cx.link.gateway.0);
    let to = if solicited { src } else { ALL_NODES };
    emit::icmp(cx, target.into(), to.into(), HOPS, &mut message);
}

/// Sends the router advertisement that is due; returns when the next one is.
pub(super) fn timers(cx: &mut Context<'_>) -> Option<Instant> {
    let due = cx.link.advertise?;
    if due > cx.now {
        return Some(due);
    }
    advertise_to(cx, ALL_NODES);
    let left = cx.link.introductions.checked_sub(1);
    cx.link.introductions = left.unwrap_or(0);
    let next = cx.now + if left.is_some() { INTRODUCE_EVERY } else { ADVERTISE_EVERY };
    cx.link.advertise = Some(next);
    Some(next)
}

/// The card is there, perhaps again: a machine that does not ask, or forgot its addresses meanwhile, learns of the router soon.
pub(super) fn introduce(config: &NatConfig, link: &mut Link, now: Instant) {
    if config.ipv6.is_some() {
        (link.advertise, link.introductions) = (Some(now + INTRODUCE_AFTER), INTRODUCTIONS - 1);
    }
}

/// A router advertisement (RFC 4861, section 4.2, and RFC 8106 for names).
fn advertise_to(cx: &mut Context<'_>, to: Ipv6Addr) {
    let Some(net) = cx.config.ipv6 else { return };
    let mut message = vec![kind::ROUTER_ADVERTISEMENT, 0, 0, 0, emit::HOPS, 0];
    message.extend_from_slice(&ROUTER_LIFETIME.to_be_bytes());
    // How long a neighbour is reachable and when to ask again: as the machine likes.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[1, 1]);
    message.extend_from_slice(&cx.link.gateway.0);
    message.extend_from_slice(&[5, 1, 0, 0]);
    message.extend_from_slice(&u32::from(cx.config.mtu).to_be_bytes());
    // The prefix: on this link, and addresses may be made of it.
    message.extend_from_slice(&[3, 4, 64, 0xC0]);
    message.extend_from_slice(&VALID.to_be_bytes());
    message.extend_from_slice(&PREFERRED.to_be_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&Ipv6Addr::from_bits(net.prefix.to_bits() >> 64 << 64).octets());
    if !cx.config.restrict {
        message.extend_from_slice(&[25, 3, 0, 0]);
        message.extend_from_slice(&u32::from(ROUTER_LIFETIME).to_be_bytes());
        message.extend_from_slice(&net.dns.octets());
    }
    if let Some(mut name) = cx.config.domain.as_deref().and_then(domain_name) {
        name.resize(name.len().next_multiple_of(8), 0);
        let units = u8::try_from(name.len() / 8 + 1).unwrap_or(u8::MAX);
        message.extend_from_slice(&[31, units, 0, 0]);
        message.extend_from_slice(&u32::from(ROUTER_LIFETIME).to_be_bytes());
        message.extend_from_slice(&name);
    }
    emit::icmp(cx, ROUTER.into(), to.into(), HOPS, &mut message);
}

/// A name as DNS has it (RFC 1035, section 3.1); `None` if it is none.
pub(super) fn domain_name(name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for label in name.strip_suffix('.').unwrap_or(name).split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..=63).contains(len))?;
        bytes.push(len);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    (bytes.len() <= 255).then_some(bytes)
}

#[cfg(test)]
mod tests;
