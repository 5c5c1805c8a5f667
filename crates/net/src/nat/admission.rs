//! How many new things there may be in a second: [`Admission`]; and how many at once: [`share_of_files`].

use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

/// One of `parts` of the files that this process may have open: beyond it, one part of a NAT would take them from all others.
pub(super) fn share_of_files(parts: u64) -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files.checked_div(parts).unwrap_or(files)).unwrap_or(usize::MAX)
}

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
    fn a_share_is_part_of_what_there_is() {
        let all = share_of_files(1);
        assert!(all > 0 && share_of_files(8) <= all.div_ceil(8));
        assert_eq!(share_of_files(0), all);
    }

    #[test]
    fn a_rate_of_nothing_admits_nothing_and_the_largest_does_not_overflow() {
        let start = Instant::now();
        assert!(!Admission::new(0).admit(start));
        let mut admission = Admission::new(u32::MAX);
        assert!(admission.admit(start) && admission.admit(start + Duration::from_secs(9)));
    }
}
