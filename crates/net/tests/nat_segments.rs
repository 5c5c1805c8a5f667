//! Single segments by hand: what no well-behaved stack would send, and what large segments look like.
#![cfg(feature = "nat")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod guest;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use freestone_net::nat::{Nat, NatConfig, NatHandle};
use freestone_net::{Gso, Offloads, Port, VnetHeader};
use guest::{DEADLINE, Link, MAC, pattern};
use proptest::prelude::*;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0A, 0, 2, 2];
const LARGE: Offloads = Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6);
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Adds up 16-bit words.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xFFFF {
        sum = (sum >> 16) + (sum & 0xFFFF);
    }
    u16::try_from(sum).unwrap()
}

/// A segment as the test sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    data: Vec<u8>,
}

/// A frame with a segment; its checksum is right.
fn frame(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), segment: &Segment, options: &[u8]) -> Vec<u8> {
    let mut tcp = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    tcp.extend(segment.seq.to_be_bytes());
    tcp.extend(segment.ack.to_be_bytes());
    tcp.extend([(u8::try_from(20 + options.len()).unwrap() / 4) << 4, segment.flags]);
    tcp.extend(segment.window.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(options);
    tcp.extend(&segment.data);
    let pseudo = sum(&from.0.octets()) + sum(&to.0.octets()) + 6 + u32::try_from(tcp.len()).unwrap();
    let checksum = !fold(pseudo + sum(&tcp));
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    let mut ip = vec![0x45, 0];
    ip.extend(u16::try_from(20 + tcp.len()).unwrap().to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    ip.extend(from.0.octets());
    ip.extend(to.0.octets());
    let checksum = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&GATEWAY_MAC[..], &MAC, &[8, 0], &ip, &tcp].concat()
}

/// A machine that sends what the test says.
struct Raw {
    link: Link,
    nat: Nat,
    handle: NatHandle,
    port: u16,
    host: Option<TcpStream>,
    /// What it sends next, and what it expects next.
    nxt: u32,
    expects: u32,
}

impl Raw {
    fn new(config: NatConfig, receive: Offloads) -> Self {
        let mut nat = Nat::new(config).unwrap();
        let link = Link::new(&mut nat, receive);
        Self { link, handle: nat.handle(), nat, port: 0, host: None, nxt: 1000, expects: 0 }
    }

    /// A machine with a connection to the host.
    fn connected(receive: Offloads) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut raw = Self::new(NatConfig::default(), receive);
        raw.port = listener.local_addr().unwrap().port();
        let syn = Segment { seq: 999, ack: 0, flags: SYN, window: 65535, data: Vec::new() };
        // Largest segment 1460, windows shifted by 3.
        raw.put(&frame((GUEST, 4000), (GATEWAY, raw.port), &syn, &[2, 4, 5, 0xB4, 1, 3, 3, 3]));
        let answer = raw.next();
        assert_eq!((answer.flags, answer.ack), (SYN | ACK, 1000));
        raw.expects = answer.seq.wrapping_add(1);
        raw.send(ACK, 0, b"");
        let (host, _) = listener.accept().unwrap();
        raw.host = Some(host);
        assert_eq!(raw.quiet(), []);
        raw
    }

    fn put(&mut self, frame: &[u8]) {
        self.link.send(&VnetHeader::default(), frame);
        self.link.endpoint.flush();
    }

    /// Sends a segment `offset` bytes away from where it should be.
    fn send(&mut self, flags: u8, offset: i32, data: &[u8]) {
        let seq = self.nxt.wrapping_add_signed(offset);
        let segment = Segment { seq, ack: self.expects, flags, window: 8000, data: data.to_vec() };
        self.put(&frame((GUEST, 4000), (GATEWAY, self.port), &segment, &[]));
    }

    /// The next segment for the machine, if one comes now.
    fn poll(&mut self) -> Option<Segment> {
        self.link.endpoint.flush();
        // The router introduces itself now and then, by IPv6.
        let ipv4 = |(frame, _): &(Vec<u8>, _)| frame[12..14] == [8, 0];
        let (frame, header) = std::iter::from_fn(|| self.link.take()).find(ipv4)?;
        let tcp = &frame[34..];
        if header.checksum.is_none() {
            let pseudo = sum(&frame[26..34]) + 6 + u32::try_from(tcp.len()).unwrap();
            assert_eq!(fold(pseudo + sum(tcp)), 0xFFFF, "checksum");
        }
        let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
        let window = u16::from_be_bytes([tcp[14], tcp[15]]);
        let data = tcp[usize::from(tcp[12] >> 4) * 4..].to_vec();
        Some(Segment { seq: word(4), ack: word(8), flags: tcp[13], window, data })
    }

    fn next(&mut self) -> Segment {
        let start = Instant::now();
        loop {
            if let Some(segment) = self.poll() {
                return segment;
            }
            assert!(start.elapsed() < DEADLINE, "{:?}", self.handle.counts());
            self.link.wait(Duration::from_millis(5));
        }
    }

    /// What comes without waiting for long.
    fn quiet(&mut self) -> Vec<Segment> {
        self.link.wait(Duration::from_millis(5));
        std::iter::from_fn(|| self.poll()).collect()
    }

    fn host(&mut self) -> &mut TcpStream {
        self.host.as_mut().unwrap()
    }

    fn host_reads(&mut self, want: &[u8]) {
        let mut got = vec![0; want.len()];
        self.host().read_exact(&mut got).unwrap();
        assert!(got == want);
    }
}

#[test]
fn a_large_segment_of_the_machine_is_taken_whole_and_answered_once() {
    let mut raw = Raw::connected(Offloads::empty());
    let data = pattern(60_000);
    let segment = Segment { seq: 1000, ack: raw.expects, flags: ACK, window: 8000, data: data.clone() };
    let mut bytes = frame((GUEST, 4000), (GATEWAY, raw.port), &segment, &[]);
    // Its checksum is left undone.
    bytes[50..52].copy_from_slice(&[0x12, 0x34]);
    let header = VnetHeader {
        checksum: Some((34, 16)),
        gso: Some(Gso::Tcp4),
        gso_size: 1460,
        hdr_len: 54,
        ..VnetHeader::default()
    };
    raw.link.send(&header, &bytes);
    raw.host_reads(&data);
    assert_eq!(raw.next().ack, 61_000);
    assert_eq!(raw.quiet(), []);
}

#[test]
fn data_of_the_host_comes_in_segments_as_large_as_the_machine_takes() {
    let mut raw = Raw::connected(LARGE);
    let data = pattern(50_000);
    raw.host().write_all(&data).unwrap();
    let start = Instant::now();
    let mut got = Vec::new();
    raw.link.got.clear();
    while got.len() < data.len() && start.elapsed() < DEADLINE {
        let segment = raw.next();
        assert_eq!(segment.seq, raw.expects);
        raw.expects = raw.expects.wrapping_add(u32::try_from(segment.data.len()).unwrap());
        got.extend(segment.data);
        raw.send(ACK, 0, b"");
    }
    assert!(got == data);
    for (len, header) in &raw.link.got {
        assert_eq!(header.checksum, Some((34, 16)));
        if len - 54 > 1460 {
            assert_eq!((header.gso, header.gso_size, header.hdr_len), (Some(Gso::Tcp4), 1460, 54));
        }
    }
    assert!(raw.link.got.iter().any(|(_, header)| header.gso.is_some()), "{:?}", raw.link.got);
}

#[test]
fn without_offloads_segments_are_small_and_complete() {
    let mut raw = Raw::connected(Offloads::empty());
    raw.host().write_all(&pattern(10_000)).unwrap();
    let mut got = Vec::new();
    while got.len() < 10_000 {
        let segment = raw.next();
        assert!(segment.data.len() <= 1460);
        got.extend(segment.data);
    }
    assert!(got == pattern(10_000));
}

#[test]
fn a_machine_that_allows_less_while_it_is_open_gets_small_segments() {
    let mut raw = Raw::connected(LARGE);
    raw.link.receive = Offloads::empty();
    raw.nat.set_receive(Offloads::empty()).unwrap();
    let data = pattern(8 * 1460);
    raw.host().write_all(&data).unwrap();
    let mut got = Vec::new();
    while got.len() < data.len() {
        let segment = raw.next();
        assert!(segment.data.len() <= 1460);
        raw.expects = raw.expects.wrapping_add(u32::try_from(segment.data.len()).unwrap());
        got.extend(segment.data);
        raw.send(ACK, 0, b"");
    }
    assert!(got == data);
}

#[test]
fn what_was_seen_before_is_left_out_of_a_segment() {
    let mut raw = Raw::connected(Offloads::empty());
    raw.send(ACK, 0, b"abcd");
    raw.send(ACK, 2, b"cdef");
    raw.send(ACK, -1, b"zabcdefgh");
    raw.host_reads(b"abcd");
    // The second was cut, the third too.
    raw.host_reads(b"efgh");
    assert_eq!(raw.quiet().pop().unwrap().ack, 1008);
}

#[test]
fn a_segment_behind_a_gap_is_not_taken_and_the_gap_is_named() {
    let mut raw = Raw::connected(Offloads::empty());
    raw.send(ACK, 4, b"efgh");
    assert_eq!(raw.next().ack, 1000);
    raw.send(ACK, 0, b"abcd");
    assert_eq!(raw.next().ack, 1004);
    raw.send(ACK, 4, b"efgh");
    raw.host_reads(b"abcdefgh");
}

#[test]
fn a_wrong_checksum_is_dropped_and_counted() {
    let mut raw = Raw::connected(Offloads::empty());
    let segment = Segment { seq: 1000, ack: raw.expects, flags: ACK, window: 8000, data: b"x".to_vec() };
    let good = frame((GUEST, 4000), (GATEWAY, raw.port), &segment, &[]);
    for at in [24, 50, 54] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        raw.put(&bad);
    }
    assert_eq!(raw.handle.counts().malformed, 3);
    assert_eq!(raw.quiet(), []);
    raw.put(&good);
    raw.host_reads(b"x");
}

#[test]
fn a_sender_that_is_not_of_the_network_is_counted_and_not_heard() {
    let mut raw = Raw::connected(Offloads::empty());
    let segment = Segment { seq: 1000, ack: raw.expects, flags: ACK, window: 8000, data: b"x".to_vec() };
    for from in [[192, 0, 2, 1], [10, 0, 2, 2], [127, 0, 0, 1], [10, 0, 3, 15], [255; 4]] {
        raw.put(&frame((from.into(), 4000), (GATEWAY, raw.port), &segment, &[]));
    }
    assert_eq!(raw.handle.counts().spoofed, 5);
    assert_eq!(raw.quiet(), []);
}

#[test]
fn only_a_reset_with_the_right_number_resets() {
    let mut raw = Raw::connected(Offloads::empty());
    raw.send(RST, 1_000_000, b"");
    raw.send(RST, -1, b"");
    assert_eq!(raw.quiet(), []);
    raw.send(RST, 10, b"");
    assert_eq!((raw.next().ack, raw.handle.counts().tcp_reset), (1000, 0));
    raw.send(RST, 0, b"");
    assert_eq!(raw.handle.counts().tcp_reset, 1);
    assert!(raw.host().read(&mut [0]).is_err());
}

#[test]
fn a_syn_on_a_connection_is_answered_with_where_it_is() {
    let mut raw = Raw::connected(Offloads::empty());
    raw.send(SYN, 5, b"");
    let answer = raw.next();
    assert_eq!((answer.flags, answer.ack, answer.seq), (ACK, 1000, raw.expects));
    assert_eq!(raw.handle.counts().tcp_reset, 0);
}

#[test]
fn keepalive_and_window_probes_are_answered() {
    let mut raw = Raw::connected(Offloads::empty());
    for data in [&b""[..], b"x"] {
        raw.send(ACK, -1, data);
        let answer = raw.next();
        assert_eq!((answer.flags, answer.ack, answer.data.len()), (ACK, 1000, 0));
    }
}

#[test]
fn a_router_advertisement_comes_to_a_machine_that_says_nothing() {
    let is_advertisement =
        |frame: &[u8]| frame[12..14] == [0x86, 0xDD] && frame[20] == 58 && frame[54] == 134;
    let mut nat = Nat::new(NatConfig::default()).unwrap();
    for _ in 0..2 {
        // Plugged in, and plugged in again.
        let mut link = Link::new(&mut nat, Offloads::empty());
        let start = Instant::now();
        let mut frame = None;
        while frame.is_none() && start.elapsed() < DEADLINE {
            link.wait(DEADLINE);
            link.endpoint.flush();
            frame = link.take();
        }
        let (frame, _) = frame.unwrap();
        assert!(is_advertisement(&frame), "{frame:?}");
    }
}

#[test]
fn a_segment_of_no_connection_is_reset() {
    let mut raw = Raw::new(NatConfig::default(), Offloads::empty());
    raw.expects = 77;
    raw.send(ACK, 0, b"xy");
    let answer = raw.next();
    assert_eq!((answer.flags, answer.seq), (RST, 77));
    raw.send(FIN, 0, b"xy");
    let answer = raw.next();
    assert_eq!((answer.flags, answer.ack), (RST | ACK, 1003));
    raw.send(RST, 0, b"");
    assert_eq!(raw.quiet(), []);
}

#[test]
fn a_closed_window_of_the_machine_is_asked_for_until_it_opens() {
    let mut raw = Raw::connected(Offloads::empty());
    let closed = Segment { seq: 1000, ack: raw.expects, flags: ACK, window: 0, data: Vec::new() };
    raw.put(&frame((GUEST, 4000), (GATEWAY, raw.port), &closed, &[]));
    raw.host().write_all(b"x").unwrap();
    // The probe is one that the machine saw before.
    let probe = raw.next();
    assert_eq!((probe.data.len(), probe.seq), (0, raw.expects.wrapping_sub(1)));
    raw.put(&frame((GUEST, 4000), (GATEWAY, raw.port), &closed, &[]));
    raw.next();
    raw.send(ACK, 0, b"");
    assert_eq!(raw.next().data, b"x");
}

#[test]
fn three_equal_acknowledgements_bring_what_was_lost() {
    let mut raw = Raw::connected(Offloads::empty());
    raw.host().write_all(&pattern(8000)).unwrap();
    let first = raw.next();
    while raw.poll().is_some() {}
    for _ in 0..3 {
        raw.send(ACK, 0, b"");
    }
    assert_eq!(raw.next(), first);
    assert_eq!(raw.handle.counts().tcp_retransmitted, 1);
}

#[test]
fn fragments_of_a_segment_make_the_segment() {
    let mut raw = Raw::connected(Offloads::empty());
    let data = pattern(1000);
    let segment = Segment { seq: 1000, ack: raw.expects, flags: ACK, window: 8000, data: data.clone() };
    let whole = frame((GUEST, 4000), (GATEWAY, raw.port), &segment, &[]);
    let (ip, body) = (&whole[14..34], &whole[34..]);
    for (offset, part, more) in [(512, &body[512..], 0), (0, &body[..512], 0x20)] {
        let mut ip = ip.to_vec();
        ip[2..4].copy_from_slice(&u16::try_from(20 + part.len()).unwrap().to_be_bytes());
        ip[4..12].copy_from_slice(&[0, 9, more, u8::try_from(offset / 8).unwrap(), 64, 6, 0, 0]);
        let checksum = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        raw.put(&[&whole[..14], &ip, part].concat());
    }
    raw.host_reads(&data);
    assert_eq!(raw.handle.counts().fragments, 2);
}

#[test]
fn a_flood_of_connections_is_bounded() {
    let mut config = NatConfig::default();
    config.limits.tcp_flows = 50;
    config.limits.new_flows = 100;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut raw = Raw::new(config, Offloads::empty());
    for from in 1..=20_000 {
        let syn = Segment { seq: 5, ack: 0, flags: SYN, window: 100, data: Vec::new() };
        raw.put(&frame((GUEST, from), (GATEWAY, port), &syn, &[]));
    }
    assert!(raw.handle.counts().limited > 19_000);
    drop(raw.link);
    assert_eq!(raw.handle.flows().unwrap().len(), 50);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the machine sends on a connection: no panic, no more than it should.
    #[test]
    fn any_segments_are_survived(
        segments in prop::collection::vec(
            (any::<u8>(), prop_oneof![-5i32..5, any::<i32>()], any::<u32>(), any::<u16>(), 0usize..3000, 4000u16..4003),
            1..60,
        ),
        large in any::<bool>(),
    ) {
        let mut raw = Raw::connected(if large { LARGE } else { Offloads::empty() });
        raw.host().write_all(&pattern(20_000)).unwrap();
        raw.host().set_nonblocking(true).unwrap();
        for (flags, offset, ack, window, len, port) in segments {
            let ack = if ack % 2 == 0 { raw.expects.wrapping_add(ack % 4000) } else { ack };
            let seq = raw.nxt.wrapping_add_signed(offset);
            let segment = Segment { seq, ack, flags, window, data: vec![1; len] };
            raw.put(&frame((GUEST, port), (GATEWAY, raw.port), &segment, &[]));
            if let Some(got) = raw.poll() && got.flags & SYN == 0 {
                raw.nxt = got.ack;
            }
        }
        let (open, made) = (raw.handle.clone(), raw.handle.counts());
        drop(raw.link);
        prop_assert!(open.flows().unwrap().len() <= 3);
        prop_assert!(made.tcp_opened >= 1);
    }

    /// Whatever frames the machine sends: no panic.
    #[test]
    fn any_frames_are_survived(
        frames in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..200), 0usize..3, any::<[u8; 10]>()), 1..40),
    ) {
        let mut config = NatConfig::default();
        config.restrict = true;
        let mut raw = Raw::new(config, Offloads::empty());
        for (mut bytes, kind, header) in frames {
            let starts: [&[u8]; 3] = [&[0x08, 0x00, 0x45], &[0x86, 0xDD, 0x60], &[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0]];
            let start = [&GATEWAY_MAC[..], &MAC, starts[kind]].concat();
            bytes.splice(0..0, start);
            let header = VnetHeader::from_bytes(header).unwrap_or_default();
            raw.link.send(&header, &bytes);
            while raw.link.take().is_some() {}
            raw.link.endpoint.flush();
        }
    }
}
