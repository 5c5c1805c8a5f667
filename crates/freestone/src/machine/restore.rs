//! Making a machine of the reference VMM again: from files, or from a template of another process.

use std::path::PathBuf;
use std::str::FromStr;

use freestone_kvm::Kvm;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::net::mmds::MmdsStore;
use freestone_vmm::store::{StorePaths, Stored};

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
    pub(crate) spec: T,
}

impl<T: FromStr<Err = String>> FromStr for Named<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, spec) = text.split_once('=').ok_or("say NAME=WHAT: which, and what in its place")?;
        Ok(Self { name: name.to_owned(), spec: spec.parse()? })
    }
}

impl Remap {
    fn apply(&self, run: &mut Run) -> Result<(), Failure> {
        let first_disk = usize::from(run.kernel.is_none());
        let disks = ('a'..='z').skip(first_disk).map(|letter| format!("vd{letter}"));
        replace("disk", &mut run.disks, disks, &self.disks)?;
        let nets: Vec<_> =
            (0..).zip(&run.nets).map(|(n, net)| net.id.clone().unwrap_or(format!("net{n}"))).collect();
        let kinds = self.kinds(run, &nets);
        replace("network card", &mut run.nets, nets.iter().cloned(), &kinds)?;
        replace("network card", &mut run.nets, nets.into_iter(), &self.nets)?;
        replace("persistent memory", &mut run.pmems, (0..).map(|n| format!("pmem{n}")), &self.pmems)?;
        if let Some(vsock) = &self.vsock {
            if run.vsock.is_none() {
                return Err(Failure::usage("the snapshot's machine has no vsock"));
            }
            run.vsock = Some(vsock.clone());
        }
        if let Some(path) = &self.vsock_path {
            let none = || Failure::usage("the snapshot's machine has no vsock");
            run.vsock.as_mut().ok_or_else(none)?.path.clone_from(path);
        }
        run.metadata.clone_from(&self.metadata);
        if let Some(control) = &self.control {
            run.control = control.clone();
        }
        Ok(())
    }
}

impl Remap {
    /// The cards as they were, in other places.
    fn kinds(&self, run: &Run, names: &[String]) -> Vec<Named<NetSpec>> {
        let mut kinds = self.net_kinds.clone();
        for other in &mut kinds {
            let old = names.iter().position(|name| *name == other.name).and_then(|at| run.nets.get(at));
            if let Some(old) = old {
                let kind = std::mem::replace(&mut other.spec, old.clone()).kind;
                other.spec.kind = kind;
            }
        }
        kinds
    }
}

/// Puts each of `others` in the place of the one that has its name.
fn replace<T: Clone>(
    what: &str,
    specs: &mut [T],
    names: impl Iterator<Item = String>,
    others: &[Named<T>],
) -> Result<(), Failure> {
    let names: Vec<_> = names.take(specs.len()).collect();
    for other in others {
        let found = names.iter().position(|name| *name == other.name);
        match found.and_then(|at| specs.get_mut(at)) {
            Some(spec) => *spec = other.spec.clone(),
            None => {
                let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                let name = &other.name;
                return Err(Failure::usage(format!(
                    "the snapshot's machine has no {what} {name:?}; it has: {there}"
                )));
            }
        }
    }
    Ok(())
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
    if request.verify {
        stored.verify(progress)?;
    }
    let config = Config::try_from(stored.sections().take::<ConfigSection>()?)?;
    let mut run = config.parse()?;
    request.remap.apply(&mut run)?;
    run.cpus = stored.machine().cpus();
    run.track_dirty |= request.track;
    run.count_exits = request.count_exits;
    let (memory, care) = memory(request, &stored, run.track_dirty)?;
    let id = stored.memory().id();
    let origin = Origin::Restore { sections: stored.sections(), memory, clock: request.clock };
    let mut vm = Vm::create(kvm, config, &run, console, origin)?;
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
    if run.track_dirty {
        let mut paused = vm.machine.paused()?;
        paused.track(true)?;
        paused.set_base(id);
    }
    Ok((vm, run))
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
