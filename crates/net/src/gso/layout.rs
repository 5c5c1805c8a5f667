//! Where the headers of a frame begin.

use super::{Checksum, MAX_HEAD, get, put};

/// Ethertypes (IEEE 802): tags of VLANs are skipped.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86DD;
const VLAN: [u16; 2] = [0x8100, 0x88A8];

/// Extension headers of IPv6 that may come before TCP or UDP: they are copied as they are.
const HOP_BY_HOP: u8 = 0;
const DESTINATION_OPTIONS: u8 = 60;
const MAX_EXTENSIONS: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ip {
    V4,
    V6,
}

/// Where the headers of a frame begin. All is inside the bytes that it was made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) ip: Ip,
    /// The IP header.
    pub(super) l3: usize,
    /// The header of TCP or UDP.
    pub(super) l4: usize,
    /// What that is.
    pub(super) protocol: u8,
    /// The byte that says so.
    pub(super) next_header: usize,
    /// IPv4 with options.
    pub(super) has_options: bool,
}

impl Layout {
    /// Finds the headers in the first bytes of a frame.
    pub(super) fn of(head: &[u8]) -> Option<Self> {
        let mut at = 12;
        for _ in 0..2 {
            if VLAN.contains(&u16::from_be_bytes(get(head, at)?)) {
                at += 4;
            }
        }
        let l3 = at + 2;
        match u16::from_be_bytes(get(head, at)?) {
            IPV4 => Self::ipv4(head, l3),
            IPV6 => Self::ipv6(head, l3),
            _ => None,
        }
    }

    fn ipv4(head: &[u8], l3: usize) -> Option<Self> {
        let header: [u8; 20] = get(head, l3)?;
        let [version, _, _, _, _, _, f0, f1, _, protocol, ..] = header;
        let len = usize::from(version & 0x0F) * 4;
        let whole = u16::from_be_bytes([f0, f1]) & 0x3FFF == 0;
        let right = version >> 4 == 4 && len >= 20 && l3 + len <= head.len() && whole;
        let (l4, next_header) = (l3 + len, l3 + 9);
        right.then_some(Self { ip: Ip::V4, l3, l4, protocol, next_header, has_options: len > 20 })
    }

    fn ipv6(head: &[u8], l3: usize) -> Option<Self> {
        let header: [u8; 40] = get(head, l3)?;
        let [version, _, _, _, _, _, mut protocol, ..] = header;
        if version >> 4 != 6 {
            return None;
        }
        let (mut l4, mut next_header) = (l3 + 40, l3 + 6);
        for _ in 0..MAX_EXTENSIONS {
            if protocol != HOP_BY_HOP && protocol != DESTINATION_OPTIONS {
                break;
            }
            let [next, len] = get(head, l4)?;
            (protocol, next_header) = (next, l4);
            l4 += (usize::from(len) + 1) * 8;
        }
        (l4 <= head.len()).then_some(Self { ip: Ip::V6, l3, l4, protocol, next_header, has_options: false })
    }

    /// Writes the length of the packet, which is `len` with the IP header, and for IPv4 the checksum, and `index` on top of the
    /// identification if this is a packet of its own.
    pub(super) fn set_lengths(
        &self,
        head: &mut [u8; MAX_HEAD],
        len: usize,
        index: Option<u16>,
    ) -> Option<()> {
        if self.ip == Ip::V6 {
            let len = u16::try_from(len.checked_sub(40)?).ok()?;
            return put(head, self.l3 + 4, len.to_be_bytes());
        }
        put(head, self.l3 + 2, u16::try_from(len).ok()?.to_be_bytes())?;
        if let Some(index) = index {
            let identification = u16::from_be_bytes(get(head, self.l3 + 4)?);
            put(head, self.l3 + 4, identification.wrapping_add(index).to_be_bytes())?;
        }
        put(head, self.l3 + 10, [0, 0])?;
        let mut sum = Checksum::new();
        sum.add(head.get(self.l3..self.l4)?);
        put(head, self.l3 + 10, sum.value().to_be_bytes())
    }

    /// The pseudo header, for a transport of `len` bytes.
    pub(super) fn pseudo(&self, head: &[u8; MAX_HEAD], len: u32) -> Option<Checksum> {
        let addresses = match self.ip {
            Ip::V4 => head.get(self.l3 + 12..self.l3 + 20)?,
            Ip::V6 => head.get(self.l3 + 8..self.l3 + 40)?,
        };
        // Source and destination are beside one another, and a sum does not care where one ends.
        Some(Checksum::pseudo(addresses, &[], self.protocol, len))
    }
}
