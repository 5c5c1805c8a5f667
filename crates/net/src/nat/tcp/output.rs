//! Frames for the machine: straight from the host's socket into its memory.

use std::io;
use std::net::IpAddr;

use super::Queues;
use super::flow::{End, Flow};
use super::wire::{Flags, Header, add_frame, checksum_place, complete};
use crate::nat::context::Context;
use crate::{Frame, Gso, Offloads, Received, VnetHeader};

impl Flow {
    /// Whether the machine takes large segments of this flow.
    fn large(&self, receive: Offloads) -> bool {
        let gso = if self.key.guest.is_ipv4() { Offloads::TSO4 } else { Offloads::TSO6 };
        receive.contains(gso | Offloads::CSUM)
    }

    /// Data in the next frame, at most.
    fn most(&self, receive: Offloads) -> usize {
        if !self.large(receive) {
            return self.mss.into();
        }
        // The length of an IPv4 packet counts its header.
        let headers = if self.key.guest.is_ipv4() { 40 } else { 20 };
        usize::from(u16::MAX) - headers
    }

    /// Length of the next frame, at most.
    pub(super) fn next_len(&self, receive: Offloads) -> usize {
        let usable = usize::try_from(self.usable()).unwrap_or(usize::MAX);
        Header::len(self.key.guest.ip()) + usable.min(self.most(receive))
    }

    /// Makes the next frame in `room`.
    pub(super) fn frame(
        &mut self,
        cx: &mut Context<'_>,
        queues: &mut Queues,
        room: Frame<'_, '_>,
        receive: Offloads,
    ) -> Result<Received, End> {
        let headers = Header::len(self.key.guest.ip());
        if room.len() <= headers {
            return Ok(Received::NeedsRoom(self.next_len(receive)));
        }
        if self.only_fin() {
            return Ok(self.finish(cx, queues, room));
        }
        let usable = usize::try_from(self.usable()).unwrap_or(usize::MAX);
        let data = room.after(headers).truncate(usable.min(self.most(receive)));
        let offset = self.undiscarded.saturating_add(self.nxt.beyond(self.una));
        let n = match self.socket.peek(offset, data, self.hangup, &mut queues.scratch) {
            Ok(0) => return Ok(self.finish(cx, queues, room)),
            Ok(n) => n.min(data.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                self.nxt = self.max;
                return Ok(Received::Nothing);
            }
            Err(_) => return Err(End::ByHost),
        };
        let len = u32::try_from(n).unwrap_or(u32::MAX);
        let header = self.write(cx, queues, room, n, Flags::ACK | Flags::PSH, receive);
        self.nxt = self.nxt.plus(len);
        self.sent_up_to(cx);
        self.active = cx.now;
        if n < data.len() && !self.hangup {
            // That was all: more makes the socket ready again.
            self.readable = false;
        }
        Ok(Received::Frame(headers + n, header))
    }

    /// Tells the machine that the host is done.
    fn finish(&mut self, cx: &mut Context<'_>, queues: &mut Queues, room: Frame<'_, '_>) -> Received {
        if !self.fin_sent {
            // It comes after everything, even if the host is said to be done before what it said earlier.
            self.nxt = self.max;
        }
        let header = self.write(cx, queues, room, 0, Flags::FIN | Flags::ACK, Offloads::empty());
        self.fin_sent = true;
        self.nxt = self.nxt.plus(1);
        self.sent_up_to(cx);
        Received::Frame(Header::len(self.key.guest.ip()), header)
    }

    fn sent_up_to(&mut self, cx: &Context<'_>) {
        if self.nxt.since(self.max) > 0 {
            self.max = self.nxt;
            self.timed.get_or_insert((self.max, cx.now));
        }
        self.resend_at.get_or_insert(cx.now + self.resend_after);
    }

    /// Writes the headers before `payload` bytes of data that are in the room.
    fn write(
        &mut self,
        cx: &mut Context<'_>,
        queues: &mut Queues,
        room: Frame<'_, '_>,
        payload: usize,
        flags: Flags,
        receive: Offloads,
    ) -> VnetHeader {
        let window = self.advertise(&cx.config.limits, queues.buffered);
        self.ack_due = false;
        let (from, to) = (self.key.server, self.key.guest);
        let header =
            Header { from, to, seq: self.nxt, ack: self.rcv_nxt, flags, window, options: None };
        queues.header.clear();
        let start = header.write(cx.link, payload, &mut queues.header);
        let headers = queues.header.len();
        let mut todo = VnetHeader::default();
        if receive.contains(Offloads::CSUM) {
            todo.checksum = checksum_place(start);
        } else {
            let data = add_frame(0, room.after(headers).truncate(payload));
            complete(&mut queues.header, start, data);
        }
        if payload > usize::from(self.mss) {
            todo.gso = Some(match to.ip() {
                IpAddr::V4(_) => Gso::Tcp4,
                IpAddr::V6(_) => Gso::Tcp6,
            });
            todo.gso_size = self.mss;
            todo.hdr_len = u16::try_from(headers).unwrap_or(0);
        }
        room.write_at(0, &queues.header);
        todo
    }
}
