//! Headers of Ethernet, ARP, IPv4, ICMP, UDP and TCP as they are on the wire.

use core::fmt;

/// An IPv4 address.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Ip(pub [u8; 4]);

impl Ip {
    /// From four numbers with dots between them.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let ip = Self(
            [parts.next()?, parts.next()?, parts.next()?, parts.next()?].map(|n| n.parse().ok()).try_all()?,
        );
        parts.next().is_none().then_some(ip)
    }

    /// Whether both are in a network with prefixes of so many bits.
    pub fn is_near(self, other: Self, prefix: u32) -> bool {
        let mask = u32::MAX.checked_shl(32 - prefix.min(32)).unwrap_or(0);
        (u32::from_be_bytes(self.0) ^ u32::from_be_bytes(other.0)) & mask == 0
    }
}

/// All of four, or nothing.
trait TryAll {
    fn try_all(self) -> Option<[u8; 4]>;
}

impl TryAll for [Option<u8>; 4] {
    fn try_all(self) -> Option<[u8; 4]> {
        let [a, b, c, d] = self;
        Some([a?, b?, c?, d?])
    }
}

impl fmt::Display for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{a}.{b}.{c}.{d}")
    }
}

/// Ethernet types.
pub const ARP: u16 = 0x0806;
pub const IPV4: u16 = 0x0800;
/// Protocols of IPv4.
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
/// Bytes of headers.
pub const ETHERNET: usize = 14;
pub const IP_HEADER: usize = 20;

/// Flags of TCP.
pub mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
}

/// Reads 16 bits; zero where there are none.
pub fn short(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b))
}

/// Reads 32 bits; zero where there are none.
pub fn long(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b))
}

/// The ones' complement sum of `bytes`, not complemented, added to another such sum (RFC 1071). An odd last byte is the upper half.
pub fn sum(bytes: &[u8], start: u64) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut sum = words.iter().fold(start, |sum, word| sum + u64::from(u32::from_be_bytes(*word)));
    for (byte, shift) in rest.iter().zip([24, 16, 8]) {
        sum += u64::from(*byte) << shift;
    }
    sum
}

/// Sixteen bits of a sum.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo header of TCP and UDP.
pub fn pseudo(from: Ip, to: Ip, protocol: u8, len: usize) -> u64 {
    sum(&from.0, sum(&to.0, u64::from(protocol) + len as u64))
}

/// A frame that grows.
pub struct Writer {
    bytes: [u8; 640],
    len: usize,
}

impl Writer {
    /// With the Ethernet header.
    pub fn new(to: [u8; 6], from: [u8; 6], kind: u16) -> Self {
        let mut this = Self { bytes: [0; 640], len: 0 };
        this.put(&to).put(&from).put(&kind.to_be_bytes());
        this
    }

    /// Adds bytes; what does not fit is lost, of which no frame of this program has any.
    pub fn put(&mut self, bytes: &[u8]) -> &mut Self {
        if let Some(to) = self.bytes.get_mut(self.len..self.len + bytes.len()) {
            to.copy_from_slice(bytes);
            self.len += bytes.len();
        }
        self
    }

    /// Adds an IPv4 header without options for so many bytes after it.
    pub fn ip(&mut self, protocol: u8, from: Ip, to: Ip, len: usize) -> &mut Self {
        let mut header = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        header[2..4].copy_from_slice(&((IP_HEADER + len) as u16).to_be_bytes());
        header[12..16].copy_from_slice(&from.0);
        header[16..20].copy_from_slice(&to.0);
        let check = !fold(sum(&header, 0));
        header[10..12].copy_from_slice(&check.to_be_bytes());
        self.put(&header)
    }

    /// Puts 16 bits at an offset.
    pub fn set(&mut self, at: usize, value: u16) {
        if let Some(to) = self.bytes.get_mut(at..at + 2) {
            to.copy_from_slice(&value.to_be_bytes());
        }
    }

    /// The frame so far.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}
