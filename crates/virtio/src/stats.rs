//! What each queue did, and how long it took: readable while the device works, at no cost to it.
//!
//! [`DeviceStats`] is the handle that a VMM keeps, [`QueueStats`] what one queue counts, [`QueueCounts`] the counts at one
//! moment. All of it is measured by the queues themselves: a device does nothing for it.
//!
//! Latency is time in the queue plus time in processing. The first begins when the device finds the request available, which is
//! at its kick at the latest, or when the device is through with what it found before; how long the driver's kick travelled
//! is not in it. The clock is not read for every request: while requests are quick, one stands for up to 128.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use freestone_bus::EventFd;

use crate::device::DeviceInfo;

/// Each power of two of nanoseconds has this many buckets, as a power of two: they are a quarter of their start wide.
const SUB_BITS: u32 = 2;
const SUB_BUCKETS: usize = 1 << SUB_BITS;
/// Longer than 2^38 ns, which are 4.5 minutes, is all the same.
const MAX_BITS: u32 = 38;
const BUCKETS: usize = (MAX_BITS - SUB_BITS + 1) as usize * SUB_BUCKETS;

/// The bucket of `nanos`.
fn bucket(nanos: u64) -> usize {
    let nanos = nanos.min((1 << MAX_BITS) - 1);
    let Some(shift) = nanos.checked_ilog2().and_then(|bits| bits.checked_sub(SUB_BITS)) else {
        return usize::try_from(nanos).unwrap_or(0);
    };
    // The top bit and the SUB_BITS below it are left.
    let top = usize::try_from(nanos >> shift).unwrap_or(0);
    shift as usize * SUB_BUCKETS + top
}

/// The least nanoseconds of `bucket`, and those of the next.
fn bounds(bucket: usize) -> (u64, u64) {
    let start = |bucket: usize| {
        let shift = (bucket / SUB_BUCKETS).saturating_sub(1);
        let top = bucket - shift * SUB_BUCKETS;
        (top as u64) << shift
    };
    (start(bucket), start(bucket + 1))
}

/// Adds to a counter that has one writer: a load and a store, and no locked instruction.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// Times, in buckets that are a quarter of their start wide. One thread at a time records; any thread reads.
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    /// Counts `time` for `weight` requests.
    pub(crate) fn record(&self, time: Duration, weight: u32) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(counter) = self.buckets.get(bucket(nanos)) {
            add(counter, weight.into());
        }
        add(&self.sum, nanos.saturating_mul(weight.into()));
        if nanos > self.max.load(Ordering::Relaxed) {
            self.max.store(nanos, Ordering::Relaxed);
        }
    }

    fn snapshot(&self) -> Latencies {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Latencies {
            buckets: self.buckets.iter().map(get).collect(),
            sum: get(&self.sum),
            max: get(&self.max),
        }
    }
}

/// Times that were measured, at one moment. Percentiles are exact to an eighth of their value, mean and maximum to the
/// nanosecond.
#[derive(Clone, PartialEq, Eq)]
pub struct Latencies {
    buckets: Box<[u64]>,
    sum: u64,
    max: u64,
}

impl Latencies {
    /// Number of requests that the times stand for.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The mean; zero if there is none.
    pub fn mean(&self) -> Duration {
        Duration::from_nanos(self.sum.checked_div(self.count()).unwrap_or(0))
    }

    /// The longest of the times that were measured.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// The time that `percent` of the requests did not exceed; zero if there are none.
    pub fn percentile(&self, percent: u8) -> Duration {
        let count = self.count();
        let rank = u128::from(count) * u128::from(percent.min(100));
        let mut below = 0u128;
        for (index, n) in self.buckets.iter().enumerate() {
            below += u128::from(*n) * 100;
            if *n > 0 && below >= rank {
                let (start, next) = bounds(index);
                return Duration::from_nanos((start + (next - start) / 2).min(self.max));
            }
        }
        Duration::ZERO
    }

    /// The median.
    pub fn p50(&self) -> Duration {
        self.percentile(50)
    }

    /// The time that 99 of 100 requests did not exceed.
    pub fn p99(&self) -> Duration {
        self.percentile(99)
    }

    /// The buckets that are not empty: their least time, and the number of requests.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let filled = self.buckets.iter().enumerate().filter(|(_, n)| **n > 0);
        filled.map(|(index, n)| (Duration::from_nanos(bounds(index).0), *n))
    }
}

impl fmt::Debug for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Latencies").field("count", &self.count()).field("text", &self.to_string()).finish()
    }
}

impl fmt::Display for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mean, p50, p99, max) = (self.mean(), self.p50(), self.p99(), self.max());
        write!(f, "mean {mean:.1?}, p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}")
    }
}

/// Kicks that were taken out of the eventfd.
#[derive(Debug, Default)]
struct Drained {
    total: u64,
    /// Of the eventfd's counter, so much was put back by us.
    put_back: u64,
}

/// What one queue counts, from the device's making on: a reset of the device does not reset it.
///
/// Written by the one worker that has the queue, with no lock and no locked instruction; read by any thread at any time.
#[derive(Default)]
#[repr(align(64))]
pub struct QueueStats {
    requests: AtomicU64,
    completed: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    interrupts: AtomicU64,
    suppressed: AtomicU64,
    pub(crate) queued: Histogram,
    pub(crate) processing: Histogram,
    kick: OnceLock<Arc<EventFd>>,
    drained: Mutex<Drained>,
}

impl QueueStats {
    /// Counts of zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// The eventfd whose counter is the number of notifications.
    pub(crate) fn watch(&self, kick: &Arc<EventFd>) {
        // A second one is not to be: there is one eventfd for each queue, as long as the device lives.
        let _first = self.kick.set(Arc::clone(kick));
    }

    #[inline]
    pub(crate) fn count_taken(&self, bytes: u32) {
        add(&self.requests, 1);
        add(&self.bytes_in, bytes.into());
    }

    /// Takes [`count_taken`](Self::count_taken) back.
    #[inline]
    pub(crate) fn uncount_taken(&self, bytes: u32) {
        add(&self.requests, 1u64.wrapping_neg());
        add(&self.bytes_in, u64::from(bytes).wrapping_neg());
    }

    #[inline]
    pub(crate) fn count_done(&self, bytes: u32) {
        add(&self.completed, 1);
        add(&self.bytes_out, bytes.into());
    }

    #[inline]
    pub(crate) fn count_interrupt(&self, sent: bool) {
        add(if sent { &self.interrupts } else { &self.suppressed }, 1);
    }

    /// Notifications so far. Nobody else reads the eventfd, so that it is a counter. But whoever waits for its edge may not have
    /// been woken yet, and would not be when it is found empty: so one is put back, which wakes it once more than needed.
    fn notifications(&self) -> u64 {
        let mut drained = self.drained.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(kick) = self.kick.get() else { return 0 };
        if let Ok(count) = kick.read() {
            drained.total += count.saturating_sub(drained.put_back);
            drained.put_back = kick.write(1).map_or(0, |()| 1);
        }
        drained.total
    }

    /// The counts so far. They are not taken at one instant.
    pub fn snapshot(&self) -> QueueCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueueCounts {
            // In this order no more can be completed than were taken.
            completed: get(&self.completed),
            requests: get(&self.requests),
            bytes_in: get(&self.bytes_in),
            bytes_out: get(&self.bytes_out),
            notifications: self.notifications(),
            interrupts: get(&self.interrupts),
            suppressed: get(&self.suppressed),
            queued: self.queued.snapshot(),
            processing: self.processing.snapshot(),
        }
    }
}

impl fmt::Debug for QueueStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueStats").field("requests", &self.requests).finish_non_exhaustive()
    }
}

/// [`QueueStats`] at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueCounts {
    /// Requests that the device took.
    pub requests: u64,
    /// Requests that it gave back; the others are in flight, or were lost to a reset.
    pub completed: u64,
    /// Device-readable bytes of the requests.
    pub bytes_in: u64,
    /// Bytes that the device wrote, as it told the driver.
    pub bytes_out: u64,
    /// Kicks.
    pub notifications: u64,
    /// Batches of completions for which the driver was interrupted.
    pub interrupts: u64,
    /// Batches of completions for which it did not want to be.
    pub suppressed: u64,
    /// From when the device saw a request available until it took it.
    pub queued: Latencies,
    /// From when the device took a request until it gave it back.
    pub processing: Latencies,
}

impl QueueCounts {
    /// Mean time from when the device saw a request until it gave it back.
    pub fn mean_latency(&self) -> Duration {
        self.queued.mean() + self.processing.mean()
    }
}

impl fmt::Display for QueueCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, completed, bytes_in, bytes_out, notifications, interrupts, suppressed, .. } =
            self;
        write!(
            f,
            "{requests} requests ({completed} completed, {bytes_in} bytes in, {bytes_out} out), {notifications} kicks, \
             {interrupts} interrupts ({suppressed} suppressed)"
        )?;
        if self.queued.count() > 0 {
            write!(f, "; queued: {}; processing: {}", self.queued, self.processing)?;
        }
        Ok(())
    }
}

/// The statistics of a device's queues: a handle that is cheap to clone and outlives resets, and even the device.
#[derive(Debug, Clone)]
pub struct DeviceStats {
    name: Arc<str>,
    queues: Arc<[Arc<QueueStats>]>,
}

impl DeviceStats {
    /// Counts of zero for each queue of a device with the name `name`.
    pub fn new(name: &str, info: &DeviceInfo) -> Self {
        let queues = info.queue_max_sizes.iter().map(|_| Arc::default()).collect();
        Self { name: name.into(), queues }
    }

    /// The device's name, as its messages have it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One for each queue.
    pub fn queues(&self) -> &[Arc<QueueStats>] {
        &self.queues
    }

    /// The counts of each queue. They are not taken at one instant.
    pub fn snapshot(&self) -> Vec<QueueCounts> {
        self.queues.iter().map(|queue| queue.snapshot()).collect()
    }
}

impl fmt::Display for DeviceStats {
    /// A line for each queue that was used.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = self.snapshot().into_iter().enumerate().filter(|(_, counts)| counts.requests > 0);
        for (n, (index, counts)) in used.enumerate() {
            let line = if n > 0 { "\n" } else { "" };
            write!(f, "{line}{} queue {index}: {counts}", self.name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freestone_bus::EFD_NONBLOCK;

    #[test]
    fn buckets_are_in_order_without_gaps_and_a_quarter_wide() {
        for index in 0..BUCKETS {
            let (start, next) = bounds(index);
            assert_eq!((bucket(start), bucket(next - 1)), (index, index), "{start}..{next}");
            assert!(next - start <= (start / 4).max(1));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(bounds(BUCKETS - 1).1, 1 << MAX_BITS);
    }

    #[test]
    fn percentiles_mean_and_maximum_are_those_of_the_times() {
        let histogram = Histogram::default();
        for micros in 1..=100 {
            histogram.record(Duration::from_micros(micros), 3);
        }
        let times = histogram.snapshot();
        assert_eq!((times.count(), times.max()), (300, Duration::from_micros(100)));
        assert_eq!(times.mean(), Duration::from_nanos(50_500));
        let near = |time: Duration, micros: u32| {
            let off = time.abs_diff(Duration::from_micros(micros.into()));
            assert!(off * 8 <= Duration::from_micros(micros.into()), "{time:?} and not {micros} us");
        };
        near(times.p50(), 50);
        near(times.p99(), 99);
        near(times.percentile(100), 100);
        assert_eq!(times.buckets().map(|(_, n)| n).sum::<u64>(), 300);
    }

    #[test]
    fn no_times_are_all_zero() {
        let times = Histogram::default().snapshot();
        assert_eq!((times.p99(), times.mean(), times.max()), Default::default());
    }

    #[test]
    fn kicks_are_counted_and_those_who_wait_for_them_stay_woken() {
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let stats = QueueStats::new();
        assert_eq!(stats.snapshot().notifications, 0);
        stats.watch(&kick);
        for (kicks, total) in [(0, 0), (3, 3), (0, 3), (1, 4)] {
            (0..kicks).for_each(|_| kick.write(1).unwrap());
            assert_eq!(stats.snapshot().notifications, total);
        }
        assert_eq!(kick.read().unwrap(), 1, "an edge was left");
    }
}
