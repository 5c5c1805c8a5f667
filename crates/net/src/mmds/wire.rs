//! Which frames are for the service, and answers to ARP.

use std::net::Ipv4Addr;

use super::MMDS_MAC;
use crate::MacAddr;

/// Bytes that say whether a frame is for the service: an ARP packet.
pub(super) const DECIDES: usize = 42;
/// Bytes of an Ethernet header.
pub(super) const ETHERNET: usize = 14;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const TCP: u8 = 6;

/// A frame that is for the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Arp,
    Tcp,
}

/// Whether a frame that begins with `start` is for the service at `address`: ARP that asks for it, TCP to it.
#[inline]
pub(super) fn kind(address: [u8; 4], start: &[u8]) -> Option<Kind> {
    let at = |at: usize| start.get(at..at + 4).is_some_and(|bytes| bytes == address);
    let ethertype: [u8; 2] = start.get(12..14)?.try_into().ok()?;
    match ethertype {
        ETHERTYPE_IPV4 if at(30) && start.get(23) == Some(&TCP) => Some(Kind::Tcp),
        ETHERTYPE_ARP if at(38) => Some(Kind::Arp),
        _ => None,
    }
}

/// The answer to an ARP packet (RFC 826) with the address of the service as its target; `None` if it is no question.
pub(super) fn arp_reply(address: [u8; 4], frame: &[u8]) -> Option<Vec<u8>> {
    let frame: &[u8; DECIDES] = frame.first_chunk()?;
    let (_, arp) = frame.split_at(ETHERNET);
    // Ethernet, IPv4, lengths of 6 and 4, a request.
    let (&question, rest) = arp.split_first_chunk::<8>()?;
    let (&mac, rest) = rest.split_first_chunk::<6>()?;
    let (&sender, _) = rest.split_first_chunk::<4>()?;
    let right = question == [0, 1, 8, 0, 6, 4, 0, 1] && sender != address && MacAddr(mac).is_station();
    right.then_some(())?;
    let mut reply = Vec::with_capacity(DECIDES);
    reply.extend([mac, MMDS_MAC.0].concat());
    reply.extend(ETHERTYPE_ARP);
    reply.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    reply.extend(MMDS_MAC.0);
    reply.extend(address);
    reply.extend(mac);
    reply.extend(sender);
    Some(reply)
}

/// Who sent a TCP segment in an IPv4 packet: both addresses. `None` for fragments, and for senders that nobody can answer.
pub(super) fn sender(address: [u8; 4], frame: &[u8]) -> Option<(Ipv4Addr, MacAddr)> {
    let mac = MacAddr(frame.get(6..12)?.try_into().ok()?);
    let flags: [u8; 2] = frame.get(20..22)?.try_into().ok()?;
    let from: [u8; 4] = frame.get(26..30)?.try_into().ok()?;
    let ip = Ipv4Addr::from(from);
    let whole = u16::from_be_bytes(flags) & 0x3FFF == 0;
    let station = !ip.is_unspecified() && !ip.is_broadcast() && !ip.is_multicast() && from != address;
    (whole && station && mac.is_station()).then_some((ip, mac))
}

/// An Ethernet header for a packet to the machine.
pub(super) fn ethernet(to: MacAddr) -> [u8; ETHERNET] {
    let mut header = [0; ETHERNET];
    let parts = to.0.into_iter().chain(MMDS_MAC.0).chain(ETHERTYPE_IPV4);
    header.iter_mut().zip(parts).for_each(|(byte, value)| *byte = value);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: [u8; 4] = [169, 254, 169, 254];
    const GUEST: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    fn question() -> Vec<u8> {
        let mut arp = [[0xFF; 6], GUEST].concat();
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend(GUEST);
        arp.extend([10, 0, 0, 2]);
        arp.extend([0; 6]);
        arp.extend(ADDRESS);
        arp
    }

    #[test]
    fn a_question_for_the_address_is_answered_to_whom_asked() {
        let question = question();
        assert_eq!(kind(ADDRESS, &question), Some(Kind::Arp));
        let reply = arp_reply(ADDRESS, &question).unwrap();
        assert_eq!(reply[..6], GUEST);
        assert_eq!(reply[6..12], MMDS_MAC.0);
        assert_eq!(reply[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        assert_eq!(reply[22..32], [&MMDS_MAC.0[..], &ADDRESS].concat());
        assert_eq!(reply[32..], [&GUEST[..], &[10, 0, 0, 2]].concat());
    }

    #[test]
    fn arp_that_is_no_question_or_for_others_is_not_answered() {
        let good = question();
        for at in [14, 15, 16, 17, 18, 19, 20, 21] {
            let mut bad = good.clone();
            bad[at] ^= 0x80;
            assert_eq!(arp_reply(ADDRESS, &bad), None, "byte {at}");
        }
        let mut probe = good.clone();
        probe[28..32].copy_from_slice(&ADDRESS);
        assert_eq!(arp_reply(ADDRESS, &probe), None, "a machine that thinks it has the address");
        let mut group = good.clone();
        group[22] |= 1;
        assert_eq!(arp_reply(ADDRESS, &group), None);
        assert_eq!(arp_reply(ADDRESS, &good[..41]), None);
        let mut other = good.clone();
        other[41] = 1;
        assert_eq!(kind(ADDRESS, &other), None);
        for len in 0..good.len() {
            assert_eq!(kind(ADDRESS, &good[..len]), None);
        }
    }

    #[test]
    fn only_tcp_to_the_address_is_for_the_service() {
        let mut frame = vec![0; 54];
        frame[12..14].copy_from_slice(&ETHERTYPE_IPV4);
        frame[23] = TCP;
        frame[30..34].copy_from_slice(&ADDRESS);
        assert_eq!(kind(ADDRESS, &frame), Some(Kind::Tcp));
        for (at, value) in [(12, 0x86), (23, 17), (23, 1), (33, 253)] {
            let mut other = frame.clone();
            other[at] = value;
            assert_eq!(kind(ADDRESS, &other), None);
        }
    }
}
