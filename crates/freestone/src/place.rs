//! Where a machine runs: on this terminal without a name, on it with one, or detached from any terminal.
//!
//! A machine is detached by a process of its own: this program again, whose standard input is a socket by which it says that the
//! machine runs (or why not), whose standard output is the locked file of the machine's folder, and whose standard error is its
//! log. All three are put where they belong before anything else is done.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::console::Console;
use crate::failure::{FAILURE, Failure};
use crate::hub::Hub;
use crate::names::{Claim, Name, Note, Runtime};
use crate::say;

/// Names that are made up until one is free.
const ATTEMPTS: u32 = 64;
/// Bytes of what a detached machine says of its start.
const MAX_REPORT: u64 = 64 << 10;
/// How long it may take to say so.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Where a machine runs, on the command line.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct PlaceArgs {
    /// Give the machine a name, by which `freestone ps`, `stop` and the others find it. Without one it has none, unless it is
    /// detached.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<Name>,

    /// Run without a terminal: wait until the machine runs, print its name, and leave it alone. `freestone console NAME` is its
    /// console.
    #[arg(long, short = 'd')]
    pub(crate) detach: bool,

    /// Remove what is left of a detached machine (its logs) when it ends.
    #[arg(long, requires = "detach")]
    pub(crate) rm: bool,

    /// This is the process of a detached machine.
    #[arg(long, value_name = "NAME", hide = true)]
    detached_as: Option<Name>,
}

impl PlaceArgs {
    /// Whether the machine has a name.
    pub(crate) fn named(&self) -> bool {
        self.name.is_some() || self.detach
    }

    /// Options and switches that say where a machine runs: they are no part of what it is.
    pub(crate) const OPTIONS: [&str; 2] = ["--name", "--detached-as"];
    pub(crate) const SWITCHES: [&str; 3] = ["--detach", "-d", "--rm"];
}

/// Where a machine runs.
pub(crate) struct Place {
    claim: Option<Claim>,
    /// Whoever waits until the machine runs.
    waiting: Option<UnixStream>,
    hub: Option<Hub>,
    detached: bool,
    remove: bool,
}

impl Place {
    /// Does `work`, which is to conduct a machine, at the place that `args` ask for.
    pub(crate) fn with(
        args: &PlaceArgs,
        work: impl FnOnce(&mut Self) -> Result<ExitCode, Failure>,
    ) -> Result<ExitCode, Failure> {
        if args.detach && args.detached_as.is_none() {
            let name = spawn(args.name.as_ref(), std::env::args_os().skip(1).collect())?;
            say::line(name)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut place = Self::take(args)?;
        let outcome = work(&mut place);
        if let Err(failure) = &outcome {
            place.failed(failure);
        }
        place.leave();
        outcome
    }

    fn take(args: &PlaceArgs) -> Result<Self, Failure> {
        let mut place =
            Self { claim: None, waiting: None, hub: None, detached: false, remove: !args.detach || args.rm };
        if let Some(name) = &args.detached_as {
            place.become_detached(name)?;
        } else if let Some(name) = &args.name {
            let mut claim = Runtime::open()?.claim(name)?;
            claim.begin()?;
            place.claim = Some(claim);
        }
        Ok(place)
    }

    /// Puts what this process was started with where it belongs.
    fn become_detached(&mut self, name: &Name) -> Result<(), Failure> {
        let waiting = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned()?);
        waiting.set_write_timeout(Some(WRITE_LIMIT))?;
        let lock = rustix::stdio::stdout().try_clone_to_owned()?;
        let claim = Claim::inherit(name, Runtime::open()?.folder().join(name.as_str()), lock)?;
        let null = OpenOptions::new().read(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
        rustix::process::setsid()?;
        // It was started as `/proc/self/exe`.
        rustix::thread::set_name(c"freestone")?;
        self.hub = Some(Hub::bind(&claim.file("console"), &claim.file("console.log"))?);
        self.claim = Some(claim);
        self.waiting = Some(waiting);
        self.detached = true;
        Ok(())
    }

    /// The machine's console at this place.
    pub(crate) fn console(&mut self) -> Result<Console, Failure> {
        match &mut self.hub {
            Some(hub) => Ok(Console::on(hub.machine_end()?)),
            None => Ok(Console::new()),
        }
    }

    /// What serves the console, if it is no terminal.
    pub(crate) fn take_hub(&mut self) -> Option<Hub> {
        self.hub.take()
    }

    /// Whether there is no terminal.
    pub(crate) fn detached(&self) -> bool {
        self.detached
    }

    /// The control socket of a named machine.
    pub(crate) fn control(&self) -> Option<PathBuf> {
        self.claim.as_ref().map(|claim| claim.file("control"))
    }

    /// The machine's name.
    pub(crate) fn name(&self) -> Option<String> {
        self.claim.as_ref().map(|claim| claim.name().to_string())
    }

    /// Notes what the machine is made of.
    pub(crate) fn note(&self, note: Note) -> Result<(), Failure> {
        self.claim.as_ref().map_or(Ok(()), |claim| claim.note(note))
    }

    /// Tells whoever waits that the machine runs.
    pub(crate) fn ready(&mut self) {
        self.say(&json!({ "ok": {} }));
    }

    fn failed(&mut self, failure: &Failure) {
        self.say(&json!({ "error": failure.to_string(), "status": failure.status() }));
        self.ended(&format!("failed: {failure}"), failure.status());
    }

    fn say(&mut self, report: &Value) {
        let Some(mut waiting) = self.waiting.take() else { return };
        let said = writeln!(waiting, "{report}").and_then(|()| waiting.shutdown(Shutdown::Both));
        if let Err(error) = said {
            tracing::debug!(%error, "nobody waits for this machine");
        }
    }

    /// What notes that the machine failed, for a thread that has to end the process itself.
    pub(crate) fn last_words(&self) -> Option<impl FnOnce(&str) + Send + use<>> {
        let ending = self.claim.as_ref().filter(|_| !self.remove)?.ending();
        // Nobody is there any more to hear that it failed.
        Some(move |why: &str| drop(ending(format!("failed: {why}"), FAILURE)))
    }

    /// Notes how the machine ended.
    pub(crate) fn ended(&self, reason: &str, status: u8) {
        let Some(claim) = self.claim.as_ref().filter(|_| !self.remove) else { return };
        if let Err(error) = claim.end(reason.to_owned(), status) {
            tracing::warn!(%error, "the end of the machine is not noted");
        }
    }

    /// Gives the name back. What a detached machine wrote stays.
    fn leave(self) {
        let Some(mut claim) = self.claim else { return };
        if !self.remove {
            claim.leave();
        } else if let Err(error) = claim.begin() {
            tracing::warn!(%error, "the machine's folder stays behind");
        }
    }
}

/// Starts this program as the process of a machine called `name`, with `args`, and waits until the machine runs.
pub(crate) fn spawn(name: Option<&Name>, args: Vec<std::ffi::OsString>) -> Result<Name, Failure> {
    Ok(spawn_with(name, |_| Ok(args))?.0)
}

/// The same with arguments that `prepare` gives, which may put files into the machine's folder. Also gives the process, which its
/// parent has to wait for one day if it lives on itself.
pub(crate) fn spawn_with(
    name: Option<&Name>,
    prepare: impl FnOnce(&Claim) -> Result<Vec<std::ffi::OsString>, Failure>,
) -> Result<(Name, Child), Failure> {
    let runtime = Runtime::open()?;
    let mut claim = match name {
        Some(name) => runtime.claim(name)?,
        None => free_name(&runtime)?,
    };
    claim.begin()?;
    let args = prepare(&claim)?;
    let log_path = claim.file("log");
    let failed = |e| Failure::new(format!("cannot make {}: {e}", log_path.display()));
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&log_path).map_err(failed)?;
    let (waiting, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    // Called by Firecracker's name, it would take Firecracker's arguments.
    let own = std::env::args_os().next().filter(|_| !crate::firecracker::is_called());
    command.arg0(own.unwrap_or_else(|| "freestone".into()));
    command.args(args).arg(format!("--detached-as={}", claim.name()));
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    command.stdout(claim.lock().as_fd().try_clone_to_owned()?).stderr(log);
    let mut child =
        command.spawn().map_err(|e| Failure::new(format!("cannot start a process for the machine: {e}")))?;
    // With it go this process' copies of what the child has.
    drop(command);
    let mut report = String::new();
    let read = waiting.take(MAX_REPORT).read_to_string(&mut report);
    let report: Value = read.ok().and_then(|_| serde_json::from_str(&report).ok()).unwrap_or(Value::Null);
    if report.get("ok").is_some() {
        let name = claim.name().clone();
        claim.leave();
        return Ok((name, child));
    }
    let status = child.wait()?;
    let log = std::fs::read_to_string(&log_path).unwrap_or_default();
    match report.get("error").and_then(Value::as_str) {
        Some(error) => {
            let status = report.get("status").and_then(Value::as_u64).and_then(|n| u8::try_from(n).ok());
            Err(Failure::with_status(error, status.unwrap_or(FAILURE)))
        }
        None => Err(Failure::new(format!(
            "the process of the machine ended before the machine ran ({status}): {}",
            log.lines().last().unwrap_or("it said nothing")
        ))),
    }
}

fn free_name(runtime: &Runtime) -> Result<Claim, Failure> {
    let mut last = None;
    for attempt in 0..ATTEMPTS {
        let name = Name::made_up(attempt);
        if runtime.folder().join(name.as_str()).exists() {
            continue;
        }
        match runtime.claim(&name) {
            Ok(claim) => return Ok(claim),
            Err(failure) => last = Some(failure),
        }
    }
    Err(last.unwrap_or_else(|| Failure::new("all names are taken: say --name")))
}
