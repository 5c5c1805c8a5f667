//! `pause`, `resume`, `stop`, `kill` and `rm`.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::args::{Many, Rm, Stop};
use super::process::Process;
use crate::control::{Request, ask};
use crate::failure::{FAILURE, Failure};
use crate::names::{Entry, Life, Runtime};
use crate::say;

/// How long a machine that was told to end may take to write what it still has to its disks.
const SHUTDOWN: Duration = Duration::from_secs(20);

/// Has machines stand still.
pub(crate) fn pause(args: &Many) -> Result<ExitCode, Failure> {
    each(args, &Runtime::find(), |entry| simple(entry, &Request::Pause))
}

/// Has machines go on.
pub(crate) fn resume(args: &Many) -> Result<ExitCode, Failure> {
    each(args, &Runtime::find(), |entry| simple(entry, &Request::Resume))
}

fn simple(entry: &Entry, request: &Request) -> Result<Value, Failure> {
    entry.pid()?;
    ask(&entry.control(), request)
}

/// Stops machines. All are asked before any is waited for.
pub(crate) fn stop(args: &Stop) -> Result<ExitCode, Failure> {
    let runtime = Runtime::find();
    let mut asked = Vec::new();
    for name in &args.machines.names {
        let stopping = runtime.entry(name).and_then(|entry| Stopping::begin(&entry, args.timeout == 0));
        asked.push((name.as_str(), stopping));
    }
    let limit = Duration::from_secs(args.timeout);
    let outcomes = asked.into_iter().map(|(name, stopping)| (name, stopping.and_then(|it| it.end(limit))));
    tell(outcomes, args.machines.json)
}

/// A machine that was asked to end.
struct Stopping {
    entry: Entry,
    process: Process,
    /// It was the guest that was asked.
    guest: bool,
}

impl Stopping {
    fn begin(entry: &Entry, force: bool) -> Result<Self, Failure> {
        let process = Process::of(entry)?;
        let answer = ask(&entry.control(), &Request::Stop { force })?;
        let guest = answer.get("asked").and_then(Value::as_bool).unwrap_or(false);
        Ok(Self { entry: entry.clone(), process, guest })
    }

    fn end(self, limit: Duration) -> Result<Value, Failure> {
        if self.guest && self.process.wait(limit) {
            return Ok(json!({ "how": "powered off" }));
        }
        if self.guest
            && let Err(failure) = ask(&self.entry.control(), &Request::Stop { force: true })
        {
            // It may have ended this very moment, or does not answer any more.
            tracing::debug!(%failure, machine = %self.entry.name, "the machine was not told to end");
        }
        if self.process.wait(SHUTDOWN) {
            return Ok(json!({ "how": "stopped" }));
        }
        end_by_force(&self.entry, &self.process)?;
        Ok(json!({ "how": "killed" }))
    }
}

/// Kills machines.
pub(crate) fn kill(args: &Many) -> Result<ExitCode, Failure> {
    each(args, &Runtime::find(), |entry| {
        let process = Process::of(entry)?;
        end_by_force(entry, &process)?;
        Ok(json!({ "pid": process.pid.as_raw_pid() }))
    })
}

fn end_by_force(entry: &Entry, process: &Process) -> Result<(), Failure> {
    process.kill()?;
    if !process.wait(SHUTDOWN) {
        return Err(Failure::new(format!("process {} does not die: the host holds it up", process.pid)));
    }
    // Nobody asks for the logs of what was on a terminal.
    match entry.note().is_some_and(|note| note.detached) {
        true => entry.clean(),
        false => entry.remove(),
    }
}

/// Removes what is left of machines.
pub(crate) fn rm(args: &Rm) -> Result<ExitCode, Failure> {
    each(&args.machines, &Runtime::find(), |entry| {
        if matches!(entry.life(), Life::Alive(_)) {
            if !args.force {
                return Err(Failure::new(format!("{} runs: stop it first, or say --force", entry.name)));
            }
            end_by_force(entry, &Process::of(entry)?)?;
        }
        entry.remove()?;
        Ok(json!({}))
    })
}

/// Does `what` to each machine, and tells what came of it.
fn each(
    args: &Many,
    runtime: &Runtime,
    what: impl Fn(&Entry) -> Result<Value, Failure>,
) -> Result<ExitCode, Failure> {
    let outcomes =
        args.names.iter().map(|name| (name.as_str(), runtime.entry(name).and_then(|entry| what(&entry))));
    tell(outcomes, args.json)
}

/// Prints outcomes as they come; the exit status of all.
fn tell<'a>(
    outcomes: impl Iterator<Item = (&'a str, Result<Value, Failure>)>,
    json: bool,
) -> Result<ExitCode, Failure> {
    let mut status = 0;
    for (name, outcome) in outcomes {
        match outcome {
            Ok(answer) if json => say::line(json!({ "name": name, "ok": answer }))?,
            Ok(_) => say::line(name)?,
            Err(failure) => {
                status = FAILURE;
                if json {
                    say::line(json!({ "name": name, "error": failure.to_string() }))?;
                } else {
                    eprintln!("freestone: {failure}");
                }
            }
        }
    }
    Ok(ExitCode::from(status))
}
