//! Repository tasks: `cargo xtask demo | lab | test | fetch`.

mod console;
mod cpio;
mod demo;
mod e2e;
mod examples;
mod fetch;
mod guest;
mod lab;
#[cfg(test)]
mod layers;
mod life;
mod machine;
mod net;
mod process;
mod repo;
mod report;
mod results;
mod ship;
mod test;
mod vmlinux;
mod vsock;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::fetch::Need;
use crate::lab::Lab;
use crate::machine::Start;
use crate::report::Report;

/// Repository tasks of Freestone.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Get Debian's kernel and busybox, and the programs that the other tasks need.
    Fetch {
        /// Look for a newer kernel, even if one was fetched before.
        #[arg(long)]
        update: bool,
    },
    /// A machine with hardware virtualization, emulated where the real one has none.
    Lab {
        #[command(flatten)]
        options: LabOptions,
        #[command(subcommand)]
        task: LabTask,
    },
    /// Boot Debian's kernel in the reference VMM and show it.
    Demo {
        #[command(flatten)]
        lab: LabOptions,
    },
    /// Run all checks and tests, with one summary.
    Test {
        #[command(flatten)]
        options: test::Options,
        #[command(flatten)]
        lab: LabOptions,
    },
    /// Serve the lab's host side: what runs inside the lab.
    #[command(hide = true)]
    Agent {
        /// The virtio-serial port.
        port: PathBuf,
    },
    /// Talk over vsock: one end of a test, in the guest or beside it.
    #[command(hide = true)]
    Vsock {
        #[command(subcommand)]
        end: vsock::End,
    },
    /// Live through snapshots: the guest of a test, or who leads it.
    #[command(hide = true)]
    Life {
        #[command(subcommand)]
        role: life::Role,
    },
    /// Serve, connect or send: one end of the networks' tests, in the guest or beside it.
    #[command(hide = true)]
    Net {
        #[command(subcommand)]
        program: net::Program,
    },
}

#[derive(Debug, Subcommand)]
enum LabTask {
    /// Open a shell in the lab.
    Shell,
    /// Run the end-to-end tests in the lab.
    Test {
        /// Run only the cases with this in their name. May be repeated.
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
        #[command(flatten)]
        settings: e2e::Settings,
        /// How many times all of them run.
        #[arg(long, default_value_t = 1)]
        repeat: usize,
    },
    /// Run a command in the lab and exit with its status.
    Run {
        /// The command and its arguments.
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct LabOptions {
    /// Use this program in place of the workspace's `freestone`.
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Put this program (with its libraries), file or directory into the lab, at the path it has here. May be repeated.
    #[arg(long, value_name = "PATH")]
    ship: Vec<PathBuf>,
}

impl From<LabOptions> for lab::Contents {
    fn from(options: LabOptions) -> Self {
        let LabOptions { vmm, ship } = options;
        Self { vmm, ship }
    }
}

fn main() -> Result<()> {
    match Cli::parse().task {
        Task::Fetch { update } => {
            let fetched = fetch::fetch(Need::Lab, update)?;
            println!("Debian kernel {}", fetched.release);
            println!("{}", fetched.bzimage.display());
            println!("{}", fetched.vmlinux.display());
            println!("{}", fetched.busybox.display());
            println!("{}", fetched.i386.bzimage.display());
            println!("{}", fetched.i386.busybox.display());
            Ok(())
        }
        Task::Lab { options, task } => in_lab(&options.into(), task),
        Task::Demo { lab } => demo::run(&lab.into()),
        Task::Test { options, lab } => {
            exit_unless(test::run(&options, &lab.into())?);
            Ok(())
        }
        Task::Agent { port } => lab::agent::serve(&port),
        Task::Vsock { end } => vsock::run(&end),
        Task::Life { role } => life::run(&role),
        Task::Net { program } => net::run(&program),
    }
}

fn in_lab(contents: &lab::Contents, task: LabTask) -> Result<()> {
    match task {
        LabTask::Shell => lab::Image::build(contents)?.shell(),
        LabTask::Test { only, settings, repeat } => {
            let start = Start::lab(contents)?;
            let mut report = Report::default();
            let cases = std::iter::repeat_n(e2e::named(&only), repeat).flatten().collect();
            e2e::run(&start, cases, settings, &mut report)?;
            println!("{report}");
            exit_unless(report.is_success());
            Ok(())
        }
        LabTask::Run { command } => {
            let lab = lab::Image::build(contents)?.boot()?;
            let status = run_in(&lab, &command)?;
            drop(lab);
            std::process::exit(status)
        }
    }
}

/// Ends this process with status 1 on failure. Everything was said before, so there is no message.
fn exit_unless(success: bool) {
    if !success {
        std::process::exit(1);
    }
}

/// Runs a command in the lab with its output on our stdout.
fn run_in(lab: &Lab, command: &[String]) -> Result<i32> {
    use std::io::Write;
    let mut process = lab.spawn(command)?;
    process.close_input();
    let forever = std::time::Instant::now() + std::time::Duration::from_secs(1 << 30);
    while let Some(bytes) = process.next(forever)? {
        std::io::stdout().write_all(&bytes)?;
        std::io::stdout().flush()?;
    }
    Ok(process.status().unwrap_or(-1))
}
