//! The relay of TCP connections.
//!
//! The machine's connection ends here, and one of the host's goes on. Nothing is kept in between as long as both sides go on: data
//! of the machine goes to the host's socket from where it lies, and data of the host stays in its socket until the machine
//! acknowledged it. What the host's socket does not take at once is kept, up to a bound, and the machine's window is what is
//! left of that bound.
//!
//! The link does not reorder and hardly loses, so there is no congestion control, and segments behind a gap are not kept.

mod flow;
mod input;
mod listen;
mod open;
mod output;
mod socket;
mod table;
#[cfg(test)]
mod tests;
mod timers;
mod wire;

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::process::Child;
use std::time::{Duration, Instant};

use flow::{End, Stage, send_control};
use listen::Listeners;
use table::{Key, Table};
use timers::Timers;
use wire::{Flags, Header, Segment, Seq};

use super::admission::Admission;
use super::context::{Context, Ready};
use super::stats::FlowInfo;
use super::{Limits, NatConfig};
use crate::{Frame, Offloads, Received};

pub(super) use wire::{add_frame, fold, pseudo};

/// How long a program may go on after its connection ended.
const CHILD_GRACE: Duration = Duration::from_secs(10);
/// Programs whose connections ended that may go on at once.
const MAX_CHILDREN: usize = 64;
/// How often it is looked whether programs ended.
const CHILD_CHECK: Duration = Duration::from_millis(500);
/// Timers that are called in one step.
const MAX_TIMERS: usize = 256;

/// What all SYNs say of us.
#[derive(Debug, Clone, Copy)]
struct Shape {
    mtu: u16,
    /// Windows are shifted by so many bits, if the machine can do that.
    scale: u8,
}

impl Shape {
    fn new(mtu: u16, limits: &Limits) -> Self {
        let cap = flow::buffer_size(limits);
        let scale = (0..14).find(|scale| cap >> scale <= 65535).unwrap_or(14);
        Self { mtu, scale }
    }

    /// Data in a segment to or from `guest`, at most.
    fn mss(self, guest: IpAddr) -> u16 {
        self.mtu.saturating_sub(if guest.is_ipv4() { 40 } else { 60 })
    }
}

/// What flows share.
#[derive(Debug)]
struct Queues {
    shape: Shape,
    /// Flows that have something for the machine, each once. They take turns.
    ready: VecDeque<u32>,
    /// Flows for which something is to be done at the end of the step, each once.
    touched: Vec<u32>,
    timers: Timers,
    /// Bytes that all flows keep for the host.
    buffered: usize,
    scratch: Vec<u8>,
    header: Vec<u8>,
}

/// All TCP connections of a NAT.
#[derive(Debug)]
pub(super) struct Tcp {
    table: Table,
    queues: Queues,
    listeners: Listeners,
    rate: Admission,
    /// Programs that are started.
    programs: Admission,
    /// Flows at once.
    max_flows: usize,
    /// Programs whose connections ended, and when they are to be killed.
    children: Vec<(Child, Instant)>,
    next_child_check: Option<Instant>,
    random: RandomState,
    made: u64,
}

impl Tcp {
    pub(super) fn new(config: &NatConfig) -> Self {
        let queues = Queues {
            shape: Shape::new(config.mtu, &config.limits),
            ready: VecDeque::new(),
            touched: Vec::new(),
            timers: Timers::default(),
            buffered: 0,
            scratch: Vec::new(),
            header: Vec::with_capacity(128),
        };
        Self {
            table: Table::default(),
            queues,
            listeners: Listeners::default(),
            rate: Admission::new(config.limits.new_flows),
            programs: Admission::new(open::MAX_PROGRAMS),
            max_flows: open::max_flows(&config.limits),
            children: Vec::new(),
            next_child_check: None,
            random: RandomState::new(),
            made: 0,
        }
    }

    /// Takes a TCP packet of the machine: `bytes` are as much of its beginning as was copied, `packet` is all of it.
    pub(super) fn packet(
        &mut self,
        cx: &mut Context<'_>,
        from: IpAddr,
        to: IpAddr,
        bytes: &[u8],
        packet: Frame<'_, '_>,
    ) {
        let Some((segment, len)) = Segment::parse(bytes).filter(|(_, len)| *len <= packet.len()) else {
            cx.stats.malformed();
            return;
        };
        let payload = packet.after(len);
        let (guest, server) = (SocketAddr::new(from, segment.from), SocketAddr::new(to, segment.to));
        let key = Key { guest, server };
        let Some(index) = self.table.find(&key) else {
            return self.unknown(cx, key, &segment, payload.len());
        };
        let Some(flow) = self.table.get(index) else { return };
        let result = flow.segment(cx, &mut self.queues, &segment, payload);
        self.after(cx, index, result);
    }

    /// A segment of no connection.
    fn unknown(&mut self, cx: &mut Context<'_>, key: Key, segment: &Segment, payload: usize) {
        if segment.has(Flags::RST) {
            return;
        }
        if segment.has(Flags::SYN) && !segment.has(Flags::ACK) {
            self.open(cx, key, segment);
        } else {
            refuse(cx, &key, segment, payload);
        }
    }

    /// A socket of a flow is ready.
    pub(super) fn ready(&mut self, cx: &mut Context<'_>, ready: Ready) {
        let Some(flow) = self.table.by_token(ready.token) else { return };
        flow.hangup |= ready.hangup;
        let result = match flow.stage {
            Stage::Connecting => flow.connected(cx, &self.queues, ready),
            _ if ready.closed && flow.socket.error().is_some() => Err(End::ByHost),
            _ => {
                flow.readable |= ready.readable;
                if ready.writable { flow.drain(cx, &mut self.queues) } else { Ok(()) }
            }
        };
        self.after(cx, ready.token.index, result);
    }

    /// Puts a flow where it belongs after something happened to it, or ends it.
    fn after(&mut self, cx: &mut Context<'_>, index: u32, result: Result<(), End>) {
        let Some(flow) = self.table.get(index) else { return };
        let end = match result {
            Ok(()) if flow.finished() => End::Orderly,
            Ok(()) => return flow.settle(&mut self.queues, index, cx.now, &cx.config.limits),
            Err(end) => end,
        };
        self.end(cx, index, end);
    }

    fn end(&mut self, cx: &mut Context<'_>, index: u32, end: End) {
        let Some(mut flow) = self.table.remove(index) else { return };
        self.queues.timers.clear(index, &mut flow.timer);
        self.queues.buffered = self.queues.buffered.saturating_sub(flow.pending.len());
        if flow.queued {
            self.queues.ready.retain(|other| *other != index);
        }
        if flow.touched {
            self.queues.touched.retain(|other| *other != index);
        }
        match (end, flow.stage) {
            (End::Orderly, _) => cx.stats.tcp_closed(),
            (_, Stage::Open) => cx.stats.tcp_reset(),
            _ => cx.stats.tcp_failed(),
        }
        match (end, flow.stage) {
            (End::Orderly, _) => {
                // A socket that is closed with something in it resets its connection.
                let _ = flow.socket.discard(flow.undiscarded, &mut self.queues.scratch);
                if flow.ack_due {
                    flow.ack_now(cx, &self.queues);
                }
            }
            (End::ByGuest, _) => {}
            (End::Unreachable(why), _) => {
                open::unreachable(cx, &flow.key, Seq(flow.rcv_nxt.0.wrapping_sub(1)), why);
            }
            (End::ByHost | End::Timeout, Stage::Connecting) => {
                flow.control(cx, &self.queues, Flags::RST | Flags::ACK, Seq(0));
            }
            (End::ByHost | End::Timeout, _) => {
                flow.control(cx, &self.queues, Flags::RST | Flags::ACK, flow.max);
            }
        }
        let child = if end == End::Orderly { flow.socket.close() } else { flow.socket.abort() };
        if let Some(child) = child {
            if self.children.len() >= MAX_CHILDREN
                && let Some((oldest, until)) = self.children.first_mut()
            {
                let _ = oldest.kill();
                *until = cx.now;
                self.next_child_check = Some(cx.now);
            }
            self.children.push((child, cx.now + CHILD_GRACE));
            self.next_child_check.get_or_insert(cx.now + CHILD_CHECK);
        }
    }

    /// The end of a step: acknowledges what came, and lets go what the machine has. Returns whether there is more to be done at
    /// once.
    pub(super) fn flush(&mut self, cx: &mut Context<'_>) -> bool {
        let mut touched = std::mem::take(&mut self.queues.touched);
        for index in touched.drain(..) {
            let Some(flow) = self.table.get(index) else { continue };
            flow.touched = false;
            let bytes = std::mem::take(&mut flow.undiscarded);
            let result = match flow.socket.discard(bytes, &mut self.queues.scratch) {
                Ok(()) => Ok(()),
                Err(_) => Err(End::ByHost),
            };
            if result.is_ok() && flow.ack_due && cx.out.has_room(64) {
                flow.ack_now(cx, &self.queues);
            }
            self.after(cx, index, result);
        }
        // Its memory is used again; what was touched meanwhile is done next time.
        touched.append(&mut self.queues.touched);
        self.queues.touched = touched;
        self.accept_more(cx)
    }

    /// Calls the timers that are due. Returns when the next is.
    pub(super) fn timers(&mut self, cx: &mut Context<'_>) -> Option<Instant> {
        for _ in 0..MAX_TIMERS {
            let Some(index) = self.queues.timers.due(cx.now) else { break };
            let Some(flow) = self.table.get(index) else { continue };
            flow.timer = None;
            let result = flow.timeout(cx, &self.queues);
            self.after(cx, index, result);
        }
        self.reap(cx.now);
        let listeners = self.listeners.retry_at();
        [self.queues.timers.next(), self.next_child_check, listeners].into_iter().flatten().min()
    }

    /// The machine can be reached now: who waits to be connected to it is not to wait until it is time to try again.
    pub(super) fn hurry(&mut self, cx: &mut Context<'_>) {
        for index in self.table.indices() {
            if let Some(flow) = self.table.get(index).filter(|flow| flow.stage == Stage::SynSent) {
                flow.send_syn(cx, &self.queues);
            }
        }
    }

    /// Looks whether programs ended.
    fn reap(&mut self, now: Instant) {
        if self.next_child_check.is_none_or(|at| at > now) {
            return;
        }
        self.children.retain_mut(|(child, until)| {
            if *until <= now {
                let _ = child.kill();
            }
            matches!(child.try_wait(), Ok(None))
        });
        self.next_child_check = (!self.children.is_empty()).then(|| now + CHILD_CHECK);
    }

    /// Length of the next frame for the machine, at most.
    pub(super) fn waiting(&mut self, receive: Offloads) -> Option<usize> {
        while let Some(index) = self.queues.ready.front() {
            if let Some(flow) = self.table.get(*index) {
                if flow.can_send() {
                    return Some(flow.next_len(receive));
                }
                flow.queued = false;
            }
            self.queues.ready.pop_front();
        }
        None
    }

    /// Makes the next frame for the machine in `room`.
    pub(super) fn receive(
        &mut self,
        cx: &mut Context<'_>,
        room: Frame<'_, '_>,
        receive: Offloads,
    ) -> Received {
        for _ in 0..self.queues.ready.len() {
            let Some(index) = self.queues.ready.pop_front() else { break };
            let Some(flow) = self.table.get(index) else { continue };
            flow.queued = false;
            if !flow.can_send() {
                continue;
            }
            match flow.frame(cx, &mut self.queues, room, receive) {
                Ok(Received::NeedsRoom(len)) => {
                    flow.queued = true;
                    self.queues.ready.push_front(index);
                    return Received::NeedsRoom(len);
                }
                Ok(received) => {
                    self.after(cx, index, Ok(()));
                    if received != Received::Nothing {
                        return received;
                    }
                }
                Err(end) => self.end(cx, index, end),
            }
        }
        Received::Nothing
    }

    /// Resets the connection whose frame the machine never will have room for.
    pub(super) fn drop_next(&mut self, cx: &mut Context<'_>) {
        if let Some(index) = self.queues.ready.front().copied() {
            self.end(cx, index, End::ByHost);
        }
    }

    /// Ends all connections; the machine is not told.
    pub(super) fn reset(&mut self, cx: &mut Context<'_>) {
        for index in self.table.indices() {
            self.end(cx, index, End::ByGuest);
        }
    }

    /// The flows as users see them.
    pub(super) fn flows(&self, now: Instant) -> Vec<FlowInfo> {
        self.table.iter().map(|flow| flow.info(now)).collect()
    }

    /// A number for the beginning of a sequence that the machine cannot guess from those of other connections (RFC 9293, 3.4.1).
    fn initial(&mut self, key: &Key) -> Seq {
        self.made = self.made.wrapping_add(1);
        let [a, b, c, d, ..] = self.random.hash_one((key, self.made)).to_ne_bytes();
        Seq(u32::from_ne_bytes([a, b, c, d]))
    }
}

impl Drop for Tcp {
    /// No program outlives its NAT.
    fn drop(&mut self) {
        let indices = self.table.indices();
        let open = indices.into_iter().filter_map(|index| self.table.remove(index)?.socket.abort());
        for mut child in open.chain(self.children.drain(..).map(|(child, _)| child)) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Answers a segment that has no connection (RFC 9293, section 3.10.7.1).
fn refuse(cx: &mut Context<'_>, key: &Key, segment: &Segment, payload: usize) {
    let (seq, ack, flags) = if segment.has(Flags::ACK) {
        (segment.ack, Seq(0), Flags::RST)
    } else {
        (Seq(0), segment.seq.plus(segment.sequence_len(payload)), Flags::RST | Flags::ACK)
    };
    let header = Header { from: key.server, to: key.guest, seq, ack, flags, window: 0, options: None };
    send_control(cx, &header);
}
