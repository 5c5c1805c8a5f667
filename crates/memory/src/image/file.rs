//! Images as files: copied, checked, and differences brought into their base.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::sums::{of_zeros, zeros};
use super::{CHUNK, Extents, ImageLayout, Progress, failed, same};
use crate::layout::PAGE_SIZE;
use crate::pages::{PAGE, Span, data};
use crate::{Error, Result};

/// Bytes that are copied before the caller hears of it.
const STEP: u64 = 16 << 20;

/// Makes `to` the same as `from`: holes stay holes, and where the file system can share blocks (reflink) nothing is copied.
/// What `to` held is gone.
///
/// # Errors
/// - [`Error::Image`]: one cannot be read or the other cannot be written.
/// - [`Error::ImageRefused`]: they are one file.
pub fn copy_sparse(from: &File, to: &File, progress: Progress<'_>) -> Result<()> {
    apart(from, to)?;
    let size = from.metadata().map_err(failed("measure", 0))?.len();
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        progress(size, size);
        return Ok(());
    }
    to.set_len(0).map_err(failed("empty", 0))?;
    to.set_len(size).map_err(failed("extend", size))?;
    for span in data_or_all(from, Span { start: 0, end: size }) {
        copy(from, to, Span { end: span.end.min(size), ..span }, &mut |done| progress(done, size))?;
    }
    progress(size, size);
    Ok(())
}

/// Writes the pages of a difference into `base`, which becomes the full image of the later moment. `checksums` are those of
/// `base`, if it has any: the chunks that are changed are compared with them before, so that damage does not get checksums that fit
/// it. They become those of what it is now.
///
/// A crash in between leaves something that is neither the one nor the other: work on a [copy](copy_sparse), and rename it.
///
/// # Errors
/// - [`Error::ImageSize`]: a file is shorter than the image; [`Error::ImageRefused`]: not one checksum for each chunk, or
///   the files are one.
/// - [`Error::Damaged`]: the base is not what its checksums say. Nothing was written to it.
/// - [`Error::Image`]: one cannot be read or the other cannot be written.
pub fn apply_diff(
    base: &File,
    diff: &File,
    layout: &ImageLayout,
    extents: &Extents,
    checksums: Option<&mut [u32]>,
    progress: Progress<'_>,
) -> Result<()> {
    apart(base, diff)?;
    check_size(base, layout)?;
    check_size(diff, layout)?;
    if let Some(sums) = &checksums {
        check_sums(sums, layout)?;
        let all = Extents::all(layout);
        let mut reader = Reader::new(base);
        for (sum, chunk) in sums.iter().zip(chunks(layout)) {
            if extents.within(chunk).next().is_some() && reader.sum(&all, chunk)? != *sum {
                return Err(Error::Damaged { offset: chunk.start, len: chunk.end - chunk.start });
            }
        }
    }
    let (total, mut done) = (extents.bytes(), 0);
    for extent in extents.spans() {
        let mut at = extent.start;
        for part in data_or_all(diff, extent) {
            erase(base, Span { start: at, end: part.start })?;
            copy(diff, base, part, &mut |copied| progress(done + copied - extent.start, total))?;
            at = part.end;
        }
        erase(base, Span { start: at, end: extent.end })?;
        done += extent.end - extent.start;
        progress(done, total);
    }
    if let Some(sums) = checksums {
        let all = Extents::all(layout);
        let mut reader = Reader::new(base);
        for (sum, chunk) in sums.iter_mut().zip(chunks(layout)) {
            if extents.within(chunk).next().is_some() {
                *sum = reader.sum(&all, chunk)?;
            }
        }
    }
    Ok(())
}

/// Checks an image against its checksums. `extents` says which pages a difference has; a full image has
/// [all](Extents::all).
///
/// # Errors
/// - [`Error::Damaged`]: a checksum differs. The first such chunk is named.
/// - [`Error::ImageSize`]: the file is shorter than the image; [`Error::ImageRefused`]: not one checksum for each chunk.
/// - [`Error::Image`]: it cannot be read.
pub fn verify(
    file: &File,
    layout: &ImageLayout,
    extents: &Extents,
    checksums: &[u32],
    progress: Progress<'_>,
) -> Result<()> {
    check_size(file, layout)?;
    check_sums(checksums, layout)?;
    let mut reader = Reader::new(file);
    for (sum, chunk) in checksums.iter().zip(chunks(layout)) {
        if reader.sum(extents, chunk)? != *sum {
            return Err(Error::Damaged { offset: chunk.start, len: chunk.end - chunk.start });
        }
        progress(chunk.end, layout.size());
    }
    Ok(())
}

fn chunks(layout: &ImageLayout) -> impl Iterator<Item = Span> {
    let size = layout.size();
    (0..layout.chunks() as u64)
        .map(move |index| Span { start: index * CHUNK, end: ((index + 1) * CHUNK).min(size) })
}

/// One would be emptied, or changed under the other.
fn apart(a: &File, b: &File) -> Result<()> {
    if same(a, b)? { Err(Error::ImageRefused { reason: "both files are the same one" }) } else { Ok(()) }
}

fn check_size(file: &File, layout: &ImageLayout) -> Result<()> {
    let found = file.metadata().map_err(failed("measure", 0))?.len();
    let expected = layout.size();
    if found < expected { Err(Error::ImageSize { expected, found }) } else { Ok(()) }
}

fn check_sums(sums: &[u32], layout: &ImageLayout) -> Result<()> {
    if sums.len() == layout.chunks() {
        Ok(())
    } else {
        Err(Error::ImageRefused { reason: "there is not one checksum for each chunk" })
    }
}

/// The parts of a file that have data; all of it if the file system cannot say.
pub(super) fn data_or_all(file: &File, span: Span) -> Vec<Span> {
    data(file, span).unwrap_or_else(|_| vec![span])
}

/// Copies a part of one file to the same place in another, and says up to which offset it got.
fn copy(from: &File, to: &File, part: Span, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let mut at = part.start;
    let mut by_kernel = true;
    let mut buffer = Vec::new();
    while at < part.end {
        let len = (part.end - at).min(STEP);
        if by_kernel {
            let (mut source, mut target) = (at, at);
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), len) {
                Ok(copied) if copied > 0 => at += copied as u64,
                Ok(_) | Err(_) => {
                    // Not between these file systems, or a true failure, which the other way will meet as well.
                    by_kernel = false;
                    continue;
                }
            }
        } else {
            buffer.resize(usize::try_from(len.min(CHUNK)).unwrap_or(0), 0);
            from.read_exact_at(&mut buffer, at).map_err(failed("read", at))?;
            to.write_all_at(&buffer, at).map_err(failed("write", at))?;
            at += buffer.len() as u64;
        }
        progress(at);
    }
    Ok(())
}

/// Makes a part of a file read as zeros.
fn erase(file: &File, part: Span) -> Result<()> {
    if part.start >= part.end {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if rustix::fs::fallocate(file, flags, part.start, part.end - part.start).is_ok() {
        return Ok(());
    }
    let zeros = [0; PAGE];
    let mut at = part.start;
    while at < part.end {
        file.write_all_at(&zeros, at).map_err(failed("write", at))?;
        at += PAGE_SIZE;
    }
    Ok(())
}

/// Reads an image by rising offset, and passes over its holes.
struct Reader<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Nothing but a hole from the last offset asked for up to here.
    hole_until: u64,
}

impl<'a> Reader<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, buffer: Vec::new(), hole_until: 0 }
    }

    /// Checksum of the pages of `extents` in a chunk.
    fn sum(&mut self, extents: &Extents, chunk: Span) -> Result<u32> {
        let mut hasher = Hasher::new();
        for part in extents.within(chunk) {
            let len = part.end - part.start;
            if self.is_hole(part) {
                if len == CHUNK {
                    return Ok(of_zeros(CHUNK));
                }
                zeros(&mut hasher, len);
                continue;
            }
            self.buffer.resize(usize::try_from(len).unwrap_or(0), 0);
            self.file.read_exact_at(&mut self.buffer, part.start).map_err(failed("read", part.start))?;
            hasher.update(&self.buffer);
        }
        Ok(hasher.finalize())
    }

    fn is_hole(&mut self, part: Span) -> bool {
        if part.start >= self.hole_until {
            self.hole_until = match rustix::fs::seek(self.file, rustix::fs::SeekFrom::Data(part.start)) {
                Ok(start) => start,
                Err(Errno::NXIO) => u64::MAX,
                Err(_) => part.start,
            };
        }
        part.end <= self.hole_until
    }
}
