//! [`VnetHeader`]: what is still to be done to a frame, and [`Offloads`]: what a side can do.
//!
//! The format is that of virtio-net (virtio 1.2, section 5.1.6) without `num_buffers`; a tap uses the same.

use bitflags::bitflags;

bitflags! {
    /// What may be left undone in a frame that is given to somebody.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Offloads: u32 {
        /// The checksum of TCP or UDP: only that of the pseudo header is in its field.
        const CSUM = 1 << 0;
        /// A TCP segment over IPv4 that is larger than the MTU.
        const TSO4 = 1 << 1;
        /// The same over IPv6.
        const TSO6 = 1 << 2;
        /// Such a segment with CWR set.
        const ECN = 1 << 3;
        /// A UDP datagram that is to become IP fragments.
        const UFO = 1 << 4;
        /// Several UDP datagrams in one, over IPv4 and IPv6.
        const USO = 1 << 5;
    }
}

/// The kind of a frame that is to be cut into several: `gso_type` (5.1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gso {
    /// `VIRTIO_NET_HDR_GSO_TCPV4`
    Tcp4,
    /// `VIRTIO_NET_HDR_GSO_UDP`: IP fragments.
    UdpFragments,
    /// `VIRTIO_NET_HDR_GSO_TCPV6`
    Tcp6,
    /// `VIRTIO_NET_HDR_GSO_UDP_L4`: datagrams.
    Udp,
}

impl Gso {
    /// What somebody must be able to do to take such a frame.
    pub fn offload(self) -> Offloads {
        match self {
            Self::Tcp4 => Offloads::TSO4,
            Self::Tcp6 => Offloads::TSO6,
            Self::UdpFragments => Offloads::UFO,
            Self::Udp => Offloads::USO,
        }
    }
}

/// Flags and types in the header (5.1.6).
mod value {
    pub(super) const NEEDS_CSUM: u8 = 1;
    pub(super) const DATA_VALID: u8 = 2;
    pub(super) const GSO_NONE: u8 = 0;
    pub(super) const GSO_TCPV4: u8 = 1;
    pub(super) const GSO_UDP: u8 = 3;
    pub(super) const GSO_TCPV6: u8 = 4;
    pub(super) const GSO_UDP_L4: u8 = 5;
    pub(super) const GSO_ECN: u8 = 0x80;
}

/// What is still to be done to a frame. The default is nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// The checksum from byte `start` of the frame to its end is to be put at `start + offset`: (`csum_start`, `csum_offset`).
    pub checksum: Option<(u16, u16)>,
    /// The checksum was found right, or need not be looked at: the frame never left this machine.
    pub checksum_valid: bool,
    /// The frame is to be cut into such of this kind with `gso_size` bytes of data each.
    pub gso: Option<Gso>,
    /// See [`gso`](Self::gso).
    pub gso_size: u16,
    /// Length of all headers of the frame, as a hint; 0 if it was not said.
    pub hdr_len: u16,
    /// The segment has CWR set.
    pub ecn: bool,
}

impl VnetHeader {
    /// Bytes of a header.
    pub const LEN: usize = 10;

    /// Reads a header. `None` if it has a type that there is not. Unknown flags mean nothing.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Option<Self> {
        let [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1] = bytes;
        let gso = match kind & !value::GSO_ECN {
            value::GSO_NONE => None,
            value::GSO_TCPV4 => Some(Gso::Tcp4),
            value::GSO_UDP => Some(Gso::UdpFragments),
            value::GSO_TCPV6 => Some(Gso::Tcp6),
            value::GSO_UDP_L4 => Some(Gso::Udp),
            _ => return None,
        };
        let (start, offset) = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([o0, o1]));
        Some(Self {
            checksum: (flags & value::NEEDS_CSUM != 0).then_some((start, offset)),
            checksum_valid: flags & value::DATA_VALID != 0,
            gso,
            gso_size: u16::from_le_bytes([g0, g1]),
            hdr_len: u16::from_le_bytes([h0, h1]),
            ecn: kind & value::GSO_ECN != 0,
        })
    }

    /// The header as it goes before a frame.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut flags = 0;
        if self.checksum.is_some() {
            flags |= value::NEEDS_CSUM;
        }
        if self.checksum_valid {
            flags |= value::DATA_VALID;
        }
        let mut kind = match self.gso {
            None => value::GSO_NONE,
            Some(Gso::Tcp4) => value::GSO_TCPV4,
            Some(Gso::UdpFragments) => value::GSO_UDP,
            Some(Gso::Tcp6) => value::GSO_TCPV6,
            Some(Gso::Udp) => value::GSO_UDP_L4,
        };
        if self.ecn {
            kind |= value::GSO_ECN;
        }
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let (start, offset) = self.checksum.unwrap_or_default();
        let [s0, s1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1]
    }

    /// What somebody must be able to do to take a frame with this header.
    pub fn needs(&self) -> Offloads {
        let mut needs = Offloads::empty();
        needs.set(Offloads::CSUM, self.checksum.is_some());
        needs.set(Offloads::ECN, self.ecn && self.gso.is_some());
        self.gso.map_or(needs, |gso| needs | gso.offload())
    }
}

/// Offloads that are changed while others look at them.
#[cfg(any(feature = "tap", feature = "switch", feature = "nat"))]
#[derive(Debug)]
pub(crate) struct SharedOffloads(std::sync::atomic::AtomicU32);

#[cfg(any(feature = "tap", feature = "switch", feature = "nat"))]
impl SharedOffloads {
    pub(crate) fn new(offloads: Offloads) -> Self {
        Self(std::sync::atomic::AtomicU32::new(offloads.bits()))
    }

    pub(crate) fn get(&self) -> Offloads {
        Offloads::from_bits_truncate(self.0.load(std::sync::atomic::Ordering::Acquire))
    }

    pub(crate) fn set(&self, offloads: Offloads) {
        self.0.store(offloads.bits(), std::sync::atomic::Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_written_as_it_is_read() {
        let header = VnetHeader {
            checksum: Some((34, 16)),
            gso: Some(Gso::Tcp6),
            gso_size: 1440,
            hdr_len: 74,
            ecn: true,
            ..VnetHeader::default()
        };
        assert_eq!(header.to_bytes(), [1, 0x84, 74, 0, 0xA0, 5, 34, 0, 16, 0]);
        assert_eq!(VnetHeader::from_bytes(header.to_bytes()), Some(header));
        assert_eq!(header.needs(), Offloads::CSUM | Offloads::TSO6 | Offloads::ECN);
        assert_eq!(VnetHeader::from_bytes([0; 10]), Some(VnetHeader::default()));
    }

    #[test]
    fn a_type_that_there_is_not_is_refused() {
        for kind in 0..=255u8 {
            let header = VnetHeader::from_bytes([0, kind, 0, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(header.is_some(), matches!(kind & 0x7F, 0 | 1 | 3 | 4 | 5), "{kind}");
        }
    }
}
