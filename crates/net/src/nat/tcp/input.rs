//! Segments of the machine (RFC 9293, section 3.10.7). Everything in them may be a lie.

use std::io;

use super::Queues;
use super::flow::{End, Flow, Stage};
use super::wire::{Flags, Segment};
use crate::Frame;
use crate::nat::context::Context;

impl Flow {
    /// Takes a segment of the machine.
    pub(super) fn segment(
        &mut self,
        cx: &mut Context<'_>,
        queues: &mut Queues,
        segment: &Segment,
        payload: Frame<'_, '_>,
    ) -> Result<(), End> {
        self.active = cx.now;
        match self.stage {
            Stage::Connecting => {
                let reset = segment.has(Flags::RST) && segment.seq == self.rcv_nxt;
                if reset { Err(End::ByGuest) } else { Ok(()) }
            }
            Stage::SynSent => self.answer_to_syn(cx, queues, segment),
            Stage::SynReceived | Stage::Open => self.synchronized(cx, queues, segment, payload),
        }
    }

    fn answer_to_syn(
        &mut self,
        cx: &mut Context<'_>,
        queues: &mut Queues,
        segment: &Segment,
    ) -> Result<(), End> {
        let right = segment.has(Flags::ACK) && segment.ack == self.max;
        if segment.has(Flags::RST) {
            return if right { Err(End::ByGuest) } else { Ok(()) };
        }
        if segment.has(Flags::ACK) && !right {
            // An old connection of the machine with these addresses: it forgets it, and the SYN comes again.
            self.control(cx, queues, Flags::RST, segment.ack);
            return Ok(());
        }
        if !right || !segment.has(Flags::SYN) {
            return Ok(());
        }
        self.learn(segment, queues.shape);
        self.una = self.max;
        self.open();
        cx.stats.tcp_accepted();
        // At once, so that the machine's side is made when the data comes.
        self.ack_now(cx, queues);
        Ok(())
    }

    fn open(&mut self) {
        self.stage = Stage::Open;
        self.recover = self.una;
        // What the host sent before now was not looked at.
        self.readable = true;
        self.resend_at = None;
        self.calm();
    }

    fn synchronized(
        &mut self,
        cx: &mut Context<'_>,
        queues: &mut Queues,
        segment: &Segment,
        payload: Frame<'_, '_>,
    ) -> Result<(), End> {
        let offset = segment.seq.since(self.rcv_nxt);
        if segment.has(Flags::RST) {
            return self.reset(cx, queues, offset);
        }
        if segment.has(Flags::SYN) {
            if self.stage == Stage::SynReceived && segment.seq.plus(1) == self.rcv_nxt {
                self.control(cx, queues, Flags::SYN | Flags::ACK, self.una);
            } else {
                self.ack_now(cx, queues);
            }
            return Ok(());
        }
        if !segment.has(Flags::ACK) || !self.acknowledge(cx, queues, segment, payload.len(), offset) {
            return Ok(());
        }
        let len = segment.sequence_len(payload.len());
        if offset == 0 && len == 0 {
            return Ok(());
        }
        self.data(cx, queues, segment, payload, offset)
    }

    /// Only the expected number resets; one in the window is answered, and if it was meant, the right one comes (RFC 5961).
    fn reset(&mut self, cx: &mut Context<'_>, queues: &Queues, offset: i32) -> Result<(), End> {
        if offset == 0 {
            return Err(End::ByGuest);
        }
        if u32::try_from(offset).is_ok_and(|offset| offset < self.rcv_edge.beyond(self.rcv_nxt)) {
            self.ack_now(cx, queues);
        }
        Ok(())
    }

    /// Takes what a segment acknowledges and the window it tells. Returns whether the rest of it counts.
    fn acknowledge(
        &mut self,
        cx: &mut Context<'_>,
        queues: &Queues,
        segment: &Segment,
        payload: usize,
        offset: i32,
    ) -> bool {
        let acked = segment.ack.since(self.una);
        if acked > self.max.since(self.una) {
            if self.stage == Stage::SynReceived {
                self.control(cx, queues, Flags::RST, segment.ack);
            } else {
                self.ack_now(cx, queues);
            }
            return false;
        }
        let window = u32::from(segment.window) << self.snd_scale;
        if self.stage == Stage::SynReceived {
            if acked != 1 {
                return false;
            }
            self.una = self.max;
            self.window = window;
            self.open();
            cx.stats.tcp_opened();
            return true;
        }
        if acked < 0 {
            return true;
        }
        if acked > 0 {
            self.advance(cx, segment);
        } else if self.in_flight() == 0 {
            // It answers, so it is there; only its window is too small.
            self.retries = 0;
        } else if payload == 0 && window == self.window && offset == 0 && !segment.has(Flags::FIN) {
            self.duplicate(cx);
        }
        if offset >= 0 {
            self.window = window;
        }
        true
    }

    /// The machine has more than before.
    fn advance(&mut self, cx: &Context<'_>, segment: &Segment) {
        let mut bytes = segment.ack.beyond(self.una);
        if self.fin_sent && segment.ack == self.max && !self.fin_acked {
            self.fin_acked = true;
            bytes -= 1;
        }
        if let Some((seq, at)) = self.timed
            && segment.ack.since(seq) >= 0
        {
            self.measure(cx.now.saturating_duration_since(at));
            self.timed = None;
        }
        self.una = segment.ack;
        if self.nxt.since(self.una) < 0 {
            self.nxt = self.una;
        }
        self.undiscarded = self.undiscarded.saturating_add(bytes);
        self.received = self.received.saturating_add(bytes.into());
        self.dup_acks = 0;
        self.calm();
        self.resend_at = Some(cx.now + self.resend_after);
    }

    /// The machine says again what it has: the third time something was lost (RFC 5681, section 3.2).
    fn duplicate(&mut self, cx: &Context<'_>) {
        self.dup_acks = self.dup_acks.saturating_add(1);
        if self.dup_acks == 3 && self.una.since(self.recover) >= 0 {
            self.resend(cx);
        }
    }

    /// Takes the data of a segment and its end.
    fn data(
        &mut self,
        cx: &mut Context<'_>,
        queues: &mut Queues,
        segment: &Segment,
        payload: Frame<'_, '_>,
        offset: i32,
    ) -> Result<(), End> {
        if offset > 0 {
            // Something before it is missing. Each of these is answered: three make the machine send again at once.
            self.ack_now(cx, queues);
            return Ok(());
        }
        self.ack_due = true;
        let old = usize::try_from(offset.unsigned_abs()).unwrap_or(usize::MAX);
        if self.guest_fin || old > payload.len() {
            return Ok(());
        }
        let payload = payload.after(old);
        let window = usize::try_from(self.rcv_edge.beyond(self.rcv_nxt)).unwrap_or(usize::MAX);
        let taken = self.accept(cx, queues, payload.truncate(window))?;
        self.rcv_nxt = self.rcv_nxt.plus(u32::try_from(taken).unwrap_or(u32::MAX));
        self.sent = self.sent.saturating_add(taken as u64);
        if segment.has(Flags::FIN) && taken == payload.len() {
            self.guest_fin = true;
            self.rcv_nxt = self.rcv_nxt.plus(1);
            if self.rcv_edge.since(self.rcv_nxt) < 0 {
                self.rcv_edge = self.rcv_nxt;
            }
            self.shut_if_drained();
        }
        Ok(())
    }

    /// Gives data to the host, and keeps what it does not take as far as there is room. Returns how much of it is taken.
    fn accept(
        &mut self,
        cx: &Context<'_>,
        queues: &mut Queues,
        payload: Frame<'_, '_>,
    ) -> Result<usize, End> {
        let mut taken = 0;
        if payload.is_empty() {
            return Ok(0);
        }
        if self.pending.is_empty() {
            taken = match self.socket.send_frame(payload) {
                Ok(n) => n.min(payload.len()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => return Err(End::ByHost),
            };
        }
        let room = self.room(&cx.config.limits, queues.buffered);
        let mut rest = payload.after(taken).truncate(room);
        let mut chunk = [0; 4096];
        while !rest.is_empty() {
            let n = rest.read_at(0, &mut chunk);
            let Some(bytes) = chunk.get(..n).filter(|bytes| !bytes.is_empty()) else { break };
            self.pending.extend(bytes);
            queues.buffered += n;
            taken += n;
            rest = rest.after(n);
        }
        Ok(taken)
    }

    /// Gives the host what was kept for it.
    pub(super) fn drain(&mut self, cx: &Context<'_>, queues: &mut Queues) -> Result<(), End> {
        if self.pending.is_empty() {
            return Ok(());
        }
        while !self.pending.is_empty() {
            match self.socket.send(self.pending.as_slices().0) {
                Ok(0) => break,
                Ok(n) => {
                    let n = n.min(self.pending.len());
                    // A slow reader is no dead one.
                    self.active = cx.now;
                    self.pending.drain(..n);
                    queues.buffered = queues.buffered.saturating_sub(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(End::ByHost),
            }
        }
        if self.pending.is_empty() {
            // Most flows never need it again.
            self.pending = std::collections::VecDeque::new();
        }
        if self.window_is_news(&cx.config.limits, queues.buffered) {
            self.ack_due = true;
        }
        self.shut_if_drained();
        Ok(())
    }

    fn shut_if_drained(&mut self) {
        if self.guest_fin && !self.shut && self.pending.is_empty() {
            self.socket.shut();
            self.shut = true;
        }
    }
}
