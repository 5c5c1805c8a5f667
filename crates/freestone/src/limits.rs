//! Limits on the command line: so much a second, or a bucket of tokens to the letter.

use std::time::Duration;

use freestone_vmm::virtio::rate::{RateLimiter, TokenBucket};

use crate::disk::positive;
use crate::size;

/// Bytes: `RATE` a second, or `SIZE/BURST/TIME`: a bucket of SIZE that fills in TIME, and BURST beyond it once.
pub(crate) fn bytes(text: &str) -> Result<TokenBucket, String> {
    bucket(text, size::parse_rate, size::parse_bytes)
}

/// Operations, likewise.
pub(crate) fn operations(text: &str) -> Result<TokenBucket, String> {
    bucket(text, positive, |text| text.parse().map_err(|_| format!("{text:?} is not a number")))
}

fn bucket(
    text: &str,
    size: impl Fn(&str) -> Result<u64, String>,
    burst: impl Fn(&str) -> Result<u64, String>,
) -> Result<TokenBucket, String> {
    let mut parts = text.split('/');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(rate), None, ..) => Ok(TokenBucket::per_second(size(rate)?)),
        (Some(held), Some(once), Some(time), None) => {
            Ok(TokenBucket::new(size(held)?, duration(time)?).one_time_burst(burst(once)?))
        }
        _ => Err("say RATE, in a second, or SIZE/BURST/TIME as 10M/0/100ms".to_owned()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time: write it like 100ms or 2s");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s').ok_or_else(wrong)?, 1000),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let millis = number.checked_mul(unit).filter(|&millis| millis > 0).ok_or_else(wrong)?;
    Ok(Duration::from_millis(millis))
}

/// A limiter of what is limited, if anything is.
pub(crate) fn limiter(bandwidth: Option<TokenBucket>, ops: Option<TokenBucket>) -> Option<RateLimiter> {
    if bandwidth.is_none() && ops.is_none() {
        return None;
    }
    let limiter = bandwidth.into_iter().fold(RateLimiter::new(), RateLimiter::bandwidth);
    Some(ops.into_iter().fold(limiter, RateLimiter::ops))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_bucket_of_a_second() {
        assert_eq!(bytes("10M"), Ok(TokenBucket::per_second(10 << 20)));
        assert_eq!(operations("500"), Ok(TokenBucket::per_second(500)));
    }

    #[test]
    fn a_bucket_has_a_size_a_burst_and_a_time() {
        let exact = TokenBucket::new(1000, Duration::from_millis(250)).one_time_burst(7);
        assert_eq!(bytes("1000b/7b/250ms"), Ok(exact));
        assert_eq!(operations("1000/7/250ms"), Ok(exact));
        assert_eq!(bytes("1M/0/2s"), Ok(TokenBucket::new(1 << 20, Duration::from_secs(2))));
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for text in
            ["0", "", "1/2", "1/2/3", "1/2/0ms", "1/2/3ms/4", "0/0/1s", "1/x/1s", "1/0/99999999999999999999s"]
        {
            assert!(bytes(text).is_err() && operations(text).is_err(), "{text}");
        }
    }
}
