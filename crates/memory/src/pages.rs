//! Which pages of guest memory there are in the host: what was touched at all, and what this process has mapped now.
//!
//! An image must hold every page that may have content, and nobody wants to read gigabytes that were never touched. Where
//! the kernel does not say (no `/proc`, an unknown file system), everything counts as touched: slower, and never wrong.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::mm::Advice;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::guest_mem::Region;
use crate::image::ImageLayout;
use crate::layout::{PAGE_SIZE, RamRange};
use crate::{Error, GuestMem, Result};

/// The size of a page, for arrays.
pub(crate) const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Bytes of something: offsets in a region, in a file, or host addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Span {
    pub(crate) fn clip(self, within: Self) -> Option<Self> {
        let (start, end) = (self.start.max(within.start), self.end.min(within.end));
        (start < end).then_some(Self { start, end })
    }
}

/// Adds `span`, and joins it with the last if it begins within it or at its end.
pub(crate) fn push(spans: &mut Vec<Span>, span: Span) {
    match spans.last_mut() {
        Some(last) if (last.start..=last.end).contains(&span.start) => last.end = last.end.max(span.end),
        _ => spans.push(span),
    }
}

/// Sorts and joins.
fn normal(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_by_key(|span| span.start);
    let mut joined = Vec::with_capacity(spans.len());
    spans.into_iter().for_each(|span| push(&mut joined, span));
    joined
}

/// How pages are looked for in the page tables of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    /// Pages with content of their own: present or swapped out, and not the page of zeros that all share.
    Content,
    /// Pages that an access reaches without a fault.
    Mapped,
}

/// The whole pages of `span`, offsets in `region`, that may hold something else than zeros. Sorted, apart from each other.
///
/// Nothing is touched to find out.
pub(crate) fn touched(region: &Region, span: Span) -> Vec<Span> {
    let all = vec![span];
    if region.is_hugetlbfs() == Some(true) {
        return all;
    }
    let private = region.flags() & libc::MAP_PRIVATE != 0;
    let in_file = match GuestMemoryRegion::file_offset(region) {
        Some(file) => {
            let base = file.start();
            let wanted = Span { start: base + span.start, end: base + span.end };
            match data(file.file(), wanted) {
                Ok(spans) => spans
                    .into_iter()
                    .map(|found| Span { start: found.start - base, end: found.end - base })
                    .collect(),
                Err(_) => return all,
            }
        }
        None if private => Vec::new(),
        None => return all,
    };
    if !private {
        return in_file;
    }
    match mapped(region, span, Want::Content) {
        Ok(own) if in_file.is_empty() => own,
        Ok(own) => normal([in_file, own].concat()),
        Err(_) => all,
    }
}

/// The parts of `within` that the file has data for, on whole pages. The rest is holes, which read as zeros.
pub(crate) fn data(file: &File, within: Span) -> io::Result<Vec<Span>> {
    let mut found = Vec::new();
    let mut at = within.start;
    while at < within.end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here on.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        let pages = Span {
            start: start - start % PAGE_SIZE,
            end: end.checked_next_multiple_of(PAGE_SIZE).unwrap_or(end),
        };
        if let Some(span) = pages.clip(within) {
            push(&mut found, span);
        }
        at = end.max(at + PAGE_SIZE);
    }
    Ok(found)
}

/// Pages of `span`, offsets in `region`, that are in the page tables of this process.
fn mapped(region: &Region, span: Span, want: Want) -> io::Result<Vec<Span>> {
    let base = region.as_ptr().addr() as u64;
    let wanted = Span { start: base + span.start, end: base + span.end };
    let pagemap = File::open("/proc/self/pagemap")?;
    // Kernels before 6.7 do not know the request.
    let mut spans = scan(&pagemap, wanted, want).or_else(|_| read_pagemap(&pagemap, wanted, want))?;
    for span in &mut spans {
        *span = Span { start: span.start - base, end: span.end - base };
    }
    Ok(spans)
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArgs {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Asks the kernel for the pages among these host addresses, many at once.
fn scan(pagemap: &File, wanted: Span, want: Want) -> io::Result<Vec<Span>> {
    let mut found = Vec::new();
    let mut regions = [PageRegion::default(); 512];
    let (inverted, mask, any) = match want {
        Want::Content => (PAGE_IS_PFNZERO, PAGE_IS_PFNZERO, PAGE_IS_PRESENT | PAGE_IS_SWAPPED),
        Want::Mapped => (0, PAGE_IS_PRESENT, 0),
    };
    let mut at = wanted.start;
    while at < wanted.end {
        let mut args = ScanArgs {
            size: size_of::<ScanArgs>() as u64,
            start: at,
            end: wanted.end,
            vec: regions.as_mut_ptr().addr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: inverted,
            category_mask: mask,
            category_anyof_mask: any,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..ScanArgs::default()
        };
        // SAFETY: `args` has the layout that the request wants, and its vector is that of `regions`, with its true length; both
        // are borrowed mutably here and outlive the call. The kernel reads page tables and writes only to these two.
        let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut args) };
        let Ok(filled) = usize::try_from(filled) else { return Err(io::Error::last_os_error()) };
        for region in regions.iter().take(filled) {
            push(&mut found, Span { start: region.start, end: region.end });
        }
        // The walk always gets on: by a page at least.
        at = args.walk_end.max(at + PAGE_SIZE);
    }
    Ok(found)
}

/// As [`scan`], by eight bytes for each page.
fn read_pagemap(pagemap: &File, wanted: Span, want: Want) -> io::Result<Vec<Span>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    let bits = if want == Want::Content { PRESENT | SWAPPED } else { PRESENT };
    let mut found = Vec::new();
    let mut buffer = vec![0u8; 64 << 10];
    let mut at = wanted.start;
    while at < wanted.end {
        let bytes = ((wanted.end - at).div_ceil(PAGE_SIZE) * 8).min(buffer.len() as u64);
        let part = buffer.get_mut(..usize::try_from(bytes).unwrap_or(0)).unwrap_or_default();
        pagemap.read_exact_at(part, at / PAGE_SIZE * 8)?;
        for entry in part.as_chunks::<8>().0 {
            if u64::from_ne_bytes(*entry) & bits != 0 {
                push(&mut found, Span { start: at, end: at + PAGE_SIZE });
            }
            at += PAGE_SIZE;
        }
    }
    Ok(found)
}

/// How pages are made present in advance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefetch {
    /// As reading would: pages of an image are mapped from the host's page cache, and cost no memory of their own.
    Read,
    /// As writing would: pages of an image are copied, so that the guest's first write to them costs nothing.
    Write,
}

impl Prefetch {
    const fn advice(self) -> Advice {
        match self {
            Self::Read => Advice::LinuxPopulateRead,
            Self::Write => Advice::LinuxPopulateWrite,
        }
    }
}

impl GuestMem {
    /// The pages of `layout` that may hold something else than zeros, as ranges of guest-physical addresses by rising address. Nothing
    /// is touched to find out, except that memory whose pages come from a page server is taken for full.
    ///
    /// # Errors
    /// [`Error::ImageMemory`] if the layout names memory that is not there.
    pub fn content(&self, layout: &ImageLayout) -> Result<Vec<RamRange>> {
        let view = self.view();
        let mut ranges = Vec::new();
        for segment in layout.segments(&view)? {
            let whole = Span { start: segment.from, end: segment.from + segment.len };
            let there = if self.is_served() { vec![whole] } else { touched(segment.region, whole) };
            let start = segment.region.start_addr().0;
            let range = |span: Span| RamRange { start: start + span.start, len: span.end - span.start };
            ranges.extend(there.into_iter().map(range));
        }
        Ok(ranges)
    }

    /// All pages that may hold something else than zeros, found without touching any: what a first copy of the memory has to
    /// move. Sorted by address, neighbours joined. Where the kernel does not say, and for memory that a page server is still
    /// filling, all of it counts.
    pub fn touched(&self) -> Vec<RamRange> {
        let view = self.view();
        let ranges = view.iter().flat_map(|region| {
            let (start, whole) = (region.start_addr().0, Span { start: 0, end: region.len() });
            let spans = if self.is_served() { vec![whole] } else { touched(region, whole) };
            spans
                .into_iter()
                .map(move |span| RamRange { start: start + span.start, len: span.end - span.start })
        });
        ranges.collect()
    }

    /// The pages that this process has mapped at this moment, which is what the guest and the devices have used since the
    /// memory was made: its working set. Sorted by address, neighbours joined.
    ///
    /// For memory that is an image, the host's kernel maps a few pages around a read one, so there are more than were used.
    /// Memory that the host swapped out is not in it.
    ///
    /// # Errors
    /// [`Error::Image`] if `/proc/self/pagemap` cannot be read.
    pub fn working_set(&self) -> Result<Vec<RamRange>> {
        let mut ranges = Vec::new();
        for region in self.view().iter() {
            let start = region.start_addr().0;
            let spans = mapped(region, Span { start: 0, end: region.len() }, Want::Mapped)
                .map_err(|source| Error::Image { doing: "find the pages for", offset: 0, source })?;
            ranges.extend(
                spans.iter().map(|span| RamRange { start: start + span.start, len: span.end - span.start }),
            );
        }
        Ok(ranges)
    }

    /// Makes pages present before the guest touches them, and returns how many bytes these are. What is no memory is passed over;
    /// no content changes, and nothing of it is dirty.
    ///
    /// All of `ranges` is announced to the host first, so that it reads from a disk what is needed next while it maps what is
    /// there.
    ///
    /// # Errors
    /// [`Error::Prefetch`] if the host refuses: it has no memory left, or cannot read the image.
    pub fn prefetch(&self, ranges: &[RamRange], how: Prefetch) -> Result<u64> {
        let view = self.view();
        let mut parts = Vec::new();
        for range in ranges {
            let wanted = Span { start: range.start, end: range.start.saturating_add(range.len) };
            for region in view.iter() {
                let base = region.start_addr().0;
                let Some(part) = wanted.clip(Span { start: base, end: base + region.len() }) else {
                    continue;
                };
                let start = (part.start - base) / PAGE_SIZE * PAGE_SIZE;
                let end = (part.end - base).next_multiple_of(PAGE_SIZE).min(region.len());
                parts.push((region, Span { start, end }));
            }
        }
        for (region, span) in &parts {
            if GuestMemoryRegion::file_offset(*region).is_some() {
                // Only a hint: what comes of it shows below.
                let _ = advise(region, *span, Advice::WillNeed);
            }
        }
        let mut bytes = 0;
        for (region, span) in parts {
            match advise(region, span, how.advice()) {
                // Kernels before 5.14 do not know the advice: the guest's own faults will do.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => {
                    let (gpa, len) = (region.start_addr().0 + span.start, span.end - span.start);
                    return Err(Error::Prefetch { gpa, len, source: errno.into() });
                }
            }
            bytes += span.end - span.start;
        }
        Ok(bytes)
    }
}

/// Gives advice on whole pages of a region, which does not change what they hold.
fn advise(region: &Region, span: Span, advice: Advice) -> rustix::io::Result<()> {
    debug_assert!(matches!(
        advice,
        Advice::WillNeed | Advice::LinuxPopulateRead | Advice::LinuxPopulateWrite
    ));
    let (Ok(from), Ok(to)) = (usize::try_from(span.start), usize::try_from(span.end)) else {
        return Err(Errno::INVAL);
    };
    let len = to.checked_sub(from).filter(|_| to <= region.size()).ok_or(Errno::INVAL)?;
    // SAFETY: `from` is within the mapping, as was just checked.
    let start = unsafe { region.as_ptr().add(from) };
    loop {
        // SAFETY: the range is within a live mapping that `region` keeps alive during the call. The callers give advice that
        // makes pages present, and changes no content.
        match unsafe { rustix::mm::madvise(start.cast(), len, advice) } {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Whether any page of a region is there, be it the page of zeros. `false` if the kernel does not say.
#[cfg(feature = "uffd")]
pub(crate) fn any_present(region: &Region) -> bool {
    let all = Span { start: 0, end: region.len() };
    let found = |want| mapped(region, all, want).is_ok_and(|spans| !spans.is_empty());
    found(Want::Mapped) || found(Want::Content)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, MemoryRegionAddress};

    use super::*;
    use crate::{Backing, RegionBuilder};

    #[test]
    fn both_ways_to_ask_for_pages_find_the_same() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let region = RegionBuilder::new(0, 64 << 20).backing(backing).build().unwrap();
            // More runs than fit one answer.
            for page in (0..2000u64).map(|index| index * 8) {
                region.write_obj(1u8, MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
            }
            let start = region.as_ptr().addr() as u64;
            let wanted = Span { start, end: start + region.len() };
            let pagemap = File::open("/proc/self/pagemap").unwrap();
            for want in [Want::Content, Want::Mapped] {
                let read = read_pagemap(&pagemap, wanted, want).unwrap();
                assert_eq!(read.len(), 2000, "{backing:?}");
                // Kernels before 6.7 have only the one way.
                if let Ok(scanned) = scan(&pagemap, wanted, want) {
                    assert_eq!(scanned, read, "{backing:?}");
                }
            }
        }
    }

    #[test]
    fn data_of_a_file_is_whole_pages_within_what_was_asked_for() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        for at in [0x1_0000, 0x4_0000] {
            file.write_all_at(&[1; 0x4000], at).unwrap();
        }
        let found = data(&file, Span { start: 0x1_1000, end: 0x4_1000 }).unwrap();
        let expected = [Span { start: 0x1_1000, end: 0x1_4000 }, Span { start: 0x4_0000, end: 0x4_1000 }];
        assert_eq!(found, expected);
        assert_eq!(data(&file, Span { start: 0x8_0000, end: 1 << 20 }).unwrap(), []);
    }
}
