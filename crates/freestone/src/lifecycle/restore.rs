//! `freestone restore`: running a machine that was saved.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use freestone_kvm::Kvm;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::store::StorePaths;

use super::snapshot::{bar, paths};
use crate::disk::DiskSpec;
use crate::failure::Failure;
use crate::files;
use crate::machine::{self, Named, Remap, RestoreRequest};
use crate::net::NetSpec;
use crate::place::{Place, PlaceArgs};
use crate::run::conduct;
use crate::specs::{PmemSpec, VsockSpec};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone restore web.snap
      Go on with the machine that `freestone snapshot create` saved to the folder web.snap, on this terminal.
  freestone restore web.snap --detach --name web --disk vda=copy.qcow2,format=qcow2 --net net0=user,hostfwd=tcp::8080-:80
      The same with another disk and another forward, detached.

What the machine is made of is in the snapshot; disks and networks are opened by the names they had, unless others are given.
The exit status is that of `freestone run`.")]
pub(crate) struct Restore {
    /// Folder of the snapshot.
    #[arg(required_unless_present = "state", conflicts_with = "state")]
    dir: Option<PathBuf>,

    /// State file of a snapshot, in place of a folder.
    #[arg(long, value_name = "FILE", requires = "memory")]
    state: Option<PathBuf>,

    /// Memory file of a snapshot.
    #[arg(long, value_name = "FILE", requires = "state")]
    memory: Option<PathBuf>,

    #[command(flatten)]
    remap: RemapArgs,

    /// Do not let the guest go on yet: `freestone resume` does.
    #[arg(long)]
    paused: bool,

    /// What the guest's clock shows: `continue` where it stopped, or `advance` by the time that passed.
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Clock::Continue)]
    clock: Clock,

    /// Compare all of memory with its checksums before.
    #[arg(long)]
    verify: bool,

    /// Where memory comes from: `file` maps the file, copy-on-write.
    #[arg(long, value_name = "HOW", default_value = "file")]
    mem: MemorySource,

    /// Log what is written, so that snapshots can be made of the differences to this one.
    #[arg(long)]
    track_dirty: bool,

    #[command(flatten)]
    place: PlaceArgs,

    /// Listen for `freestone ctl` at this socket.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
}

/// Other resources of the host than a machine had.
#[derive(Debug, Clone, Args)]
pub(crate) struct RemapArgs {
    /// Use another disk: vda=SPEC, where SPEC is as for `freestone run --disk`. May be repeated.
    #[arg(long = "disk", value_name = "NAME=SPEC")]
    disks: Vec<Named<DiskSpec>>,

    /// Plug a network card into something else: net0=SPEC, where SPEC is as for `freestone run --net`. May be repeated.
    #[arg(long = "net", value_name = "NAME=SPEC")]
    nets: Vec<Named<NetSpec>>,

    /// Use another file as persistent memory: pmem0=SPEC. May be repeated.
    #[arg(long = "pmem", value_name = "NAME=SPEC")]
    pmems: Vec<Named<PmemSpec>>,

    /// Use another path for the sockets between guest and host.
    #[arg(long, value_name = "SOCKET[,cid=N]")]
    vsock: Option<VsockSpec>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Clock {
    /// Where it stopped.
    Continue,
    /// By the time that passed.
    Advance,
}

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum MemorySource {
    File,
}

impl FromStr for MemorySource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "file" => Ok(Self::File),
            _ => Err("say file".to_owned()),
        }
    }
}

/// Runs a machine that was saved until it ends.
pub(crate) fn restore(args: &Restore) -> Result<ExitCode, Failure> {
    let paths = match (&args.dir, &args.state, &args.memory) {
        (Some(dir), ..) => paths(dir)?,
        (None, Some(state), Some(memory)) => StorePaths::files(state, memory),
        _ => return Err(Failure::usage("say which snapshot: a folder, or --state and --memory")),
    };
    let MemorySource::File = args.mem;
    Place::with(&args.place, |place| {
        files::raise_limit();
        let kvm = Kvm::open()?;
        let console = place.console()?;
        let remap = args.remap.clone();
        let request = RestoreRequest {
            paths,
            clock: match args.clock {
                Clock::Continue => ClockPolicy::Continue,
                Clock::Advance => ClockPolicy::Advance,
            },
            verify: args.verify,
            track: args.track_dirty,
            count_exits: args.place.named(),
            remap: Remap {
                disks: remap.disks,
                nets: remap.nets,
                pmems: remap.pmems,
                vsock: remap.vsock,
                control: Some(args.control.clone()),
                ..Remap::default()
            },
        };
        let bar = bar();
        let made = machine::restore(&kvm, &request, &console, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let (mut vm, run) = made?;
        conduct(&mut vm, &run, &console, place, !args.paused)
    })
}
