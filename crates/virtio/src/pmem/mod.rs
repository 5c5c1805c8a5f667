//! virtio-pmem (virtio 1.2, section 5.19): a file as persistent memory, which the guest maps with no page cache of its own.
//!
//! The guest reads and writes the host's page cache; the one request there is makes durable what it wrote. The mapping is made
//! when the device is plugged in.

mod flush;
mod state;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use freestone_bus::Wiring;
use freestone_memory::{FileMapping, RegionBuilder};
use freestone_snapshot::{Restoring, Saving};
use rustix::fs::FallocateFlags;

use crate::device::{DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::device_memory::DeviceMemory;
use crate::rate::{RateLimiter, Throttle};
use crate::{Error, Result};
use flush::FlushWorker;

/// The size of the file must be a multiple of this: what a guest can map with one entry of a page table, and the alignment
/// that Linux needs.
pub const GRANULARITY: u64 = 2 << 20;
/// Alignment in the guest's address space: a section of Linux's memory map, which two devices must not share.
const ALIGN: u64 = 128 << 20;
/// Alignment of what is larger than that: lets a guest map it with pages of 1 GiB.
const ALIGN_LARGE: u64 = 1 << 30;
/// `start` and `size` (5.19.4).
const CONFIG_LEN: u32 = 16;

/// How a [`Pmem`] device presents its file.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PmemConfig {
    /// The guest cannot write, and the file is opened for reading only. Default: `false`.
    pub read_only: bool,
    /// Reserve all blocks of a file that can be written, so that the file system cannot run out of room under the guest.
    /// Default: `true`.
    ///
    /// Without that, a write to a hole in the file when the disk is full ends the whole machine.
    pub reserve: bool,
    /// Lock the file against double use (`flock(2)`): a writer excludes everybody, readers exclude writers. Default: `true`.
    pub lock: bool,
    /// Entries of the queue: a power of two. Default: 64.
    pub queue_size: u16,
    /// Limit of flushes: each time that the file is made durable costs one operation and as many bytes as the file has. Default:
    /// none.
    pub rate_limiter: Option<RateLimiter>,
}

impl Default for PmemConfig {
    fn default() -> Self {
        Self { read_only: false, reserve: true, lock: true, queue_size: 64, rate_limiter: None }
    }
}

impl PmemConfig {
    /// The default configuration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`read_only`](Self::read_only).
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Sets [`reserve`](Self::reserve).
    #[must_use]
    pub fn reserve(mut self, reserve: bool) -> Self {
        self.reserve = reserve;
        self
    }

    /// Sets [`lock`](Self::lock).
    #[must_use]
    pub fn lock(mut self, lock: bool) -> Self {
        self.lock = lock;
        self
    }

    /// Sets [`rate_limiter`](Self::rate_limiter).
    #[must_use]
    pub fn rate_limiter(mut self, limiter: RateLimiter) -> Self {
        self.rate_limiter = Some(limiter);
        self
    }

    /// Sets [`queue_size`](Self::queue_size).
    #[must_use]
    pub fn queue_size(mut self, queue_size: u16) -> Self {
        self.queue_size = queue_size;
        self
    }
}

/// Counts what a [`Pmem`] device did; to be read at any time, from any thread.
#[derive(Debug, Default)]
pub struct PmemStats {
    requests: AtomicU64,
    syncs: AtomicU64,
    errors: AtomicU64,
}

/// [`PmemStats`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PmemCounts {
    /// Requests, of whatever type.
    pub requests: u64,
    /// Times that the file was made durable: one serves all flushes that wait.
    pub syncs: u64,
    /// Requests answered with an error, whoever caused it.
    pub errors: u64,
}

impl PmemStats {
    /// The counts so far. They are not taken at one instant.
    pub fn counts(&self) -> PmemCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PmemCounts { requests: get(&self.requests), syncs: get(&self.syncs), errors: get(&self.errors) }
    }
}

/// Makes durable what was written to a file.
trait Durable: Send + Sync {
    fn sync(&self) -> io::Result<()>;
}

impl Durable for File {
    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// The file, as the flush queue uses it.
struct Backend {
    /// `None` where there is nothing to make durable.
    file: Option<Box<dyn Durable>>,
    /// What is lost stays lost: the pages that could not be written may be clean now, and another sync would succeed.
    failed: AtomicBool,
    stats: Arc<PmemStats>,
    throttle: Throttle,
    size: u64,
    /// Of the file, if it is locked.
    lock: Option<FileLock>,
}

struct FileLock {
    file: Arc<File>,
    read_only: bool,
}

impl FileLock {
    fn take(&self) -> std::result::Result<(), TryLockError> {
        if self.read_only { self.file.try_lock_shared() } else { self.file.try_lock() }
    }
}

impl Backend {
    fn sync(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed, and what it lost is not known"));
        }
        self.stats.syncs.fetch_add(1, Ordering::Relaxed);
        file.sync().inspect_err(|error| {
            self.failed.store(true, Ordering::Release);
            tracing::warn!(%error, "cannot make persistent memory durable: all flushes fail from now on");
        })
    }
}

/// A virtio persistent memory device.
pub struct Pmem {
    info: DeviceInfo,
    path: PathBuf,
    file: Arc<File>,
    size: u64,
    read_only: bool,
    backend: Arc<Backend>,
    /// First guest-physical address, and what keeps the file mapped there.
    attached: Option<(u64, DeviceMemory)>,
    /// Somebody may change the rate limit while the device works.
    has_handle: AtomicBool,
}

/// What can be done with a [`Pmem`] device while it works, from any thread. It may outlive the device.
#[derive(Clone)]
pub struct PmemHandle(Arc<Backend>);

impl PmemHandle {
    /// Gives the file to others, with all that was written to it, or takes it back: for a machine that is paused, which must not
    /// go on without it.
    ///
    /// # Errors
    /// `WouldBlock` if others use the file; whatever else the host says.
    pub fn set_owned(&self, owned: bool) -> io::Result<()> {
        let Some(lock) = &self.0.lock else { return Ok(()) };
        if !owned {
            self.0.sync()?;
            return lock.file.unlock();
        }
        lock.take().map_err(|error| match error {
            TryLockError::Error(error) => error,
            TryLockError::WouldBlock => io::Error::new(io::ErrorKind::WouldBlock, "others use the file"),
        })
    }

    /// Changes the rate limit, or takes it away. New buckets begin full.
    pub fn set_rate_limiter(&self, limiter: Option<RateLimiter>) {
        self.0.throttle.set(limiter);
    }

    /// The rate limit, if there is one.
    pub fn rate_limiter(&self) -> Option<RateLimiter> {
        self.0.throttle.limiter()
    }

    /// Times that a worker waited because of the rate limit.
    pub fn throttled(&self) -> u64 {
        self.0.throttle.waits()
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<PmemStats> {
        Arc::clone(&self.0.stats)
    }
}

impl std::fmt::Debug for PmemHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PmemHandle").field("throttle", &self.0.throttle).finish_non_exhaustive()
    }
}

impl Pmem {
    /// Opens, checks and locks the file at `path`.
    ///
    /// # Errors
    /// - [`Error::PmemSize`]: the size is 0 or no multiple of [`GRANULARITY`].
    /// - [`Error::File`]: it cannot be opened, is no regular file, is locked, or its blocks cannot be reserved.
    pub fn open(path: impl AsRef<Path>, config: PmemConfig) -> Result<Self> {
        let path = path.as_ref();
        let fail = |op| move |source| Error::File { path: path.to_owned(), op, source };
        let opened = OpenOptions::new().read(true).write(!config.read_only).open(path);
        let file = opened.map_err(fail("open it as persistent memory"))?;
        let metadata = file.metadata().map_err(fail("examine it"))?;
        if !metadata.is_file() {
            return Err(fail("use it as persistent memory")(io::Error::other("it is no regular file")));
        }
        if config.lock {
            let locked = if config.read_only { file.try_lock_shared() } else { file.try_lock() };
            locked.map_err(|error| match error {
                TryLockError::Error(source) => fail("lock it")(source),
                TryLockError::WouldBlock => fail("lock it")(io::Error::other("it is in use")),
            })?;
        }
        let size = metadata.len();
        if size == 0 || !size.is_multiple_of(GRANULARITY) {
            return Err(Error::PmemSize { path: path.to_owned(), size });
        }
        if config.reserve && !config.read_only {
            reserve(&file, size).map_err(fail("reserve its blocks"))?;
        }
        Self::new(path, file, size, &config)
    }

    fn new(path: &Path, file: File, size: u64, config: &PmemConfig) -> Result<Self> {
        let syncing = if config.read_only { None } else { Some(file.try_clone()) };
        let syncing = syncing.transpose().map_err(Error::io("duplicate the descriptor of a file"))?;
        let info = DeviceInfo {
            device_type: DeviceType::PMEM,
            features: 0,
            queue_max_sizes: vec![config.queue_size],
            config_len: CONFIG_LEN,
        };
        let file = Arc::new(file);
        let lock = config.lock.then(|| FileLock { file: Arc::clone(&file), read_only: config.read_only });
        let backend = Backend {
            lock,
            file: syncing.map(|file| Box::new(file) as Box<dyn Durable>),
            failed: AtomicBool::new(false),
            stats: Arc::default(),
            throttle: Throttle::new(config.rate_limiter),
            size,
        };
        Ok(Self {
            info,
            path: path.to_owned(),
            file,
            size,
            read_only: config.read_only,
            backend: Arc::new(backend),
            attached: None,
            has_handle: AtomicBool::new(false),
        })
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<PmemStats> {
        Arc::clone(&self.backend.stats)
    }

    /// What can be done with the device while a machine has it. Take it before the device goes there: the rate limit of a
    /// device of which nobody has a handle costs nothing.
    pub fn handle(&self) -> PmemHandle {
        self.has_handle.store(true, Ordering::Relaxed);
        PmemHandle(Arc::clone(&self.backend))
    }

    /// Bytes of persistent memory.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Gives the file a block for every page, so that a write to it cannot fail for want of room.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

impl std::fmt::Debug for Pmem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pmem")
            .field("path", &self.path)
            .field("size", &self.size)
            .field("read_only", &self.read_only)
            .field("attached", &self.attached)
            .finish_non_exhaustive()
    }
}

impl VirtioDevice for Pmem {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn attach(&mut self, wiring: &mut dyn Wiring) -> freestone_bus::Result<()> {
        let slots = wiring.memory_slots().ok_or_else(|| freestone_bus::Error::Missing {
            what: "memory slots",
            device: format!("virtio-pmem {}", self.path.display()),
        })?;
        let align = if self.size < ALIGN_LARGE { ALIGN } else { ALIGN_LARGE };
        let start = wiring.alloc_memory(self.size, align)?;
        // Other devices may be told to write to memory that the guest can only read. They must not fail at that, and the file
        // must not change: what they write stays in this process.
        let mapping = if self.read_only { FileMapping::Private } else { FileMapping::Shared };
        let builder = RegionBuilder::new(start, self.size).file(Arc::clone(&self.file), 0, mapping);
        let region = builder.build().map_err(io::Error::other);
        let memory =
            region.and_then(|region| DeviceMemory::insert(&wiring.memory(), &*slots, region, self.read_only));
        let memory = memory.map_err(freestone_bus::Error::io("map persistent memory"))?;
        self.attached = Some((start, memory));
        Ok(())
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let start = self.attached.as_ref().map_or(0, |(start, _)| *start);
        let space = start.to_le_bytes().into_iter().chain(self.size.to_le_bytes());
        data.iter_mut().zip(space.skip(offset)).for_each(|(to, from)| *to = from);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        if self.attached.is_none() {
            let reason = "it was not plugged into a machine, so its memory is not mapped";
            return Err(Error::Config { device: "virtio-pmem".to_owned(), reason });
        }
        let Resources { mem, queues, control, .. } = resources;
        let throttle = &self.backend.throttle;
        let limited = self.has_handle.load(Ordering::Relaxed) || throttle.limiter().is_some();
        let workers = queues.into_iter().map(|queue| {
            let gate = limited.then(|| throttle.gate()).transpose().map_err(Error::io("create a timer"))?;
            let backend = Arc::clone(&self.backend);
            let worker = FlushWorker::new(mem.clone(), queue, control.clone(), backend, gate);
            Ok(Box::new(worker) as Box<dyn Worker>)
        });
        workers.collect()
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.save_state(state)
    }

    /// The file must have the size of the saved one, and its memory the same place. What is in it is for whoever keeps the file.
    fn restore(&mut self, _: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restore_state(state)
    }

    fn shutdown(&mut self) -> Result<()> {
        self.backend.sync().map_err(Error::io("make persistent memory durable"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails when it is told to.
    struct Moody(Arc<AtomicBool>);

    impl Durable for Moody {
        fn sync(&self) -> io::Result<()> {
            if self.0.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
    }

    #[test]
    fn after_a_flush_that_failed_no_flush_succeeds() {
        let fails = Arc::new(AtomicBool::new(false));
        let file: Box<dyn Durable> = Box::new(Moody(Arc::clone(&fails)));
        let backend = Backend {
            lock: None,
            file: Some(file),
            failed: AtomicBool::new(false),
            stats: Arc::default(),
            throttle: Throttle::new(None),
            size: 0,
        };
        backend.sync().unwrap();
        fails.store(true, Ordering::Relaxed);
        assert_eq!(backend.sync().unwrap_err().kind(), io::ErrorKind::StorageFull);
        // The host forgets an error once it was reported; what it lost is lost all the same.
        fails.store(false, Ordering::Relaxed);
        backend.sync().unwrap_err();
        assert_eq!(backend.stats.syncs.load(Ordering::Relaxed), 2);
    }
}
