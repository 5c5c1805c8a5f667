//! Giving pages of guest memory back to the host.
//!
//! The memory stays mapped: a page that was given back reads as zeros and is there again when it is touched. What decides
//! here is only what can be given back without harm; whether the guest meant it is the business of the device that asks.

use std::io;

use rustix::fs::{FallocateFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::Advice;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::dirty::dirty_bitmap;
use crate::guest_mem::{MemoryMap, MemorySlice, Region};
use crate::holes::Holes;
use crate::layout::PAGE_SIZE;
use crate::{Error, Result};

/// How the pages of a region go back to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Private anonymous memory.
    DontNeed,
    /// A memory file of ours at this offset.
    PunchHole(u64),
    /// A private mapping of a file, which must not show again.
    CutOut,
    /// They stay.
    Keep,
}

impl Way {
    fn of(region: &Region) -> Self {
        // Huge pages were reserved so that the guest cannot meet an empty pool. A page given back could be gone when the guest
        // touches it, and that would be a SIGBUS.
        if region.is_hugetlbfs() == Some(true) {
            return Self::Keep;
        }
        match GuestMemoryRegion::file_offset(region) {
            None if region.flags() & libc::MAP_PRIVATE != 0 => Self::DontNeed,
            // Only memory files can be sealed against shrinking. A hole in anything else would be a loss of data.
            Some(file) if region.flags() & libc::MAP_SHARED != 0 => {
                match rustix::fs::fcntl_get_seals(file.file()) {
                    Ok(seals) if seals.contains(SealFlags::SHRINK) => Self::PunchHole(file.start()),
                    _ => Self::Keep,
                }
            }
            Some(_) if region.flags() & libc::MAP_PRIVATE != 0 => Self::CutOut,
            _ => Self::Keep,
        }
    }
}

/// Gives back the whole pages in `len` bytes at `gpa`. See [`crate::GuestMem::discard`].
pub(crate) fn range(map: &MemoryMap, holes: &Holes, gpa: u64, len: u64) -> Result<u64> {
    let end = gpa.saturating_add(len);
    let mut done = 0;
    for region in map.iter() {
        let start = region.start_addr().0;
        // Regions end below 2^52.
        let (from, to) = (gpa.max(start), end.min(start + region.len()));
        if from < to {
            done += part(region, holes, from - start, to - start)?;
        }
    }
    Ok(done)
}

/// Gives back the whole pages in `slice`, wherever it is in guest memory.
pub(crate) fn slice(map: &MemoryMap, holes: &Holes, slice: &MemorySlice<'_>) -> Result<u64> {
    let start = slice.ptr_guard().as_ptr() as u64;
    // A slice can be of any memory of this process: only that of a region is touched.
    for region in map.iter() {
        let base = region.as_ptr() as u64;
        let Some(offset) = start.checked_sub(base).filter(|offset| *offset < region.len()) else { continue };
        let end = offset.saturating_add(slice.len() as u64).min(region.len());
        return part(region, holes, offset, end);
    }
    Ok(0)
}

/// Gives back the whole pages between two offsets of a region.
fn part(region: &Region, holes: &Holes, from: u64, to: u64) -> Result<u64> {
    let from = from.next_multiple_of(PAGE_SIZE);
    let to = (to - to % PAGE_SIZE).min(region.len());
    let Some(len) = to.checked_sub(from).filter(|len| *len > 0) else { return Ok(0) };
    let gone = match Way::of(region) {
        Way::Keep => return Ok(0),
        Way::CutOut => match cut_out(region, holes, from, len) {
            Ok(false) => return Ok(0),
            other => other.map(drop),
        },
        Way::DontNeed => dont_need(region, from, len),
        Way::PunchHole(offset) => punch_hole(region, offset + from, len),
    };
    gone.map_err(|errno| {
        let gpa = region.start_addr().0 + from;
        Error::Discard { gpa, len, source: io::Error::from(errno) }
    })?;
    // The content changed: a snapshot that has the old pages must save the zeros.
    if let (Some(bitmap), Ok(from), Ok(len)) =
        (dirty_bitmap(region), usize::try_from(from), usize::try_from(len))
    {
        bitmap.set_addr_range(from, len);
    }
    Ok(len)
}

fn dont_need(region: &Region, from: u64, len: u64) -> rustix::io::Result<()> {
    let (Ok(from), Ok(len)) = (usize::try_from(from), usize::try_from(len)) else { return Err(Errno::INVAL) };
    // `part` has bounded the range already; this is what the unsafe blocks below rest on.
    if from.checked_add(len).is_none_or(|end| end > region.size()) {
        return Err(Errno::INVAL);
    }
    // SAFETY: `from` is within the mapping, as was just checked.
    let start = unsafe { region.as_ptr().add(from) };
    // SAFETY: the range is page-aligned and within a live private anonymous mapping that `region` keeps alive during the call
    // and that nothing but volatile accesses use (no reference into guest memory exists). MADV_DONTNEED leaves it mapped:
    // it reads as zeros afterwards.
    unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxDontNeed) }
}

/// `false` if the pages stay.
fn cut_out(region: &Region, holes: &Holes, from: u64, len: u64) -> rustix::io::Result<bool> {
    let (Ok(from), Ok(len)) = (usize::try_from(from), usize::try_from(len)) else { return Err(Errno::INVAL) };
    holes.cut(region, from, len)
}

fn punch_hole(region: &Region, offset: u64, len: u64) -> rustix::io::Result<()> {
    let Some(file) = GuestMemoryRegion::file_offset(region) else { return Err(Errno::INVAL) };
    // The pages are shared by all who map the file, so they must leave the file and not this mapping only.
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match rustix::fs::fallocate(file.file(), flags, offset, len) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Whether `gpa` is in memory that can be given back.
pub(crate) fn can(map: &MemoryMap, gpa: GuestAddress) -> bool {
    map.find_region(gpa).is_some_and(|region| Way::of(region) != Way::Keep)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use vm_memory::Bytes;

    use super::*;
    use crate::layout::RamRange;
    use crate::{Backing, FileMapping, GuestMem, GuestMemBuilder, RegionBuilder};

    const HIGH: u64 = 1 << 32;

    /// 1 MiB at 0, and 1 MiB at 4 GiB, filled with ones.
    fn memory(backing: Backing) -> GuestMem {
        let ranges = vec![RamRange { start: 0, len: 1 << 20 }, RamRange { start: HIGH, len: 1 << 20 }];
        let mem = GuestMemBuilder::with_ranges(ranges).backing(backing).dirty_log(true).build().unwrap();
        for start in [0, HIGH] {
            mem.view().write_slice(&vec![1; 1 << 20], GuestAddress(start)).unwrap();
        }
        mem.take_dirty();
        mem
    }

    fn byte(mem: &GuestMem, gpa: u64) -> u8 {
        mem.view().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Pages of a region that this process or, for a memory file, anybody keeps in memory.
    fn resident(region: &Region) -> usize {
        let mut present = vec![0u8; region.size() / 4096];
        // SAFETY: the range is a live mapping, and `present` has a byte for each of its pages.
        let rc = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), present.as_mut_ptr()) };
        assert_eq!(rc, 0);
        present.iter().filter(|p| **p & 1 != 0).count()
    }

    #[test]
    fn whole_pages_go_back_to_the_host_and_read_as_zeros() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let mem = memory(backing);
            assert_eq!(resident(&mem.regions()[0]), 256);
            assert_eq!(mem.discard(0x4000, 0x1_0000).unwrap(), 0x1_0000);
            assert_eq!(resident(&mem.regions()[0]), 240, "{backing:?}");
            let bytes = [0x3FFF, 0x4000, 0x1_3FFF, 0x1_4000].map(|gpa| byte(&mem, gpa));
            assert_eq!(bytes, [1, 0, 0, 1], "{backing:?}");
        }
    }

    #[test]
    fn the_second_region_of_a_memory_file_goes_back_from_its_own_place_in_the_file() {
        let mem = memory(Backing::Memfd);
        assert_eq!(mem.discard(HIGH, 0x1000).unwrap(), 0x1000);
        assert_eq!((byte(&mem, 0), byte(&mem, HIGH), byte(&mem, HIGH + 0x1000)), (1, 0, 1));
    }

    #[test]
    fn parts_of_pages_stay() {
        let mem = memory(Backing::Anonymous);
        assert_eq!(mem.discard(0x4001, 0x1FFF).unwrap(), 0x1000);
        assert_eq!([0x4FFF, 0x5000, 0x5FFF, 0x6000].map(|gpa| byte(&mem, gpa)), [1, 0, 0, 1]);
        assert_eq!(mem.discard(0x8001, 0x1000).unwrap(), 0);
        assert_eq!(mem.discard(0x8000, 0xFFF).unwrap(), 0);
        assert_eq!(mem.discard(0x8000, 0).unwrap(), 0);
    }

    #[test]
    fn nothing_happens_outside_of_memory() {
        let mem = memory(Backing::Anonymous);
        for (gpa, len) in [(1 << 20, 0x1000), (HIGH - 0x1000, 0x1000), (u64::MAX, u64::MAX), (!0xFFF, 0x1000)]
        {
            assert_eq!(mem.discard(gpa, len).unwrap(), 0, "{gpa:#x}");
        }
        // Over the end of one region, a hole, and into the next.
        assert_eq!(mem.discard(0xF_F000, HIGH - 0xF_E000 + 0x1000).unwrap(), 0x3000);
        assert_eq!(resident(&mem.regions()[0]) + resident(&mem.regions()[1]), 509);
        assert_eq!(mem.discard(0, u64::MAX).unwrap(), 2 << 20);
    }

    #[test]
    fn what_went_back_is_dirty() {
        let mem = memory(Backing::Anonymous);
        mem.discard(0x4000, 0x2000).unwrap();
        let pages: Vec<u64> = mem.take_dirty().unwrap()[0].pages().collect();
        assert_eq!(pages, [0x4000, 0x5000]);
    }

    #[test]
    fn a_slice_goes_back_wherever_its_region_is() {
        let mem = memory(Backing::Anonymous);
        let view = mem.view();
        let slice = view.get_slice(GuestAddress(HIGH + 0x2000), 0x3000).unwrap();
        assert_eq!(mem.discard_slice(&slice).unwrap(), 0x3000);
        assert_eq!([0x1FFF, 0x2000, 0x4FFF, 0x5000].map(|at| byte(&mem, HIGH + at)), [1, 0, 0, 1]);
    }

    #[test]
    fn a_slice_of_other_memory_is_left_alone() {
        let (mem, other) = (memory(Backing::Anonymous), memory(Backing::Anonymous));
        let view = other.view();
        let slice = view.get_slice(GuestAddress(0), 0x1000).unwrap();
        assert_eq!(mem.discard_slice(&slice).unwrap(), 0);
        assert_eq!(byte(&other, 0), 1);
        let empty = slice.subslice(0, 0).unwrap();
        assert_eq!(other.discard_slice(&empty).unwrap(), 0);
    }

    #[test]
    fn pages_of_a_file_on_disk_are_never_punched() {
        let mem = memory(Backing::Anonymous);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[5; 0x4000]).unwrap();
        let file = Arc::new(file);
        let builder = RegionBuilder::new(2 * HIGH, 0x4000).file(file, 0, FileMapping::Shared);
        mem.insert_region(builder.build().unwrap()).unwrap();
        assert_eq!(mem.discard(2 * HIGH, 0x4000).unwrap(), 0);
        assert!(!mem.can_discard(2 * HIGH));
        assert_eq!(byte(&mem, 2 * HIGH), 5);
    }

    #[test]
    fn pages_of_a_private_file_mapping_read_as_zeros_and_the_file_is_left_as_it_is() {
        let mem = memory(Backing::Anonymous);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[5; 0x4000]).unwrap();
        let file = Arc::new(file);
        let builder = RegionBuilder::new(2 * HIGH, 0x4000).file(file.clone(), 0, FileMapping::Private);
        mem.insert_region(builder.build().unwrap()).unwrap();
        mem.view().write_obj(6u8, GuestAddress(2 * HIGH + 0x1000)).unwrap();
        assert!(mem.can_discard(2 * HIGH));
        assert_eq!(mem.discard(2 * HIGH + 0x1000, 0x2000).unwrap(), 0x2000);
        assert_eq!([0, 0x1000, 0x2000, 0x3000].map(|at| byte(&mem, 2 * HIGH + at)), [5, 0, 0, 5]);
        let mut content = [0; 0x4000];
        rustix::io::pread(&*file, &mut content, 0).unwrap();
        assert_eq!(content, [5; 0x4000]);
    }

    #[test]
    fn memory_that_was_inserted_goes_back_too() {
        let mem = memory(Backing::Anonymous);
        mem.insert_region(RegionBuilder::new(2 * HIGH, 0x4000).build().unwrap()).unwrap();
        mem.view().write_obj(3u8, GuestAddress(2 * HIGH)).unwrap();
        assert!(mem.can_discard(2 * HIGH) && !mem.can_discard(3 * HIGH));
        assert_eq!(mem.discard(2 * HIGH, 0x1000).unwrap(), 0x1000);
        assert_eq!(byte(&mem, 2 * HIGH), 0);
    }
}
