//! Frames that are wrong: lying lengths, bad checksums, fragments that overlap or never end, forged senders, garbage for DHCP,
//! DNS, ARP, ICMP, TCP and IPv6, and noise.
//!
//! They are sent past the kernel's own protocols, by a packet socket. Half of them have right checksums, so that they get far.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, bind, send, socket,
};

use super::pattern::Numbers;

/// The largest frame of an Ethernet without jumbo frames, and what a packet socket takes.
const FRAME_MAX: usize = 1514;
const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const GUEST: [u8; 4] = [10, 0, 2, 15];
const DNS: [u8; 4] = [10, 0, 2, 3];
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Sends `count` frames.
pub fn run(interface: &str, count: u32, seed: u64) -> Result<()> {
    let (addr, mac) = link(interface)?;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("opening a packet socket")?;
    bind(socket.as_raw_fd(), &addr).with_context(|| format!("binding a packet socket to {interface}"))?;
    let mut maker = Maker { numbers: Numbers::new(seed), mac, gateway: neighbour() };
    let (mut sent, mut refused) = (0, 0);
    for _ in 0..count {
        let frame = maker.frame();
        match send(socket.as_raw_fd(), &frame, MsgFlags::empty()) {
            Ok(_) => sent += 1,
            // The kernel itself does not take it, or its queue is full: that is part of the game.
            Err(Errno::EINVAL | Errno::EMSGSIZE | Errno::ENOBUFS | Errno::EAGAIN) => refused += 1,
            Err(error) => return Err(error).context("sending a frame"),
        }
    }
    println!("GUEST garbage sent={sent} refused={refused}");
    Ok(())
}

/// The link-layer address of an interface, as a packet socket wants it.
fn link(interface: &str) -> Result<(LinkAddr, [u8; 6])> {
    nix::ifaddrs::getifaddrs()
        .context("listing the interfaces")?
        .filter(|entry| entry.interface_name == interface)
        .filter_map(|entry| entry.address)
        .filter(|address| address.family() == Some(AddressFamily::Packet))
        .find_map(|address| address.as_link_addr().and_then(|link| Some((*link, link.addr()?))))
        .with_context(|| format!("there is no interface {interface}"))
}

/// The hardware address of the gateway, if the kernel knows it; broadcasts do otherwise.
fn neighbour() -> [u8; 6] {
    let table = std::fs::read_to_string("/proc/net/arp").unwrap_or_default();
    let known = table.lines().filter(|line| line.starts_with("10.0.2.2 ")).find_map(|line| {
        let text = line.split_whitespace().nth(3)?;
        let bytes: Vec<u8> = text.split(':').map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        bytes.try_into().ok()
    });
    known.unwrap_or([0xff; 6])
}

struct Maker {
    numbers: Numbers,
    mac: [u8; 6],
    gateway: [u8; 6],
}

impl Maker {
    fn frame(&mut self) -> Vec<u8> {
        let mut frame = match self.numbers.below(12) {
            0 => self.noise(),
            1 => self.arp(),
            2 => self.ipv6(),
            3 => self.fragment(),
            4 | 5 => self.segment(),
            6 => self.datagram(67, [255; 4]),
            7 => self.datagram(53, DNS),
            8 => {
                let port = u16::from_be_bytes(self.bytes());
                self.datagram(port, GATEWAY)
            }
            9 => self.echo(),
            10 => self.lying_length(),
            _ => self.forged(),
        };
        // One in four is hit once more, anywhere.
        if self.numbers.below(4) == 0 {
            self.damage(&mut frame);
        }
        frame.truncate(FRAME_MAX);
        frame
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    fn byte(&mut self) -> u8 {
        self.numbers.next().to_le_bytes()[7]
    }

    fn payload(&mut self, max: u64) -> Vec<u8> {
        (0..self.numbers.below(max)).map(|_| self.byte()).collect()
    }

    fn ethernet(&mut self, kind: u16, payload: &[u8]) -> Vec<u8> {
        let to = match self.numbers.below(8) {
            0 => self.bytes(),
            1 => [0xff; 6],
            _ => self.gateway,
        };
        [&to, &self.mac, &kind.to_be_bytes()[..], payload].concat()
    }

    fn damage(&mut self, frame: &mut [u8]) {
        let len = u64::try_from(frame.len()).unwrap_or(1);
        let at = usize::try_from(self.numbers.below(len)).unwrap_or(0);
        let value = self.byte();
        if let Some(byte) = frame.get_mut(at) {
            *byte = value;
        }
    }

    fn noise(&mut self) -> Vec<u8> {
        let kind = u16::from_be_bytes(self.bytes());
        let payload = self.payload(1600);
        self.ethernet(kind, &payload)
    }

    fn arp(&mut self) -> Vec<u8> {
        let mut arp = vec![0, 1, 8, 0, 6, 4, 0, self.byte() & 3];
        arp.extend(self.mac);
        arp.extend(if self.numbers.below(2) == 0 { GUEST } else { self.bytes() });
        arp.extend([0; 6]);
        arp.extend(if self.numbers.below(2) == 0 { GATEWAY } else { self.bytes() });
        let keep = usize::try_from(self.numbers.below(29)).unwrap_or(0);
        arp.truncate(keep);
        self.ethernet(0x0806, &arp)
    }

    /// An IPv4 packet; `fragment` is the flags and the offset.
    fn ipv4(&mut self, from: [u8; 4], to: [u8; 4], protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let total = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX);
        let mut header = vec![0x45, 0];
        header.extend(total.to_be_bytes());
        header.extend([0, 7]);
        header.extend(fragment.to_be_bytes());
        header.extend([64, protocol, 0, 0]);
        header.extend(from);
        header.extend(to);
        if self.numbers.below(8) != 0 {
            let sum = checksum(&[&header]);
            set(&mut header, 10, sum);
        }
        header.extend_from_slice(payload);
        self.ethernet(0x0800, &header)
    }

    /// With the checksum of TCP or UDP at `at`, or without.
    fn transport(
        &mut self,
        from: [u8; 4],
        to: [u8; 4],
        protocol: u8,
        at: usize,
        mut payload: Vec<u8>,
    ) -> Vec<u8> {
        if self.numbers.below(2) == 0 {
            let length = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
            let pseudo = [&from[..], &to, &[0, protocol], &length].concat();
            let sum = checksum(&[&pseudo, &payload]);
            set(&mut payload, at, sum);
        }
        self.ipv4(from, to, protocol, 0, &payload)
    }

    fn datagram(&mut self, port: u16, to: [u8; 4]) -> Vec<u8> {
        let mut data = self.payload(600);
        if port == 67 {
            // BOOTP request with the magic cookie; what follows is noise.
            let mut dhcp = vec![0; 240];
            for (at, value) in [(0, 1), (1, 1), (2, 6), (236, 99), (237, 130), (238, 83), (239, 99)] {
                if let Some(byte) = dhcp.get_mut(at) {
                    *byte = value;
                }
            }
            dhcp.extend([53, 1, self.byte() & 15]);
            dhcp.append(&mut data);
            data = dhcp;
        }
        let length = match self.numbers.below(4) {
            0 => u16::from_be_bytes(self.bytes()),
            _ => u16::try_from(8 + data.len()).unwrap_or(u16::MAX),
        };
        let from_port = [0xc0, self.byte()];
        let udp = [&from_port[..], &port.to_be_bytes(), &length.to_be_bytes(), &[0, 0], &data].concat();
        self.transport(GUEST, to, UDP, 6, udp)
    }

    fn segment(&mut self) -> Vec<u8> {
        let mut tcp = vec![0xc0, self.byte() & 0x0f];
        // Ports of the tests' servers more often than others.
        let port = if self.numbers.below(2) == 0 { 7007 } else { u16::from_be_bytes(self.bytes()) };
        tcp.extend(port.to_be_bytes());
        tcp.extend(self.bytes::<8>());
        let offset = if self.numbers.below(2) == 0 { 0x50 } else { self.byte() };
        tcp.extend([offset, self.byte()]);
        tcp.extend(self.bytes::<2>());
        tcp.extend([0, 0]);
        tcp.extend(self.bytes::<2>());
        tcp.append(&mut self.payload(300));
        self.transport(GUEST, GATEWAY, TCP, 16, tcp)
    }

    fn echo(&mut self) -> Vec<u8> {
        let mut icmp = vec![if self.numbers.below(2) == 0 { 8 } else { self.byte() }, 0, 0, 0];
        icmp.append(&mut self.payload(200));
        if self.numbers.below(2) == 0 {
            let sum = checksum(&[&icmp]);
            set(&mut icmp, 2, sum);
        }
        let to = if self.numbers.below(2) == 0 { GATEWAY } else { self.bytes() };
        self.ipv4(GUEST, to, ICMP, 0, &icmp)
    }

    /// Fragments of one packet: they overlap, leave holes, and reach beyond the largest packet.
    fn fragment(&mut self) -> Vec<u8> {
        let more = if self.numbers.below(2) == 0 { 0x2000 } else { 0 };
        let offset = match self.numbers.below(4) {
            0 => 0x1fff,
            1 => 0,
            _ => u16::try_from(self.numbers.below(200)).unwrap_or(0),
        };
        let protocol = [TCP, UDP, ICMP].get(usize::from(self.byte() % 3)).copied().unwrap_or(TCP);
        let payload = self.payload(1400);
        self.ipv4(GUEST, GATEWAY, protocol, more | offset, &payload)
    }

    /// An IPv4 header whose lengths are not those of the frame.
    fn lying_length(&mut self) -> Vec<u8> {
        let payload = self.payload(100);
        let mut frame = self.ipv4(GUEST, GATEWAY, UDP, 0, &payload);
        let total = match self.numbers.below(3) {
            0 => [0, self.byte() & 31],
            1 => [0xff, 0xff],
            _ => self.bytes(),
        };
        let words = if self.numbers.below(2) == 0 { 0x45 } else { 0x40 | self.byte() & 15 };
        if let Some(header) = frame.get_mut(14..34) {
            for (at, value) in [(0, words), (2, total[0]), (3, total[1]), (10, 0), (11, 0)] {
                if let Some(byte) = header.get_mut(at) {
                    *byte = value;
                }
            }
            let sum = checksum(&[header]);
            set(header, 10, sum);
        }
        frame
    }

    /// To the host's own addresses, to groups, to nobody, or from somebody else to anybody.
    fn forged(&mut self) -> Vec<u8> {
        let from = if self.numbers.below(2) == 0 { GUEST } else { self.bytes() };
        let places = [[127, 0, 0, 1], [192, 0, 2, 1], [0; 4], [255; 4], [224, 0, 0, 1], [10, 0, 2, 255]];
        let to = places.get(usize::from(self.byte() & 7)).copied().unwrap_or_else(|| self.bytes());
        // The port of the tests' echo servers.
        let port = 7007_u16.to_be_bytes();
        let udp = [&[0xc0, 0], &port[..], &[0, 12, 0, 0], b"fake"].concat();
        self.transport(from, to, UDP, 6, udp)
    }

    fn ipv6(&mut self) -> Vec<u8> {
        let payload = self.payload(200);
        let length = match self.numbers.below(3) {
            0 => u16::from_be_bytes(self.bytes()),
            _ => u16::try_from(payload.len()).unwrap_or(0),
        };
        // Hop-by-hop, routing, fragment, destination options, ICMPv6, TCP, UDP, none, or anything.
        let known = [0, 43, 44, 60, 58, 6, 17, 59];
        let next = known.get(usize::from(self.byte() & 15)).copied().unwrap_or_else(|| self.byte());
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([next, 255]);
        packet.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0]);
        packet.extend(self.bytes::<8>());
        packet.extend(if self.numbers.below(2) == 0 { [0xff, 2] } else { [0xfe, 0xc0] });
        packet.extend([0; 13]);
        packet.push(2);
        packet.extend(payload);
        self.ethernet(0x86dd, &packet)
    }
}

/// The checksum of the Internet protocols (RFC 1071) over parts of even length; the last may be odd.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(word_of).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

fn word_of(bytes: &[u8]) -> u32 {
    let byte = |at: usize| bytes.get(at).copied().map_or(0, u32::from);
    byte(0) << 8 | byte(1)
}

fn set(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_with_its_checksum_sums_up_to_nothing() {
        let mut header = [0x45, 0, 0, 40, 0, 7, 0, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2];
        let sum = checksum(&[&header]);
        set(&mut header, 10, sum);
        assert_eq!(checksum(&[&header]), 0);
    }

    #[test]
    fn frames_fit_an_ethernet_and_differ() {
        let mut maker = Maker { numbers: Numbers::new(1), mac: [2; 6], gateway: [3; 6] };
        let frames: Vec<_> = (0..1000).map(|_| maker.frame()).collect();
        assert!(frames.iter().all(|frame| (14..=FRAME_MAX).contains(&frame.len())));
        assert!(frames.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
