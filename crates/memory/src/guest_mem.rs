//! [`GuestMem`]: the one handle to guest memory that every device, loader and vCPU is given.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryLoadGuard,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, VolatileSlice,
};

use crate::backing::{self, Mapper};
use crate::dirty::{DirtyLog, DirtyPages, dirty_bitmap, new_bitmap};
use crate::holes::Holes;
use crate::image::ImageLayout;
use crate::layout::{self, MAX_PHYS_BITS, RamRange};
use crate::{Backing, Error, Result, discard};

/// One contiguous range of guest RAM. The dirty bitmap is there only when dirty logging was asked for.
pub type Region = GuestRegionMmap<Option<AtomicBitmap>>;
/// A consistent set of regions at one moment.
pub type MemoryMap = GuestMemoryMmap<Option<AtomicBitmap>>;
/// A view of guest memory: dereferences to [`MemoryMap`]; cheap to take, holds no lock.
pub type MemoryView = GuestMemoryLoadGuard<MemoryMap>;
/// Some bytes of guest memory, as a [`MemoryView`] hands them out; what [`crate::io`] reads into and writes from.
pub type MemorySlice<'a> = VolatileSlice<'a, BS<'a, Option<AtomicBitmap>>>;

/// Memory of our own as a slice of guest memory that nobody logs, for code that takes such slices.
pub fn own_slice(bytes: &mut [u8]) -> MemorySlice<'_> {
    // SAFETY: the bytes are borrowed mutably for the lifetime of the slice: valid, writable, and nobody else's.
    unsafe { VolatileSlice::with_bitmap(bytes.as_mut_ptr(), bytes.len(), None, None) }
}

/// Guest memory: a cheap, clonable handle over vm-memory.
///
/// All clones are the same memory. It is unmapped when the last clone, view and slice is gone.
///
/// The RAM that the machine is started with never changes. Devices may add regions beside it and take them away again while
/// the machine runs: every [`view`](Self::view) taken from then on has them, and a view taken before is as it was, which also
/// keeps a region mapped that was removed. So whoever works in steps takes a view for each step, and whoever has handed addresses
/// to the kernel (asynchronous I/O) keeps the view until the kernel is through with them.
#[derive(Debug, Clone)]
pub struct GuestMem {
    map: GuestMemoryAtomic<MemoryMap>,
    regions: Arc<[Arc<Region>]>,
    backing: Backing,
    holes: Arc<Holes>,
    /// Pages that are not present come from a page server, and are not zeros.
    served: Arc<AtomicBool>,
}

impl GuestMem {
    /// `size` bytes of anonymous memory laid out around the 32-bit hole.
    ///
    /// # Errors
    /// As [`GuestMemBuilder::build`].
    pub fn anonymous(size: u64) -> Result<Self> {
        GuestMemBuilder::new(size).build()
    }

    /// The memory as it is now, to read and write through vm-memory's `Bytes`.
    pub fn view(&self) -> MemoryView {
        self.map.memory()
    }

    /// The regions of the RAM that the machine is started with, sorted by guest-physical address; a hypervisor maps each into
    /// a slot. Regions that were inserted later are not among them.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Bytes of the RAM that the machine is started with.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|r| r.len()).sum()
    }

    /// What the memory is made of in the host.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Adds a region, so that devices can read and write it. The guest sees it only when a hypervisor maps it too.
    ///
    /// # Errors
    /// - [`Error::Overlap`]: there is memory already.
    /// - [`Error::Region`]: this process cannot read and write the mapping.
    pub fn insert_region(&self, region: Arc<Region>) -> Result<()> {
        let gpa = region.start_addr().0;
        let wanted = libc::PROT_READ | libc::PROT_WRITE;
        if region.prot() & wanted != wanted {
            let reason = "what devices use must be readable and writable";
            return Err(Error::Region { gpa, len: region.len(), reason });
        }
        let lock = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let map = self.map.memory().insert_region(region).map_err(|_| Error::Overlap { gpa })?;
        lock.replace(map);
        Ok(())
    }

    /// Takes away the region that begins at `gpa` and was [inserted](Self::insert_region). Views taken before keep it mapped.
    ///
    /// # Errors
    /// [`Error::NoRegion`] if no inserted region begins there. The RAM that the machine was started with stays.
    pub fn remove_region(&self, gpa: u64) -> Result<Arc<Region>> {
        let none = Error::NoRegion { gpa };
        let addr = GuestAddress(gpa);
        if self.regions.iter().any(|region| region.start_addr() == addr) {
            return Err(none);
        }
        let lock = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        let view = self.map.memory();
        let Some(len) = view.find_region(addr).map(GuestMemoryRegion::len) else { return Err(none) };
        let (map, region) = view.remove_region(addr, len).map_err(|_| none)?;
        lock.replace(map);
        self.holes.forget(&region);
        Ok(region)
    }

    /// Gives the whole pages in `len` bytes at `gpa` back to the host, and returns how many bytes that was. They stay mapped,
    /// read as zeros, and count as written in the dirty log.
    ///
    /// Nothing happens to what is no memory, and three kinds of memory stay as they are: huge pages, which were reserved so
    /// that the guest cannot meet an empty pool; files on disk that are mapped shared, which would lose data; and mappings made
    /// elsewhere that are shared without a file.
    ///
    /// A file that is mapped privately (a memory image) is left as it is too: the pages are mapped anew without the file, because
    /// they would show its bytes again. Each such hole costs the process a mapping, of which it may have a limited number, so
    /// pages stay once there are too many holes apart from one another.
    ///
    /// # Errors
    /// [`Error::Discard`] if the host refuses, as it does for locked memory.
    pub fn discard(&self, gpa: u64, len: u64) -> Result<u64> {
        discard::range(&self.view(), &self.holes, gpa, len)
    }

    /// As [`discard`](Self::discard), for bytes that are known as a slice of guest memory. A slice of anything else is left
    /// alone.
    ///
    /// # Errors
    /// As [`discard`](Self::discard).
    pub fn discard_slice(&self, slice: &MemorySlice<'_>) -> Result<u64> {
        discard::slice(&self.view(), &self.holes, slice)
    }

    /// Whether [`discard`](Self::discard) has an effect on the page at `gpa`.
    pub fn can_discard(&self, gpa: u64) -> bool {
        discard::can(&self.view(), GuestAddress(gpa))
    }

    /// The log of pages that the VMM itself wrote to, or `None` when [`GuestMemBuilder::dirty_log`] was not asked for.
    ///
    /// The guest's own writes are not in it: a hypervisor keeps a log of those. See [`DirtyPages::merge`].
    pub fn dirty_log(&self) -> Option<DirtyLog> {
        self.logs_dirty().then(|| DirtyLog::new(self.view()))
    }

    /// Whether [`GuestMemBuilder::dirty_log`] was asked for.
    pub fn logs_dirty(&self) -> bool {
        self.regions.iter().all(|region| dirty_bitmap(region).is_some())
    }

    /// The pages written to since the last call, one item per region with a log, sorted by address, and forgets them. `None`
    /// without a dirty log.
    pub fn take_dirty(&self) -> Option<Vec<DirtyPages>> {
        self.dirty_log().map(|log| log.take())
    }

    /// Says that pages which are not present come from elsewhere when they are touched.
    #[cfg(feature = "uffd")]
    pub(crate) fn set_served(&self) {
        self.served.store(true, Ordering::Release);
    }

    pub(crate) fn is_served(&self) -> bool {
        self.served.load(Ordering::Acquire)
    }
}

/// Says what guest memory to make.
#[derive(Debug, Clone)]
pub struct GuestMemBuilder {
    ranges: Vec<RamRange>,
    backing: Backing,
    image: Option<Arc<File>>,
    image_layout: Option<ImageLayout>,
    prefault: bool,
    dirty_log: bool,
}

impl GuestMemBuilder {
    /// `size` bytes, laid out by [`layout::ram_ranges`].
    pub fn new(size: u64) -> Self {
        Self::with_ranges(layout::ram_ranges(size))
    }

    /// Exactly these ranges: sorted, page-aligned (for huge pages: aligned to one of them), not overlapping.
    pub fn with_ranges(ranges: Vec<RamRange>) -> Self {
        Self {
            ranges,
            backing: Backing::default(),
            image: None,
            image_layout: None,
            prefault: false,
            dirty_log: false,
        }
    }

    /// Chooses the host memory behind the guest's.
    #[must_use]
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Maps a [memory image](crate::image) in place of memory: region after region from the file's first byte on, privately. What
    /// is written stays in this process, the file is only read, and holes in it read as zeros. The memory is ready at once,
    /// whatever its size. It takes the place of [`backing`](Self::backing).
    ///
    /// The file must be as long as the memory. Who shrinks it later ends this process by SIGBUS: see
    /// [`image::open`](crate::image::open), which takes a lock on it, and
    /// [`image::to_memfd`](crate::image::to_memfd), whose files cannot shrink.
    #[must_use]
    pub fn image(mut self, file: Arc<File>) -> Self {
        self.backing = Backing::Image;
        self.image = Some(file);
        self
    }

    /// The image that is mapped has this layout: each range is looked up in it. Without one, the image has just this memory.
    ///
    /// It is for images of more than the boot RAM. The rest of such an image is mapped by
    /// [`RegionBuilder::file`](crate::RegionBuilder::file), privately and at its [offset](ImageLayout::offset_of), and inserted.
    #[must_use]
    pub fn image_layout(mut self, layout: ImageLayout) -> Self {
        self.image_layout = Some(layout);
        self
    }

    /// Touches every page before the guest runs, so that no page fault happens later.
    #[must_use]
    pub fn prefault(mut self, prefault: bool) -> Self {
        self.prefault = prefault;
        self
    }

    /// Keeps a dirty bitmap of the VMM's own writes, one bit for 4 KiB.
    #[must_use]
    pub fn dirty_log(mut self, on: bool) -> Self {
        self.dirty_log = on;
        self
    }

    /// Maps the memory. Takes no time in proportion to the size, unless it is prefaulted.
    ///
    /// # Errors
    /// - [`Error::Size`]: no memory at all, not whole pages, or more than the 52-bit physical address space.
    /// - [`Error::Overlap`]: ranges that overlap or are not sorted.
    /// - [`Error::Map`], [`Error::File`]: the operating system refused.
    /// - [`Error::HugePages`]: the host's pool of huge pages is too small.
    /// - [`Error::Prefault`]: the pages could not be made present.
    /// - [`Error::ImageSize`]: the image is shorter than the memory; [`Error::Image`]: its length is not known;
    ///   [`Error::ImageMemory`]: its layout does not have the memory.
    pub fn build(self) -> Result<GuestMem> {
        let size = self.check()?;
        let image_layout = self.image_layout.as_ref().filter(|_| self.backing == Backing::Image);
        let mut mapper = match (self.backing, &self.image) {
            (Backing::Image, Some(file)) => {
                Mapper::with_image(Arc::clone(file), image_layout.map_or(size, ImageLayout::size))?
            }
            (backing, _) => Mapper::new(backing, size)?,
        };
        let mut regions = Vec::with_capacity(self.ranges.len());
        for range in &self.ranges {
            let bitmap = if self.dirty_log { new_bitmap(range.len) } else { None };
            if let Some(layout) = image_layout {
                mapper.seek(place(layout, range)?);
            }
            let mapping = mapper.map(*range, bitmap)?;
            let region = Region::new(mapping, GuestAddress(range.start))
                .ok_or(Error::Size { size: range.len, reason: "it wraps the address space" })?;
            if self.prefault {
                backing::prefault(&region)?;
            }
            regions.push(Arc::new(region));
        }
        let map = MemoryMap::from_arc_regions(regions.clone())
            .map_err(|_| Error::Overlap { gpa: self.ranges.first().map_or(0, |r| r.start) })?;
        Ok(GuestMem {
            map: GuestMemoryAtomic::new(map),
            regions: regions.into(),
            backing: self.backing,
            holes: Arc::default(),
            served: Arc::default(),
        })
    }

    /// Checks the ranges and returns the sum of their sizes.
    fn check(&self) -> Result<u64> {
        let granularity = self.backing.granularity();
        let misaligned = match self.backing {
            Backing::HugePages(_) => "each range must start and end at a multiple of the huge page size",
            _ => "it must be a multiple of the page size, 4096 bytes",
        };
        let mut size = 0u64;
        let mut end = 0;
        for range in &self.ranges {
            let refuse = |reason| Err(Error::Size { size: range.len, reason });
            if range.len == 0 {
                return refuse("there must be at least one page");
            }
            if !range.start.is_multiple_of(granularity) || !range.len.is_multiple_of(granularity) {
                // Say the whole amount where `new` split it: that is the number the user gave.
                let size = self.ranges.iter().fold(0u64, |sum, r| sum.saturating_add(r.len));
                return Err(Error::Size { size, reason: misaligned });
            }
            if range.start < end {
                return Err(Error::Overlap { gpa: range.start });
            }
            end = match range.end() {
                Some(end) if end <= 1 << MAX_PHYS_BITS => end,
                _ => return refuse("more than the 52-bit guest-physical address space"),
            };
            // Ranges below 2^52 that do not overlap cannot add up to more.
            size += range.len;
        }
        if size == 0 {
            return Err(Error::Size { size, reason: "there must be at least one page" });
        }
        Ok(size)
    }
}

/// Where a range begins in an image that must have it in one piece.
fn place(layout: &ImageLayout, range: &RamRange) -> Result<u64> {
    let missing = Error::ImageMemory {
        gpa: range.start,
        len: range.len,
        reason: "has no place in the image, or not one",
    };
    let Some(offset) = layout.offset_of(range.start) else { return Err(missing) };
    // Ranges of a layout that follow each other in memory do so in the image.
    let end = range.end().and_then(|end| layout.offset_of(end.checked_sub(1)?));
    if end == (offset + range.len).checked_sub(1) { Ok(offset) } else { Err(missing) }
}

impl GuestAddressSpace for GuestMem {
    type M = MemoryMap;
    type T = MemoryView;

    fn memory(&self) -> Self::T {
        self.map.memory()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;
    use crate::{FileMapping, RegionBuilder};

    const ADDED: u64 = 1 << 32;

    fn added(len: u64) -> Arc<Region> {
        RegionBuilder::new(ADDED, len).build().unwrap()
    }

    #[test]
    fn a_region_can_be_added_and_taken_away_while_others_use_the_memory() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        let clone = mem.clone();
        let before = clone.view();
        mem.insert_region(added(0x2000)).unwrap();
        clone.view().write_obj(5u8, GuestAddress(ADDED + 0x1FFF)).unwrap();
        before.write_obj(5u8, GuestAddress(ADDED)).unwrap_err();
        let during = clone.view();
        let region = mem.remove_region(ADDED).unwrap();
        assert_eq!(region.start_addr(), GuestAddress(ADDED));
        clone.view().write_obj(5u8, GuestAddress(ADDED)).unwrap_err();
        // A view taken before keeps what it had.
        drop(region);
        assert_eq!(during.read_obj::<u8>(GuestAddress(ADDED + 0x1FFF)).unwrap(), 5);
    }

    #[test]
    fn a_region_can_be_added_again_after_it_was_taken_away() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        for _ in 0..3 {
            mem.insert_region(added(0x2000)).unwrap();
            mem.remove_region(ADDED).unwrap();
        }
    }

    #[test]
    fn an_added_region_is_no_boot_memory() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        mem.insert_region(added(0x2000)).unwrap();
        assert_eq!((mem.regions().len(), mem.size()), (1, 1 << 20));
    }

    #[test]
    fn a_region_where_memory_is_already_is_refused() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        mem.insert_region(added(0x2000)).unwrap();
        for (gpa, len) in
            [(0, 0x1000), (0xF_F000, 0x2000), (ADDED + 0x1000, 0x1000), (ADDED - 0x1000, 0x4000)]
        {
            let error = mem.insert_region(RegionBuilder::new(gpa, len).build().unwrap()).unwrap_err();
            assert!(matches!(error, Error::Overlap { gpa: at } if at == gpa), "{gpa:#x} {error:?}");
        }
    }

    #[test]
    fn what_was_not_added_cannot_be_taken_away() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        mem.insert_region(added(0x2000)).unwrap();
        for gpa in [0, 0x1000, ADDED + 0x1000, ADDED - 0x1000, u64::MAX] {
            let error = mem.remove_region(gpa).unwrap_err();
            assert!(matches!(error, Error::NoRegion { gpa: at } if at == gpa), "{gpa:#x} {error:?}");
        }
    }

    #[test]
    fn a_region_that_a_device_cannot_write_is_refused() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1000).unwrap();
        let builder = RegionBuilder::new(ADDED, 0x1000).file(Arc::new(file), 0, FileMapping::ReadOnly);
        let error = mem.insert_region(builder.build().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Region { gpa: ADDED, .. }), "{error:?}");
    }

    fn size_error(size: u64) -> String {
        let error = GuestMemBuilder::new(size).build().unwrap_err();
        assert!(matches!(error, Error::Size { .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn memory_reads_back_what_was_written() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        mem.view().write_obj(0x1234_5678u32, GuestAddress(0xF_FFFC)).unwrap();
        assert_eq!(mem.clone().view().read_obj::<u32>(GuestAddress(0xF_FFFC)).unwrap(), 0x1234_5678);
    }

    #[test]
    fn memory_ends_where_it_ends() {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        mem.view().write_obj(0u32, GuestAddress(0xF_FFFD)).unwrap_err();
    }

    #[test]
    fn memory_of_five_gib_is_around_the_hole() {
        let mem = GuestMem::anonymous(5 << 30).unwrap();
        assert_eq!(mem.size(), 5 << 30);
        assert_eq!(mem.regions().len(), 2);
        let view = mem.view();
        view.write_obj(7u8, GuestAddress(layout::HOLE_START - 1)).unwrap();
        view.write_obj(7u8, GuestAddress(layout::RAM_ABOVE_HOLE)).unwrap();
        assert!(!view.address_in_range(GuestAddress(layout::HOLE_START)));
    }

    #[test]
    fn no_memory_at_all_is_refused() {
        assert_eq!(size_error(0), "guest memory of 0 bytes: there must be at least one page");
        let error = GuestMemBuilder::with_ranges(Vec::new()).build().unwrap_err();
        assert!(matches!(error, Error::Size { size: 0, .. }), "{error:?}");
    }

    #[test]
    fn part_of_a_page_is_refused_and_the_whole_size_named() {
        assert!(size_error(5000).contains("5000 bytes"));
        let size = layout::HOLE_START + 1;
        assert!(size_error(size).contains(&size.to_string()));
    }

    #[test]
    fn more_than_the_address_space_is_refused() {
        assert!(size_error(1 << 53).contains("address space"));
        assert!(size_error(!0xFFF).contains("address space"));
    }

    #[test]
    fn more_than_the_process_can_map_is_an_error_of_the_system() {
        let error = GuestMem::anonymous(1 << 51).unwrap_err();
        assert!(matches!(error, Error::Map { backing: "anonymous", .. }), "{error:?}");
    }

    #[test]
    fn ranges_that_overlap_or_are_out_of_order_are_refused() {
        let a = RamRange { start: 0x1000, len: 0x2000 };
        for b in [RamRange { start: 0x2000, len: 0x1000 }, RamRange { start: 0, len: 0x1000 }] {
            let error = GuestMemBuilder::with_ranges(vec![a, b]).build().unwrap_err();
            assert!(matches!(error, Error::Overlap { gpa } if gpa == b.start), "{error:?}");
        }
    }

    #[test]
    fn adjacent_ranges_read_as_one() {
        let ranges = vec![RamRange { start: 0, len: 0x1000 }, RamRange { start: 0x1000, len: 0x1000 }];
        let mem = GuestMemBuilder::with_ranges(ranges).build().unwrap();
        mem.view().write_slice(&[1, 2, 3, 4], GuestAddress(0xFFE)).unwrap();
        assert_eq!(mem.view().read_obj::<[u8; 4]>(GuestAddress(0xFFE)).unwrap(), [1, 2, 3, 4]);
    }
}
