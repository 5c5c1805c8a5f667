//! [`Packet`]: a frame on its way through the switch, and the [`Pool`] it comes from.

use std::collections::VecDeque;
use std::sync::Arc;

use super::DropReason;
use super::vlan::{Tag, is_tag};
use crate::{Frame, Gso, MacAddr, VnetHeader};

/// Shortest frame: a header.
const MIN_FRAME: usize = 14;
/// Longest frame: the largest IP packet, with its Ethernet header and a tag.
pub(super) const MAX_FRAME: usize = 65_535 + 14 + 4;
const TAG: usize = 4;

/// A frame, copied out of the sender's memory once and shared by all who get it. It lies here without its outer VLAN tag.
#[derive(Debug)]
pub(super) struct Packet {
    data: Box<[u8]>,
    start: usize,
    end: usize,
    /// Offsets are those of the frame without the tag.
    pub(super) header: VnetHeader,
    /// The tag it came with.
    pub(super) tag: Option<Tag>,
    /// Where it belongs.
    pub(super) vlan: u16,
    /// Whether it came from an isolated port.
    pub(super) isolated: bool,
}

impl Packet {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            data: vec![0; capacity].into_boxed_slice(),
            start: 0,
            end: 0,
            header: VnetHeader::default(),
            tag: None,
            vlan: 0,
            isolated: false,
        }
    }

    /// Memory that it takes.
    pub(super) fn capacity(&self) -> usize {
        self.data.len()
    }

    /// The frame without its tag.
    pub(super) fn bytes(&self) -> &[u8] {
        self.data.get(self.start..self.end).unwrap_or_default()
    }

    /// Takes a frame of `len` bytes that `copy` puts into the buffer, takes the tag off, and checks what the header says.
    pub(super) fn fill(
        &mut self,
        header: &VnetHeader,
        len: usize,
        copy: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<(), DropReason> {
        let room = self.data.get_mut(..len).ok_or(DropReason::Malformed)?;
        if len < MIN_FRAME || copy(room) != len {
            return Err(DropReason::Malformed);
        }
        (self.start, self.end, self.header, self.tag) = (0, len, *header, None);
        // What the sender says of its own checksum is no reason to believe it.
        self.header.checksum_valid = false;
        if is_tag(self.ethertype()) {
            self.take_tag_off()?;
        }
        self.check_header()
    }

    /// Takes a part of `whole`, which was cut: a complete frame, of the same VLAN and with the same tag.
    pub(super) fn fill_part(&mut self, whole: &Self, head: &[u8], data: &Frame<'_, '_>) -> Option<()> {
        let len = head.len() + data.len();
        let room = self.data.get_mut(..len)?;
        let (front, back) = room.split_at_mut_checked(head.len())?;
        front.copy_from_slice(head);
        (data.read_at(0, back) == data.len()).then_some(())?;
        (self.start, self.end, self.header) = (0, len, VnetHeader::default());
        (self.tag, self.vlan, self.isolated) = (whole.tag, whole.vlan, whole.isolated);
        Some(())
    }

    fn take_tag_off(&mut self) -> Result<(), DropReason> {
        let bytes = self.data.get_mut(..self.end).unwrap_or_default();
        let &[t0, t1, c0, c1] = bytes.get(12..).and_then(<[u8]>::first_chunk).ok_or(DropReason::Malformed)?;
        if self.end < MIN_FRAME + TAG {
            return Err(DropReason::Malformed);
        }
        self.tag = Some(Tag { tpid: u16::from_be_bytes([t0, t1]), tci: u16::from_be_bytes([c0, c1]) });
        bytes.copy_within(..12, TAG);
        self.start = TAG;
        if let Some((start, _)) = &mut self.header.checksum {
            *start = start.checked_sub(4).ok_or(DropReason::Malformed)?;
        }
        self.header.hdr_len = self.header.hdr_len.saturating_sub(4);
        Ok(())
    }

    /// The values in the header are the guest's, and another guest will work with them.
    fn check_header(&self) -> Result<(), DropReason> {
        let len = self.end - self.start;
        if let Some((start, offset)) = self.header.checksum {
            let field = usize::from(start).saturating_add(offset.into());
            if usize::from(start) < MIN_FRAME || field.saturating_add(2) > len {
                return Err(DropReason::Malformed);
            }
        }
        let Some(gso) = self.header.gso else {
            return Ok(());
        };
        let fits = match gso {
            Gso::Tcp4 => self.ethertype() == 0x0800,
            Gso::Tcp6 => self.ethertype() == 0x86DD,
            Gso::Udp | Gso::UdpFragments => matches!(self.ethertype(), 0x0800 | 0x86DD),
        };
        if fits && self.header.gso_size > 0 && self.header.checksum.is_some() {
            Ok(())
        } else {
            Err(DropReason::Malformed)
        }
    }

    fn mac_at(&self, at: usize) -> MacAddr {
        MacAddr(self.bytes().get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or_default())
    }

    pub(super) fn destination(&self) -> MacAddr {
        self.mac_at(0)
    }

    pub(super) fn source(&self) -> MacAddr {
        self.mac_at(6)
    }

    /// Of what follows the tag.
    pub(super) fn ethertype(&self) -> u16 {
        self.bytes().get(12..).and_then(<[u8]>::first_chunk).copied().map_or(0, u16::from_be_bytes)
    }

    /// Whether there is another tag under the one that was taken off.
    pub(super) fn has_inner_tag(&self) -> bool {
        is_tag(self.ethertype())
    }

    /// Length with a tag or without.
    pub(super) fn len(&self, tagged: bool) -> usize {
        self.end - self.start + if tagged { TAG } else { 0 }
    }

    /// The frame in parts: addresses, tag, and the rest.
    pub(super) fn parts<'a>(&'a self, tag: Option<&'a [u8; TAG]>) -> [&'a [u8]; 3] {
        let (addresses, rest) = self.bytes().split_at_checked(12).unwrap_or_default();
        [addresses, tag.map_or(&[], <[u8; TAG]>::as_slice), rest]
    }

    /// The header of the frame with a tag or without.
    pub(super) fn header(&self, tagged: bool) -> VnetHeader {
        let mut header = self.header;
        if tagged {
            if let Some((start, _)) = &mut header.checksum {
                *start = start.saturating_add(4);
            }
            if header.hdr_len != 0 {
                header.hdr_len = header.hdr_len.saturating_add(4);
            }
        }
        header
    }

    /// A number that is the same for all frames of a flow.
    pub(super) fn flow(&self) -> u32 {
        let bytes = self.bytes();
        let word =
            |at: usize| bytes.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_be_bytes);
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        let mix = |hash: u32, word: u32| (hash.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B1);
        let (protocol, ports, addresses) = match self.ethertype() {
            // A fragment has no ports but in the first, so none are looked at.
            0x0800 if word(20) & 0x3FFF_0000 != 0 => (0, 0, 26..34),
            0x0800 => (byte(23), 14 + usize::from(byte(14) & 0xF) * 4, 26..34),
            0x86DD => (byte(20), 54, 22..54),
            _ => (0, 0, 0..12),
        };
        let mut hash = addresses.step_by(4).fold(u32::from(protocol), |hash, at| mix(hash, word(at)));
        if matches!(protocol, 6 | 17) {
            hash = mix(hash, word(ports));
        }
        hash ^ (hash >> 16)
    }
}

/// Sizes of buffers, and how many of each are kept.
const CLASSES: [(usize, usize); 3] = [(2048, 256), (10_240, 32), (MAX_FRAME + 3, 32)];

/// Buffers of one sender. A buffer is free again when all who were given the packet dropped it; nobody has to bring it back.
#[derive(Debug, Default)]
pub(super) struct Pool {
    kept: [VecDeque<Arc<Packet>>; 3],
}

impl Pool {
    /// A packet with room for `len` bytes that nobody else has.
    pub(super) fn take(&mut self, len: usize) -> Option<Arc<Packet>> {
        let ((capacity, _), kept) =
            CLASSES.iter().zip(&mut self.kept).find(|((capacity, _), _)| len <= *capacity)?;
        // The oldest first: it is the likeliest to be free. If one destination sleeps on it, look behind it.
        for _ in 0..4 {
            let Some(mut packet) = kept.pop_front() else {
                break;
            };
            if Arc::get_mut(&mut packet).is_some() {
                return Some(packet);
            }
            kept.push_back(packet);
        }
        Some(Arc::new(Packet::new(*capacity)))
    }

    /// Keeps the packet for later frames; others may still have it.
    pub(super) fn keep(&mut self, packet: Arc<Packet>) {
        let class =
            CLASSES.iter().zip(&mut self.kept).find(|((capacity, _), _)| *capacity == packet.capacity());
        if let Some(((_, most), kept)) = class
            && kept.len() < *most
        {
            kept.push_back(packet);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(header: &VnetHeader, frame: &[u8]) -> Result<Packet, DropReason> {
        let mut packet = Packet::new(2048);
        packet.fill(header, frame.len(), |room| {
            room.copy_from_slice(frame);
            frame.len()
        })?;
        Ok(packet)
    }

    fn frame(tags: &[[u8; 4]]) -> Vec<u8> {
        let mut frame = vec![1; 12];
        frame.extend(tags.concat());
        frame.extend([8, 0]);
        frame.extend([7; 46]);
        frame
    }

    #[test]
    fn the_outer_tag_is_taken_off_and_can_be_put_back() {
        let tagged = frame(&[[0x81, 0, 0xA0, 5], [0x81, 0, 0, 9]]);
        let header = VnetHeader { checksum: Some((42, 6)), hdr_len: 50, ..VnetHeader::default() };
        let packet = filled(&header, &tagged).unwrap();
        assert_eq!(packet.tag, Some(Tag { tpid: 0x8100, tci: 0xA005 }));
        assert_eq!(packet.bytes(), frame(&[[0x81, 0, 0, 9]]));
        assert!(packet.has_inner_tag());
        assert_eq!(packet.header.checksum, Some((38, 6)));
        assert_eq!(packet.header(true), header);
        assert_eq!(packet.parts(Some(&[0x81, 0, 0xA0, 5])).concat(), tagged);
    }

    #[test]
    fn lies_in_the_header_are_refused() {
        let plain = frame(&[]);
        let refused = |header: VnetHeader| filled(&header, &plain).is_err();
        let good = VnetHeader {
            checksum: Some((34, 16)),
            gso: Some(Gso::Tcp4),
            gso_size: 1000,
            ..VnetHeader::default()
        };
        assert!(!refused(good));
        assert!(refused(VnetHeader { checksum: Some((34, 0xFFFF)), ..good }));
        assert!(refused(VnetHeader { checksum: Some((60, 0)), ..good }));
        assert!(refused(VnetHeader { checksum: Some((0, 0)), ..good }));
        assert!(refused(VnetHeader { checksum: None, ..good }));
        assert!(refused(VnetHeader { gso_size: 0, ..good }));
        assert!(refused(VnetHeader { gso: Some(Gso::Tcp6), ..good }));
        assert!(!filled(&VnetHeader { checksum_valid: true, ..good }, &plain).unwrap().header.checksum_valid);
    }

    #[test]
    fn what_is_too_short_for_its_headers_is_refused() {
        let tagged = frame(&[[0x81, 0, 0, 5]]);
        for len in 0..18 {
            assert!(filled(&VnetHeader::default(), &tagged[..len]).is_err(), "{len}");
        }
        assert!(filled(&VnetHeader::default(), &tagged[..18]).is_ok());
    }

    #[test]
    fn a_flow_is_told_by_addresses_and_ports_but_not_by_data() {
        let mut udp = frame(&[]);
        (udp[14], udp[20], udp[23]) = (0x45, 0, 17);
        udp[21] = 0;
        let flow = |bytes: &[u8]| filled(&VnetHeader::default(), bytes).unwrap().flow();
        let first = flow(&udp);
        udp[45] = 99;
        assert_eq!(flow(&udp), first);
        udp[37] = 99;
        assert_ne!(flow(&udp), first);
        udp[20] = 0x20;
        let fragment = flow(&udp);
        udp[37] = 98;
        assert_eq!(flow(&udp), fragment);
    }

    #[test]
    fn a_buffer_is_used_again_when_nobody_has_it() {
        let mut pool = Pool::default();
        let packet = pool.take(60).unwrap();
        let first = Arc::as_ptr(&packet);
        let other = Arc::clone(&packet);
        pool.keep(packet);
        assert_ne!(Arc::as_ptr(&pool.take(60).unwrap()), first);
        drop(other);
        assert_eq!(Arc::as_ptr(&pool.take(60).unwrap()), first);
        assert!(pool.take(MAX_FRAME).is_some());
        assert!(pool.take(MAX_FRAME + 4).is_none());
    }
}
