//! [`RawImage`]: a regular file or a block device whose bytes are the disk's bytes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freestone_memory::MemorySlice;
use freestone_memory::io::{read_vectored_at, write_vectored_at};
use rustix::fs::OFlags;

use crate::image::{Image, SECTOR_SIZE};
use crate::queue::{Engine, IoQueue, SyncQueue};
use crate::{Error, Result};

/// How to open a [`RawImage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RawOptions {
    /// Refuse writes. The file is then opened for reading only. Default: `false`.
    pub read_only: bool,
    /// Lock the file against double use (`flock(2)`): a writer excludes everybody, readers exclude writers. Default: `true`.
    pub lock: bool,
}

impl Default for RawOptions {
    fn default() -> Self {
        Self { read_only: false, lock: true }
    }
}

impl RawOptions {
    /// The default options: writable and locked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`read_only`](Self::read_only).
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Sets [`lock`](Self::lock).
    #[must_use]
    pub fn lock(mut self, lock: bool) -> Self {
        self.lock = lock;
        self
    }

    /// Opens the image at `path`.
    ///
    /// # Errors
    /// As [`RawImage::open`].
    pub fn open(self, path: impl AsRef<Path>) -> Result<RawImage> {
        RawImage::open(path, self)
    }
}

/// A raw disk image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    path: PathBuf,
    size: u64,
    unused: u64,
    read_only: bool,
}

impl RawImage {
    /// Opens and locks the image at `path`. The size is taken once; bytes after the last whole sector are not part of the
    /// disk, see [`unused_bytes`](Self::unused_bytes).
    ///
    /// # Errors
    /// - [`Error::Io`]: the file cannot be opened or examined.
    /// - [`Error::Kind`]: it is a directory, a FIFO, a socket or a character device.
    /// - [`Error::NotWritable`]: it can only be attached read-only.
    /// - [`Error::Locked`]: somebody else uses it.
    /// - [`Error::TooSmall`]: it has less than one sector.
    pub fn open(path: impl AsRef<Path>, options: RawOptions) -> Result<Self> {
        let path = path.as_ref();
        let fail = |op| move |source| Error::Io { path: path.to_owned(), op, source };
        // Looked at before it is opened, because opening a FIFO or a tape has effects; looked at again afterwards, because
        // the name may mean something else by then.
        check_kind(path, &std::fs::metadata(path).map_err(fail("open it"))?)?;
        Self::from_file(open_file(path, options.read_only)?, path, options)
    }

    /// The image in a file that is open already: a memfd, or a descriptor from another process. It must be open for
    /// reading, and for writing unless the options say read-only. `name` is for messages.
    ///
    /// # Errors
    /// As [`open`](Self::open), but for what opening itself can fail with.
    pub fn from_file(mut file: File, name: impl AsRef<Path>, options: RawOptions) -> Result<Self> {
        let path = name.as_ref();
        let fail = |op| move |source| Error::Io { path: path.to_owned(), op, source };
        let metadata = file.metadata().map_err(fail("examine it"))?;
        check_kind(path, &metadata)?;
        if options.lock {
            lock(path, &file, options.read_only)?;
        }
        let bytes = if metadata.file_type().is_block_device() {
            file.seek(SeekFrom::End(0)).map_err(fail("find its size"))?
        } else {
            metadata.len()
        };
        let size = bytes - bytes % SECTOR_SIZE;
        if size == 0 {
            return Err(Error::TooSmall { path: path.to_owned(), size: bytes });
        }
        Ok(Self { file, path: path.to_owned(), size, unused: bytes - size, read_only: options.read_only })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes after the last whole sector, which the guest does not see: 0 for a well-made image, less than 512 always.
    pub fn unused_bytes(&self) -> u64 {
        self.unused
    }
}

impl AsFd for RawImage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        let wanted = self.check(bufs, offset)?;
        let done = read_vectored_at(self.file.as_fd(), bufs, offset)?;
        if done == wanted {
            return Ok(());
        }
        finish(bufs, offset, done, io::ErrorKind::UnexpectedEof, |rest, at| {
            read_vectored_at(self.file.as_fd(), rest, at)
        })
    }

    fn write_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        let wanted = self.check(bufs, offset)?;
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let done = write_vectored_at(self.file.as_fd(), bufs, offset)?;
        if done == wanted {
            return Ok(());
        }
        finish(bufs, offset, done, io::ErrorKind::WriteZero, |rest, at| {
            write_vectored_at(self.file.as_fd(), rest, at)
        })
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data()
    }

    fn open_queue(self: Arc<Self>, engine: Engine, _depth: u16) -> io::Result<Box<dyn IoQueue>> {
        match engine {
            Engine::Auto | Engine::Sync => Ok(Box::new(SyncQueue::new(self))),
            Engine::Uring => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl RawImage {
    /// The sum of the lengths of `bufs`, if they lie inside the disk at `offset`.
    fn check(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<usize> {
        let wanted = bufs.iter().try_fold(0usize, |sum, b| sum.checked_add(b.len()));
        wanted
            .filter(|&n| offset.checked_add(n as u64).is_some_and(|end| end <= self.size))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk"))
    }
}

/// Goes on after a short transfer of `done` bytes until all is done; a transfer of nothing is the error `none`.
///
/// Not the usual way: the kernel transfers less than asked only at the end of the file and above 2 GiB.
fn finish<'m>(
    bufs: &[MemorySlice<'m>],
    offset: u64,
    mut done: usize,
    none: io::ErrorKind,
    mut transfer: impl FnMut(&[MemorySlice<'m>], u64) -> io::Result<usize>,
) -> io::Result<()> {
    loop {
        let rest = skip(bufs, done);
        if rest.is_empty() {
            return Ok(());
        }
        match transfer(&rest, offset.saturating_add(done as u64))? {
            0 => return Err(none.into()),
            n => done = done.saturating_add(n),
        }
    }
}

/// What is left of `bufs` after their first `done` bytes.
fn skip<'m>(bufs: &[MemorySlice<'m>], done: usize) -> Vec<MemorySlice<'m>> {
    let mut skip = done;
    bufs.iter()
        .filter_map(|buf| {
            let here = skip.min(buf.len());
            skip -= here;
            buf.offset(here).ok().filter(|rest| !rest.is_empty())
        })
        .collect()
}

fn check_kind(path: &Path, metadata: &std::fs::Metadata) -> Result<()> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "neither a file nor a block device"
    };
    Err(Error::Kind { path: path.to_owned(), what })
}

fn open_file(path: &Path, read_only: bool) -> Result<File> {
    let open = |write| {
        // Without O_NONBLOCK, a FIFO that took the file's place meanwhile would hold us up for ever.
        let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK).bits().cast_signed();
        OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
    };
    open(!read_only).map_err(|source| {
        let only_writing_is_refused = matches!(
            source.kind(),
            io::ErrorKind::PermissionDenied
                | io::ErrorKind::ReadOnlyFilesystem
                | io::ErrorKind::ExecutableFileBusy
        );
        if !read_only && only_writing_is_refused && open(false).is_ok() {
            return Error::NotWritable { path: path.to_owned(), reason: source.kind() };
        }
        Error::Io { path: path.to_owned(), op: "open it", source }
    })
}

fn lock(path: &Path, file: &File, shared: bool) -> Result<()> {
    let result = if shared { file.try_lock_shared() } else { file.try_lock() };
    result.map_err(|error| match error {
        TryLockError::WouldBlock => Error::Locked { path: path.to_owned() },
        TryLockError::Error(source) => Error::Io { path: path.to_owned(), op: "lock it", source },
    })
}
