//! The least of ELF: where the segments of our own guest images go.

use std::ops::Range;

/// Type of a segment that is to be loaded.
const PT_LOAD: u32 = 1;

/// A guest image: static ELF64, little endian. Our images are entered by PVH at their ELF entry point.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    bytes: &'a [u8],
}

impl<'a> Image<'a> {
    /// Takes `bytes` for an image; `None` if it is not one.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.starts_with(b"\x7FELF\x02\x01").then_some(Self { bytes })
    }

    /// Guest-physical address of the first instruction.
    pub fn entry(&self) -> Option<u64> {
        self.word(24)
    }

    /// Guest-physical address and contents of each segment. What follows the contents up to the segment's size is zero.
    pub fn segments(&self) -> impl Iterator<Item = (u64, &'a [u8])> + '_ {
        let table = self.word(32).unwrap_or(0);
        let count = u64::from(self.half(56).unwrap_or(0));
        (0..count).filter_map(move |i| self.segment(table.checked_add(i * 56)?))
    }

    fn segment(&self, header: u64) -> Option<(u64, &'a [u8])> {
        let [a, b, c, d] = self.array(header)?;
        if u32::from_le_bytes([a, b, c, d]) != PT_LOAD {
            return None;
        }
        let (offset, size) = (self.word(header + 8)?, self.word(header + 32)?);
        let range = Range { start: offset.try_into().ok()?, end: offset.checked_add(size)?.try_into().ok()? };
        Some((self.word(header + 24)?, self.bytes.get(range)?))
    }

    fn array<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.bytes.get(usize::try_from(at).ok()?..)?.first_chunk().copied()
    }

    fn word(&self, at: u64) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    fn half(&self, at: u64) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_images_have_their_parameter_block_first() {
        for (name, bytes) in freestone_guest::ALL {
            let image = Image::new(bytes).unwrap();
            let (gpa, data) = image.segments().next().unwrap();
            assert_eq!(gpa, freestone_guest::PARAMS, "{name}");
            let entry = image.entry().unwrap();
            assert!((gpa..gpa + data.len() as u64).contains(&entry), "{name}: entry {entry:#x}");
        }
    }

    #[test]
    fn truncated_image_has_no_segment() {
        let image = Image::new(freestone_guest::START.get(..200).unwrap()).unwrap();
        assert_eq!(image.segments().count(), 0);
        assert!(Image::new(b"\x7FELF\x01\x01").is_none());
    }
}
