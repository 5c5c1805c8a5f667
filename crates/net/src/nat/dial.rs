//! [`Dial`]: the one place where sockets to the host are made.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, ipproto, socket_with, socketpair,
};

/// Makes sockets to the host. All that a NAT opens towards the host it opens by this, after its policy allowed it; a test's shows
/// what would have been reached.
///
/// All sockets do not block and are closed on exec.
pub trait Dial: Send + fmt::Debug {
    /// A TCP socket that begins to connect to `to`: ready for writing when that is decided, with `SO_ERROR` telling how.
    ///
    /// # Errors
    /// If it cannot even begin.
    fn tcp(&mut self, to: SocketAddr) -> io::Result<OwnedFd>;

    /// A UDP socket connected to `to`.
    ///
    /// # Errors
    /// If the host does not give one.
    fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd>;

    /// A socket for ICMP echo requests to `to` (`SOCK_DGRAM` with `IPPROTO_ICMP` or `IPPROTO_ICMPV6`), connected.
    ///
    /// # Errors
    /// If the host does not allow it to this process: `net.ipv4.ping_group_range`.
    fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd>;

    /// A stream socket connected to the Unix socket at `path`, for a guest forward.
    ///
    /// # Errors
    /// If nobody listens there or this process may not connect. Without this method: `Unsupported`.
    fn unix(&mut self, path: &Path) -> io::Result<OwnedFd> {
        let _ = path;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Starts the program that `words` name, for a guest forward, and gives it a stream socket as its standard input and output;
    /// returns the other end.
    ///
    /// # Errors
    /// If it cannot be started. Without this method: `Unsupported`.
    fn command(&mut self, words: &[String]) -> io::Result<(OwnedFd, Child)> {
        let _ = words;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Makes sockets of the host the NAT runs on.
#[derive(Debug, Default)]
pub struct HostDial;

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

impl Dial for HostDial {
    fn tcp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        let fd = socket_with(family(to.ip()), SocketType::STREAM, FLAGS, Some(ipproto::TCP))?;
        match connect(&fd, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(fd),
            Err(error) => Err(error.into()),
        }
    }

    fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        let fd = socket_with(family(to.ip()), SocketType::DGRAM, FLAGS, Some(ipproto::UDP))?;
        connect(&fd, &to)?;
        Ok(fd)
    }

    fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd> {
        let protocol = if to.is_ipv4() { ipproto::ICMP } else { ipproto::ICMPV6 };
        let fd = socket_with(family(to), SocketType::DGRAM, FLAGS, Some(protocol))?;
        connect(&fd, &SocketAddr::new(to, 0))?;
        Ok(fd)
    }

    fn unix(&mut self, path: &Path) -> io::Result<OwnedFd> {
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
        connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(fd)
    }

    fn command(&mut self, words: &[String]) -> io::Result<(OwnedFd, Child)> {
        let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let close = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, close, None)?;
        // Only our end must not block: a program does not expect it of its standard input.
        rustix::io::ioctl_fionbio(&ours, true)?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::from(theirs.try_clone()?))
            .stdout(Stdio::from(theirs))
            .spawn()?;
        Ok((ours, child))
    }
}
