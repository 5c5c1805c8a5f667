//! The log of pages that the VMM wrote to: what a snapshot or a migration has to save again.
//!
//! Devices and loaders write through vm-memory, which sets a bit per 4 KiB page. The guest's own writes are not seen
//! here; a hypervisor logs them, and [`DirtyPages::merge`] puts the two together.

use std::num::NonZeroUsize;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::guest_mem::{MemoryView, Region};
use crate::layout::PAGE_SIZE;

/// Bytes per bit of the dirty bitmap: the size of a page of KVM's dirty log, so that the two can be merged.
const DIRTY_PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// A clean bitmap for a region of `len` bytes. `None` for what no process can map.
pub(crate) fn new_bitmap(len: u64) -> Option<AtomicBitmap> {
    usize::try_from(len).ok().map(|len| AtomicBitmap::new(len, DIRTY_PAGE))
}

/// The region's own bitmap; the method that `GuestMemoryRegion` has gives only a slice of it.
pub(crate) fn dirty_bitmap(region: &Region) -> Option<&AtomicBitmap> {
    MmapRegion::bitmap(region).as_ref()
}

/// The dirty bitmaps of all regions that have one, as they were when the log was asked for: the RAM that the machine is started
/// with, and what was inserted with [`RegionBuilder::dirty_log`](crate::RegionBuilder::dirty_log). See
/// [`crate::GuestMem::dirty_log`].
#[derive(Debug, Clone)]
pub struct DirtyLog {
    view: MemoryView,
}

impl DirtyLog {
    pub(crate) fn new(view: MemoryView) -> Self {
        Self { view }
    }

    fn bitmaps(&self) -> impl Iterator<Item = (&Region, &AtomicBitmap)> {
        self.view.iter().filter_map(|region| Some((region, dirty_bitmap(region)?)))
    }

    /// Whether the page at `gpa` was written to since the log was last taken. `false` where there is no RAM.
    pub fn is_dirty(&self, gpa: GuestAddress) -> bool {
        self.bitmaps().any(|(region, bitmap)| {
            let offset = region.to_region_addr(gpa).and_then(|offset| usize::try_from(offset.0).ok());
            offset.is_some_and(|offset| bitmap.is_addr_set(offset))
        })
    }

    /// The dirty pages of every region, sorted by address, and forgets them.
    ///
    /// A write that goes on meanwhile is in this result or in the next. Its bit is set after the bytes are, so a page
    /// copied after its bit was taken has the bytes, or its bit is set again.
    pub fn take(&self) -> Vec<DirtyPages> {
        self.bitmaps()
            .map(|(region, bitmap)| DirtyPages { start: region.start_addr(), bitmap: bitmap.get_and_reset() })
            .collect()
    }

    /// Forgets all pages: what is written from now on is in the log. One store for 256 KiB of memory, no allocation.
    ///
    /// So a log that is wanted later (live migration) is asked for when the memory is made, and cleared when it begins to count.
    pub fn clear(&self) {
        self.bitmaps().for_each(|(_, bitmap)| bitmap.reset());
    }
}

/// The dirty pages of one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyPages {
    start: GuestAddress,
    bitmap: Vec<u64>,
}

impl DirtyPages {
    /// The pages of a bitmap in the format of [`bitmap`](Self::bitmap), for a region that begins at `start`.
    pub fn new(start: GuestAddress, bitmap: Vec<u64>) -> Self {
        Self { start, bitmap }
    }

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
                .map(move |bit| page_at(self.start, index * u64::from(u64::BITS) + bit))
        })
    }
}

/// Address of a page by its number in the region. A bitmap made elsewhere may begin anywhere, so the sum may wrap: such an
/// address is in no memory, or in memory that is saved once more than needed.
fn page_at(start: GuestAddress, index: u64) -> u64 {
    start.0.wrapping_add(index.wrapping_mul(PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::layout::RamRange;
    use crate::{GuestMem, GuestMemBuilder, RegionBuilder};

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
    fn clearing_the_log_forgets_what_was_written_before() {
        let mem = two_regions();
        mem.view().write_obj(1u8, GuestAddress(0)).unwrap();
        mem.dirty_log().unwrap().clear();
        mem.view().write_obj(1u8, GuestAddress(0x3000)).unwrap();
        assert_eq!(mem.take_dirty().unwrap()[0].pages().collect::<Vec<_>>(), [0x3000]);
    }

    #[test]
    fn a_region_inserted_with_a_log_is_in_it() {
        let mem = two_regions();
        let builder = RegionBuilder::new(2 << 32, 0x2000);
        mem.insert_region(builder.dirty_log(mem.logs_dirty()).build().unwrap()).unwrap();
        mem.view().write_obj(1u8, GuestAddress((2 << 32) + 0x1000)).unwrap();
        let dirty = mem.take_dirty().unwrap();
        assert_eq!(dirty[2].pages().collect::<Vec<_>>(), [(2 << 32) + 0x1000]);
    }

    #[test]
    fn a_region_inserted_without_a_log_leaves_the_others_logged() {
        let mem = two_regions();
        mem.insert_region(RegionBuilder::new(2 << 32, 0x2000).build().unwrap()).unwrap();
        mem.view().write_obj(1u8, GuestAddress(2 << 32)).unwrap();
        assert_eq!(mem.take_dirty().unwrap().iter().map(DirtyPages::count).collect::<Vec<_>>(), [0, 0]);
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
