//! [`Meter`]: measures the requests of one queue at the cost of a few additions, and now and then of reading the clock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::stats::QueueStats;

/// Requests are timed so rarely that the time between two is at least about this long...
const OFTEN: Duration = Duration::from_micros(8);
/// ...and again more often when it is longer than this.
const SELDOM: Duration = Duration::from_micros(32);
/// One request in so many is timed at least.
const MAX_INTERVAL: u32 = 128;

/// A request that is being timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Timed {
    taken: Instant,
    /// How long it waited in the queue.
    waited: Duration,
    /// Requests that it stands for: itself, and those since the last one that was timed.
    weight: u32,
}

/// The measuring side of [`QueueStats`]; there is one for each queue, and it goes where the queue goes.
///
/// Each request is counted. The clock is read for one request in 1, 2, 4 ... 128: in every one while they are slow or far apart,
/// and in so few when they are quick that it is read at most every few microseconds. It is read up to three times then: when the
/// device sees the request (once for all that it sees at once), when it takes it, and when it gives it back.
#[derive(Debug)]
pub(super) struct Meter {
    stats: Arc<QueueStats>,
    interval: u32,
    /// Requests to be taken before the next one that is timed.
    until: u32,
    /// When the requests that can be taken now were seen, if the next one that is timed is among them.
    seen: Option<Instant>,
    /// When the last one that was timed was taken.
    last: Option<Instant>,
}

impl Meter {
    pub(super) fn new(stats: Arc<QueueStats>) -> Self {
        Self { stats, interval: 1, until: 0, seen: None, last: None }
    }

    pub(super) fn stats(&self) -> &Arc<QueueStats> {
        &self.stats
    }

    /// Whether one of the next `requests` will be timed.
    #[inline]
    pub(super) fn is_near(&self, requests: u16) -> bool {
        self.until < u32::from(requests)
    }

    /// At most `requests` more were found to be available.
    #[inline]
    pub(super) fn saw(&mut self, requests: u16) {
        self.seen = if self.is_near(requests) { Some(Instant::now()) } else { None };
    }

    /// A request with this many device-readable bytes was taken.
    #[inline]
    pub(super) fn took(&mut self, bytes: u32) -> Option<Timed> {
        self.stats.count_taken(bytes);
        if self.until > 0 {
            self.until -= 1;
            return None;
        }
        Some(self.take_time())
    }

    fn take_time(&mut self) -> Timed {
        let (taken, weight) = (Instant::now(), self.interval);
        let waited = self.seen.map_or(Duration::ZERO, |seen| taken.saturating_duration_since(seen));
        if let Some(last) = self.last.replace(taken) {
            let apart = taken.saturating_duration_since(last);
            if apart < OFTEN {
                self.interval = (self.interval * 2).min(MAX_INTERVAL);
            } else if apart > SELDOM {
                self.interval = (self.interval / 2).max(1);
            }
        }
        self.until = self.interval - 1;
        Timed { taken, waited, weight }
    }

    /// The request that was taken last, with this many device-readable bytes, is in the queue again: it was not taken.
    #[inline]
    pub(super) fn put_back(&mut self, bytes: u32, timed: Option<Timed>) {
        self.stats.uncount_taken(bytes);
        match timed {
            // The next one is timed in its place, for as many.
            Some(Timed { weight, .. }) => (self.interval, self.until) = (weight, 0),
            None => self.until += 1,
        }
    }

    /// A request was given back with this many bytes written.
    #[inline]
    pub(super) fn gave_back(&mut self, bytes: u32, timed: Option<Timed>) {
        self.stats.count_done(bytes);
        if let Some(Timed { taken, waited, weight }) = timed {
            self.stats.queued.record(waited, weight);
            self.stats.processing.record(taken.elapsed(), weight);
        }
    }

    /// The driver had completions to hear of, and wanted or did not want to be interrupted.
    #[inline]
    pub(super) fn considered_interrupt(&mut self, wanted: bool) {
        self.stats.count_interrupt(wanted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `count` requests that are seen `at_once` at a time; returns how many were timed.
    fn take(meter: &mut Meter, count: u16, at_once: u16, apart: Duration) -> usize {
        let mut timed = 0;
        for n in 0..count {
            if n % at_once == 0 {
                meter.saw(at_once);
            }
            if !apart.is_zero() {
                std::thread::sleep(apart);
            }
            let this = meter.took(0);
            timed += usize::from(this.is_some());
            meter.gave_back(0, this);
        }
        timed
    }

    #[test]
    fn slow_requests_are_all_timed_and_quick_ones_seldom() {
        let mut meter = Meter::new(Arc::default());
        assert_eq!(take(&mut meter, 20, 1, Duration::from_micros(100)), 20);
        let quick = take(&mut meter, 60_000, 1, Duration::ZERO);
        assert!(quick < 30_000, "{quick} of 60000");
    }

    #[test]
    fn those_that_are_timed_stand_for_the_others() {
        let mut meter = Meter::new(Arc::default());
        take(&mut meter, 60_000, 32, Duration::ZERO);
        let counts = meter.stats.snapshot();
        assert_eq!(counts.requests, 60_000);
        let stood_for = counts.queued.count();
        assert!((60_000 - u64::from(MAX_INTERVAL)..=60_000).contains(&stood_for), "{stood_for}");
        assert_eq!(counts.processing.count(), stood_for);
    }

    #[test]
    fn a_request_that_was_put_back_was_never_taken() {
        let mut meter = Meter::new(Arc::default());
        for n in 0..20_000u32 {
            meter.saw(1);
            let first = meter.took(7);
            if n % 3 != 0 {
                meter.put_back(7, first);
                continue;
            }
            meter.gave_back(1, first);
        }
        let counts = meter.stats.snapshot();
        assert_eq!((counts.requests, counts.completed, counts.bytes_in), (6667, 6667, 6667 * 7));
        let stood_for = counts.queued.count();
        assert!((6667 - u64::from(MAX_INTERVAL)..=6667).contains(&stood_for), "{stood_for}");
        assert_eq!(counts.processing.count(), stood_for);
    }

    #[test]
    fn the_time_in_the_queue_begins_when_the_requests_were_seen() {
        let mut meter = Meter::new(Arc::default());
        take(&mut meter, 3, 3, Duration::from_millis(2));
        let counts = meter.stats.snapshot();
        assert!(counts.queued.max() >= Duration::from_millis(6), "{:?}", counts.queued.max());
        assert!(counts.processing.max() < counts.queued.max());
    }
}
