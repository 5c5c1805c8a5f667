//! [`NamedSwitch`]: one network for all processes of a user that know its name.
//!
//! Each process has a switch of its own. The first one listens, the others connect to it: a star, so there are no loops, and a
//! frame between two machines of one process never leaves it. When the one that listens goes away, the others see their
//! connection end, and one of them takes its place: who holds the lock file may bind. The lock is given back by the kernel
//! however a process ends.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, TryLockError, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::server::{Pipe, ServerOptions, SwitchServer, ready, watch};
use super::{PortOptions, Switch, SwitchConfig, SwitchPort, Vlan, lock};
use crate::stream::StreamAddr;
use crate::stream::socket::dial;
use crate::{Error, Result, Source};

mod place;

/// First and longest wait before the next attempt to find the others.
const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

const UPLINK: u64 = 0;
const SERVER: u64 = 1;
const TIMER: u64 = 2;
const KICK: u64 = 3;

/// What this process is among those with the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// It listens, with so many others connected.
    Server(usize),
    /// It is connected to the one that listens.
    Client,
    /// It has not found the others, and looks again soon.
    Alone,
}

enum Part {
    /// The server is dropped before the lock is given back.
    Server(Box<SwitchServer>, #[expect(dead_code, reason = "it is held")] OwnedFd),
    Client(Box<Pipe>),
    Alone,
}

struct State {
    part: Part,
    wait: Duration,
    events: Vec<u64>,
}

/// What all handles of one name in this process have in common.
struct Shared {
    path: PathBuf,
    switch: Switch,
    poll: Arc<OwnedFd>,
    timer: OwnedFd,
    kick: OwnedFd,
    state: Mutex<State>,
}

/// Switches of this process by path.
static JOINED: OnceLock<Mutex<BTreeMap<PathBuf, Weak<Shared>>>> = OnceLock::new();

/// This process's part of a network that has a name. A handle, and the pump that joins the switch with those of other
/// processes: one of the handles at least must be kept and driven, see [`step`](Self::step).
///
/// Machines of one process on the same name share one [`Switch`]. VLANs and isolation hold between processes as well.
/// QEMU and others that speak the framing of [`stream`](crate::stream) can connect to the [`path`](Self::path): they have a
/// trunk of all VLANs with VLAN 1 untagged.
#[derive(Clone)]
pub struct NamedSwitch(Arc<Shared>);

impl fmt::Debug for NamedSwitch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NamedSwitch").field("path", &self.0.path).finish_non_exhaustive()
    }
}

impl NamedSwitch {
    /// Joins the network of that name with a port for one card: what a machine calls for each of its cards.
    ///
    /// A name has letters, digits, `.`, `_` and `-`, up to 64. Its socket is `NAME.sock` in `$XDG_RUNTIME_DIR/freestone`, or in
    /// `/run/user/UID/freestone`, or in `/tmp/freestone-UID`: a folder of the user alone. A name with a slash is the path of a
    /// socket.
    ///
    /// # Errors
    /// For other names, a folder that others can write to, and as [`Switch::port`].
    pub fn join(name: &str, options: PortOptions) -> Result<(SwitchPort, Self)> {
        let path = place::path(name)?;
        let mut joined = lock(JOINED.get_or_init(Mutex::default));
        joined.retain(|_, shared| shared.strong_count() > 0);
        let shared = match joined.get(&path).and_then(Weak::upgrade) {
            Some(shared) => shared,
            None => {
                let shared = Arc::clone(&Self::at(&path)?.0);
                joined.insert(path, Arc::downgrade(&shared));
                shared
            }
        };
        drop(joined);
        let named = Self(shared);
        Ok((named.port(options)?, named))
    }

    /// Another port of this process in the network.
    ///
    /// # Errors
    /// As [`Switch::port`].
    pub fn port(&self, options: PortOptions) -> Result<SwitchPort> {
        self.0.switch.port(options)
    }

    /// As if it were a process of its own.
    fn at(path: &Path) -> Result<Self> {
        let failed =
            |e: rustix::io::Errno| Error::io(format!("join the switch {}", path.display()))(e.into());
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
            .map_err(failed)?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        for (fd, number) in [(&timer, TIMER), (&kick, KICK)] {
            watch(&poll, fd, number).map_err(Error::io(format!("join the switch {}", path.display())))?;
        }
        let state = State { part: Part::Alone, wait: FIRST_WAIT, events: Vec::new() };
        let shared = Shared {
            path: path.to_owned(),
            switch: Switch::new(SwitchConfig::default()),
            poll: Arc::new(poll),
            timer,
            kick,
            state: Mutex::new(state),
        };
        {
            let mut state = lock(&shared.state);
            shared.find(&mut state)?;
        }
        Ok(Self(Arc::new(shared)))
    }

    /// This process's switch.
    pub fn switch(&self) -> &Switch {
        &self.0.switch
    }

    /// The socket of the one that listens.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// What this process is now.
    pub fn role(&self) -> Role {
        match &lock(&self.0.state).part {
            Part::Server(server, _) => Role::Server(server.connections()),
            Part::Client(_) => Role::Client,
            Part::Alone => Role::Alone,
        }
    }

    /// What makes [`step`](Self::step) worth calling; watched for edges.
    pub fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(&self.0.poll) as Source]
    }

    /// Moves frames between this process and the others, bounded; looks for others when they went away. `true` if there is more
    /// to do: call it again before waiting. If several loops drive handles of one name, one of them does it at a time.
    pub fn step(&self) -> bool {
        let mut state = match self.0.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Whoever has it goes on until there is no more.
            Err(TryLockError::WouldBlock) => return false,
        };
        self.0.step(&mut state)
    }
}

impl Drop for NamedSwitch {
    fn drop(&mut self) {
        // Whoever drove the pump until now may have been this one's loop.
        let _ = rustix::io::write(&self.0.kick, &1u64.to_ne_bytes());
    }
}

impl Shared {
    fn step(&self, state: &mut State) -> bool {
        let mut more = ready(&self.poll, &mut state.events);
        let rang = state.events.contains(&TIMER);
        let lost = match &mut state.part {
            Part::Server(server, _) => {
                more |= server.step();
                false
            }
            Part::Client(pipe) => match pipe.step() {
                Ok(again) => {
                    more |= again;
                    if pipe.used {
                        state.wait = FIRST_WAIT;
                    }
                    false
                }
                Err(_) => true,
            },
            Part::Alone => false,
        };
        if lost {
            // A server that never sent a frame may be one that has no room: not at once again.
            let known = matches!(&state.part, Part::Client(pipe) if pipe.used);
            state.part = Part::Alone;
            if known {
                self.find_or_wait(state);
            } else {
                self.ring_later(state);
            }
        } else if rang && matches!(state.part, Part::Alone) {
            self.find_or_wait(state);
        }
        more
    }

    fn find_or_wait(&self, state: &mut State) {
        if let Err(error) = self.find(state) {
            tracing::warn!(%error, path = %self.path.display(), "cannot join the switch");
            self.ring_later(state);
        }
    }

    /// Connects to the one that listens, or becomes it. If somebody else is about to, looks again later.
    fn find(&self, state: &mut State) -> Result<()> {
        let addr = StreamAddr::Unix(self.path.clone());
        let port =
            |name: &str| PortOptions { name: name.to_owned(), vlan: Vlan::trunk(), ..PortOptions::default() };
        if let Ok(socket) = dial(&addr) {
            let pipe = Pipe::new(&self.switch, &port("uplink"), true, socket, &self.poll, UPLINK)?;
            state.part = Part::Client(Box::new(pipe));
            return Ok(());
        }
        let lock_path = place::lock_path(&self.path);
        let failed = |e: rustix::io::Errno| Error::io(format!("lock {}", lock_path.display()))(e.into());
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = rustix::fs::open(&lock_path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        match flock(&held, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                self.ring_later(state);
                return Ok(());
            }
            Err(error) => return Err(failed(error)),
        }
        let options = ServerOptions { port: port("peer"), ..ServerOptions::default() };
        let server = SwitchServer::with(&self.switch, &addr, options, true)?;
        watch(&self.poll, server.poll(), SERVER).map_err(Error::io(format!("watch the switch {addr}")))?;
        tracing::debug!(%addr, "this process serves the switch");
        state.part = Part::Server(Box::new(server), held);
        state.wait = FIRST_WAIT;
        Ok(())
    }

    fn ring_later(&self, state: &mut State) {
        let tv_nsec = state.wait.subsec_nanos().into();
        let value = Timespec { tv_sec: state.wait.as_secs().try_into().unwrap_or(1), tv_nsec };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        state.wait = state.wait.saturating_mul(2).min(LONGEST_WAIT);
    }
}
