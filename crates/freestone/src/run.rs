//! `freestone run`: from the command line to a machine, and from its end to an exit status.

use std::process::ExitCode;
use std::sync::Arc;

use freestone_kvm::Kvm;
use freestone_vmm::ExitReason;
use freestone_vmm::bus::{self, ThreadSpawner};

use crate::cli::{ConsoleKind, Run};
use crate::console::{Console, FollowSize};
use crate::control::ControlServer;
use crate::failure::{FAILURE, Failure};
use crate::machine::{Config, Origin, Vm};
use crate::signals::StopOnSignal;
use crate::{files, stats};

/// Runs a machine until it ends.
pub(crate) fn run(args: &Run) -> Result<ExitCode, Failure> {
    if args.kernel.is_none() && args.console == ConsoleKind::Virtio {
        return Err(Failure::usage(
            "--console virtio needs --kernel: the built-in guest has a serial port only",
        ));
    }
    files::raise_limit();
    let kvm = Kvm::open()?;
    let console = Console::new();
    let mut vm = Vm::create(&kvm, Config::of_process()?, args, &console, Origin::Boot)?;
    conduct(&mut vm, args, &console)
}

/// Lets a machine run with its console on this terminal, until it ends.
pub(crate) fn conduct(vm: &mut Vm, args: &Run, console: &Console) -> Result<ExitCode, Failure> {
    let machine = &vm.machine;
    let terminal = console.attach(machine.handle())?;
    let signals = StopOnSignal::install(machine.handle())
        .map_err(|e| Failure::new(format!("cannot catch signals: {e}")))?;
    let _signals = machine.drive(signals)?;
    let _size = vm
        .console
        .clone()
        .map(FollowSize::install)
        .transpose()?
        .map(|work| machine.drive(work))
        .transpose()?;
    // What answers some questions is driven by the machine's own thread: who waits for the answer is not.
    let _control = match &args.control {
        Some(path) => {
            let server = ControlServer::bind(path, Arc::clone(&vm.controls))
                .map_err(|e| Failure::new(format!("cannot listen for control at {}: {e}", path.display())))?;
            let thread = ThreadSpawner::new("control")?;
            Some((bus::spawn(&thread, server)?, thread))
        }
        None => None,
    };
    vm.go()?;
    let reason = vm.conduct();
    drop(terminal);
    let reason = reason?;
    if args.stats {
        stats::print(&vm.machine.stats());
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
