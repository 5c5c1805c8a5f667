//! Frames of the machine: Ethernet, IPv4, IPv6, as far as it takes to know whose they are.
//!
//! The headers are copied once and read from the copy. Nothing is believed that was not checked: addresses must be those of the
//! machine's network, lengths must fit.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use freestone_memory::own_slice;

use super::{Engine, Parts};
use crate::nat::emit::{ETHERNET, ethertype, protocol};
use crate::nat::link;
use crate::nat::tcp::{add_frame, fold, pseudo};
use crate::{Frame, MacAddr, VnetHeader};

/// Bytes of a frame that are looked at: all headers there can be, with some room for extension headers.
const HEADERS: usize = 192;
/// Extension headers of IPv6 that are skipped.
const MAX_EXTENSIONS: usize = 8;

/// Why a frame goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    /// Nothing of ours.
    Ignored,
    /// Impossible.
    Malformed,
    /// Not from an address of the machine.
    Spoofed,
}

/// A packet: a copy of its beginning, and all of it.
#[derive(Debug, Clone, Copy)]
struct Packet<'a, 'f, 'm> {
    head: &'a [u8],
    all: Frame<'f, 'm>,
    /// The checksum of TCP or UDP counts.
    verify: bool,
    /// This was made of fragments.
    whole: bool,
}

impl<'a> Packet<'a, '_, '_> {
    fn first<const N: usize>(&self) -> Result<&'a [u8; N], Refused> {
        self.head.first_chunk().ok_or(Refused::Malformed)
    }

    /// What comes after `len` bytes.
    fn after(self, len: usize) -> Self {
        Self { head: self.head.get(len..).unwrap_or_default(), all: self.all.after(len), ..self }
    }

    /// All but what is behind `len` bytes; `None` if there are fewer.
    fn truncate(self, len: usize) -> Result<Self, Refused> {
        if self.all.len() < len {
            return Err(Refused::Malformed);
        }
        let head = self.head.get(..len).unwrap_or(self.head);
        Ok(Self { head, all: self.all.truncate(len), ..self })
    }
}

impl Engine {
    /// Takes a frame of the machine.
    pub(in crate::nat) fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) {
        self.moved = true;
        self.port.sent(frame.len());
        let mut copy = [0; HEADERS];
        let n = frame.read_at(0, &mut copy);
        // What is still to be done to a frame that stays on this machine need not be done.
        let verify = header.checksum.is_none() && !header.checksum_valid;
        let packet = Packet { head: copy.get(..n).unwrap_or_default(), all: frame, verify, whole: false };
        if let Err(refused) = self.ethernet(packet) {
            self.port.send_dropped();
            match refused {
                Refused::Ignored => self.stats.ignored(),
                Refused::Malformed => self.stats.malformed(),
                Refused::Spoofed => self.stats.spoofed(),
            }
        }
    }

    fn ethernet(&mut self, packet: Packet<'_, '_, '_>) -> Result<(), Refused> {
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *packet.first::<ETHERNET>()?;
        let to = MacAddr([d0, d1, d2, d3, d4, d5]);
        let from = MacAddr([s0, s1, s2, s3, s4, s5]);
        if to != self.link.gateway && !to.is_multicast() {
            return Err(Refused::Ignored);
        }
        let packet = packet.after(ETHERNET);
        match u16::from_be_bytes([t0, t1]) {
            ethertype::ARP => {
                link::arp(&mut self.parts().cx, packet.head);
                Ok(())
            }
            ethertype::IPV4 => self.ipv4(from, packet),
            ethertype::IPV6 => self.ipv6(from, packet),
            _ => Err(Refused::Ignored),
        }
    }

    /// RFC 791.
    fn ipv4(&mut self, station: MacAddr, packet: Packet<'_, '_, '_>) -> Result<(), Refused> {
        if self.config.ipv4.is_none() {
            return Err(Refused::Ignored);
        }
        let [version, _, l0, l1, _, _, o0, o1, _, protocol, _, _, f0, f1, f2, f3, t0, t1, t2, t3] =
            *packet.first::<20>()?;
        let header = usize::from(version & 0xF) * 4;
        let total = usize::from(u16::from_be_bytes([l0, l1]));
        if version >> 4 != 4 || header < 20 || total < header {
            return Err(Refused::Malformed);
        }
        let packet = packet.truncate(total)?;
        let sum = packet.head.get(..header).ok_or(Refused::Malformed)?;
        if smoltcp::wire::checksum::data(sum) != u16::MAX {
            return Err(Refused::Malformed);
        }
        let (from, to) = (Ipv4Addr::new(f0, f1, f2, f3), Ipv4Addr::new(t0, t1, t2, t3));
        // Who has no address yet asks for one by UDP.
        let asks = from.is_unspecified() && protocol == protocol::UDP;
        if !asks && !link::may_send(&self.config, from.into()) {
            return Err(Refused::Spoofed);
        }
        self.link.learn(station);
        let more_or_offset = u16::from_be_bytes([o0, o1]) & 0x3FFF;
        if more_or_offset != 0 {
            return self.fragment(station, packet);
        }
        self.transport(protocol, from.into(), to.into(), packet.after(header))
    }

    /// RFC 8200.
    fn ipv6(&mut self, station: MacAddr, packet: Packet<'_, '_, '_>) -> Result<(), Refused> {
        if self.config.ipv6.is_none() {
            return Err(Refused::Ignored);
        }
        let ([version, _, _, _, l0, l1, next, _], addresses) =
            packet.first::<40>()?.split_first_chunk::<8>().ok_or(Refused::Malformed)?;
        let (from, to) = addresses.split_first_chunk::<16>().ok_or(Refused::Malformed)?;
        let to = to.first_chunk::<16>().ok_or(Refused::Malformed)?;
        let (from, to) = (Ipv6Addr::from(*from), Ipv6Addr::from(*to));
        if version >> 4 != 6 {
            return Err(Refused::Malformed);
        }
        let packet = packet.truncate(40 + usize::from(u16::from_be_bytes([*l0, *l1])))?;
        let mut rest = packet.after(40);
        let mut next = *next;
        for _ in 0..MAX_EXTENSIONS {
            match next {
                // Options for everybody, for the destination.
                0 | 60 => {
                    let [then, len] = *rest.first::<2>()?;
                    let len = (usize::from(len) + 1) * 8;
                    if rest.head.len() < len {
                        return Err(Refused::Malformed);
                    }
                    rest = rest.after(len);
                    next = then;
                }
                _ => break,
            }
        }
        let asks = from.is_unspecified() && next == protocol::ICMPV6;
        if !asks && !link::may_send(&self.config, from.into()) {
            return Err(Refused::Spoofed);
        }
        self.link.learn(station);
        if next == protocol::FRAGMENT {
            return self.fragment(station, packet);
        }
        if next != protocol::ICMPV6 {
            link::learn_v6(&mut self.parts().cx, from);
        }
        self.transport(next, from.into(), to.into(), rest)
    }

    /// Keeps a fragment, and takes the packet when it is complete.
    fn fragment(&mut self, station: MacAddr, packet: Packet<'_, '_, '_>) -> Result<(), Refused> {
        if packet.whole {
            return Err(Refused::Malformed);
        }
        self.stats.fragments();
        let mut bytes = vec![0; packet.all.len()];
        packet.all.read_at(0, &mut bytes);
        let now = self.now();
        let Some(mut whole) = self.reassembly.packet(now, &bytes) else { return Ok(()) };
        let head = whole.get(..whole.len().min(HEADERS)).unwrap_or_default().to_vec();
        let v4 = head.first().is_some_and(|version| version >> 4 == 4);
        let slices = [own_slice(&mut whole)];
        let packet = Packet { head: &head, all: Frame::new(&slices), verify: true, whole: true };
        if v4 { self.ipv4(station, packet) } else { self.ipv6(station, packet) }
    }

    fn transport(
        &mut self,
        protocol: u8,
        from: IpAddr,
        to: IpAddr,
        packet: Packet<'_, '_, '_>,
    ) -> Result<(), Refused> {
        match protocol {
            protocol::TCP => {
                self.check(protocol, from, to, packet)?;
                let Parts { mut cx, tcp, .. } = self.parts();
                tcp.packet(&mut cx, from, to, packet.head, packet.all);
                Ok(())
            }
            protocol::UDP => self.datagram(from, to, packet),
            protocol::ICMP if from.is_ipv4() => self.icmp(from, to, packet),
            protocol::ICMPV6 if from.is_ipv6() => self.icmp(from, to, packet),
            _ => Err(Refused::Ignored),
        }
    }

    fn check(
        &self,
        protocol: u8,
        from: IpAddr,
        to: IpAddr,
        packet: Packet<'_, '_, '_>,
    ) -> Result<(), Refused> {
        if !packet.verify {
            return Ok(());
        }
        let sum = add_frame(pseudo(from, to, protocol, packet.all.len()), packet.all);
        if fold(sum) == u16::MAX { Ok(()) } else { Err(Refused::Malformed) }
    }

    /// RFC 768.
    fn datagram(&mut self, from: IpAddr, to: IpAddr, packet: Packet<'_, '_, '_>) -> Result<(), Refused> {
        let [f0, f1, t0, t1, l0, l1, c0, c1] = *packet.first::<8>()?;
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        if len < 8 {
            return Err(Refused::Malformed);
        }
        let packet = packet.truncate(len)?;
        if (c0, c1) != (0, 0) {
            self.check(protocol::UDP, from, to, packet)?;
        } else if from.is_ipv6() && packet.verify {
            return Err(Refused::Malformed);
        }
        let from = SocketAddr::new(from, u16::from_be_bytes([f0, f1]));
        let to = SocketAddr::new(to, u16::from_be_bytes([t0, t1]));
        let Parts { mut cx, udp, .. } = self.parts();
        udp.datagram(&mut cx, from, to, packet.all.after(8));
        Ok(())
    }

    fn icmp(&mut self, from: IpAddr, to: IpAddr, packet: Packet<'_, '_, '_>) -> Result<(), Refused> {
        let mut body = std::mem::take(&mut self.scratch);
        body.clear();
        body.resize(packet.all.len(), 0);
        packet.all.read_at(0, &mut body);
        let Parts { mut cx, icmp, .. } = self.parts();
        match (from, to) {
            // All but echo.
            (IpAddr::V6(from), IpAddr::V6(to)) if body.first().is_some_and(|kind| *kind != 128) => {
                link::icmpv6(&mut cx, from, to, &body);
            }
            _ => icmp.packet(&mut cx, from, to, &body),
        }
        self.scratch = body;
        Ok(())
    }
}
