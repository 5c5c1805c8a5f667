//! [`Dial`]: the one place where sockets to the host are made.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

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
}

/// Makes sockets of the host the NAT runs on.
#[derive(Debug, Default)]
pub struct HostDial;
