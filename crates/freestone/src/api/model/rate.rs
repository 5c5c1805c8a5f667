//! Rate limiters.

use std::time::Duration;

use freestone_vmm::virtio::rate;
use serde::{Deserialize, Serialize};

/// Limits of bytes and of operations. In an update, a bucket that is left out stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RateLimiter {
    /// Tokens are bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bandwidth: Option<TokenBucket>,
    /// Tokens are operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ops: Option<TokenBucket>,
}

/// A bucket of tokens; without a size or a time there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenBucket {
    /// Tokens that the bucket holds.
    pub(crate) size: u64,
    /// Tokens beyond them, once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills.
    pub(crate) refill_time: u64,
}

impl RateLimiter {
    /// What this is after `update`.
    pub(crate) fn updated(self, update: &Self) -> Self {
        Self { bandwidth: update.bandwidth.or(self.bandwidth), ops: update.ops.or(self.ops) }
    }

    /// What limits a device, told in these words.
    pub(crate) fn of(bandwidth: Option<rate::TokenBucket>, ops: Option<rate::TokenBucket>) -> Option<Self> {
        let limiter = Self { bandwidth: bandwidth.map(TokenBucket::of), ops: ops.map(TokenBucket::of) };
        (limiter != Self::default()).then_some(limiter)
    }

    /// The device's limiter, if anything is limited.
    pub(crate) fn limiter(&self) -> Option<rate::RateLimiter> {
        let bandwidth = self.bandwidth.and_then(TokenBucket::bucket);
        let ops = self.ops.and_then(TokenBucket::bucket);
        if bandwidth.is_none() && ops.is_none() {
            return None;
        }
        let limiter = bandwidth.into_iter().fold(rate::RateLimiter::new(), rate::RateLimiter::bandwidth);
        Some(ops.into_iter().fold(limiter, rate::RateLimiter::ops))
    }
}

impl TokenBucket {
    /// A device's bucket, told in these words.
    pub(crate) fn of(bucket: rate::TokenBucket) -> Self {
        Self {
            size: bucket.size,
            one_time_burst: Some(bucket.one_time_burst).filter(|&burst| burst > 0),
            refill_time: u64::try_from(bucket.refill_time.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// The device's bucket, if this limits anything.
    pub(crate) fn bucket(self) -> Option<rate::TokenBucket> {
        (self.size > 0 && self.refill_time > 0).then(|| {
            let bucket = rate::TokenBucket::new(self.size, Duration::from_millis(self.refill_time));
            bucket.one_time_burst(self.one_time_burst.unwrap_or(0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(size: u64, refill_time: u64) -> TokenBucket {
        TokenBucket { size, one_time_burst: None, refill_time }
    }

    #[test]
    fn a_bucket_without_size_or_time_limits_nothing() {
        assert!(bucket(0, 100).bucket().is_none());
        assert!(bucket(100, 0).bucket().is_none());
        assert!(RateLimiter { bandwidth: Some(bucket(0, 0)), ops: None }.limiter().is_none());
        let limiter = RateLimiter { bandwidth: None, ops: Some(bucket(5, 1000)) }.limiter().unwrap();
        assert!(limiter.bandwidth.is_none());
        assert_eq!(limiter.ops.unwrap().refill_time, Duration::from_secs(1));
    }

    #[test]
    fn an_update_changes_the_buckets_that_it_names() {
        let now = RateLimiter { bandwidth: Some(bucket(1, 1)), ops: Some(bucket(2, 2)) };
        let update = RateLimiter { bandwidth: None, ops: Some(bucket(0, 0)) };
        let after = now.updated(&update);
        assert_eq!(after, RateLimiter { bandwidth: Some(bucket(1, 1)), ops: Some(bucket(0, 0)) });
    }
}
