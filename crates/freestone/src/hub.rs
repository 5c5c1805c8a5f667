//! The console of a detached machine: a socket where people come and go, and a log.
//!
//! The machine has one end of a pair of sockets for its console. This work has the other: what the guest writes goes to the log
//! and to all who are connected, who first get the last [`REPLAY`] bytes; what any of them types goes to the guest. Nobody can
//! hold the guest up: who does not read is dropped once the guest is [`KEPT`] bytes ahead.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freestone_vmm::bus::{Progress, Source, Work};
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::failure::Failure;
use crate::ready;

/// Bytes that a new client gets of what the guest wrote before.
const REPLAY: u64 = 64 << 10;
/// Bytes that are kept for those who read slowly.
const KEPT: usize = 128 << 10;
/// Clients at a time; more wait in the socket's queue.
const MAX_CLIENTS: usize = 8;
/// Bytes of a log, after which another is begun; the one before is kept.
const MAX_LOG: u64 = 4 << 20;
/// Bytes that are moved in one step.
const CHUNK: usize = 4096;

const LISTENER: u64 = u64::MAX;
const MACHINE: u64 = u64::MAX - 1;

/// Serves the console socket; dropping it removes the socket.
pub(crate) struct Hub {
    listener: UnixListener,
    path: PathBuf,
    epoll: Arc<OwnedFd>,
    /// The machine's end, until it is taken.
    theirs: Option<UnixStream>,
    machine: UnixStream,
    output: Output,
    log: Log,
    clients: Vec<Option<Client>>,
    /// What was typed and the guest has no room for yet.
    input: Vec<u8>,
    machine_events: EventFlags,
}

struct Client {
    stream: UnixStream,
    /// Where it is in the output.
    at: u64,
    events: EventFlags,
}

impl Hub {
    /// Listens at `path`, and logs to `log`.
    pub(crate) fn bind(path: &Path, log: &Path) -> Result<Self, Failure> {
        let failed = |e| Failure::new(format!("cannot listen for consoles at {}: {e}", path.display()));
        Self::try_bind(path, log).map_err(failed)
    }

    fn try_bind(path: &Path, log: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let (machine, theirs) = UnixStream::pair()?;
        machine.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, &machine, EventData::new_u64(MACHINE), EventFlags::IN)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            epoll: Arc::new(epoll),
            theirs: Some(theirs),
            machine,
            output: Output::default(),
            log: Log::open(log)?,
            clients: (0..MAX_CLIENTS).map(|_| None).collect(),
            input: Vec::new(),
            machine_events: EventFlags::IN,
        })
    }

    /// The machine's end, once.
    pub(crate) fn machine_end(&mut self) -> Result<UnixStream, Failure> {
        self.theirs.take().ok_or_else(|| Failure::new("the console is in use"))
    }

    /// Takes up a client; whether it did.
    fn accept(&mut self) -> bool {
        // The listener stays readable, so whoever finds no room is accepted when a client has left.
        let Some(slot) = self.clients.iter().position(Option::is_none) else { return false };
        let Ok((stream, _)) = self.listener.accept() else { return false };
        let at = self.output.end.saturating_sub(REPLAY).max(self.output.begin());
        let events = EventFlags::IN | EventFlags::OUT;
        let watched = stream
            .set_nonblocking(true)
            .and_then(|()| Ok(epoll::add(&*self.epoll, &stream, EventData::new_u64(slot as u64), events)?));
        match (watched, self.clients.get_mut(slot)) {
            (Ok(()), Some(place)) => *place = Some(Client { stream, at, events }),
            (Err(error), _) => tracing::warn!(%error, "cannot serve a console client"),
            (Ok(()), None) => {}
        }
        true
    }

    /// Moves what the guest wrote to the log and the clients. False if there is nothing, or there is no machine any more.
    fn take_output(&mut self) -> bool {
        let mut bytes = [0; CHUNK];
        let Ok(read) = (&self.machine).read(&mut bytes) else { return false };
        let bytes = bytes.get(..read).unwrap_or_default();
        self.log.write(bytes);
        self.output.push(bytes);
        read > 0
    }

    /// Moves what was typed to the guest.
    fn give_input(&mut self) {
        while !self.input.is_empty() {
            match (&self.machine).write(&self.input) {
                Ok(written) if written > 0 => drop(self.input.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Nobody is there to read it.
                _ => self.input.clear(),
            }
        }
    }

    /// Reads what a client typed. An error means that it is done with.
    fn take_input(&mut self, slot: usize) -> io::Result<()> {
        let Some(Some(client)) = self.clients.get(slot) else { return Ok(()) };
        if !self.input.is_empty() {
            return Ok(());
        }
        let mut bytes = [0; CHUNK];
        match (&client.stream).read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => self.input.extend_from_slice(bytes.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        self.give_input();
        Ok(())
    }

    /// Writes to all clients what they have room for, and watches for what is to come.
    fn settle(&mut self) {
        let wanted = if self.input.is_empty() { EventFlags::IN } else { EventFlags::OUT };
        for (slot, place) in self.clients.iter_mut().enumerate() {
            let Some(client) = place else { continue };
            let alive = client.write(&self.output).and_then(|()| {
                let mut events = wanted & EventFlags::IN;
                events.set(EventFlags::OUT, client.at < self.output.end);
                if events != client.events {
                    epoll::modify(&*self.epoll, &client.stream, EventData::new_u64(slot as u64), events)?;
                    client.events = events;
                }
                Ok(())
            });
            if alive.is_err() {
                // The descriptor leaves the epoll set when it is closed.
                *place = None;
            }
        }
        let events = EventFlags::IN | (wanted & EventFlags::OUT);
        if events != self.machine_events
            && epoll::modify(&*self.epoll, &self.machine, EventData::new_u64(MACHINE), events).is_ok()
        {
            self.machine_events = events;
        }
    }
}

impl Client {
    fn write(&mut self, output: &Output) -> io::Result<()> {
        while let Some(bytes) = output.from(self.at)? {
            match (&self.stream).write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => self.at += written as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Work for Hub {
    fn sources(&self) -> Vec<Source> {
        vec![ready::source(&self.epoll)]
    }

    fn process(&mut self) -> Progress {
        let events = ready::ready(&self.epoll, MAX_CLIENTS + 2);
        if events.is_empty() {
            return Progress::Idle;
        }
        let full = self.clients.iter().all(Option::is_some);
        let mut served = false;
        for event in &events {
            match event.data.u64() {
                LISTENER if full => {}
                LISTENER => served |= self.accept(),
                MACHINE => {
                    let flags = event.flags;
                    self.give_input();
                    served |= self.take_output() || flags.contains(EventFlags::OUT);
                }
                slot => {
                    let Ok(slot) = usize::try_from(slot) else { continue };
                    let flags = event.flags;
                    let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                    if (self.take_input(slot).is_err() || gone)
                        && let Some(place) = self.clients.get_mut(slot)
                    {
                        *place = None;
                    }
                    served = true;
                }
            }
        }
        self.settle();
        // The outer watch is for edges, so go on until nothing is ready.
        if served { Progress::More } else { Progress::Idle }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // What the guest wrote last is in the socket still: no more than the socket holds.
        while self.take_output() {
            self.settle();
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = ?self.path, "the console socket was gone already");
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The last [`KEPT`] bytes that the guest wrote.
#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// Bytes in all.
    end: u64,
}

impl Output {
    fn begin(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.end += bytes.len() as u64;
        let over = self.bytes.len().saturating_sub(KEPT);
        drop(self.bytes.drain(..over));
    }

    /// Some of what comes from `at` on; none at the end. What is not kept any more is an error.
    fn from(&self, at: u64) -> io::Result<Option<&[u8]>> {
        let skip = at.checked_sub(self.begin()).and_then(|skip| usize::try_from(skip).ok());
        let skip = skip.ok_or(ErrorKind::TimedOut)?;
        let (front, back) = self.bytes.as_slices();
        let bytes = match front.get(skip..) {
            Some(bytes) if !bytes.is_empty() => bytes,
            _ => back.get(skip.saturating_sub(front.len())..).unwrap_or_default(),
        };
        Ok((!bytes.is_empty()).then_some(bytes))
    }
}

/// A log that does not grow without end.
struct Log {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: create(path)?, len: 0 })
    }

    fn write(&mut self, bytes: &[u8]) {
        let rotated = match self.len > MAX_LOG {
            true => self.rotate(),
            false => Ok(()),
        };
        self.len += bytes.len() as u64;
        if let Err(error) = rotated.and_then(|()| self.file.write_all(bytes)) {
            tracing::debug!(%error, path = ?self.path, "the console is not logged");
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        fs::rename(&self.path, self.path.with_extension("log.1"))?;
        self.file = create(&self.path)?;
        self.len = 0;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub() -> (Hub, UnixStream, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let mut hub = Hub::bind(&dir.path().join("console"), &dir.path().join("console.log")).unwrap();
        let machine = hub.machine_end().unwrap();
        (hub, machine, dir)
    }

    fn settle(hub: &mut Hub) {
        while hub.process() == Progress::More {}
    }

    fn read(mut stream: &UnixStream, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn who_comes_late_gets_what_was_written_before() {
        let (mut hub, mut machine, dir) = hub();
        machine.write_all(b"early ").unwrap();
        settle(&mut hub);
        let client = UnixStream::connect(dir.path().join("console")).unwrap();
        settle(&mut hub);
        machine.write_all(b"late").unwrap();
        settle(&mut hub);
        assert_eq!(read(&client, 10), b"early late");
        assert_eq!(fs::read(dir.path().join("console.log")).unwrap(), b"early late");
    }

    #[test]
    fn what_is_typed_reaches_the_guest_whoever_types() {
        let (mut hub, machine, dir) = hub();
        for text in ["one", "two"] {
            let mut client = UnixStream::connect(dir.path().join("console")).unwrap();
            client.write_all(text.as_bytes()).unwrap();
            settle(&mut hub);
            assert_eq!(read(&machine, 3), text.as_bytes());
        }
    }

    #[test]
    fn who_does_not_read_is_dropped_and_holds_nobody_up() {
        let (mut hub, mut machine, dir) = hub();
        let client = UnixStream::connect(dir.path().join("console")).unwrap();
        settle(&mut hub);
        let chunk = [b'x'; CHUNK];
        for _ in 0..1000 {
            machine.write_all(&chunk).unwrap();
            settle(&mut hub);
        }
        assert!(hub.clients.iter().all(Option::is_none));
        drop(client);
        assert!(hub.output.bytes.len() <= KEPT);
    }

    #[test]
    fn a_guest_that_does_not_read_keeps_the_loop_idle() {
        let (mut hub, _machine, dir) = hub();
        let client = UnixStream::connect(dir.path().join("console")).unwrap();
        client.set_nonblocking(true).unwrap();
        for _ in 0..1000 {
            drop((&client).write(&[b'x'; CHUNK]));
            assert!((0..100).any(|_| hub.process() == Progress::Idle));
        }
        assert!(hub.input.len() <= CHUNK);
    }

    #[test]
    fn the_log_begins_anew_when_it_is_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = Log::open(&path).unwrap();
        for _ in 0..5 {
            log.write(&vec![b'x'; 1 << 20]);
        }
        log.write(b"new");
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(dir.path().join("console.log.1")).unwrap().len(), 5 << 20);
    }

    #[test]
    fn what_the_guest_wrote_last_is_logged_when_the_machine_is_gone() {
        let (hub, mut machine, dir) = hub();
        machine.write_all(b"last words").unwrap();
        drop(hub);
        assert_eq!(fs::read(dir.path().join("console.log")).unwrap(), b"last words");
        assert!(!dir.path().join("console").exists());
    }
}
