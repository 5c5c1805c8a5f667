//! `cargo xtask test`: every check and test of the repository, with one summary.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use crate::e2e;
use crate::examples;
use crate::lab;
use crate::machine::Start;
use crate::repo::{self, progress};
use crate::report::Report;
use crate::results::{self, Results};

/// The variable that names the file into which a test that cannot run writes its name, a tab and the reason.
pub const SKIP_LOG: &str = "FREESTONE_SKIP_LOG";
/// With this variable, end-to-end tests that cannot run for want of a program or a package fail.
const REQUIRE_E2E: &str = "FREESTONE_REQUIRE_E2E";

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub struct Options {
    /// Leave out the end-to-end tests.
    #[arg(long)]
    no_e2e: bool,
    /// Run only this: fmt, clippy, doc, unit, doctest, examples, e2e, or the end-to-end cases with this in their name. May be
    /// repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    #[command(flatten)]
    e2e: e2e::Settings,
}

/// The parts of the test run, in their order.
const STAGES: [&str; 7] = ["fmt", "clippy", "doc", "unit", "doctest", "examples", "e2e"];

/// Runs the tests; false when one failed.
pub fn run(options: &Options, lab_options: &lab::Contents) -> Result<bool> {
    let started = Instant::now();
    let skip_log = repo::lab_dir()?.join("skipped.tsv");
    fs::write(&skip_log, "").with_context(|| format!("writing {}", skip_log.display()))?;
    let mut report = Report::default();
    for stage in STAGES {
        if !selected(options, stage) {
            continue;
        }
        progress(format!("=== {stage}"));
        match stage {
            "fmt" => check(&mut report, stage, repo::cargo().args(["fmt", "--all", "--check"])),
            "clippy" => check(
                &mut report,
                stage,
                repo::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
            ),
            "doc" => check(
                &mut report,
                stage,
                repo::cargo().env("RUSTDOCFLAGS", "-D warnings").args(["doc", "--workspace", "--no-deps"]),
            ),
            "unit" => unit(&mut report, &skip_log),
            "doctest" => doctest(&mut report, &skip_log),
            "examples" => examples::run(&mut report)?,
            _ => end_to_end(&mut report, options, lab_options),
        }
    }
    let log = fs::read_to_string(&skip_log).with_context(|| format!("reading {}", skip_log.display()))?;
    report.skip_passed(&log);
    progress(format!("=== done in {:.0} s", started.elapsed().as_secs_f64()));
    println!("{report}");
    Ok(report.is_success())
}

/// Whether a stage is run. Names in `--only` that are no stage are of end-to-end cases.
fn selected(options: &Options, stage: &str) -> bool {
    if stage == "e2e" {
        let cases = options.only.iter().any(|name| name == "e2e" || !STAGES.contains(&name.as_str()));
        return !options.no_e2e && (options.only.is_empty() || cases);
    }
    options.only.is_empty() || options.only.iter().any(|name| name == stage)
}

/// A check that passes or fails as a whole.
fn check(report: &mut Report, name: &str, command: &mut Command) {
    match repo::run(command) {
        Ok(()) => report.pass(1),
        Err(error) => report.fail(name, format!("{error:#}")),
    }
}

/// Unit and integration tests, by nextest where it is installed.
fn unit(report: &mut Report, skip_log: &Path) {
    let nextest = repo::output(repo::cargo().args(["nextest", "--version"])).is_ok();
    let mut command = repo::cargo();
    if nextest {
        command.args(["nextest", "run", "--workspace", "--no-fail-fast", "--color", "never"]);
        command.args(["--status-level", "all", "--final-status-level", "none"]);
    } else {
        command.args([
            "test",
            "--workspace",
            "--no-fail-fast",
            "--lib",
            "--bins",
            "--tests",
            "--color",
            "never",
        ]);
    }
    let parser = if nextest { results::of_nextest_line } else { results::of_libtest_line };
    count(report, "unit tests", command.env(SKIP_LOG, skip_log), parser);
}

fn doctest(report: &mut Report, skip_log: &Path) {
    let mut command = repo::cargo();
    command
        .args(["test", "--workspace", "--doc", "--no-fail-fast", "--color", "never"])
        .env(SKIP_LOG, skip_log);
    count(report, "documentation tests", &mut command, results::of_libtest_line);
}

/// Runs a test runner, shows what it prints and counts its results. A runner that fails without a failed test (it did not
/// compile) is a failure of its own.
fn count(report: &mut Report, name: &str, command: &mut Command, parse: fn(&str, &mut Results)) {
    match stream(command, parse) {
        Ok((results, success)) => {
            report.pass(results.passed);
            for test in &results.ignored {
                report.skip(test, "ignored");
            }
            if !success && results.failed.is_empty() {
                report.fail(name, "the test runner failed; its messages are above");
            }
            for test in results.failed {
                report.fail(test, "its messages are above");
            }
        }
        Err(error) => report.fail(name, format!("{error:#}")),
    }
}

/// Runs a command with its output on our stderr, line by line, and lets `parse` see each line.
fn stream(command: &mut Command, parse: fn(&str, &mut Results)) -> Result<(Results, bool)> {
    let (reader, writer) = std::io::pipe().context("creating a pipe")?;
    let errors = writer.try_clone().context("duplicating a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("starting {}", repo::shown(command)))?;
    // The command holds the writing ends of the pipe, which would otherwise never end.
    *command = Command::new("true");
    let mut results = Results::default();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.context("reading a test runner's output")?;
        let line = String::from_utf8_lossy(&line);
        eprintln!("{line}");
        parse(&line, &mut results);
    }
    let status = child.wait().context("waiting for a test runner")?;
    Ok((results, status.success()))
}

/// Whether an end-to-end test that cannot run is a failure.
pub fn is_e2e_required() -> bool {
    std::env::var_os(REQUIRE_E2E).is_some()
}

fn end_to_end(report: &mut Report, options: &Options, lab_options: &lab::Contents) {
    let names: Vec<_> =
        options.only.iter().filter(|name| !STAGES.contains(&name.as_str())).cloned().collect();
    let cases = e2e::named(&names);
    let required = is_e2e_required();
    let result =
        Start::prepare(lab_options).and_then(|start| e2e::run(&start, cases.clone(), options.e2e, report));
    match result {
        Ok(()) => {}
        Err(error) if !required && error.downcast_ref::<crate::fetch::Unavailable>().is_some() => {
            for case in cases {
                report.skip(format!("e2e::{}", case.name), format!("{error:#}"));
            }
        }
        Err(error) => report.fail("e2e", format!("{error:#}")),
    }
}

/// Whether this machine has a /dev/kvm that this user may open; the error is the reason why not.
pub fn dev_kvm() -> Result<()> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("/dev/kvm cannot be opened")
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(no_e2e: bool, only: &[&str]) -> Options {
        let e2e = e2e::Settings::default();
        Options { no_e2e, only: only.iter().map(|&name| name.to_owned()).collect(), e2e }
    }

    #[test]
    fn everything_is_selected_unless_something_is_named() {
        assert!(STAGES.iter().all(|stage| selected(&options(false, &[]), stage)));
    }

    #[test]
    fn no_e2e_leaves_out_the_end_to_end_tests_alone() {
        let left: Vec<_> = STAGES.iter().filter(|stage| !selected(&options(true, &[]), stage)).collect();
        assert_eq!(left, [&"e2e"]);
    }

    #[test]
    fn a_named_stage_is_run_alone() {
        let run: Vec<_> = STAGES.iter().filter(|stage| selected(&options(false, &["fmt"]), stage)).collect();
        assert_eq!(run, [&"fmt"]);
    }

    #[test]
    fn another_name_selects_end_to_end_cases() {
        let run: Vec<_> =
            STAGES.iter().filter(|stage| selected(&options(false, &["reboot"]), stage)).collect();
        assert_eq!(run, [&"e2e"]);
    }
}
