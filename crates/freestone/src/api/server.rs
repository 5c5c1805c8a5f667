//! The server: one thread, one epoll, clients that cannot hold each other up.
//!
//! A client that sends half a request, or takes half an answer, waits alone. When all places are taken, who has nothing under way
//! and was silent the longest makes room.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::Mode;
use rustix::process::umask;
use serde_json::{Value, json};

use super::connection::Connection;
use super::controller::{Controller, End};
use super::fault::Fault;
use super::http::{Response, Status};
use super::mailbox::{Mailbox, Message, Ticket};
use super::operation::{Operation, route};

/// Clients at a time.
pub(super) const MAX_CLIENTS: usize = 128;
/// Clients of events among them.
pub(super) const MAX_SUBSCRIBERS: usize = 16;
/// Events of the epoll taken at a time.
const BATCH: usize = 64;
/// How long the listener rests when a client could not be accepted: the host has no descriptor left.
const REST: Duration = Duration::from_millis(500);

const LISTENER: u64 = u64::MAX;
const MAILBOX: u64 = u64::MAX - 1;
const SIGNAL: u64 = u64::MAX - 2;

/// The server.
pub(crate) struct Server {
    socket: Option<Socket>,
    epoll: OwnedFd,
    mailbox: Arc<Mailbox>,
    signal: Option<UnixStream>,
    controller: Controller,
    clients: Vec<Option<Connection>>,
    max_body: usize,
    /// Counts connections, so that each has a number of its own.
    ages: u64,
    /// Counts turns, to know who was silent for long.
    turns: u64,
    /// Whether the listener is listened to.
    listening: bool,
}

impl Server {
    /// Serves at `socket` if there is one. `signal` becomes readable when all is to end.
    pub(crate) fn new(
        socket: Option<Socket>,
        signal: Option<UnixStream>,
        mailbox: Arc<Mailbox>,
        controller: Controller,
        max_body: usize,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*mailbox, EventData::new_u64(MAILBOX), EventFlags::IN)?;
        if let Some(signal) = &signal {
            epoll::add(&epoll, signal, EventData::new_u64(SIGNAL), EventFlags::IN)?;
        }
        if let Some(socket) = &socket {
            epoll::add(&epoll, &socket.listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        }
        let clients = (0..MAX_CLIENTS).map(|_| None).collect();
        let listening = socket.is_some();
        Ok(Self {
            socket,
            epoll,
            mailbox,
            signal,
            controller,
            clients,
            max_body,
            ages: 0,
            turns: 0,
            listening,
        })
    }

    /// Serves until the machine ends, or is not to begin.
    pub(crate) fn run(mut self) -> io::Result<End> {
        let mut ready = Vec::with_capacity(BATCH);
        loop {
            self.publish(0);
            if let Some(end) = self.controller.end().cloned() {
                self.say_goodbye();
                return Ok(end);
            }
            let timeout = self.timeout();
            ready.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut ready), timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.turns += 1;
            for event in &ready {
                let flags = event.flags;
                match event.data.u64() {
                    LISTENER => self.accept(),
                    MAILBOX => self.hear(),
                    SIGNAL => self.stop(),
                    token => self.serve(token, flags),
                }
            }
            self.listen(true);
            self.controller.tick();
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let rest = (!self.listening && self.socket.is_some()).then_some(REST);
        let tick = self.controller.next_tick().map(Duration::from_millis);
        let least = match (rest, tick) {
            (Some(rest), Some(tick)) => Some(rest.min(tick)),
            (rest, tick) => rest.or(tick),
        };
        least.and_then(|least| Timespec::try_from(least).ok())
    }

    /// Listens to the listener, or not.
    fn listen(&mut self, on: bool) {
        let Some(socket) = self.socket.as_ref().filter(|_| self.listening != on) else { return };
        // Without room there is nothing to accept for.
        if on && self.clients.iter().flatten().filter(|client| !client.is_idle()).count() == MAX_CLIENTS {
            return;
        }
        let flags = if on { EventFlags::IN } else { EventFlags::empty() };
        match epoll::modify(&self.epoll, &socket.listener, EventData::new_u64(LISTENER), flags) {
            Ok(()) => self.listening = on,
            Err(error) => tracing::error!(%error, "cannot watch the API socket"),
        }
    }

    fn accept(&mut self) {
        let Some(slot) = self.place() else { return self.listen(false) };
        let Some(socket) = &self.socket else { return };
        let stream = match socket.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client of the API");
                return self.listen(false);
            }
        };
        self.ages += 1;
        if let Err(error) = stream.set_nonblocking(true) {
            return tracing::warn!(%error, "cannot serve a client of the API");
        }
        let mut client = Connection::new(stream, self.ages);
        client.active = self.turns;
        client.interest = client.wanted();
        let token = EventData::new_u64(token(slot, client.age));
        match epoll::add(&self.epoll, &client, token, client.interest) {
            Ok(()) => self.set(slot, Some(client)),
            Err(error) => tracing::warn!(%error, "cannot watch a client of the API"),
        }
    }

    /// A free place, or that of the client which is missed least.
    fn place(&mut self) -> Option<usize> {
        if let Some(free) = self.clients.iter().position(Option::is_none) {
            return Some(free);
        }
        let idle =
            self.clients.iter().enumerate().filter_map(|(slot, client)| Some((slot, client.as_ref()?)));
        let (slot, _) =
            idle.filter(|(_, client)| client.is_idle()).min_by_key(|(_, client)| client.active)?;
        tracing::debug!(slot, "an idle client of the API makes room");
        self.set(slot, None);
        Some(slot)
    }

    fn set(&mut self, slot: usize, client: Option<Connection>) {
        if let Some(place) = self.clients.get_mut(slot) {
            // A descriptor leaves the epoll when it is closed.
            *place = client;
        }
    }

    fn client(&mut self, slot: usize) -> Option<&mut Connection> {
        self.clients.get_mut(slot)?.as_mut()
    }

    fn serve(&mut self, token: u64, flags: EventFlags) {
        let (slot, age) = (usize::try_from(token & 0xffff).unwrap_or(usize::MAX), token >> 16);
        let turns = self.turns;
        // An event of who was here before is not for who is here now.
        let Some(client) = self.client(slot).filter(|client| client.age == age) else { return };
        client.active = turns;
        if client.turn(flags).is_err() {
            return self.set(slot, None);
        }
        self.go_on(slot);
    }

    /// Carries out what is there to carry out, and writes what can be written.
    fn go_on(&mut self, slot: usize) {
        let max_body = self.max_body;
        loop {
            let Some(client) = self.client(slot) else { return };
            match client.next(max_body) {
                Ok(None) => break,
                Ok(Some(request)) => {
                    let ticket = Ticket { slot, age: client.age };
                    match route(request.method, &request.path, &request.body) {
                        Ok(Operation::Events) => self.subscribe(slot, request.event_stream),
                        Ok(operation) => {
                            if let Some(response) = self.controller.request(ticket, operation) {
                                self.answer(ticket, &response);
                            }
                        }
                        Err(fault) => {
                            let response = self.controller.refuse(&fault);
                            self.answer(ticket, &response);
                        }
                    }
                }
                Err(refusal) => {
                    client.refuse(refusal);
                    break;
                }
            }
        }
        self.settle(slot);
    }

    /// Writes, and closes or listens for what can follow.
    fn settle(&mut self, slot: usize) {
        let Some(place) = self.clients.get_mut(slot) else { return };
        let Some(client) = place else { return };
        if client.write().is_err() || client.is_over() {
            *place = None;
            return;
        }
        let wanted = client.wanted();
        if wanted == client.interest {
            return;
        }
        client.interest = wanted;
        let token = EventData::new_u64(token(slot, client.age));
        if epoll::modify(&self.epoll, &*client, token, wanted).is_err() {
            *place = None;
        }
    }

    fn answer(&mut self, ticket: Ticket, response: &Response) {
        if let Some(client) = self.client(ticket.slot).filter(|client| client.age == ticket.age) {
            client.answer(response);
        }
    }

    fn subscribe(&mut self, slot: usize, event_stream: bool) {
        let subscribers = self.clients.iter().flatten().filter(|client| client.is_subscribed()).count();
        let state = self.controller.state;
        let Some(client) = self.client(slot) else { return };
        if subscribers >= MAX_SUBSCRIBERS {
            let message = format!("{MAX_SUBSCRIBERS} clients listen to events already.");
            let body = Fault::internal(message).body();
            client.answer(&Response { status: Status::Unavailable, body, deprecated: false });
            return;
        }
        client.subscribe(event_stream);
        client.tell(&stamped(json!({"event": "state", "state": state})), 0);
    }

    /// Takes what other threads told.
    fn hear(&mut self) {
        let (messages, lost) = self.mailbox.take();
        for (ticket, response) in self.controller.hear(messages) {
            self.answer(ticket, &response);
            if self.client(ticket.slot).is_some_and(|client| client.age == ticket.age) {
                self.go_on(ticket.slot);
            }
        }
        self.publish(lost);
    }

    /// Tells events to those who listen.
    fn publish(&mut self, lost: u64) {
        let events: Vec<Value> = self.controller.take_events().into_iter().map(stamped).collect();
        if events.is_empty() {
            return;
        }
        for slot in 0..self.clients.len() {
            let Some(client) = self.client(slot).filter(|client| client.is_subscribed()) else { continue };
            for (number, event) in events.iter().enumerate() {
                client.tell(event, if number == 0 { lost } else { 0 });
            }
            self.settle(slot);
        }
    }

    fn stop(&mut self) {
        if let Some(signal) = self.signal.take() {
            let _ = epoll::delete(&self.epoll, &signal);
            tracing::info!("stopped by a signal");
        }
        self.mailbox.send(Message::Stop);
    }

    fn say_goodbye(&mut self) {
        self.publish(0);
        let body = Fault::internal("The microVM has ended.").body();
        let response = Response { status: Status::Internal, body, deprecated: false };
        for client in self.clients.iter_mut().flatten() {
            client.end(&response);
        }
    }
}

fn token(slot: usize, age: u64) -> u64 {
    // Places are few.
    age << 16 | u64::try_from(slot).unwrap_or(0xffff)
}

fn stamped(mut event: Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if let Value::Object(event) = &mut event {
        event.insert("time_ms".to_owned(), u64::try_from(now.as_millis()).unwrap_or(u64::MAX).into());
    }
    event
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("socket", &self.socket)
            .field("clients", &self.clients.iter().flatten().count())
            .field("controller", &self.controller)
            .finish_non_exhaustive()
    }
}

/// A listening socket that only its owner may use; dropping it removes it.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: another's socket is not removed.
    identity: (u64, u64),
}

impl Socket {
    /// Listens at `path`. A socket that nobody listens at any more is replaced; any other file is an error.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        if let Ok(metadata) = fs::symlink_metadata(path)
            && metadata.file_type().is_socket()
            && matches!(UnixStream::connect(path), Err(error) if error.kind() == ErrorKind::ConnectionRefused)
        {
            fs::remove_file(path)?;
        }
        // From its first moment on nobody else can connect.
        let before = umask(Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener?;
        listener.set_nonblocking(true)?;
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self { listener, path: path.to_owned(), identity: (metadata.dev(), metadata.ino()) })
    }

    /// What listens. It does not wait.
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = ?self.path, "the API socket was gone already");
        }
    }
}
