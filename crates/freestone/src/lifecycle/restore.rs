//! `freestone restore`: running a machine that was saved.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use freestone_kvm::Kvm;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::store::StorePaths;

use super::snapshot::{bar, paths};
use crate::disk::DiskSpec;
use crate::failure::Failure;
use crate::files;
use crate::machine::{self, MemorySource, Named, RecordRequest, Remap, RestoreRequest};
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
    #[arg(long, value_name = "FILE")]
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

    /// Restore it even if its processor does not fit this host: what the guest relies on may not be there.
    #[arg(long, alias = "force")]
    no_check: bool,

    /// Compare all of memory with its checksums before.
    #[arg(long)]
    verify: bool,

    /// Where memory comes from: `file` maps the file, copy-on-write; `uffd=SOCKET` has a page server fill it (`freestone page-server`,
    /// or one that speaks Firecracker's handshake), which must live as long as the machine. It ends when its socket is closed,
    /// or with `,watch=process` when its process has.
    #[arg(long, value_name = "HOW", default_value = "file")]
    mem: MemorySource,

    /// Make the pages of a working set present while the machine starts.
    #[arg(long, value_name = "FILE")]
    prefetch: Option<PathBuf>,

    /// Write the pages that the machine uses to a working set: when it ends, or after --record-for.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,

    /// Write the working set so many seconds after the restore.
    #[arg(long, value_name = "SECONDS", requires = "record")]
    record_for: Option<u32>,

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

impl RemapArgs {
    /// What they mean, with this control socket.
    pub(super) fn remap(&self, control: Option<PathBuf>) -> Remap {
        let Self { disks, nets, pmems, vsock } = self.clone();
        Remap { disks, nets, pmems, vsock, control: Some(control), ..Remap::default() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Clock {
    /// Where it stopped.
    Continue,
    /// By the time that passed.
    Advance,
}

/// Runs a machine that was saved until it ends.
pub(crate) fn restore(args: &Restore) -> Result<ExitCode, Failure> {
    let paths = args.paths()?;
    Place::with(&args.place, |place| {
        files::raise_limit();
        let kvm = Kvm::open()?;
        let console = place.console()?;
        let request = RestoreRequest {
            paths,
            memory: args.mem.clone(),
            prefetch: args.prefetch.clone(),
            record: args.record.clone().map(|path| RecordRequest {
                path,
                after: args.record_for.map(|seconds| Duration::from_secs(seconds.into())),
            }),
            clock: match args.clock {
                Clock::Continue => ClockPolicy::Continue,
                Clock::Advance => ClockPolicy::Advance,
            },
            check: !args.no_check,
            verify: args.verify,
            track: args.track_dirty,
            count_exits: args.place.named(),
            remap: args.remap.remap(args.control.clone()),
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

impl Restore {
    fn paths(&self) -> Result<StorePaths, Failure> {
        let served = matches!(self.mem, MemorySource::Uffd(_));
        if served && (self.verify || self.prefetch.is_some()) {
            let what = if self.verify { "--verify: that is for" } else { "--prefetch: give it to" };
            return Err(Failure::usage(format!("--mem uffd has no {what} the page server")));
        }
        match (&self.dir, &self.state, &self.memory) {
            (Some(dir), ..) => paths(dir),
            (None, Some(state), Some(memory)) => Ok(StorePaths::files(state, memory)),
            // The memory file is the page server's business.
            (None, Some(state), None) if served => Ok(StorePaths::files(state, "")),
            _ => Err(Failure::usage("say which snapshot: a folder, or --state and --memory")),
        }
    }
}
