//! [`RegionBuilder`]: memory beside the boot RAM, for devices that bring their own (persistent memory, hot-plugged memory).
//!
//! It maps; it puts nothing into a guest. See [`GuestMem::insert_region`](crate::GuestMem::insert_region) for that.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress};

use crate::backing::Mapper;
use crate::dirty::new_bitmap;
use crate::guest_mem::Region;
use crate::layout::{MAX_PHYS_BITS, PAGE_SIZE, RamRange};
use crate::{Backing, Error, Result};

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileMapping {
    /// What is written goes to the file. The file must be open for reading and writing.
    Shared,
    /// What is written stays in this process and costs it memory; the file is only read.
    Private,
    /// Cannot be written by this process either. Such a region is for a hypervisor's read-only slot;
    /// [`GuestMem::insert_region`](crate::GuestMem::insert_region) refuses it, because a device's write to it would end
    /// the process.
    ReadOnly,
}

#[derive(Debug, Clone)]
enum Source {
    Memory(Backing),
    File { file: Arc<File>, offset: u64, mapping: FileMapping },
}

/// Says what region to make.
#[derive(Debug, Clone)]
pub struct RegionBuilder {
    range: RamRange,
    source: Source,
    dirty_log: bool,
}

impl RegionBuilder {
    /// `len` bytes of anonymous memory at guest-physical address `gpa`. Both must be multiples of 4096.
    pub fn new(gpa: u64, len: u64) -> Self {
        Self {
            range: RamRange { start: gpa, len },
            source: Source::Memory(Backing::Anonymous),
            dirty_log: false,
        }
    }

    /// Chooses the host memory. Address and length must be multiples of [`Backing::granularity`].
    #[must_use]
    pub fn backing(mut self, backing: Backing) -> Self {
        self.source = Source::Memory(backing);
        self
    }

    /// Maps `file` from byte `offset` on, a multiple of 4096, in place of memory.
    ///
    /// Whoever shrinks the file while it is mapped ends this process by SIGBUS at the next access beyond the new end, and so
    /// does a write to a hole when the file system is full: keep others off (a lock) and reserve the blocks (`fallocate(2)`).
    #[must_use]
    pub fn file(mut self, file: Arc<File>, offset: u64, mapping: FileMapping) -> Self {
        self.source = Source::File { file, offset, mapping };
        self
    }

    /// Keeps a dirty bitmap of the VMM's own writes, as [`GuestMemBuilder::dirty_log`](crate::GuestMemBuilder::dirty_log) does
    /// for the boot RAM. What is inserted beside memory that [logs](crate::GuestMem::logs_dirty) should log too.
    #[must_use]
    pub fn dirty_log(mut self, on: bool) -> Self {
        self.dirty_log = on;
        self
    }

    /// Maps the region. It costs no memory until it is touched.
    ///
    /// # Errors
    /// - [`Error::Region`]: not whole pages, beyond the 52-bit address space, or beyond the end of the file.
    /// - [`Error::Map`], [`Error::File`], [`Error::HugePages`]: the operating system refused.
    pub fn build(self) -> Result<Arc<Region>> {
        let RamRange { start, len } = self.range;
        let granularity = match &self.source {
            Source::Memory(backing) => backing.granularity(),
            Source::File { .. } => PAGE_SIZE,
        };
        if len == 0 || !start.is_multiple_of(granularity) || !len.is_multiple_of(granularity) {
            return Err(self.refuse("address and length must be non-zero multiples of the page size"));
        }
        if self.range.end().is_none_or(|end| end > 1 << MAX_PHYS_BITS) {
            return Err(self.refuse("it goes beyond the 52-bit guest-physical address space"));
        }
        let bitmap = if self.dirty_log { new_bitmap(len) } else { None };
        let mapping = match &self.source {
            Source::Memory(Backing::Image) => return Err(self.refuse("an image is mapped as a private file")),
            Source::Memory(backing) => Mapper::new(*backing, len)?.map(self.range, bitmap)?,
            Source::File { file, offset, mapping } => self.map_file(file, *offset, *mapping, bitmap)?,
        };
        let region = Region::new(mapping, GuestAddress(start));
        region.map(Arc::new).ok_or_else(|| self.refuse("it wraps the address space"))
    }

    fn map_file(
        &self,
        file: &Arc<File>,
        offset: u64,
        mapping: FileMapping,
        bitmap: Option<AtomicBitmap>,
    ) -> Result<MmapRegion<Option<AtomicBitmap>>> {
        let RamRange { start: gpa, len } = self.range;
        let failed = |source| Error::Map { gpa, len, backing: "file", source };
        let size = file.metadata().map_err(failed)?.len();
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(self.refuse("the offset in the file must be a multiple of the page size"));
        }
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(self.refuse("it goes beyond the end of its file"));
        }
        let bytes = usize::try_from(len).map_err(|_| self.refuse("more than this process can address"))?;
        let (prot, flags) = match mapping {
            FileMapping::Shared => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED),
            FileMapping::Private => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE),
            FileMapping::ReadOnly => (libc::PROT_READ, libc::MAP_SHARED),
        };
        MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
            .with_mmap_prot(prot)
            .with_mmap_flags(flags | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .build()
            .map_err(|error| match error {
                MmapRegionError::Mmap(source) => failed(source),
                other => failed(io::Error::other(other)),
            })
    }

    fn refuse(&self, reason: &'static str) -> Error {
        Error::Region { gpa: self.range.start, len: self.range.len, reason }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

    use super::*;

    const GPA: u64 = 1 << 32;

    fn file(len: usize) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; len]).unwrap();
        Arc::new(file)
    }

    fn first_byte(file: &File) -> u8 {
        let (mut file, mut byte) = (file, [0]);
        file.rewind().unwrap();
        file.read_exact(&mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn memory_is_zero_and_where_it_was_asked_for() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let region = RegionBuilder::new(GPA, 0x4000).backing(backing).build().unwrap();
            assert_eq!((region.start_addr(), region.len()), (GuestAddress(GPA), 0x4000));
            assert_eq!(region.read_obj::<u64>(MemoryRegionAddress(0x3FF8)).unwrap(), 0, "{backing:?}");
        }
    }

    #[test]
    fn what_is_written_to_a_shared_mapping_is_in_the_file() {
        let file = file(0x4000);
        let builder = RegionBuilder::new(GPA, 0x2000);
        let region = builder.file(file.clone(), 0x1000, FileMapping::Shared).build().unwrap();
        assert_eq!(region.read_obj::<u8>(MemoryRegionAddress(0)).unwrap(), 7);
        region.write_obj(9u8, MemoryRegionAddress(0)).unwrap();
        let mut byte = [0];
        rustix::io::pread(&*file, &mut byte, 0x1000).unwrap();
        assert_eq!(byte, [9]);
    }

    #[test]
    fn what_is_written_to_a_private_mapping_stays_out_of_the_file() {
        let file = file(0x1000);
        let builder = RegionBuilder::new(GPA, 0x1000);
        let region = builder.file(file.clone(), 0, FileMapping::Private).build().unwrap();
        region.write_obj(9u8, MemoryRegionAddress(0)).unwrap();
        assert_eq!(region.read_obj::<u8>(MemoryRegionAddress(0)).unwrap(), 9);
        assert_eq!(first_byte(&file), 7);
    }

    #[test]
    fn a_read_only_file_can_be_mapped_private_or_read_only_but_not_shared() {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(0x1000).unwrap();
        let file = Arc::new(File::open(named.path()).unwrap());
        let build = |mapping| RegionBuilder::new(GPA, 0x1000).file(file.clone(), 0, mapping).build();
        build(FileMapping::Private).unwrap();
        build(FileMapping::ReadOnly).unwrap();
        assert!(matches!(build(FileMapping::Shared), Err(Error::Map { backing: "file", .. })));
    }

    #[test]
    fn what_is_not_whole_pages_in_the_address_space_is_refused() {
        for (gpa, len) in [
            (GPA, 0),
            (GPA, 0x1001),
            (GPA + 1, 0x1000),
            (1 << 52, 0x1000),
            ((1 << 52) - 0x1000, 0x2000),
            (!0xFFF, 0x1000),
            (GPA, !0xFFF),
        ] {
            let error = RegionBuilder::new(gpa, len).build().unwrap_err();
            assert!(matches!(error, Error::Region { .. }), "{gpa:#x} {len:#x} {error:?}");
        }
    }

    #[test]
    fn what_is_not_in_the_file_is_refused() {
        let file = file(0x3000);
        for (offset, len) in [(0, 0x4000), (0x3000, 0x1000), (0x800, 0x1000), (!0xFFF, 0x1000)] {
            let builder = RegionBuilder::new(GPA, len);
            let error = builder.file(file.clone(), offset, FileMapping::Shared).build().unwrap_err();
            assert!(matches!(error, Error::Region { .. }), "{offset:#x} {len:#x} {error:?}");
        }
    }
}
