//! Making a machine of the reference VMM again: from files, or from a template of another process.

use std::path::Path;
use std::str::FromStr;

use freestone_kvm::Kvm;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::store::{StorePaths, Stored};

use super::config::{Config, ConfigSection};
use super::vm::{Origin, Vm};
use crate::cli::Run;
use crate::console::Console;
use crate::disk::DiskSpec;
use crate::failure::Failure;
use crate::net::NetSpec;
use crate::options;
use crate::specs::{PmemSpec, VsockSpec};

/// What is to be restored, and what of it is to be another than it was.
#[derive(Debug, Clone)]
pub(crate) struct RestoreRequest {
    /// The snapshot.
    pub(crate) paths: StorePaths,
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
    /// The control socket: `Some(None)` for none.
    pub(crate) control: Option<Option<std::path::PathBuf>>,
}

/// `NAME=SPEC` on a command line.
#[derive(Debug, Clone)]
pub(crate) struct Named<T> {
    pub(crate) name: String,
    pub(crate) spec: T,
    /// The same as text, which a snapshot keeps.
    text: String,
}

impl<T: FromStr<Err = String>> FromStr for Named<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, spec) = text.split_once('=').ok_or("say NAME=WHAT: which, and what in its place")?;
        Ok(Self { name: name.to_owned(), spec: spec.parse()?, text: spec.to_owned() })
    }
}

impl Remap {
    /// What the machine of `config` is with these resources, as text and as what it means. Relative paths in them begin at `folder`.
    pub(super) fn apply(&self, config: &mut Config, folder: &Path) -> Result<Run, Failure> {
        let run = config.parse()?;
        replace("disk", config, "--disk", disk_names(&run), &self.disks, |text| absolute(text, folder))?;
        replace("network card", config, "--net", net_names(&run), &self.nets, |text| {
            absolute_net(text, folder)
        })?;
        let pmems = (0..run.pmems.len()).map(|n| format!("pmem{n}")).collect();
        replace("persistent memory", config, "--pmem", pmems, &self.pmems, |text| absolute(text, folder))?;
        if let Some(vsock) = &self.vsock {
            if run.vsock.is_none() {
                return Err(Failure::usage("the snapshot's machine has no vsock"));
            }
            let path = folder.join(&vsock.path).to_string_lossy().replace(',', ",,");
            config.replace("--vsock", 0, &format!("path={path},cid={}", vsock.cid));
        }
        let mut run = config.parse()?;
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

/// A description whose file is found from everywhere.
fn absolute(text: &str, folder: &Path) -> String {
    options::map(text, |number, key, value| {
        let is_path = key == Some("path") || (number == 0 && key.is_none());
        is_path.then(|| folder.join(value).to_string_lossy().into_owned())
    })
}

/// The same of a network card.
fn absolute_net(text: &str, folder: &Path) -> String {
    options::map(text, |_, key, value| {
        let is_path = match key {
            Some("pcap" | "mirror") => true,
            Some("switch") => value.contains('/'),
            Some("stream") => !value.starts_with("tcp:"),
            _ => false,
        };
        is_path.then(|| folder.join(value).to_string_lossy().into_owned())
    })
}

/// Puts each of `others` in the place of the one that has its name.
fn replace<T>(
    what: &str,
    config: &mut Config,
    option: &str,
    names: Vec<String>,
    others: &[Named<T>],
    absolute: impl Fn(&str) -> String,
) -> Result<(), Failure> {
    for other in others {
        match names.iter().position(|name| *name == other.name) {
            Some(at) => config.replace(option, at, &absolute(&other.text)),
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
    let mut stored = Stored::open(&request.paths)?;
    if request.verify {
        stored.verify(progress)?;
    }
    let mut config = Config::try_from(stored.sections().take::<ConfigSection>()?)?;
    let mut run = request.remap.apply(&mut config, &std::env::current_dir()?)?;
    run.cpus = stored.machine().cpus();
    run.track_dirty |= request.track;
    run.count_exits = request.count_exits;
    let memory = stored.map(run.track_dirty)?;
    let id = stored.memory().id();
    let origin = Origin::Restore { sections: stored.sections(), memory, clock: request.clock };
    let mut vm = Vm::create(kvm, config, &run, console, origin)?;
    stored.fill(&vm.machine)?;
    stored.finish()?;
    if run.track_dirty {
        let mut paused = vm.machine.paused()?;
        paused.track(true)?;
        paused.set_base(id);
    }
    Ok((vm, run))
}
