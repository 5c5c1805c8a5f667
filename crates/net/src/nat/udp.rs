//! The relay of UDP.
//!
//! A flow is what goes between one port of the machine and one of a server. Each that the machine begins has a connected socket of
//! the host, so nobody else answers in it; those that come by a forward share its socket. Datagrams wait in the sockets while there
//! is no room for frames.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use freestone_memory::io::send_vectored;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, sockopt};

use super::admission::{Admission, share_of_files};
use super::context::{Context, Kind, Ready, Token};
use super::dns::Dns;
use super::flows::Flows;
use super::icmp::{self, Why};
use super::{FlowInfo, FlowState, Forward, GuestTarget, Protocol, dhcp, dns, emit, link};
use crate::{Error, Frame, Result};

/// The largest datagram, and one byte.
const BUFFER: usize = 1 << 16;
/// One of so many files of the process may be a flow.
const FILES: u64 = 8;
/// Datagrams that are read of one socket before it is the next one's turn, and in all in one step.
const BATCH: usize = 16;
const STEP: usize = 256;
/// Room that must be there before a datagram is read: 64 KiB in fragments of the smallest MTU.
const ROOM: (usize, usize) = (56, 72 << 10);
/// Other ports that are tried for a peer whose own is taken, and where they begin.
const PORT_TRIES: u16 = 64;
const OTHER_PORTS: u16 = 49152;

/// All of UDP.
#[derive(Debug)]
pub(super) struct Udp {
    flows: Flows<Flow>,
    /// By the machine's side and the server's as it sees it.
    by_guest: HashMap<(SocketAddr, SocketAddr), u32>,
    /// By the forward and who came by it.
    by_peer: HashMap<(u32, SocketAddr), u32>,
    forwards: Flows<Listening>,
    dns: Dns,
    admission: Option<Admission>,
    max_flows: usize,
    buffer: Vec<u8>,
}

/// A forward at work.
#[derive(Debug)]
struct Listening {
    forward: Forward,
    socket: UdpSocket,
    address: SocketAddr,
}

#[derive(Debug)]
struct Flow {
    guest: SocketAddr,
    server: SocketAddr,
    peer: SocketAddr,
    way: Way,
    since: Instant,
    last: Instant,
    sent: u64,
    received: u64,
    /// Length of the last datagram of the machine, for an error about it.
    last_len: usize,
}

/// How datagrams get to the peer.
#[derive(Debug)]
enum Way {
    Own(OwnedFd),
    Forward(u32),
}

impl Udp {
    pub(super) fn new() -> Self {
        Self {
            flows: Flows::new(Kind::Udp),
            by_guest: HashMap::new(),
            by_peer: HashMap::new(),
            forwards: Flows::new(Kind::Forward),
            dns: Dns::new(),
            admission: None,
            max_flows: share_of_files(FILES),
            buffer: vec![0; BUFFER],
        }
    }

    /// Takes a datagram of the machine whose checksum was right.
    pub(super) fn datagram(
        &mut self,
        cx: &mut Context<'_>,
        from: SocketAddr,
        to: SocketAddr,
        payload: Frame<'_, '_>,
    ) {
        if let Some(net) = cx.config.ipv4.filter(|net| from.is_ipv4() && dhcp::is_for(net, to)) {
            if from.ip().is_unspecified() || link::may_send(cx.config, from.ip()) {
                return dhcp::packet(cx, &net, payload);
            }
            return cx.stats.spoofed();
        }
        if !link::may_send(cx.config, from.ip()) {
            return cx.stats.spoofed();
        }
        if from.port() == 0 || to.port() == 0 || from.is_ipv4() != to.is_ipv4() {
            return cx.stats.malformed();
        }
        if let Some(index) = self.by_guest.get(&(from, to)) {
            return self.send(cx, *index, payload);
        }
        let fixed = guest_forward(cx, to);
        if fixed.is_none() && dns::is_for(cx.config, to) {
            let limit = cx.config.limits.new_flows;
            let admission = self.admission.get_or_insert_with(|| Admission::new(limit));
            return self.dns.query(cx, admission, from, to, payload);
        }
        let peer = match fixed {
            Some(peer) => Ok(peer),
            None => destination(cx, to),
        };
        match peer.and_then(|peer| self.open(cx, from, to, peer)) {
            Ok(index) => self.send(cx, index, payload),
            Err(Some(why)) => icmp::datagram_unreachable(cx, from, to, payload.len(), why),
            Err(None) => {}
        }
    }

    /// Makes a flow to `peer`, or says what to tell the machine.
    fn open(
        &mut self,
        cx: &mut Context<'_>,
        guest: SocketAddr,
        server: SocketAddr,
        peer: SocketAddr,
    ) -> std::result::Result<u32, Option<Why>> {
        if !self.admit(cx, false) {
            return Err(None);
        }
        let made = self.flows.insert(|token| {
            let socket = cx.dial.udp(peer)?;
            cx.poll.add_readable(&socket, token)?;
            Ok(Flow::new(guest, server, peer, Way::Own(socket), cx.now))
        });
        match made {
            Ok(index) => {
                self.by_guest.insert((guest, server), index);
                cx.stats.udp_opened();
                Ok(index)
            }
            Err(error) => {
                let error: io::Error = error;
                tracing::debug!(%peer, error = &error as &dyn std::error::Error, "cannot make a UDP socket");
                let why = Why::of(&error);
                if why.is_none() {
                    cx.stats.limited();
                }
                Err(why)
            }
        }
    }

    /// Whether there may be one more flow, of somebody who comes by a forward or of the machine; makes room for it.
    fn admit(&mut self, cx: &mut Context<'_>, comes: bool) -> bool {
        let limits = &cx.config.limits;
        let admission = self.admission.get_or_insert_with(|| Admission::new(limits.new_flows));
        let most = limits.udp_flows.min(self.max_flows);
        if most == 0 || !admission.admit(cx.now) {
            cx.stats.limited();
            return false;
        }
        // Addresses of those who come may be forged: however many they are, the machine's own flows stay.
        if comes
            && self.by_peer.len() >= most.div_ceil(2)
            && let Some(oldest) = self.flows.oldest_of(|flow| matches!(flow.way, Way::Forward(_)))
        {
            self.close(oldest);
        }
        while self.flows.len() >= most
            && let Some((oldest, _)) = self.flows.oldest()
        {
            self.close(oldest);
        }
        true
    }

    fn close(&mut self, index: u32) {
        let Some(flow) = self.flows.remove(index) else { return };
        self.by_guest.remove(&(flow.guest, flow.server));
        if let Way::Forward(forward) = flow.way {
            self.by_peer.remove(&(forward, flow.peer));
        }
    }

    /// Sends a datagram of the machine on its way.
    fn send(&mut self, cx: &mut Context<'_>, index: u32, payload: Frame<'_, '_>) {
        let Some(flow) = self.flows.get_mut(index) else { return };
        flow.last = cx.now;
        flow.last_len = payload.len();
        let sent = match &flow.way {
            Way::Own(socket) => {
                let send = || send_vectored(socket.as_fd(), &[], payload.slices(), payload.range());
                match send() {
                    // That was about the one before: this one is still to go.
                    Err(error) if Why::of(&error).is_some() => {
                        let (guest, server) = (flow.guest, flow.server);
                        let why = Why::of(&error).unwrap_or(Why::Host);
                        let again = send();
                        icmp::datagram_unreachable(cx, guest, server, payload.len(), why);
                        again
                    }
                    sent => sent,
                }
            }
            Way::Forward(forward) => {
                let len = payload.read_at(0, &mut self.buffer);
                match (self.forwards.get(*forward), self.buffer.get(..len)) {
                    (Some(listening), Some(data)) => listening.socket.send_to(data, flow.peer),
                    _ => return,
                }
            }
        };
        match sent {
            Ok(sent) => flow.sent += sent as u64,
            Err(error) if Why::of(&error).is_some() => {}
            // Too large, or no room: datagrams get lost.
            Err(_) => cx.stats.limited(),
        }
        self.flows.touch(index);
    }

    /// Something happened at a socket; [`pump`](Self::pump) reads it.
    pub(super) fn ready(&mut self, cx: &mut Context<'_>, ready: Ready) {
        if !ready.readable {
            return;
        }
        match ready.token.kind {
            Kind::Udp => {
                if let Some(index) = self.flows.at(ready.token) {
                    self.flows.set_readable(index);
                }
            }
            Kind::Forward => {
                if let Some(index) = self.forwards.at(ready.token) {
                    self.forwards.set_readable(index);
                }
            }
            Kind::Dns => self.dns.ready(cx, ready, &mut self.buffer),
            _ => {}
        }
    }

    /// Called after what was ready and whenever frames left: reads the host's datagrams while there is room for them, a bounded
    /// number. Returns whether more may wait for which there is room.
    pub(super) fn pump(&mut self, cx: &mut Context<'_>) -> bool {
        let mut left = STEP;
        let mut idle = false;
        while !idle && left > 0 {
            idle = true;
            if let Some(index) = self.next_flow(cx) {
                idle = false;
                self.pump_flow(cx, index, &mut left);
            }
            if cx.out.has_room_for(ROOM.0, ROOM.1)
                && let Some(index) = self.forwards.next_readable()
            {
                idle = false;
                self.pump_forward(cx, index, &mut left);
            }
        }
        (self.flows.has_readable() || self.forwards.has_readable()) && cx.out.has_room_for(ROOM.0, ROOM.1)
    }

    fn next_flow(&mut self, cx: &Context<'_>) -> Option<u32> {
        cx.out.has_room_for(ROOM.0, ROOM.1).then(|| self.flows.next_readable()).flatten()
    }

    fn pump_flow(&mut self, cx: &mut Context<'_>, index: u32, left: &mut usize) {
        for _ in 0..BATCH {
            let Some(flow) = self.flows.get_mut(index) else { return };
            let Way::Own(socket) = &flow.way else { return };
            *left = left.saturating_sub(1);
            let got = rustix::net::recv(socket, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT);
            match got.map_err(io::Error::from) {
                Ok((_, len)) => {
                    flow.last = cx.now;
                    flow.received += len as u64;
                    let (server, guest) = (flow.server, flow.guest);
                    self.flows.touch(index);
                    emit::udp(cx, server, guest, self.buffer.get(..len).unwrap_or_default());
                }
                Err(error) => {
                    let Some(why) = Why::of(&error) else { return };
                    let (server, guest, len) = (flow.server, flow.guest, flow.last_len);
                    icmp::datagram_unreachable(cx, guest, server, len, why);
                }
            }
            if !cx.out.has_room_for(ROOM.0, ROOM.1) {
                break;
            }
        }
        self.flows.set_readable(index);
    }

    fn pump_forward(&mut self, cx: &mut Context<'_>, index: u32, left: &mut usize) {
        for _ in 0..BATCH {
            let Some(listening) = self.forwards.get(index) else { return };
            *left = left.saturating_sub(1);
            match listening.socket.recv_from(&mut self.buffer) {
                Ok((len, peer)) => {
                    if let Some(flow) = self.flow_of_peer(cx, index, peer) {
                        if let Some(flow) = self.flows.get_mut(flow) {
                            flow.last = cx.now;
                            flow.received += len as u64;
                            let (server, guest) = (flow.server, flow.guest);
                            link::find(cx, guest.ip());
                            emit::udp(cx, server, guest, self.buffer.get(..len).unwrap_or_default());
                        }
                        self.flows.touch(flow);
                    }
                }
                // About something that was sent.
                Err(error) if Why::of(&error).is_some() => {}
                Err(_) => return,
            }
            if !cx.out.has_room_for(ROOM.0, ROOM.1) {
                break;
            }
        }
        self.forwards.set_readable(index);
    }

    /// The flow of somebody who came by a forward; a new one if he is new.
    fn flow_of_peer(&mut self, cx: &mut Context<'_>, forward: u32, peer: SocketAddr) -> Option<u32> {
        if let Some(index) = self.by_peer.get(&(forward, peer)) {
            return Some(*index);
        }
        let Some((guest, seen)) = self.ends(cx, forward, peer) else {
            cx.stats.ignored();
            return None;
        };
        if !self.admit(cx, true) {
            return None;
        }
        let flow = Flow::new(guest, seen, peer, Way::Forward(forward), cx.now);
        let index = self.flows.insert(|_| Ok::<_, std::convert::Infallible>(flow)).ok()?;
        self.by_guest.insert((guest, seen), index);
        self.by_peer.insert((forward, peer), index);
        cx.stats.udp_opened();
        Some(index)
    }

    /// The machine's side for a peer, and how it sees him: with another port, if two share an address and a port there.
    fn ends(&self, cx: &Context<'_>, forward: u32, peer: SocketAddr) -> Option<(SocketAddr, SocketAddr)> {
        let forward = &self.forwards.get(forward)?.forward;
        let addr = match (forward.guest_addr, peer.ip().to_canonical()) {
            (Some(addr), _) => addr,
            (None, IpAddr::V4(_)) => cx.config.ipv4?.guest.into(),
            (None, IpAddr::V6(_)) => cx.link.guest_v6?.into(),
        };
        let guest = SocketAddr::new(addr, forward.guest_port);
        let mut seen = cx.seen_by_guest(peer).filter(|seen| seen.is_ipv4() == guest.is_ipv4())?;
        let first = peer.port() % PORT_TRIES;
        for try_at in 0..=PORT_TRIES {
            if seen.port() != 0 && !self.by_guest.contains_key(&(guest, seen)) {
                return Some((guest, seen));
            }
            seen.set_port(OTHER_PORTS + (first + try_at) % PORT_TRIES);
        }
        None
    }

    /// Begins to listen for a forward; returns where.
    ///
    /// # Errors
    /// If the host does not let it.
    pub(super) fn listen(&mut self, cx: &mut Context<'_>, forward: &Forward) -> Result<SocketAddr> {
        let io = || Error::io(format!("listen for the forward {forward}"));
        let made = self.forwards.insert(|token| listening(cx, token, forward)).map_err(io())?;
        let address = self.forwards.get(made).map(|listening| listening.address);
        address.ok_or_else(|| io()(io::ErrorKind::NotFound.into()))
    }

    /// Ends the forward of this address of the host, as [`listen`](Self::listen) returned it, with all that came by it; whether
    /// there was one.
    pub(super) fn unlisten(&mut self, host: SocketAddr) -> bool {
        let Some(index) = self.forwards.find(|listening| listening.address == host) else { return false };
        let gone: Vec<_> =
            self.by_peer.iter().filter(|((of, _), _)| *of == index).map(|(_, flow)| *flow).collect();
        gone.into_iter().for_each(|flow| self.close(flow));
        self.forwards.remove(index).is_some()
    }

    /// Ends flows that were idle too long, and asks name servers again; returns when there will be more to do.
    pub(super) fn timers(&mut self, cx: &mut Context<'_>) -> Option<Instant> {
        let dns = self.dns.timers(cx);
        let mut next = None;
        while let Some((index, flow)) = self.flows.oldest() {
            let end = flow.last.checked_add(cx.config.limits.udp_idle);
            if end.is_none_or(|end| end > cx.now) {
                next = end;
                break;
            }
            self.close(index);
        }
        [dns, next].into_iter().flatten().min()
    }

    /// Forgets all flows and queries. Forwards stay.
    pub(super) fn reset(&mut self) {
        self.flows.clear();
        self.by_guest.clear();
        self.by_peer.clear();
        self.dns.reset();
    }

    /// What there is.
    pub(super) fn flows(&self, now: Instant) -> Vec<FlowInfo> {
        let info = |flow: &Flow| FlowInfo {
            protocol: Some(Protocol::Udp),
            guest: flow.guest,
            server: flow.server,
            peer: Some(flow.peer),
            outgoing: matches!(flow.way, Way::Own(_)),
            state: FlowState::Open,
            sent: flow.sent,
            received: flow.received,
            age: now.saturating_duration_since(flow.since),
            idle: now.saturating_duration_since(flow.last),
        };
        self.flows.iter().map(info).collect()
    }
}

impl Flow {
    fn new(guest: SocketAddr, server: SocketAddr, peer: SocketAddr, way: Way, now: Instant) -> Self {
        Self { guest, server, peer, way, since: now, last: now, sent: 0, received: 0, last_len: 0 }
    }
}

/// Where a guest forward leads that has this server.
fn guest_forward(cx: &Context<'_>, to: SocketAddr) -> Option<SocketAddr> {
    cx.config.guest_forwards.iter().find_map(|forward| match forward.target {
        GuestTarget::Addr(addr) if forward.protocol == Protocol::Udp && forward.server == to => Some(addr),
        _ => None,
    })
}

/// Where a datagram goes in truth, if it may; or what to tell the machine.
fn destination(cx: &Context<'_>, to: SocketAddr) -> std::result::Result<SocketAddr, Option<Why>> {
    if cx.config.restrict {
        cx.stats.denied();
        return Err(Some(Why::Prohibited));
    }
    let Some(ip) = cx.true_destination(to.ip()) else {
        cx.stats.ignored();
        return Err(Some(Why::Host));
    };
    let peer = SocketAddr::new(ip, to.port());
    if !cx.config.policy.allows(Protocol::Udp, peer) {
        cx.stats.denied();
        return Err(Some(Why::Prohibited));
    }
    Ok(peer)
}

/// Makes the socket of a forward.
fn listening(cx: &Context<'_>, token: Token, forward: &Forward) -> io::Result<Listening> {
    let family = if forward.host.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
    if forward.host.is_ipv6() {
        // So that `0.0.0.0` and `::` are two, as for TCP.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &forward.host)?;
    let socket = UdpSocket::from(socket);
    cx.poll.add_readable(&socket, token)?;
    Ok(Listening { forward: *forward, address: socket.local_addr()?, socket })
}

#[cfg(test)]
mod tests;
