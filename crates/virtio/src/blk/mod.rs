//! virtio-blk (virtio 1.2, section 5.2) on any [`Image`].
//!
//! Data goes from the image to guest memory and back without a copy. Every request is answered on the worker's thread, in
//! order. What a request asks wrongly is refused with a status; what the host refuses is reported as an I/O error.

mod request;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use freestone_block::{Image, SECTOR_SIZE};

use crate::device::{DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::worker::QueueWorker;
use crate::{Error, Result};
use request::Requests;

/// Feature bits of this device type that are offered, as masks (5.2.3).
pub mod feature {
    /// `VIRTIO_BLK_F_SEG_MAX`: the configuration says how many segments a request may have.
    pub const SEG_MAX: u64 = 1 << 2;
    /// `VIRTIO_BLK_F_RO`: writes are refused.
    pub const RO: u64 = 1 << 5;
    /// `VIRTIO_BLK_F_FLUSH`: writes are durable after a flush. To a driver that does not accept it, every write is.
    pub const FLUSH: u64 = 1 << 9;
}

/// Bytes of the answer to a get-id request (5.2.6).
pub const ID_LEN: usize = 20;
/// Bytes of the configuration space up to and with the write-zeroes fields (5.2.4).
const CONFIG_LEN: u32 = 60;
/// Descriptors of a request that are not data: header and status.
const OVERHEAD: u16 = 2;

/// How a [`Block`] device presents its image.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BlockConfig {
    /// Refuse writes even if the image takes them. A read-only image is always read-only. Default: `false`.
    pub read_only: bool,
    /// The answer to get-id: at most 20 bytes (`/sys/block/vda/serial` on Linux). Default: empty.
    pub serial: String,
    /// Entries of the queue: a power of two from 4 to 32768. Default: 256.
    pub queue_size: u16,
    /// How long the worker looks at an empty queue before it asks for kicks; see [`QueueWorker::poll`]. Default: 10 us.
    pub poll: Duration,
}

impl Default for BlockConfig {
    fn default() -> Self {
        Self {
            read_only: false,
            serial: String::new(),
            queue_size: 256,
            poll: QueueWorker::<Requests>::DEFAULT_POLL,
        }
    }
}

impl BlockConfig {
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

    /// Sets [`serial`](Self::serial).
    #[must_use]
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = serial.into();
        self
    }

    /// Sets [`queue_size`](Self::queue_size).
    #[must_use]
    pub fn queue_size(mut self, queue_size: u16) -> Self {
        self.queue_size = queue_size;
        self
    }

    /// Sets [`poll`](Self::poll).
    #[must_use]
    pub fn poll(mut self, poll: Duration) -> Self {
        self.poll = poll;
        self
    }
}

/// Counts what a [`Block`] device did; to be read at any time, from any thread.
#[derive(Debug, Default)]
pub struct BlkStats {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    errors: AtomicU64,
}

/// [`BlkStats`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BlkCounts {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Bytes read from the image.
    pub read_bytes: u64,
    /// Bytes written to the image.
    pub written_bytes: u64,
    /// Requests answered with an error, whoever caused it.
    pub errors: u64,
}

impl BlkStats {
    /// The counts so far. They are not taken at one instant.
    pub fn counts(&self) -> BlkCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkCounts {
            reads: get(&self.reads),
            writes: get(&self.writes),
            flushes: get(&self.flushes),
            read_bytes: get(&self.read_bytes),
            written_bytes: get(&self.written_bytes),
            errors: get(&self.errors),
        }
    }
}

/// A virtio block device.
#[derive(Debug)]
pub struct Block {
    info: DeviceInfo,
    image: Arc<dyn Image>,
    read_only: bool,
    id: [u8; ID_LEN],
    poll: Duration,
    stats: Arc<BlkStats>,
    config_space: [u8; CONFIG_LEN as usize],
}

impl Block {
    /// A device that presents `image` as `config` says. Of a serial with more than 20 bytes the guest sees the first 20.
    pub fn new(image: Arc<dyn Image>, config: BlockConfig) -> Self {
        let read_only = config.read_only || image.read_only();
        let mut id = [0; ID_LEN];
        id.iter_mut().zip(config.serial.bytes()).for_each(|(to, from)| *to = from);
        let features = feature::SEG_MAX | feature::FLUSH | if read_only { feature::RO } else { 0 };
        let info = DeviceInfo {
            device_type: DeviceType::BLOCK,
            features,
            queue_max_sizes: vec![config.queue_size],
            config_len: CONFIG_LEN,
        };
        let seg_max = u32::from(config.queue_size.saturating_sub(OVERHEAD));
        let config_space = config_space(image.size() / SECTOR_SIZE, seg_max);
        Self { info, image, read_only, id, poll: config.poll, stats: Arc::default(), config_space }
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<BlkStats> {
        Arc::clone(&self.stats)
    }
}

/// The configuration space (5.2.4). Fields of features that are not offered are 0.
fn config_space(sectors: u64, seg_max: u32) -> [u8; CONFIG_LEN as usize] {
    let mut space = [0; CONFIG_LEN as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        space.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    };
    put(0, &sectors.to_le_bytes());
    put(12, &seg_max.to_le_bytes());
    space
}

impl VirtioDevice for Block {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = self.config_space.get(offset..).unwrap_or_default();
        data.iter_mut().zip(space).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let Resources { mem, features, queues, control } = resources;
        let write_through = features & feature::FLUSH == 0;
        let workers = queues.into_iter().map(|queue| {
            let requests = Requests {
                image: Arc::clone(&self.image),
                sectors: self.image.size() / SECTOR_SIZE,
                read_only: self.read_only,
                write_through,
                id: self.id,
                stats: Arc::clone(&self.stats),
            };
            let worker = QueueWorker::new(mem.clone(), queue, control.clone(), requests).poll(self.poll);
            Box::new(worker) as Box<dyn Worker>
        });
        Ok(workers.collect())
    }

    fn shutdown(&mut self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.image.flush().map_err(Error::io("flush a disk"))
    }
}

impl fmt::Display for BlkCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reads, writes, flushes, read_bytes, written_bytes, errors } = self;
        write!(
            f,
            "{reads} reads ({read_bytes} bytes), {writes} writes ({written_bytes} bytes), {flushes} flushes, {errors} errors"
        )
    }
}
