//! [`Admission`]: how many new things there may be in a second.

use std::time::{Duration, Instant};

/// A token bucket of one second's worth. Each part has its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Admission {
    /// In a second, and at once.
    rate: u32,
    /// What was there at `since`, in billionths: a nanosecond adds `rate` of them.
    billionths: u64,
    since: Option<Instant>,
}

const ONE: u64 = 1_000_000_000;

impl Admission {
    pub(super) fn new(rate: u32) -> Self {
        Self { rate, billionths: u64::from(rate) * ONE, since: None }
    }

    /// Whether one more may be, which is then taken.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let passed = now.saturating_duration_since(since).min(Duration::from_secs(1));
        let added = u64::try_from(passed.as_nanos()).unwrap_or(ONE) * u64::from(self.rate);
        self.billionths = self.billionths.saturating_add(added).min(u64::from(self.rate) * ONE);
        self.since = Some(now.max(since));
        match self.billionths.checked_sub(ONE) {
            Some(left) => {
                self.billionths = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_rate_are_admitted_at_once_and_in_each_second() {
        let mut admission = Admission::new(10);
        let start = Instant::now();
        let mut admitted = |millis| {
            let now = start + Duration::from_millis(millis);
            (0..100).filter(|_| admission.admit(now)).count()
        };
        assert_eq!(admitted(0), 10);
        assert_eq!(admitted(50), 0);
        assert_eq!(admitted(100), 1);
        assert_eq!(admitted(600), 5);
        assert_eq!(admitted(500), 0, "time that goes back adds nothing");
        assert_eq!(admitted(3_600_000), 10);
    }

    #[test]
    fn a_rate_of_nothing_admits_nothing_and_the_largest_does_not_overflow() {
        let start = Instant::now();
        assert!(!Admission::new(0).admit(start));
        let mut admission = Admission::new(u32::MAX);
        assert!(admission.admit(start) && admission.admit(start + Duration::from_secs(9)));
    }
}
