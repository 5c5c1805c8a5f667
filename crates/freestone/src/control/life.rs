//! Operations on the machine as a whole. The machine's own thread carries them out, and answers when they are done: others are
//! served meanwhile.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use freestone_vmm::store::StorePaths;
use freestone_vmm::vcpu::stats::{Row, Snapshot};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};

use super::protocol::Request;
use crate::failure::Failure;
use crate::machine::{Commander, Kind, MigrateRequest, SnapshotRequest, Vm};

/// The least time between two lines of progress.
const INTERVAL: Duration = Duration::from_millis(100);

/// A machine as a whole, as the control socket reaches it.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    commander: Commander,
    name: Option<String>,
    started: Instant,
    doing: Arc<Mutex<Option<&'static str>>>,
}

impl Life {
    /// Reaches the machine of `commander`, which is called `name`.
    pub(crate) fn new(commander: Commander, name: Option<String>) -> Self {
        Self { commander, name, started: Instant::now(), doing: Arc::default() }
    }

    /// Has `request` carried out and answered by `reply`, or gives it back if it is none of these.
    pub(super) fn carry_out(&self, request: Request, reply: Reply) -> Option<(Request, Reply)> {
        match request {
            Request::Status => self.status(reply),
            Request::Pause => self.change(reply, Vm::pause),
            Request::Resume => self.change(reply, Vm::go),
            Request::Exits => {
                self.commander.send(move |vm| reply.finish(Ok(exits(&vm.machine.stats()))));
            }
            Request::Stop { force } => {
                // Answered before the machine may be gone.
                let commander = self.commander.clone();
                self.commander.send(move |vm| {
                    let asked = !force && vm.ask_to_power_off();
                    reply.finish(Ok(json!({ "asked": asked, "stopping": !asked })));
                    if !asked {
                        commander.stop();
                    }
                });
            }
            Request::Snapshot { dir, state, memory, diff } => match paths(dir, state, memory) {
                Ok(paths) => self.snapshot(reply, paths, diff),
                Err(failure) => reply.finish(Err(failure)),
            },
            Request::Fork { others, keep_paused } => self.commander.send(move |vm| {
                let source = vm.fork_begin(&others, keep_paused);
                reply.finish(source.and_then(|source| Ok(serde_json::to_value(source)?)));
            }),
            Request::ForkEnd => self.commander.send(move |vm| {
                vm.fork_end();
                reply.finish(Ok(json!({})));
            }),
            Request::Migrate(request) => self.migrate(reply, request),
            other => return Some((other, reply)),
        }
        None
    }

    fn status(&self, reply: Reply) {
        let doing = *self.doing.lock().unwrap_or_else(PoisonError::into_inner);
        let (name, uptime) = (self.name.clone(), self.started.elapsed().as_secs());
        if let Some(doing) = doing {
            reply.finish(Ok(json!({ "name": name, "pid": std::process::id(), "uptime": uptime,
                                    "state": "paused", "doing": doing })));
            return;
        }
        self.commander.send(move |vm| {
            let status = vm.status();
            reply.finish(Ok(json!({ "name": name, "pid": std::process::id(), "uptime": uptime,
                                    "state": status.state.name(), "cpus": status.cpus, "memory": status.memory })));
        });
    }

    fn change(&self, reply: Reply, how: impl FnOnce(&mut Vm) -> Result<(), Failure> + Send + 'static) {
        self.commander.send(move |vm| {
            let began = Instant::now();
            let done = how(vm).map(|()| {
                let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                json!({ "state": vm.status().state.name(), "took_us": micros })
            });
            reply.finish(done);
        });
    }

    fn migrate(&self, mut reply: Reply, request: MigrateRequest) {
        let (commander, doing) = (self.commander.clone(), Arc::clone(&self.doing));
        // The machine's own thread drives its devices meanwhile, and this socket's others.
        let spawned = std::thread::Builder::new().name("migrate".to_owned()).spawn(move || {
            let sent = commander.migrate(&request, &doing, &mut |done, total| reply.progress(done, total));
            let ended = sent.is_ok();
            reply.finish(sent.map(|report| {
                let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
                json!({ "rounds": report.rounds, "sent": report.sent, "downtime_us": micros(report.downtime),
                        "total_us": micros(report.total) })
            }));
            if ended {
                commander.stop();
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a migration");
        }
    }

    fn snapshot(&self, mut reply: Reply, paths: StorePaths, diff: bool) {
        let doing = Arc::clone(&self.doing);
        self.commander.send(move |vm| {
            let set = |what| *doing.lock().unwrap_or_else(PoisonError::into_inner) = what;
            set(Some("snapshot"));
            let kind = if diff { Kind::Diff } else { Kind::Full };
            let request = SnapshotRequest { paths, kind };
            let made = vm.snapshot(&request, &mut |done, total| reply.progress(done, total));
            set(None);
            reply.finish(made.map(|report| json!({ "id": report.id.to_string(), "written": report.written, "memory": report.memory })));
        });
    }
}

fn paths(
    dir: Option<PathBuf>,
    state: Option<PathBuf>,
    memory: Option<PathBuf>,
) -> Result<StorePaths, Failure> {
    match (dir, state, memory) {
        (Some(dir), None, None) => Ok(StorePaths::in_folder(dir)),
        (None, Some(state), Some(memory)) => Ok(StorePaths::files(state, memory)),
        _ => Err(Failure::usage("a snapshot goes to a folder, or to a file for state and one for memory")),
    }
}

fn exits(vcpus: &[Snapshot]) -> Value {
    let row = |row: &Row| {
        let ns = |time: Option<Duration>| time.and_then(|time| u64::try_from(time.as_nanos()).ok());
        json!({
            "reason": row.reason.name(),
            "count": row.count,
            "guest_p50_ns": ns(row.guest.percentile(50)),
            "handling_p50_ns": ns(row.handling.percentile(50)),
            "handling_p99_ns": ns(row.handling.percentile(99)),
        })
    };
    let vcpu =
        |snapshot: &Snapshot| snapshot.rows().iter().filter(|row| row.count > 0).map(row).collect::<Vec<_>>();
    json!({ "vcpus": vcpus.iter().map(vcpu).collect::<Vec<_>>() })
}

/// A client among those of the server: its place, and how many had that place before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) slot: usize,
    pub(super) turn: u64,
}

/// A line for a client.
#[derive(Debug)]
pub(super) struct Letter {
    pub(super) to: Address,
    pub(super) line: String,
    /// Nothing more comes for the request.
    pub(super) last: bool,
}

/// Where answers arrive that take long.
pub(super) struct Mailbox {
    letters: Receiver<Letter>,
    sender: Sender<Letter>,
    bell: Arc<OwnedFd>,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let (sender, letters) = channel();
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { letters, sender, bell: Arc::new(bell) })
    }

    /// Readable when something arrived.
    pub(super) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    /// What arrived since the bell rang.
    pub(super) fn collect(&self) -> Vec<Letter> {
        // Read first: who rings afterwards is heard again.
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
        self.letters.try_iter().collect()
    }

    /// Paper for an answer to `to`.
    pub(super) fn reply(&self, to: Address) -> Reply {
        let (sender, bell) = (self.sender.clone(), Arc::clone(&self.bell));
        Reply { to, sender, bell, told: None, done: false }
    }
}

/// An answer that is owed to a client. Dropped without one, it says that the machine has ended.
pub(super) struct Reply {
    to: Address,
    sender: Sender<Letter>,
    bell: Arc<OwnedFd>,
    told: Option<Instant>,
    done: bool,
}

impl Reply {
    fn progress(&mut self, done: u64, total: u64) {
        if self.told.is_none_or(|told| told.elapsed() >= INTERVAL) {
            self.told = Some(Instant::now());
            self.send(&json!({ "progress": { "done": done, "total": total } }), false);
        }
    }

    fn finish(mut self, outcome: Result<Value, Failure>) {
        self.done = true;
        match outcome {
            Ok(value) => self.send(&json!({ "ok": value }), true),
            Err(failure) => self.send(&json!({ "error": failure.to_string() }), true),
        }
    }

    fn send(&self, line: &Value, last: bool) {
        // Fails when the server is gone, and all clients with it.
        if self.sender.send(Letter { to: self.to, line: line.to_string(), last }).is_ok()
            && let Err(error) = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes())
        {
            tracing::debug!(%error, "cannot wake the control socket");
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.done {
            self.send(&json!({ "error": "the machine has ended" }), true);
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("to", &self.to).finish_non_exhaustive()
    }
}
