//! The control socket as work on an event loop.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freestone_vmm::bus::{Progress, Source, Work};
use rustix::event::epoll;

use super::life::{Address, Life, Mailbox};
use super::protocol::{self, Controls};
use crate::ready;

/// Clients at a time; more wait in the socket's queue.
const MAX_CLIENTS: usize = 8;
/// Bytes of a request, with its newline.
const MAX_REQUEST: usize = 4096;
/// The listening socket among the events.
const LISTENER: u64 = u64::MAX;
/// The bell of the mailbox.
const BELL: u64 = u64::MAX - 1;

/// Serves the control socket; dropping it removes the socket.
pub(crate) struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    epoll: Arc<rustix::fd::OwnedFd>,
    clients: Vec<Option<Client>>,
    controls: Arc<Controls>,
    life: Option<Life>,
    mailbox: Mailbox,
    /// Clients that there were.
    turns: u64,
}

struct Client {
    stream: UnixStream,
    turn: u64,
    /// The answer to its last request is still to come.
    waits: bool,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl ControlServer {
    /// Listens at `path`. A socket that nobody listens at any more is replaced; any other file is an error.
    ///
    /// Without a `life`, only the devices are controlled.
    pub(crate) fn bind(path: &Path, controls: Arc<Controls>, life: Option<Life>) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        let mailbox = Mailbox::new()?;
        epoll::add(&epoll, mailbox.bell(), epoll::EventData::new_u64(BELL), epoll::EventFlags::IN)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            epoll: Arc::new(epoll),
            clients: (0..MAX_CLIENTS).map(|_| None).collect(),
            controls,
            life,
            mailbox,
            turns: 0,
        })
    }

    /// Takes up a client; whether it did. The host may have no descriptor left: then nothing is gained by trying again at once.
    fn accept(&mut self) -> bool {
        // The listener stays readable, so whoever finds no room is accepted when a client has left.
        let Some(slot) = self.clients.iter().position(Option::is_none) else { return false };
        let Ok((stream, _)) = self.listener.accept() else { return false };
        let token = epoll::EventData::new_u64(slot as u64);
        let watched = stream
            .set_nonblocking(true)
            .and_then(|()| Ok(epoll::add(&*self.epoll, &stream, token, epoll::EventFlags::IN)?));
        match (watched, self.clients.get_mut(slot)) {
            (Ok(()), Some(place)) => {
                self.turns += 1;
                let turn = self.turns;
                *place = Some(Client { stream, turn, waits: false, input: Vec::new(), output: Vec::new() });
            }
            (Err(error), _) => tracing::warn!(%error, "cannot serve a control client"),
            (Ok(()), None) => {}
        }
        true
    }

    /// Gives the client in `slot` a turn. If it is `gone`, that is its last.
    fn serve(&mut self, slot: usize, gone: bool) {
        let Some(place) = self.clients.get_mut(slot) else { return };
        let Some(client) = place else { return };
        let to = Address { slot, turn: client.turn };
        let answer = |line: &[u8]| match (protocol::read(line), &self.life) {
            (Ok(request), Some(life)) => {
                let (request, _) = life.carry_out(request, self.mailbox.reply(to))?;
                Some(self.controls.answer(Ok(request)))
            }
            (request, _) => Some(self.controls.answer(request)),
        };
        if client.turn(answer).is_err() || gone {
            // The descriptor leaves the epoll set when it is closed.
            *place = None;
            return;
        }
        let events = match (client.output.is_empty(), client.waits) {
            (false, _) => epoll::EventFlags::OUT,
            // Whoever leaves is noticed all the same.
            (true, true) => epoll::EventFlags::empty(),
            (true, false) => epoll::EventFlags::IN,
        };
        let data = epoll::EventData::new_u64(slot as u64);
        if epoll::modify(&*self.epoll, &client.stream, data, events).is_err() {
            *place = None;
        }
    }

    /// Hands out what arrived in the mailbox.
    fn deliver(&mut self) {
        for letter in self.mailbox.collect() {
            let Some(Some(client)) = self.clients.get_mut(letter.to.slot) else { continue };
            // The one who asked may have left, or not have read the line before: progress is not worth waiting for.
            if client.turn != letter.to.turn || (!letter.last && !client.output.is_empty()) {
                continue;
            }
            client.output.extend_from_slice(letter.line.as_bytes());
            client.output.push(b'\n');
            client.waits &= !letter.last;
            self.serve(letter.to.slot, false);
        }
    }
}

impl Client {
    /// Answers what is there. An error means that the client is done with.
    fn turn(&mut self, mut answer: impl FnMut(&[u8]) -> Option<String>) -> io::Result<()> {
        self.write()?;
        // One request at a time: the next is read when the answer was taken.
        if !self.output.is_empty() || self.waits {
            return Ok(());
        }
        let mut bytes = [0; 1024];
        match (&self.stream).read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.input.extend_from_slice(bytes.get(..n).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        while !self.waits
            && let Some(end) = self.input.iter().position(|&byte| byte == b'\n')
        {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            match answer(&line) {
                Some(text) => {
                    self.output.extend_from_slice(text.as_bytes());
                    self.output.push(b'\n');
                }
                None => self.waits = true,
            }
        }
        if self.input.len() > MAX_REQUEST {
            return Err(ErrorKind::InvalidData.into());
        }
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match (&self.stream).write(&self.output) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.output.drain(..n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Work for ControlServer {
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
                BELL => {
                    self.deliver();
                    served = true;
                }
                slot => {
                    let flags = event.flags;
                    let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
                    if let Ok(slot) = usize::try_from(slot) {
                        self.serve(slot, gone);
                    }
                    served = true;
                }
            }
        }
        // The outer watch is for edges, so go on until nothing is ready.
        if served { Progress::More } else { Progress::Idle }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // Who asked for the end of the machine is told that it comes.
        self.deliver();
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, path = ?self.path, "the control socket was gone already");
        }
    }
}

impl fmt::Debug for ControlServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlServer").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Removes a socket that a VMM left behind when it was killed.
fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if metadata.file_type().is_socket()
        && matches!(UnixStream::connect(path), Err(error) if error.kind() == ErrorKind::ConnectionRefused)
    {
        return fs::remove_file(path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    fn server() -> (ControlServer, tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ctl");
        (ControlServer::bind(&path, Arc::default(), None).unwrap(), dir, path)
    }

    fn settle(server: &mut ControlServer) {
        while server.process() == Progress::More {}
    }

    #[test]
    fn a_request_is_answered_by_one_line_even_if_it_comes_in_pieces() {
        let (mut server, _dir, path) = server();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"{\"op\": \"no").unwrap();
        settle(&mut server);
        client.write_all(b"ne\"}\n").unwrap();
        settle(&mut server);
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();
        assert!(line.starts_with("{\"error\":"), "{line}");
    }

    #[test]
    fn more_clients_than_places_are_served_one_after_the_other() {
        let (mut server, _dir, path) = server();
        let waiting: Vec<_> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        settle(&mut server);
        let mut late = UnixStream::connect(&path).unwrap();
        late.write_all(b"{}\n").unwrap();
        settle(&mut server);
        drop(waiting);
        settle(&mut server);
        let mut answer = [0; 1];
        late.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"{");
    }

    #[test]
    fn a_line_without_an_end_is_not_collected_for_ever() {
        let (mut server, _dir, path) = server();
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        for _ in 0..8 {
            drop(client.write(&[b'x'; 1024]));
            settle(&mut server);
        }
        assert!(server.clients.iter().all(Option::is_none));
    }

    #[test]
    fn clients_that_cannot_be_accepted_do_not_keep_the_loop_busy() {
        let (mut server, _dir, path) = server();
        let _client = UnixStream::connect(&path).unwrap();
        // Readable from now on, and nothing can be accepted.
        rustix::net::shutdown(&server.listener, rustix::net::Shutdown::Read).unwrap();
        assert!((0..100).any(|_| server.process() == Progress::Idle));
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_the_own_one_removed() {
        let (server, dir, path) = server();
        assert!(ControlServer::bind(&path, Arc::default(), None).is_err());
        drop(server);
        assert!(!path.exists());
        let left = dir.path().join("left");
        drop(UnixListener::bind(&left).unwrap());
        let server = ControlServer::bind(&left, Arc::default(), None).unwrap();
        assert_eq!(fs::metadata(&left).unwrap().permissions().mode() & 0o777, 0o600);
        drop(server);
    }
}
