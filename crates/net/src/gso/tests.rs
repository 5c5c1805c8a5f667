#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "tests")]

use std::net::{Ipv4Addr, Ipv6Addr};

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use proptest::prelude::*;
use smoltcp::wire::{
    IpAddress, Ipv4Packet, Ipv6ExtHeader, Ipv6FragmentHeader, Ipv6Packet, TcpPacket, UdpPacket,
};

use super::*;

const SOURCE4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const TARGET4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const SOURCE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const TARGET6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0xFFFF, 1, 2);

/// A frame to cut, and where its parts are.
struct Whole {
    bytes: Vec<u8>,
    l3: usize,
    l4: usize,
    /// The data behind all headers.
    data: usize,
}

fn data(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// A frame with `transport` as the header of `protocol`; `tags` VLANs, `extensions` of IPv6.
fn whole(ip: Ip, protocol: u8, transport: &[u8], len: usize, tags: usize, extensions: usize) -> Whole {
    let mut bytes = vec![0x52; 12];
    for tag in 0..tags {
        bytes.extend([0x81, 0, 0, tag as u8 + 1]);
    }
    let l3 = bytes.len() + 2;
    if ip == Ip::V4 {
        bytes.extend([8, 0, 0x45, 0, 0, 0, 0xFF, 0xFE, 0x40, 0, 64, protocol, 0, 0]);
        bytes.extend(SOURCE4.octets());
        bytes.extend(TARGET4.octets());
    } else {
        let first = if extensions > 0 { 60 } else { protocol };
        bytes.extend([0x86, 0xDD, 0x60, 0, 0, 0, 0, 0, first, 64]);
        bytes.extend(SOURCE6.octets());
        bytes.extend(TARGET6.octets());
        for extension in 0..extensions {
            let next = if extension + 1 == extensions { protocol } else { 60 };
            bytes.extend([next, 0, 1, 4, 0, 0, 0, 0]);
        }
    }
    let l4 = bytes.len();
    bytes.extend(transport);
    let start = bytes.len();
    bytes.extend(data(len));
    Whole { bytes, l3, l4, data: start }
}

fn tcp(ip: Ip, len: usize, tags: usize, extensions: usize, flags: u8) -> Whole {
    let header = [
        0x12, 0x34, 0, 80, 0xFF, 0xFF, 0xFF, 0, 1, 2, 3, 4, 0x80, flags, 1, 0, 0, 0, 0, 0, 1, 1, 8, 10, 1, 2,
        3, 4, 5, 6, 7, 8,
    ];
    whole(ip, TCP, &header, len, tags, extensions)
}

fn udp(ip: Ip, len: usize, tags: usize) -> Whole {
    whole(ip, UDP, &[0x12, 0x34, 0, 53, 0, 0, 0, 0], len, tags, 0)
}

fn header(whole: &Whole, gso: Gso, gso_size: u16) -> VnetHeader {
    let offset = if matches!(gso, Gso::Tcp4 | Gso::Tcp6) { 16 } else { 6 };
    VnetHeader {
        checksum: Some((whole.l4 as u16, offset)),
        gso: Some(gso),
        gso_size,
        hdr_len: whole.data as u16,
        ..VnetHeader::default()
    }
}

/// The frames that become of `bytes`, which lie in guest memory in two pieces.
fn cut(header: &VnetHeader, bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mem = GuestMem::anonymous(0x4_0000).unwrap();
    let view = mem.view();
    let middle = bytes.len() / 3;
    let slices = [(0, middle), (0x2_0000, bytes.len() - middle)]
        .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
    let frame = Frame::new(&slices);
    assert_eq!(frame.write_at(0, bytes), bytes.len());
    let mut frames = Vec::new();
    let expected = Cutter::new(header, &frame).map(|cutter| cutter.remaining());
    let count = finish(header, &frame, |segment| frames.push(segment.to_vec()));
    assert_eq!(count, expected, "the number is known before");
    assert_eq!(count.unwrap_or(0), frames.len());
    count.map(|_| frames)
}

/// Checks the IP header as smoltcp does, and returns its payload and addresses.
fn open_ip(ip: Ip, packet: &[u8]) -> (Vec<u8>, IpAddress, IpAddress) {
    if ip == Ip::V4 {
        let packet = Ipv4Packet::new_checked(packet).unwrap();
        assert!(packet.verify_checksum());
        assert_eq!(usize::from(packet.total_len()), packet.clone().into_inner().len());
        (packet.payload().to_vec(), packet.src_addr().into(), packet.dst_addr().into())
    } else {
        let packet = Ipv6Packet::new_checked(packet).unwrap();
        assert_eq!(packet.total_len(), packet.clone().into_inner().len());
        let (mut next, mut payload) = (u8::from(packet.next_header()), packet.payload());
        while next == 60 {
            let extension = Ipv6ExtHeader::new_checked(payload).unwrap();
            next = extension.next_header().into();
            payload = &payload[8..];
        }
        (payload.to_vec(), packet.src_addr().into(), packet.dst_addr().into())
    }
}

proptest! {
    #[test]
    fn segments_of_tcp_are_the_whole_again(
        v4: bool, len in 0usize..20_000, size in 64u16..9000, tags in 0usize..3, extensions in 0usize..3, flags: u8
    ) {
        let ip = if v4 { Ip::V4 } else { Ip::V6 };
        let whole = tcp(ip, len, tags, extensions, flags);
        let gso = if v4 { Gso::Tcp4 } else { Gso::Tcp6 };
        let frames = cut(&header(&whole, gso, size), &whole.bytes).unwrap();
        prop_assert_eq!(frames.len(), len.div_ceil(usize::from(size)).max(1));
        let mut all: Vec<u8> = Vec::new();
        for (i, frame) in frames.iter().enumerate() {
            prop_assert_eq!(&frame[..whole.l3], &whole.bytes[..whole.l3]);
            let (payload, source, target) = open_ip(ip, &frame[whole.l3..]);
            if v4 {
                let id = Ipv4Packet::new_unchecked(&frame[whole.l3..]).ident();
                prop_assert_eq!(id, 0xFFFEu16.wrapping_add(i as u16));
            }
            let segment = TcpPacket::new_checked(&payload[..]).unwrap();
            prop_assert!(segment.verify_checksum(&source, &target));
            let sequence = 0xFFFF_FF00u32.wrapping_add(all.len() as u32);
            prop_assert_eq!(segment.seq_number().0 as u32, sequence);
            let mut expected = flags;
            if i > 0 {
                expected &= !0x80;
            }
            if i + 1 < frames.len() {
                expected &= !0x09;
            }
            prop_assert_eq!(payload[13], expected);
            prop_assert_eq!(&payload[20..32], &whole.bytes[whole.l4 + 20..whole.data]);
            prop_assert!(segment.payload().len() <= usize::from(size));
            all.extend(segment.payload());
        }
        prop_assert_eq!(all, data(len));
    }

    #[test]
    fn datagrams_of_uso_are_the_whole_again(v4: bool, len in 0usize..20_000, size in 64u16..9000, tags in 0usize..3) {
        let ip = if v4 { Ip::V4 } else { Ip::V6 };
        let whole = udp(ip, len, tags);
        let frames = cut(&header(&whole, Gso::Udp, size), &whole.bytes).unwrap();
        let mut all: Vec<u8> = Vec::new();
        for frame in &frames {
            let (payload, source, target) = open_ip(ip, &frame[whole.l3..]);
            let datagram = UdpPacket::new_checked(&payload[..]).unwrap();
            prop_assert!(datagram.verify_checksum(&source, &target));
            prop_assert_ne!(datagram.checksum(), 0);
            prop_assert_eq!(usize::from(datagram.len()), payload.len());
            all.extend(datagram.payload());
        }
        prop_assert_eq!(all, data(len));
    }

    #[test]
    fn fragments_are_the_datagram_again(v4: bool, len in 0usize..20_000, size in 64u16..9000, tags in 0usize..3) {
        let ip = if v4 { Ip::V4 } else { Ip::V6 };
        let whole = udp(ip, len, tags);
        let frames = cut(&header(&whole, Gso::UdpFragments, size), &whole.bytes).unwrap();
        prop_assert_eq!(frames.len(), (len + 8).div_ceil(usize::from(size & !7)));
        let mut datagram: Vec<u8> = Vec::new();
        let mut ids = Vec::new();
        let (mut source, mut target) = (SOURCE4.into(), TARGET4.into());
        for (i, frame) in frames.iter().enumerate() {
            let more = i + 1 < frames.len();
            let (mut payload, from, to) = open_ip(ip, &frame[whole.l3..]);
            (source, target) = (from, to);
            if v4 {
                let packet = Ipv4Packet::new_unchecked(&frame[whole.l3..]);
                prop_assert_eq!(packet.more_frags(), more);
                prop_assert_eq!(usize::from(packet.frag_offset()), datagram.len());
                ids.push(u32::from(packet.ident()));
            } else if frames.len() > 1 {
                let packet = Ipv6Packet::new_unchecked(&frame[whole.l3..]);
                prop_assert_eq!(u8::from(packet.next_header()), 44);
                prop_assert_eq!(payload[0], UDP);
                let fragment = Ipv6FragmentHeader::new_checked(&payload[2..]).unwrap();
                prop_assert_eq!(fragment.more_frags(), more);
                prop_assert_eq!(usize::from(fragment.frag_offset()) * 8, datagram.len());
                ids.push(fragment.ident());
                payload.drain(..8);
            }
            datagram.extend(payload);
        }
        ids.dedup();
        prop_assert!(ids.len() <= 1);
        let datagram = UdpPacket::new_checked(&datagram[..]).unwrap();
        prop_assert!(datagram.verify_checksum(&source, &target));
        prop_assert_eq!(datagram.payload(), data(len));
    }

    #[test]
    fn a_checksum_is_filled_in_as_the_field_and_the_rest_say(len in 0usize..3000, v4: bool, tags in 0usize..3) {
        let ip = if v4 { Ip::V4 } else { Ip::V6 };
        let mut whole = udp(ip, len, tags);
        let (source, target): (Vec<u8>, Vec<u8>) = if v4 {
            (SOURCE4.octets().into(), TARGET4.octets().into())
        } else {
            (SOURCE6.octets().into(), TARGET6.octets().into())
        };
        let pseudo = Checksum::pseudo(&source, &target, UDP, len as u32 + 8).sum().to_be_bytes();
        whole.bytes[whole.l4 + 4..][..2].copy_from_slice(&(len as u16 + 8).to_be_bytes());
        whole.bytes[whole.l4 + 6..][..2].copy_from_slice(&pseudo);
        let header = VnetHeader { checksum: Some((whole.l4 as u16, 6)), ..VnetHeader::default() };
        let frames = cut(&header, &whole.bytes).unwrap();
        prop_assert_eq!(frames.len(), 1);
        let datagram = UdpPacket::new_checked(&frames[0][whole.l4..]).unwrap();
        let (source, target): (IpAddress, IpAddress) =
            if v4 { (SOURCE4.into(), TARGET4.into()) } else { (SOURCE6.into(), TARGET6.into()) };
        prop_assert!(datagram.verify_checksum(&source, &target));
        prop_assert_eq!(datagram.payload(), data(len));
    }

    #[test]
    fn nonsense_is_refused_or_bounded(
        bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        shape in 0usize..4, flip in 0usize..100, value: u8,
        raw: [u8; 10], kind in 0u8..6
    ) {
        // Pure noise, or a good frame with one wrong byte in its headers.
        let mut bytes = match shape {
            0 => bytes,
            1 => tcp(Ip::V4, bytes.len(), 1, 0, 0).bytes,
            2 => tcp(Ip::V6, bytes.len(), 0, 2, 0).bytes,
            _ => udp(Ip::V6, bytes.len(), 0).bytes,
        };
        if let Some(byte) = bytes.get_mut(flip) {
            *byte = value;
        }
        let mut raw = raw;
        raw[1] = kind;
        if let Some(header) = VnetHeader::from_bytes(raw)
            && let Some(frames) = cut(&header, &bytes)
        {
            prop_assert!(frames.len() <= MAX_SEGMENTS);
            prop_assert!(frames.iter().all(|frame| frame.len() <= bytes.len() + 8));
        }
    }
}

#[test]
fn a_frame_with_nothing_undone_stays_as_it_is() {
    let whole = tcp(Ip::V4, 100, 0, 0, 0);
    assert_eq!(cut(&VnetHeader::default(), &whole.bytes).unwrap(), [whole.bytes]);
    assert_eq!(cut(&VnetHeader::default(), &[]).unwrap(), [Vec::<u8>::new()]);
}

#[test]
fn a_checksum_outside_of_the_frame_is_refused() {
    let whole = tcp(Ip::V4, 0, 0, 0, 0);
    let len = whole.bytes.len() as u16;
    for (start, offset) in [(len, 0), (len - 1, 0), (0, len - 1), (65535, 65535), (65535, 0), (10, 65535)] {
        let header = VnetHeader { checksum: Some((start, offset)), ..VnetHeader::default() };
        assert_eq!(cut(&header, &whole.bytes), None, "{start} {offset}");
    }
    let last = VnetHeader { checksum: Some((len - 2, 0)), ..VnetHeader::default() };
    assert_eq!(cut(&last, &whole.bytes).map(|frames| frames.len()), Some(1));
}

#[test]
fn sizes_that_make_too_many_segments_or_none_are_refused() {
    let whole = tcp(Ip::V4, 60_000, 0, 0, 0);
    for size in [0, 1, 58] {
        assert_eq!(cut(&header(&whole, Gso::Tcp4, size), &whole.bytes), None, "{size}");
    }
    assert_eq!(cut(&header(&whole, Gso::Tcp4, 59), &whole.bytes).unwrap().len(), 1017);
    let whole = udp(Ip::V4, 60_000, 0);
    for size in [0, 1, 7, 8, 56] {
        assert_eq!(cut(&header(&whole, Gso::UdpFragments, size), &whole.bytes), None, "{size}");
    }
}

#[test]
fn a_kind_that_is_not_the_one_of_the_frame_is_refused() {
    let whole4 = tcp(Ip::V4, 5000, 0, 0, 0);
    let whole6 = tcp(Ip::V6, 5000, 0, 0, 0);
    let datagram = udp(Ip::V4, 5000, 0);
    let refused = |whole: &Whole, gso| cut(&header(whole, gso, 1000), &whole.bytes).is_none();
    assert!(refused(&whole4, Gso::Tcp6) && refused(&whole4, Gso::Udp) && refused(&whole4, Gso::UdpFragments));
    assert!(refused(&whole6, Gso::Tcp4) && refused(&whole6, Gso::Udp));
    assert!(refused(&datagram, Gso::Tcp4) && refused(&datagram, Gso::Tcp6));
    let mut elsewhere = header(&whole4, Gso::Tcp4, 1000);
    elsewhere.checksum = Some((whole4.l3 as u16, 10));
    assert_eq!(cut(&elsewhere, &whole4.bytes), None);
}

#[test]
fn fragments_and_routing_headers_are_not_cut() {
    let mut whole = tcp(Ip::V4, 5000, 0, 0, 0);
    whole.bytes[whole.l3 + 6] |= 0x20;
    assert_eq!(cut(&header(&whole, Gso::Tcp4, 1000), &whole.bytes), None);
    let mut whole = tcp(Ip::V6, 5000, 0, 1, 0);
    for extension in [43, 44, 51, 59] {
        whole.bytes[whole.l3 + 6] = extension;
        assert_eq!(cut(&header(&whole, Gso::Tcp6, 1000), &whole.bytes), None, "{extension}");
    }
}

#[test]
fn a_udp_checksum_that_was_never_wanted_stays_away() {
    let whole = udp(Ip::V4, 5000, 0);
    let mut header = header(&whole, Gso::Udp, 1000);
    header.checksum = None;
    for frame in cut(&header, &whole.bytes).unwrap() {
        assert_eq!(&frame[whole.l4 + 6..][..2], [0, 0]);
    }
}

#[test]
fn a_cutter_waits_and_a_segment_goes_to_where_there_is_room() {
    let mem = GuestMem::anonymous(0x2_0000).unwrap();
    let view = mem.view();
    let whole = tcp(Ip::V4, 2500, 0, 0, 0);
    let slices = [view.get_slice(GuestAddress(0), whole.bytes.len()).unwrap()];
    let frame = Frame::new(&slices);
    frame.write_at(0, &whole.bytes);
    let mut cutter = Cutter::new(&header(&whole, Gso::Tcp4, 1000), &frame).unwrap();
    let mut left = Vec::new();
    while let Some(segment) = cutter.segment(&frame) {
        let bytes = segment.to_vec();
        assert_eq!(cutter.segment(&frame).unwrap().to_vec(), bytes);
        let room = [(0x1_0000, 40), (0x1_8000, 5000)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let room = Frame::new(&room);
        assert_eq!(cutter.segment(&frame).unwrap().copy_to(&room), bytes.len());
        let mut copied = vec![0; bytes.len()];
        room.read_at(0, &mut copied);
        assert_eq!(copied, bytes);
        left.push(cutter.remaining());
        cutter.advance();
    }
    assert_eq!(left, [3, 2, 1]);
    assert_eq!(cutter.remaining(), 0);
}
