//! Connections that the machine wants: whether, and where to.

use std::io;
use std::net::{IpAddr, SocketAddr};

use rustix::process::{Resource, getrlimit};

use super::flow::{Begin, End, Flow, Stage};
use super::socket::Socket;
use super::table::Key;
use super::wire::Segment;
use super::{Queues, Tcp, refuse};
use crate::nat::context::{Context, Ready};
use crate::nat::{GuestTarget, Limits, Protocol};

/// Most flows at once: a quarter of the files that the process may have is left to others.
pub(super) fn max_flows(limits: &Limits) -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    limits.tcp_flows.min(usize::try_from(files - files / 4).unwrap_or(usize::MAX))
}

/// Where a connection leads.
#[derive(Debug)]
enum Target<'a> {
    Addr(SocketAddr),
    Special(&'a GuestTarget),
}

impl Tcp {
    /// The machine wants a connection.
    pub(super) fn open(&mut self, cx: &mut Context<'_>, key: Key, syn: &Segment) {
        let Some(target) = target(cx, key.server) else {
            cx.stats.denied();
            return refuse(cx, &key, syn, 0);
        };
        if !self.rate.admit(cx.now) {
            // It asks again in a second.
            cx.stats.limited();
            return;
        }
        if self.table.len() >= self.max_flows {
            cx.stats.limited();
            return refuse(cx, &key, syn, 0);
        }
        match self.dial(cx, key, syn, &target) {
            Ok(()) => {}
            Err(error) => {
                let limit = matches!(
                    rustix::io::Errno::from_io_error(&error),
                    Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)
                );
                if limit {
                    cx.stats.limited();
                }
                cx.stats.tcp_failed();
                refuse(cx, &key, syn, 0);
            }
        }
    }

    fn dial(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        syn: &Segment,
        target: &Target<'_>,
    ) -> io::Result<()> {
        let (socket, peer) = match target {
            Target::Addr(addr) => (Socket::tcp(cx.dial.tcp(*addr)?), Some(*addr)),
            Target::Special(GuestTarget::Addr(addr)) => (Socket::tcp(cx.dial.tcp(*addr)?), Some(*addr)),
            Target::Special(GuestTarget::Unix(path)) => (Socket::unix(cx.dial.unix(path)?, None), None),
            Target::Special(GuestTarget::Command(words)) => {
                let (fd, child) = cx.dial.command(words)?;
                (Socket::unix(fd, Some(child)), None)
            }
        };
        let begin = Begin { key, socket, peer, iss: self.initial(&key), now: cx.now };
        let flow = Flow::outgoing(begin, syn, self.queues.shape);
        self.add(cx, flow)
    }

    /// Watches a new flow's socket and adds the flow.
    pub(super) fn add(&mut self, cx: &mut Context<'_>, flow: Flow) -> io::Result<()> {
        let full = || io::Error::from(io::ErrorKind::OutOfMemory);
        let token = self.table.next_token().ok_or_else(full)?;
        cx.poll.add(flow.socket.fd(), token)?;
        let index = self.table.insert(Box::new(flow)).ok_or_else(full)?;
        if let Some(flow) = self.table.get(index) {
            if flow.stage == Stage::SynSent {
                flow.send_syn(cx, &self.queues);
            }
            flow.settle(&mut self.queues, index, cx.now, &cx.config.limits);
        }
        Ok(())
    }
}

impl Flow {
    /// The host may have decided whether it connects.
    pub(super) fn connected(
        &mut self,
        cx: &mut Context<'_>,
        queues: &Queues,
        ready: Ready,
    ) -> Result<(), End> {
        if self.socket.error().is_some() {
            return Err(End::ByHost);
        }
        if ready.writable {
            self.stage = Stage::SynReceived;
            self.advertise(&cx.config.limits, queues.buffered);
            self.send_syn(cx, queues);
        }
        Ok(())
    }
}

/// Where a connection to `server` leads; `None` if it is not allowed.
fn target<'a>(cx: &Context<'a>, server: SocketAddr) -> Option<Target<'a>> {
    let config = cx.config;
    let forward = config
        .guest_forwards
        .iter()
        .find(|forward| forward.protocol == Protocol::Tcp && forward.server == server);
    if let Some(forward) = forward {
        return Some(Target::Special(&forward.target));
    }
    if config.restrict {
        return None;
    }
    let ip: IpAddr = cx.true_destination(server.ip())?;
    let addr = SocketAddr::new(ip, server.port());
    config.policy.allows(Protocol::Tcp, addr).then_some(Target::Addr(addr))
}
