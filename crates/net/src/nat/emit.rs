//! Frames for the machine: Ethernet, ARP, IPv4, IPv6, UDP and ICMP, with all checksums, cut to the MTU.
//!
//! Functions say whether the frame was taken: it is not if too many wait, which is counted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::wire::{IpAddress, IpProtocol, checksum};

use super::context::Context;
use crate::{MacAddr, VnetHeader};

/// Bytes of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub(super) const IPV4: usize = 20;
/// Bytes of an IPv6 header.
pub(super) const IPV6: usize = 40;
/// Bytes of a UDP header.
pub(super) const UDP: usize = 8;
/// Bytes of an IPv6 fragment header (RFC 8200, section 4.5).
const FRAGMENT: usize = 8;

/// Hops that what we send may make.
pub(super) const HOPS: u8 = 64;

/// EtherTypes.
pub(super) mod ethertype {
    pub(in super::super) const IPV4: u16 = 0x0800;
    pub(in super::super) const ARP: u16 = 0x0806;
    pub(in super::super) const IPV6: u16 = 0x86DD;
}

/// Protocols in IPv4, next headers in IPv6.
pub(super) mod protocol {
    pub(in super::super) const ICMP: u8 = 1;
    pub(in super::super) const TCP: u8 = 6;
    pub(in super::super) const UDP: u8 = 17;
    pub(in super::super) const FRAGMENT: u8 = 44;
    pub(in super::super) const ICMPV6: u8 = 58;
}

/// What an IP header says of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) protocol: u8,
    pub(super) hops: u8,
}

/// The Ethernet address that packets to `to` go to: groups and broadcast have their own (RFC 2464, section 7; RFC 1112, 6.4), all
/// others are the machine.
fn station(cx: &Context<'_>, to: IpAddr) -> MacAddr {
    match to {
        IpAddr::V4(addr) if addr.is_broadcast() => MacAddr::BROADCAST,
        IpAddr::V6(addr) if addr.is_multicast() => {
            let [.., a, b, c, d] = addr.octets();
            MacAddr([0x33, 0x33, a, b, c, d])
        }
        _ => cx.link.guest,
    }
}

/// A buffer with an Ethernet header in it.
fn ethernet(cx: &mut Context<'_>, to: MacAddr, ethertype: u16) -> Vec<u8> {
    let mut frame = cx.out.buffer();
    frame.extend_from_slice(&to.0);
    frame.extend_from_slice(&cx.link.gateway.0);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame
}

fn push(cx: &mut Context<'_>, frame: Vec<u8>) -> bool {
    let taken = cx.out.push(frame, VnetHeader::default());
    if !taken {
        cx.stats.overflowed();
    }
    taken
}

/// Sends an ARP packet to `to`.
pub(super) fn arp(cx: &mut Context<'_>, to: MacAddr, packet: &[u8]) -> bool {
    let mut frame = ethernet(cx, to, ethertype::ARP);
    frame.extend_from_slice(packet);
    push(cx, frame)
}

/// Sends a UDP datagram. Not at all if it is too large to be one, or the addresses are of two kinds.
pub(super) fn udp(cx: &mut Context<'_>, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> bool {
    let Some(len) = u16::try_from(UDP.saturating_add(payload.len())).ok() else { return false };
    let [f0, f1] = from.port().to_be_bytes();
    let [t0, t1] = to.port().to_be_bytes();
    let [l0, l1] = len.to_be_bytes();
    let mut header = [f0, f1, t0, t1, l0, l1, 0, 0];
    let sum = !checksum::combine(&[
        pseudo_header(from.ip(), to.ip(), protocol::UDP, len.into()),
        checksum::data(&header),
        checksum::data(payload),
    ]);
    // Zero is no checksum at all; both are the same number otherwise.
    let sum = if sum == 0 { u16::MAX } else { sum };
    let [.., high, low] = &mut header;
    [*high, *low] = sum.to_be_bytes();
    ip(cx, &Header { from: from.ip(), to: to.ip(), protocol: protocol::UDP, hops: HOPS }, &[&header, payload])
}

/// Sends an ICMP or ICMPv6 message, by the kind of address. Its checksum, bytes 2 and 3, is filled in.
pub(super) fn icmp(cx: &mut Context<'_>, from: IpAddr, to: IpAddr, hops: u8, message: &mut [u8]) -> bool {
    let Some([high, low]) = message.get_mut(2..4) else { return false };
    (*high, *low) = (0, 0);
    let (protocol, pseudo) = match to {
        IpAddr::V4(_) => (protocol::ICMP, 0),
        IpAddr::V6(_) => (protocol::ICMPV6, pseudo_header(from, to, protocol::ICMPV6, message.len())),
    };
    let sum = !checksum::combine(&[pseudo, checksum::data(message)]);
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    ip(cx, &Header { from, to, protocol, hops }, &[message])
}

/// The sum of the pseudo header; 0 if the addresses are of two kinds.
pub(super) fn pseudo_header(from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> u16 {
    if from.is_ipv4() != to.is_ipv4() {
        return 0;
    }
    let len = u32::try_from(len).unwrap_or(0);
    checksum::pseudo_header(&IpAddress::from(from), &IpAddress::from(to), IpProtocol::from(protocol), len)
}

/// Sends an IP packet whose payload is the concatenation of `parts`; as fragments, if it is larger than the MTU.
pub(super) fn ip(cx: &mut Context<'_>, header: &Header, parts: &[&[u8]]) -> bool {
    let len = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.len()));
    let mtu = usize::from(cx.config.mtu);
    match (header.from, header.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            if IPV4 + len <= mtu {
                let ip = ipv4_header(header, from, to, len, 0, DONT_FRAGMENT);
                return packet(cx, header, &ip, parts);
            }
            let Ok(_) = u16::try_from(IPV4 + len) else { return false };
            cx.link.packet_id = cx.link.packet_id.wrapping_add(1);
            let id = cx.link.packet_id;
            fragments(cx, header, parts, mtu.saturating_sub(IPV4), |len, offset, more| {
                let flags = (offset / 8) | if more { MORE_FRAGMENTS } else { 0 };
                ipv4_header(header, from, to, len, id, flags).to_vec()
            })
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            if IPV6 + len <= mtu {
                let ip = ipv6_header(header, header.protocol, from, to, len);
                return packet(cx, header, &ip, parts);
            }
            let Ok(_) = u16::try_from(len + FRAGMENT) else { return false };
            cx.link.packet_id = cx.link.packet_id.wrapping_add(1);
            let id = cx.link.packet_id;
            fragments(cx, header, parts, mtu.saturating_sub(IPV6 + FRAGMENT), |len, offset, more| {
                let mut ip = ipv6_header(header, protocol::FRAGMENT, from, to, len + FRAGMENT).to_vec();
                ip.extend_from_slice(&[header.protocol, 0]);
                ip.extend_from_slice(&(offset | u16::from(more)).to_be_bytes());
                ip.extend_from_slice(&id.to_be_bytes());
                ip
            })
        }
        _ => false,
    }
}

/// Flags of IPv4, in the field with the offset (RFC 791, section 3.1).
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;

/// `len` is that of the payload, and was checked to fit.
fn ipv4_header(header: &Header, from: Ipv4Addr, to: Ipv4Addr, len: usize, id: u32, flags: u16) -> [u8; IPV4] {
    let [l0, l1] = u16::try_from(IPV4 + len).unwrap_or(u16::MAX).to_be_bytes();
    let [_, _, i0, i1] = id.to_be_bytes();
    let [o0, o1] = flags.to_be_bytes();
    let [f0, f1, f2, f3] = from.octets();
    let [t0, t1, t2, t3] = to.octets();
    let mut ip =
        [0x45, 0, l0, l1, i0, i1, o0, o1, header.hops, header.protocol, 0, 0, f0, f1, f2, f3, t0, t1, t2, t3];
    let sum = !checksum::data(&ip);
    if let Some(field) = ip.get_mut(10..12) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    ip
}

fn ipv6_header(header: &Header, next: u8, from: Ipv6Addr, to: Ipv6Addr, len: usize) -> [u8; IPV6] {
    let mut ip = [0; IPV6];
    let [l0, l1] = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
    let (front, addresses) = ip.split_at_mut(8);
    front.copy_from_slice(&[0x60, 0, 0, 0, l0, l1, next, header.hops]);
    let (first, second) = addresses.split_at_mut(16);
    first.copy_from_slice(&from.octets());
    second.copy_from_slice(&to.octets());
    ip
}

fn packet(cx: &mut Context<'_>, header: &Header, ip: &[u8], parts: &[&[u8]]) -> bool {
    let ethertype = if header.to.is_ipv4() { ethertype::IPV4 } else { ethertype::IPV6 };
    let mut frame = ethernet(cx, station(cx, header.to), ethertype);
    frame.extend_from_slice(ip);
    for part in parts {
        frame.extend_from_slice(part);
    }
    push(cx, frame)
}

/// Sends `parts` in pieces of at most `room` bytes; `make` makes the headers of each from its length, its offset and whether more
/// come. All or none.
fn fragments(
    cx: &mut Context<'_>,
    header: &Header,
    parts: &[&[u8]],
    room: usize,
    make: impl Fn(usize, u16, bool) -> Vec<u8>,
) -> bool {
    let body = parts.concat();
    let room = (room & !7).max(8);
    let pieces = body.len().div_ceil(room);
    if !cx.out.has_room_for(pieces, body.len() + pieces * (ETHERNET + IPV6 + FRAGMENT)) {
        cx.stats.overflowed();
        return false;
    }
    let mut offset = 0;
    for piece in body.chunks(room) {
        let more = offset + piece.len() < body.len();
        let ip = make(piece.len(), u16::try_from(offset).unwrap_or(u16::MAX), more);
        packet(cx, header, &ip, &[piece]);
        offset += piece.len();
    }
    true
}

#[cfg(test)]
mod tests {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{
        EthernetFrame, EthernetProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, UdpPacket, UdpRepr,
    };

    use super::super::fragment::Reassembly;
    use super::super::test_context::{GUEST, World};
    use super::*;

    fn checked_udp(packet: &[u8], from: SocketAddr, to: SocketAddr) -> Vec<u8> {
        let udp = UdpPacket::new_checked(packet).unwrap();
        let (src, dst) = (from.ip().into(), to.ip().into());
        let repr = UdpRepr::parse(&udp, &src, &dst, &ChecksumCapabilities::default()).unwrap();
        assert_eq!((repr.src_port, repr.dst_port), (from.port(), to.port()));
        udp.payload().to_vec()
    }

    #[test]
    fn a_datagram_has_right_headers_and_checksums() {
        let mut world = World::default();
        for (from, to) in [("10.0.2.3:53", "10.0.2.15:4000"), ("[fec0::3]:53", "[fec0::15]:4000")] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            for payload in [&b""[..], b"odd", b"even"] {
                assert!(udp(&mut world.cx(), from, to, payload));
                let frame = world.frame();
                let frame = EthernetFrame::new_checked(frame.as_slice()).unwrap();
                assert_eq!((frame.dst_addr().0, frame.src_addr().0), (GUEST.0, world.link.gateway.0));
                if from.is_ipv4() {
                    assert_eq!(frame.ethertype(), EthernetProtocol::Ipv4);
                    let ip = Ipv4Packet::new_checked(frame.payload()).unwrap();
                    Ipv4Repr::parse(&ip, &ChecksumCapabilities::default()).unwrap();
                    assert_eq!(checked_udp(ip.payload(), from, to), payload);
                } else {
                    assert_eq!(frame.ethertype(), EthernetProtocol::Ipv6);
                    let ip = Ipv6Packet::new_checked(frame.payload()).unwrap();
                    assert_eq!(checked_udp(ip.payload(), from, to), payload);
                }
            }
        }
    }

    #[test]
    fn a_checksum_of_zero_is_written_as_all_ones() {
        let mut world = World::default();
        let (from, to) = ("10.0.2.3:53".parse().unwrap(), "10.0.2.15:4000".parse().unwrap());
        udp(&mut world.cx(), from, to, &[0, 0]);
        let frame = world.frame();
        let sum = u16::from_be_bytes([frame[40], frame[41]]);
        udp(&mut world.cx(), from, to, &sum.to_be_bytes());
        assert_eq!(world.frame()[40..42], [0xFF, 0xFF]);
    }

    #[test]
    fn a_datagram_larger_than_the_mtu_is_cut_into_fragments_that_make_it_again() {
        let mut world = World::default();
        for (from, to, most) in
            [("10.0.2.3:53", "10.0.2.15:4000", 65507), ("[fec0::3]:53", "[fec0::15]:4000", 65519)]
        {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let header = if from.is_ipv4() { IPV4 } else { IPV6 };
            for len in [1452, 1453, 1472, 1473, 4000, most] {
                let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                assert!(udp(&mut world.cx(), from, to, &payload), "{from} {len}");
                let frames = world.frames();
                assert!(frames.iter().all(|frame| frame.len() <= ETHERNET + 1500));
                assert_eq!(frames.len() > 1, header + UDP + len > 1500);
                let whole = if frames.len() == 1 {
                    frames[0][ETHERNET..].to_vec()
                } else {
                    let mut reassembly = Reassembly::default();
                    let mut made =
                        frames.iter().map(|frame| reassembly.packet(world.now, &frame[ETHERNET..]));
                    let whole = made.by_ref().last().unwrap();
                    whole.unwrap()
                };
                assert_eq!(checked_udp(&whole[header..], from, to), payload);
            }
        }
        let (from, to) = ("10.0.2.3:53".parse().unwrap(), "10.0.2.15:4000".parse().unwrap());
        assert!(!udp(&mut world.cx(), from, to, &vec![0; 65508]));
    }

    #[test]
    fn what_there_is_no_room_for_is_dropped_whole_and_counted() {
        let mut world = World::default();
        let (from, to) = ("10.0.2.3:53".parse().unwrap(), "10.0.2.15:4000".parse().unwrap());
        while udp(&mut world.cx(), from, to, &[0; 4000]) {}
        assert_eq!(world.stats.counts().overflowed, 1);
        assert_eq!(world.frames().len() % 3, 0);
    }

    #[test]
    fn groups_and_broadcast_have_their_own_stations() {
        let mut world = World::default();
        let at = |to: &str| SocketAddr::new(to.parse().unwrap(), 68);
        udp(&mut world.cx(), at("10.0.2.2"), at("255.255.255.255"), b"x");
        assert_eq!(world.frame()[..6], [0xFF; 6]);
        udp(&mut world.cx(), at("fe80::2"), at("ff02::1:2"), b"x");
        assert_eq!(world.frame()[..6], [0x33, 0x33, 0, 1, 0, 2]);
    }
}
