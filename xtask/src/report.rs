//! Counts what passed, failed and was skipped, and prints the one summary at the end of `cargo xtask test`.

use std::collections::BTreeMap;
use std::fmt;

/// The results of all tests so far.
#[derive(Debug, Default)]
pub struct Report {
    passed: usize,
    failed: Vec<(String, String)>,
    skipped: BTreeMap<String, String>,
}

impl Report {
    /// Counts passed tests.
    pub fn pass(&mut self, count: usize) {
        self.passed += count;
    }

    /// Counts a failed test.
    pub fn fail(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.failed.push((name.into(), reason.into()));
    }

    /// Counts a test that was not run.
    pub fn skip(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.skipped.insert(name.into(), reason.into().replace('\n', "; "));
    }

    /// Counts tests that a test runner took for passed but that wrote into the skip log that they were not run.
    pub fn skip_passed(&mut self, log: &str) {
        for (name, reason) in read_skip_log(log) {
            if self.skipped.insert(name, reason).is_none() {
                self.passed = self.passed.saturating_sub(1);
            }
        }
    }

    /// Whether no test failed.
    pub fn is_success(&self) -> bool {
        self.failed.is_empty()
    }
}

/// Reads lines of a test's name and the reason, with a tab between them. A test may have written more than one line.
fn read_skip_log(log: &str) -> BTreeMap<String, String> {
    log.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.split_once('\t').unwrap_or((line, "no reason given")))
        .map(|(name, reason)| (name.to_owned(), reason.to_owned()))
        .collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, reason) in &self.skipped {
            writeln!(f, "SKIPPED {name}: {reason}")?;
        }
        for (name, reason) in &self.failed {
            writeln!(f, "FAILED {name}: {reason}")?;
        }
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_in_the_skip_log_counts_as_skipped_and_not_as_passed() {
        let mut report = Report::default();
        report.pass(3);
        report.skip_passed("a::b\tno /dev/kvm\na::b\tno /dev/kvm\n");
        assert_eq!(report.to_string(), "SKIPPED a::b: no /dev/kvm\n2 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn a_failed_test_is_named_with_its_reason() {
        let mut report = Report::default();
        report.pass(1);
        report.fail("fmt", "status 1");
        assert_eq!(report.to_string(), "FAILED fmt: status 1\n1 passed, 1 failed, 0 skipped");
        assert!(!report.is_success());
    }
}
