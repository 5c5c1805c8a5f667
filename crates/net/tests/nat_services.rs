//! What the NAT does beside TCP, by frames: what a machine does in its first minute, and what a hostile one tries.
#![cfg(feature = "nat")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::nat::{Dial, HostDial, Nat, NatConfig, NatHandle, Protocol};
use freestone_net::{Endpoint, Frame, Offloads, Port, Received, Setup, VnetHeader};
use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, IpRepr, UdpPacket, UdpRepr,
};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GUEST: &str = "10.0.2.15:4000";
const GUEST_V6: &str = "[fec0::15]:4000";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// What was dialled; no protocol: ICMP.
type Dialled = (Option<Protocol>, SocketAddr);

/// Notes what is dialled. Reaches the host's loopback, and nothing else.
#[derive(Debug, Default, Clone)]
struct Noting(Arc<Mutex<Vec<Dialled>>>);

impl Noting {
    fn note(&self, protocol: Option<Protocol>, to: SocketAddr) -> io::Result<()> {
        self.0.lock().unwrap().push((protocol, to));
        if to.ip().is_loopback() { Ok(()) } else { Err(io::ErrorKind::HostUnreachable.into()) }
    }

    fn dialled(&self) -> Vec<Dialled> {
        self.0.lock().unwrap().clone()
    }
}

impl Dial for Noting {
    fn tcp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.note(Some(Protocol::Tcp), to).and_then(|()| HostDial.tcp(to))
    }
    fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.note(Some(Protocol::Udp), to).and_then(|()| HostDial.udp(to))
    }
    fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd> {
        self.note(None, SocketAddr::new(to, 0)).and_then(|()| HostDial.icmp(to))
    }
}

/// A machine that is made of frames.
struct Machine {
    endpoint: Box<dyn Endpoint>,
    handle: NatHandle,
    dial: Noting,
    mem: GuestMem,
    _nat: Nat,
}

impl Machine {
    fn new(change: impl FnOnce(&mut NatConfig)) -> Self {
        let mut config = NatConfig::default();
        change(&mut config);
        let dial = Noting::default();
        let mut nat = Nat::with_dial(config, Box::new(dial.clone())).unwrap();
        let setup = Setup { pairs: 1, receive: Offloads::empty() };
        let endpoint = nat.open(&setup).unwrap().pop().unwrap();
        Self { endpoint, handle: nat.handle(), dial, mem: GuestMem::anonymous(0x10_0000).unwrap(), _nat: nat }
    }

    fn send(&mut self, frame: &[u8]) {
        let view = self.mem.view();
        let slices =
            [(0x1000, 0..frame.len() / 2), (0x8_0000, frame.len() / 2..frame.len())].map(|(at, part)| {
                view.write_slice(&frame[part.clone()], GuestAddress(at)).unwrap();
                view.get_slice(GuestAddress(at), part.len()).unwrap()
            });
        self.endpoint.transmit(&VnetHeader::default(), Frame::new(&slices));
    }

    /// The frames that are there now.
    fn take(&mut self) -> Vec<Vec<u8>> {
        self.endpoint.flush();
        let mut frames = Vec::new();
        while self.endpoint.waiting().is_some() {
            let view = self.mem.view();
            let room = [view.get_slice(GuestAddress(0x2_0000), 0x1_2000).unwrap()];
            let Received::Frame(len, _) = self.endpoint.receive(Frame::new(&room)) else { break };
            let mut frame = vec![0; len];
            Frame::new(&room).read_at(0, &mut frame);
            frames.push(frame);
        }
        frames
    }

    /// The next datagram, which is waited for.
    fn datagram(&mut self) -> (SocketAddr, SocketAddr, Vec<u8>) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(got) = self.take().iter().find_map(|frame| datagram(frame)) {
                return got;
            }
            assert!(Instant::now() < end, "no datagram came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The UDP datagram in a frame, if there is one.
fn datagram(frame: &[u8]) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    let v4 = frame.ethertype() == EthernetProtocol::Ipv4;
    let (protocol, header) = if v4 { (9, 20) } else { (6, 40) };
    (frame.payload()[protocol] == 17).then_some(())?;
    let (ip, body) = frame.payload().split_at(header);
    let addr = |at: usize| -> IpAddr {
        if v4 {
            <[u8; 4]>::try_from(&ip[12 + at * 4..16 + at * 4]).unwrap().into()
        } else {
            <[u8; 16]>::try_from(&ip[8 + at * 16..24 + at * 16]).unwrap().into()
        }
    };
    let udp = UdpPacket::new_checked(body).unwrap();
    assert!(udp.verify_checksum(&addr(0).into(), &addr(1).into()));
    let (from, to) = (SocketAddr::new(addr(0), udp.src_port()), SocketAddr::new(addr(1), udp.dst_port()));
    Some((from, to, udp.payload().to_vec()))
}

/// A frame with a UDP datagram, made by somebody else.
fn udp(from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
    let (from, to, caps) = (at(from), at(to), ChecksumCapabilities::default());
    let udp = UdpRepr { src_port: from.port(), dst_port: to.port() };
    let ip = IpRepr::new(from.ip().into(), to.ip().into(), IpProtocol::Udp, 8 + payload.len(), 64);
    let ethernet = EthernetRepr {
        src_addr: EthernetAddress(MAC),
        dst_addr: EthernetAddress(if to.ip() == at("255.255.255.255:0").ip() {
            [0xFF; 6]
        } else {
            [0x52, 0x55, 0x0A, 0, 2, 2]
        }),
        ethertype: if from.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 },
    };
    let mut bytes = vec![0; 14 + ip.buffer_len()];
    let mut frame = EthernetFrame::new_unchecked(bytes.as_mut_slice());
    ethernet.emit(&mut frame);
    ip.emit(frame.payload_mut(), &caps);
    let mut packet = UdpPacket::new_unchecked(&mut frame.payload_mut()[ip.header_len()..]);
    let data = |room: &mut [u8]| room.copy_from_slice(payload);
    udp.emit(&mut packet, &from.ip().into(), &to.ip().into(), payload.len(), data, &caps);
    bytes
}

/// The IPv4 packet in `frame` as fragments.
fn fragments(frame: &[u8], size: usize) -> Vec<Vec<u8>> {
    let body = &frame[34..];
    let piece = |(index, data): (usize, &[u8])| {
        let offset = index * size;
        let more = offset + data.len() < body.len();
        let mut piece = [&frame[..34], data].concat();
        piece[16..18].copy_from_slice(&u16::try_from(20 + data.len()).unwrap().to_be_bytes());
        let field = u16::try_from(offset / 8).unwrap() | if more { 0x2000 } else { 0 };
        piece[20..22].copy_from_slice(&field.to_be_bytes());
        right_header(&mut piece);
        piece
    };
    body.chunks(size).enumerate().map(piece).collect()
}

/// Makes the checksum of the IPv4 header right.
fn right_header(frame: &mut [u8]) {
    frame[24..26].copy_from_slice(&[0; 2]);
    let sum = !smoltcp::wire::checksum::data(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
}

fn discover() -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4];
    message.resize(28, 0);
    message.extend_from_slice(&MAC);
    message.resize(236, 0);
    message.extend_from_slice(&[99, 130, 83, 99, 53, 1, 1, 255]);
    message
}

const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\x03org\0\0\x01\0\x01";

#[test]
fn the_first_minute_of_a_machine() {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut machine = Machine::new(|config| config.name_servers = vec![resolver.local_addr().unwrap()]);
    machine.send(&udp("0.0.0.0:68", "255.255.255.255:67", &discover()));
    let (from, to, offer) = machine.datagram();
    assert_eq!((from, to), (at("10.0.2.2:67"), at("10.0.2.15:68")));
    assert_eq!(offer[16..20], [10, 0, 2, 15]);
    machine.send(&udp(GUEST, "10.0.2.3:53", QUERY));
    let mut buffer = [0; 2000];
    let (len, asks) = resolver.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..len], *QUERY);
    buffer[2] |= 0x80;
    resolver.send_to(&buffer[..len], asks).unwrap();
    assert_eq!(machine.datagram().0, at("10.0.2.3:53"));
    let to = format!("10.0.2.2:{}", server.local_addr().unwrap().port());
    machine.send(&udp(GUEST, &to, b"hello"));
    let (len, peer) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"hello");
    server.send_to(b"answer", peer).unwrap();
    assert_eq!(machine.datagram(), (at(&to), at(GUEST), b"answer".to_vec()));
    let counts = machine.handle.counts();
    assert_eq!((counts.dhcp_answers, counts.dns_queries, counts.udp_opened), (1, 1, 1));
}

#[test]
fn a_datagram_in_fragments_reaches_the_host_whole() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut machine = Machine::new(|_| {});
    let data: Vec<u8> = (0..=255).cycle().take(60_000).collect();
    let to = format!("10.0.2.2:{}", server.local_addr().unwrap().port());
    for fragment in fragments(&udp(GUEST, &to, &data), 1480).iter().rev() {
        machine.send(fragment);
    }
    let mut buffer = vec![0; 1 << 16];
    let (len, _) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..len] == data);
    assert_eq!(machine.handle.counts().fragments, 41);
}

#[test]
fn a_forward_of_udp_comes_and_goes_while_the_nat_works() {
    let mut machine = Machine::new(|config| config.restrict = true);
    let forward = machine.handle.clone();
    let made = std::thread::spawn(move || {
        let one = forward.add_forward(&"udp:127.0.0.1:0-:7".parse().unwrap()).unwrap();
        let two = forward.add_forward(&"udp:127.0.0.1:0-:7".parse().unwrap()).unwrap();
        forward.remove_forward(Protocol::Udp, two.host).unwrap();
        one
    });
    while !made.is_finished() {
        machine.take();
    }
    let host = made.join().unwrap().host;
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.send_to(b"hello", host).unwrap();
    let (from, to, payload) = machine.datagram();
    assert_eq!((to, payload.as_slice()), (at("10.0.2.15:7"), &b"hello"[..]));
    machine.send(&udp("10.0.2.15:7", &from.to_string(), b"answer"));
    machine.take();
    let mut buffer = [0; 16];
    assert_eq!(peer.recv_from(&mut buffer).unwrap(), (6, host));
    assert!(machine.dial.dialled().is_empty());
}

#[test]
fn what_a_hostile_machine_sends_reaches_nobody_and_is_counted() {
    let mut machine = Machine::new(|_| {});
    let good = udp(GUEST, "192.0.2.1:9", b"0123456789abcdef0123456789abcdef");
    let bad = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        frame
    };
    // Headers that lie, checksums that are wrong.
    for frame in [
        bad(&|frame| frame[24] ^= 1),
        bad(&|frame| frame[40] ^= 1),
        bad(&|frame| frame[50] ^= 1),
        bad(&|frame| frame.truncate(40)),
        bad(&|frame| frame[17] += 1),
        bad(&|frame| frame[39] += 1),
        bad(&|frame| frame[39] = 7),
        bad(&|frame| frame[14] = 0x44),
        bad(&|frame| frame[14] = 0x4F),
        bad(&|frame| frame.truncate(10)),
        Vec::new(),
    ] {
        machine.send(&frame);
    }
    assert_eq!(machine.handle.counts().malformed, 11);
    // Senders that are somebody else.
    for from in ["192.0.2.7:1", "10.0.2.2:1", "10.0.2.255:1", "127.0.0.1:1", "224.0.0.1:1"] {
        machine.send(&udp(from, "192.0.2.1:9", b"x"));
    }
    assert_eq!(machine.handle.counts().spoofed, 5);
    // Fragments that overlap.
    let mut parts = fragments(&good, 16);
    let mut overlap = parts[0].clone();
    overlap[20..22].copy_from_slice(&0x2001u16.to_be_bytes());
    right_header(&mut overlap);
    parts.insert(1, overlap);
    parts.iter().for_each(|part| machine.send(part));
    // DHCP and DNS that are none.
    machine.send(&udp("0.0.0.0:68", "255.255.255.255:67", b"garbage"));
    machine.send(&udp(GUEST, "10.0.2.3:53", b"garbage"));
    assert_eq!((machine.handle.counts().malformed, machine.handle.counts().fragments), (13, 4));
    // Addresses of nobody and of too many.
    for to in
        ["0.0.0.0:9", "127.0.0.1:9", "224.0.0.251:5353", "240.0.0.1:0", "10.0.2.77:9", "255.255.255.255:9"]
    {
        machine.send(&udp(GUEST, to, b"x"));
    }
    for to in
        ["[::1]:9", "[::127.0.0.1]:9", "[::ffff:127.0.0.1]:9", "[2002:7f00:1::]:9", "[64:ff9b::127.0.0.1]:9"]
    {
        machine.send(&udp(GUEST_V6, to, b"x"));
    }
    machine.take();
    assert_eq!(machine.dial.dialled(), []);
    // And it works still.
    machine.send(&good);
    assert_eq!(machine.dial.dialled(), [(Some(Protocol::Udp), at("192.0.2.1:9"))]);
}

/// Frames from which stranger ones are made.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![
        udp("0.0.0.0:68", "255.255.255.255:67", &discover()),
        udp(GUEST, "10.0.2.3:53", QUERY),
        udp(GUEST_V6, "[fec0::3]:53", QUERY),
        udp(GUEST, "10.0.2.2:9", b"0123456789"),
        udp(GUEST, "192.0.2.1:9", &[7; 64]),
        udp(GUEST_V6, "[2001:db8::1]:9", b"0123456789"),
    ];
    seeds.extend(fragments(&seeds[4], 24));
    // Echo requests and TCP: whatever is behind the header.
    for protocol in [1, 6] {
        let mut frame = udp(GUEST, "10.0.2.2:9", b"0123456789abcdef");
        frame[23] = protocol;
        frame[34] = 8;
        right_header(&mut frame);
        seeds.push(frame);
    }
    let mut arp = [&[0xFF; 6][..], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC, &[10, 0, 2, 15]].concat();
    arp.extend_from_slice(&[0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    seeds.push(arp);
    seeds
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_frames_breaks_it_or_reaches_what_is_denied(
        frames in proptest::collection::vec(
            (any::<prop::sample::Index>(), proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
             any::<bool>(), proptest::collection::vec(any::<u8>(), 0..40)),
            1..60,
        ),
    ) {
        let seeds = seeds();
        let mut machine = Machine::new(|config| {
            config.policy.rules = vec!["deny 192.0.0.0/8".parse().unwrap(), "deny 127.0.0.0/8".parse().unwrap()];
            config.policy.rules.push("deny ::/0".parse().unwrap());
            config.name_servers = vec![at("198.51.100.53:53")];
            config.limits.udp_flows = 16;
        });
        for (seed, changes, right, tail) in frames {
            let mut frame = seed.get(&seeds).clone();
            for (place, value) in changes {
                let place = place.index(frame.len());
                frame[place] = value;
            }
            frame.extend_from_slice(&tail);
            if right && frame.len() >= 34 {
                right_header(&mut frame);
            }
            machine.send(&frame);
            prop_assert!(machine.take().len() <= 8);
        }
        let config = machine.handle.config();
        for (protocol, to) in machine.dial.dialled() {
            let allowed = match protocol {
                Some(protocol) => config.policy.allows(protocol, to),
                None => config.policy.allows_icmp(to.ip()),
            };
            prop_assert!(allowed || to == at("198.51.100.53:53"), "{}", to);
        }
    }
}
