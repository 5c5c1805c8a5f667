//! Frames of a guest that knows the protocols and does not keep to them.

use std::net::{Ipv4Addr, Ipv6Addr};

use freestone_net::{Gso, VnetHeader};

/// Random numbers: splitmix64.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// Less than `n`; 0 if `n` is.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % (n.max(1) as u64)).unwrap()
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }

    fn word(&mut self) -> u16 {
        self.next().to_le_bytes()[..2].try_into().map(u16::from_le_bytes).unwrap()
    }
}

/// A connection as the guest saw it last.
#[derive(Debug, Clone, Copy)]
struct Seen {
    seq: u32,
    ack: u32,
    server: Ipv4Addr,
    ports: (u16, u16),
}

pub struct Generator {
    pub random: Random,
    seen: Vec<Seen>,
}

const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0A, 0, 2, 2];
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |sum, pair| {
        sum + (u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
    })
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

impl Generator {
    pub fn new(seed: u64) -> Self {
        Self { random: Random::new(seed), seen: Vec::new() }
    }

    /// Looks at a frame of the NAT, so that later ones can go on with it.
    pub fn learn(&mut self, frame: &[u8]) {
        if frame.len() < 54 || frame[12..14] != [8, 0] || frame[14] != 0x45 || frame[23] != 6 {
            return;
        }
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let long = |at: usize| u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        let header = usize::from(frame[46] >> 4) * 4;
        let data = usize::from(word(16)).saturating_sub(20 + header);
        let flags = u32::from(frame[47] & 1) + u32::from(frame[47] >> 1 & 1);
        let seen = Seen {
            seq: long(42),
            ack: long(38).wrapping_add(u32::try_from(data).unwrap()).wrapping_add(flags),
            server: Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]),
            ports: (word(36), word(34)),
        };
        if self.seen.len() >= 50 {
            self.seen.remove(0);
        }
        self.seen.push(seen);
    }

    pub fn frame(&mut self) -> (VnetHeader, Vec<u8>) {
        let mut frame = Vec::new();
        let dst = if self.random.one_in(12) {
            self.random.pick(&[[0xFF; 6], [0x33, 0x33, 0, 0, 0, 1], GUEST_MAC])
        } else {
            GATEWAY_MAC
        };
        frame.extend(dst);
        frame.extend(if self.random.one_in(30) { [1; 6] } else { GUEST_MAC });
        match self.random.below(20) {
            0 => {
                let len = self.random.below(200);
                frame.extend(self.random.bytes(len));
            }
            1 => {
                frame.extend([8, 6]);
                frame.extend([0, 1, 8, 0, 6, 4, 0, self.random.pick(&[1, 2, 3])]);
                frame.extend(GUEST_MAC);
                frame.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2]);
                frame.push(self.random.pick(&[2, 3, 4, 15, 200]));
            }
            2..=13 => {
                frame.extend([8, 0]);
                let packet = self.ipv4();
                frame.extend(packet);
            }
            _ => {
                frame.extend([0x86, 0xDD]);
                let packet = self.ipv6();
                frame.extend(packet);
            }
        }
        self.spoil(&mut frame);
        (self.header(frame.len()), frame)
    }

    /// Now and then one more thing is wrong.
    fn spoil(&mut self, frame: &mut Vec<u8>) {
        if self.random.one_in(6) {
            for _ in 0..1 + self.random.below(3) {
                let at = self.random.below(frame.len().min(120));
                frame[at] ^= 1 << self.random.below(8);
            }
        }
        if self.random.one_in(12) {
            let len = self.random.below(frame.len() + 1);
            frame.truncate(len);
        }
        if self.random.one_in(20) {
            let len = self.random.below(60);
            frame.extend(self.random.bytes(len));
        }
    }

    fn header(&mut self, len: usize) -> VnetHeader {
        let mut header = VnetHeader::default();
        if self.random.one_in(3) {
            header.checksum = Some(self.random.pick(&[(34, 16), (34, 6), (54, 16), (54, 6)]));
        }
        if self.random.one_in(10) {
            header.checksum = Some((self.random.word(), self.random.word()));
        }
        if self.random.one_in(4) || len > 1600 {
            header.gso =
                Some(self.random.pick(&[Gso::Tcp4, Gso::Tcp4, Gso::Tcp6, Gso::UdpFragments, Gso::Udp]));
            header.gso_size = self.random.pick(&[1460, 1440, 536, 1, 0, 65535]);
            header.hdr_len = if self.random.one_in(4) { self.random.word() } else { 54 };
        }
        header.checksum_valid = self.random.one_in(4);
        header.ecn = self.random.one_in(20);
        header
    }

    fn server(&mut self) -> Ipv4Addr {
        match self.random.below(24) {
            0..=4 => Ipv4Addr::new(192, 0, 2, self.random.pick(&[0, 1, 2, 255])),
            5..=8 => Ipv4Addr::new(10, 0, 2, self.random.pick(&[2, 2, 2, 3, 4, 15, 255, 0])),
            9 => Ipv4Addr::LOCALHOST,
            10 => Ipv4Addr::new(127, 1, 2, 3),
            11 => Ipv4Addr::UNSPECIFIED,
            12 => Ipv4Addr::BROADCAST,
            13 => Ipv4Addr::new(224, 0, 0, 1),
            14 => Ipv4Addr::new(169, 254, 169, 254),
            15 => Ipv4Addr::new(240, 0, 0, 1),
            16 => Ipv4Addr::new(0, 0, 0, 1),
            17 => Ipv4Addr::new(192, 0, 3, 1),
            18 => Ipv4Addr::new(192, 168, 1, 1),
            _ => Ipv4Addr::from(u32::try_from(self.random.next() >> 32).unwrap()),
        }
    }

    fn port(&mut self) -> u16 {
        match self.random.below(8) {
            0 => self.random.word(),
            1 => self.random.pick(&[53, 67, 68, 22, 0]),
            _ => self.random.pick(&[80, 81, 90, 91, 79]),
        }
    }

    fn ipv4(&mut self) -> Vec<u8> {
        let mut seen = None;
        if !self.seen.is_empty() && self.random.one_in(2) {
            seen = Some(self.seen[self.random.below(self.seen.len())]);
        }
        let server = match seen {
            Some(seen) => seen.server,
            None => self.server(),
        };
        let guest = match self.random.below(20) {
            0 => Ipv4Addr::UNSPECIFIED,
            1 => self.server(),
            _ => Ipv4Addr::new(10, 0, 2, 15),
        };
        let protocol = if seen.is_some() { 6 } else { self.random.pick(&[6, 6, 6, 17, 17, 1, 2, 255]) };
        let pseudo = |len: usize| {
            let len = u32::try_from(len).unwrap();
            sum(&server.octets(), sum(&guest.octets(), u32::from(protocol) + len))
        };
        let body = self.body(protocol, seen, pseudo);
        let total = u16::try_from(20 + body.len()).unwrap_or(u16::MAX);
        let mut packet = vec![0x45, 0];
        packet.extend(total.to_be_bytes());
        packet.extend([self.random.pick(&[0, 1]), self.random.pick(&[0, 1])]);
        let fragment: u16 = match self.random.below(10) {
            0 => 0x2000,
            1 => 0x2000 | self.random.pick(&[1, 2, 64, 185, 8191]),
            2 => self.random.pick(&[1, 2, 64, 185, 8191]),
            _ => 0x4000,
        };
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, protocol, 0, 0]);
        packet.extend(guest.octets());
        packet.extend(server.octets());
        let checksum = fold(sum(&packet, 0)).to_be_bytes();
        packet[10..12].copy_from_slice(&checksum);
        packet.extend(body);
        packet
    }

    fn ipv6(&mut self) -> Vec<u8> {
        let server: Ipv6Addr = match self.random.below(14) {
            0..=2 => "fec0::2".parse().unwrap(),
            3 => "fec0::3".parse().unwrap(),
            4 => "::1".parse().unwrap(),
            5 => "::".parse().unwrap(),
            6 => "ff02::2".parse().unwrap(),
            7 => "fe80::1".parse().unwrap(),
            8 => "2001:db8::1".parse().unwrap(),
            9 => self.server().to_ipv6_mapped(),
            10 => self.server().to_ipv6_compatible(),
            11 => {
                let [a, b, c, d] = self.server().octets();
                Ipv6Addr::from([0x20, 0x02, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
            }
            12 => {
                let [a, b, c, d] = self.server().octets();
                Ipv6Addr::from([0, 0x64, 0xFF, 0x9B, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d])
            }
            _ => Ipv6Addr::from(u128::from(self.random.next()) << 64 | u128::from(self.random.next())),
        };
        let guest: Ipv6Addr = match self.random.below(10) {
            0 => "::".parse().unwrap(),
            1 => "fe80::5054:ff:fe12:3456".parse().unwrap(),
            2 => server,
            _ => "fec0::5054:ff:fe12:3456".parse().unwrap(),
        };
        let mut protocol = self.random.pick(&[6, 6, 17, 58, 58, 44, 0, 60]);
        let pseudo = |len: usize| {
            let len = u32::try_from(len).unwrap();
            sum(&server.octets(), sum(&guest.octets(), u32::from(protocol) + len))
        };
        let mut body = match protocol {
            58 => {
                let mut body = vec![self.random.pick(&[128, 133, 135, 136, 129, 1]), 0, 0, 0, 0, 0, 0, 0];
                if self.random.one_in(2) {
                    body.extend(server.octets());
                    body.extend([1, 1]);
                    body.extend(GUEST_MAC);
                }
                let checksum = fold(sum(&body, pseudo(body.len()))).to_be_bytes();
                body[2..4].copy_from_slice(&checksum);
                body
            }
            44 | 0 | 60 => {
                let len = 8 + self.random.below(200);
                let mut body = self.random.bytes(len);
                body[0] = self.random.pick(&[6, 17, 58, 44, 0, 60]);
                body
            }
            _ => self.body(protocol, None, pseudo),
        };
        if self.random.one_in(8) {
            let mut extension = vec![protocol, self.random.pick(&[0, 0, 1, 255])];
            extension.extend([1, 4, 0, 0, 0, 0]);
            extension.extend(body);
            body = extension;
            protocol = self.random.pick(&[0, 60, 43]);
        }
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
        packet.extend([protocol, self.random.pick(&[255, 255, 64])]);
        packet.extend(guest.octets());
        packet.extend(server.octets());
        packet.extend(body);
        packet
    }

    /// What is in an IP packet, with the right checksum.
    fn body(&mut self, protocol: u8, seen: Option<Seen>, pseudo: impl Fn(usize) -> u32) -> Vec<u8> {
        let len = match self.random.below(10) {
            0 => self.random.pick(&[1460, 9000, 60_000]),
            1..=4 => 0,
            _ => self.random.below(300),
        };
        let data = vec![0xA5; len];
        let ports = seen.map_or_else(|| (40_000 + self.random.word() % 8, self.port()), |seen| seen.ports);
        let mut body = Vec::new();
        match protocol {
            6 => {
                body.extend(ports.0.to_be_bytes());
                body.extend(ports.1.to_be_bytes());
                let near = |random: &mut Random, value: u32| match random.below(6) {
                    0 => value.wrapping_add(u32::from(random.word())),
                    1 => value.wrapping_sub(u32::from(random.word())),
                    2 => u32::try_from(random.next() >> 32).unwrap(),
                    _ => value,
                };
                let (seq, ack) = seen.map_or((1000, 0), |seen| (seen.seq, seen.ack));
                body.extend(near(&mut self.random, seq).to_be_bytes());
                body.extend(near(&mut self.random, ack).to_be_bytes());
                let options = self.random.pick(&[0usize, 0, 4, 8, 40]);
                body.push(u8::try_from((20 + options) / 4).unwrap() << 4);
                let flags = if seen.is_some() {
                    self.random.pick(&[0x10, 0x10, 0x10, 0x18, 0x11, 0x04, 0x14, 0x02, 0x00, 0x3F])
                } else {
                    self.random.pick(&[2, 2, 2, 2, 0x12, 0x10, 0x04, 0])
                };
                body.push(flags);
                body.extend(self.random.pick(&[0u16, 1, 1000, 65535]).to_be_bytes());
                body.extend([0, 0, 0, 0]);
                let mut bytes = vec![2, 4, 5, 0xB4, 1, 3, 3, self.random.pick(&[0, 7, 14, 255])];
                bytes.extend(self.random.bytes(32));
                body.extend(&bytes[..options]);
                body.extend(data);
                let checksum = fold(sum(&body, pseudo(body.len()))).to_be_bytes();
                body[16..18].copy_from_slice(&checksum);
            }
            17 => {
                let data = if ports.1 == 67 || ports.1 == 53 { self.service(ports.1) } else { data };
                body.extend(ports.0.to_be_bytes());
                body.extend(ports.1.to_be_bytes());
                body.extend(u16::try_from(8 + data.len()).unwrap().to_be_bytes());
                body.extend([0, 0]);
                body.extend(data);
                let checksum = fold(sum(&body, pseudo(body.len()))).to_be_bytes();
                body[6..8].copy_from_slice(&checksum);
            }
            1 => {
                body.extend([self.random.pick(&[8, 8, 0, 3, 13]), 0, 0, 0]);
                body.extend(data);
                let checksum = fold(sum(&body, 0)).to_be_bytes();
                body[2..4].copy_from_slice(&checksum);
            }
            _ => body.extend(data),
        }
        body
    }

    /// Something like DHCP or DNS.
    fn service(&mut self, port: u16) -> Vec<u8> {
        if port == 53 {
            let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            let len = self.random.below(80);
            query.extend(self.random.bytes(len));
            return query;
        }
        let mut message = vec![1, 1, 6, 0];
        message.resize(236, 0);
        message[28..34].copy_from_slice(&GUEST_MAC);
        message.extend([0x63, 0x82, 0x53, 0x63]);
        message.extend([53, 1, self.random.pick(&[1, 3, 3, 4, 7, 8, 99])]);
        if self.random.one_in(2) {
            message.extend([50, 4, 10, 0, 2, self.random.pick(&[15, 16])]);
        }
        let len = self.random.below(60);
        message.extend(self.random.bytes(len));
        message.push(0xFF);
        message
    }
}
