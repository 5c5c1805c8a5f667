//! [`UnixHost`]: the host side over Unix stream sockets, with Firecracker's protocol.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freestone_bus::Source;
use rustix::event::{Timespec, epoll};
use rustix::fs::Mode;
use rustix::net::{
    self, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with,
};

use super::host::{HostEvent, HostSide, StreamId};
use crate::{Error, Result};

/// Longest request line of a program, with its end.
const MAX_LINE: usize = 32;
/// Programs that connected and sent no request yet; beyond that, the one that waits longest is turned away.
const MAX_WAITING: usize = 256;
/// Events and new programs taken at once.
const MAX_EVENTS: usize = 64;
const MAX_ACCEPTS: usize = 16;
const BACKLOG: i32 = 1024;
/// The longest that is appended to the path: a separator and a port.
const LONGEST_PORT: &str = "_4294967295";
/// Longest path of a Unix socket that every program can use: it ends with a zero.
const MAX_PATH: usize = 107;
/// Names the listening socket among the events.
const LISTENER: u64 = u64::MAX;
const STREAM_FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// A place for a stream. Its generation changes when it is closed, so that no event of the old stream is taken for the next.
#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    socket: Option<OwnedFd>,
    /// The program's request did not come yet.
    waiting: bool,
}

/// Connects a guest to Unix stream sockets.
///
/// - A guest that connects to port P of the host is connected to the socket `PATH_P`, where a program must be listening.
/// - A program that connects to `PATH` sends `CONNECT P\n` and is connected to port P of the guest. It reads `OK N\n` first,
///   where N is its own port as the guest sees it. If nobody listens in the guest, or the line is wrong or longer than 32
///   bytes, it reads an end of file.
///
/// The socket `PATH` is removed again when the device goes, unless somebody replaced it. Sockets `PATH_P` are not touched.
#[derive(Debug)]
pub struct UnixHost {
    path: PathBuf,
    /// Device and inode of the socket at `path`.
    identity: Option<(u64, u64)>,
    listener: OwnedFd,
    epoll: Arc<OwnedFd>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    waiting: VecDeque<StreamId>,
    /// There may be programs to accept.
    accept: bool,
    accept_failed: bool,
}

impl UnixHost {
    /// Permissions of the socket by default: its owner alone.
    pub const DEFAULT_MODE: u32 = 0o600;

    /// Listens at `path`, with permission bits `mode`: who may write to the socket may connect to any port of the guest.
    ///
    /// # Errors
    /// [`Error::Io`] if the socket cannot be made. If there is a file already, it is not removed: the error says whether it is
    /// a socket that somebody listens at, one that was left behind, or something else. Also if the path is too long for a port
    /// to be appended: together at most 107 bytes.
    pub fn bind(path: impl Into<PathBuf>, mode: u32) -> Result<Self> {
        let path = path.into();
        let listener = listen(&path, mode).map_err(|error| {
            let error = if error == rustix::io::Errno::ADDRINUSE {
                io::Error::new(io::ErrorKind::AddrInUse, occupied(&path))
            } else {
                let error = io::Error::from(error);
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            };
            Error::io("listen at a Unix socket for vsock")(error)
        })?;
        let identity = identity(&path);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC);
        let epoll = epoll.map_err(|e| Error::io("create an epoll for vsock")(e.into()))?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), flags)
            .map_err(|e| Error::io("watch the Unix socket for vsock")(e.into()))?;
        Ok(Self {
            path,
            identity,
            listener,
            epoll: Arc::new(epoll),
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            accept: true,
            accept_failed: false,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn insert(&mut self, socket: OwnedFd, waiting: bool) -> io::Result<StreamId> {
        let index = match self.free.last() {
            Some(&index) => index,
            None => u32::try_from(self.slots.len()).map_err(io::Error::other)?,
        };
        let generation = self.slots.get(index as usize).map_or(0, |slot| slot.generation);
        let id = StreamId(u64::from(generation) << 32 | u64::from(index));
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&*self.epoll, &socket, epoll::EventData::new_u64(id.0), flags)?;
        let slot = Slot { generation, socket: Some(socket), waiting };
        match self.slots.get_mut(index as usize) {
            Some(old) => {
                *old = slot;
                self.free.pop();
            }
            None => self.slots.push(slot),
        }
        Ok(id)
    }

    fn slot(&mut self, stream: StreamId) -> Option<&mut Slot> {
        let index = usize::try_from(stream.0 & u64::from(u32::MAX)).ok()?;
        let slot = self.slots.get_mut(index)?;
        (u64::from(slot.generation) == stream.0 >> 32 && slot.socket.is_some()).then_some(slot)
    }

    fn socket(&mut self, stream: StreamId) -> io::Result<&OwnedFd> {
        let socket = self.slot(stream).and_then(|slot| slot.socket.as_ref());
        socket.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Takes up new programs; returns whether to look again soon: there may be more, or the request of one.
    fn accept(&mut self) -> bool {
        let mut taken = 0;
        while self.accept && taken < MAX_ACCEPTS {
            match acceptfrom_with(&self.listener, STREAM_FLAGS) {
                Ok((socket, _)) => {
                    taken += 1;
                    self.take_in(socket);
                }
                Err(rustix::io::Errno::AGAIN) => self.accept = false,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    // Most likely too many open files. It stays to be done, and is tried when anything else happens.
                    if !std::mem::replace(&mut self.accept_failed, true) {
                        tracing::warn!(path = %self.path.display(), %error, "cannot accept a vsock connection");
                    }
                    return false;
                }
            }
        }
        taken > 0
    }

    fn take_in(&mut self, socket: OwnedFd) {
        match self.insert(socket, true) {
            Ok(id) => self.waiting.push_back(id),
            Err(error) => tracing::debug!(%error, "cannot watch a vsock connection"),
        }
        if self.waiting.len() > MAX_WAITING
            && let Some(oldest) = self.waiting.front().copied()
        {
            self.close(oldest);
        }
    }

    /// Looks for the request of a program; `ended` if it will send no more.
    fn greet(&mut self, stream: StreamId, ended: bool) -> Option<HostEvent> {
        let request = self.socket(stream).and_then(read_request);
        match request {
            Ok(port) => {
                self.waiting.retain(|other| *other != stream);
                self.slot(stream)?.waiting = false;
                Some(HostEvent::Connect { stream, port })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ended => None,
            Err(error) => {
                tracing::debug!(%error, "a program asked for no vsock port");
                self.close(stream);
                None
            }
        }
    }
}

/// A listening socket at `path`. The permissions are right from the first moment on.
fn listen(path: &Path, mode: u32) -> rustix::io::Result<OwnedFd> {
    let mut longest = path.as_os_str().to_owned();
    longest.push(LONGEST_PORT);
    if longest.len() > MAX_PATH {
        return Err(rustix::io::Errno::NAMETOOLONG);
    }
    let address = SocketAddrUnix::new(path)?;
    let mode = Mode::from_raw_mode(mode & 0o777);
    let listener = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, STREAM_FLAGS, None)?;
    // Binding makes the file with this mode, less what the umask forbids. That can be added afterwards.
    rustix::fs::fchmod(&listener, mode)?;
    net::bind(&listener, &address)?;
    let listening = rustix::fs::chmod(path, mode).and_then(|()| net::listen(&listener, BACKLOG));
    if let Err(error) = listening {
        remove(path);
        return Err(error);
    }
    Ok(listener)
}

/// Why there can be no socket at `path`.
fn occupied(path: &Path) -> String {
    let shown = path.display();
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => format!("{shown} is in use: somebody listens there"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            format!("{shown} is a socket that nobody listens at any more: remove it first")
        }
        Err(_) => format!("{shown} exists already"),
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "cannot remove a vsock socket");
    }
}

/// Takes a request off a socket, and not a byte more. Bytes stay in the socket until the line is whole.
fn read_request(socket: &OwnedFd) -> io::Result<u32> {
    let mut line = [0; MAX_LINE];
    let (len, _) = net::recv(socket, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
    let seen = line.get(..len).unwrap_or_default();
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        let reason = match len {
            0 => io::ErrorKind::UnexpectedEof,
            MAX_LINE => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::WouldBlock,
        };
        return Err(reason.into());
    };
    let port = seen.get(..end).and_then(parse_request).ok_or(io::ErrorKind::InvalidData)?;
    let mut whole = [0; MAX_LINE];
    let whole = whole.get_mut(..=end).unwrap_or_default();
    net::recv(socket, whole, RecvFlags::DONTWAIT)?;
    Ok(port)
}

/// The port of `CONNECT port`.
fn parse_request(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let command = words.next()?;
    let port = words.next()?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let right = command.eq_ignore_ascii_case("connect") && digits && words.next().is_none();
    port.parse().ok().filter(|_| right)
}

impl HostSide for UnixHost {
    fn connect(&mut self, port: u32) -> io::Result<StreamId> {
        let mut path = self.path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(Path::new(&path))?;
        let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, STREAM_FLAGS, None)?;
        // A Unix socket connects at once or not at all.
        net::connect(&socket, &address)?;
        self.insert(socket, false)
    }

    fn accepted(&mut self, stream: StreamId, host_port: u32) -> io::Result<()> {
        let line = format!("OK {host_port}\n");
        // It is the first that is sent, so there is room for it.
        if self.write(stream, line.as_bytes())? < line.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    fn read(&mut self, stream: StreamId, to: &mut [u8]) -> io::Result<usize> {
        let (n, _) = net::recv(self.socket(stream)?, to, RecvFlags::DONTWAIT)?;
        Ok(n)
    }

    fn write(&mut self, stream: StreamId, from: &[u8]) -> io::Result<usize> {
        // Without this flag, a peer that is gone would kill the process by a signal.
        Ok(net::send(self.socket(stream)?, from, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
    }

    fn shutdown(&mut self, stream: StreamId, how: Shutdown) {
        let how = match how {
            Shutdown::Read => net::Shutdown::Read,
            Shutdown::Write => net::Shutdown::Write,
            Shutdown::Both => net::Shutdown::Both,
        };
        // Fails if the peer is gone, and then it needs not be told.
        if let Err(error) = self.socket(stream).and_then(|socket| Ok(net::shutdown(socket, how)?)) {
            tracing::trace!(%error, "cannot shut a vsock stream down");
        }
    }

    fn close(&mut self, stream: StreamId) {
        let Some(slot) = self.slot(stream) else { return };
        // Closing takes it off the epoll as well: nobody else holds the socket.
        let waiting = slot.waiting;
        *slot = Slot { generation: slot.generation.wrapping_add(1), ..Slot::default() };
        if waiting {
            self.waiting.retain(|other| *other != stream);
        }
        if let Ok(index) = u32::try_from(stream.0 & u64::from(u32::MAX)) {
            self.free.push(index);
        }
    }

    fn poll(&mut self, events: &mut Vec<HostEvent>) -> bool {
        let mut seen = [const { MaybeUninit::<epoll::Event>::uninit() }; MAX_EVENTS];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok((seen, _)) = epoll::wait(&*self.epoll, &mut seen[..], Some(&at_once)) else {
            // Nothing but a signal can be the reason: look again.
            return true;
        };
        for event in &*seen {
            let (id, flags) = ({ event.data }.u64(), { event.flags });
            if id == LISTENER {
                self.accept = true;
                continue;
            }
            let stream = StreamId(id);
            let Some(slot) = self.slot(stream) else { continue };
            let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            let ended = flags.contains(epoll::EventFlags::RDHUP);
            if slot.waiting {
                events.extend(self.greet(stream, gone || ended));
            } else if gone {
                events.push(HostEvent::HungUp(stream));
            } else {
                let readable = ended || flags.contains(epoll::EventFlags::IN);
                let writable = flags.contains(epoll::EventFlags::OUT);
                events.push(HostEvent::Ready { stream, readable, writable });
            }
        }
        let full = seen.len() >= MAX_EVENTS;
        self.accept() || full
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.epoll.clone()]
    }
}

impl Drop for UnixHost {
    fn drop(&mut self) {
        if self.identity.is_some() && self.identity == identity(&self.path) {
            remove(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_connect_and_a_decimal_port() {
        assert_eq!(parse_request(b"CONNECT 52"), Some(52));
        assert_eq!(parse_request(b"connect 4294967295"), Some(u32::MAX));
        for wrong in [
            "",
            "CONNECT",
            "CONNECT x",
            "CONNECT 4294967296",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 1 2",
            "GET 1",
        ] {
            assert_eq!(parse_request(wrong.as_bytes()), None, "{wrong}");
        }
        assert_eq!(parse_request(b"CONNECT \xff"), None);
    }
}
