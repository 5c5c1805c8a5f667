//! [`BlockHandle`]: what can be done with a disk while a machine has it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use freestone_block::{Hold, Image};
use rustix::event::{EventfdFlags, eventfd};

use super::{BlkStats, Shared, feature, lock};
use crate::rate::RateLimiter;
use crate::{Error, Result};

/// What can be done with a [`Block`](super::Block) device while it works, from any thread. It may outlive the device.
#[derive(Debug, Clone)]
pub struct BlockHandle(pub(super) Arc<Shared>);

impl BlockHandle {
    /// Looks at the image again, whose size may have changed, and tells the driver. Returns the bytes of the disk now.
    ///
    /// A driver that reads the capacity during this may find a mixture, but is told afterwards and reads it again. Requests
    /// beyond the end of a smaller disk fail.
    ///
    /// # Errors
    /// As [`Image::refresh_size`]; the disk stays as it is.
    pub fn resize(&self) -> io::Result<u64> {
        let shared = &self.0;
        // One at a time, so that the driver is never told of the older of two sizes.
        let mut driver = shared.driver();
        let capacity = shared.config.capacity(shared.image().refresh_size()?);
        if shared.capacity.swap(capacity, Ordering::AcqRel) != capacity {
            driver.capacity_changed();
        }
        Ok(capacity * freestone_block::SECTOR_SIZE)
    }

    /// Puts another image under the disk, as another medium into a drive, and tells the driver of its capacity. What it offers
    /// the driver does not change. Returns the old image.
    ///
    /// Requests that are under way are carried out on the old image, which is then flushed and let go by each worker: soon, or
    /// at once where the device does not work now. A request that the driver makes after it was told goes to the new one. What the
    /// driver has cached of the old disk is its own business.
    ///
    /// # Errors
    /// If the new image cannot take the old one's place; the disk stays as it is. [`Error::Config`] if it is read-only and the disk
    /// is not, if it cannot discard or write zeroes and the disk offers that, or if it has not even one logical block;
    /// [`Error::Io`] if it does not have the engine that was configured.
    pub fn replace(&self, image: Arc<dyn Image>) -> Result<Arc<dyn Image>> {
        let shared = &self.0;
        let offered = |bit: u64| shared.features & bit != 0;
        let limits = image.limits();
        let rules = [
            (!image.read_only() || offered(feature::RO), "the image is read-only and the disk is not"),
            (limits.discard || !offered(feature::DISCARD), "the image cannot discard and the disk can"),
            (
                limits.write_zeroes || !offered(feature::WRITE_ZEROES),
                "the image cannot write zeroes and the disk can",
            ),
        ];
        if let Some((_, reason)) = rules.iter().find(|(kept, _)| !kept) {
            return Err(Error::Config { device: "virtio-blk".to_owned(), reason });
        }
        shared.config.check("virtio-blk", &image)?;
        let mut driver = shared.driver();
        let capacity = shared.config.capacity(image.size());
        let old = {
            let mut disk = lock(&shared.disk);
            disk.generation += 1;
            shared.generation.store(disk.generation, Ordering::Release);
            std::mem::replace(&mut disk.image, image)
        };
        shared.wake_all();
        // Last: a request that is made because of this finds the new image.
        shared.capacity.store(capacity, Ordering::Release);
        driver.capacity_changed();
        Ok(old)
    }

    /// Says how the image is held against others, as [`Image::set_hold`]: for a machine that is paused. A device whose image is not
    /// its [own](Hold::Own) does not go on.
    ///
    /// # Errors
    /// As [`Image::set_hold`]; the image is then not the device's own.
    pub fn set_hold(&self, hold: Hold) -> io::Result<()> {
        let mut held = lock(&self.0.hold);
        let done = self.0.image().set_hold(hold);
        match (&done, hold, *held) {
            (Ok(()), ..) => *held = hold,
            // Whether it still is, is not known.
            (Err(_), _, Hold::Own) => *held = Hold::Share,
            (Err(_), ..) => {}
        }
        done
    }

    /// How the image is held.
    pub fn hold(&self) -> Hold {
        *lock(&self.0.hold)
    }

    /// Whether the guest cannot write to the disk.
    pub fn read_only(&self) -> bool {
        self.0.features & feature::RO != 0
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
    pub fn stats(&self) -> Arc<BlkStats> {
        Arc::clone(&self.0.stats)
    }
}

impl super::Driver {
    fn capacity_changed(&mut self) {
        match &self.control {
            Some(control) => control.config_changed(),
            None => self.missed = true,
        }
    }
}

impl Shared {
    /// An eventfd that [`wake_all`](Self::wake_all) makes readable.
    pub(super) fn new_wake(&self) -> io::Result<Arc<OwnedFd>> {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let mut wakes = lock(&self.wakes);
        wakes.retain(|wake| wake.strong_count() > 0);
        wakes.push(Arc::downgrade(&wake));
        Ok(wake)
    }

    fn wake_all(&self) {
        for wake in lock(&self.wakes).iter().filter_map(std::sync::Weak::upgrade) {
            // Fails only when the counter is full, and then the worker has been woken often enough.
            if let Err(error) = rustix::io::write(&*wake, &1u64.to_ne_bytes()) {
                tracing::trace!(%error, "wake of a disk's worker dropped");
            }
        }
    }
}
