//! What guest memory is made of in the host: the mappings and the files behind them.
//!
//! This module maps memory. It does not know the guest's layout beyond the ranges it is given.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::Advice;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, GuestMemoryRegion, MemoryRegionAddress};

use crate::dirty::dirty_bitmap;
use crate::guest_mem::Region;
use crate::layout::{PAGE_SIZE, RamRange};
use crate::{Error, Result};

/// Size of a huge page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugePageSize {
    /// 2 MiB pages.
    Size2M,
    /// 1 GiB pages.
    Size1G,
}

impl HugePageSize {
    /// Size of one page in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }

    const fn memfd_flag(self) -> MemfdFlags {
        match self {
            Self::Size2M => MemfdFlags::HUGE_2MB,
            Self::Size1G => MemfdFlags::HUGE_1GB,
        }
    }

    fn exhausted(self, size: u64, source: io::Error) -> Error {
        let (page_size, hint) = match self {
            // The sysctl counts pages of the default size, which is 2 MiB unless the host was booted otherwise.
            Self::Size2M => ("2 MiB", "set the sysctl vm.nr_hugepages"),
            Self::Size1G => (
                "1 GiB",
                "boot the host with hugepagesz=1G hugepages=N, or raise \
                 /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages (vm.nr_hugepages is for the default size),",
            ),
        };
        Error::HugePages { pages: size.div_ceil(self.bytes()), page_size, hint, source }
    }
}

/// Kind of host memory behind the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Backing {
    /// Private anonymous memory: the quickest to create, not shareable.
    #[default]
    Anonymous,
    /// A sealed memfd, mapped shared: other processes (vhost-user, forks) can map it too.
    Memfd,
    /// A memfd on huge pages.
    ///
    /// All pages are reserved when the memory is made, so that a guest cannot meet an empty pool later.
    HugePages(HugePageSize),
    /// A memory image, mapped privately: see [`GuestMemBuilder::image`](crate::GuestMemBuilder::image), which is the only way to
    /// ask for it. Like anonymous memory it is this process's alone.
    Image,
}

impl Backing {
    /// Name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
            Self::HugePages(HugePageSize::Size2M) => "2 MiB huge pages",
            Self::HugePages(HugePageSize::Size1G) => "1 GiB huge pages",
            Self::Image => "image",
        }
    }

    /// Every range must start and end at a multiple of this many bytes.
    pub const fn granularity(self) -> u64 {
        match self {
            Self::Anonymous | Self::Memfd | Self::Image => PAGE_SIZE,
            Self::HugePages(size) => size.bytes(),
        }
    }
}

/// Makes the mappings of one guest.
pub(crate) struct Mapper {
    backing: Backing,
    /// The file of a memfd backing, and how much of it is mapped.
    file: Option<(Arc<File>, u64)>,
    size: u64,
}

impl Mapper {
    /// Prepares memory of `size` bytes in all; one file holds it for the backings that have one.
    pub(crate) fn new(backing: Backing, size: u64) -> Result<Self> {
        let flags = match backing {
            Backing::Anonymous => return Ok(Self { backing, file: None, size }),
            Backing::Memfd => MemfdFlags::empty(),
            Backing::HugePages(page) => MemfdFlags::HUGETLB | page.memfd_flag(),
            Backing::Image => return Err(Error::Size { size, reason: "an image needs its file" }),
        };
        let file = sealed_file(flags, size).map_err(|errno| match backing {
            // No pool of this page size at all.
            Backing::HugePages(page) if matches!(errno, Errno::NODEV | Errno::INVAL) => {
                page.exhausted(size, errno.into())
            }
            _ => Error::File { size, backing: backing.name(), source: errno.into() },
        })?;
        Ok(Self { backing, file: Some((Arc::new(file), 0)), size })
    }

    /// Prepares memory of `size` bytes that begins as what `file` holds.
    pub(crate) fn with_image(file: Arc<File>, size: u64) -> Result<Self> {
        let metadata =
            file.metadata().map_err(|source| Error::Image { doing: "measure", offset: 0, source })?;
        if metadata.len() < size {
            return Err(Error::ImageSize { expected: size, found: metadata.len() });
        }
        Ok(Self { backing: Backing::Image, file: Some((file, 0)), size })
    }

    /// The next range is at `offset` in the file.
    pub(crate) fn seek(&mut self, offset: u64) {
        if let Some((_, mapped)) = &mut self.file {
            *mapped = offset;
        }
    }

    /// Maps the next range. Costs no memory until it is touched, except that huge pages are reserved.
    pub(crate) fn map(
        &mut self,
        range: RamRange,
        bitmap: Option<AtomicBitmap>,
    ) -> Result<MmapRegion<Option<AtomicBitmap>>> {
        let len = usize::try_from(range.len)
            .map_err(|_| Error::Size { size: range.len, reason: "more than this process can address" })?;
        let (flags, offset) = match &mut self.file {
            // Private, because a shared anonymous mapping is a hidden tmpfs file and slower to fault in.
            None => (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE, None),
            Some((file, mapped)) => {
                let offset = FileOffset::from_arc(Arc::clone(file), *mapped);
                *mapped += range.len;
                match self.backing {
                    // With NORESERVE, a huge page that is missing at a fault would be a SIGBUS.
                    Backing::HugePages(_) => (libc::MAP_SHARED, Some(offset)),
                    Backing::Image => (libc::MAP_PRIVATE | libc::MAP_NORESERVE, Some(offset)),
                    _ => (libc::MAP_SHARED | libc::MAP_NORESERVE, Some(offset)),
                }
            }
        };
        // The builder's default is PROT_NONE, on which safe code would fault: always say what is meant.
        let mut builder = MmapRegionBuilder::new_with_bitmap(len, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags);
        if let Some(offset) = offset {
            builder = builder
                .with_file_offset(offset)
                .with_hugetlbfs(matches!(self.backing, Backing::HugePages(_)));
        }
        builder.build().map_err(|error| self.map_error(range, error))
    }

    fn map_error(&self, range: RamRange, error: MmapRegionError) -> Error {
        let source = match error {
            MmapRegionError::Mmap(source) => source,
            other => io::Error::other(other),
        };
        match self.backing {
            Backing::HugePages(page) if source.raw_os_error() == Some(libc::ENOMEM) => {
                page.exhausted(self.size, source)
            }
            backing => Error::Map { gpa: range.start, len: range.len, backing: backing.name(), source },
        }
    }
}

/// A file in memory whose size is final: nobody who is given its descriptor can make our mapping fault by truncating it.
fn sealed_file(flags: MemfdFlags, size: u64) -> rustix::io::Result<File> {
    let file = memory_file(flags, size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// A file in memory that can still be sealed.
pub(crate) fn memory_file(flags: MemfdFlags, size: u64) -> rustix::io::Result<File> {
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let name = "freestone-guest-memory";
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the flag. It only keeps the file from being executed.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        other => other?,
    };
    rustix::fs::ftruncate(&fd, size)?;
    Ok(File::from(fd))
}

fn is_private(region: &Region) -> bool {
    region.flags() & libc::MAP_PRIVATE != 0
}

/// Makes every page of `region` present, so that no page fault happens later. For regions nothing has been written to.
pub(crate) fn prefault(region: &Region) -> Result<()> {
    let populated = loop {
        // SAFETY: pointer and length are those of a live mapping, which `region` keeps mapped during the call.
        // MADV_POPULATE_WRITE changes no content: it only makes the pages present and writable.
        match unsafe {
            rustix::mm::madvise(region.as_ptr().cast(), region.size(), Advice::LinuxPopulateWrite)
        } {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    match populated {
        // Kernels before 5.14 do not know the advice. What an image holds must not be written over.
        Err(Errno::INVAL) if GuestMemoryRegion::file_offset(region).is_some() && is_private(region) => Ok(()),
        Err(Errno::INVAL) => touch(region),
        other => other.map_err(|errno| Error::Prefault {
            gpa: region.start_addr().0,
            len: region.len(),
            source: errno.into(),
        }),
    }
}

/// Writes a zero to each page of a region that holds only zeros.
fn touch(region: &Region) -> Result<()> {
    let mut offset = 0;
    while offset < region.len() {
        region.write_obj(0u8, MemoryRegionAddress(offset)).map_err(|error| Error::Prefault {
            gpa: region.start_addr().0,
            len: region.len(),
            source: io::Error::other(error),
        })?;
        offset += PAGE_SIZE;
    }
    if let Some(bitmap) = dirty_bitmap(region) {
        bitmap.reset();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::{GuestMem, GuestMemBuilder};

    /// Pages of the region that are present, by mincore(2).
    fn resident(region: &Region) -> usize {
        let mut present = vec![0u8; region.size() / 4096];
        // SAFETY: the range is a live mapping, and `present` has a byte for each of its pages.
        let rc = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), present.as_mut_ptr()) };
        assert_eq!(rc, 0);
        present.iter().filter(|p| **p & 1 != 0).count()
    }

    #[test]
    fn memory_is_not_present_before_it_is_touched() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let mem = GuestMemBuilder::new(5 << 30).backing(backing).build().unwrap();
            let present: Vec<_> = mem.regions().iter().map(|region| resident(region)).collect();
            assert_eq!(present, [0, 0], "{backing:?}");
        }
    }

    #[test]
    fn prefault_makes_every_page_of_every_region_present() {
        let ranges = vec![RamRange { start: 0, len: 1 << 20 }, RamRange { start: 1 << 32, len: 2 << 20 }];
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let mem =
                GuestMemBuilder::with_ranges(ranges.clone()).backing(backing).prefault(true).build().unwrap();
            let present: Vec<_> = mem.regions().iter().map(|region| resident(region)).collect();
            assert_eq!(present, [256, 512], "{backing:?}");
        }
    }

    #[test]
    fn touching_page_by_page_prefaults_too_and_leaves_no_dirty_pages() {
        let mem = GuestMemBuilder::new(1 << 20).dirty_log(true).build().unwrap();
        touch(&mem.regions()[0]).unwrap();
        assert_eq!(resident(&mem.regions()[0]), 256);
        assert_eq!(mem.take_dirty().unwrap()[0].count(), 0);
    }

    #[test]
    fn memfd_regions_share_one_file_one_after_the_other() {
        let ranges = vec![RamRange { start: 0, len: 0x3000 }, RamRange { start: 0x1_0000, len: 0x1000 }];
        let mem = GuestMemBuilder::with_ranges(ranges).backing(Backing::Memfd).build().unwrap();
        let files: Vec<_> =
            mem.regions().iter().map(|r| GuestMemoryRegion::file_offset(&**r).unwrap()).collect();
        assert_eq!([files[0].start(), files[1].start()], [0, 0x3000]);
        assert_eq!(files[0].file().metadata().unwrap().len(), 0x4000);

        mem.view().write_obj(0x55u8, GuestAddress(0x1_0000)).unwrap();
        let mut byte = [0];
        rustix::io::pread(files[1].file().as_fd(), &mut byte, 0x3000).unwrap();
        assert_eq!(byte, [0x55]);
    }

    #[test]
    fn memfd_can_be_neither_shrunk_nor_grown() {
        let mem = GuestMemBuilder::new(0x4000).backing(Backing::Memfd).build().unwrap();
        let file = GuestMemoryRegion::file_offset(&*mem.regions()[0]).unwrap().file();
        for size in [0x1000, 0x8000] {
            assert_eq!(rustix::fs::ftruncate(file, size), Err(Errno::PERM), "{size:#x}");
        }
        assert_eq!(rustix::fs::fcntl_add_seals(file, SealFlags::WRITE), Err(Errno::PERM));
    }

    #[test]
    fn anonymous_memory_has_no_file() {
        let mem = GuestMem::anonymous(0x1000).unwrap();
        assert!(GuestMemoryRegion::file_offset(&*mem.regions()[0]).is_none());
    }

    #[test]
    fn huge_pages_come_from_the_pool_or_the_error_says_how_to_fill_it() {
        // 16 TiB: more than the pool of any host that runs this.
        let size = 16 << 40;
        let error =
            GuestMemBuilder::new(size).backing(Backing::HugePages(HugePageSize::Size2M)).build().unwrap_err();
        let Error::HugePages { pages, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*pages, size / (2 << 20));
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");

        let error =
            GuestMemBuilder::new(size).backing(Backing::HugePages(HugePageSize::Size1G)).build().unwrap_err();
        assert!(error.to_string().contains("hugepages-1048576kB"), "{error}");
    }

    #[test]
    fn huge_page_memory_works_where_the_pool_has_pages() {
        match GuestMemBuilder::new(4 << 20).backing(Backing::HugePages(HugePageSize::Size2M)).build() {
            Ok(mem) => {
                mem.view().write_obj(1u8, GuestAddress((4 << 20) - 1)).unwrap();
                assert_eq!(mem.regions()[0].is_hugetlbfs(), Some(true));
            }
            // The pool is empty here: nothing to try.
            Err(error) => assert!(matches!(error, Error::HugePages { pages: 2, .. }), "{error:?}"),
        }
    }

    #[test]
    fn huge_page_memory_must_be_whole_huge_pages() {
        let error = GuestMemBuilder::new((2 << 20) + 0x1000)
            .backing(Backing::HugePages(HugePageSize::Size2M))
            .build()
            .unwrap_err();
        assert!(matches!(error, Error::Size { size: 0x20_1000, .. }), "{error:?}");
    }
}
