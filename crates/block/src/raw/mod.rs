//! [`RawImage`]: a regular file or a block device whose bytes are the disk's bytes.
//!
//! What the file can do is in `probe`, holes and zeroes are in `holes`, O_DIRECT is in `direct`, and requests that do not wait
//! are in `crate::uring`.

mod direct;
pub(crate) mod holes;
mod probe;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use freestone_memory::MemorySlice;
use freestone_memory::io::{read_vectored_at, write_vectored_at};
use rustix::fs::OFlags;

use crate::image::{Hold, Image, Limits, SECTOR_SIZE};
use crate::queue::{Engine, IoQueue, SyncQueue};
use crate::uring::{Policy, UringQueue};
use crate::{Error, Result};
use holes::Target;

/// How to open a [`RawImage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RawOptions {
    /// Refuse writes. The file is then opened for reading only. Default: `false`.
    pub read_only: bool,
    /// Lock the file against double use (`flock(2)`): a writer excludes everybody, readers exclude writers. Default: `true`.
    pub lock: bool,
    /// Go around the host's page cache (`O_DIRECT`). Default: `false`.
    ///
    /// Requests whose buffers are not whole sectors of 512 bytes at addresses that are multiples of 512 work as well, but are
    /// copied. A write of parts of sectors, which no guest makes, reads them first; another write to the same sectors
    /// meanwhile may be lost.
    pub direct: bool,
}

impl Default for RawOptions {
    fn default() -> Self {
        Self { read_only: false, lock: true, direct: false }
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

    /// Sets [`direct`](Self::direct).
    #[must_use]
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
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

/// How often, and after what pause each, a lock is asked for again.
const LOCK_ATTEMPTS: usize = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A raw disk image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    path: PathBuf,
    /// Size of the file, which may have a part of a sector at its end.
    bytes: AtomicU64,
    read_only: bool,
    /// How the file is held, if it is locked at all.
    hold: Option<Mutex<Hold>>,
    direct: bool,
    target: Target,
    limits: Limits,
    /// Held by writes of parts of sectors around the page cache, each of which is a read and a write of the sectors.
    partial: Mutex<()>,
}

impl RawImage {
    /// Opens and locks the image at `path`. The size is taken now and by [`refresh_size`](Image::refresh_size); bytes after the
    /// last whole sector are not part of the disk, see [`unused_bytes`](Self::unused_bytes).
    ///
    /// What [`limits`](Image::limits) says is found out now, without a change to what the file holds.
    ///
    /// # Errors
    /// - [`Error::Io`]: the file cannot be opened or examined.
    /// - [`Error::Kind`]: it is a directory, a FIFO, a socket or a character device.
    /// - [`Error::NotWritable`]: it can only be attached read-only.
    /// - [`Error::Locked`]: somebody else uses it.
    /// - [`Error::TooSmall`]: it has less than one sector.
    /// - [`Error::Direct`]: [`RawOptions::direct`] was asked for, and the host has it not, or only in blocks above 512 bytes.
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
    /// Its status flags are set: `O_NONBLOCK` is taken away, and `O_DIRECT` is as the options say. Whoever shares the open file
    /// shares them.
    ///
    /// # Errors
    /// As [`open`](Self::open), but for what opening itself can fail with.
    pub fn from_file(file: File, name: impl AsRef<Path>, options: RawOptions) -> Result<Self> {
        let path = name.as_ref();
        let fail = |op| move |source| Error::Io { path: path.to_owned(), op, source };
        let metadata = file.metadata().map_err(fail("examine it"))?;
        check_kind(path, &metadata)?;
        if options.lock {
            lock(path, &file, options.read_only)?;
        }
        let target = if metadata.file_type().is_block_device() { Target::Device } else { Target::File };
        let bytes = measure(&file, target).map_err(fail("find its size"))?;
        if bytes < SECTOR_SIZE {
            return Err(Error::TooSmall { path: path.to_owned(), size: bytes });
        }
        set_flags(&file, options.direct).map_err(|source| match options.direct {
            true => Error::Direct { path: path.to_owned(), source },
            false => fail("set its flags")(source),
        })?;
        if options.direct {
            direct::probe(&file).map_err(|source| Error::Direct { path: path.to_owned(), source })?;
        }
        Ok(Self {
            limits: probe::limits(&file, &metadata, target, bytes, options.read_only),
            file,
            path: path.to_owned(),
            bytes: AtomicU64::new(bytes),
            read_only: options.read_only,
            hold: options.lock.then(Mutex::default),
            direct: options.direct,
            target,
            partial: Mutex::new(()),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes after the last whole sector, which the guest does not see: 0 for a well-made image, less than 512 always.
    pub fn unused_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed) % SECTOR_SIZE
    }

    /// Whether it goes around the host's page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }
}

impl AsFd for RawImage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Image for RawImage {
    fn size(&self) -> u64 {
        let bytes = self.bytes.load(Ordering::Relaxed);
        bytes - bytes % SECTOR_SIZE
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        let wanted = self.check(bufs, offset)?;
        if self.direct && !direct::is_aligned(bufs, offset) {
            return direct::read(&self.file, bufs, offset);
        }
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
        self.check_writable()?;
        if self.direct && !direct::is_aligned(bufs, offset) {
            return direct::write(&self.file, &self.partial, bufs, offset);
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

    fn limits(&self) -> Limits {
        self.limits
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_discard(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        holes::discard(&self.file, self.target, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        if len == 0 {
            return Ok(());
        }
        holes::write_zeroes(&self.file, offset, len, unmap)
    }

    fn refresh_size(&self) -> io::Result<u64> {
        let bytes = measure(&self.file, self.target)?;
        if bytes < SECTOR_SIZE {
            let text = format!("the disk has only {bytes} bytes now: less than a sector");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.bytes.store(bytes, Ordering::Relaxed);
        Ok(bytes - bytes % SECTOR_SIZE)
    }

    fn set_hold(&self, hold: Hold) -> io::Result<()> {
        if hold != Hold::Own {
            self.flush()?;
        }
        self.lock_as(hold)
    }

    fn open_queue(self: Arc<Self>, engine: Engine, depth: u16) -> io::Result<Box<dyn IoQueue>> {
        let policy = match engine {
            Engine::Sync => return Ok(Box::new(SyncQueue::new(self))),
            Engine::Uring => Policy::Always,
            Engine::Auto if self.direct => Policy::Always,
            // Nothing there ever waits for a device.
            Engine::Auto if probe::is_in_memory(&self.file) => return Ok(Box::new(SyncQueue::new(self))),
            Engine::Auto => Policy::WhatWaits,
        };
        match UringQueue::open(Arc::clone(&self), depth, policy) {
            Ok(queue) => Ok(Box::new(queue)),
            Err(error) if engine == Engine::Auto => {
                tracing::debug!(path = %self.path.display(), %error, "no io_uring: I/O is synchronous");
                Ok(Box::new(SyncQueue::new(self)))
            }
            Err(error) => Err(error),
        }
    }
}

impl RawImage {
    /// Locks the file anew, without a look at what was written.
    pub(crate) fn lock_as(&self, hold: Hold) -> io::Result<()> {
        let Some(held) = &self.hold else { return Ok(()) };
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        if *held == hold {
            return Ok(());
        }
        if hold == Hold::None {
            self.file.unlock()?;
        } else {
            let locked = lock(&self.path, &self.file, self.read_only || hold == Hold::Share);
            if let Err(error) = locked {
                // The host drops the former lock before it tries the new one.
                let back = *held != Hold::None && self.file.try_lock_shared().is_ok();
                *held = if back { Hold::Share } else { Hold::None };
                return Err(match error {
                    Error::Locked { .. } => io::Error::new(io::ErrorKind::WouldBlock, "others use the file"),
                    other => io::Error::other(other),
                });
            }
        }
        *held = hold;
        Ok(())
    }

    /// The sum of the lengths of `bufs`, if they lie inside the disk at `offset`.
    pub(crate) fn check(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<usize> {
        let wanted = bufs.iter().try_fold(0usize, |sum, b| sum.checked_add(b.len()));
        let wanted = wanted.ok_or(io::ErrorKind::InvalidInput)?;
        self.check_range(offset, wanted as u64)?;
        Ok(wanted)
    }

    pub(crate) fn check_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size()) {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk"))
    }

    pub(crate) fn check_writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    }

    pub(crate) fn check_discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        if self.limits.discard { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    pub(crate) fn target(&self) -> Target {
        self.target
    }

    /// Whether the kernel takes these buffers as they are.
    pub(crate) fn takes(&self, bufs: &[MemorySlice<'_>], offset: u64) -> bool {
        !self.direct || direct::is_aligned(bufs, offset)
    }
}

/// Size of the file or device in bytes.
fn measure(file: &File, target: Target) -> io::Result<u64> {
    match target {
        Target::File => Ok(file.metadata()?.len()),
        // The position is nobody's: all reads and writes name theirs.
        Target::Device => (&*file).seek(SeekFrom::End(0)),
    }
}

/// Takes O_NONBLOCK away, with which io_uring would give up where it should wait, and sets O_DIRECT if it is wanted.
fn set_flags(file: &File, direct: bool) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    let mut wanted = flags - OFlags::NONBLOCK;
    wanted.set(OFlags::DIRECT, direct);
    if wanted != flags {
        rustix::fs::fcntl_setfl(file, wanted)?;
    }
    Ok(())
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

/// Locks the image. A lock of somebody else is waited for a moment: who was killed gives it back only when the kernel has ended what
/// was left of its asynchronous I/O, which may be after it is gone.
fn lock(path: &Path, file: &File, shared: bool) -> Result<()> {
    let attempt = || if shared { file.try_lock_shared() } else { file.try_lock() };
    let mut result = attempt();
    for _ in 0..LOCK_ATTEMPTS {
        if !matches!(result, Err(TryLockError::WouldBlock)) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        result = attempt();
    }
    result.map_err(|error| match error {
        TryLockError::WouldBlock => Error::Locked { path: path.to_owned() },
        TryLockError::Error(source) => Error::Io { path: path.to_owned(), op: "lock it", source },
    })
}
