//! [`Flow`]: a connection between the machine and the host, and what it waits for.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::socket::Socket;
use super::table::Key;
use super::wire::{Flags, Header, Segment, Seq};
use super::{Queues, Shape};
use crate::VnetHeader;
use crate::nat::context::Context;
use crate::nat::icmp::Why;
use crate::nat::link;
use crate::nat::stats::{FlowInfo, FlowState};
use crate::nat::{Limits, Protocol};

/// How long the machine may take to acknowledge before it is asked again, at first and at most (RFC 6298, with a lower minimum:
/// the link is memory).
const FIRST_RESEND: Duration = Duration::from_secs(1);
const MIN_RESEND: Duration = Duration::from_millis(200);
const MAX_RESEND: Duration = Duration::from_secs(16);
/// How often it is asked again.
const MAX_RETRIES: u8 = 12;

/// Bytes on the way to the machine, at most. They are still in the socket, and the kernel walks over them piece by piece for each
/// further frame; a window of megabytes would make that most of the work. It is a hundred times what fits in a round trip.
const MAX_IN_FLIGHT: u32 = 512 << 10;

/// Bytes that a flow may keep for the host even if all together have as many as they may.
const OWN_BUFFER: usize = 4096;

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The machine wants to connect; the host did not decide.
    Connecting,
    /// The host agreed, the machine was told.
    SynReceived,
    /// Somebody wants to connect to the machine, which was told.
    SynSent,
    /// Connected.
    Open,
}

/// Why a flow ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Both sides are done.
    Orderly,
    /// The machine reset it.
    ByGuest,
    /// The host did.
    ByHost,
    /// The host has no way there.
    Unreachable(Why),
    /// Nothing happened for too long.
    Timeout,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) key: Key,
    pub(super) socket: Socket,
    /// The other side as it is, if it has an address.
    pub(super) peer: Option<SocketAddr>,
    /// The machine began.
    pub(super) outgoing: bool,
    pub(super) stage: Stage,
    pub(super) opened: Instant,
    /// When the machine or the host did something last.
    pub(super) active: Instant,
    /// When it is called next, as `Timers` knows.
    pub(super) timer: Option<Instant>,

    // From the machine to the host.
    /// What the machine sends next.
    pub(super) rcv_nxt: Seq,
    /// How far the machine may send.
    pub(super) rcv_edge: Seq,
    /// Our windows are shifted by so many bits.
    pub(super) rcv_scale: u8,
    /// What the host did not take yet.
    pub(super) pending: VecDeque<u8>,
    /// The machine is done.
    pub(super) guest_fin: bool,
    /// The host knows.
    pub(super) shut: bool,
    /// The machine is to be told what arrived.
    pub(super) ack_due: bool,

    // From the host to the machine.
    /// What the machine acknowledges next.
    pub(super) una: Seq,
    /// What is sent to it next: less than `max` if something is sent again.
    pub(super) nxt: Seq,
    /// What was never sent.
    pub(super) max: Seq,
    /// How much the machine takes from `una` on.
    pub(super) window: u32,
    /// The machine's windows are shifted by so many bits.
    pub(super) snd_scale: u8,
    /// Data in a segment, at most.
    pub(super) mss: u16,
    /// The host may have something.
    pub(super) readable: bool,
    /// The host may be done.
    pub(super) hangup: bool,
    /// The machine was told that the host is done: the last before `max`.
    pub(super) fin_sent: bool,
    /// It knows.
    pub(super) fin_acked: bool,
    /// Bytes that it acknowledged and that are still in the socket.
    pub(super) undiscarded: u32,
    pub(super) dup_acks: u8,
    /// What was sent when something was sent again last: acknowledgements before that say nothing new.
    pub(super) recover: Seq,
    /// When it is sent again, or the window is asked for.
    pub(super) resend_at: Option<Instant>,
    pub(super) resend_after: Duration,
    pub(super) retries: u8,
    /// Until the machine acknowledges this, the round trip is timed.
    pub(super) timed: Option<(Seq, Instant)>,
    /// The round trip, smoothed, and its variation.
    pub(super) round_trip: Option<(Duration, Duration)>,

    /// It is in the queue of those who have something for the machine.
    pub(super) queued: bool,
    /// It is in the list of those for whom something is to be done at the end of the step.
    pub(super) touched: bool,
    pub(super) sent: u64,
    pub(super) received: u64,
}

/// What a new flow begins with.
#[derive(Debug)]
pub(super) struct Begin {
    pub(super) key: Key,
    pub(super) socket: Socket,
    pub(super) peer: Option<SocketAddr>,
    pub(super) iss: Seq,
    pub(super) now: Instant,
}

impl Flow {
    /// A flow that the machine wants, by its SYN.
    pub(super) fn outgoing(begin: Begin, syn: &Segment, shape: Shape) -> Self {
        let mut flow = Self::new(begin, Stage::Connecting);
        flow.outgoing = true;
        flow.learn(syn, shape);
        flow
    }

    /// A flow that somebody wants to the machine.
    pub(super) fn incoming(begin: Begin, shape: Shape) -> Self {
        let mut flow = Self::new(begin, Stage::SynSent);
        flow.rcv_scale = shape.scale;
        flow
    }

    fn new(begin: Begin, stage: Stage) -> Self {
        let Begin { key, socket, peer, iss, now } = begin;
        Self {
            key,
            socket,
            peer,
            outgoing: false,
            stage,
            opened: now,
            active: now,
            timer: None,
            rcv_nxt: Seq(0),
            rcv_edge: Seq(0),
            rcv_scale: 0,
            pending: VecDeque::new(),
            guest_fin: false,
            shut: false,
            ack_due: false,
            una: iss,
            nxt: iss.plus(1),
            max: iss.plus(1),
            window: 0,
            snd_scale: 0,
            mss: 0,
            readable: false,
            hangup: false,
            fin_sent: false,
            fin_acked: false,
            undiscarded: 0,
            dup_acks: 0,
            recover: iss,
            resend_at: None,
            resend_after: FIRST_RESEND,
            retries: 0,
            timed: None,
            round_trip: None,
            queued: false,
            touched: false,
            sent: 0,
            received: 0,
        }
    }

    /// Takes over what the machine's SYN says.
    pub(super) fn learn(&mut self, syn: &Segment, shape: Shape) {
        self.rcv_nxt = syn.seq.plus(1);
        self.rcv_edge = self.rcv_nxt;
        self.rcv_scale = if syn.scale.is_some() { shape.scale } else { 0 };
        self.snd_scale = syn.scale.unwrap_or(0);
        self.window = syn.window.into();
        let most = shape.mss(self.key.guest.ip());
        self.mss = syn.mss.unwrap_or(536).clamp(88, most.max(88));
    }

    /// How much of what was sent is not acknowledged.
    pub(super) fn in_flight(&self) -> u32 {
        self.max.beyond(self.una)
    }

    /// How much more the machine takes.
    pub(super) fn usable(&self) -> u32 {
        self.window.min(MAX_IN_FLIGHT).saturating_sub(self.nxt.beyond(self.una))
    }

    /// Only that the host is done is to be said again.
    pub(super) fn only_fin(&self) -> bool {
        self.fin_sent && !self.fin_acked && self.nxt.plus(1) == self.max
    }

    /// There is something for the machine, as far as we know.
    fn has_something(&self) -> bool {
        self.stage == Stage::Open && (self.nxt != self.max || (self.readable && !self.fin_sent))
    }

    /// There is something for the machine, and it takes it. Little pieces only if it waits for nothing else (RFC 9293, 3.8.6.2.1).
    pub(super) fn can_send(&self) -> bool {
        let usable = self.usable();
        self.has_something()
            && (usable >= self.mss.into() || (usable > 0 && self.nxt == self.una) || self.only_fin())
    }

    /// There is something for the machine, and only a wider window helps.
    fn stalled(&self) -> bool {
        self.has_something() && self.in_flight() == 0 && self.window == 0
    }

    /// Both sides are done and know it.
    pub(super) fn finished(&self) -> bool {
        self.guest_fin && self.shut && self.fin_acked
    }

    /// How much more may be kept for the host. However much other flows keep: those whose hosts do not read must not stop all
    /// others.
    pub(super) fn room(&self, limits: &Limits, buffered: usize) -> usize {
        let kept = self.pending.len();
        let shared = limits.total_buffer.saturating_sub(buffered);
        buffer_size(limits).saturating_sub(kept).min(shared.max(OWN_BUFFER.saturating_sub(kept)))
    }

    /// The window that the machine is told now (RFC 9293, 3.8.6): never less than before, and wider in good steps only.
    pub(super) fn advertise(&mut self, limits: &Limits, buffered: usize) -> u16 {
        let scale = u32::from(self.rcv_scale);
        let cap = buffer_size(limits).min(65535 << scale);
        let free = self.room(limits, buffered).min(cap.saturating_sub(self.pending.len()));
        let free = u32::try_from(free).unwrap_or(0) >> scale << scale;
        let edge = self.rcv_nxt.plus(free);
        let step = u32::from(self.mss).min(u32::try_from(cap / 2).unwrap_or(0));
        if edge.beyond(self.rcv_edge) >= step {
            self.rcv_edge = edge;
        }
        u16::try_from(self.rcv_edge.beyond(self.rcv_nxt) >> scale).unwrap_or(u16::MAX)
    }

    /// Whether the window got so much wider that the machine should know at once.
    pub(super) fn window_is_news(&self, limits: &Limits, buffered: usize) -> bool {
        let cap = buffer_size(limits).min(65535 << self.rcv_scale);
        let free = self.room(limits, buffered).min(cap.saturating_sub(self.pending.len()));
        let told = usize::try_from(self.rcv_edge.beyond(self.rcv_nxt)).unwrap_or(usize::MAX);
        free.saturating_sub(told) >= (cap / 2).min(2 * usize::from(self.mss)) && !self.guest_fin
    }

    /// Sends a segment without data.
    pub(super) fn control(&mut self, cx: &mut Context<'_>, queues: &Queues, flags: Flags, seq: Seq) {
        let syn = flags.contains(Flags::SYN);
        let (mut ack, mut window) = (Seq(0), 0);
        if flags.contains(Flags::ACK) {
            ack = self.rcv_nxt;
            window = self.advertise(&cx.config.limits, queues.buffered);
            self.ack_due = false;
        }
        let mut options = None;
        if syn {
            // The window of a SYN is not shifted (RFC 7323, section 2.2).
            let told = self.rcv_edge.beyond(self.rcv_nxt);
            window = u16::try_from(told).unwrap_or(u16::MAX);
            let scale = (self.rcv_scale > 0 || !self.outgoing).then_some(self.rcv_scale);
            options = Some((queues.shape.mss(self.key.guest.ip()), scale));
        }
        let header = Header { from: self.key.server, to: self.key.guest, seq, ack, flags, window, options };
        send_control(cx, &header);
    }

    /// Tells the machine at once what arrived.
    pub(super) fn ack_now(&mut self, cx: &mut Context<'_>, queues: &Queues) {
        self.control(cx, queues, Flags::ACK, self.max);
    }

    /// Sends the segment that makes the connection, again if need be.
    pub(super) fn send_syn(&mut self, cx: &mut Context<'_>, queues: &Queues) {
        let flags = if self.outgoing { Flags::SYN | Flags::ACK } else { Flags::SYN };
        link::find(cx, self.key.guest.ip());
        self.control(cx, queues, flags, self.una);
        self.resend_at = Some(cx.now + self.resend_after);
    }

    /// What is to be done at this moment because of the time.
    pub(super) fn timeout(&mut self, cx: &mut Context<'_>, queues: &Queues) -> Result<(), End> {
        if cx.now >= self.patience(&cx.config.limits) {
            let unanswered = self.stage == Stage::Connecting;
            return Err(if unanswered { End::Unreachable(Why::Host) } else { End::Timeout });
        }
        if self.resend_at.is_none_or(|at| at > cx.now) {
            return Ok(());
        }
        match self.stage {
            Stage::Connecting => self.resend_at = None,
            Stage::SynReceived | Stage::SynSent => {
                self.back_off(cx)?;
                self.send_syn(cx, queues);
            }
            Stage::Open if self.stalled() || (self.usable() == 0 && self.nxt == self.una) => {
                self.back_off(cx)?;
                // The machine has seen this before, and answers with its window.
                self.control(cx, queues, Flags::ACK, Seq(self.una.0.wrapping_sub(1)));
            }
            // It was to be sent again, and the machine gave no room for it yet: not its silence counts, but ours.
            Stage::Open if self.in_flight() > 0 && self.nxt == self.una => {
                self.resend_at = Some(cx.now + self.resend_after);
            }
            Stage::Open if self.in_flight() > 0 => {
                self.back_off(cx)?;
                self.resend(cx);
            }
            Stage::Open => self.resend_at = None,
        }
        Ok(())
    }

    /// Sends again all that is not acknowledged.
    pub(super) fn resend(&mut self, cx: &Context<'_>) {
        cx.stats.tcp_retransmitted();
        self.recover = self.max;
        self.nxt = self.una;
        self.timed = None;
    }

    fn back_off(&mut self, cx: &Context<'_>) -> Result<(), End> {
        self.retries += 1;
        if self.retries > MAX_RETRIES {
            return Err(End::Timeout);
        }
        self.resend_after = (self.resend_after * 2).min(MAX_RESEND);
        self.resend_at = Some(cx.now + self.resend_after);
        Ok(())
    }

    /// Learns how long the machine takes to answer (RFC 6298).
    pub(super) fn measure(&mut self, took: Duration) {
        let (smoothed, variation) = match self.round_trip {
            None => (took, took / 2),
            Some((smoothed, variation)) => {
                ((smoothed * 7 + took) / 8, (variation * 3 + smoothed.abs_diff(took)) / 4)
            }
        };
        self.round_trip = Some((smoothed, variation));
    }

    /// Forgets that something had to be sent again.
    pub(super) fn calm(&mut self) {
        self.retries = 0;
        self.resend_after = self.round_trip.map_or(FIRST_RESEND, |(smoothed, variation)| {
            (smoothed + variation * 4).clamp(MIN_RESEND, MAX_RESEND)
        });
    }

    /// How long nothing may happen.
    fn patience(&self, limits: &Limits) -> Instant {
        match self.stage {
            // Not while the host still has to take something: it may be slow.
            Stage::Open if self.shut && self.fin_sent => self.active + limits.tcp_handshake,
            Stage::Open => self.active + limits.tcp_idle,
            _ => self.opened + limits.tcp_handshake,
        }
    }

    /// Puts the flow in the queues where it belongs now.
    pub(super) fn settle(&mut self, queues: &mut Queues, index: u32, now: Instant, limits: &Limits) {
        if !self.queued && self.can_send() {
            self.queued = true;
            queues.ready.push_back(index);
        }
        if !self.touched && (self.ack_due || self.undiscarded > 0) {
            self.touched = true;
            queues.touched.push(index);
        }
        if self.stage == Stage::Open {
            let waits = self.in_flight() > 0 || self.stalled();
            self.resend_at = waits.then(|| self.resend_at.unwrap_or(now + self.resend_after));
        }
        let patience = self.patience(limits);
        let deadline = self.resend_at.map_or(patience, |at| at.min(patience));
        queues.timers.set(index, &mut self.timer, deadline);
    }

    /// As users see it.
    pub(super) fn info(&self, now: Instant) -> FlowInfo {
        FlowInfo {
            protocol: Some(Protocol::Tcp),
            guest: self.key.guest,
            server: self.key.server,
            peer: self.peer,
            outgoing: self.outgoing,
            state: match self.stage {
                Stage::Open if self.guest_fin && self.fin_sent => FlowState::Closing,
                Stage::Open if self.guest_fin || self.fin_sent => FlowState::HalfClosed,
                Stage::Open => FlowState::Open,
                _ => FlowState::Opening,
            },
            sent: self.sent,
            received: self.received,
            age: now.saturating_duration_since(self.opened),
            idle: now.saturating_duration_since(self.active),
        }
    }
}

/// Bytes that a flow may keep for the host, at most.
pub(super) fn buffer_size(limits: &Limits) -> usize {
    limits.tcp_buffer.clamp(4096, 64 << 20)
}

/// Sends a segment without data to the machine.
pub(super) fn send_control(cx: &mut Context<'_>, header: &Header) {
    let mut frame = cx.out.buffer();
    let start = header.write(cx.link, 0, &mut frame);
    super::wire::complete(&mut frame, start, 0);
    if !cx.out.push(frame, VnetHeader::default()) {
        cx.stats.overflowed();
    }
}
