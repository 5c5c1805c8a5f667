//! The log of pages that the VMM wrote to: what a snapshot or a migration has to save again.
//!
//! Devices and loaders write through vm-memory, which sets a bit per 4 KiB page. The guest's own writes are not seen
//! here; a hypervisor logs them, and [`DirtyPages::merge`] puts the two together.

use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryRegion};

use crate::guest_mem::Region;
use crate::layout::PAGE_SIZE;

/// The region's own bitmap; the method that `GuestMemoryRegion` has gives only a slice of it.
pub(crate) fn dirty_bitmap(region: &Region) -> Option<&AtomicBitmap> {
    MmapRegion::bitmap(region).as_ref()
}

/// View of the dirty bitmaps of all regions. See [`crate::GuestMem::dirty_log`].
#[derive(Debug, Clone, Copy)]
pub struct DirtyLog<'a> {
    regions: &'a [Arc<Region>],
}

impl<'a> DirtyLog<'a> {
    /// `None` when the regions have no bitmaps.
    pub(crate) fn new(regions: &'a [Arc<Region>]) -> Option<Self> {
        regions.iter().all(|region| dirty_bitmap(region).is_some()).then_some(Self { regions })
    }

    /// Whether the page at `gpa` was written to since the log was last taken. `false` where there is no RAM.
    pub fn is_dirty(self, gpa: GuestAddress) -> bool {
        self.regions.iter().any(|region| match (dirty_bitmap(region), region.to_region_addr(gpa)) {
            (Some(bitmap), Some(offset)) => {
                usize::try_from(offset.0).is_ok_and(|offset| bitmap.is_addr_set(offset))
            }
            _ => false,
        })
    }

    /// The dirty pages of every region, in the order of the regions, and forgets them.
    ///
    /// A write that goes on meanwhile is in this result or in the next. Its bit is set after the bytes are, so a page
    /// copied after its bit was taken has the bytes, or its bit is set again.
    pub fn take(self) -> Vec<DirtyPages> {
        self.regions
            .iter()
            .map(|region| DirtyPages {
                start: region.start_addr(),
                bitmap: dirty_bitmap(region).map_or_else(Vec::new, AtomicBitmap::get_and_reset),
            })
            .collect()
    }
}

/// The dirty pages of one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyPages {
    start: GuestAddress,
    bitmap: Vec<u64>,
}

impl DirtyPages {
    /// Start of the region.
    pub fn start(&self) -> GuestAddress {
        self.start
    }

    /// One bit for each 4 KiB page, the region's first page in bit 0 of the first word: the format of `KVM_GET_DIRTY_LOG`.
    pub fn bitmap(&self) -> &[u64] {
        &self.bitmap
    }

    /// Adds the pages of a bitmap of the same region, such as the hypervisor's log. Words beyond the region are ignored.
    pub fn merge(&mut self, bitmap: &[u64]) {
        for (mine, other) in self.bitmap.iter_mut().zip(bitmap) {
            *mine |= other;
        }
    }

    /// Number of dirty pages.
    pub fn count(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Guest-physical addresses of the dirty pages, rising.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.bitmap.iter().zip(0u64..).filter(|(word, _)| **word != 0).flat_map(move |(word, index)| {
            (0..u64::from(u64::BITS))
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| self.start.0 + (index * u64::from(u64::BITS) + bit) * PAGE_SIZE)
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::layout::RamRange;
    use crate::{GuestMem, GuestMemBuilder};

    fn two_regions() -> GuestMem {
        let ranges = vec![RamRange { start: 0, len: 0x10_0000 }, RamRange { start: 1 << 32, len: 0x2000 }];
        GuestMemBuilder::with_ranges(ranges).dirty_log(true).build().unwrap()
    }

    #[test]
    fn without_being_asked_for_there_is_no_log() {
        let mem = GuestMem::anonymous(0x1000).unwrap();
        assert!(mem.dirty_log().is_none());
        assert!(mem.take_dirty().is_none());
    }

    #[test]
    fn fresh_memory_is_clean() {
        assert!(two_regions().take_dirty().unwrap().iter().all(|pages| pages.count() == 0));
    }

    #[test]
    fn write_marks_each_page_it_touches() {
        let mem = two_regions();
        mem.view().write_slice(&[0; 0x1002], GuestAddress(0x4_0FFF)).unwrap();
        mem.view().write_obj(1u8, GuestAddress((1 << 32) + 0x1FFF)).unwrap();
        let dirty = mem.take_dirty().unwrap();
        assert_eq!(
            dirty.iter().map(DirtyPages::start).collect::<Vec<_>>(),
            [GuestAddress(0), GuestAddress(1 << 32)]
        );
        assert_eq!(dirty[0].pages().collect::<Vec<_>>(), [0x4_0000, 0x4_1000, 0x4_2000]);
        assert_eq!(dirty[1].pages().collect::<Vec<_>>(), [(1 << 32) + 0x1000]);
    }

    #[test]
    fn read_marks_nothing() {
        let mem = two_regions();
        mem.view().read_obj::<u64>(GuestAddress(0)).unwrap();
        assert_eq!(mem.take_dirty().unwrap()[0].count(), 0);
    }

    #[test]
    fn taking_the_log_clears_it() {
        let mem = two_regions();
        mem.view().write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(mem.take_dirty().unwrap()[0].count(), 1);
        assert_eq!(mem.take_dirty().unwrap()[0].count(), 0);
    }

    #[test]
    fn page_can_be_asked_for_by_address() {
        let mem = two_regions();
        mem.view().write_obj(1u8, GuestAddress(0x5008)).unwrap();
        let log = mem.dirty_log().unwrap();
        assert!(log.is_dirty(GuestAddress(0x5FFF)));
        assert!(!log.is_dirty(GuestAddress(0x6000)));
        assert!(!log.is_dirty(GuestAddress(0x8000_0000)));
    }

    #[test]
    fn log_of_the_hypervisor_can_be_merged() {
        let mem = two_regions();
        mem.view().write_obj(1u8, GuestAddress(0x1000)).unwrap();
        let mut dirty = mem.take_dirty().unwrap();
        dirty[0].merge(&[0b101, 1, 0, 0, u64::MAX]);
        assert_eq!(dirty[0].pages().collect::<Vec<_>>(), [0, 0x1000, 0x2000, 0x4_0000]);
    }
}
