//! `freestone run`: from the command line to a machine, and from its end to an exit status.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use freestone_kvm::Kvm;
use freestone_vmm::ExitReason;
use freestone_vmm::bus::{self, Task, ThreadSpawner};

use crate::cli::{ConsoleKind, Run};
use crate::console::{Console, FollowSize};
use crate::control::{ControlServer, Life};
use crate::failure::{FAILURE, Failure};
use crate::machine::{Config, Origin, Vm};
use crate::names::Note;
use crate::place::Place;
use crate::signals::StopOnSignal;
use crate::{files, stats};

/// Runs the machine that `run` describes, which `args` of this process have as text, until it ends.
pub(crate) fn run(mut run: Run, args: &[OsString]) -> Result<ExitCode, Failure> {
    if run.kernel.is_none() && run.console == ConsoleKind::Virtio {
        return Err(Failure::usage(
            "--console virtio needs --kernel: the built-in guest has a serial port only",
        ));
    }
    run.count_exits = run.place.named();
    Place::with(&run.place, |place| {
        files::raise_limit();
        let kvm = Kvm::open()?;
        let console = place.console()?;
        let mut vm = Vm::create(&kvm, Config::of_process(args)?, &run, &console, Origin::Boot)?;
        conduct(&mut vm, &run, &console, place, true)
    })
}

/// Lets a machine live at its place until it ends. With `go`, it runs at once.
pub(crate) fn conduct(
    vm: &mut Vm,
    args: &Run,
    console: &Console,
    place: &mut Place,
    go: bool,
) -> Result<ExitCode, Failure> {
    let machine = &vm.machine;
    let terminal = console.attach(machine.handle())?;
    let signals = StopOnSignal::install(machine.handle())
        .map_err(|e| Failure::new(format!("cannot catch signals: {e}")))?;
    let _signals = machine.drive(signals)?;
    let size = match (&vm.console, place.detached()) {
        (Some(console), false) => Some(FollowSize::install(console.clone())?),
        _ => None,
    };
    let _size = size.map(|work| machine.drive(work)).transpose()?;
    let hub = place.take_hub().map(|hub| machine.drive(hub)).transpose()?;
    // What answers some questions is driven by the machine's own thread: who waits for the answer is not.
    let named = place.control();
    let _controls = [args.control.as_deref(), named.as_deref()]
        .into_iter()
        .flatten()
        .map(|path| listen(vm, path, place.name()))
        .collect::<Result<Vec<_>, _>>()?;
    place.note(note(vm, args, place.detached()))?;
    if let Some(words) = place.last_words() {
        vm.at_last(words);
    }
    if go {
        vm.go()?;
    }
    place.ready();
    let reason = vm.conduct();
    drop(terminal);
    // Only now did the guest write all that it had to say.
    drop(hub);
    let reason = reason?;
    if args.stats {
        stats::print(&vm.machine.stats());
    }
    if let Some(to) = vm.gone_to() {
        place.ended(&format!("migrated to {to}"), 0);
        eprintln!("freestone: migrated to {to}");
        return Ok(ExitCode::SUCCESS);
    }
    let status = status(&reason);
    place.ended(&reason.to_string(), status);
    report(&reason);
    Ok(ExitCode::from(status))
}

/// Serves a control socket on a thread of its own.
fn listen(
    vm: &Vm,
    path: &Path,
    name: Option<String>,
) -> Result<(Task<ControlServer>, ThreadSpawner), Failure> {
    let life = Life::new(vm.commander(), name);
    let server = ControlServer::bind(path, Arc::clone(&vm.controls), Some(life))
        .map_err(|e| Failure::new(format!("cannot listen for control at {}: {e}", path.display())))?;
    let thread = ThreadSpawner::new("control")?;
    Ok((bus::spawn(&thread, server)?, thread))
}

/// What is noted of a named machine.
fn note(vm: &Vm, args: &Run, detached: bool) -> Note {
    let (config, status) = (vm.config(), vm.status());
    let vsock = args.vsock.as_ref().map(|vsock| vsock.path.as_path());
    let sockets = args.control.as_deref().into_iter().chain(vsock);
    Note {
        args: config.args().to_vec(),
        folder: config.folder().to_string_lossy().into_owned(),
        cpus: status.cpus,
        memory: status.memory,
        started: 0,
        detached,
        sockets: sockets.map(|path| config.folder().join(path).to_string_lossy().into_owned()).collect(),
    }
}

/// The exit status by which a machine's end is told.
fn status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::PowerOff | ExitReason::Halted => 0,
        ExitReason::Reset => 3,
        ExitReason::Panicked => 4,
        ExitReason::Crashed(_) => 5,
        ExitReason::Stopped => 130,
        _ => FAILURE,
    }
}

/// Says how the machine ended, where that is not what the user waits for.
fn report(reason: &ExitReason) {
    match reason {
        ExitReason::PowerOff => {}
        ExitReason::Crashed(crash) => eprintln!("freestone: {reason}\n{crash}"),
        _ => eprintln!("freestone: {reason}"),
    }
}
