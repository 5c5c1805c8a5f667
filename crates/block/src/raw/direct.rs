//! O_DIRECT: what the kernel takes as it is, and the copy through which everything else goes.
//!
//! Offsets, lengths and addresses must be multiples of 512. A guest's requests are whole sectors, and drivers align their
//! buffers, so the copy is the exception.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use freestone_memory::{Bytes, MemorySlice};

use crate::image::SECTOR_SIZE;

/// What addresses and lengths must be multiples of.
const ALIGN: usize = 512;
/// Bytes that are copied at once.
const CHUNK: u64 = 256 << 10;

/// Whether the kernel takes a request as it is.
pub(super) fn is_aligned(bufs: &[MemorySlice<'_>], offset: u64) -> bool {
    offset.is_multiple_of(SECTOR_SIZE)
        && bufs.iter().all(|buf| {
            let guard = buf.ptr_guard();
            guard.as_ptr().addr().is_multiple_of(ALIGN) && guard.len().is_multiple_of(ALIGN)
        })
}

/// Finds out whether blocks of one sector do.
pub(super) fn probe(file: &File) -> io::Result<()> {
    let mut bounce = Bounce::new(SECTOR_SIZE);
    file.read_exact_at(bounce.bytes(SECTOR_SIZE), 0)
}

/// Reads through a copy.
pub(super) fn read(file: &File, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
    let mut cursor = Cursor { bufs, at: 0 };
    each_chunk(bufs, offset, |chunk, bounce| {
        let bytes = bounce.bytes(chunk.len);
        file.read_exact_at(bytes, chunk.start)?;
        let wanted = bytes.get(chunk.skip..chunk.skip + chunk.take).unwrap_or_default();
        cursor.each(wanted.len(), |buf, at, range| {
            buf.write_slice(wanted.get(range).unwrap_or_default(), at).map_err(io::Error::other)
        })
    })
}

/// Writes through a copy. `partial` keeps writes of parts of one sector apart.
pub(super) fn write(
    file: &File,
    partial: &Mutex<()>,
    bufs: &[MemorySlice<'_>],
    offset: u64,
) -> io::Result<()> {
    let whole = offset.is_multiple_of(SECTOR_SIZE)
        && bufs.iter().map(MemorySlice::len).sum::<usize>().is_multiple_of(ALIGN);
    let _guard = (!whole).then(|| partial.lock().unwrap_or_else(PoisonError::into_inner));
    let mut cursor = Cursor { bufs, at: 0 };
    each_chunk(bufs, offset, |chunk, bounce| {
        let bytes = bounce.bytes(chunk.len);
        if chunk.take as u64 != chunk.len {
            file.read_exact_at(bytes, chunk.start)?;
        }
        let wanted = bytes.get_mut(chunk.skip..chunk.skip + chunk.take).unwrap_or_default();
        cursor.each(wanted.len(), |buf, at, range| {
            buf.read_slice(wanted.get_mut(range).unwrap_or_default(), at).map_err(io::Error::other)
        })?;
        file.write_all_at(bytes, chunk.start)
    })
}

/// Whole sectors, of which `take` bytes after the first `skip` are meant.
struct Chunk {
    start: u64,
    len: u64,
    skip: usize,
    take: usize,
}

fn each_chunk(
    bufs: &[MemorySlice<'_>],
    offset: u64,
    mut each: impl FnMut(&Chunk, &mut Bounce) -> io::Result<()>,
) -> io::Result<()> {
    // Inside the disk, which was checked.
    let end = bufs.iter().fold(offset, |end, buf| end.saturating_add(buf.len() as u64));
    let whole = |at: u64| at - at % SECTOR_SIZE;
    let last = whole(end.saturating_add(SECTOR_SIZE - 1));
    let mut bounce = Bounce::new((last - whole(offset)).min(CHUNK));
    let mut at = offset;
    while at < end {
        let start = whole(at);
        let stop = start.saturating_add(CHUNK).min(last);
        // Both are at most CHUNK.
        let skip = usize::try_from(at - start).map_err(io::Error::other)?;
        let take = usize::try_from(stop.min(end) - at).map_err(io::Error::other)?;
        each(&Chunk { start, len: stop - start, skip, take }, &mut bounce)?;
        at = stop.min(end);
    }
    Ok(())
}

/// Where in the buffers a copy has got to.
struct Cursor<'a, 'm> {
    bufs: &'a [MemorySlice<'m>],
    /// Bytes of the first buffer that are done.
    at: usize,
}

impl Cursor<'_, '_> {
    /// Calls `copy` for each piece of the next `len` bytes, with the buffer, the place in it, and the range of the bytes.
    fn each(
        &mut self,
        len: usize,
        mut copy: impl FnMut(&MemorySlice<'_>, usize, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let Some((buf, rest)) = self.bufs.split_first() else { break };
            let part = (buf.len() - self.at).min(len - done);
            if part > 0 {
                copy(buf, self.at, done..done + part)?;
            }
            self.at += part;
            done += part;
            if self.at == buf.len() {
                (self.bufs, self.at) = (rest, 0);
            }
        }
        Ok(())
    }
}

/// Memory of our own at an address that the kernel takes.
struct Bounce {
    memory: Vec<u8>,
    skip: usize,
}

impl Bounce {
    /// At least `len` bytes, and at most [`CHUNK`].
    fn new(len: u64) -> Self {
        let len = usize::try_from(len.min(CHUNK)).unwrap_or(0);
        let memory = vec![0; len + ALIGN];
        let skip = memory.as_ptr().align_offset(ALIGN);
        Self { memory, skip }
    }

    /// The first `len` of them.
    fn bytes(&mut self, len: u64) -> &mut [u8] {
        let len = usize::try_from(len).unwrap_or(0);
        self.memory.get_mut(self.skip..).and_then(|aligned| aligned.get_mut(..len)).unwrap_or_default()
    }
}
