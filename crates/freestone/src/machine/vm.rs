//! A machine and everything around it that lives as long.

use std::borrow::Cow;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use freestone_kvm::Kvm;
use freestone_vmm::bus::{self, Task};
use freestone_vmm::devices::{
    I8042Handle, I8042Plug, PciRootPlug, PowerButton, PowerButtonPlug, PowerPlug, ProgressPlug, PvPanicPlug,
    RtcPlug, VmGenIdPlug,
};
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::memory::{Backing, GuestMem, GuestMemBuilder, HugePageSize};
use freestone_vmm::snapshot::Sections;
use freestone_vmm::vcpu::template::CpuTemplate;
use freestone_vmm::virtio::console::ConsoleHandle;
use freestone_vmm::{Attention, ExitReason, FileSource, Machine, MachineBuilder, Payload, State, loader};

use super::command::{Commander, Job};
use super::config::Config;
use super::fork::Kept;
use super::memory::Care;
use crate::attach::Attached;
use crate::cli::{ConsoleKind, MemoryBacking, Protocol, Run, Transport};
use crate::console::Console;
use crate::control::Controls;
use crate::failure::Failure;
use crate::net::{Pump, Threads};
use crate::size;
use crate::specs::CpuSpec;

/// Where a machine comes from.
pub(crate) enum Origin<'a> {
    /// It boots what its configuration says.
    Boot,
    /// It was saved.
    Restore {
        /// All of it but memory. What is not of the machine was taken out.
        sections: &'a mut Sections,
        /// Its memory, as it was.
        memory: GuestMem,
        /// What its clock shows.
        clock: ClockPolicy,
    },
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status {
    /// Where it is in its life.
    pub(crate) state: State,
    /// Number of vCPUs.
    pub(crate) cpus: u32,
    /// Bytes of RAM.
    pub(crate) memory: u64,
}

/// A machine of the reference VMM.
pub(crate) struct Vm {
    // The tasks end before the machine whose event loop drives them.
    _pumps: Vec<Task<Pump>>,
    pub(crate) machine: Machine<Kvm>,
    pub(crate) controls: Arc<Controls>,
    /// The virtio console, if there is one.
    pub(crate) console: Option<ConsoleHandle>,
    /// By which the guest is asked to shut down.
    pub(crate) keys: I8042Handle,
    config: Config,
    cpus: u32,
    /// Whether writes are to be logged, for differences.
    pub(super) tracks: bool,
    button: PowerButton,
    /// What children are forked from.
    pub(super) template: Option<Kept>,
    /// Persistent memory was given to others.
    pub(super) gave_pmem: bool,
    /// The machine is on its way to another process: it must not go on here.
    pub(super) leaving: bool,
    /// Where the machine went.
    pub(super) gone_to: Option<String>,
    jobs: Receiver<Job>,
    commander: Commander,
    // Pages may be asked for until all of the above is gone.
    pub(super) care: Care,
}

impl Vm {
    /// Makes the machine that `run` describes, which `config` has as text. Nothing runs yet.
    pub(crate) fn create(
        kvm: &Kvm,
        config: Config,
        run: &Run,
        console: &Console,
        origin: Origin<'_>,
    ) -> Result<Self, Failure> {
        let payload = match origin {
            Origin::Boot => Some(payload(run)?),
            Origin::Restore { .. } => None,
        };
        let attached = Attached::new(run, console)?;
        let mut builder = MachineBuilder::new(kvm).cpus(run.cpus).stats(run.stats || run.count_exits);
        if run.console == ConsoleKind::Serial {
            builder = builder.device(console.serial(run.serial.as_ref())?);
        }
        if let Some(CpuSpec(template)) = &run.cpu_template {
            capabilities(kvm, template)?;
            builder = builder.cpu_template(template.clone());
        }
        let keyboard = I8042Plug::new().keyboard();
        let keys = keyboard.handle();
        builder = builder
            .device(PowerPlug::new())
            .device(keyboard)
            .device(RtcPlug::new())
            .device(PvPanicPlug::new())
            .device(ProgressPlug::new());
        if run.transport == Transport::Pci {
            builder = builder.device(PciRootPlug::new());
        }
        for plug in attached.plugs {
            builder = builder.device(plug);
        }
        // Last, so that they take no interrupt line that a virtio device had without them.
        let button = PowerButtonPlug::new();
        let handle = button.handle();
        builder = builder.device(button).device(VmGenIdPlug::new());
        let machine = match (origin, payload) {
            (Origin::Restore { sections, memory, clock }, _) => {
                builder.memory(memory).restore(sections, clock)?
            }
            (Origin::Boot, Some(payload)) => builder.memory(memory(run)?).payload(payload).build()?,
            (Origin::Boot, None) => return Err(Failure::new("there is nothing to boot")),
        };
        let drive = |(pump, threads): (Pump, Option<Arc<Threads>>)| match threads {
            Some(threads) => Ok(bus::spawn(&*threads, pump)?),
            None => Ok::<_, Failure>(machine.drive(pump)?),
        };
        let pumps = attached.pumps.into_iter().map(drive).collect::<Result<Vec<_>, _>>()?;
        let (sender, jobs) = channel();
        let commander = Commander::new(sender, machine.handle());
        Ok(Self {
            _pumps: pumps,
            machine,
            controls: Arc::new(attached.controls),
            console: attached.console,
            keys,
            config,
            cpus: run.cpus,
            tracks: run.track_dirty,
            button: handle,
            template: None,
            gave_pmem: false,
            leaving: false,
            gone_to: None,
            jobs,
            commander,
            care: Care::default(),
        })
    }

    /// Lets the guest run, for the first time or again.
    pub(crate) fn go(&mut self) -> Result<(), Failure> {
        match self.machine.state() {
            State::Created => Ok(self.machine.start()?),
            State::Paused => {
                if self.leaving {
                    return Err(Failure::new("the machine is on its way to another process"));
                }
                self.own()?;
                if let Some(template) = &mut self.template {
                    template.stale = true;
                }
                self.drop_template();
                Ok(self.machine.resume()?)
            }
            _ => Ok(self.machine.resume()?),
        }
    }

    /// Where the machine went, if it did.
    pub(crate) fn gone_to(&self) -> Option<&str> {
        self.gone_to.as_deref()
    }

    /// Does what is asked, and drives the devices, until the guest ends or somebody stops the machine; stops it then.
    pub(crate) fn conduct(&mut self) -> Result<ExitReason, Failure> {
        let reason = loop {
            match self.machine.attend()? {
                Attention::Ended(reason) => break reason,
                Attention::Called => {
                    while let Ok(job) = self.jobs.try_recv() {
                        job(self);
                    }
                }
            }
        };
        let stopped = self.machine.stop();
        // What is told is the cause.
        if let Some(lifeline) = &self.care.lifeline {
            lifeline.release()?;
        }
        stopped?;
        self.record();
        Ok(reason)
    }

    /// Has `words` called if the process has to be ended since the machine cannot be.
    pub(crate) fn at_last(&self, words: impl FnOnce(&str) + Send + 'static) {
        if let Some(lifeline) = &self.care.lifeline {
            lifeline.at_last(Box::new(words));
        }
    }

    /// Writes down which memory was used, if that was asked for.
    pub(super) fn record(&mut self) {
        if let Some(recorder) = &mut self.care.recorder {
            recorder.record(self.machine.memory());
        }
    }

    /// Makes guest and devices stand still.
    pub(crate) fn pause(&mut self) -> Result<(), Failure> {
        Ok(self.machine.pause()?)
    }

    /// Asks the guest to power off, if the machine has a power button; whether it could.
    pub(crate) fn ask_to_power_off(&mut self) -> bool {
        // A guest that stands still cannot do what it is asked to.
        if self.machine.state() != State::Running {
            return false;
        }
        let pressed = self.button.press();
        if let Err(error) = &pressed {
            tracing::warn!(%error, "the guest is not asked to power off");
        }
        pressed.is_ok()
    }

    /// What the machine is doing.
    pub(crate) fn status(&self) -> Status {
        Status { state: self.machine.state(), cpus: self.cpus, memory: self.machine.memory().size() }
    }

    /// What the machine is made of.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// The same, to be changed: what a snapshot keeps from now on.
    pub(crate) fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    /// A handle for other threads.
    pub(crate) fn commander(&self) -> Commander {
        self.commander.clone()
    }
}

/// Whether the hypervisor has what a template of the CPU asks for.
fn capabilities(kvm: &Kvm, template: &CpuTemplate) -> Result<(), Failure> {
    match template.required_capabilities().find(|&number| kvm.capability(number) == 0) {
        Some(number) => Err(Failure::new(format!(
            "the CPU template needs the capability {number} of KVM, which this host does not have"
        ))),
        None => Ok(()),
    }
}

fn memory(args: &Run) -> Result<GuestMem, Failure> {
    let info = rustix::system::sysinfo();
    let host = info.totalram.saturating_mul(info.mem_unit.into());
    if args.memory > host {
        return Err(Failure::new(format!(
            "--memory {} is more than this host has ({})",
            size::display(args.memory),
            size::display(host)
        )));
    }
    let backing = match args.memory_backing {
        MemoryBacking::Anonymous => Backing::Anonymous,
        MemoryBacking::Memfd => Backing::Memfd,
        MemoryBacking::Huge2m => Backing::HugePages(HugePageSize::Size2M),
        MemoryBacking::Huge1g => Backing::HugePages(HugePageSize::Size1G),
    };
    Ok(GuestMemBuilder::new(args.memory)
        .backing(backing)
        .prefault(args.prefault)
        .dirty_log(args.track_dirty)
        .build()?)
}

fn payload(args: &Run) -> Result<Payload, Failure> {
    let Some(kernel) = &args.kernel else {
        return Ok(Payload::Image {
            bytes: Cow::Borrowed(freestone_guest::DEMO),
            cmdline: args.cmdline.clone().unwrap_or_default(),
        });
    };
    let protocol = match args.protocol {
        Protocol::Auto => loader::Protocol::Auto,
        Protocol::Pvh => loader::Protocol::Pvh,
        Protocol::Linux => loader::Protocol::Linux64,
        Protocol::Linux32 => loader::Protocol::Linux32,
    };
    Ok(Payload::Kernel {
        kernel: open("kernel", kernel)?,
        initrd: args.initrd.as_deref().map(|path| open("initrd", path)).transpose()?,
        cmdline: args.cmdline.clone().unwrap_or_else(|| default_cmdline(args)),
        protocol,
    })
}

fn default_cmdline(args: &Run) -> String {
    let console = match args.console {
        ConsoleKind::Serial => "ttyS0",
        ConsoleKind::Virtio => "hvc0",
    };
    let mut line = format!("console={console} panic=-1");
    if args.transport == Transport::Mmio {
        // Linux looks for PCI as long as nobody says that there is none, and complains.
        line.push_str(" pci=off");
    }
    if args.initrd.is_none()
        && let Some(disk) = args.disks.first()
    {
        line.push_str(if disk.read_only { " root=/dev/vda ro" } else { " root=/dev/vda rw" });
    }
    line
}

fn open(what: &str, path: &Path) -> Result<FileSource, Failure> {
    let failed = |reason: &dyn std::fmt::Display| {
        Failure::new(format!("cannot open {what} {:?}: {reason}", path.display().to_string()))
    };
    if fs::metadata(path).map_err(|e| failed(&e))?.is_dir() {
        return Err(failed(&"it is a directory"));
    }
    FileSource::open(path).map_err(|e| failed(&e))
}
