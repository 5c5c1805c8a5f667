//! Reads the results of single tests out of what the test runners print.

/// The results of one test runner.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Results {
    /// How many tests passed.
    pub passed: usize,
    /// The names of the tests that failed.
    pub failed: Vec<String>,
    /// The names of the tests that are marked as ignored.
    pub ignored: Vec<String>,
}

/// Reads a line of `cargo nextest run --status-level all`, like `PASS [   0.005s] (1/9) crate::binary module::test`.
pub fn of_nextest_line(line: &str, results: &mut Results) {
    let line = line.trim();
    let Some((status, rest)) = line.split_once('[') else { return };
    let Some((_, rest)) = rest.split_once(']') else { return };
    let name = rest.trim().split_once(") ").map_or(rest.trim(), |(_, name)| name.trim());
    match status.trim() {
        "PASS" | "LEAK" => results.passed += 1,
        "SKIP" => results.ignored.push(name.to_owned()),
        "FAIL" | "ABORT" | "TIMEOUT" | "LEAK-FAIL" | "XFAIL" => results.failed.push(name.to_owned()),
        // A test that a signal ended has the signal's name here.
        signal if signal.starts_with("SIG") => results.failed.push(name.to_owned()),
        _ => {}
    }
}

/// Reads a line of `cargo test`, like `test module::test ... ok`.
pub fn of_libtest_line(line: &str, results: &mut Results) {
    let Some((name, result)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) else {
        return;
    };
    match result.split([',', ' ']).next() {
        Some("ok") => results.passed += 1,
        Some("FAILED") => results.failed.push(name.to_owned()),
        Some("ignored") => results.ignored.push(name.to_owned()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &str, parse: fn(&str, &mut Results)) -> Results {
        let mut results = Results::default();
        lines.lines().for_each(|line| parse(line, &mut results));
        results
    }

    #[test]
    fn results_of_nextest_are_counted_and_failures_named() {
        let text = "\
            \x20   Starting 4 tests across 2 binaries\n\
            \x20       PASS [   0.005s] (1/4) krate a::passes\n\
            \x20       FAIL [   0.005s] (2/4) krate::bin/x a::fails\n\
            \x20    SIGSEGV [   0.005s] (3/4) krate a::crashes\n\
            \x20       SKIP [         ] (4/4) krate a::ignored\n\
            \x20    Summary [   0.028s] 3 tests run: 1 passed, 2 failed, 1 skipped\n";
        let expected = Results {
            passed: 1,
            failed: vec!["krate::bin/x a::fails".into(), "krate a::crashes".into()],
            ignored: vec!["krate a::ignored".into()],
        };
        assert_eq!(read(text, of_nextest_line), expected);
    }

    #[test]
    fn results_of_libtest_are_counted_and_failures_named() {
        let text = "running 4 tests\n\
            test a::passes ... ok\n\
            test src/lib.rs - (line 3) - compile ... ok\n\
            test a::fails ... FAILED\n\
            test a::ignored ... ignored, needs more\n\
            test result: FAILED. 2 passed; 1 failed; 1 ignored\n";
        let expected =
            Results { passed: 2, failed: vec!["a::fails".into()], ignored: vec!["a::ignored".into()] };
        assert_eq!(read(text, of_libtest_line), expected);
    }
}
