//! [`Limiter`]: so many units per second, and not all at once.
//!
//! A token bucket kept as one number, the time at which the bucket will be full again (the generic cell rate algorithm of ITU-T
//! I.371): no lock, and nothing to refill.

use std::sync::atomic::{AtomicU64, Ordering};

const SECOND: u64 = 1_000_000_000;
/// What may come at once: as much as in a tenth of a second.
const BURST: u64 = SECOND / 10;

/// So many frames and bytes per second. 0 lets nothing through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// Frames per second; `None`: any number.
    pub frames: Option<u64>,
    /// Bytes per second; `None`: any number.
    pub bytes: Option<u64>,
}

/// One limit.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    full_at: AtomicU64,
}

impl Bucket {
    fn new(per_second: u64) -> Self {
        Self { per_second, full_at: AtomicU64::new(0) }
    }

    /// Takes `units` at the time `now` in nanoseconds. What is larger than the burst passes when the bucket is not empty, and is
    /// waited for afterwards.
    fn allow(&self, now: u64, units: u64) -> bool {
        if self.per_second == 0 {
            return false;
        }
        let cost = units.saturating_mul(SECOND) / self.per_second;
        self.full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                (full_at <= now.saturating_add(BURST)).then(|| full_at.max(now).saturating_add(cost))
            })
            .is_ok()
    }

    /// Takes `units`, whether they are there or not: they are waited for afterwards.
    fn charge(&self, now: u64, units: u64) {
        let cost = units.saturating_mul(SECOND).checked_div(self.per_second).unwrap_or(0);
        let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            Some(full_at.max(now).saturating_add(cost))
        });
    }
}

/// Limits of what one port sends.
#[derive(Debug)]
pub(super) struct Limiter {
    frames: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Limiter {
    pub(super) fn new(rate: Rate) -> Self {
        Self { frames: rate.frames.map(Bucket::new), bytes: rate.bytes.map(Bucket::new) }
    }

    /// A frame that passed became so many more.
    pub(super) fn charge(&self, now: u64, frames: usize) {
        if let Some(bucket) = &self.frames {
            bucket.charge(now, frames as u64);
        }
    }

    /// Whether a frame of `len` bytes may pass at the time `now` in nanoseconds.
    pub(super) fn allow(&self, now: u64, len: usize) -> bool {
        self.frames.as_ref().is_none_or(|bucket| bucket.allow(now, 1))
            && self.bytes.as_ref().is_none_or(|bucket| bucket.allow(now, len as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_holds_over_time_and_a_burst_passes_at_once() {
        let limiter = Limiter::new(Rate { frames: Some(100), bytes: None });
        let at_once = (0..1000).filter(|_| limiter.allow(SECOND, 60)).count();
        assert_eq!(at_once, 11);
        let then = (1..=1000).filter(|ms| limiter.allow(SECOND + ms * 1_000_000, 60)).count();
        assert_eq!(then, 100);
    }

    #[test]
    fn bytes_are_limited_by_the_length_of_frames() {
        let limiter = Limiter::new(Rate { frames: None, bytes: Some(1_000_000) });
        let passed = (0..10_000u64).filter(|ms| limiter.allow(ms * 1_000_000, 1500)).count();
        assert!((6660..6800).contains(&passed), "{passed}");
    }

    #[test]
    fn no_rate_lets_all_through_and_zero_nothing() {
        let open = Limiter::new(Rate::default());
        assert!((0..1000).all(|_| open.allow(0, 65_000)));
        let shut = Limiter::new(Rate { frames: Some(0), bytes: None });
        assert!((0..10).all(|s| !shut.allow(s * SECOND, 60)));
    }

    #[test]
    fn a_frame_larger_than_the_burst_passes_alone() {
        let limiter = Limiter::new(Rate { frames: None, bytes: Some(1000) });
        assert!(limiter.allow(0, 65_000));
        assert!(!limiter.allow(SECOND, 60));
        assert!(limiter.allow(66 * SECOND, 60));
    }
}
