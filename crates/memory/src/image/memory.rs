//! Images and memory that is mapped already: differences laid over it, and files in memory that forks are mapped from.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::file::data_or_all;
use super::{Extent, Extents, ImageLayout, ImageStats, Progress, failed, same, write_full};
use crate::backing::memory_file;
use crate::layout::{PAGE_SIZE, RamRange};
use crate::pages::{PAGE, Span};
use crate::{Error, GuestMem, Result};

/// Most that is read by one system call.
const BATCH: u64 = 4 << 20;
/// Shorter runs of zeros are written: a hole in a mapping costs more than their pages.
const MIN_HOLE: u64 = 256 << 10;

/// Copies the pages of a difference over memory that began as its base. For a chain, the oldest first.
///
/// Only these pages cost memory and time. They count as written in the dirty log: [clear](crate::DirtyLog::clear) it when the
/// chain is complete.
///
/// # Errors
/// - [`Error::ImageSize`]: the file is shorter than the image.
/// - [`Error::ImageMemory`]: the layout names memory that is not there.
/// - [`Error::Image`]: it cannot be read; [`Error::Discard`]: the host refused to take pages of zeros back.
pub fn overlay(
    mem: &GuestMem,
    layout: &ImageLayout,
    diff: &File,
    extents: &Extents,
    progress: Progress<'_>,
) -> Result<()> {
    let found = diff.metadata().map_err(failed("measure", 0))?.len();
    if found < layout.size() {
        return Err(Error::ImageSize { expected: layout.size(), found });
    }
    layout.segments(&mem.view())?;
    let (total, mut done) = (extents.bytes(), 0);
    for extent in extents.spans() {
        let mut at = extent.start;
        for part in data_or_all(diff, extent) {
            zero(mem, layout, Span { start: at, end: part.start })?;
            let mut from = part.start;
            while from < part.end {
                let to = part.end.min(from + BATCH);
                read(mem, layout, diff, Span { start: from, end: to })?;
                progress(done + to - extent.start, total);
                from = to;
            }
            at = part.end;
        }
        zero(mem, layout, Span { start: at, end: extent.end })?;
        done += extent.end - extent.start;
        progress(done, total);
    }
    Ok(())
}

fn pieces(layout: &ImageLayout, part: Span) -> impl Iterator<Item = RamRange> {
    layout.pieces(Extent { offset: part.start, len: part.end.saturating_sub(part.start) })
}

/// Reads a part of an image into the memory that it is for.
fn read(mem: &GuestMem, layout: &ImageLayout, file: &File, part: Span) -> Result<()> {
    let view = mem.view();
    let mut offset = part.start;
    for piece in pieces(layout, part) {
        let mut at = piece.start;
        let end = piece.start + piece.len;
        while at < end {
            // A range of the layout may be made of more than one region.
            let missing = || Error::ImageMemory { gpa: at, len: end - at, reason: "is not there" };
            let region = view.find_region(GuestAddress(at)).ok_or_else(missing)?;
            let len = (end - at).min(region.len() - (at - region.start_addr().0));
            let len = usize::try_from(len).map_err(|_| missing())?;
            let slice = view.get_slice(GuestAddress(at), len).map_err(|_| missing())?;
            let got = crate::io::read_vectored_at(file.as_fd(), &[slice], offset);
            let got = match got.map_err(failed("read", offset))? {
                0 => return Err(failed("read", offset)(io::ErrorKind::UnexpectedEof.into())),
                got => got as u64,
            };
            at += got;
            offset += got;
        }
    }
    Ok(())
}

/// Makes the memory of a part of an image read as zeros.
fn zero(mem: &GuestMem, layout: &ImageLayout, part: Span) -> Result<()> {
    let zeros = [0u8; PAGE];
    for piece in pieces(layout, part) {
        if piece.len >= MIN_HOLE && mem.discard(piece.start, piece.len)? == piece.len {
            continue;
        }
        let view = mem.view();
        for gpa in (piece.start..piece.start + piece.len).step_by(zeros.len()) {
            view.write_slice(&zeros, GuestAddress(gpa)).map_err(|_| Error::ImageMemory {
                gpa,
                len: PAGE_SIZE,
                reason: "is not there",
            })?;
        }
    }
    Ok(())
}

/// Copies memory into a sealed memory file, from which forks are [mapped](crate::GuestMemBuilder::image): in this process or, by
/// its descriptor, in others. Nobody can change it any more, or shrink it under them.
///
/// As [`write_full`], it takes time and memory for what the guest has used.
///
/// # Errors
/// As [`write_full`]; [`Error::File`] if the file cannot be made.
pub fn to_memfd(mem: &GuestMem, layout: &ImageLayout) -> Result<(File, ImageStats)> {
    let refused = |errno: rustix::io::Errno| Error::File {
        size: layout.size(),
        backing: "memfd",
        source: errno.into(),
    };
    let file = memory_file(MemfdFlags::empty(), layout.size()).map_err(refused)?;
    let stats = write_full(mem, layout, &file, false, &mut |_, _| {})?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(refused)?;
    Ok((file, stats))
}

/// The memory file that the boot RAM is made of already, for memory that is [`Backing::Memfd`](crate::Backing::Memfd) and has
/// just this layout. Nothing is copied. `None` for other memory: [`to_memfd`] copies it.
///
/// The memory must be frozen for good: what is written to it from now on, by a vCPU or a device, shows in every fork that has not
/// yet written to the same page.
///
/// # Errors
/// [`Error::Image`] if the descriptor cannot be duplicated.
pub fn frozen_memfd(mem: &GuestMem, layout: &ImageLayout) -> Result<Option<File>> {
    let view = mem.view();
    let mut first: Option<&File> = None;
    for segment in layout.segments(&view)? {
        let Some(file) = GuestMemoryRegion::file_offset(segment.region) else { return Ok(None) };
        let sealed = rustix::fs::fcntl_get_seals(file.file()).is_ok_and(|s| s.contains(SealFlags::SHRINK));
        let shared = segment.region.flags() & libc::MAP_SHARED != 0;
        if !sealed || !shared || file.start() + segment.from != segment.offset {
            return Ok(None);
        }
        match first {
            Some(known) if !same(known, file.file())? => return Ok(None),
            Some(_) => {}
            None => first = Some(file.file()),
        }
    }
    first.map(|file| file.try_clone().map_err(failed("duplicate", 0))).transpose()
}
