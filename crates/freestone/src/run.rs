//! `freestone run`: from the command line to a machine, and from its end to an exit status.

use std::borrow::Cow;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use freestone_kvm::Kvm;
use freestone_vmm::bus::{self, ThreadSpawner};
use freestone_vmm::devices::{I8042Plug, PciRootPlug, PowerPlug, ProgressPlug, PvPanicPlug, RtcPlug};
use freestone_vmm::loader;
use freestone_vmm::memory::{Backing, GuestMem, GuestMemBuilder, HugePageSize};
use freestone_vmm::{ExitReason, FileSource, MachineBuilder, Payload};

use crate::attach::Attached;
use crate::cli::{ConsoleKind, MemoryBacking, Protocol, Run, Transport};
use crate::console::{Console, FollowSize};
use crate::control::ControlServer;
use crate::failure::{FAILURE, Failure};
use crate::net::{Pump, Threads};
use crate::signals::StopOnSignal;
use crate::{files, size, stats};

/// Runs a machine until it ends.
pub(crate) fn run(args: &Run) -> Result<ExitCode, Failure> {
    if args.kernel.is_none() && args.console == ConsoleKind::Virtio {
        return Err(Failure::usage(
            "--console virtio needs --kernel: the built-in guest has a serial port only",
        ));
    }
    files::raise_limit();
    let kvm = Kvm::open()?;
    let payload = payload(args)?;
    let console = Console::new();
    let attached = Attached::new(args, &console)?;
    let mut builder = MachineBuilder::new(&kvm).cpus(args.cpus).memory(memory(args)?).stats(args.stats);
    if args.console == ConsoleKind::Serial {
        builder = builder.device(console.serial()?);
    }
    builder = builder
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .device(RtcPlug::new())
        .device(PvPanicPlug::new())
        .device(ProgressPlug::new());
    if args.transport == Transport::Pci {
        builder = builder.device(PciRootPlug::new());
    }
    for plug in attached.plugs {
        builder = builder.device(plug);
    }
    let mut machine = builder.payload(payload).build()?;

    let drive = |(pump, threads): (Pump, Option<Arc<Threads>>)| match threads {
        Some(threads) => Ok(bus::spawn(&*threads, pump)?),
        None => Ok::<_, Failure>(machine.drive(pump)?),
    };
    let _pumps = attached.pumps.into_iter().map(drive).collect::<Result<Vec<_>, _>>()?;
    let terminal = console.attach(machine.handle())?;
    let signals = StopOnSignal::install(machine.handle())
        .map_err(|e| Failure::new(format!("cannot catch signals: {e}")))?;
    let _signals = machine.drive(signals)?;
    let _size =
        attached.console.map(FollowSize::install).transpose()?.map(|work| machine.drive(work)).transpose()?;
    // What answers some questions is driven by the machine's event loop perhaps: who waits for the answer is not.
    let control_thread = (args.control.is_some() && attached.controls.nics.ask_threads())
        .then(|| ThreadSpawner::new("control"))
        .transpose()?;
    let _control = match &args.control {
        Some(path) => {
            let server = ControlServer::bind(path, attached.controls)
                .map_err(|e| Failure::new(format!("cannot listen for control at {}: {e}", path.display())))?;
            Some(match &control_thread {
                Some(thread) => bus::spawn(thread, server)?,
                None => machine.drive(server)?,
            })
        }
        None => None,
    };
    let reason = machine.run();
    drop(terminal);
    let reason = reason?;
    if args.stats {
        stats::print(&machine.stats());
    }
    Ok(report(&reason))
}

/// Says how the machine ended, where that is not what the user waits for, and gives the exit status.
fn report(reason: &ExitReason) -> ExitCode {
    let status = match reason {
        ExitReason::PowerOff | ExitReason::Halted => 0,
        ExitReason::Reset => 3,
        ExitReason::Panicked => 4,
        ExitReason::Crashed(_) => 5,
        ExitReason::Stopped => 130,
        _ => FAILURE,
    };
    match reason {
        ExitReason::PowerOff => {}
        ExitReason::Crashed(crash) => eprintln!("freestone: {reason}\n{crash}"),
        _ => eprintln!("freestone: {reason}"),
    }
    ExitCode::from(status)
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
    Ok(GuestMemBuilder::new(args.memory).backing(backing).prefault(args.prefault).build()?)
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
