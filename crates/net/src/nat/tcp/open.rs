//! Connections that the machine wants: whether, and where to.

use std::io;
use std::net::SocketAddr;

use super::flow::{Begin, End, Flow, Stage};
use super::socket::Socket;
use super::table::Key;
use super::wire::{Flags, Header, Segment, Seq};
use super::{Queues, Tcp, refuse};
use crate::nat::admission::share_of_files;
use crate::nat::context::{Context, Ready};
use crate::nat::emit::ETHERNET;
use crate::nat::icmp::{self, Why};
use crate::nat::{GuestTarget, Limits, Protocol, dns};

/// One of so many files of the process may be a connection. With those of UDP, DNS and ICMP, more than a quarter is left to all others.
const FILES: u64 = 2;
/// Programs that work for the machine at once, and that are started for it in a second.
pub(super) const MAX_PROGRAMS: u32 = 64;

/// Most flows at once.
pub(super) fn max_flows(limits: &Limits) -> usize {
    limits.tcp_flows.min(share_of_files(FILES))
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
        if matches!(target, Target::Special(GuestTarget::Command(_))) {
            let running = self.table.iter().filter(|flow| flow.socket.has_program()).count();
            if running as u64 >= MAX_PROGRAMS.into() || !self.programs.admit(cx.now) {
                // A process costs the host far more than a connection. The machine asks again in a second.
                cx.stats.limited();
                return;
            }
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
                match Why::of(&error).filter(|why| *why != Why::Port) {
                    Some(why) => unreachable(cx, &key, syn.seq, why),
                    None => refuse(cx, &key, syn, 0),
                }
            }
        }
    }

    fn dial(&mut self, cx: &mut Context<'_>, key: Key, syn: &Segment, target: &Target<'_>) -> io::Result<()> {
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
        if let Some(error) = self.socket.error() {
            return Err(match Why::of(&error) {
                Some(why) if why != Why::Port => End::Unreachable(why),
                _ => End::ByHost,
            });
        }
        if ready.writable {
            self.stage = Stage::SynReceived;
            self.advertise(&cx.config.limits, queues.buffered);
            self.send_syn(cx, queues);
        }
        Ok(())
    }
}

/// Tells the machine that its SYN does not arrive.
pub(super) fn unreachable(cx: &mut Context<'_>, key: &Key, seq: Seq, why: Why) {
    let mut syn = Vec::new();
    let (from, to) = (key.guest, key.server);
    // Of TCP's header, the ports and the sequence number are all that the machine needs.
    Header { from, to, seq, ack: Seq(0), flags: Flags::SYN, window: 0, options: None }
        .write(cx.link, 0, &mut syn);
    icmp::unreachable(cx, syn.get(ETHERNET..).unwrap_or_default(), why);
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
    if dns::is_for(config, server) {
        // The NAT asks the host's name server, whatever the policy says of its address.
        return dns::server(cx).map(Target::Addr);
    }
    let addr = SocketAddr::new(cx.true_destination(server.ip())?, server.port());
    config.policy.allows(Protocol::Tcp, addr).then_some(Target::Addr(addr))
}

#[cfg(test)]
mod tests {
    use rustix::process::{Resource, getrlimit};

    use super::*;

    #[test]
    fn connections_take_half_of_the_files_of_the_process_and_no_more_than_the_limit() {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most = |tcp_flows| max_flows(&Limits { tcp_flows, ..Limits::default() });
        assert_eq!(most(usize::MAX) as u64, files / 2);
        assert_eq!(most(10), 10);
    }
}
