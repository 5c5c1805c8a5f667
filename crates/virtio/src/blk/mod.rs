#![doc = include_str!("README.md")]

mod config;
mod handle;
mod request;
mod state;
mod stats;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use freestone_block::{Engine, Hold, Image, IoQueue, SyncQueue};
use freestone_snapshot::{Restoring, Saving};

use crate::device::{ActiveQueue, DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::rate::Throttle;
use crate::worker::Poller;
use crate::{DeviceControl, Error, Result};
pub use config::{BlockConfig, CacheMode, RangeLimits};
use config::{CAPACITY_LEN, CONFIG_LEN, WRITEBACK_AT};
pub use handle::BlockHandle;
use request::{Now, Rules};
pub use state::BlockState;
use stats::ErrorLog;
pub use stats::{BlkCounts, BlkStats};
use worker::{BlkWorker, Io, MAX_DEPTH};

/// Feature bits of this device type that may be offered, as masks (5.2.3).
pub mod feature {
    /// `VIRTIO_BLK_F_SIZE_MAX`: the configuration says how many bytes a segment may have.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `VIRTIO_BLK_F_SEG_MAX`: the configuration says how many segments a request may have.
    pub const SEG_MAX: u64 = 1 << 2;
    /// `VIRTIO_BLK_F_RO`: writes are refused.
    pub const RO: u64 = 1 << 5;
    /// `VIRTIO_BLK_F_BLK_SIZE`: the configuration says what a logical block is.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// `VIRTIO_BLK_F_FLUSH`: writes are durable after a flush. To a driver that does not accept it, every write is.
    pub const FLUSH: u64 = 1 << 9;
    /// `VIRTIO_BLK_F_TOPOLOGY`: the configuration says what requests are best aligned to.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `VIRTIO_BLK_F_CONFIG_WCE`: the driver may choose whether writes are durable when they complete.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `VIRTIO_BLK_F_MQ`: there are several queues.
    pub const MQ: u64 = 1 << 12;
    /// `VIRTIO_BLK_F_DISCARD`: sectors can be given back.
    pub const DISCARD: u64 = 1 << 13;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`: sectors can be made zero without data.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Bytes of the answer to a get-id request (5.2.6).
pub const ID_LEN: usize = 20;

/// What a device, its workers and its handles share.
#[derive(Debug)]
struct Shared {
    disk: Mutex<Disk>,
    /// [`Disk::generation`], for those who only want to know whether it changed.
    generation: AtomicU64,
    /// Wake the workers of a device of which somebody has a handle; also told of completions, once the image was replaced.
    wakes: Mutex<Vec<Weak<OwnedFd>>>,
    features: u64,
    config: BlockConfig,
    /// Sectors.
    capacity: AtomicU64,
    /// Whether a write may be durable later than when it completes.
    writeback: AtomicBool,
    stats: Arc<BlkStats>,
    errors: ErrorLog,
    throttle: Throttle,
    driver: Mutex<Driver>,
    /// How the image is held: the device works only while it is its own.
    hold: Mutex<Hold>,
}

/// The image, and which it is.
#[derive(Debug)]
struct Disk {
    image: Arc<dyn Image>,
    generation: u64,
}

/// Whom to tell of a new capacity.
#[derive(Debug, Default)]
struct Driver {
    control: Option<DeviceControl>,
    /// The capacity changed while there was nobody to tell.
    missed: bool,
}

impl Shared {
    /// What a request finds.
    fn now(&self) -> Now {
        Now {
            capacity: self.capacity.load(Ordering::Relaxed),
            write_through: !self.writeback.load(Ordering::Relaxed),
        }
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        lock(&self.driver)
    }

    fn image(&self) -> Arc<dyn Image> {
        Arc::clone(&lock(&self.disk).image)
    }

    /// Says an error of the host, if none was said just now.
    #[cold]
    fn host_error(&self, operation: &'static str, error: &io::Error) {
        if let Some(silent) = self.errors.admit() {
            tracing::warn!(operation, %error, silent, image = ?self.image(), "disk request failed on the host");
        }
    }

    /// An engine for one queue, on the image there is now.
    fn open_queue(&self, size: u16) -> Result<Io> {
        let (image, generation) = {
            let disk = lock(&self.disk);
            (Arc::clone(&disk.image), disk.generation)
        };
        let engine = self.config.engine;
        let queue: Box<dyn IoQueue> = match Arc::clone(&image).open_queue(engine, size.min(MAX_DEPTH)) {
            Ok(queue) => queue,
            Err(error) if engine == Engine::Auto => {
                tracing::warn!(%error, ?image, "no asynchronous I/O: requests block their worker");
                Box::new(SyncQueue::new(Arc::clone(&image)))
            }
            Err(error) => return Err(Error::io("open a disk's I/O engine")(error)),
        };
        Ok(Io { queue, image, generation })
    }
}

/// No state here is left half changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A virtio block device.
#[derive(Debug)]
pub struct Block {
    info: DeviceInfo,
    shared: Arc<Shared>,
    read_only: bool,
    id: [u8; ID_LEN],
    /// The configuration space without what changes.
    space: [u8; CONFIG_LEN],
    /// The driver chose the cache mode.
    cache_chosen: bool,
    /// Somebody may change the rate limit or the image while the device works.
    has_handle: AtomicBool,
}

impl Block {
    /// A device that presents `image` as `config` says. Of a serial with more than 20 bytes the guest sees the first 20.
    ///
    /// Whether the configuration is possible is checked when the device is given to a transport.
    pub fn new(image: Arc<dyn Image>, config: BlockConfig) -> Self {
        let read_only = config.read_only || image.read_only();
        let limits = image.limits();
        let mut id = [0; ID_LEN];
        id.iter_mut().zip(config.serial.bytes()).for_each(|(to, from)| *to = from);
        let features = config.features(read_only, limits);
        let info = DeviceInfo {
            device_type: DeviceType::BLOCK,
            features,
            queue_max_sizes: vec![config.queue_size; config.queues.into()],
            config_len: u32::try_from(CONFIG_LEN).unwrap_or(0),
        };
        let space = config.space(features, limits);
        let shared = Arc::new(Shared {
            capacity: AtomicU64::new(config.capacity(image.size())),
            writeback: AtomicBool::new(config.cache == CacheMode::Writeback),
            stats: Arc::default(),
            errors: ErrorLog::new(),
            throttle: Throttle::new(config.rate_limiter),
            driver: Mutex::default(),
            hold: Mutex::default(),
            disk: Mutex::new(Disk { image, generation: 0 }),
            generation: AtomicU64::new(0),
            wakes: Mutex::default(),
            features,
            config,
        });
        let has_handle = AtomicBool::new(false);
        Self { info, shared, read_only, id, space, cache_chosen: false, has_handle }
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<BlkStats> {
        Arc::clone(&self.shared.stats)
    }

    /// What can be done with the device while a machine has it. Take it before the device goes there: the rate limit of a
    /// device of which nobody has a handle costs nothing.
    pub fn handle(&self) -> BlockHandle {
        self.has_handle.store(true, Ordering::Relaxed);
        BlockHandle(Arc::clone(&self.shared))
    }

    /// The cache mode that goes with the negotiated `features` (5.2.5.2), unless the driver chose one.
    fn settle_cache_mode(&mut self, features: u64) {
        let may_choose = features & feature::CONFIG_WCE != 0;
        if !(may_choose && self.cache_chosen) {
            self.shared.writeback.store(features & feature::FLUSH != 0, Ordering::Relaxed);
        }
    }

    fn worker(
        &self,
        resources: (&freestone_memory::GuestMem, &DeviceControl, u64),
        queue: ActiveQueue,
    ) -> Result<BlkWorker> {
        let (mem, control, features) = resources;
        let shared = &self.shared;
        let rules = Rules {
            features,
            read_only: self.read_only,
            id: self.id,
            discard: shared.config.discard,
            write_zeroes: shared.config.write_zeroes,
        };
        let has_handle = self.has_handle.load(Ordering::Relaxed);
        let limited = has_handle || shared.throttle.limiter().is_some();
        let gate =
            limited.then(|| shared.throttle.gate()).transpose().map_err(Error::io("create a timer"))?;
        // Before the engine is opened, so that no change of the image is missed.
        let wake =
            has_handle.then(|| shared.new_wake()).transpose().map_err(Error::io("create an eventfd"))?;
        let io = shared.open_queue(queue.queue.size())?;
        let poller = Poller::new(shared.config.poll);
        let parts = (Arc::clone(shared), rules, io, wake);
        Ok(BlkWorker::new(mem.clone(), queue, control.clone(), poller, parts, gate))
    }
}

impl VirtioDevice for Block {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn check(&self, name: &str) -> Result<()> {
        self.shared.config.check(name, &self.shared.image())
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut space = self.space;
        let capacity = self.shared.capacity.load(Ordering::Acquire).to_le_bytes();
        space.iter_mut().take(CAPACITY_LEN).zip(capacity).for_each(|(to, from)| *to = from);
        if let Some(writeback) = space.get_mut(WRITEBACK_AT)
            && self.info.features & feature::CONFIG_WCE != 0
        {
            *writeback = u8::from(self.shared.writeback.load(Ordering::Relaxed));
        }
        let space = space.get(offset..).unwrap_or_default();
        data.iter_mut().zip(space).for_each(|(to, from)| *to = *from);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Some(&value) = WRITEBACK_AT.checked_sub(offset).and_then(|at| data.get(at)) else { return };
        if self.info.features & feature::CONFIG_WCE != 0 && value <= 1 {
            self.cache_chosen = true;
            self.shared.writeback.store(value == 1, Ordering::Relaxed);
        }
    }

    fn ready(&self) -> Result<()> {
        if *lock(&self.shared.hold) != Hold::Own {
            let reason = "its image was given to others: it is to be taken back before the device works";
            return Err(Error::Config { device: "virtio-blk".to_owned(), reason });
        }
        Ok(())
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let Resources { mem, features, queues, control } = resources;
        self.settle_cache_mode(features);
        let workers = queues.into_iter().map(|queue| {
            let worker = self.worker((&mem, &control, features), queue)?;
            Ok(Box::new(worker) as Box<dyn Worker>)
        });
        let workers = workers.collect::<Result<_>>()?;
        let mut driver = self.shared.driver();
        if std::mem::take(&mut driver.missed) {
            control.config_changed();
        }
        driver.control = Some(control);
        Ok(workers)
    }

    fn reset(&mut self) {
        *self.shared.driver() = Driver::default();
        self.cache_chosen = false;
        let writeback = self.shared.config.cache == CacheMode::Writeback;
        self.shared.writeback.store(writeback, Ordering::Relaxed);
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.save_state(state)
    }

    fn restore(&mut self, _features: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restore_state(state)
    }

    fn shutdown(&mut self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.shared.image().flush().map_err(Error::io("flush a disk"))
    }
}
