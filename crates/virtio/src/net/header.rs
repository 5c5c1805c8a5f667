//! The header before each frame (5.1.6): what a driver says in it is checked here, once, before anything believes it.

use freestone_net::{Gso, Offloads, VnetHeader};

/// Bytes of `virtio_net_hdr_v1`: the header of a port, and the number of buffers.
pub(super) const HEADER_LEN: usize = VnetHeader::LEN + 2;
/// Bytes of an Ethernet header.
pub(super) const ETHERNET_LEN: usize = 14;
/// Most bytes of a frame: the largest IP packet with an Ethernet header and two VLAN tags.
pub(super) const MAX_FRAME: usize = 65535 + ETHERNET_LEN + 8;

/// Why a frame of a driver is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The header makes no sense, or none for a frame of this length.
    Malformed,
    /// It asks for what was not negotiated.
    Offloads,
    /// The frame is none, or larger than any.
    Length,
}

/// What a driver that may leave `allowed` undone says of a frame of `len` bytes. All that is in it holds for this frame.
pub(super) fn check(bytes: [u8; HEADER_LEN], len: usize, allowed: Offloads) -> Result<VnetHeader, Refusal> {
    if !(ETHERNET_LEN..=MAX_FRAME).contains(&len) {
        return Err(Refusal::Length);
    }
    // The number of buffers means nothing from the driver.
    let header = bytes.first_chunk().and_then(|bytes| VnetHeader::from_bytes(*bytes));
    let mut header = header.ok_or(Refusal::Malformed)?;
    if !allowed.contains(header.needs()) {
        return Err(Refusal::Offloads);
    }
    if let Some((start, offset)) = header.checksum
        && usize::from(start) + usize::from(offset) + 2 > len
    {
        return Err(Refusal::Malformed);
    }
    match header.gso {
        None => (header.gso_size, header.ecn) = (0, false),
        // "the driver MUST also set the VIRTIO_NET_HDR_F_NEEDS_CSUM bit in flags and MUST set gso_size" (5.1.6.2.1).
        Some(_) if header.gso_size == 0 || header.checksum.is_none() => return Err(Refusal::Malformed),
        Some(Gso::Udp | Gso::UdpFragments) if header.ecn => return Err(Refusal::Malformed),
        Some(_) => {}
    }
    // A hint, and a driver never knows a checksum to be right.
    if usize::from(header.hdr_len) > len {
        header.hdr_len = 0;
    }
    header.checksum_valid = false;
    Ok(header)
}

/// The header of a frame for a driver, in `buffers` buffers.
pub(super) fn for_driver(header: VnetHeader, buffers: u16) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes
        .iter_mut()
        .zip(header.to_bytes().into_iter().chain(buffers.to_le_bytes()))
        .for_each(|(to, b)| *to = b);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(header: VnetHeader, len: usize) -> Result<VnetHeader, Refusal> {
        check(for_driver(header, 0), len, Offloads::all())
    }

    const TCP: VnetHeader = VnetHeader {
        checksum: Some((34, 16)),
        checksum_valid: false,
        gso: Some(Gso::Tcp4),
        gso_size: 1448,
        hdr_len: 66,
        ecn: false,
    };

    #[test]
    fn a_good_header_is_as_it_was() {
        assert_eq!(checked(TCP, 1514), Ok(TCP));
        assert_eq!(checked(VnetHeader { ecn: true, ..TCP }, 1514), Ok(VnetHeader { ecn: true, ..TCP }));
        assert_eq!(checked(VnetHeader::default(), 60), Ok(VnetHeader::default()));
    }

    #[test]
    fn a_checksum_beyond_the_frame_is_malformed() {
        for (start, offset, len, good) in
            [(34, 16, 52, true), (34, 16, 51, false), (u16::MAX, u16::MAX, 1514, false), (0, 0, 14, true)]
        {
            let header = VnetHeader { checksum: Some((start, offset)), ..VnetHeader::default() };
            assert_eq!(checked(header, len).is_ok(), good, "{start} {offset} {len}");
        }
    }

    #[test]
    fn segments_need_a_size_and_a_checksum() {
        assert_eq!(checked(VnetHeader { gso_size: 0, ..TCP }, 1514), Err(Refusal::Malformed));
        assert_eq!(checked(VnetHeader { checksum: None, ..TCP }, 1514), Err(Refusal::Malformed));
        let ecn = VnetHeader { gso: Some(Gso::Udp), ecn: true, ..TCP };
        assert_eq!(checked(ecn, 1514), Err(Refusal::Malformed));
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        for allowed in [Offloads::empty(), Offloads::CSUM, Offloads::TSO4, Offloads::CSUM | Offloads::TSO6] {
            assert_eq!(check(for_driver(TCP, 0), 1514, allowed), Err(Refusal::Offloads), "{allowed:?}");
        }
        assert!(check(for_driver(TCP, 0), 1514, Offloads::CSUM | Offloads::TSO4).is_ok());
        let ecn = VnetHeader { ecn: true, ..TCP };
        assert_eq!(check(for_driver(ecn, 0), 1514, Offloads::CSUM | Offloads::TSO4), Err(Refusal::Offloads));
    }

    #[test]
    fn types_that_there_are_not_are_malformed_with_any_features() {
        for kind in [2, 6, 0x7f, 0x82] {
            let mut bytes = for_driver(TCP, 0);
            bytes[1] = kind;
            assert_eq!(check(bytes, 1514, Offloads::all()), Err(Refusal::Malformed));
        }
    }

    #[test]
    fn frames_have_at_least_an_ethernet_header_and_at_most_an_ip_packet() {
        for (len, good) in [(0, false), (13, false), (14, true), (MAX_FRAME, true), (MAX_FRAME + 1, false)] {
            assert_eq!(checked(VnetHeader::default(), len).is_ok(), good, "{len}");
        }
    }

    #[test]
    fn what_is_only_a_hint_is_dropped_where_it_is_nonsense() {
        let header = VnetHeader {
            hdr_len: 100,
            checksum_valid: true,
            ecn: true,
            gso_size: 9,
            ..VnetHeader::default()
        };
        assert_eq!(checked(header, 60), Ok(VnetHeader::default()));
    }
}
