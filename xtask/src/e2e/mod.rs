//! End-to-end tests: Debian's kernel, unchanged, in the reference VMM.
//!
//! A case is a command line, a dialogue on the console, the exit status that must come, and checks on the disks
//! afterwards. Cases are in [`cases`]; this module runs them, some at a time, on a [`Machine`].

mod cases;
mod devices;
mod lifecycle;
mod net;

use std::collections::VecDeque;
use std::fs;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::console::Console;
use crate::machine::{Asset, Machine, Start};
use crate::repo;
use crate::report::Report;

/// The cases that have one of `names` in their name; all of them when there are no names.
pub fn named(names: &[String]) -> Vec<Case> {
    let mut all = cases::all();
    all.retain(|case| names.is_empty() || names.iter().any(|name| case.name.contains(name.as_str())));
    all
}

/// How long a case may take, dilated as time is in the lab.
const CASE_LIMIT: Duration = Duration::from_secs(300);
/// How many lines of a failed case's console are shown; all of them are in its log file.
const SHOWN_LINES: usize = 40;

/// What a disk of the guest holds at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// A copy of the root disk.
    Root,
    /// A copy of the root disk that the VMM is told to protect.
    ReadOnlyRoot,
    /// One MiB that begins with this text.
    Text(&'static str),
}

/// What a case starts.
#[derive(Debug, Clone, Copy)]
pub enum Job {
    /// A Linux guest with a root disk, or without: then the devices' script is its first program.
    Linux(Linux),
    /// A shell script on the machine. In it, `$VMM`, `$TOOL` (this program), `$KERNEL`, `$INITRD` and `$TOOLS` are paths, `$MOMENTS`
    /// is what the environment says of [`lifecycle`], and the current directory is empty.
    Script(&'static str),
}

/// What a Linux guest is started with.
#[derive(Debug, Clone, Copy)]
pub struct Linux {
    /// [`Asset::BzImage`] or [`Asset::Vmlinux`].
    pub kernel: Asset,
    /// Its initramfs: [`Asset::Initramfs`] goes over to a root disk, [`Asset::Tools`] runs the devices' script itself.
    pub initrd: Asset,
    /// Count of vCPUs.
    pub cpus: u32,
    /// Memory as the command line takes it.
    pub memory: &'static str,
    /// What the guest does: the value of `freestone.test`, and more words for the kernel after a space.
    pub scenario: &'static str,
    /// Where the kernel's console is.
    pub console: &'static str,
    /// The disks, `/dev/vda` first.
    pub disks: &'static [Disk],
    /// A shell script that is run in the case's directory before the start; it makes what `args` names.
    pub setup: &'static str,
    /// A shell script that is run in the case's directory in the end, whether the case passed or not: it takes back what `setup`
    /// did to the machine.
    pub teardown: &'static str,
    /// More of the VMM's command line, separated by spaces. Files are in the case's directory.
    pub args: &'static str,
    /// A command that runs the VMM, as the shell takes it; empty for none.
    pub within: &'static str,
}

impl Linux {
    /// A guest of one vCPU and 256 MiB, with nothing attached.
    pub const fn new(kernel: Asset, scenario: &'static str) -> Self {
        let initrd = Asset::Initramfs;
        let (memory, console) = ("256M", "ttyS0");
        Self {
            kernel,
            initrd,
            cpus: 1,
            memory,
            scenario,
            console,
            disks: &[],
            setup: "",
            teardown: "",
            args: "",
            within: "",
        }
    }
}

/// An end-to-end test.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// The test's name.
    pub name: &'static str,
    /// What is started.
    pub job: Job,
    /// The dialogue on the console, with commands on the machine beside it. Standard input is closed after it.
    pub dialogue: fn(&mut Console, &Side<'_>) -> Result<()>,
    /// The exit status that must come.
    pub status: i32,
    /// Looks at the console's transcript and the disks afterwards.
    pub check: fn(&After<'_>) -> Result<()>,
}

/// The machine beside the guest, in the directory of the case.
#[derive(Debug, Clone)]
pub struct Side<'a> {
    machine: &'a Machine,
    dir: String,
}

impl Side<'_> {
    /// Runs a shell script in the case's directory and returns its output; fails when it does. `$VMM` is the VMM, `$TOOL` this
    /// program, `$KERNEL` and `$TOOLS` are what a guest with the devices' script boots from, `$PASST` is `passt`.
    pub fn sh(&self, script: &str) -> Result<String> {
        let (vmm, tool) = (self.machine.vmm(), self.machine.tool());
        let (kernel, tools) = (self.machine.asset(Asset::BzImage), self.machine.asset(Asset::Tools));
        let passt = self.machine.passt().unwrap_or_default();
        let names =
            format!("export VMM='{vmm}' TOOL='{tool}' KERNEL='{kernel}' TOOLS='{tools}' PASST='{passt}'");
        self.machine.sh(&format!("cd '{}'; {names}\n{script}", self.dir))
    }
}

/// What is left when the VMM has ended.
#[derive(Debug)]
pub struct After<'a> {
    side: Side<'a>,
    /// What was written on the console.
    pub transcript: String,
}

impl After<'_> {
    /// The rest of each line `GUEST KEY ...` of the console.
    pub fn lines(&self, key: &str) -> Vec<&str> {
        let said = self.transcript.lines().filter_map(|line| line.trim().strip_prefix("GUEST "));
        said.filter_map(|line| line.strip_prefix(key)).map(str::trim).collect()
    }

    /// Fails unless the console has `text`.
    pub fn console_has(&self, text: &str) -> Result<()> {
        if !self.transcript.contains(text) {
            bail!("the console lacks {text:?}");
        }
        Ok(())
    }

    /// Fails unless the file system on disk `disk` is clean.
    pub fn clean(&self, disk: usize) -> Result<()> {
        let path = self.disk(disk);
        self.side.sh(&format!("e2fsck -fn {path}")).map(drop)
    }

    /// Replays the journal of disk `disk`, as the next boot would; for a guest that ended without unmounting.
    pub fn replay_journal(&self, disk: usize) -> Result<()> {
        let path = self.disk(disk);
        self.side.sh(&format!("e2fsck -fp {path}; test $? -le 1")).map(drop)
    }

    /// The content of a file in the file system on disk `disk`.
    pub fn file(&self, disk: usize, file: &str) -> Result<String> {
        let path = self.disk(disk);
        self.side.sh(&format!("debugfs -R 'cat {file}' {path} 2>/dev/null"))
    }

    /// The first bytes of disk `disk`.
    pub fn head(&self, disk: usize, count: usize) -> Result<String> {
        let path = self.disk(disk);
        self.side.sh(&format!("head -c {count} {path}"))
    }

    /// Fails unless disk `disk` is byte by byte what the root disk was at first.
    pub fn is_untouched(&self, disk: usize) -> Result<()> {
        let (path, original) = (self.disk(disk), self.side.machine.asset(Asset::RootDisk));
        self.side.sh(&format!("cmp {path} {original}")).map(drop)
    }

    /// As [`Side::sh`].
    pub fn sh(&self, script: &str) -> Result<String> {
        self.side.sh(script)
    }

    fn disk(&self, disk: usize) -> String {
        disk_path(&self.side.dir, disk)
    }
}

fn disk_path(dir: &str, disk: usize) -> String {
    format!("{dir}/disk{disk}.img")
}

/// How cases are run.
#[derive(Debug, Default, Clone, Copy, Args)]
pub struct Settings {
    /// How many end-to-end cases run at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Show the guest kernel's messages on the consoles of the end-to-end cases, which makes them three times slower.
    #[arg(long)]
    kernel_log: bool,
}

/// Runs cases, each worker on a machine of its own. A machine that dies in a case is replaced.
pub fn run(start: &Start, cases: Vec<Case>, settings: Settings, report: &mut Report) -> Result<()> {
    let jobs = settings.jobs.clamp(1, cases.len().max(1));
    let queue = Mutex::new(VecDeque::from(cases));
    let report = Mutex::new(report);
    thread::scope(|scope| {
        let workers: Vec<_> =
            (0..jobs).map(|_| scope.spawn(|| work(start, &queue, settings, &report))).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a worker panicked")))
    })
}

/// Runs cases of the queue until it is empty.
fn work(
    start: &Start,
    queue: &Mutex<VecDeque<Case>>,
    settings: Settings,
    report: &Mutex<&mut Report>,
) -> Result<()> {
    let mut machine = start.machine()?;
    while let Some(case) = next(queue) {
        if let Some(reason) = lacking(&machine, &case) {
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            report.skip(format!("e2e::{}", case.name), reason);
            continue;
        }
        let started = Instant::now();
        let mut result = run_case(&machine, &case, settings.kernel_log);
        if let Some(death) = machine.death() {
            result = result.context(death);
            machine = start.machine()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        let name = format!("e2e::{}", case.name);
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => {
                println!("        PASS [{seconds:7.1} s] {name} ({})", machine.name());
                report.pass(1);
            }
            Err(error) => {
                println!("        FAIL [{seconds:7.1} s] {name} ({}): {error:#}", machine.name());
                report.fail(name, format!("{error:#}"));
            }
        }
    }
    Ok(())
}

/// What a case needs and this system does not have, where that is no failure.
fn lacking(machine: &Machine, case: &Case) -> Option<&'static str> {
    if let Some(why) = lifecycle::lacking(machine, case) {
        return Some(why);
    }
    let needed = matches!(case.job, Job::Linux(linux) if linux.setup.contains("$PASST"));
    let lacks = needed && machine.passt().is_none() && !crate::test::is_e2e_required();
    lacks.then_some("this system's packages have no passt")
}

fn next(queue: &Mutex<VecDeque<Case>>) -> Option<Case> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
}

/// Runs one case, and leaves the machine as it was; the error is the reason of its failure.
fn run_case(machine: &Machine, case: &Case, kernel_log: bool) -> Result<()> {
    let dir = machine.work_dir(case.name)?;
    let side = Side { machine, dir };
    let result = run_in(&side, case, kernel_log);
    let cleaned = clean_up(&side, case);
    match (result, cleaned) {
        (Err(error), Err(other)) => Err(error.context(format!("{other:#}"))),
        (result, cleaned) => result.and(cleaned),
    }
}

fn run_in(side: &Side<'_>, case: &Case, kernel_log: bool) -> Result<()> {
    let argv = command_line(side.machine, case, kernel_log, &side.dir)?;
    let mut console = Console::new(side.machine.spawn(&argv)?, lifecycle::limit(CASE_LIMIT), false);
    let ended = converse(&mut console, side, case.dialogue);
    let log = repo::lab_dir()?.join("e2e").join(case.name).with_extension("log");
    fs::create_dir_all(log.parent().unwrap_or(&log))
        .with_context(|| format!("creating {}", log.display()))?;
    let transcript = console.transcript();
    fs::write(&log, format!("{}\n{transcript}", argv.join(" ")))
        .with_context(|| format!("writing {}", log.display()))?;

    let after = After { side: side.clone(), transcript };
    let result = ended.and_then(|status| {
        if status != case.status {
            bail!("the exit status is {status} instead of {}", case.status);
        }
        (case.check)(&after)
    });
    if result.is_err() {
        let lines: Vec<_> = after.transcript.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(SHOWN_LINES)..).unwrap_or_default().join("\n    | ");
        println!("    | {tail}\n    (the whole console: {})", log.display());
    }
    result
}

/// Ends the programs that a case left in its directory, which are servers and other machines, and removes the directory.
fn clean_up(side: &Side<'_>, case: &Case) -> Result<()> {
    let Side { machine, dir } = side;
    // Not in the directory: the script would end itself.
    let ended = machine.sh(&format!(
        "here=$(realpath '{dir}') && [ -n \"$here\" ] || exit 1
         left() {{ for p in /proc/[0-9]*; do [ \"$(readlink $p/cwd)\" != \"$here\" ] || echo ${{p#/proc/}}; done 2>/dev/null; }}
         tries=0; until [ -z \"$(left)\" ]; do kill -9 $(left) 2>/dev/null; tries=$((tries + 1)); [ $tries -lt 50 ] || exit 1; sleep 0.1; done"
    ));
    let torn_down = match case.job {
        Job::Linux(Linux { teardown, .. }) if !teardown.is_empty() => side.sh(teardown).map(drop),
        _ => Ok(()),
    };
    drop(machine.sh(&format!("rm -rf '{dir}'")));
    ended.context("ending what the case left")?;
    torn_down.context("taking back what the case did to the machine")
}

fn converse(
    console: &mut Console,
    side: &Side<'_>,
    dialogue: fn(&mut Console, &Side<'_>) -> Result<()>,
) -> Result<i32> {
    dialogue(console, side)?;
    console.close_input();
    console.finish()
}

/// Makes the disks of a case and returns the command that it starts.
fn command_line(machine: &Machine, case: &Case, kernel_log: bool, dir: &str) -> Result<Vec<String>> {
    let linux = match case.job {
        Job::Linux(linux) => linux,
        Job::Script(script) => {
            let (vmm, kernel) = (machine.vmm(), machine.asset(Asset::BzImage));
            let initrd = machine.asset(Asset::Initramfs);
            let (tool, tools) = (machine.tool(), machine.asset(Asset::Tools));
            let names =
                format!("VMM='{vmm}' KERNEL='{kernel}' INITRD='{initrd}' TOOL='{tool}' TOOLS='{tools}'");
            let moments = std::env::var(lifecycle::MOMENTS).unwrap_or_default();
            let script = format!("cd '{dir}'; export {names}\nMOMENTS='{moments}'\n{script}");
            return Ok(["sh", "-c", &script].map(str::to_owned).into());
        }
    };
    let quiet = if kernel_log { "" } else { " quiet" };
    Side { machine, dir: dir.to_owned() }.sh(linux.setup).context("preparing the case")?;
    let mut argv = command(machine, &Linux { scenario: "", ..linux }, &format!("{}{quiet}", linux.scenario));
    for (number, disk) in linux.disks.iter().enumerate() {
        let path = disk_path(dir, number);
        match disk {
            Disk::Root | Disk::ReadOnlyRoot => {
                machine.sh(&format!("cp {} {path}", machine.asset(Asset::RootDisk)))?;
            }
            Disk::Text(text) => {
                machine.sh(&format!("printf '{text}' >{path} && truncate -s 1M {path}"))?;
            }
        }
        let suffix = if *disk == Disk::ReadOnlyRoot { ",ro" } else { "" };
        argv.extend(["--disk".to_owned(), format!("{path}{suffix}")]);
    }
    argv.extend(linux.args.split_whitespace().map(str::to_owned));
    // Names of files are relative to the case's directory.
    let words = argv.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    Ok(["sh", "-c", &format!("cd '{dir}'; exec {} {words}", linux.within)].map(str::to_owned).into())
}

/// The command that boots the Linux guest, without its disks.
pub fn command(machine: &Machine, linux: &Linux, scenario: &str) -> Vec<String> {
    let cmdline = format!("console={} panic=-1 freestone.test={scenario}", linux.console);
    [
        &machine.vmm(),
        "run",
        "--kernel",
        &machine.asset(linux.kernel),
        "--initrd",
        &machine.asset(linux.initrd),
        "--cpus",
        &linux.cpus.to_string(),
        "--memory",
        linux.memory,
        "--cmdline",
        &cmdline,
    ]
    .map(str::to_owned)
    .into()
}
