//! Counting of checks and measuring of time.

use core::fmt;

use freestone_guest_program::println;

/// What has been checked so far.
pub struct Report {
    passed: u32,
    failed: u32,
    tsc_khz: Option<u64>,
}

impl Report {
    /// Nothing checked yet, on a processor with this time stamp counter frequency.
    pub fn new(tsc_khz: Option<u64>) -> Self {
        Self { passed: 0, failed: 0, tsc_khz }
    }

    /// Prints and counts a check; returns whether it passed.
    pub fn check(&mut self, part: &str, what: fmt::Arguments<'_>, passed: bool) -> bool {
        if passed {
            self.passed += 1;
            println!("  ok      {part}: {what}");
        } else {
            self.failed += 1;
            println!("  FAILED  {part}: {what}");
        }
        passed
    }

    /// Checks that passed.
    pub fn passed(&self) -> u32 {
        self.passed
    }

    /// Checks that failed.
    pub fn failed(&self) -> u32 {
        self.failed
    }

    /// Frequency of the time stamp counter, if known.
    pub fn tsc_khz(&self) -> Option<u64> {
        self.tsc_khz
    }

    /// Ticks of the time stamp counter in microseconds.
    pub fn microseconds(&self, ticks: u64) -> Option<u64> {
        ticks.saturating_mul(1000).checked_div(self.tsc_khz?)
    }

    /// `bytes` in `ticks`, as text.
    pub fn rate(&self, bytes: u64, ticks: u64) -> Rate {
        Rate(self.microseconds(ticks).and_then(|us| (bytes * 1_000_000 / (1 << 20)).checked_div(us)))
    }
}

/// MiB per second, if the time is known.
pub struct Rate(Option<u64>);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => write!(f, ", {rate} MiB/s"),
            None => Ok(()),
        }
    }
}
