//! The host file that holds an image: positional reads and writes of metadata and of guest data. It knows no format.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use freestone_memory::MemorySlice;
use freestone_memory::io::{read_vectored_at, write_vectored_at};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::image::Hold;
use crate::raw::{RawImage, RawOptions};
use crate::{Error, Result};

/// A file or block device, opened and locked with the rules of raw images.
#[derive(Debug)]
pub(crate) struct HostFile {
    raw: RawImage,
}

impl HostFile {
    pub(crate) fn open(path: &Path, read_only: bool, lock: bool) -> Result<Self> {
        let raw = RawOptions::new().read_only(read_only).lock(lock).open(path)?;
        Ok(Self { raw })
    }

    /// Opens a file that was just made, and gives it a first sector so that it passes as a disk.
    #[cfg(feature = "tools")]
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let fail = |source| Error::Io { path: path.to_owned(), op: "make it", source };
        let file = std::fs::OpenOptions::new().write(true).open(path).map_err(fail)?;
        file.set_len(crate::SECTOR_SIZE).map_err(fail)?;
        Self::open(path, false, true)
    }

    /// Locks the file anew.
    pub(crate) fn lock_as(&self, hold: Hold) -> io::Result<()> {
        self.raw.lock_as(hold)
    }

    pub(crate) fn path(&self) -> &Path {
        self.raw.path()
    }

    /// Bytes in the file now.
    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(self.fd(), SeekFrom::End(0))?)
    }

    /// Device and inode: who the file is, whatever its name.
    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(self.fd())?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// An [`Error::Io`] about this file.
    pub(crate) fn error(&self, op: &'static str, source: io::Error) -> Error {
        Error::Io { path: self.path().to_owned(), op, source }
    }

    /// Reads until `buf` is full or the file ends.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pread(self.fd(), rest, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(n) => done = done.saturating_add(n),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    /// Fills `buf`.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.read_at(buf, offset)? == buf.len() {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image file is truncated"))
        }
    }

    pub(crate) fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pwrite(self.fd(), rest, offset.saturating_add(done as u64)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done = done.saturating_add(n),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Fills `bufs` from `offset` on; returns less than they hold at the end of the file only.
    pub(crate) fn read_slices(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<usize> {
        transfer(bufs, |rest, done| read_vectored_at(self.fd(), rest, offset.saturating_add(done)))
    }

    /// Writes all of `bufs` at `offset`.
    pub(crate) fn write_slices(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        let done =
            transfer(bufs, |rest, done| write_vectored_at(self.fd(), rest, offset.saturating_add(done)))?;
        if done == total(bufs) { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.fd())?)
    }

    #[cfg(feature = "tools")]
    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(self.fd(), len)?)
    }

    /// Gives a range back to the host, if the host can take it: nothing depends on it.
    pub(crate) fn punch(&self, offset: u64, len: u64) {
        let _ = rustix::fs::fallocate(
            self.fd(),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        );
    }

    /// Reserves storage for a range.
    #[cfg(feature = "tools")]
    pub(crate) fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(self.fd(), FallocateFlags::empty(), offset, len)?)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

/// The sum of the lengths of `bufs`.
pub(crate) fn total(bufs: &[MemorySlice<'_>]) -> usize {
    bufs.iter().fold(0, |sum, buf| sum.saturating_add(buf.len()))
}

/// The bytes `skip..skip + len` of the array that `bufs` are in their order.
pub(crate) fn part<'m>(bufs: &[MemorySlice<'m>], skip: usize, len: usize) -> Vec<MemorySlice<'m>> {
    let (mut skip, mut left) = (skip, len);
    let mut out = Vec::with_capacity(bufs.len());
    for buf in bufs {
        if left == 0 {
            break;
        }
        let here = skip.min(buf.len());
        skip -= here;
        let take = left.min(buf.len() - here);
        if take == 0 {
            continue;
        }
        left -= take;
        out.extend(buf.subslice(here, take).ok());
    }
    out
}

/// Calls `go` with what is left and how many bytes are done, until all is done or nothing more moves.
fn transfer<'m>(
    bufs: &[MemorySlice<'m>],
    mut go: impl FnMut(&[MemorySlice<'m>], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let wanted = total(bufs);
    let mut done = go(bufs, 0)?;
    while done < wanted {
        match go(&part(bufs, done, wanted - done), done as u64)? {
            0 => break,
            n => done = done.saturating_add(n),
        }
    }
    Ok(done)
}
