//! [`BlockConfig`]: how a block device presents its image; and the configuration space that says so to the driver.

use std::sync::Arc;
use std::time::Duration;

use freestone_block::{Engine, Image, Limits, SECTOR_SIZE};

use super::feature;
use crate::rate::RateLimiter;
use crate::worker::DEFAULT_POLL;
use crate::{Error, Result};

/// Bytes of the configuration space up to and with the write-zeroes fields (5.2.4).
pub(super) const CONFIG_LEN: usize = 60;
/// Bytes of the configuration space that say the capacity.
pub(super) const CAPACITY_LEN: usize = 8;
/// Offset of the cache mode in the configuration space.
pub(super) const WRITEBACK_AT: usize = 32;
/// Descriptors of a request that are not data: header and status.
const OVERHEAD: u16 = 2;
/// Most queues of a device.
const MAX_QUEUES: u16 = 256;
/// Most ranges of a discard or write-zeroes request: their memory and time are the host's.
const MAX_RANGES: u32 = 1024;

/// When a write is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// After the next flush. The driver may ask for the other mode (`VIRTIO_BLK_F_CONFIG_WCE`).
    #[default]
    Writeback,
    /// When it completes: the device flushes after every write. The driver cannot change it, and need not send flushes.
    Writethrough,
}

/// Bounds of discard or write-zeroes requests (5.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLimits {
    /// Sectors in one range, at least 1.
    pub max_sectors: u32,
    /// Ranges in one request: 1 to 1024.
    pub max_segments: u32,
}

/// How a [`Block`](super::Block) device presents its image.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BlockConfig {
    /// Refuse writes even if the image takes them. A read-only image is always read-only. Default: `false`.
    pub read_only: bool,
    /// The answer to get-id: at most 20 bytes (`/sys/block/vda/serial` on Linux). Default: empty.
    pub serial: String,
    /// Queues, 1 to 256: each is served by a worker of its own. Default: 1.
    pub queues: u16,
    /// Entries of each queue: a power of two from 4 to 32768. Default: 256.
    pub queue_size: u16,
    /// How long a worker looks at an empty queue before it asks for kicks; see [`QueueWorker::poll`](crate::QueueWorker::poll).
    /// Default: 10 us.
    pub poll: Duration,
    /// How requests are carried out. Default: what is quickest.
    pub engine: Engine,
    /// When a write is durable. Default: write-back.
    pub cache: CacheMode,
    /// Bytes of a logical block, 512 or 4096. It tells drivers what to align to; requests are still in sectors of 512 bytes
    /// (5.2.4). A rest of the image that is no whole block is not part of the disk. Default: 512.
    pub logical_block: u32,
    /// Most bytes of one data buffer, at least 4096, as advice to the driver. Default: no such advice.
    pub size_max: Option<u32>,
    /// Bounds of discard requests, where the image can discard. Default: 16 ranges of 2 GiB.
    pub discard: RangeLimits,
    /// Bounds of write-zeroes requests, where the image can write zeroes. Default: 16 ranges of 512 MiB.
    pub write_zeroes: RangeLimits,
    /// Limit of requests and bytes, for all queues together. Default: none.
    pub rate_limiter: Option<RateLimiter>,
}

impl Default for BlockConfig {
    fn default() -> Self {
        Self {
            read_only: false,
            serial: String::new(),
            queues: 1,
            queue_size: 256,
            poll: DEFAULT_POLL,
            engine: Engine::Auto,
            cache: CacheMode::Writeback,
            logical_block: 512,
            size_max: None,
            discard: RangeLimits { max_sectors: 1 << 22, max_segments: 16 },
            write_zeroes: RangeLimits { max_sectors: 1 << 20, max_segments: 16 },
            rate_limiter: None,
        }
    }
}

/// One setter for each field, named as the field.
macro_rules! setters {
    ($($field:ident: $type:ty),* $(,)?) => {$(
        #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
        #[must_use]
        pub fn $field(mut self, $field: $type) -> Self {
            self.$field = $field;
            self
        }
    )*};
}

impl BlockConfig {
    /// The default configuration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`serial`](Self::serial).
    #[must_use]
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = serial.into();
        self
    }

    /// Sets [`rate_limiter`](Self::rate_limiter).
    #[must_use]
    pub fn rate_limiter(mut self, limiter: RateLimiter) -> Self {
        self.rate_limiter = Some(limiter);
        self
    }

    /// Sets [`size_max`](Self::size_max).
    #[must_use]
    pub fn size_max(mut self, bytes: u32) -> Self {
        self.size_max = Some(bytes);
        self
    }

    setters! {
        read_only: bool,
        queues: u16,
        queue_size: u16,
        poll: Duration,
        engine: Engine,
        cache: CacheMode,
        logical_block: u32,
        discard: RangeLimits,
        write_zeroes: RangeLimits,
    }

    /// Whether this is possible, and possible with `image`.
    pub(super) fn check(&self, device: &str, image: &Arc<dyn Image>) -> Result<()> {
        let ranges =
            |limits: &RangeLimits| limits.max_sectors > 0 && (1..=MAX_RANGES).contains(&limits.max_segments);
        let rules = [
            ((1..=MAX_QUEUES).contains(&self.queues), "a disk has 1 to 256 queues"),
            (
                self.queue_size.is_power_of_two() && self.queue_size >= 4,
                "queue sizes must be powers of two from 4 to 32768",
            ),
            (matches!(self.logical_block, 512 | 4096), "logical blocks have 512 or 4096 bytes"),
            (image.size() >= u64::from(self.logical_block), "the image has not even one logical block"),
            (self.size_max.is_none_or(|max| max >= 4096), "size_max is at least 4096 bytes"),
            (ranges(&self.discard), "discards have 1 to 1024 ranges of at least one sector"),
            (ranges(&self.write_zeroes), "write-zeroes have 1 to 1024 ranges of at least one sector"),
        ];
        if let Some((_, reason)) = rules.iter().find(|(kept, _)| !kept) {
            return Err(Error::Config { device: device.to_owned(), reason });
        }
        // An engine that was asked for by name is missed now and not when the guest's driver starts.
        if self.engine != Engine::Auto {
            Arc::clone(image).open_queue(self.engine, 1).map_err(Error::io("open a disk's I/O engine"))?;
        }
        Ok(())
    }

    /// The features that go with this and an image of such limits.
    pub(super) fn features(&self, read_only: bool, limits: Limits) -> u64 {
        let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY;
        let mut offer = |when: bool, bit: u64| features |= if when { bit } else { 0 };
        let writeback = self.cache == CacheMode::Writeback;
        offer(self.size_max.is_some(), feature::SIZE_MAX);
        offer(self.queues > 1, feature::MQ);
        offer(read_only, feature::RO);
        offer(writeback, feature::FLUSH);
        offer(writeback && !read_only, feature::CONFIG_WCE);
        offer(!read_only && limits.discard, feature::DISCARD);
        offer(!read_only && limits.write_zeroes, feature::WRITE_ZEROES);
        features
    }

    /// The configuration space (5.2.4), but for capacity and cache mode. Fields of features that are not offered are 0.
    pub(super) fn space(&self, features: u64, limits: Limits) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let mut put = |feature: u64, at: usize, bytes: &[u8]| {
            if features & feature != 0 {
                space.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
            }
        };
        let block = self.logical_block.max(512);
        let physical = limits.physical_block.max(block);
        let exponent = u8::try_from((physical / block).ilog2()).unwrap_or(0);
        let min_io = 1u16.checked_shl(exponent.into()).unwrap_or(1);
        let sectors = |bytes: u32| bytes / 512;

        put(feature::SIZE_MAX, 8, &self.size_max.unwrap_or(0).to_le_bytes());
        put(feature::SEG_MAX, 12, &u32::from(self.queue_size.saturating_sub(OVERHEAD)).to_le_bytes());
        put(feature::BLK_SIZE, 20, &block.to_le_bytes());
        put(feature::TOPOLOGY, 24, &[exponent, 0]);
        put(feature::TOPOLOGY, 26, &min_io.to_le_bytes());
        put(feature::TOPOLOGY, 28, &(limits.optimal_io / block).to_le_bytes());
        put(feature::MQ, 34, &self.queues.to_le_bytes());
        put(feature::DISCARD, 36, &self.discard.max_sectors.to_le_bytes());
        put(feature::DISCARD, 40, &self.discard.max_segments.to_le_bytes());
        put(feature::DISCARD, 44, &sectors(physical).to_le_bytes());
        put(feature::WRITE_ZEROES, 48, &self.write_zeroes.max_sectors.to_le_bytes());
        put(feature::WRITE_ZEROES, 52, &self.write_zeroes.max_segments.to_le_bytes());
        put(feature::WRITE_ZEROES, 56, &[u8::from(limits.discard)]);
        space
    }

    /// Sectors of a disk on an image of `bytes` bytes: those of whole logical blocks.
    pub(super) fn capacity(&self, bytes: u64) -> u64 {
        let block = u64::from(self.logical_block.max(512));
        bytes / block * (block / SECTOR_SIZE)
    }
}
