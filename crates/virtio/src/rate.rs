//! Rate limits: token buckets for requests and bytes.
//!
//! [`RateLimiter`] says what the limit is. [`Meter`] keeps account of it: pure logic, the time is an argument. [`Throttle`] is a
//! meter that the workers of a device share and that can be exchanged while they work; [`Gate`] is one worker's side of it,
//! with the timer that wakes the worker when it may go on.
//!
//! A worker asks before it takes a request, and pays when it knows what the request costs. So requests that must wait stay in
//! their queue, in order; and a request may cost more than there is, or more than the bucket holds: the next one waits until
//! that is paid. In the long run the limit holds.

mod throttle;

use std::time::Duration;

pub use throttle::{Gate, Throttle};

/// A bucket of tokens that fills at a constant rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TokenBucket {
    /// Tokens it holds, and holds at first: the largest burst.
    pub size: u64,
    /// Tokens beyond those, to be spent once.
    pub one_time_burst: u64,
    /// Time in which an empty bucket becomes full; up to 584 years, more is as that.
    pub refill_time: Duration,
}

impl TokenBucket {
    /// `size` tokens in every `refill_time`. If either is 0 there is no limit.
    pub fn new(size: u64, refill_time: Duration) -> Self {
        Self { size, one_time_burst: 0, refill_time }
    }

    /// `rate` tokens per second, as a bucket for one second.
    pub fn per_second(rate: u64) -> Self {
        Self::new(rate, Duration::from_secs(1))
    }

    /// Sets [`one_time_burst`](Self::one_time_burst).
    #[must_use]
    pub fn one_time_burst(mut self, tokens: u64) -> Self {
        self.one_time_burst = tokens;
        self
    }
}

/// Limits of a device. The default is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RateLimiter {
    /// Limit of bytes of data.
    pub bandwidth: Option<TokenBucket>,
    /// Limit of requests.
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// No limits.
    pub fn new() -> Self {
        Self::default()
    }

    /// Limits bytes.
    #[must_use]
    pub fn bandwidth(mut self, bucket: TokenBucket) -> Self {
        self.bandwidth = Some(bucket);
        self
    }

    /// Limits requests.
    #[must_use]
    pub fn ops(mut self, bucket: TokenBucket) -> Self {
        self.ops = Some(bucket);
        self
    }
}

/// What is left of the tokens of a [`RateLimiter`].
///
/// All times are nanoseconds since a moment of the caller's choice. A time before the last one is as the last one.
#[derive(Debug, Clone)]
pub struct Meter {
    bytes: Option<Level>,
    ops: Option<Level>,
}

impl Meter {
    /// Full buckets at the time `now`.
    pub fn new(limiter: &RateLimiter, now: u64) -> Self {
        let level = |bucket: Option<TokenBucket>| bucket.and_then(|bucket| Level::new(bucket, now));
        Self { bytes: level(limiter.bandwidth), ops: level(limiter.ops) }
    }

    /// Nanoseconds until another request may go: 0 means that it may now. It may as soon as there is one token of each kind.
    pub fn wait(&mut self, now: u64) -> u64 {
        self.longest(now, |level| level.wait_for(level.price(u64::from(level.burst == 0))))
    }

    /// Pays for `ops` requests with `bytes` bytes in total. What there is not enough for is owed.
    pub fn charge(&mut self, now: u64, bytes: u64, ops: u64) {
        for (level, tokens) in [(&mut self.bytes, bytes), (&mut self.ops, ops)] {
            if let Some(level) = level {
                level.refill(now);
                level.pay(tokens);
            }
        }
    }

    /// Pays for `ops` requests with `bytes` bytes in total if there is enough: all or nothing. What is more than a bucket holds
    /// may go when the bucket is full.
    ///
    /// # Errors
    /// Otherwise, after how many nanoseconds to try again.
    pub fn take(&mut self, now: u64, bytes: u64, ops: u64) -> Result<(), u64> {
        let wait = [(&mut self.bytes, bytes), (&mut self.ops, ops)].into_iter().map(|(level, tokens)| {
            level.as_mut().map_or(0, |level| {
                level.refill(now);
                level.wait_for(level.price(tokens.saturating_sub(level.burst)).min(level.full()))
            })
        });
        match wait.max() {
            None | Some(0) => {
                self.charge(now, bytes, ops);
                Ok(())
            }
            Some(wait) => Err(wait),
        }
    }

    fn longest(&mut self, now: u64, wait: impl Fn(&Level) -> u64) -> u64 {
        let levels = [&mut self.bytes, &mut self.ops].into_iter().flatten();
        let waits = levels.map(|level| {
            level.refill(now);
            wait(level)
        });
        waits.max().unwrap_or(0)
    }
}

/// One bucket. Amounts are in parts of a token so that nothing is ever rounded: a token is `refill` parts, and every nanosecond
/// brings `size` parts. Both are less than 2^64, so the product of each with a number of tokens or nanoseconds fits in 128 bits.
#[derive(Debug, Clone)]
struct Level {
    size: u64,
    /// Nanoseconds.
    refill: u64,
    /// Whole tokens.
    burst: u64,
    credit: u128,
    debt: u128,
    last: u64,
}

impl Level {
    /// `None` if the bucket is no limit.
    fn new(bucket: TokenBucket, now: u64) -> Option<Self> {
        let refill = u64::try_from(bucket.refill_time.as_nanos()).unwrap_or(u64::MAX);
        if bucket.size == 0 || refill == 0 {
            return None;
        }
        let mut level =
            Self { size: bucket.size, refill, burst: bucket.one_time_burst, credit: 0, debt: 0, last: now };
        level.credit = level.full();
        Some(level)
    }

    fn full(&self) -> u128 {
        self.price(self.size)
    }

    fn price(&self, tokens: u64) -> u128 {
        u128::from(tokens) * u128::from(self.refill)
    }

    fn refill(&mut self, now: u64) {
        let earned = u128::from(now.saturating_sub(self.last)) * u128::from(self.size);
        self.last = self.last.max(now);
        let repaid = earned.min(self.debt);
        self.debt -= repaid;
        self.credit = self.credit.saturating_add(earned - repaid).min(self.full());
    }

    /// Nanoseconds until nothing is owed and there is `credit`.
    fn wait_for(&self, credit: u128) -> u64 {
        let missing = self.debt.saturating_add(credit.saturating_sub(self.credit));
        u64::try_from(missing.div_ceil(u128::from(self.size))).unwrap_or(u64::MAX)
    }

    fn pay(&mut self, tokens: u64) {
        let once = tokens.min(self.burst);
        self.burst -= once;
        let price = self.price(tokens - once);
        let paid = price.min(self.credit);
        self.credit -= paid;
        self.debt = self.debt.saturating_add(price - paid);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn ops(size: u64, millis: u64) -> Meter {
        let bucket = TokenBucket::new(size, Duration::from_millis(millis));
        Meter::new(&RateLimiter::new().ops(bucket), 0)
    }

    #[test]
    fn a_full_bucket_is_spent_and_then_fills_at_its_rate() {
        let mut meter = ops(10, 100);
        for _ in 0..10 {
            assert_eq!(meter.take(0, 4096, 1), Ok(()));
        }
        assert_eq!(meter.take(0, 4096, 1), Err(10 * MS));
        assert_eq!(meter.take(10 * MS - 1, 4096, 1), Err(1));
        assert_eq!(meter.take(10 * MS, 4096, 1), Ok(()));
        assert_eq!(meter.take(10 * MS, 4096, 1), Err(10 * MS));
    }

    #[test]
    fn an_idle_bucket_holds_no_more_than_its_size() {
        let mut meter = ops(10, 100);
        assert_eq!(meter.take(u64::MAX, 0, 10), Ok(()));
        assert_eq!(meter.take(u64::MAX, 0, 1), Err(10 * MS));
    }

    #[test]
    fn the_one_time_burst_is_spent_first_and_once() {
        let bucket = TokenBucket::new(10, Duration::from_millis(100)).one_time_burst(5);
        let mut meter = Meter::new(&RateLimiter::new().ops(bucket), 0);
        assert_eq!(meter.take(0, 0, 15), Ok(()));
        assert_eq!(meter.take(0, 0, 1), Err(10 * MS));
        assert_eq!(meter.take(1000 * MS, 0, 10), Ok(()));
        assert_eq!(meter.take(1000 * MS, 0, 1), Err(10 * MS));
    }

    #[test]
    fn a_request_larger_than_the_bucket_goes_when_it_is_full_and_the_next_waits_until_it_is_paid() {
        let mut meter = ops(10, 100);
        assert_eq!(meter.take(0, 0, 1), Ok(()));
        assert_eq!(meter.take(0, 0, 25), Err(10 * MS));
        assert_eq!(meter.take(10 * MS, 0, 25), Ok(()));
        assert_eq!(meter.take(10 * MS, 0, 1), Err(160 * MS));
        assert_eq!(meter.wait(10 * MS), 160 * MS);
        assert_eq!(meter.take(170 * MS, 0, 1), Ok(()));
    }

    #[test]
    fn what_is_charged_beyond_the_tokens_is_owed() {
        let mut meter = ops(10, 100);
        assert_eq!(meter.wait(0), 0);
        meter.charge(0, 0, 30);
        assert_eq!(meter.wait(0), 210 * MS);
        assert_eq!(meter.wait(210 * MS), 0);
    }

    #[test]
    fn both_limits_must_have_enough_and_neither_is_charged_alone() {
        let limiter = RateLimiter::new()
            .bandwidth(TokenBucket::new(1000, Duration::from_millis(1000)))
            .ops(TokenBucket::new(2, Duration::from_millis(100)));
        let mut meter = Meter::new(&limiter, 0);
        assert_eq!(meter.take(0, 600, 1), Ok(()));
        assert_eq!(meter.take(0, 600, 1), Err(200 * MS));
        assert_eq!(meter.take(0, 400, 1), Ok(()), "the request before cost no operation");
        assert_eq!(meter.take(0, 0, 1), Err(50 * MS));
    }

    #[test]
    fn a_bucket_of_no_size_or_no_time_is_no_limit() {
        for bucket in [TokenBucket::new(0, Duration::from_secs(1)), TokenBucket::new(5, Duration::ZERO)] {
            let mut meter = Meter::new(&RateLimiter::new().ops(bucket).bandwidth(bucket), 0);
            assert_eq!(meter.take(0, u64::MAX, u64::MAX), Ok(()));
            assert_eq!(meter.take(0, u64::MAX, u64::MAX), Ok(()));
        }
    }

    #[test]
    fn a_clock_that_goes_back_brings_nothing() {
        let mut meter = ops(1, 100);
        assert_eq!(meter.take(500 * MS, 0, 1), Ok(()));
        assert_eq!(meter.take(0, 0, 1), Err(100 * MS));
        assert_eq!(meter.take(500 * MS, 0, 1), Err(100 * MS));
    }

    proptest! {
        /// Whoever comes again when told to is served then, whatever was asked before, and never gets more than the bucket,
        /// the burst and the rate allow, but for one request that is larger than the bucket.
        #[test]
        fn the_rate_holds_and_nobody_starves(
            size in 1u64..10_000,
            burst in 0u64..10_000,
            refill_ms in 1u64..10_000,
            requests in prop::collection::vec((0u64..20_000, 0u64..50_000_000), 1..200),
        ) {
            let bucket = TokenBucket::new(size, Duration::from_millis(refill_ms)).one_time_burst(burst);
            let mut meter = Meter::new(&RateLimiter::new().bandwidth(bucket), 0);
            let (mut now, mut total, mut largest) = (0, 0u64, 0u64);
            for (bytes, idle) in requests {
                now += idle;
                if let Err(wait) = meter.take(now, bytes, 1) {
                    prop_assert!(meter.take(now + wait - 1, bytes, 1).is_err(), "told to wait too long");
                    now += wait;
                    prop_assert_eq!(meter.take(now, bytes, 1), Ok(()));
                }
                total += bytes;
                largest = largest.max(bytes.saturating_sub(size));
                let earned = u128::from(now) * u128::from(size) / u128::from(refill_ms * MS);
                let limit = earned + u128::from(size + burst + largest);
                prop_assert!(u128::from(total) <= limit, "{total} of {limit}");
            }
        }

        /// The same for a worker that asks first and pays afterwards: it may be ahead by one request.
        #[test]
        fn the_rate_holds_for_those_who_pay_afterwards(
            size in 1u64..10_000,
            burst in 0u64..10_000,
            refill_ms in 1u64..10_000,
            requests in prop::collection::vec((1u64..20_000, 0u64..50_000_000), 1..200),
        ) {
            let bucket = TokenBucket::new(size, Duration::from_millis(refill_ms)).one_time_burst(burst);
            let mut meter = Meter::new(&RateLimiter::new().bandwidth(bucket), 0);
            let (mut now, mut total) = (0, 0u64);
            for (bytes, idle) in requests {
                now += idle;
                now += meter.wait(now);
                prop_assert_eq!(meter.wait(now), 0);
                let earned = u128::from(now) * u128::from(size) / u128::from(refill_ms * MS);
                prop_assert!(u128::from(total) < earned + u128::from(size + burst));
                meter.charge(now, bytes, 1);
                total += bytes;
            }
        }

        /// A busy worker gets all of the rate, not less.
        #[test]
        fn nothing_of_the_rate_is_lost(size in 1u64..1_000_000, refill_ms in 1u64..10_000, bytes in 1u64..100_000) {
            let bucket = TokenBucket::new(size, Duration::from_millis(refill_ms));
            let mut meter = Meter::new(&RateLimiter::new().bandwidth(bucket), 0);
            let (mut now, mut total) = (0, 0u64);
            for _ in 0..100 {
                now += meter.wait(now);
                meter.charge(now, bytes, 1);
                total += bytes;
            }
            let earned = u128::from(now) * u128::from(size) / u128::from(refill_ms * MS);
            prop_assert!(u128::from(total) + u128::from(bytes) >= earned);
        }

        #[test]
        fn no_values_overflow(
            size: u64, burst: u64, secs: u64, times: [u64; 4], bytes: [u64; 4], ops: [u64; 4],
        ) {
            let bucket = TokenBucket::new(size, Duration::from_secs(secs)).one_time_burst(burst);
            let mut meter = Meter::new(&RateLimiter::new().bandwidth(bucket).ops(bucket), 0);
            for ((now, bytes), ops) in times.into_iter().zip(bytes).zip(ops) {
                let _ = meter.take(now, bytes, ops);
                meter.charge(now, bytes, ops);
                meter.charge(now, u64::MAX, u64::MAX);
                let _ = meter.wait(now);
            }
        }
    }
}
