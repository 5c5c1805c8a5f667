//! Runs the examples of all crates: each must end with status 0 in a minute. One that prints `SKIP NAME: REASON` and ends
//! with status 0 counts as skipped.
//!
//! An example runs with no arguments and no input unless its crate's manifest says otherwise:
//!
//! ```toml
//! [package.metadata.freestone.examples]
//! echo = { args = ["--once"], input = "hello\nquit\n" }
//! boot = { kvm = true }      # skipped where there is no /dev/kvm
//! server = { run = false }   # compiled only
//! ```

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process;
use crate::repo;
use crate::report::Report;
use crate::test::dev_kvm;

/// How long an example may run.
const LIMIT: Duration = Duration::from_secs(60);

/// An example and how it is run.
#[derive(Debug, PartialEq, Eq)]
struct Example {
    package: String,
    name: String,
    features: Vec<String>,
    args: Vec<String>,
    input: String,
    kvm: bool,
    run: bool,
}

/// Compiles and runs the examples.
pub fn run(report: &mut Report) -> Result<()> {
    let metadata = metadata()?;
    for example in examples(&metadata) {
        let name = format!("{}::example/{}", example.package, example.name);
        let started = Instant::now();
        if example.kvm
            && let Err(reason) = dev_kvm()
        {
            report.skip(name, format!("{reason:#}"));
            continue;
        }
        match run_one(&example) {
            Ok(Some(reason)) => report.skip(name, reason),
            Ok(None) => {
                println!("        PASS [{:7.1} s] {name}", started.elapsed().as_secs_f64());
                report.pass(1);
            }
            Err(error) => {
                println!("        FAIL [{:7.1} s] {name}: {error:#}", started.elapsed().as_secs_f64());
                report.fail(name, format!("{error:#}"));
            }
        }
    }
    Ok(())
}

/// What cargo knows about the workspace's packages.
pub fn metadata() -> Result<Value> {
    let text = repo::output(repo::cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    serde_json::from_str(&text).context("`cargo metadata` did not print JSON")
}

/// All examples in the workspace.
fn examples(metadata: &Value) -> Vec<Example> {
    let mut all = Vec::new();
    for package in list(metadata, "/packages") {
        for target in list(package, "/targets") {
            if !list(target, "/kind").any(|kind| kind == "example") {
                continue;
            }
            let name = text(target, "/name");
            let settings =
                package.pointer(&format!("/metadata/freestone/examples/{name}")).unwrap_or(&Value::Null);
            all.push(Example {
                package: text(package, "/name"),
                features: strings(target, "/required-features"),
                args: strings(settings, "/args"),
                input: text(settings, "/input"),
                kvm: flag(settings, "/kvm", false),
                run: flag(settings, "/run", true),
                name,
            });
        }
    }
    all
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn strings(value: &Value, pointer: &str) -> Vec<String> {
    list(value, pointer).filter_map(Value::as_str).map(str::to_owned).collect()
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn flag(value: &Value, pointer: &str, default: bool) -> bool {
    value.pointer(pointer).and_then(Value::as_bool).unwrap_or(default)
}

/// Runs an example; returns the reason when it says that it was skipped.
fn run_one(example: &Example) -> Result<Option<String>> {
    let mut build: Command = repo::cargo();
    build.args(["build", "--quiet", "-p", &example.package, "--example", &example.name]);
    if !example.features.is_empty() {
        build.arg("--features").arg(example.features.join(","));
    }
    repo::run(&mut build)?;
    if !example.run {
        return Ok(None);
    }
    let program = repo::target_dir().join("debug/examples").join(&example.name);
    let mut argv = vec![program.display().to_string()];
    argv.extend(example.args.iter().cloned());
    let process = process::spawn(&argv)?;
    process.send(example.input.as_bytes());
    process.close_input();
    let (status, output) = process.finish(LIMIT)?;
    if status != 0 {
        bail!("it ended with status {status}: {}", String::from_utf8_lossy(&output).trim_end());
    }
    Ok(skip_reason(&String::from_utf8_lossy(&output)))
}

fn skip_reason(output: &str) -> Option<String> {
    let line = output.lines().find_map(|line| line.strip_prefix("SKIP "))?;
    Some(line.split_once(": ").map_or(line, |(_, reason)| reason).to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn examples_are_found_with_their_settings() {
        let metadata = json!({"packages": [{
            "name": "krate",
            "targets": [
                {"name": "krate", "kind": ["lib"]},
                {"name": "plain", "kind": ["example"]},
                {"name": "boot", "kind": ["example"], "required-features": ["x"]},
            ],
            "metadata": {"freestone": {"examples": {"boot": {"args": ["1"], "input": "quit", "kvm": true, "run": false}}}},
        }]});
        let example = |name: &str| Example {
            package: "krate".into(),
            name: name.into(),
            features: vec![],
            args: vec![],
            input: String::new(),
            kvm: false,
            run: true,
        };
        let boot = Example {
            features: vec!["x".into()],
            args: vec!["1".into()],
            input: "quit".into(),
            kvm: true,
            run: false,
            ..example("boot")
        };
        assert_eq!(examples(&metadata), [example("plain"), boot]);
    }

    #[test]
    fn an_example_that_says_so_is_skipped_with_its_reason() {
        assert_eq!(skip_reason("hello\nSKIP example x: no /dev/kvm\n").as_deref(), Some("no /dev/kvm"));
        assert_eq!(skip_reason("hello\n"), None);
    }
}
