//! `freestone migrate` and `freestone receive`: a machine goes on in another process, on this host or another.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use freestone_kvm::Kvm;
use serde_json::Value;

use super::restore::RemapArgs;
use super::snapshot::bar;
use crate::control::{Request, ask_with};
use crate::failure::Failure;
use crate::machine::{Arrival, MigratePlace, MigrateRequest, receive as take};
use crate::names::Runtime;
use crate::place::{Place, PlaceArgs};
use crate::run::conduct;
use crate::{files, say, size};

/// How long nothing may be heard of a migration beyond what the other side may take: the source may have to take its disks back.
const GRACE: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone receive tcp:0.0.0.0:7000 --name web --detach        (on the other host)
  freestone migrate web tcp:other:7000
      The machine `web` goes on there, and hardly notices. It was started with --track-dirty: otherwise it stands still while all of
      its memory is copied. Both sides see its disks by the same names, unless `receive` is given others.

Whatever fails leaves the machine running here. The stream is neither encrypted nor authenticated.")]
pub(crate) struct Migrate {
    /// Name of the machine.
    name: String,

    /// Where `freestone receive` listens: unix:PATH or tcp:ADDR:PORT.
    dest: MigratePlace,

    /// How long the guest may stand still, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 300)]
    max_downtime: u64,

    /// How often what the guest wrote meanwhile is copied before the migration is given up.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_rounds: u32,

    /// Stop a guest that writes too quickly for the downtime all the same.
    #[arg(long)]
    force: bool,

    /// How long the other side may be silent, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,

    /// Print what it was as JSON.
    #[arg(long)]
    json: bool,
}

/// Sends a machine away.
pub(crate) fn migrate(args: &Migrate) -> Result<ExitCode, Failure> {
    let entry = Runtime::open()?.entry(&args.name)?;
    entry.pid()?;
    let request = MigrateRequest {
        dest: args.dest.clone().absolute(&std::env::current_dir()?),
        max_downtime_ms: args.max_downtime,
        max_rounds: args.max_rounds,
        force: args.force,
        timeout: args.timeout,
    };
    let limit = Duration::from_secs(args.timeout) + GRACE;
    let bar = bar();
    let answer = ask_with(&entry.control(), &Request::Migrate(request), limit, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let answer = answer?;
    if args.json {
        say::line(&answer)?;
    } else {
        let number = |key: &str| answer.get(key).and_then(Value::as_u64).unwrap_or(0);
        say::line(format_args!(
            "{} runs at {}: {} in {} rounds and {} ms; it stood still for {} ms",
            entry.name,
            args.dest,
            size::display(number("sent")),
            number("rounds"),
            number("total_us") / 1000,
            number("downtime_us") / 1000,
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone receive unix:/run/web.sock --name web2 --detach; freestone migrate web unix:/run/web.sock
      The machine `web` becomes `web2`, in another process of this host.

With --detach the command returns when it listens. One machine is taken; what fails is told on both sides. The stream is neither encrypted
nor authenticated, and says which files are opened: take machines only from those whom you trust.")]
pub(crate) struct Receive {
    /// Where to listen: unix:PATH or tcp:ADDR:PORT.
    listen: MigratePlace,

    #[command(flatten)]
    remap: RemapArgs,

    /// The most memory that the machine may have [default: what this host has].
    #[arg(long, value_name = "SIZE", value_parser = size::parse_memory)]
    max_memory: Option<u64>,

    /// How long the other side may be silent, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,

    /// Log what is written, so that the machine can migrate on, and be saved by differences.
    #[arg(long)]
    track_dirty: bool,

    #[command(flatten)]
    place: PlaceArgs,

    /// Listen for `freestone ctl` at this socket.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
}

/// Waits for a machine, and runs it until it ends.
pub(crate) fn receive(args: &Receive) -> Result<ExitCode, Failure> {
    Place::with(&args.place, |place| {
        files::raise_limit();
        let kvm = Kvm::open()?;
        let console = place.console()?;
        let info = rustix::system::sysinfo();
        let host = info.totalram.saturating_mul(info.mem_unit.into());
        let arrival = Arrival {
            remap: args.remap.remap(args.control.clone()),
            max_memory: args.max_memory.unwrap_or(host).min(host),
            track: args.track_dirty,
            count_exits: args.place.named(),
        };
        let listener = args.listen.listen()?;
        if let Some(listening) = listener.place() {
            tracing::info!("waiting for a machine at {listening}");
        }
        place.ready();
        let link = listener.accept(Duration::from_secs(args.timeout))?;
        let (mut vm, run) = take(&kvm, link, &arrival, &console)?;
        conduct(&mut vm, &run, &console, place, true)
    })
}
