//! IP fragments: [`Reassembly`].
//!
//! Whatever is odd about the fragments of a datagram drops all of it (RFC 5722; RFC 8200, section 4.5), those that are still to
//! come included: overlaps, gaps that are no multiple of eight, two ends, more than an IP packet can hold, a beginning too short for
//! the header inside. Nothing of a datagram is looked at before all of it is there.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use smoltcp::wire::checksum;

use super::emit::{IPV4, IPV6, protocol};

/// Datagrams of which parts wait, and their bytes. Beyond, the oldest is forgotten.
const MAX_DATAGRAMS: usize = 64;
const MAX_BYTES: usize = 1 << 20;
/// Parts of a datagram with holes between.
const MAX_PARTS: usize = 64;
/// How long the rest may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// IPv6 extension headers before that of the fragment.
const MAX_HEADERS: usize = 8;

/// Datagrams of which parts are there.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    /// The oldest first.
    waiting: VecDeque<Datagram>,
    bytes: usize,
}

/// What the fragments of a datagram have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    from: IpAddr,
    to: IpAddr,
    id: u32,
    /// For IPv4; IPv6 does without.
    protocol: u8,
}

/// A fragment, taken apart.
#[derive(Debug)]
struct Fragment<'a> {
    key: Key,
    /// What goes in front of the datagram; that of the first fragment counts.
    header: &'a [u8],
    /// Where in `header` the number of what follows is to be put, for IPv6.
    next_at: usize,
    /// The protocol inside.
    inside: u8,
    offset: usize,
    more: bool,
    data: &'a [u8],
}

#[derive(Debug)]
struct Datagram {
    key: Key,
    since: Instant,
    /// Something was odd: what comes is dropped too.
    odd: bool,
    /// That of the first fragment.
    header: Option<Vec<u8>>,
    data: Vec<u8>,
    /// What of `data` is there, in order, with holes between.
    parts: Vec<(usize, usize)>,
    /// Its length, once the last fragment is there.
    len: Option<usize>,
}

/// Something is odd.
struct Odd;

impl Reassembly {
    /// Takes a fragment: an IPv4 packet with an offset or more to come, or an IPv6 packet with a fragment header. Returns the whole
    /// packet, without any sign of fragments, when this was the last of it. A packet that is no fragment is returned as it is; one
    /// that is no IP packet is dropped.
    pub(super) fn packet(&mut self, now: Instant, packet: &[u8]) -> Option<Vec<u8>> {
        self.expire(now);
        let fragment = Fragment::parse(packet)?;
        if fragment.offset == 0 && !fragment.more {
            // RFC 6946: it has nothing to do with others of the same number.
            return Some(fragment.whole(fragment.header, fragment.data));
        }
        let at = match self.waiting.iter().position(|datagram| datagram.key == fragment.key) {
            Some(at) => at,
            None => {
                while self.waiting.len() >= MAX_DATAGRAMS {
                    self.forget_oldest();
                }
                self.waiting.push_back(Datagram::new(fragment.key, now));
                self.waiting.len() - 1
            }
        };
        let datagram = self.waiting.get_mut(at)?;
        if datagram.odd {
            return None;
        }
        let before = datagram.data.len();
        if datagram.add(&fragment).is_err() {
            datagram.odd = true;
            (datagram.data, datagram.parts) = (Vec::new(), Vec::new());
        }
        self.bytes = self.bytes + datagram.data.len() - before;
        if let (Some(header), true) = (&datagram.header, datagram.is_complete()) {
            let whole = fragment.whole(header, &datagram.data);
            let done = self.waiting.remove(at)?;
            self.bytes -= done.data.len();
            return Some(whole);
        }
        while self.bytes > MAX_BYTES {
            self.forget_oldest();
        }
        None
    }

    /// Forgets all.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// What is too old is forgotten.
    fn expire(&mut self, now: Instant) {
        while self
            .waiting
            .front()
            .is_some_and(|oldest| now.saturating_duration_since(oldest.since) >= TIMEOUT)
        {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        match self.waiting.pop_front() {
            Some(oldest) => self.bytes -= oldest.data.len(),
            None => self.bytes = 0,
        }
    }
}

impl Datagram {
    fn new(key: Key, since: Instant) -> Self {
        Self { key, since, odd: false, header: None, data: Vec::new(), parts: Vec::new(), len: None }
    }

    fn add(&mut self, fragment: &Fragment<'_>) -> Result<(), Odd> {
        let (start, end) = (fragment.offset, fragment.offset + fragment.data.len());
        // The length in IPv4 is with its header, that in IPv6 without.
        let counted = fragment.header.len() - if fragment.key.from.is_ipv4() { 0 } else { IPV6 };
        // A header that says more than the first fragment has would be read from another.
        let shortest = match (start, fragment.inside) {
            (0, protocol::TCP) => 20,
            (0, _) => 8,
            _ => 1,
        };
        let odd = fragment.data.len() < shortest
            || fragment.more && fragment.data.len() % 8 != 0
            || end + counted > usize::from(u16::MAX)
            || self.len.is_some_and(|len| end > len)
            || !fragment.more && (self.len.is_some() || self.data.len() > end);
        if odd {
            return Err(Odd);
        }
        self.take_part(start, end)?;
        if !fragment.more {
            self.len = Some(end);
        }
        if start == 0 {
            self.header = Some(fragment.header.to_vec());
        }
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        self.data.get_mut(start..end).ok_or(Odd)?.copy_from_slice(fragment.data);
        Ok(())
    }

    /// Notes that these bytes are there, which were not.
    fn take_part(&mut self, start: usize, end: usize) -> Result<(), Odd> {
        let at = self.parts.partition_point(|part| part.1 <= start);
        if self.parts.get(at).is_some_and(|next| next.0 < end) {
            return Err(Odd);
        }
        let joins_next = self.parts.get(at).is_some_and(|next| next.0 == end);
        let before = at.checked_sub(1);
        let joins_before =
            before.is_some_and(|before| self.parts.get(before).is_some_and(|part| part.1 == start));
        match (joins_before.then_some(before).flatten(), joins_next) {
            (Some(before), true) => {
                let (_, next_end) = self.parts.remove(at);
                if let Some(part) = self.parts.get_mut(before) {
                    part.1 = next_end;
                }
            }
            (Some(before), false) => {
                if let Some(part) = self.parts.get_mut(before) {
                    part.1 = end;
                }
            }
            (None, true) => {
                if let Some(part) = self.parts.get_mut(at) {
                    part.0 = start;
                }
            }
            (None, false) if self.parts.len() < MAX_PARTS => self.parts.insert(at, (start, end)),
            (None, false) => return Err(Odd),
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.len.is_some_and(|len| self.parts == [(0, len)])
    }
}

impl<'a> Fragment<'a> {
    fn parse(packet: &'a [u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::parse_v4(packet),
            6 => Self::parse_v6(packet),
            _ => None,
        }
    }

    fn parse_v4(packet: &'a [u8]) -> Option<Self> {
        let fixed = packet.first_chunk::<IPV4>()?;
        let [first, _, l0, l1, i0, i1, o0, o1, _, protocol, _, _, f0, f1, f2, f3, t0, t1, t2, t3] = *fixed;
        let header_len = usize::from(first & 0xF) * 4;
        let total = usize::from(u16::from_be_bytes([l0, l1]));
        let (header, data) = packet.get(..total)?.split_at_checked(header_len.max(IPV4))?;
        (header.len() == header_len).then_some(())?;
        let field = u16::from_be_bytes([o0, o1]);
        let key = Key {
            from: [f0, f1, f2, f3].into(),
            to: [t0, t1, t2, t3].into(),
            id: u16::from_be_bytes([i0, i1]).into(),
            protocol,
        };
        let offset = usize::from(field & 0x1FFF) * 8;
        Some(Self { key, header, next_at: 0, inside: protocol, offset, more: field & 0x2000 != 0, data })
    }

    fn parse_v6(packet: &'a [u8]) -> Option<Self> {
        let fixed = packet.first_chunk::<IPV6>()?;
        let [_, _, _, _, l0, l1, mut next, _, addresses @ ..] = *fixed;
        let packet = packet.get(..IPV6 + usize::from(u16::from_be_bytes([l0, l1])))?;
        let (from, to) = addresses.split_first_chunk::<16>()?;
        let to = *to.first_chunk::<16>()?;
        let (mut at, mut next_at) = (IPV6, 6);
        for _ in 0..MAX_HEADERS {
            let rest = packet.get(at..)?;
            match (next, rest) {
                (protocol::FRAGMENT, [inside, _, o0, o1, i0, i1, i2, i3, data @ ..]) => {
                    let field = u16::from_be_bytes([*o0, *o1]);
                    let id = u32::from_be_bytes([*i0, *i1, *i2, *i3]);
                    let key = Key { from: (*from).into(), to: to.into(), id, protocol: 0 };
                    let header = packet.get(..at)?;
                    let (offset, more) = (usize::from(field & !7), field & 1 != 0);
                    return Some(Self { key, header, next_at, inside: *inside, offset, more, data });
                }
                // Hop by hop, routing, destination options: their number and their length in eights without the first.
                (0 | 43 | 60, [following, len, ..]) => {
                    (next, next_at) = (*following, at);
                    at += 8 + usize::from(*len) * 8;
                }
                // No fragment.
                _ => {
                    let key = Key { from: (*from).into(), to: to.into(), id: 0, protocol: 0 };
                    let header = packet.get(..at)?;
                    return Some(Self {
                        key,
                        header,
                        next_at,
                        inside: next,
                        offset: 0,
                        more: false,
                        data: rest,
                    });
                }
            }
        }
        None
    }

    /// A packet of a header and all data, that shows nothing of fragments.
    fn whole(&self, header: &[u8], data: &[u8]) -> Vec<u8> {
        let mut packet = [header, data].concat();
        let len = packet.len();
        let mut set = |at: usize, bytes: &[u8]| {
            if let Some(field) = packet.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        if self.key.from.is_ipv4() {
            set(2, &u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
            set(6, &[0; 2]);
            set(10, &[0; 2]);
            let sum = !checksum::data(packet.get(..header.len()).unwrap_or_default());
            if let Some(field) = packet.get_mut(10..12) {
                field.copy_from_slice(&sum.to_be_bytes());
            }
        } else {
            set(4, &u16::try_from(len - IPV6).unwrap_or(u16::MAX).to_be_bytes());
            set(self.next_at, &[self.inside]);
        }
        packet
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::{Ipv4Packet, Ipv6Packet};

    use super::*;

    const UDP: u8 = protocol::UDP;

    /// A fragment of a datagram `id` whose bytes are their own positions.
    fn v4(id: u16, offset: usize, len: usize, more: bool) -> Vec<u8> {
        let total = u16::try_from(20 + len).unwrap().to_be_bytes();
        let field = (u16::try_from(offset / 8).unwrap() | if more { 0x2000 } else { 0 }).to_be_bytes();
        let id = id.to_be_bytes();
        let mut packet =
            vec![0x45, 0, total[0], total[1], id[0], id[1], field[0], field[1], 64, UDP, 0, 0, 10, 0, 2, 15];
        packet.extend_from_slice(&[192, 0, 2, 1]);
        packet.extend((offset..offset + len).map(|at| (at % 251) as u8));
        packet
    }

    fn v6(id: u32, offset: usize, len: usize, more: bool) -> Vec<u8> {
        let total = u16::try_from(16 + len).unwrap().to_be_bytes();
        // A hop-by-hop header goes before that of the fragment.
        let mut packet = vec![0x60, 0, 0, 0, total[0], total[1], 0, 64];
        packet.extend_from_slice(&[0xFE; 16]);
        packet.extend_from_slice(&[0x20; 16]);
        packet.extend_from_slice(&[44, 0, 1, 4, 0, 0, 0, 0]);
        packet.extend_from_slice(&[UDP, 0]);
        packet.extend_from_slice(&(u16::try_from(offset).unwrap() | u16::from(more)).to_be_bytes());
        packet.extend_from_slice(&id.to_be_bytes());
        packet.extend((offset..offset + len).map(|at| (at % 251) as u8));
        packet
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % 251) as u8).collect()
    }

    fn take(reassembly: &mut Reassembly, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let now = Instant::now();
        packets.iter().filter_map(|packet| reassembly.packet(now, packet)).collect()
    }

    #[test]
    fn fragments_in_any_order_make_the_packet_that_was_cut() {
        let parts = [(0, 24, true), (24, 16, true), (40, 5, false)];
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut reassembly = Reassembly::default();
            let [a, b, c] = order.map(|i: usize| parts[i]);
            let made = take(&mut reassembly, &[a, b, c].map(|(at, len, more)| v4(7, at, len, more)));
            let packet = Ipv4Packet::new_checked(made[0].as_slice()).unwrap();
            assert!(packet.verify_checksum() && !packet.more_frags() && packet.frag_offset() == 0);
            assert_eq!((made.len(), packet.payload()), (1, bytes(45).as_slice()));
            let made = take(&mut reassembly, &[a, b, c].map(|(at, len, more)| v6(7, at, len, more)));
            let packet = Ipv6Packet::new_checked(made[0].as_slice()).unwrap();
            assert_eq!(packet.payload()[..2], [UDP, 0], "the header before now leads to what was inside");
            assert_eq!((made.len(), &packet.payload()[8..]), (1, bytes(45).as_slice()));
            assert_eq!((reassembly.waiting.len(), reassembly.bytes), (0, 0));
        }
    }

    #[test]
    fn the_largest_packet_is_made_and_a_larger_one_is_not() {
        let largest = |last| {
            let mut parts: Vec<_> = (0..44).map(|i| v4(1, i * 1480, 1480, true)).collect();
            parts.push(v4(1, 44 * 1480, last, false));
            take(&mut Reassembly::default(), &parts)
        };
        assert_eq!(largest(65515 - 44 * 1480)[0].len(), 65535);
        assert!(largest(65516 - 44 * 1480).is_empty());
        // The ping of death.
        assert!(take(&mut Reassembly::default(), &[v4(1, 65528, 100, false)]).is_empty());
    }

    #[test]
    fn fragments_of_different_datagrams_do_not_mix() {
        let mut reassembly = Reassembly::default();
        let mut other = v4(1, 8, 8, false);
        other[12] = 11;
        let mut icmp = v4(1, 8, 8, false);
        icmp[9] = 1;
        assert!(take(&mut reassembly, &[v4(1, 0, 8, true), v4(2, 8, 8, false), other, icmp]).is_empty());
        assert_eq!(take(&mut reassembly, &[v4(1, 8, 8, false)]).len(), 1);
    }

    #[test]
    fn fragments_that_overlap_drop_all_of_the_datagram() {
        for bad in [
            v4(1, 0, 16, true),
            v4(1, 8, 8, true),
            v4(1, 16, 8, true),
            v4(1, 8, 24, true),
            // Teardrop: the end lies inside of what is there.
            v4(1, 8, 4, false),
        ] {
            let mut reassembly = Reassembly::default();
            let first = [v4(1, 0, 16, true), v4(1, 16, 16, true), bad.clone()];
            assert!(take(&mut reassembly, &first).is_empty());
            assert!(take(&mut reassembly, &[v4(1, 32, 8, false)]).is_empty(), "{bad:?}");
            assert_eq!(reassembly.bytes, 0);
        }
    }

    #[test]
    fn lengths_that_cannot_be_drop_the_datagram() {
        for bad in [
            v4(1, 8, 12, true),
            v4(1, 8, 0, true),
            v4(1, 8, 0, false),
            v4(1, 80, 8, true),
            v4(1, 16, 8, false),
            v4(1, 48, 8, false),
        ] {
            let mut reassembly = Reassembly::default();
            let made = take(&mut reassembly, &[v4(1, 32, 8, false), bad.clone(), v4(1, 0, 32, true)]);
            assert!(made.is_empty(), "{bad:?}");
        }
    }

    #[test]
    fn a_beginning_too_short_for_the_header_inside_drops_the_datagram() {
        let tcp = |len| {
            let mut parts = [v4(1, 0, len, true), v4(1, len, 8, false)];
            parts.iter_mut().for_each(|part| part[9] = protocol::TCP);
            take(&mut Reassembly::default(), &parts).len()
        };
        assert_eq!((tcp(8), tcp(16), tcp(24)), (0, 0, 1));
    }

    #[test]
    fn a_datagram_that_stays_incomplete_is_forgotten() {
        let mut reassembly = Reassembly::default();
        let start = Instant::now();
        assert_eq!(reassembly.packet(start, &v4(1, 0, 8, true)), None);
        assert_eq!(reassembly.packet(start + TIMEOUT, &v4(1, 8, 8, false)), None);
        assert_eq!(reassembly.waiting.len(), 1);
    }

    #[test]
    fn many_datagrams_and_many_holes_take_bounded_memory() {
        let mut reassembly = Reassembly::default();
        for id in 0..1000 {
            take(&mut reassembly, &[v4(id, 60000, 8, true)]);
            assert!(reassembly.waiting.len() <= MAX_DATAGRAMS && reassembly.bytes <= MAX_BYTES);
        }
        let holes: Vec<_> = (0..1000).map(|i| v4(5000, i * 16, 8, true)).collect();
        take(&mut reassembly, &holes);
        let last = reassembly.waiting.back().unwrap();
        assert!(last.odd && last.data.is_empty());
    }

    #[test]
    fn what_is_no_fragment_comes_out_as_it_went_in() {
        let mut reassembly = Reassembly::default();
        let mut packet = v4(1, 0, 30, false);
        let sum = !checksum::data(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(reassembly.packet(Instant::now(), &packet), Some(packet));
        let atomic = reassembly.packet(Instant::now(), &v6(1, 0, 30, false)).unwrap();
        assert_eq!(atomic[48..], bytes(30));
        assert!(reassembly.waiting.is_empty());
    }

    #[test]
    fn a_packet_that_is_cut_is_dropped() {
        for packet in [v4(1, 0, 24, true), v6(1, 0, 24, true)] {
            for len in 0..packet.len() {
                let mut reassembly = Reassembly::default();
                assert_eq!(reassembly.packet(Instant::now(), &packet[..len]), None);
                assert!(reassembly.waiting.is_empty());
            }
        }
    }

    proptest! {
        #[test]
        fn packets_of_any_kind_take_bounded_memory(
            packets in proptest::collection::vec(
                (0u16..4, 0usize..8191, 0usize..200, any::<bool>(), any::<bool>(), any::<(usize, u8)>()), 0..200)
        ) {
            let mut reassembly = Reassembly::default();
            for (id, offset, len, more, six, (at, flip)) in packets {
                let mut packet = if six { v6(id.into(), offset * 8, len, more) } else { v4(id, offset * 8, len, more) };
                let at = at % packet.len();
                packet[at] ^= flip;
                if let Some(whole) = reassembly.packet(Instant::now(), &packet) {
                    prop_assert!(whole.len() <= 40 + 65535);
                }
                let bytes: usize = reassembly.waiting.iter().map(|datagram| datagram.data.len()).sum();
                prop_assert_eq!(bytes, reassembly.bytes);
                prop_assert!(bytes <= MAX_BYTES && reassembly.waiting.len() <= MAX_DATAGRAMS);
            }
        }

        #[test]
        fn any_cut_and_order_makes_the_packet_again(
            cuts in proptest::collection::btree_set(1usize..400, 0..20),
            order in any::<u64>(),
            rest in 0usize..8,
        ) {
            let mut at = 0;
            let mut parts = Vec::new();
            for cut in cuts.iter().chain([&400]) {
                let last = *cut == 400;
                let end = cut * 8 + if last { rest } else { 0 };
                parts.push(v4(3, at, end - at, !last));
                at = end;
            }
            let n = parts.len();
            let mut seed = order;
            for i in (1..n).rev() {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                parts.swap(i, (seed >> 33) as usize % (i + 1));
            }
            let made = take(&mut Reassembly::default(), &parts);
            {
                prop_assert_eq!(made.len(), 1);
                prop_assert!(made[0][20..] == bytes(at));
            }
        }
    }
}
