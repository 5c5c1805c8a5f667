//! Sockets: [`StreamAddr`], listening and connecting.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
    sockopt,
};

use crate::{Error, Result};

/// Where a stream socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamAddr {
    /// A path of the file system.
    Unix(PathBuf),
    /// An address and a port.
    Tcp(SocketAddr),
}

impl fmt::Display for StreamAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(addr) => addr.fmt(f),
        }
    }
}

impl From<PathBuf> for StreamAddr {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

impl From<&Path> for StreamAddr {
    fn from(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }
}

impl From<SocketAddr> for StreamAddr {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(addr)
    }
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);
/// Peers that may wait until they are accepted.
const BACKLOG: i32 = 64;

fn new_socket(addr: &StreamAddr) -> rustix::io::Result<OwnedFd> {
    let family = match addr {
        StreamAddr::Unix(_) => AddressFamily::UNIX,
        StreamAddr::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
        StreamAddr::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
    };
    socket_with(family, SocketType::STREAM, FLAGS, None)
}

/// Frames are sent at once, and a few wait in the kernel rather than here.
pub(super) fn prepare(socket: &OwnedFd) {
    // Fails for Unix sockets, which have no delay.
    let _ = sockopt::set_tcp_nodelay(socket, true);
    // As much as the host allows; less is slower but right.
    let _ = sockopt::set_socket_send_buffer_size(socket, 1 << 20);
}

/// Connects, or begins to: a TCP socket may still be on its way.
pub(crate) fn dial(addr: &StreamAddr) -> io::Result<OwnedFd> {
    let socket = new_socket(addr)?;
    let connected = match addr {
        StreamAddr::Unix(path) => connect(&socket, &SocketAddrUnix::new(path)?),
        StreamAddr::Tcp(addr) => connect(&socket, addr),
    };
    match connected {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    prepare(&socket);
    Ok(socket)
}

/// A listening socket. A path is removed when it is dropped, if it is still the same.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    file: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    /// Listens at `addr`. The file of a Unix socket has mode 0600; one that nobody listens at any more is replaced.
    ///
    /// # Errors
    /// If somebody listens there, if there is a file that is no socket, and what the host refuses.
    pub(crate) fn new(addr: &StreamAddr) -> Result<Self> {
        let failed = || Error::io(format!("listen at {addr}"));
        let socket = new_socket(addr).map_err(|e| failed()(e.into()))?;
        let mut file = None;
        match addr {
            StreamAddr::Unix(path) => {
                let unix = SocketAddrUnix::new(path).map_err(|e| failed()(e.into()))?;
                // Linux gives the file the mode that the socket has when it is bound: nobody else can ever connect.
                fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| failed()(e.into()))?;
                let mut bound = bind(&socket, &unix);
                if bound == Err(Errno::ADDRINUSE) && is_stale(path) {
                    std::fs::remove_file(path).map_err(failed())?;
                    bound = bind(&socket, &unix);
                }
                bound.map_err(|e| failed()(e.into()))?;
                let meta = std::fs::symlink_metadata(path).map_err(failed())?;
                file = Some((path.clone(), meta.dev(), meta.ino()));
            }
            StreamAddr::Tcp(addr) => {
                // Connections of before, that wait for their end, do not keep the port.
                let _ = sockopt::set_socket_reuseaddr(&socket, true);
                bind(&socket, addr).map_err(|e| failed()(e.into()))?;
            }
        }
        let listener = Self { socket, file };
        listen(&listener.socket, BACKLOG).map_err(|e| failed()(e.into()))?;
        Ok(listener)
    }

    /// The next peer, if one waits.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        match rustix::io::retry_on_intr(|| accept_with(&self.socket, FLAGS)) {
            Ok(socket) => {
                prepare(&socket);
                Ok(Some(socket))
            }
            Err(Errno::AGAIN | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Where it listens by TCP: the port that the host chose, if it was 0.
    pub(super) fn tcp_addr(&self) -> Option<SocketAddr> {
        rustix::net::getsockname(&self.socket).ok()?.try_into().ok()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, dev, ino)) = &self.file
            && std::fs::symlink_metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == (*dev, *ino))
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether this is a socket of ours at which nobody listens.
fn is_stale(path: &Path) -> bool {
    let ours = std::fs::symlink_metadata(path)
        .is_ok_and(|meta| meta.file_type().is_socket() && meta.uid() == rustix::process::geteuid().as_raw());
    ours && dial(&StreamAddr::Unix(path.to_owned()))
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_file_of_a_socket_is_for_its_owner_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::new(&path.clone().into()).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_nobody_listens_at_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::new(&path.clone().into()).unwrap();
        let error = Listener::new(&path.clone().into()).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        drop(listener);
        std::fs::write(&path, b"data").unwrap();
        assert!(Listener::new(&path.clone().into()).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_file_that_took_the_place_of_the_socket_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::new(&path.clone().into()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        assert!(Listener::new(&path.into()).is_err());
    }
}
