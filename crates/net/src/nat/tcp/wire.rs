//! Segments as bytes: reading and writing TCP headers, sequence numbers, checksums.

use std::net::{IpAddr, SocketAddr};

use bitflags::bitflags;

use crate::nat::context::Link;
use crate::nat::emit::ETHERNET;
use crate::{Frame, MacAddr};

/// TCP header without options.
const TCP: usize = 20;
/// The checksum's place in the TCP header.
const CHECKSUM: usize = 16;

bitflags! {
    /// Flags of a segment (RFC 9293, section 3.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(super) struct Flags: u8 {
        const FIN = 1;
        const SYN = 2;
        const RST = 4;
        const PSH = 8;
        const ACK = 16;
        const _ = !0;
    }
}

/// A place in the sequence of bytes; they wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Seq(pub(super) u32);

impl Seq {
    /// The place `n` bytes further.
    pub(super) fn plus(self, n: u32) -> Self {
        Self(self.0.wrapping_add(n))
    }

    /// How far this is behind `other`; negative if it is before it.
    #[expect(clippy::cast_possible_wrap, reason = "sequence numbers are compared modulo 2^32 (RFC 9293, section 3.4)")]
    pub(super) fn since(self, other: Self) -> i32 {
        self.0.wrapping_sub(other.0) as i32
    }

    /// How many bytes this is behind `other`; 0 if it is before it.
    pub(super) fn beyond(self, other: Self) -> u32 {
        u32::try_from(self.since(other)).unwrap_or(0)
    }
}

/// What a segment's header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) from: u16,
    pub(super) to: u16,
    pub(super) seq: Seq,
    pub(super) ack: Seq,
    pub(super) flags: Flags,
    pub(super) window: u16,
    /// Of a SYN: the largest segment that the machine takes.
    pub(super) mss: Option<u16>,
    /// Of a SYN: by how many bits the machine's window is to be shifted.
    pub(super) scale: Option<u8>,
}

impl Segment {
    /// Reads a header; returns it and its length. `None` if there is not all of it.
    pub(super) fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let (header, rest) = bytes.split_first_chunk::<TCP>()?;
        let [f0, f1, t0, t1, s0, s1, s2, s3, a0, a1, a2, a3, len, flags, w0, w1, ..] = *header;
        let len = usize::from(len >> 4) * 4;
        let options = rest.get(..len.checked_sub(TCP)?)?;
        let mut segment = Self {
            from: u16::from_be_bytes([f0, f1]),
            to: u16::from_be_bytes([t0, t1]),
            seq: Seq(u32::from_be_bytes([s0, s1, s2, s3])),
            ack: Seq(u32::from_be_bytes([a0, a1, a2, a3])),
            flags: Flags::from_bits_retain(flags),
            window: u16::from_be_bytes([w0, w1]),
            mss: None,
            scale: None,
        };
        if segment.has(Flags::SYN) {
            segment.options(options);
        }
        Some((segment, len))
    }

    /// Reads the options (RFC 9293, section 3.1, and RFC 7323), as far as they make sense.
    fn options(&mut self, mut options: &[u8]) {
        loop {
            options = match options {
                [1, rest @ ..] => rest,
                [2, 4, a, b, rest @ ..] => {
                    self.mss = Some(u16::from_be_bytes([*a, *b]));
                    rest
                }
                [3, 3, shift, rest @ ..] => {
                    self.scale = Some((*shift).min(14));
                    rest
                }
                [kind, len, ..] if *kind != 0 && *len >= 2 => match options.get(usize::from(*len)..) {
                    Some(rest) => rest,
                    None => return,
                },
                _ => return,
            };
        }
    }

    pub(super) fn has(&self, flag: Flags) -> bool {
        self.flags.contains(flag)
    }

    /// How much of the sequence a segment with `payload` bytes takes.
    pub(super) fn sequence_len(&self, payload: usize) -> u32 {
        let bytes = u32::try_from(payload).unwrap_or(u32::MAX);
        bytes.saturating_add(self.has(Flags::SYN).into()).saturating_add(self.has(Flags::FIN).into())
    }
}

/// A header to be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) seq: Seq,
    pub(super) ack: Seq,
    pub(super) flags: Flags,
    pub(super) window: u16,
    /// Of a SYN: the largest segment that is taken, and the scale of windows.
    pub(super) options: Option<(u16, Option<u8>)>,
}

impl Header {
    /// Bytes before the data of a segment without options, with Ethernet.
    pub(super) fn len(to: IpAddr) -> usize {
        ETHERNET + ip_len(to) + TCP
    }

    /// Writes the headers of Ethernet, IP and TCP before `payload` bytes of data into `buf`, which is empty. The TCP checksum is
    /// that of the pseudo header alone: add the rest by [`complete`]. Returns where TCP begins.
    pub(super) fn write(&self, link: &Link, payload: usize, buf: &mut Vec<u8>) -> usize {
        let options = self.options.map_or(0, |(_, scale)| if scale.is_some() { 8 } else { 4 });
        let tcp_len = u16::try_from(TCP + options + payload).unwrap_or(u16::MAX);
        ethernet(link.guest, link.gateway, self.to.ip(), buf);
        let pseudo = ip(self.from.ip(), self.to.ip(), tcp_len, buf);
        let start = buf.len();
        buf.extend_from_slice(&self.from.port().to_be_bytes());
        buf.extend_from_slice(&self.to.port().to_be_bytes());
        buf.extend_from_slice(&self.seq.0.to_be_bytes());
        buf.extend_from_slice(&self.ack.0.to_be_bytes());
        let len = u8::try_from((TCP + options) / 4).unwrap_or(0);
        buf.extend_from_slice(&[len << 4, self.flags.bits()]);
        buf.extend_from_slice(&self.window.to_be_bytes());
        buf.extend_from_slice(&fold(pseudo).to_be_bytes());
        buf.extend_from_slice(&[0, 0]);
        if let Some((mss, scale)) = self.options {
            let [a, b] = mss.to_be_bytes();
            buf.extend_from_slice(&[2, 4, a, b]);
            if let Some(shift) = scale {
                buf.extend_from_slice(&[1, 3, 3, shift]);
            }
        }
        start
    }
}

/// The place of the checksum in a frame whose TCP header begins at `start`, as a vnet header wants it.
pub(super) fn checksum_place(start: usize) -> Option<(u16, u16)> {
    Some((u16::try_from(start).ok()?, u16::try_from(CHECKSUM).ok()?))
}

/// Completes the checksum of a segment whose TCP header begins at `start` of `headers`, with data that sums up to `data`.
pub(super) fn complete(headers: &mut [u8], start: usize, data: u64) {
    let sum = headers.get(start..).map_or(0, |tcp| add(0, tcp));
    if let Some(field) = headers.get_mut(start + CHECKSUM..start + CHECKSUM + 2) {
        field.copy_from_slice(&(!fold(sum + u64::from(fold(data)))).to_be_bytes());
    }
}

fn ip_len(to: IpAddr) -> usize {
    if to.is_ipv4() { 20 } else { 40 }
}

fn ethernet(to: MacAddr, from: MacAddr, ip: IpAddr, buf: &mut Vec<u8>) {
    buf.extend_from_slice(&to.0);
    buf.extend_from_slice(&from.0);
    buf.extend_from_slice(if ip.is_ipv4() { &[8, 0] } else { &[0x86, 0xDD] });
}

/// Writes an IP header for TCP; returns the sum of the pseudo header.
fn ip(from: IpAddr, to: IpAddr, tcp_len: u16, buf: &mut Vec<u8>) -> u64 {
    let pseudo = u64::from(PROTOCOL) + u64::from(tcp_len);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let start = buf.len();
            let [a, b] = tcp_len.saturating_add(20).to_be_bytes();
            // Never a fragment, so the identification says nothing (RFC 6864).
            buf.extend_from_slice(&[0x45, 0, a, b, 0, 0, 0x40, 0, 64, PROTOCOL, 0, 0]);
            buf.extend_from_slice(&from.octets());
            buf.extend_from_slice(&to.octets());
            let sum = buf.get(start..).map_or(0, |header| add(0, header));
            if let Some(field) = buf.get_mut(start + 10..start + 12) {
                field.copy_from_slice(&(!fold(sum)).to_be_bytes());
            }
            add(add(pseudo, &from.octets()), &to.octets())
        }
        (from, to) => {
            let octets = |ip| match ip {
                IpAddr::V4(v4) => std::net::Ipv4Addr::to_ipv6_mapped(&v4).octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let [a, b] = tcp_len.to_be_bytes();
            buf.extend_from_slice(&[0x60, 0, 0, 0, a, b, PROTOCOL, 64]);
            buf.extend_from_slice(&octets(from));
            buf.extend_from_slice(&octets(to));
            add(add(pseudo, &octets(from)), &octets(to))
        }
    }
}

/// TCP's number in IP headers.
const PROTOCOL: u8 = 6;

/// Adds `bytes`, of which only the last of all may be odd in number, to a sum of 16-bit words (RFC 1071), not folded yet.
pub(in crate::nat) fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        sum += u64::from(u32::from_be_bytes(*word));
    }
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    sum + u64::from(u32::from_be_bytes(last))
}

/// Adds all bytes of a frame.
pub(in crate::nat) fn add_frame(mut sum: u64, frame: Frame<'_, '_>) -> u64 {
    let mut chunk = [0; 2048];
    let mut at = 0;
    loop {
        let n = frame.read_at(at, &mut chunk);
        let Some(bytes) = chunk.get(..n).filter(|bytes| !bytes.is_empty()) else { return sum };
        sum = add(sum, bytes);
        at += n;
    }
}

/// A sum as 16 bits.
pub(in crate::nat) fn fold(mut sum: u64) -> u16 {
    while sum > 0xFFFF {
        sum = (sum >> 16) + (sum & 0xFFFF);
    }
    u16::try_from(sum).unwrap_or(0)
}

/// The sum of the pseudo header of `len` bytes of `protocol`.
pub(in crate::nat) fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> u64 {
    let sum = u64::from(protocol) + len as u64;
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => add(add(sum, &from.octets()), &to.octets()),
        (IpAddr::V6(from), IpAddr::V6(to)) => add(add(sum, &from.octets()), &to.octets()),
        _ => sum,
    }
}
