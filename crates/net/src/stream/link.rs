//! [`Link`]: the connection to one peer at a time, made again when it breaks.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::conn::{Broken, Conn, Next, Put};
use super::socket::{Listener, StreamAddr, dial};
use crate::{Error, Frame, Result};

/// Longest wait between two attempts, unless the first is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How it goes with the peers of a [`StreamPort`](super::StreamPort). Read by any thread.
#[derive(Debug, Default)]
pub struct StreamStatus {
    connected: AtomicBool,
    connections: AtomicU64,
    broken: AtomicU64,
}

impl StreamStatus {
    /// Whether there is a peer.
    pub fn connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Peers so far.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Peers that were left because they said a length that no frame has.
    pub fn broken(&self) -> u64 {
        self.broken.load(Ordering::Relaxed)
    }
}

/// Where peers come from.
#[derive(Debug)]
pub(super) enum Peers {
    /// It was given, and there is no other.
    Given,
    /// We go to it, again after so long if it says so.
    Dial(StreamAddr, Option<Duration>),
    /// They come.
    Listen(Listener),
}

/// Called with whether there is a peer, when that changes.
pub(super) type Hook = Box<dyn FnMut(bool) + Send>;

/// See the module.
pub(super) struct Link {
    peers: Peers,
    conn: Option<Conn>,
    /// The connection is being made.
    opening: bool,
    /// Holds all sockets and the timer, so that there is one source for good.
    poll: Arc<OwnedFd>,
    timer: OwnedFd,
    /// What is waited before the next attempt.
    wait: Duration,
    pub(super) status: Arc<StreamStatus>,
    pub(super) hook: Option<Hook>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("peers", &self.peers).field("conn", &self.conn).finish_non_exhaustive()
    }
}

fn watch(poll: &OwnedFd, fd: impl AsFd) -> io::Result<()> {
    Ok(epoll::add(poll, fd, epoll::EventData::new_u64(0), edges())?)
}

fn edges() -> epoll::EventFlags {
    epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET
}

impl Link {
    pub(super) fn new(peers: Peers) -> Result<Self> {
        let failed = |e: io::Error| Error::io("watch a stream of frames")(e);
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(|e| failed(e.into()))?;
        watch(&poll, &timer).map_err(failed)?;
        let wait = match &peers {
            Peers::Listen(listener) => {
                watch(&poll, listener).map_err(failed)?;
                Duration::ZERO
            }
            Peers::Dial(_, wait) => wait.unwrap_or_default(),
            Peers::Given => Duration::ZERO,
        };
        let (poll, status) = (Arc::new(poll), Arc::default());
        Ok(Self { peers, conn: None, opening: false, poll, timer, wait, status, hook: None })
    }

    pub(super) fn source(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.poll)
    }

    pub(super) fn listener(&self) -> Option<&Listener> {
        match &self.peers {
            Peers::Listen(listener) => Some(listener),
            _ => None,
        }
    }

    /// Uses this connection.
    pub(super) fn set(&mut self, socket: OwnedFd) -> io::Result<()> {
        watch(&self.poll, &socket)?;
        self.opening = rustix::net::getpeername(&socket).is_err();
        self.conn = Some(Conn::new(socket));
        if !self.opening {
            self.opened();
        }
        Ok(())
    }

    fn opened(&mut self) {
        self.opening = false;
        self.status.connections.fetch_add(1, Ordering::Relaxed);
        self.say(true);
    }

    fn say(&mut self, connected: bool) {
        if self.status.connected.swap(connected, Ordering::Relaxed) != connected
            && let Some(hook) = &mut self.hook
        {
            hook(connected);
        }
    }

    /// Tries to connect now. Without an answer to how it goes on if it fails: see [`retry`](Self::retry).
    pub(super) fn dial(&mut self) -> io::Result<()> {
        match &self.peers {
            Peers::Dial(addr, _) => {
                let socket = dial(addr)?;
                self.set(socket)
            }
            _ => Ok(()),
        }
    }

    /// Sets the timer for the next attempt, and the wait after it to twice as long.
    pub(super) fn retry(&mut self) {
        if let Peers::Dial(addr, Some(first)) = &self.peers {
            // A timer of zero would never ring.
            let wait = self.wait.max(Duration::from_millis(1));
            tracing::debug!(%addr, ?wait, "no peer for a stream of frames");
            let value = Timespec {
                tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
            self.wait = wait.saturating_mul(2).min(LONGEST_WAIT.max(*first));
        }
    }

    /// Does what is due: accepts, connects, sends what waits.
    pub(super) fn tend(&mut self) {
        match &mut self.conn {
            Some(_) if self.opening => self.finish_opening(),
            Some(conn) => {
                let flushed = conn.flush();
                let _ = self.check(flushed);
            }
            None => self.look_for_peer(),
        }
    }

    fn finish_opening(&mut self) {
        let Some(conn) = &self.conn else {
            return;
        };
        if !matches!(rustix::net::sockopt::socket_error(conn), Ok(Ok(()))) {
            self.lost();
        } else if rustix::net::getpeername(conn).is_ok() {
            self.opened();
        }
    }

    fn look_for_peer(&mut self) {
        match &self.peers {
            Peers::Given => {}
            Peers::Listen(listener) => {
                let accepted = listener.accept();
                let set = accepted.and_then(|socket| socket.map_or(Ok(()), |socket| self.set(socket)));
                if let Err(error) = set {
                    tracing::debug!(%error, "cannot take a peer for a stream of frames");
                }
            }
            Peers::Dial(..) => {
                let mut ticks = [0; 8];
                if rustix::io::read(&self.timer, &mut ticks).is_ok() && self.dial().is_err() {
                    self.retry();
                }
            }
        }
    }

    /// Leaves the peer, and looks for the next.
    fn lost(&mut self) {
        self.conn = None;
        self.opening = false;
        self.say(false);
        if self.listener().is_some() {
            // One who waits already gives no edge.
            self.look_for_peer();
        } else {
            self.retry();
        }
    }

    /// Leaves the peer if the connection is of no more use.
    fn check<T>(&mut self, result: std::result::Result<T, Broken>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(broken) => {
                if let Broken::Length(length) = broken {
                    tracing::warn!(length, "the peer of a stream of frames said a length that no frame has");
                    self.status.broken.fetch_add(1, Ordering::Relaxed);
                }
                self.lost();
                None
            }
        }
    }

    /// The length of the next frame.
    pub(super) fn next(&mut self) -> Option<usize> {
        let next = self.conn.as_mut().filter(|_| !self.opening)?.next();
        match self.check(next)? {
            Next::Frame(len) => {
                if let Peers::Dial(_, Some(first)) = &self.peers {
                    self.wait = *first;
                }
                Some(len)
            }
            Next::Nothing => None,
            Next::Later => {
                // Setting the events again gives an edge if there is something.
                if let Some(conn) = &self.conn {
                    let _ = epoll::modify(&self.poll, conn, epoll::EventData::new_u64(0), edges());
                }
                None
            }
        }
    }

    /// The frame that [`next`](Self::next) found.
    pub(super) fn frame(&self, len: usize) -> &[u8] {
        self.conn.as_ref().map_or(&[], |conn| conn.frame(len))
    }

    pub(super) fn skip(&mut self, len: usize) {
        if let Some(conn) = &mut self.conn {
            conn.skip(len);
        }
    }

    /// Sends a frame; refused when there is no peer.
    pub(super) fn put(&mut self, frame: &Frame<'_, '_>) -> Put {
        match self.conn.as_mut().filter(|_| !self.opening) {
            Some(conn) => {
                let put = conn.put(frame);
                self.check(put).unwrap_or(Put::Refused)
            }
            None => Put::Refused,
        }
    }
}
