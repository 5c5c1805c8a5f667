//! Ports of the host that lead to the machine.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, acceptfrom_with, bind, getsockname, ipproto, listen, socket_with,
    sockopt,
};

use super::Tcp;
use super::flow::{Begin, Flow};
use super::socket::Socket;
use super::table::Key;
use crate::nat::Forward;
use crate::nat::context::{Context, Kind, Ready, Token};
use crate::{Error, Result};

/// Connections that are taken from one listener in one step.
const MAX_ACCEPTS: usize = 64;
/// Connections that wait at a listener.
const BACKLOG: i32 = 1024;
/// Listeners at once.
const MAX_LISTENERS: usize = 4096;
/// How long a listener waits when the host has no files left.
const RETRY: Duration = Duration::from_millis(100);
/// Where connections begin for the machine if their own port is taken.
const EPHEMERAL: u16 = 49152;

/// A port that leads to the machine.
#[derive(Debug)]
struct Listener {
    fd: OwnedFd,
    forward: Forward,
    index: u32,
    /// Somebody may wait.
    ready: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    list: Vec<Listener>,
    next: u32,
    /// Somebody may wait at one of them.
    ready: bool,
    /// When to try again what the host had no files for.
    retry_at: Option<Instant>,
}

impl Listeners {
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }
}

impl Tcp {
    /// Listens for the machine. Returns the address, with the port that the host chose if it was to choose.
    ///
    /// # Errors
    /// If the address is in use, is none of the host, or needs privileges.
    pub(in crate::nat) fn listen(&mut self, cx: &Context<'_>, forward: &Forward) -> Result<SocketAddr> {
        let op = || format!("listen at {} (tcp) for the machine", forward.host);
        if self.listeners.list.len() >= MAX_LISTENERS {
            return Err(Error::invalid("forward", forward.host.to_string(), "there are too many"));
        }
        let (fd, addr) = open(forward.host).map_err(|error| Error::io(op())(error))?;
        let index = self.listeners.next;
        let token = Token { kind: Kind::Listener, generation: 0, index };
        cx.poll.add(fd.as_fd(), token).map_err(Error::io(op()))?;
        self.listeners.next = self.listeners.next.wrapping_add(1);
        let forward = Forward { host: addr, ..*forward };
        self.listeners.list.push(Listener { fd, forward, index, ready: true });
        self.listeners.ready = true;
        Ok(addr)
    }

    /// Ends listening at `host`; connections that were made go on. Returns whether it listened.
    pub(in crate::nat) fn unlisten(&mut self, host: SocketAddr) -> bool {
        let before = self.listeners.list.len();
        self.listeners.list.retain(|listener| listener.forward.host != host);
        before != self.listeners.list.len()
    }

    /// Somebody comes to a listener.
    pub(in crate::nat) fn knock(&mut self, ready: Ready) {
        if let Some(listener) =
            self.listeners.list.iter_mut().find(|listener| listener.index == ready.token.index)
        {
            listener.ready = true;
            self.listeners.ready = true;
        }
    }

    /// Takes those who wait, a bounded number. Returns whether more may wait.
    pub(super) fn accept_more(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.listeners.ready || self.listeners.retry_at.is_some_and(|at| at > cx.now) {
            return false;
        }
        self.listeners.retry_at = None;
        let mut more = false;
        for at in 0..self.listeners.list.len() {
            more |= self.accept(cx, at);
        }
        self.listeners.ready = more || self.listeners.retry_at.is_some();
        more
    }

    /// Takes those who wait at one listener.
    fn accept(&mut self, cx: &mut Context<'_>, at: usize) -> bool {
        for _ in 0..MAX_ACCEPTS {
            let Some(listener) = self.listeners.list.get_mut(at).filter(|listener| listener.ready) else {
                return false;
            };
            let forward = listener.forward;
            match acceptfrom_with(&listener.fd, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((fd, peer)) => {
                    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
                    self.accepted(cx, fd, peer, &forward);
                }
                Err(Errno::AGAIN) => {
                    listener.ready = false;
                    return false;
                }
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    cx.stats.limited();
                    self.listeners.retry_at = Some(cx.now + RETRY);
                    return false;
                }
                // It went away before it was taken, or something that passes.
                Err(_) => {}
            }
        }
        true
    }

    /// Makes a connection to the machine for somebody who came.
    fn accepted(&mut self, cx: &mut Context<'_>, fd: OwnedFd, peer: Option<SocketAddr>, forward: &Forward) {
        let socket = Socket::tcp(fd);
        let key =
            peer.and_then(|peer| cx.seen_by_guest(peer)).and_then(|seen| self.key_for(cx, seen, forward));
        let Some(key) = key else {
            cx.stats.tcp_failed();
            socket.abort();
            return;
        };
        if self.table.len() >= self.max_flows || !self.rate.admit(cx.now) {
            cx.stats.limited();
            socket.abort();
            return;
        }
        let begin = Begin { key, socket, peer, iss: self.initial(&key), now: cx.now };
        let flow = Flow::incoming(begin, self.queues.shape);
        if self.add(cx, flow).is_err() {
            cx.stats.tcp_failed();
        }
    }

    /// The addresses of a connection to the machine from somebody whom it sees as `seen`.
    fn key_for(&self, cx: &Context<'_>, seen: SocketAddr, forward: &Forward) -> Option<Key> {
        let guest = guest_for(cx, seen.ip(), forward)?;
        let guest = SocketAddr::new(guest, forward.guest_port);
        let mut server = seen;
        if seen.is_ipv4() != guest.is_ipv4() {
            let gateway = match guest.ip() {
                IpAddr::V4(_) => IpAddr::V4(cx.config.ipv4?.gateway),
                IpAddr::V6(_) => IpAddr::V6(cx.config.ipv6?.gateway),
            };
            server.set_ip(gateway);
        }
        // Two who come from one port of different addresses may look alike to the machine.
        for try_next in 0..64u16 {
            let key = Key { guest, server };
            if !self.table.contains(&key) {
                return Some(key);
            }
            let port = seen.port().wrapping_mul(31).wrapping_add(try_next.wrapping_mul(257));
            server.set_port(port | EPHEMERAL);
        }
        None
    }
}

/// The machine's address for a connection from somebody with the address `seen`.
fn guest_for(cx: &Context<'_>, seen: IpAddr, forward: &Forward) -> Option<IpAddr> {
    if forward.guest_addr.is_some() {
        return forward.guest_addr;
    }
    let v4 = cx.config.ipv4.map(|net| IpAddr::V4(net.guest));
    let v6 = cx.link.guest_v6.map(IpAddr::V6);
    if seen.is_ipv4() { v4 } else { v6.or(v4) }
}

fn open(addr: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if addr.is_ipv6() {
        // Who says `[::]` does not open a port of IPv4: that is a forward of its own, as for UDP.
        sockopt::set_ipv6_v6only(&fd, true)?;
    }
    bind(&fd, &addr)?;
    listen(&fd, BACKLOG)?;
    let addr = SocketAddr::try_from(getsockname(&fd)?)?;
    Ok((fd, addr))
}
