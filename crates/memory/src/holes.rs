//! What was cut out of private file mappings, so that it reads as zeros.
//!
//! A page of a private file mapping that is given back would show the file's bytes again. So anonymous memory is mapped over
//! it, which splits the mapping. A process may have so many mappings (`vm.max_map_count`, 65,530 by default), and the guest says
//! which pages go, so the number of holes that are apart from one another is bounded, over all guests of the process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::guest_mem::Region;

/// Holes that all guests of this process may have. Each costs at most two mappings: half of what Linux allows by default.
const MAX_HOLES: usize = 16 << 10;

/// Holes of all guests of this process.
static HOLES: AtomicUsize = AtomicUsize::new(0);

/// The holes of one guest: host addresses, start and end. Holes that touch are one.
#[derive(Debug, Default)]
pub(crate) struct Holes {
    ranges: Mutex<BTreeMap<usize, usize>>,
}

impl Holes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `len` bytes at offset `from` of a private file mapping read as zeros, and gives their pages back. Both are
    /// multiples of the page size. Returns `false` if there are too many holes, and nothing was done.
    pub(crate) fn cut(&self, region: &Region, from: usize, len: usize) -> rustix::io::Result<bool> {
        self.cut_within(region, from, len, MAX_HOLES)
    }

    fn cut_within(&self, region: &Region, from: usize, len: usize, limit: usize) -> rustix::io::Result<bool> {
        if from.checked_add(len).is_none_or(|end| end > region.size()) || len == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: `from` is within the mapping, as was just checked.
        let at = unsafe { region.as_ptr().add(from) };
        let (start, end) = (at.addr(), at.addr() + len);
        let mut ranges = self.lock();
        if ranges.range(..=start).next_back().is_some_and(|(_, until)| *until >= end) {
            // SAFETY: the range is page-aligned and within one of our holes, so it is private anonymous memory of a live mapping
            // that `region` keeps alive during the call and that only volatile accesses use. It stays mapped, and reads as zeros.
            unsafe { rustix::mm::madvise(at.cast(), len, Advice::LinuxDontNeed) }?;
            return Ok(true);
        }
        let (merged, gone) = merge(&ranges, start, end);
        if gone.is_empty() && !reserve(limit) {
            return Ok(false);
        }
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range is page-aligned and within a live mapping of ours, which `region` keeps alive during the call, and
        // will unmap as a whole. Nothing but volatile accesses use it (no reference into guest memory exists), and what replaces
        // it has the same protection, so they stay valid throughout: the kernel replaces it at once.
        let mapped =
            unsafe { rustix::mm::mmap_anonymous(at.cast(), len, ProtFlags::READ | ProtFlags::WRITE, flags) };
        if let Err(errno) = mapped {
            if gone.is_empty() {
                HOLES.fetch_sub(1, Ordering::Relaxed);
            }
            return Err(errno);
        }
        for key in &gone {
            ranges.remove(key);
        }
        HOLES.fetch_sub(gone.len().saturating_sub(1), Ordering::Relaxed);
        ranges.insert(merged.0, merged.1);
        Ok(true)
    }

    /// Forgets the holes of a region that is going away: something else may be mapped at its address later.
    pub(crate) fn forget(&self, region: &Region) {
        let start = region.as_ptr().addr();
        let end = start + region.size();
        let mut ranges = self.lock();
        let before = ranges.len();
        ranges.retain(|hole, _| !(start..end).contains(hole));
        HOLES.fetch_sub(before - ranges.len(), Ordering::Relaxed);
    }
}

impl Drop for Holes {
    fn drop(&mut self) {
        HOLES.fetch_sub(self.lock().len(), Ordering::Relaxed);
    }
}

/// Takes one of `limit` holes.
fn reserve(limit: usize) -> bool {
    HOLES
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |holes| (holes < limit).then_some(holes + 1))
        .is_ok()
}

/// The hole that `start..end` makes with those it overlaps or touches, and these.
fn merge(ranges: &BTreeMap<usize, usize>, start: usize, end: usize) -> ((usize, usize), Vec<usize>) {
    let first = ranges.range(..start).next_back().filter(|(_, until)| **until >= start);
    let touched = first.into_iter().chain(ranges.range(start..=end));
    let mut merged = (start, end);
    let mut gone = Vec::new();
    for (&from, &until) in touched {
        merged = (merged.0.min(from), merged.1.max(until));
        gone.push(from);
    }
    (merged, gone)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use vm_memory::{Bytes, MemoryRegionAddress};

    use super::*;
    use crate::{FileMapping, RegionBuilder};

    fn region(pages: usize) -> Arc<Region> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![5; pages * 4096]).unwrap();
        let builder = RegionBuilder::new(0, pages as u64 * 4096);
        builder.file(Arc::new(file), 0, FileMapping::Private).build().unwrap()
    }

    fn byte(region: &Region, page: u64) -> u8 {
        region.read_obj(MemoryRegionAddress(page * 4096)).unwrap()
    }

    fn holes(holes: &Holes) -> usize {
        holes.lock().len()
    }

    #[test]
    fn holes_that_touch_are_one() {
        let (region, cut) = (region(16), Holes::default());
        for (page, expected) in [(2, 1), (4, 2), (3, 1), (5, 1), (1, 1), (9, 2)] {
            assert!(cut.cut(&region, page * 4096, 4096).unwrap());
            assert_eq!(holes(&cut), expected, "{page}");
        }
        assert!(cut.cut(&region, 0, 16 * 4096).unwrap());
        assert_eq!(holes(&cut), 1);
        assert!((0..16).all(|page| byte(&region, page) == 0));
    }

    #[test]
    fn a_page_in_a_hole_that_was_written_since_reads_as_zeros_again() {
        let (region, cut) = (region(4), Holes::default());
        cut.cut(&region, 4096, 8192).unwrap();
        region.write_obj(9u8, MemoryRegionAddress(4096)).unwrap();
        assert!(cut.cut(&region, 4096, 4096).unwrap());
        assert_eq!([0, 1, 2, 3].map(|page| byte(&region, page)), [5, 0, 0, 5]);
    }

    #[test]
    fn beyond_the_limit_pages_stay_but_holes_may_grow() {
        let (region, cut) = (region(8), Holes::default());
        // Other tests of this process may have holes too.
        assert!(cut.cut_within(&region, 0, 4096, usize::MAX).unwrap());
        assert!(!cut.cut_within(&region, 4 * 4096, 4096, 0).unwrap());
        assert_eq!(byte(&region, 4), 5);
        assert!(cut.cut_within(&region, 4096, 4096, 0).unwrap());
        assert_eq!(byte(&region, 1), 0);
    }

    #[test]
    fn holes_of_a_region_that_goes_are_forgotten() {
        let (first, second, cut) = (region(4), region(4), Holes::default());
        cut.cut(&first, 0, 4096).unwrap();
        cut.cut(&second, 8192, 4096).unwrap();
        cut.forget(&first);
        assert_eq!(holes(&cut), 1);
    }

    #[test]
    fn what_is_not_in_the_region_is_refused() {
        let (region, cut) = (region(2), Holes::default());
        for (from, len) in [(0, 0), (0, 3 * 4096), (8192, 4096), (usize::MAX - 4095, 4096)] {
            cut.cut(&region, from, len).unwrap_err();
        }
    }
}
