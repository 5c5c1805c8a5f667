//! [`SwitchServer`]: ports of a switch for others, over a stream socket.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;

use super::endpoint::SwitchEndpoint;
use super::{PortOptions, Switch, SwitchPort};
use crate::stream::StreamAddr;
use crate::stream::conn::{Broken, Conn, Next, Put};
use crate::stream::socket::Listener;
use crate::{Error, Offloads, Result, Setup, Source, VnetHeader};

/// Frames each way that one connection moves before it is the turn of the next.
const BUDGET: usize = 64;
/// Connections that are served in one step.
const TURNS: usize = 16;
/// Connections that are accepted in one step.
const ACCEPTS: usize = 16;
/// Events that are taken at once.
const EVENTS: usize = 64;
const LISTENER: u64 = u64::MAX;

/// How a [`SwitchServer`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// What the port of each connection is like. Its name gets the number of the connection.
    pub port: PortOptions,
    /// Most connections at a time; what comes beyond is closed.
    pub max_connections: usize,
}

impl Default for ServerOptions {
    /// 64 connections, each with a port as it is by default.
    fn default() -> Self {
        Self { port: PortOptions::default(), max_connections: 64 }
    }
}

/// A connection with the port of the switch that it leads to.
pub(super) struct Pipe {
    conn: Conn,
    end: SwitchEndpoint,
    /// Whether a frame ever came.
    pub(super) used: bool,
    /// Keeps its place in the switch.
    port: SwitchPort,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipe").field("conn", &self.conn).field("port", &self.port).finish_non_exhaustive()
    }
}

/// Watches for edges under a number.
pub(super) fn watch(poll: &OwnedFd, fd: impl AsFd, number: u64) -> io::Result<()> {
    use epoll::EventFlags;
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
    Ok(epoll::add(poll, fd, epoll::EventData::new_u64(number), flags)?)
}

/// Takes the numbers of what is ready. `true` if there may be more.
pub(super) fn ready(poll: &OwnedFd, numbers: &mut Vec<u64>) -> bool {
    numbers.clear();
    let mut room = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let Ok((events, _)) = epoll::wait(poll, room.as_mut_slice(), Some(&zero)) else {
        return false;
    };
    numbers.extend(events.iter().map(|event| event.data.u64()));
    numbers.len() == EVENTS
}

impl Pipe {
    /// Between `socket` and a new port of `switch`, both watched by `poll` under `number`.
    pub(super) fn new(
        switch: &Switch,
        options: &PortOptions,
        uplink: bool,
        socket: OwnedFd,
        poll: &OwnedFd,
        number: u64,
    ) -> Result<Self> {
        let mut port = switch.attach(options, uplink)?;
        // The peer takes complete frames only.
        let ends = port.open_endpoints(&Setup { pairs: 1, receive: Offloads::empty() })?;
        let end = ends.into_iter().next();
        let end =
            end.ok_or_else(|| Error::invalid("switch port", port.id().to_string(), "it gave no endpoint"))?;
        watch(poll, &socket, number).map_err(Error::io("watch a connection of a switch"))?;
        watch(poll, end.event(), number).map_err(Error::io("watch a port of a switch"))?;
        Ok(Self { conn: Conn::new(socket), end, used: false, port })
    }

    /// Moves some frames both ways. `true` if there is more to do at once.
    pub(super) fn step(&mut self) -> std::result::Result<bool, Broken> {
        let more_to_peer = self.send_some()?;
        let more_from_peer = self.take_some();
        self.end.wake_receivers();
        Ok(more_to_peer || more_from_peer?)
    }

    fn send_some(&mut self) -> std::result::Result<bool, Broken> {
        if !self.conn.flush()? {
            return Ok(false);
        }
        for _ in 0..BUDGET {
            let Some((packet, tag)) = self.end.next_with_tag() else {
                self.conn.flush()?;
                return Ok(false);
            };
            match self.conn.put_later(&packet.parts(tag.as_ref())) {
                Put::Done => self.end.took(packet.len(tag.is_some())),
                Put::Refused => self.end.dropped(),
                // It waits in the switch, which drops what is too much.
                Put::Busy if !self.conn.flush()? => return Ok(false),
                Put::Busy => {}
            }
        }
        self.conn.flush()
    }

    fn take_some(&mut self) -> std::result::Result<bool, Broken> {
        for _ in 0..BUDGET {
            match self.conn.next()? {
                Next::Frame(len) => {
                    let frame = self.conn.frame(len);
                    self.end.send(self.end.now(), &VnetHeader::default(), len, |room| {
                        room.copy_from_slice(frame);
                        len
                    });
                    self.conn.skip(len);
                    self.used = true;
                }
                Next::Nothing => return Ok(false),
                Next::Later => break,
            }
        }
        Ok(true)
    }
}

#[derive(Debug)]
struct Client {
    pipe: Pipe,
    /// Whether its number is among the ready.
    queued: bool,
}

/// Accepts connections of the framing of [`stream`](crate::stream), each of which becomes a port of a switch: machines of other
/// processes, QEMU, passt.
///
/// It owns no thread: call [`step`](Self::step) when a source is ready, until it says that there is no more to do. A client that
/// does not read loses frames; one that sends without end has its turn like all others; one that says a length that no frame has
/// is closed.
#[derive(Debug)]
pub struct SwitchServer {
    switch: Switch,
    listener: Listener,
    options: ServerOptions,
    uplinks: bool,
    poll: Arc<OwnedFd>,
    clients: Vec<Option<Client>>,
    /// Numbers of clients that have something to do.
    ready: VecDeque<usize>,
    /// Somebody may wait to be accepted.
    knocking: bool,
    refused: u64,
    events: Vec<u64>,
}

impl SwitchServer {
    /// Listens at `addr`. The file of a Unix socket has mode 0600; one that nobody listens at any more is replaced.
    ///
    /// # Errors
    /// If somebody listens there already, or the host refuses.
    pub fn listen(switch: &Switch, addr: impl Into<StreamAddr>, options: ServerOptions) -> Result<Self> {
        Self::with(switch, &addr.into(), options, false)
    }

    pub(super) fn with(
        switch: &Switch,
        addr: &StreamAddr,
        options: ServerOptions,
        uplinks: bool,
    ) -> Result<Self> {
        let listener = Listener::new(addr)?;
        let failed = |e: io::Error| Error::io(format!("watch the connections of a switch at {addr}"))(e);
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        watch(&poll, &listener, LISTENER).map_err(failed)?;
        Ok(Self {
            switch: switch.clone(),
            listener,
            options,
            uplinks,
            poll: Arc::new(poll),
            clients: Vec::new(),
            ready: VecDeque::new(),
            knocking: false,
            refused: 0,
            events: Vec::new(),
        })
    }

    /// What makes [`step`](Self::step) worth calling; watched for edges.
    pub fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(&self.poll) as Source]
    }

    pub(super) fn poll(&self) -> &OwnedFd {
        &self.poll
    }

    /// Connections now.
    pub fn connections(&self) -> usize {
        self.clients.iter().flatten().count()
    }

    /// Connections that were closed at once because there were as many as may be.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Does what is due, bounded. `true` if there is more to do: call it again before waiting.
    pub fn step(&mut self) -> bool {
        let more_events = ready(&self.poll, &mut self.events);
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event {
                LISTENER => self.knocking = true,
                number => self.queue(usize::try_from(number).unwrap_or(usize::MAX)),
            }
        }
        self.events = events;
        let more_knock = self.knocking && self.accept();
        for _ in 0..TURNS.min(self.ready.len()) {
            let Some(number) = self.ready.pop_front() else {
                break;
            };
            self.serve(number);
        }
        more_events || more_knock || !self.ready.is_empty()
    }

    fn queue(&mut self, number: usize) {
        if let Some(client) = self.clients.get_mut(number).and_then(Option::as_mut)
            && !std::mem::replace(&mut client.queued, true)
        {
            self.ready.push_back(number);
        }
    }

    fn serve(&mut self, number: usize) {
        let Some(place) = self.clients.get_mut(number) else {
            return;
        };
        let Some(client) = place else {
            return;
        };
        client.queued = false;
        match client.pipe.step() {
            Ok(true) => self.queue(number),
            Ok(false) => {}
            Err(broken) => {
                tracing::debug!(port = client.pipe.port.id(), ?broken, "a connection of a switch ended");
                *place = None;
            }
        }
    }

    /// Takes who waits; `true` if there may be more.
    fn accept(&mut self) -> bool {
        for _ in 0..ACCEPTS {
            match self.listener.accept() {
                Ok(Some(socket)) => self.add(socket),
                Ok(None) => {
                    self.knocking = false;
                    return false;
                }
                Err(error) => {
                    // Too few descriptors, perhaps: again with the next event.
                    tracing::warn!(%error, "cannot accept a connection to a switch");
                    return false;
                }
            }
        }
        true
    }

    fn add(&mut self, socket: OwnedFd) {
        if self.connections() >= self.options.max_connections {
            self.refused = self.refused.saturating_add(1);
            return;
        }
        let number = self.clients.iter().position(Option::is_none).unwrap_or(self.clients.len());
        let mut options = self.options.port.clone();
        options.name = format!("{}{number}", options.name);
        let token = u64::try_from(number).unwrap_or(LISTENER);
        match Pipe::new(&self.switch, &options, self.uplinks, socket, &self.poll, token) {
            Ok(pipe) => {
                let client = Some(Client { pipe, queued: false });
                match self.clients.get_mut(number) {
                    Some(place) => *place = client,
                    None => self.clients.push(client),
                }
                self.queue(number);
            }
            Err(error) => {
                self.refused = self.refused.saturating_add(1);
                tracing::warn!(%error, "a connection to a switch gets no port");
            }
        }
    }
}
