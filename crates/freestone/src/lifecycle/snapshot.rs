//! `freestone snapshot`: saving machines, and what is saved of them.

use std::fs::DirBuilder;
use std::io::IsTerminal;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use freestone_vmm::snapshot::{Arch, Limits, SnapshotFile};
use freestone_vmm::store::{StorePaths, Stored};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::process::Process;
use crate::control::{Request, ask, ask_with};
use crate::failure::Failure;
use crate::names::{Entry, Runtime};
use crate::{say, size};

/// How long nothing may be heard of a snapshot that is being written. Syncing a file to a slow disk takes its time.
const LIMIT: Duration = Duration::from_secs(600);
/// How long a machine may take to end.
const SHUTDOWN: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone snapshot create web web.snap
      Save the machine `web` to the folder web.snap; it stands still meanwhile, and goes on.
  freestone snapshot create web web.snap --stop; freestone restore web.snap --name web --detach
      Save and end it, and go on later.
  freestone snapshot create web diff1 --diff
      Save what was written since the last snapshot (the machine was started with --track-dirty).
  freestone snapshot rebase web.snap diff1
      Bring the differences of diff1 into web.snap.")]
pub(crate) struct Snapshot {
    #[command(subcommand)]
    what: What,

    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Save a machine.
    Create(Create),
    /// Describe snapshots.
    Info {
        /// Folders of snapshots, or state files.
        #[arg(required = true, value_name = "DIR")]
        dirs: Vec<PathBuf>,
    },
    /// Compare all of snapshots with their checksums.
    Verify {
        /// Folders of snapshots.
        #[arg(required = true, value_name = "DIR")]
        dirs: Vec<PathBuf>,
    },
    /// Bring differences into the snapshot that they are to, one after the other.
    Rebase {
        /// The full snapshot.
        base: PathBuf,
        /// Differences: the first to the base, each of the others to the one before it.
        #[arg(required = true)]
        diffs: Vec<PathBuf>,
        /// Write the whole to this folder, and leave the base as it is.
        #[arg(long, value_name = "DIR")]
        output: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
struct Create {
    /// Name of the machine.
    name: String,

    /// Folder of the snapshot. It is made if it is not there; a snapshot in it is replaced when the new one is complete.
    dir: PathBuf,

    /// Save only what was written since the last snapshot, or since the restore.
    #[arg(long)]
    diff: bool,

    /// Have the machine go on afterwards, even if it was paused before.
    #[arg(long, group = "then")]
    resume: bool,

    /// End the machine afterwards.
    #[arg(long, group = "then")]
    stop: bool,

    /// Leave the machine paused afterwards.
    #[arg(long, group = "then")]
    keep_paused: bool,
}

/// Saves, describes, checks or joins.
pub(crate) fn snapshot(args: &Snapshot) -> Result<ExitCode, Failure> {
    match &args.what {
        What::Create(create) => {
            let report = create.run()?;
            let bytes = |key: &str| size::display(report.get(key).and_then(Value::as_u64).unwrap_or(0));
            let text =
                format!("{}: {} of {} written", create.dir.display(), bytes("written"), bytes("memory"));
            tell(args.json, &report, &text)?;
        }
        What::Info { dirs } => {
            for dir in dirs {
                let (value, text) = info(dir)?;
                tell(args.json, &value, &text)?;
            }
        }
        What::Verify { dirs } => {
            for dir in dirs {
                verify(dir)?;
                tell(args.json, &json!({ "dir": dir, "ok": true }), &format!("{}: whole", dir.display()))?;
            }
        }
        What::Rebase { base, diffs, output } => {
            let target = rebase(base, diffs, output.as_deref())?;
            tell(args.json, &json!({ "dir": target }), &format!("{}: rebased", target.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(json: bool, value: &Value, text: &str) -> Result<(), Failure> {
    if json { say::line(value) } else { say::line(text) }
}

impl Create {
    fn run(&self) -> Result<Value, Failure> {
        let entry = Runtime::find().entry(&self.name)?;
        let process = Process::of(&entry)?;
        let dir = std::path::absolute(&self.dir)?;
        make_folder(&dir)?;
        let ran = hold(&entry)?;
        let request = Request::Snapshot { dir: Some(dir), state: None, memory: None, diff: self.diff };
        let bar = bar();
        let saved = ask_with(&entry.control(), &request, LIMIT, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        // A machine that could not be saved goes on as it did.
        if saved.is_ok() && self.stop {
            ask(&entry.control(), &Request::Stop { force: true })?;
            if !process.wait(SHUTDOWN) {
                return Err(Failure::new(format!("{} was saved and does not end", entry.name)));
            }
        } else if self.resume && saved.is_ok() || ran && !(self.keep_paused && saved.is_ok()) {
            ask(&entry.control(), &Request::Resume)?;
        }
        saved
    }
}

/// Has a machine stand still; whether it ran before.
pub(super) fn hold(entry: &Entry) -> Result<bool, Failure> {
    let state = ask(&entry.control(), &Request::Status)?;
    let ran = state.get("state").and_then(Value::as_str) == Some("running");
    ask(&entry.control(), &Request::Pause)?;
    Ok(ran)
}

/// Makes the folder of a snapshot, which has all of the guest's secrets in it.
fn make_folder(dir: &Path) -> Result<(), Failure> {
    let made = DirBuilder::new().mode(0o700).create(dir);
    match made {
        Err(e) if !dir.is_dir() => {
            Err(Failure::new(format!("cannot make the folder {}: {e}", dir.display())))
        }
        _ => Ok(()),
    }
}

/// The files of a snapshot: those of a folder.
pub(super) fn paths(dir: &Path) -> Result<StorePaths, Failure> {
    let paths = StorePaths::in_folder(dir);
    if !paths.state().exists() {
        return Err(Failure::new(format!(
            "there is no snapshot in {}: {} is missing",
            dir.display(),
            paths.state().display()
        )));
    }
    Ok(paths)
}

fn info(dir: &Path) -> Result<(Value, String), Failure> {
    let paths = paths(dir)?;
    let reader = SnapshotFile::open(paths.state(), Limits::default())?;
    let header = reader.header();
    let (program, arch, fits) = (
        header.program().to_owned(),
        format!("{:?}", header.arch()),
        header.check_arch(Arch::host()).is_ok(),
    );
    let format = header.format();
    let sections = reader.info()?.sections;
    let stored = Stored::open(&paths)?;
    let (memory, machine) = (stored.memory(), stored.machine());
    let base = memory.base().map(|base| base.to_string());
    let bytes = stored.layout().size();
    let on_disk =
        stored.memory_file()?.metadata().map(|found| std::os::unix::fs::MetadataExt::blocks(&found) * 512)?;
    let list: Vec<_> = sections
        .iter()
        .map(|section| json!({ "name": section.name, "version": section.version, "bytes": section.length, "optional": section.optional }))
        .collect();
    let value = json!({
        "dir": dir, "id": memory.id().to_string(), "base": base, "program": program, "format": format,
        "arch": arch, "fits_this_host": fits, "cpus": machine.cpus(), "memory": bytes, "on_disk": on_disk,
        "checksums": memory.checksums().is_some(), "sections": list,
    });
    let kind = base.map_or_else(|| "all of memory".to_owned(), |base| format!("differences to {base}"));
    let mut text = format!(
        "{}: snapshot {} by {program}, {arch}, format {format}\n  {} vCPUs, {} of memory, {} on disk, {kind}, {} checksums",
        dir.display(),
        memory.id(),
        machine.cpus(),
        size::display(bytes),
        size::display(on_disk),
        if memory.checksums().is_some() { "with" } else { "without" },
    );
    for section in &sections {
        text.push_str(&format!(
            "\n  {:<32} version {:<3} {}",
            section.name,
            section.version,
            size::display(section.length)
        ));
    }
    Ok((value, text))
}

fn verify(dir: &Path) -> Result<(), Failure> {
    let paths = paths(dir)?;
    SnapshotFile::open(paths.state(), Limits::default())?.verify()?;
    let bar = bar();
    let verified = Stored::open(&paths)?.verify(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(verified?)
}

/// Where the whole is.
fn rebase<'a>(base: &'a Path, diffs: &[PathBuf], output: Option<&'a Path>) -> Result<&'a Path, Failure> {
    let target = output.unwrap_or(base);
    if output.is_some() {
        make_folder(target)?;
    }
    let bar = bar();
    let mut whole = base;
    for diff in diffs {
        let stored = Stored::open(&paths(diff)?)?;
        let onto = Stored::open(&paths(whole)?)?;
        stored.rebase(&onto, &StorePaths::in_folder(target), &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        whole = target;
    }
    bar.finish_and_clear();
    Ok(target)
}

/// A progress bar, if somebody can see it.
pub(super) fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style =
        ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
