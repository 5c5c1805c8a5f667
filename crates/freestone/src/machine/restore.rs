//! Making a machine of the reference VMM again: from files, or from a template of another process.

use std::marker::PhantomData;
use std::path::PathBuf;
use std::str::FromStr;

use freestone_kvm::Kvm;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::net::mmds::MmdsStore;
use freestone_vmm::store::{StorePaths, Stored};
use freestone_vmm::vcpu::Severity;

use super::config::{Config, ConfigSection};
use super::memory::{Care, Lifeline, MemorySource, Prefetcher, RecordRequest, Recorder};
use super::vm::{Origin, Vm};
use crate::cli::Run;
use crate::console::Console;
use crate::disk::DiskSpec;
use crate::failure::Failure;
use crate::net::NetSpec;
use crate::specs::{PmemSpec, VsockSpec};

/// What is to be restored, and what of it is to be another than it was.
#[derive(Debug, Clone)]
pub(crate) struct RestoreRequest {
    /// The snapshot.
    pub(crate) paths: StorePaths,
    /// Where its memory comes from.
    pub(crate) memory: MemorySource,
    /// A working set, whose pages are made present while the machine starts.
    pub(crate) prefetch: Option<PathBuf>,
    /// Whether the pages that are used are written down.
    pub(crate) record: Option<RecordRequest>,
    /// What the clock shows.
    pub(crate) clock: ClockPolicy,
    /// Whether it is refused if its processor does not fit this host.
    pub(crate) check: bool,
    /// Whether all of memory is compared with its checksums before.
    pub(crate) verify: bool,
    /// Whether writes are logged, so that differences to this snapshot can be made.
    pub(crate) track: bool,
    /// Whether exits are counted.
    pub(crate) count_exits: bool,
    /// Other resources of the host.
    pub(crate) remap: Remap,
}

impl RestoreRequest {
    /// Everything as it was.
    pub(crate) fn new(paths: StorePaths) -> Self {
        Self {
            paths,
            memory: MemorySource::File,
            prefetch: None,
            record: None,
            clock: ClockPolicy::Continue,
            check: true,
            verify: false,
            track: false,
            count_exits: false,
            remap: Remap::default(),
        }
    }
}

/// Resources of the host that a restored machine uses in place of those it had.
#[derive(Debug, Clone, Default)]
pub(crate) struct Remap {
    /// Disks by name (`vda`), each with a whole `--disk`.
    pub(crate) disks: Vec<Named<DiskSpec>>,
    /// Network cards by name (`net0`), each with a whole `--net`.
    pub(crate) nets: Vec<Named<NetSpec>>,
    /// Persistent memories by name (`pmem0`), each with a whole `--pmem`.
    pub(crate) pmems: Vec<Named<PmemSpec>>,
    /// The sockets' path.
    pub(crate) vsock: Option<VsockSpec>,
    /// The same, where the guest's number stays.
    pub(crate) vsock_path: Option<PathBuf>,
    /// Network cards by name, of which only what they are plugged into is another.
    pub(crate) net_kinds: Vec<Named<NetSpec>>,
    /// What the metadata service says.
    pub(crate) metadata: Option<MmdsStore>,
    /// The control socket: `Some(None)` for none.
    pub(crate) control: Option<Option<PathBuf>>,
}

/// `NAME=SPEC` on a command line.
#[derive(Debug, Clone)]
pub(crate) struct Named<T> {
    pub(crate) name: String,
    /// The text was read as one of these.
    checked: PhantomData<T>,
    /// The same as text.
    pub(crate) text: String,
}

impl<T: FromStr<Err = String>> FromStr for Named<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, spec) = text.split_once('=').ok_or("say NAME=WHAT: which, and what in its place")?;
        spec.parse::<T>()?;
        Ok(Self { name: name.to_owned(), checked: PhantomData, text: spec.to_owned() })
    }
}

impl Remap {
    /// What the machine of `config` is with these resources, as text, which a snapshot of it keeps, and as what it means.
    pub(super) fn apply(&self, config: &mut Config) -> Result<Run, Failure> {
        let run = config.parse()?;
        let pmems = (0..run.pmems.len()).map(|n| format!("pmem{n}")).collect();
        replace("disk", disk_names(&run), &self.disks, config)?;
        let nets = net_names(&run);
        for card in &self.net_kinds {
            let at = nets
                .iter()
                .position(|name| *name == card.name)
                .ok_or_else(|| missing("net", &card.name, &nets))?;
            config.amend("net", at, |old| plugged(old, &card.text));
        }
        replace("net", nets, &self.nets, config)?;
        replace("pmem", pmems, &self.pmems, config)?;
        if let Some(vsock) = &self.vsock {
            if run.vsock.is_none() {
                return Err(Failure::usage("the snapshot's machine has no vsock"));
            }
            let path = vsock.path.to_string_lossy().replace(',', ",,");
            config.replace("vsock", 0, &format!("path={path},cid={}", vsock.cid))?;
        }
        if let Some(path) = &self.vsock_path {
            let cid =
                run.vsock.as_ref().ok_or_else(|| Failure::usage("the snapshot's machine has no vsock"))?.cid;
            let path = path.to_string_lossy().replace(',', ",,");
            config.replace("vsock", 0, &format!("path={path},cid={cid}"))?;
        }
        let mut run = config.parse()?;
        run.metadata.clone_from(&self.metadata);
        if let Some(control) = &self.control {
            run.control = control.clone();
        }
        Ok(run)
    }
}

/// The names of a machine's disks that have a file, in the order of `--disk`.
pub(super) fn disk_names(run: &Run) -> Vec<String> {
    let first = usize::from(run.kernel.is_none());
    ('a'..='z').skip(first).take(run.disks.len()).map(|letter| format!("vd{letter}")).collect()
}

/// The names of a machine's network cards, in the order of `--net`.
pub(super) fn net_names(run: &Run) -> Vec<String> {
    (0..).zip(&run.nets).map(|(n, net)| net.id.clone().unwrap_or(format!("net{n}"))).collect()
}

/// The description of a card that keeps its options and is plugged into something else: both begin with what that is.
fn plugged(old: &str, into: &str) -> String {
    let end = |text: &str| {
        let bytes = text.as_bytes();
        let comma = |at: &usize| bytes.get(*at) == Some(&b',');
        let doubled = |at: usize| comma(&(at + 1)) || (at > 0 && comma(&(at - 1)));
        (0..bytes.len()).find(|at| comma(at) && !doubled(*at)).unwrap_or(bytes.len())
    };
    let rest = old.get(end(old)..).unwrap_or_default();
    format!("{}{rest}", into.get(..end(into)).unwrap_or(into))
}

/// Puts each of `others` in the place of the one of `--option` that has its name.
fn replace<T>(
    option: &str,
    names: Vec<String>,
    others: &[Named<T>],
    config: &mut Config,
) -> Result<(), Failure> {
    for other in others {
        match names.iter().position(|name| *name == other.name) {
            Some(at) => config.replace(option, at, &other.text)?,
            None => return Err(missing(option, &other.name, &names)),
        }
    }
    Ok(())
}

fn missing(option: &str, name: &str, names: &[String]) -> Failure {
    let what = match option {
        "net" => "network card",
        "pmem" => "persistent memory",
        other => other,
    };
    let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Failure::usage(format!("the snapshot's machine has no {what} {name:?}; it has: {there}"))
}

/// Makes the machine of a snapshot. It is paused: [`Vm::go`] lets it go on. Nothing of it runs if anything does not fit.
pub(crate) fn restore(
    kvm: &Kvm,
    request: &RestoreRequest,
    console: &Console,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Vm, Run), Failure> {
    let mut stored = match &request.memory {
        MemorySource::File => Stored::open(&request.paths)?,
        MemorySource::Uffd(_) => Stored::open_state(request.paths.state())?,
    };
    if request.check {
        check(kvm, &stored)?;
    }
    if request.verify {
        stored.verify(progress)?;
    }
    let mut config = Config::try_from(stored.sections().take::<ConfigSection>()?)?;
    let mut run = request.remap.apply(&mut config)?;
    run.cpus = stored.machine().cpus();
    run.track_dirty |= request.track;
    run.count_exits = request.count_exits;
    let (memory, care) = memory(request, &stored, run.track_dirty)?;
    let id = stored.memory().id();
    let origin = Origin::Restore { sections: stored.sections(), memory, clock: request.clock };
    let mut vm = Vm::create(kvm, config, &run, console, origin)?;
    if run.track_dirty {
        vm.machine.paused()?.track_since(id)?;
    }
    vm.care = care;
    match &mut vm.care.lifeline {
        Some(lifeline) => {
            lifeline.hold(vm.machine.handle());
            lifeline.served().fill(&vm.machine)?;
        }
        None => stored.fill(&vm.machine)?,
    }
    if let Some(record) = &request.record {
        vm.care.recorder = Some(Recorder::new(record, stored.layout(), vm.commander())?);
    }
    stored.finish()?;
    Ok((vm, run))
}

/// Fails if the guest would not go on rightly on this host.
fn check(kvm: &Kvm, stored: &Stored) -> Result<(), Failure> {
    let (refused, warned): (Vec<_>, Vec<_>) =
        stored.check_cpu(kvm)?.into_iter().partition(|mismatch| mismatch.severity == Severity::Refuse);
    warned.iter().for_each(|mismatch| tracing::warn!("{mismatch}"));
    if refused.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = refused.iter().map(ToString::to_string).collect();
    Err(Failure::new(format!(
        "the snapshot does not fit this host: {} (--no-check restores it all the same)",
        list.join("; ")
    )))
}

/// The machine's memory, and what has to live as long.
fn memory(request: &RestoreRequest, stored: &Stored, log: bool) -> Result<(GuestMem, Care), Failure> {
    let mut care = Care::default();
    let memory = match &request.memory {
        MemorySource::File => stored.map(log)?,
        MemorySource::Uffd(source) => {
            let (memory, lifeline) = Lifeline::connect(stored, source, log)?;
            care.lifeline = Some(lifeline);
            memory
        }
    };
    if let Some(file) = &request.prefetch {
        care.prefetcher = Some(Prefetcher::start(file, &memory, stored.layout())?);
    }
    Ok((memory, care))
}
