//! `freestone fork`: many machines of one.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use crate::control::{Request, ask, ask_with};
use crate::failure::Failure;
use crate::machine::{self, ForkRequest, ForkSource};
use crate::names::{Name, Runtime};
use crate::say;

/// How long it may take to copy the memory of a machine.
const LIMIT: Duration = Duration::from_secs(600);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone fork web --count 10 --net net0=tap=web{},up=on
      Ten machines web-1 to web-10, each with an overlay of the disk and an interface: {} is the child's number.

The children begin where the machine is now, and share its memory until they write to it. Each is a machine of its own: detached, by a
name of its own. A disk that can be written becomes an overlay, which `freestone rm` removes with the child; the machine itself then
stays paused, and another fork is quick. Without such disks it goes on. A host's port that is forwarded becomes the port and the
child's number; the vsock path gets `-` and the number. An interface, a stream socket and persistent memory must be given anew.")]
pub(crate) struct Fork {
    /// Name of the machine.
    name: String,

    /// How many children.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,

    /// The children are called PREFIX-1, PREFIX-2 and so on [default: the machine's name].
    #[arg(long = "name", value_name = "PREFIX")]
    prefix: Option<Name>,

    /// Number of the first child.
    #[arg(long, value_name = "N", default_value_t = 1)]
    first: u32,

    /// Give each child another disk: vda=SPEC. May be repeated, as the following.
    #[arg(long = "disk", value_name = "NAME=SPEC")]
    disks: Vec<String>,

    /// Plug each child's network card into something else: net0=SPEC.
    #[arg(long = "net", value_name = "NAME=SPEC")]
    nets: Vec<String>,

    /// Give each child another file as persistent memory: pmem0=SPEC.
    #[arg(long = "pmem", value_name = "NAME=SPEC")]
    pmems: Vec<String>,

    /// Give each child another path for the sockets between guest and host.
    #[arg(long, value_name = "SOCKET[,cid=N]")]
    vsock: Option<String>,

    /// Do not let the children go on yet: `freestone resume` does.
    #[arg(long)]
    paused: bool,

    /// Leave the machine itself paused.
    #[arg(long)]
    keep_paused: bool,

    /// Print a line of JSON for each child.
    #[arg(long)]
    json: bool,
}

/// Makes children, and prints their names.
pub(crate) fn fork(args: &Fork) -> Result<ExitCode, Failure> {
    let runtime = Runtime::open()?;
    let entry = runtime.entry(&args.name)?;
    entry.pid()?;
    let request = ForkRequest {
        prefix: args.prefix.clone().unwrap_or_else(|| entry.name.clone()),
        first: args.first,
        count: args.count,
        disks: args.disks.clone(),
        nets: args.nets.clone(),
        pmems: args.pmems.clone(),
        sockets: None,
        vsock: args.vsock.clone(),
        paused: args.paused,
    };
    let began = Request::Fork { others: request.others(), keep_paused: args.keep_paused };
    let source: ForkSource = serde_json::from_value(ask_with(&entry.control(), &began, LIMIT, |_, _| {})?)?;
    let mut made = 0;
    let done = machine::fork(&source, &request, &mut |child| {
        made += 1;
        let micros = u64::try_from(child.took.as_micros()).unwrap_or(u64::MAX);
        match args.json {
            true => {
                say::line(json!({ "name": child.name.as_str(), "pid": child.process.id(), "took_us": micros,
                                      "template_us": source.took_us }))
            }
            false => say::line(&child.name),
        }
    });
    // Who was started has mapped the memory. If the machine ended meanwhile, so has the template.
    drop(ask(&entry.control(), &Request::ForkEnd));
    if source.ran && source.paused && !args.keep_paused {
        if made == 0 {
            drop(ask(&entry.control(), &Request::Resume));
        } else {
            let disks = source.shared.join(", ");
            tracing::warn!("{} stays paused: its children read {disks}", entry.name);
        }
    }
    done?;
    Ok(ExitCode::SUCCESS)
}
