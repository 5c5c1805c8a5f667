//! Guest memory into images: [`write_full`] and [`write_diff`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};

use super::layout::Segment;
use super::sums::Sums;
use super::{Extents, ImageLayout, Progress, failed, same};
use crate::guest_mem::MemorySlice;
use crate::layout::PAGE_SIZE;
use crate::pages::{PAGE, Span, touched};
use crate::{DirtyPages, Error, GuestMem, Result};

/// Pages that are looked at before they are written, and so the most that one system call writes.
const BATCH: u64 = 4 << 20;

/// What was written into an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageStats {
    /// Pages that were written.
    pub written: u64,
    /// Pages that were read and are holes, because all their bytes are zero.
    pub zero: u64,
    /// Pages that nobody ever touched. They were not read either.
    pub untouched: u64,
    /// One checksum for each [`CHUNK`](super::CHUNK) of the image, if they were asked for: the CRC-32 of the chunk's pages that
    /// are there, one after the other. In a full image all are there; in a difference, those of its extents. 0 for a chunk of
    /// which nothing is there.
    pub checksums: Option<Vec<u32>>,
}

impl ImageStats {
    /// Bytes that were written.
    pub fn bytes(&self) -> u64 {
        self.written * PAGE_SIZE
    }
}

/// Writes all pages of `layout` into `file`; what the file held is gone. It is as long as the image then, with holes for
/// zeros.
///
/// Pages that were never touched are neither read nor made present, so this takes time for what the guest has used and not for
/// its size. The others are written from where they are, without a copy, in large parts; `checksums` costs a copy of them.
/// The image is of one moment only if nobody writes to the memory meanwhile.
///
/// # Errors
/// - [`Error::ImageMemory`]: the layout names memory that is not there.
/// - [`Error::ImageRefused`]: the memory is mapped from `file`.
/// - [`Error::Image`]: the file cannot be written, for one when the disk is full.
pub fn write_full(
    mem: &GuestMem,
    layout: &ImageLayout,
    file: &File,
    checksums: bool,
    progress: Progress<'_>,
) -> Result<ImageStats> {
    let sums = checksums.then(|| Sums::new(layout, true));
    Writer::new(mem, layout, file, sums, progress)?.write(&Extents::all(layout))
}

/// Writes the pages of a dirty log into `file`, at the offsets that they have in a full image, and returns which these are.
/// What the file held is gone.
///
/// A page of zeros is one of them and is a hole in the file. The log is to be the one that was taken when the memory stood
/// still: what is written later is in neither.
///
/// # Errors
/// As [`write_full`]; [`Error::ImageMemory`] also if a dirty page has no place in the image.
pub fn write_diff(
    mem: &GuestMem,
    layout: &ImageLayout,
    dirty: &[DirtyPages],
    file: &File,
    checksums: bool,
    progress: Progress<'_>,
) -> Result<(ImageStats, Extents)> {
    let extents = Extents::of_dirty(dirty, layout)?;
    let sums = checksums.then(|| Sums::new(layout, false));
    let stats = Writer::new(mem, layout, file, sums, progress)?.write(&extents)?;
    Ok((stats, extents))
}

struct Writer<'a> {
    mem: &'a GuestMem,
    layout: &'a ImageLayout,
    file: &'a File,
    sums: Option<Sums>,
    stats: ImageStats,
    progress: Progress<'a>,
    total: u64,
    done: u64,
}

impl<'a> Writer<'a> {
    fn new(
        mem: &'a GuestMem,
        layout: &'a ImageLayout,
        file: &'a File,
        sums: Option<Sums>,
        progress: Progress<'a>,
    ) -> Result<Self> {
        // Emptied under a mapping, it would end this process.
        for segment in layout.segments(&mem.view())? {
            let mapped = GuestMemoryRegion::file_offset(segment.region);
            if mapped.is_some_and(|mapped| same(mapped.file(), file).unwrap_or(false)) {
                return Err(Error::ImageRefused { reason: "the memory is mapped from this very file" });
            }
        }
        // Shorter first: whatever it held reads as zeros afterwards.
        file.set_len(0).map_err(failed("empty", 0))?;
        file.set_len(layout.size()).map_err(failed("extend", layout.size()))?;
        let stats = ImageStats::default();
        Ok(Self { mem, layout, file, sums, stats, progress, total: 0, done: 0 })
    }

    fn write(mut self, extents: &Extents) -> Result<ImageStats> {
        self.total = extents.bytes();
        let view = self.mem.view();
        for segment in self.layout.segments(&view)? {
            self.segment(&segment, extents)?;
        }
        (self.progress)(self.total, self.total);
        self.stats.checksums = self.sums.map(Sums::finish);
        Ok(self.stats)
    }

    fn segment(&mut self, segment: &Segment<'_>, extents: &Extents) -> Result<()> {
        let place = Span { start: segment.offset, end: segment.offset + segment.len };
        let mut wanted = extents.within(place).peekable();
        if wanted.peek().is_none() {
            return Ok(());
        }
        let whole = Span { start: segment.from, end: segment.from + segment.len };
        // Offsets in the image from here on.
        let shift = |span: Span| Span {
            start: span.start - segment.from + segment.offset,
            end: span.end - segment.from + segment.offset,
        };
        // What is not present may still have to come from a page server.
        let there = if self.mem.is_served() { vec![whole] } else { touched(segment.region, whole) };
        let there: Vec<Span> = there.into_iter().map(shift).collect();
        let mut next = 0;
        for extent in wanted {
            let mut at = extent.start;
            while there.get(next).is_some_and(|span| span.end <= extent.start) {
                next += 1;
            }
            for part in there
                .get(next..)
                .unwrap_or_default()
                .iter()
                .map_while(|span| if span.start >= extent.end { None } else { span.clip(extent) })
            {
                self.untouched(at, part.start);
                self.touched(segment, part)?;
                at = part.end;
            }
            self.untouched(at, extent.end);
        }
        Ok(())
    }

    /// Pages that are zeros without being looked at.
    fn untouched(&mut self, from: u64, to: u64) {
        if from >= to {
            return;
        }
        self.stats.untouched += (to - from) / PAGE_SIZE;
        if let Some(sums) = &mut self.sums {
            sums.zeros(from, to - from);
        }
        // Said with the next part that takes time.
        self.done += to - from;
    }

    /// Writes those of the pages that are not zeros.
    fn touched(&mut self, segment: &Segment<'_>, part: Span) -> Result<()> {
        let mut at = part.start;
        while at < part.end {
            let len = BATCH.min(part.end - at);
            self.batch(&slice(segment, at, len)?, at)?;
            at += len;
            self.done += len;
            (self.progress)(self.done, self.total);
        }
        Ok(())
    }

    fn batch(&mut self, slice: &MemorySlice<'_>, offset: u64) -> Result<()> {
        let mut page = [0; PAGE];
        let mut run = 0..0;
        for at in (0..slice.len()).step_by(page.len()) {
            let bytes = slice.subslice(at, page.len()).map_err(|error| out_of_range(offset, error))?;
            if self.is_zero(&bytes, &mut page, offset + at as u64)? {
                self.stats.zero += 1;
                self.run(slice, run, offset)?;
                run = at + page.len()..at + page.len();
            } else {
                run.end = at + page.len();
            }
        }
        self.run(slice, run, offset)
    }

    /// Whether a page is all zeros; counts its checksum.
    fn is_zero(&mut self, bytes: &MemorySlice<'_>, page: &mut [u8; PAGE], offset: u64) -> Result<bool> {
        // Most pages that hold something show it at once.
        const HEAD: usize = 64;
        if self.sums.is_none() {
            let head = bytes.subslice(0, HEAD).map_err(|error| out_of_range(offset, error))?;
            let mut buffer = [0u8; HEAD];
            head.copy_to(&mut buffer);
            if buffer != [0; HEAD] {
                return Ok(false);
            }
        }
        bytes.copy_to(&mut page[..]);
        if let Some(sums) = &mut self.sums {
            sums.page(offset, page);
        }
        Ok(*page == [0; PAGE])
    }

    /// Writes neighbouring pages.
    fn run(&mut self, slice: &MemorySlice<'_>, run: std::ops::Range<usize>, offset: u64) -> Result<()> {
        let (mut at, end) = (run.start, run.end);
        self.stats.written += (end - at) as u64 / PAGE_SIZE;
        while at < end {
            let place = offset + at as u64;
            let rest = slice.subslice(at, end - at).map_err(|error| out_of_range(place, error))?;
            let wrote = crate::io::write_vectored_at(self.file.as_fd(), &[rest], place);
            at += match wrote.map_err(failed("write", place))? {
                0 => return Err(failed("write", place)(io::ErrorKind::WriteZero.into())),
                wrote => wrote,
            };
        }
        Ok(())
    }
}

/// Guest memory at `len` bytes of the image from `offset` on, which are in `segment`.
fn slice<'a>(segment: &Segment<'a>, offset: u64, len: u64) -> Result<MemorySlice<'a>> {
    let at = MemoryRegionAddress(offset - segment.offset + segment.from);
    let len = usize::try_from(len).map_err(|error| out_of_range(offset, error))?;
    segment.region.get_slice(at, len).map_err(|error| out_of_range(offset, error))
}

/// Cannot happen: everything is within a segment.
fn out_of_range(offset: u64, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    failed("read guest memory for", offset)(io::Error::other(error))
}
