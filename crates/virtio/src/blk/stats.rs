//! What a block device did, and what the log hears of its errors.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Milliseconds between two messages on errors of the host.
const QUIET: u64 = 10_000;

/// Counts what a [`Block`](super::Block) device did; to be read at any time, from any thread.
#[derive(Debug, Default)]
pub struct BlkStats {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) discards: AtomicU64,
    pub(super) write_zeroes: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) host_errors: AtomicU64,
}

/// [`BlkStats`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BlkCounts {
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Flushes that the driver asked for and that succeeded.
    pub flushes: u64,
    /// Discards that succeeded.
    pub discards: u64,
    /// Write-zeroes that succeeded.
    pub write_zeroes: u64,
    /// Bytes read from the image.
    pub read_bytes: u64,
    /// Bytes written to the image.
    pub written_bytes: u64,
    /// Requests answered with an error, whoever caused it.
    pub errors: u64,
    /// Those of them that the host caused.
    pub host_errors: u64,
}

impl BlkStats {
    /// The counts so far. They are not taken at one instant.
    pub fn counts(&self) -> BlkCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkCounts {
            reads: get(&self.reads),
            writes: get(&self.writes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            write_zeroes: get(&self.write_zeroes),
            read_bytes: get(&self.read_bytes),
            written_bytes: get(&self.written_bytes),
            errors: get(&self.errors),
            host_errors: get(&self.host_errors),
        }
    }
}

impl fmt::Display for BlkCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            reads, writes, flushes, discards, write_zeroes, read_bytes, written_bytes, errors, ..
        } = self;
        write!(f, "{reads} reads ({read_bytes} bytes), {writes} writes ({written_bytes} bytes), ")?;
        if *discards > 0 {
            write!(f, "{discards} discards, ")?;
        }
        if *write_zeroes > 0 {
            write!(f, "{write_zeroes} write-zeroes, ")?;
        }
        write!(f, "{flushes} flushes, {errors} errors")
    }
}

/// Adds to a counter, which has few writers and many readers.
pub(super) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Lets one message on errors through at once, and then one in every ten seconds: a disk that fails fails every request.
#[derive(Debug)]
pub(super) struct ErrorLog {
    epoch: Instant,
    /// Milliseconds after the epoch, from 1; 0: never.
    last: AtomicU64,
    silent: AtomicU64,
}

impl ErrorLog {
    pub(super) fn new() -> Self {
        Self { epoch: Instant::now(), last: AtomicU64::new(0), silent: AtomicU64::new(0) }
    }

    /// Whether to say this one, and how many were not said before it.
    pub(super) fn admit(&self) -> Option<u64> {
        self.admit_at(
            u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX - 1).saturating_add(1),
        )
    }

    fn admit_at(&self, now: u64) -> Option<u64> {
        let last = self.last.load(Ordering::Relaxed);
        let due = last == 0 || now.saturating_sub(last) >= QUIET;
        // Of several threads at once, one says it.
        if due && self.last.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.silent.swap(0, Ordering::Relaxed));
        }
        self.silent.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_said_at_once_and_then_every_ten_seconds_with_their_number() {
        let log = ErrorLog::new();
        assert_eq!(log.admit_at(1), Some(0));
        assert_eq!(log.admit_at(1), None);
        assert_eq!(log.admit_at(10_000), None);
        assert_eq!(log.admit_at(10_001), Some(2));
        assert_eq!(log.admit_at(10_002), None);
        assert_eq!(log.admit_at(30_000), Some(1));
    }
}
