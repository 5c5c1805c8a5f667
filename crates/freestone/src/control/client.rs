//! `freestone ctl`: asks a running machine.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::Target;
use super::protocol::{Request, describe};
use crate::failure::Failure;
use crate::{disk, net, say, size};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Bytes of the largest answer.
const MAX_ANSWER: u64 = 16 << 20;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples, for a machine that was started by
`freestone run --kernel vmlinux --disk disk.img --balloon --control vm.ctl`:
  freestone ctl vm.ctl stats
  freestone ctl vm.ctl stats --json
  truncate -s 20G disk.img; freestone ctl vm.ctl disk vda refresh
  freestone ctl vm.ctl disk vda limit --bandwidth 50M --iops 1000
  freestone ctl vm.ctl balloon 512M
A machine that has a name, by `freestone run --name web`, goes by it:
  freestone ctl web stats

Exit status: 0 the machine did it, 1 it did not or could not be reached, 2 wrong usage.")]
pub(crate) struct Ctl {
    /// The machine: its name, or the socket that `freestone run --control` was given.
    #[arg(value_name = "MACHINE")]
    target: Target,

    /// Print the machine's answer as it is, in JSON.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show what the devices' queues counted: requests, bytes, notifications, interrupts, latencies.
    Stats,
    /// Change a disk.
    Disk {
        /// Name of the disk: vda, vdb and so on.
        name: String,
        #[command(subcommand)]
        what: DiskWhat,
    },
    /// Ask the guest to give up this much memory (0: none), or show how much it gave up.
    Balloon {
        /// 64M, 1G; a bare number is MiB.
        #[arg(value_parser = size::parse_bytes)]
        bytes: Option<u64>,
    },
    /// Ask the guest to use this much hot-plugged memory, or show how much it uses.
    Memory {
        /// 64M, 1G; a bare number is MiB.
        #[arg(value_parser = size::parse_bytes)]
        bytes: Option<u64>,
    },
    /// Show and change the network: as `freestone net`.
    Net {
        #[command(subcommand)]
        what: Option<net::What>,
    },
}

#[derive(Debug, Subcommand)]
enum DiskWhat {
    /// Look at a raw image again, which may have been made larger or smaller, and tell the guest.
    Refresh,
    /// Limit what goes through the disk; without options there is no limit any more.
    Limit {
        /// Bytes a second.
        #[arg(long, value_name = "SIZE", value_parser = size::parse_rate)]
        bandwidth: Option<u64>,
        /// Requests a second.
        #[arg(long, value_name = "N", value_parser = disk::positive)]
        iops: Option<u64>,
    },
}

impl What {
    fn request(&self) -> Request {
        match self {
            Self::Stats => Request::Stats,
            Self::Disk { name, what: DiskWhat::Refresh } => Request::DiskRefresh { disk: name.clone() },
            Self::Disk { name, what: DiskWhat::Limit { bandwidth, iops } } => {
                Request::DiskLimit { disk: name.clone(), bandwidth: *bandwidth, iops: *iops }
            }
            Self::Balloon { bytes } => Request::Balloon { bytes: *bytes },
            Self::Memory { bytes } => Request::Memory { bytes: *bytes },
            Self::Net { what } => what.as_ref().map_or(Request::Net, net::What::request),
        }
    }
}

/// Asks and prints the answer.
pub(crate) fn ctl(args: &Ctl) -> Result<ExitCode, Failure> {
    if let What::Net { what } = &args.what {
        return about_net(&args.target.socket()?, args.json, what.as_ref().unwrap_or(&net::What::Show));
    }
    let request = args.what.request();
    let answer = ask(&args.target.socket()?, &request)?;
    if args.json {
        say::line(answer)?;
    } else {
        say::line(describe(&request, &answer))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks about the network and prints the answer.
pub(crate) fn net(args: &net::Net) -> Result<ExitCode, Failure> {
    about_net(&args.target.socket()?, args.json, &args.what())
}

fn about_net(socket: &Path, json: bool, what: &net::What) -> Result<ExitCode, Failure> {
    let view = what.view(ask(socket, &what.request())?);
    if json {
        say::line(view)?;
    } else {
        say::line(what.describe(&view))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the machine answers, if it did what it was asked.
pub(crate) fn ask(socket: &Path, request: &Request) -> Result<Value, Failure> {
    ask_with(socket, request, LIMIT, |_, _| {})
}

/// The same, where `progress` is told of bytes done and bytes in all, and nothing may be silent for longer than `limit`.
pub(crate) fn ask_with(
    socket: &Path,
    request: &Request,
    limit: Duration,
    progress: impl FnMut(u64, u64),
) -> Result<Value, Failure> {
    let mut answer = exchange(socket, request, limit, progress)?;
    if let Some(error) = answer.get("error").and_then(Value::as_str) {
        return Err(Failure::new(error));
    }
    let answer = answer.get_mut("ok").ok_or_else(|| Failure::new("the machine's answer is none"))?;
    Ok(answer.take())
}

fn exchange(
    socket: &Path,
    request: &Request,
    limit: Duration,
    mut progress: impl FnMut(u64, u64),
) -> Result<Value, Failure> {
    let path = socket.display();
    let failed =
        |what: &str, error: &dyn std::fmt::Display| Failure::new(format!("cannot {what} {path}: {error}"));
    let mut stream = UnixStream::connect(socket).map_err(|e| failed("connect to", &e))?;
    stream.set_read_timeout(Some(limit)).map_err(|e| failed("use", &e))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(|e| failed("write to", &e))?;
    let mut lines = BufReader::new(stream.take(MAX_ANSWER));
    loop {
        let mut answer = String::new();
        lines.read_line(&mut answer).map_err(|e| failed("read from", &e))?;
        if answer.is_empty() {
            return Err(Failure::new("the machine has ended"));
        }
        let answer: Value = serde_json::from_str(&answer).map_err(|e| failed("understand", &e))?;
        let Some(part) = answer.get("progress") else { return Ok(answer) };
        let number = |key: &str| part.get(key).and_then(Value::as_u64).unwrap_or(0);
        progress(number("done"), number("total"));
    }
}
