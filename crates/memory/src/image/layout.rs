//! [`ImageLayout`]: which guest-physical address is where in an image.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Extent;
use crate::guest_mem::{MemoryMap, Region};
use crate::layout::{MAX_PHYS_BITS, PAGE_SIZE, RamRange};
use crate::{Error, GuestMem, Result};

/// The ranges of guest memory that an image holds, one after the other. Sorted by address, whole pages, apart from each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayout {
    /// Each with its offset in the image.
    ranges: Vec<(u64, RamRange)>,
    size: u64,
}

impl ImageLayout {
    /// More ranges than this are refused.
    pub const MAX_RANGES: usize = 1 << 12;
    /// A larger image than this is refused: 16 TiB.
    pub const MAX_SIZE: u64 = 1 << 44;

    /// Checks ranges, which may come from anywhere.
    ///
    /// # Errors
    /// [`Error::ImageLayout`]: none or too many ranges, not whole pages, not sorted or overlapping, beyond the 52-bit address
    /// space, or too large in all.
    pub fn new(ranges: &[RamRange]) -> Result<Self> {
        let refuse =
            |range: &RamRange, reason| Err(Error::ImageLayout { gpa: range.start, len: range.len, reason });
        let first = RamRange { start: 0, len: 0 };
        if ranges.is_empty() {
            return refuse(&first, "an image has at least one page");
        }
        if ranges.len() > Self::MAX_RANGES {
            return refuse(ranges.first().unwrap_or(&first), "there are too many ranges");
        }
        let mut placed = Vec::with_capacity(ranges.len());
        let (mut size, mut free) = (0u64, 0);
        for range in ranges {
            if range.len == 0
                || !range.start.is_multiple_of(PAGE_SIZE)
                || !range.len.is_multiple_of(PAGE_SIZE)
            {
                return refuse(range, "address and length must be non-zero multiples of the page size");
            }
            if range.start < free {
                return refuse(range, "ranges must be sorted and must not overlap");
            }
            free = match range.end() {
                Some(end) if end <= 1 << MAX_PHYS_BITS => end,
                _ => return refuse(range, "it goes beyond the 52-bit guest-physical address space"),
            };
            placed.push((size, *range));
            // Ranges below 2^52 that do not overlap cannot add up to more.
            size += range.len;
            if size > Self::MAX_SIZE {
                return refuse(range, "the image would be too large");
            }
        }
        Ok(Self { ranges: placed, size })
    }

    /// The RAM that the machine is started with.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(mem: &GuestMem) -> Result<Self> {
        Self::new(&mem.regions().iter().map(|region| range(region)).collect::<Vec<_>>())
    }

    /// All memory as it is now: the boot RAM, and what was [inserted](GuestMem::insert_region), except for shared mappings of
    /// files, which keep their bytes by themselves.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_all(mem: &GuestMem) -> Result<Self> {
        let view = mem.view();
        Self::new(&view.iter().filter(|region| is_ram(region)).map(range).collect::<Vec<_>>())
    }

    /// The ranges, sorted by address.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = RamRange> {
        self.ranges.iter().map(|(_, range)| *range)
    }

    /// Length of the image in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of chunks that have a checksum: of [`CHUNK`](super::CHUNK) bytes each, the last may be shorter.
    pub fn chunks(&self) -> usize {
        // At most 2^24, by the largest size.
        usize::try_from(self.size.div_ceil(super::CHUNK)).unwrap_or(usize::MAX)
    }

    /// Where the byte at `gpa` is in the image.
    pub fn offset_of(&self, gpa: u64) -> Option<u64> {
        let after = self.ranges.partition_point(|(_, range)| range.start <= gpa);
        let (offset, range) = self.ranges.get(after.checked_sub(1)?)?;
        Some(gpa - range.start).filter(|within| *within < range.len).map(|within| offset + within)
    }

    /// The guest-physical ranges that bytes of the image are, in their order. What is beyond the image is left out.
    pub fn pieces(&self, extent: Extent) -> impl Iterator<Item = RamRange> {
        let end = extent.offset.saturating_add(extent.len).min(self.size);
        let first = self.ranges.partition_point(|(offset, _)| *offset <= extent.offset).saturating_sub(1);
        self.ranges.get(first..).unwrap_or_default().iter().map_while(move |(offset, range)| {
            let from = extent.offset.max(*offset);
            let to = end.min(offset + range.len);
            (from < to).then(|| RamRange { start: range.start + (from - offset), len: to - from })
        })
    }

    /// The parts of regions that the image is made of, in its order.
    pub(crate) fn segments<'a>(&self, map: &'a MemoryMap) -> Result<Vec<Segment<'a>>> {
        let mut segments = Vec::new();
        for &(offset, RamRange { start, len }) in &self.ranges {
            let mut done = 0;
            while done < len {
                let gpa = start + done;
                let Some(region) = map.find_region(GuestAddress(gpa)) else {
                    return Err(Error::ImageMemory { gpa, len: len - done, reason: "is not there" });
                };
                let from = gpa - region.start_addr().0;
                let part = (region.len() - from).min(len - done);
                segments.push(Segment { region, from, len: part, offset: offset + done });
                done += part;
            }
        }
        Ok(segments)
    }
}

/// Part of a region, and its place in the image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub(crate) region: &'a Region,
    /// Offset in the region.
    pub(crate) from: u64,
    pub(crate) len: u64,
    /// Offset in the image.
    pub(crate) offset: u64,
}

fn range(region: &Region) -> RamRange {
    RamRange { start: region.start_addr().0, len: region.len() }
}

/// Whether the region's content is lost with the process.
fn is_ram(region: &Region) -> bool {
    match GuestMemoryRegion::file_offset(region) {
        Some(file) if region.flags() & libc::MAP_SHARED != 0 => {
            // Only memory files know of seals.
            rustix::fs::fcntl_get_seals(file.file()).is_ok()
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(ranges: &[(u64, u64)]) -> Result<ImageLayout> {
        ImageLayout::new(&ranges.iter().map(|&(start, len)| RamRange { start, len }).collect::<Vec<_>>())
    }

    #[test]
    fn ranges_lie_one_after_the_other() {
        let layout = layout(&[(0, 0x3000), (0x1_0000, 0x2000)]).unwrap();
        assert_eq!((layout.size(), layout.chunks()), (0x5000, 1));
        assert_eq!(layout.offset_of(0x2FFF), Some(0x2FFF));
        assert_eq!(layout.offset_of(0x3000), None);
        assert_eq!(layout.offset_of(0x1_0001), Some(0x3001));
        assert_eq!(layout.offset_of(0x1_2000), None);
    }

    #[test]
    fn what_is_no_layout_is_refused() {
        let many: Vec<_> = (0..=ImageLayout::MAX_RANGES as u64).map(|page| (page * 0x1000, 0x1000)).collect();
        for ranges in [
            &[][..],
            &[(0, 0)],
            &[(0, 0x1001)],
            &[(1, 0x1000)],
            &[(0, 0x2000), (0x1000, 0x1000)],
            &[(0x2000, 0x1000), (0, 0x1000)],
            &[(1 << 52, 0x1000)],
            &[(!0xFFF, 0x1000)],
            &[(0, !0xFFF)],
            &[(0, ImageLayout::MAX_SIZE), (ImageLayout::MAX_SIZE, 0x1000)],
            &many,
        ] {
            let error = layout(ranges).unwrap_err();
            assert!(matches!(error, Error::ImageLayout { .. }), "{error:?}");
        }
        layout(&many[1..]).unwrap();
    }

    /// Ranges that any file could hold, sensible or not.
    fn any_ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        let number =
            prop_oneof![Just(0), 0..0x10_0000u64, (0..64u64).prop_map(|page| page << 12), any::<u64>()];
        prop::collection::vec((number.clone(), number), 0..6)
    }

    /// Gaps and lengths in pages that make a layout.
    fn good_ranges() -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0..5u64, 1..9u64), 1..8).prop_map(|steps| {
            let mut at = 0;
            steps
                .into_iter()
                .map(|(gap, len)| {
                    let start = at + gap;
                    at = start + len;
                    (start << 12, len << 12)
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_taken_for_a_layout_is_sorted_whole_pages_in_the_address_space(ranges in any_ranges()) {
            if let Ok(layout) = layout(&ranges) {
                let mut free = 0;
                for range in layout.ranges() {
                    prop_assert!(range.start >= free && range.start % 4096 == 0 && range.len % 4096 == 0);
                    free = range.end().unwrap();
                    prop_assert!(range.len > 0 && free <= 1 << 52);
                }
                prop_assert_eq!(layout.ranges().map(|range| range.len).sum::<u64>(), layout.size());
            }
        }

        #[test]
        fn every_page_has_its_own_place_and_comes_back_from_it(ranges in good_ranges()) {
            let layout = layout(&ranges).unwrap();
            let mut next = 0;
            for range in layout.ranges() {
                for gpa in (range.start..range.end().unwrap()).step_by(4096) {
                    prop_assert_eq!(layout.offset_of(gpa), Some(next));
                    let back: Vec<_> = layout.pieces(Extent { offset: next, len: 4096 }).collect();
                    prop_assert_eq!(back, vec![RamRange { start: gpa, len: 4096 }]);
                    next += 4096;
                }
            }
            prop_assert_eq!(next, layout.size());
        }

        #[test]
        fn pieces_of_any_extent_are_those_bytes_of_it_that_the_image_has(
            ranges in good_ranges(), offset in 0..80u64, len in 0..80u64,
        ) {
            let layout = layout(&ranges).unwrap();
            let (offset, len) = (offset << 12, len << 12);
            let pieces: Vec<_> = layout.pieces(Extent { offset, len }).collect();
            let expected = (offset + len).min(layout.size()).saturating_sub(offset);
            prop_assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), expected);
            let mut at = offset;
            for piece in pieces {
                prop_assert_eq!(layout.offset_of(piece.start), Some(at));
                at += piece.len;
            }
        }
    }
}
