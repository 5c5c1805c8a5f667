//! Forks by the API: children as `freestone fork` makes them, by a machine that lives on and has to see them end.
//!
//! A child is a machine with a name and a control socket. It does not serve the API.

use std::process::Child as Process;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::engine::plug;
use crate::api::engine::Done;
use crate::api::fault::Fault;
use crate::api::model::{Family, Fork, Forked};
use crate::failure::Failure;
use crate::machine::{Child, Commander, ForkRequest, ForkSource, Vm, fork};
use crate::names::{Name, Runtime};

/// What `what` asks for.
pub(super) fn request(what: &Fork) -> Result<ForkRequest, Fault> {
    let name = what.name.as_deref().unwrap_or_default();
    let prefix: Name = name.parse().map_err(|e| Fault::bad_request(format!("name: {name:?}: {e}.")))?;
    if what.first.checked_add(what.count).is_none() {
        return Err(Fault::bad_request(format!("first: {} leaves no numbers for the children.", what.first)));
    }
    let folder = |path: &std::path::PathBuf| {
        let wrong = |why: &dyn std::fmt::Display| {
            Fault::bad_request(format!("socket_dir: cannot use {}: {why}", path.display()))
        };
        let found = std::fs::canonicalize(path).map_err(|e| wrong(&e))?;
        if !found.is_dir() {
            return Err(wrong(&"it is not a directory"));
        }
        if found.to_str().is_none() {
            return Err(wrong(&"it is not UTF-8"));
        }
        Ok(found)
    };
    Ok(ForkRequest {
        prefix,
        first: what.first,
        count: what.count,
        disks: Vec::new(),
        nets: what.network_overrides.iter().map(plug).collect(),
        pmems: Vec::new(),
        sockets: what.socket_dir.as_ref().map(folder).transpose()?,
        vsock: None,
        paused: !what.resume,
    })
}

/// Makes children, answers, and stays until all of them have ended. For a thread of its own: it is there as long as a child is, so
/// there are never more of them than children.
pub(super) fn conduct(commander: &Commander, request: &ForkRequest, done: Done<Family>) {
    let mut children = Vec::new();
    match make(commander, request, &mut children) {
        Ok(family) => done.ok(family),
        Err(failure) => {
            take_back(&mut children);
            done.answer(Err(failure.into()));
        }
    }
    let processes = children.into_iter().map(|child| child.process).collect();
    reap(processes);
}

fn make(commander: &Commander, request: &ForkRequest, children: &mut Vec<Child>) -> Result<Family, Failure> {
    // However long it takes: a machine that ends drops the question.
    let source: ForkSource = commander.ask(Duration::MAX, |vm| vm.fork_begin(&[], false))??;
    let made = fork(&source, request, &mut |child| {
        children.push(child);
        Ok(())
    });
    if made.is_err() {
        take_back(children);
    }
    // Who was started has mapped the memory.
    let go = made.is_err() && source.ran && source.paused;
    let end = move |vm: &mut Vm| {
        vm.fork_end();
        if go { vm.go() } else { Ok(()) }
    };
    let ended = commander.ask(Duration::MAX, end)?;
    made?;
    ended?;
    let folder = std::path::absolute(Runtime::find().folder())?;
    let control = |name: &Name| match &request.sockets {
        Some(sockets) => sockets.join(format!("{name}.sock")),
        None => folder.join(name.as_str()).join("control"),
    };
    let forked = |child: &Child| Forked {
        id: child.name.to_string(),
        pid: child.process.id(),
        control: control(&child.name),
    };
    Ok(Family { children: children.iter().map(forked).collect(), paused: source.paused })
}

/// Ends children that were made in vain, and removes what they leave.
fn take_back(children: &mut Vec<Child>) {
    for mut child in children.drain(..) {
        let removed = child.process.kill().and_then(|()| child.process.wait()).map_err(Failure::from);
        let removed = removed.and_then(|_| Runtime::find().entry(child.name.as_str())?.remove());
        if let Err(error) = removed {
            tracing::warn!(%error, name = %child.name, "a child that was made in vain stays behind");
        }
    }
}

/// Waits for processes in the order in which they end.
fn reap(processes: Vec<Process>) {
    let watch = |process: Process| {
        // It is no other's number as long as nobody has waited for it.
        let fd = Pid::from_raw(process.id().cast_signed())
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        (process, fd)
    };
    let (mut watched, mut rest) = (Vec::<(Process, OwnedFd)>::new(), Vec::new());
    for (process, fd) in processes.into_iter().map(watch) {
        match fd {
            Some(fd) => watched.push((process, fd)),
            None => rest.push(process),
        }
    }
    while !watched.is_empty() {
        let mut fds: Vec<_> = watched.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)).collect();
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            break;
        }
        drop(fds);
        // Whoever cannot be waited for is nobody's child.
        watched.retain_mut(|(process, _)| matches!(process.try_wait(), Ok(None)));
    }
    // There was no descriptor left for these.
    let rest = rest.iter_mut().chain(watched.iter_mut().map(|(process, _)| process));
    for process in rest {
        drop(process.wait());
    }
}
