//! Holes and zeroes: discard and write-zeroes of files and block devices.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::blkdev;

/// What the image is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// A regular file.
    File,
    /// A block device.
    Device,
}

/// A way to make bytes read as zeroes. fallocate(2) works on block devices as well, where it is BLKZEROOUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeroing {
    /// A hole: the storage goes back to the host.
    Punch,
    /// The file system marks the range as zero and keeps the storage.
    Range,
    /// Zeroes are written.
    Write,
}

impl Zeroing {
    /// The best way.
    pub(crate) fn first(unmap: bool) -> Self {
        if unmap { Self::Punch } else { Self::Range }
    }

    /// What to try when the host does not have this way; `None` if there is nothing else.
    pub(crate) fn next(self) -> Option<Self> {
        match self {
            Self::Punch => Some(Self::Range),
            Self::Range => Some(Self::Write),
            Self::Write => None,
        }
    }

    /// The mode of fallocate(2), if this is one.
    pub(crate) fn mode(self) -> Option<FallocateFlags> {
        match self {
            Self::Punch => Some(PUNCH),
            Self::Range => Some(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
            Self::Write => None,
        }
    }
}

/// The mode of a hole.
pub(crate) const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Whether an error of fallocate(2) says that the host cannot do it this way, rather than that it failed. `EINVAL` is what
/// a block device says whose blocks are larger than a sector.
pub(crate) fn is_unsupported(errno: i32) -> bool {
    [Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL].iter().any(|e| e.raw_os_error() == errno)
}

/// Gives a range back to the host.
pub(super) fn discard(file: &File, target: Target, offset: u64, len: u64) -> io::Result<()> {
    match target {
        Target::File => fallocate(file, PUNCH, offset, len),
        Target::Device => blkdev::discard(file.as_fd(), offset, len),
    }
}

/// Makes a range read as zeroes in the best way there is.
pub(super) fn write_zeroes(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    let mut way = Zeroing::first(unmap);
    while let Some(mode) = way.mode() {
        match (fallocate(file, mode, offset, len), way.next()) {
            (Err(error), Some(next)) if error.raw_os_error().is_some_and(is_unsupported) => way = next,
            (result, _) => return result,
        }
    }
    write_zero_bytes(file, offset, len)
}

fn fallocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, mode, offset, len) {
            Err(Errno::INTR) => {}
            result => return result.map_err(io::Error::from),
        }
    }
}

/// Zeroes to write from. Aligned, for files that are written around the page cache.
#[repr(C, align(4096))]
pub(crate) struct Zeroes([u8; 16 << 10]);

static ZEROES: Zeroes = Zeroes([0; 16 << 10]);

/// A block of zeroes.
pub(crate) fn zeroes() -> &'static [u8] {
    &ZEROES.0
}

/// How many blocks of [`zeroes`] are written at once: a mebibyte.
pub(crate) const ZERO_BLOCKS: usize = 64;

fn write_zero_bytes(file: &File, mut offset: u64, len: u64) -> io::Result<()> {
    let mut left = len;
    while left > 0 {
        let mut now = left;
        let blocks = [IoSlice::new(&[]); ZERO_BLOCKS].map(|_| {
            let part = usize::try_from(now).unwrap_or(usize::MAX).min(zeroes().len());
            now -= part as u64;
            IoSlice::new(zeroes().get(..part).unwrap_or_default())
        });
        match rustix::io::pwritev(file, &blocks, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(done) => {
                left = left.saturating_sub(done as u64);
                offset = offset.saturating_add(done as u64);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn zeroes_are_written_where_the_file_system_has_no_way_of_its_own() {
        let file = tempfile::tempfile().unwrap();
        let len = 3 * 1024 * 1024 + 700;
        file.write_all_at(&vec![1; len + 200], 0).unwrap();
        write_zero_bytes(&file, 100, len as u64).unwrap();
        let mut content = vec![0; len + 200];
        file.read_exact_at(&mut content, 0).unwrap();
        let ones = content.iter().enumerate().filter(|(_, byte)| **byte == 1).map(|(at, _)| at);
        assert_eq!(ones.collect::<Vec<_>>(), (0..100).chain(100 + len..len + 200).collect::<Vec<_>>());
    }

    #[test]
    fn without_leave_to_unmap_no_hole_is_made() {
        assert_eq!(Zeroing::first(false), Zeroing::Range);
        assert_eq!(Zeroing::Range.next(), Some(Zeroing::Write));
    }
}
