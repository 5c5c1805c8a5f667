//! What a vCPU's exits cost: counters and latency histograms, at no cost when nobody asks.
//!
//! The run loop and the dispatcher are generic over an [`Observer`]. [`NoObserver`] has no size and empty inlined methods,
//! so that nothing of it is left in the compiled loop. [`ExitStats`] counts.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use freestone_hypervisor::ExitReason;

/// Is told of every exit, on the thread that drives the vCPU.
pub trait Observer: Send {
    /// The guest is about to be entered.
    #[inline(always)]
    fn enter(&mut self) {}

    /// The guest was left for `reason`.
    #[inline(always)]
    fn exit(&mut self, reason: ExitReason) {
        let _ = reason;
    }

    /// The exit for `reason` has been handled.
    #[inline(always)]
    fn handled(&mut self, reason: ExitReason) {
        let _ = reason;
    }
}

/// Looks away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NoObserver;

impl Observer for NoObserver {}

/// Buckets of a power of two, as a power of two: eight, so a bucket is at most 12.5 % wide.
const SUB_BITS: u32 = 3;
const SUB: usize = 1 << SUB_BITS;
/// Largest power of two of nanoseconds with buckets of its own; 2^36 ns are 69 s.
const MAX_EXPONENT: u32 = 36;
/// Number of buckets of a [`Histogram`].
pub const BUCKETS: usize = SUB * (MAX_EXPONENT - SUB_BITS + 2) as usize;

/// The bucket of `nanos`.
#[inline]
fn bucket(nanos: u64) -> usize {
    let exponent = nanos.checked_ilog2().unwrap_or(0);
    if exponent < SUB_BITS {
        return low_bits(nanos);
    }
    if exponent > MAX_EXPONENT {
        return BUCKETS - 1;
    }
    let group = (exponent - SUB_BITS + 1) as usize;
    group * SUB + low_bits(nanos >> (exponent - SUB_BITS))
}

/// The low [`SUB_BITS`] bits.
#[inline]
fn low_bits(value: u64) -> usize {
    let [low, ..] = value.to_le_bytes();
    usize::from(low) & (SUB - 1)
}

/// The smallest value, in nanoseconds, of bucket `index`; the last bucket also has everything above.
fn lower_bound(index: usize) -> u64 {
    let (group, sub) = (index / SUB, (index % SUB) as u64);
    match group.checked_sub(1) {
        None => sub,
        Some(shift) => (SUB as u64 + sub) << shift,
    }
}

/// Counters with one writer: the vCPU's thread. It adds without a locked instruction; readers load at any time.
#[derive(Debug)]
struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    #[inline]
    fn add(&self, n: u64) {
        // One writer, so load and store cannot lose an addition.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct LiveHistogram {
    buckets: [Counter; BUCKETS],
    sum: Counter,
}

impl LiveHistogram {
    const fn new() -> Self {
        Self { buckets: [const { Counter::new() }; BUCKETS], sum: Counter::new() }
    }

    #[inline]
    fn record(&self, nanos: u64) {
        if let Some(counter) = self.buckets.get(bucket(nanos)) {
            counter.add(1);
            self.sum.add(nanos);
        }
    }

    fn snapshot(&self) -> Histogram {
        Histogram { buckets: self.buckets.iter().map(Counter::get).collect(), sum: self.sum.get() }
    }
}

#[derive(Debug)]
struct Live {
    count: Counter,
    handling: LiveHistogram,
    guest: LiveHistogram,
}

impl Live {
    const fn new() -> Self {
        Self { count: Counter::new(), handling: LiveHistogram::new(), guest: LiveHistogram::new() }
    }
}

/// An [`Observer`] that counts exits and measures how long the guest ran before each and how long handling took.
///
/// It reads the clock three times for each exit. Cost otherwise: a few additions to memory of its own.
#[derive(Debug)]
pub struct ExitStats {
    live: Arc<[Live]>,
    mark: Instant,
}

impl Default for ExitStats {
    fn default() -> Self {
        Self::new()
    }
}

impl ExitStats {
    /// Counters at zero.
    pub fn new() -> Self {
        Self { live: ExitReason::ALL.iter().map(|_| Live::new()).collect(), mark: Instant::now() }
    }

    /// A handle through which any thread reads the counters while the vCPU runs.
    pub fn reader(&self) -> StatsReader {
        StatsReader { live: Arc::clone(&self.live) }
    }

    /// The counters as they are now.
    pub fn snapshot(&self) -> Snapshot {
        self.reader().snapshot()
    }

    #[inline]
    fn lap(&mut self) -> u64 {
        let now = Instant::now();
        let nanos = now.duration_since(self.mark).as_nanos();
        self.mark = now;
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

impl Observer for ExitStats {
    #[inline]
    fn enter(&mut self) {
        self.mark = Instant::now();
    }

    #[inline]
    fn exit(&mut self, reason: ExitReason) {
        let nanos = self.lap();
        if let Some(live) = self.live.get(reason.index()) {
            live.count.add(1);
            live.guest.record(nanos);
        }
    }

    #[inline]
    fn handled(&mut self, reason: ExitReason) {
        let nanos = self.lap();
        if let Some(live) = self.live.get(reason.index()) {
            live.handling.record(nanos);
        }
    }
}

/// Reads the counters of an [`ExitStats`] from any thread; cheap to clone.
#[derive(Debug, Clone)]
pub struct StatsReader {
    live: Arc<[Live]>,
}

impl StatsReader {
    /// The counters as they are now. Taken while the vCPU runs, they may be one exit apart from one another.
    pub fn snapshot(&self) -> Snapshot {
        let rows = ExitReason::ALL.iter().zip(self.live.iter()).map(|(&reason, live)| Row {
            reason,
            count: live.count.get(),
            guest: live.guest.snapshot(),
            handling: live.handling.snapshot(),
        });
        Snapshot { rows: rows.collect() }
    }
}

/// Counters at one moment. `Display` gives a table of the reasons that occurred.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    rows: Vec<Row>,
}

/// Counters of one exit reason.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Row {
    /// The reason.
    pub reason: ExitReason,
    /// How many exits.
    pub count: u64,
    /// How long the guest ran before each, with the way into it and out of it.
    pub guest: Histogram,
    /// How long handling each took.
    pub handling: Histogram,
}

impl Snapshot {
    /// All reasons, those that did not occur too.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Number of exits for `reason`.
    pub fn count(&self, reason: ExitReason) -> u64 {
        self.rows.get(reason.index()).map_or(0, |r| r.count)
    }

    /// Number of exits in all.
    pub fn total(&self) -> u64 {
        self.rows.iter().map(|r| r.count).sum()
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<14} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "exit", "count", "mean ns", "p50 ns", "p99 ns", "guest p50"
        )?;
        for row in self.rows.iter().filter(|r| r.count > 0) {
            let nanos = |d: Option<Duration>| d.map_or(0, |d| d.as_nanos());
            write!(
                f,
                "\n{:<14} {:>10} {:>10} {:>10} {:>10} {:>10}",
                row.reason.name(),
                row.count,
                nanos(row.handling.mean()),
                nanos(row.handling.percentile(50)),
                nanos(row.handling.percentile(99)),
                nanos(row.guest.percentile(50)),
            )?;
        }
        Ok(())
    }
}

/// Latencies in buckets that grow with the value: eight for each power of two of nanoseconds, up to 69 s.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    buckets: Vec<u64>,
    sum: u64,
}

impl Histogram {
    /// Number of values.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Mean; `None` without values.
    pub fn mean(&self) -> Option<Duration> {
        self.sum.checked_div(self.count()).map(Duration::from_nanos)
    }

    /// A lower bound of the value below which `percent` of 100 values are, exact to 12.5 %; `None` without values.
    pub fn percentile(&self, percent: u8) -> Option<Duration> {
        let rank = self.count().checked_mul(percent.min(100).into())?.div_ceil(100).max(1);
        let mut seen = 0u64;
        for (index, n) in self.buckets.iter().enumerate() {
            seen = seen.saturating_add(*n);
            if seen >= rank {
                return Some(Duration::from_nanos(lower_bound(index)));
            }
        }
        None
    }

    /// The buckets that have values: smallest value of the bucket, and how many.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        self.buckets
            .iter()
            .enumerate()
            .filter(|(_, n)| **n > 0)
            .map(|(i, n)| (Duration::from_nanos(lower_bound(i)), *n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_the_bucket_whose_bounds_enclose_it() {
        for exponent in 0..=MAX_EXPONENT {
            for value in [1u64 << exponent, (1 << exponent) + (1 << exponent >> 1), (2 << exponent) - 1] {
                let index = bucket(value);
                assert!(index < BUCKETS);
                assert!(lower_bound(index) <= value, "{value}");
                if index + 1 < BUCKETS {
                    assert!(value < lower_bound(index + 1), "{value}");
                }
            }
        }
        assert_eq!(bucket(0), 0);
    }

    #[test]
    fn a_bucket_is_at_most_an_eighth_wide() {
        for index in SUB..BUCKETS - 1 {
            let width = lower_bound(index + 1) - lower_bound(index);
            assert!(width * 8 <= lower_bound(index), "bucket {index}");
        }
    }

    #[test]
    fn values_beyond_the_last_bucket_are_counted_in_it() {
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_the_values_recorded() {
        let live = LiveHistogram::new();
        (0..90).for_each(|_| live.record(1000));
        (0..10).for_each(|_| live.record(1_000_000));
        let histogram = live.snapshot();
        assert_eq!(histogram.count(), 100);
        let near = |d: Option<Duration>, nanos: u128| {
            let got = d.unwrap().as_nanos();
            assert!(got <= nanos && got * 9 >= nanos * 8, "{got} is not near {nanos}");
        };
        near(histogram.percentile(50), 1000);
        near(histogram.percentile(90), 1000);
        near(histogram.percentile(91), 1_000_000);
        near(histogram.percentile(100), 1_000_000);
        assert_eq!(histogram.mean(), Some(Duration::from_nanos(100_900)));
    }

    #[test]
    fn an_empty_histogram_has_no_percentile_and_no_mean() {
        let histogram = LiveHistogram::new().snapshot();
        assert_eq!((histogram.percentile(50), histogram.mean()), (None, None));
    }

    #[test]
    fn exits_are_counted_by_reason_and_seen_by_a_reader() {
        let mut stats = ExitStats::new();
        let reader = stats.reader();
        for _ in 0..3 {
            stats.enter();
            stats.exit(ExitReason::PioWrite);
            stats.handled(ExitReason::PioWrite);
        }
        let snapshot = std::thread::spawn(move || reader.snapshot()).join().unwrap();
        assert_eq!(snapshot.count(ExitReason::PioWrite), 3);
        assert_eq!(snapshot.total(), 3);
        assert_eq!(snapshot.rows()[ExitReason::PioWrite.index()].handling.count(), 3);
        assert!(snapshot.to_string().contains("pio_write"));
        assert!(!snapshot.to_string().contains("mmio_read"), "reasons that did not occur are not listed");
    }

    #[test]
    fn looking_away_takes_no_space() {
        assert_eq!(size_of::<NoObserver>(), 0);
    }
}
