//! A TCP connection (RFC 9293) that carries the program's pattern in both directions.
//!
//! Nothing that was sent has to be kept: it can be made again. What is lost is sent again after a while, from there on. There is no
//! congestion control: this is for networks of machines, not for the world.

use freestone_guest_program::cpu;

use crate::card::{Card, Undone};
use crate::memory::Pattern;
use crate::stack::{AGAIN, Mac};
use crate::wire::{self, ETHERNET, IP_HEADER, IPV4, Ip, TCP, Writer, flag, long, short};

/// Bytes of the header without options.
const HEADER: usize = 20;
/// The window that is always open: 4 MiB.
const WINDOW: u16 = 0x8000;
const WINDOW_SHIFT: u8 = 7;
/// What a segment has on an Ethernet, and what is assumed where the other side does not say it (RFC 9293, 3.7.1).
const MSS: u16 = 1460;
const DEFAULT_MSS: u16 = 536;
/// Most bytes of a packet's data.
const LARGEST: usize = 65535 - IP_HEADER - HEADER;

/// A segment that came.
pub struct Segment<'a> {
    pub from: u16,
    pub to: u16,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
    options: &'a [u8],
    data: &'a [u8],
}

impl<'a> Segment<'a> {
    /// From what follows the IP header.
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        let header = usize::from(body.get(12)? >> 4) * 4;
        Some(Self {
            from: short(body, 0),
            to: short(body, 2),
            sequence: long(body, 4),
            acknowledged: long(body, 8),
            flags: *body.get(13)?,
            window: short(body, 14),
            options: body.get(HEADER..header)?,
            data: body.get(header..)?,
        })
    }

    /// Whether it begins a connection.
    pub fn is_first(&self) -> bool {
        self.flags & (flag::SYN | flag::ACK | flag::RST) == flag::SYN
    }

    /// What is answered where there is no such connection (3.10.7.1).
    pub fn refusal(&self, own: (Ip, Mac), other: (Ip, Mac)) -> Option<Writer> {
        if self.flags & flag::RST != 0 {
            return None;
        }
        let took = self.data.len() as u32
            + u32::from(self.flags & flag::SYN != 0)
            + u32::from(self.flags & flag::FIN);
        let (sequence, ack, flags) = match self.flags & flag::ACK {
            0 => (0, self.sequence.wrapping_add(took), flag::RST | flag::ACK),
            _ => (self.acknowledged, 0, flag::RST),
        };
        let mut frame = Writer::new(other.1, own.1, IPV4);
        frame.ip(TCP, own.0, other.0, HEADER);
        frame.put(&self.to.to_be_bytes()).put(&self.from.to_be_bytes());
        frame.put(&sequence.to_be_bytes()).put(&ack.to_be_bytes()).put(&[0x50, flags, 0, 0, 0, 0, 0, 0]);
        let tcp = frame.bytes().get(ETHERNET + IP_HEADER..).unwrap_or_default();
        let check = !wire::fold(wire::sum(tcp, wire::pseudo(own.0, other.0, TCP, HEADER)));
        frame.set(ETHERNET + IP_HEADER + 16, check);
        Some(frame)
    }

    /// The values of the options for segment size and window scale.
    fn options(&self) -> (u16, u8) {
        let (mut mss, mut shift, mut rest) = (DEFAULT_MSS, 0, self.options);
        loop {
            match *rest {
                [1, ref next @ ..] => rest = next,
                [2, 4, high, low, ref next @ ..] => {
                    (mss, rest) = (u16::from_be_bytes([high, low]), next);
                }
                [3, 3, value, ref next @ ..] => (shift, rest) = (value.min(14), next),
                [kind, len, ..] if kind >= 2 && len >= 2 => {
                    rest = rest.get(usize::from(len)..).unwrap_or_default()
                }
                _ => return (mss.clamp(64, MSS), shift),
            }
        }
    }
}

/// A connection. Positions count the bytes of its data, from 0.
pub struct Connection {
    own: (Ip, Mac),
    other: (Ip, Mac),
    ports: [u16; 2],
    /// The sequence number before the first byte: that of our SYN, and of the other side's.
    start: [u32; 2],
    /// The other side's SYN came, and ours was acknowledged.
    pub established: bool,
    passive: bool,
    mss: u16,
    shift: u8,
    /// How much there is to be sent, and whether it ends there.
    pub to_send: u64,
    pub close: bool,
    /// The next byte that is sent; the end counts as one.
    next: u64,
    /// What the other side has; the end counts as one.
    acknowledged: u64,
    /// Up to where the other side lets us send, and the widest window seen.
    limit: u64,
    widest: u64,
    /// What came.
    pub received: u64,
    /// The other side has ended.
    pub ended: bool,
    pub reset: bool,
    pub wrong: bool,
    /// An acknowledgement is owed.
    owed: bool,
    /// When there was progress.
    since: u64,
    said: bool,
    pub repeated: u64,
}

impl Connection {
    fn new(own: (Ip, Mac), other: (Ip, Mac), ports: [u16; 2]) -> Self {
        Self {
            own,
            other,
            ports,
            start: [cpu::tsc() as u32, 0],
            established: false,
            passive: false,
            mss: DEFAULT_MSS,
            shift: 0,
            to_send: 0,
            close: false,
            next: 0,
            acknowledged: 0,
            limit: 0,
            widest: 0,
            received: 0,
            ended: false,
            reset: false,
            wrong: false,
            owed: false,
            since: cpu::tsc(),
            said: false,
            repeated: 0,
        }
    }

    /// One that we begin.
    pub fn connect(own: (Ip, Mac), other: (Ip, Mac), ports: [u16; 2]) -> Self {
        Self::new(own, other, ports)
    }

    /// One that the other side begins.
    pub fn accept(own: (Ip, Mac), other: (Ip, Mac), first: &Segment<'_>) -> Self {
        let mut this = Self::new(own, other, [first.to, first.from]);
        this.start[1] = first.sequence;
        this.passive = true;
        (this.mss, this.shift) = first.options();
        this
    }

    /// Whether the segment is of this connection.
    pub fn is(&self, from: Ip, segment: &Segment<'_>) -> bool {
        self.other.0 == from && self.ports == [segment.to, segment.from]
    }

    /// Everything that was to be sent is acknowledged; the end too, if it is to be sent.
    fn is_sent(&self) -> bool {
        self.established && self.acknowledged == self.to_send + u64::from(self.close)
    }

    /// Both sides have ended, and both know it.
    pub fn is_over(&self) -> bool {
        self.close && self.ended && self.is_sent() && !self.owed
    }

    /// A segment came.
    pub fn input(&mut self, segment: &Segment<'_>, pattern: Pattern) {
        if segment.flags & flag::RST != 0 {
            self.reset = true;
            return;
        }
        if segment.flags & flag::SYN != 0 {
            // Ours was heard; or this one came again, because our answer was lost.
            if !self.passive && !self.established && segment.acknowledged == self.start[0].wrapping_add(1) {
                self.start[1] = segment.sequence;
                (self.mss, self.shift) = segment.options();
                self.limit = u64::from(segment.window);
                self.widest = self.limit;
                (self.established, self.since) = (true, cpu::tsc());
            }
            self.owed = self.established;
            self.said &= self.established;
            return;
        }
        if segment.flags & flag::ACK == 0 {
            return;
        }
        if !self.take_acknowledgement(segment) || !self.established {
            return;
        }
        self.take_data(segment, pattern);
    }

    /// Whether it makes sense.
    fn take_acknowledgement(&mut self, segment: &Segment<'_>) -> bool {
        if self.passive && !self.established && segment.acknowledged == self.start[0].wrapping_add(1) {
            (self.established, self.since) = (true, cpu::tsc());
        }
        let have = self.start[0].wrapping_add(1).wrapping_add(self.acknowledged as u32);
        let new = u64::from(segment.acknowledged.wrapping_sub(have));
        if new > u64::from(u32::MAX / 2) {
            return true; // an old one
        }
        if self.acknowledged + new > self.to_send + u64::from(self.close) {
            return false; // of what was never sent
        }
        if new > 0 {
            self.acknowledged += new;
            self.next = self.next.max(self.acknowledged);
            self.since = cpu::tsc();
        }
        let window = u64::from(segment.window) << self.shift;
        self.widest = self.widest.max(window);
        self.limit = self.acknowledged + window;
        true
    }

    fn take_data(&mut self, segment: &Segment<'_>, pattern: Pattern) {
        let fin = segment.flags & flag::FIN != 0;
        if segment.data.is_empty() && !fin {
            return;
        }
        self.owed = true;
        let expected =
            self.start[1].wrapping_add(1).wrapping_add((self.received + u64::from(self.ended)) as u32);
        let known = expected.wrapping_sub(segment.sequence) as usize;
        // Something before it was lost, or all of it is known.
        let Some(new) = segment.data.get(known..).filter(|_| !self.ended) else { return };
        self.wrong |= !pattern.is_at(self.received, new);
        self.received += new.len() as u64;
        self.ended = fin;
    }

    /// Sends what there is to say.
    pub fn output(&mut self, card: &mut Card, pattern: Pattern) {
        if self.reset {
            return;
        }
        let end = self.to_send + u64::from(self.close);
        let late = || cpu::tsc().wrapping_sub(self.since) > AGAIN;
        if !self.established {
            if !self.said || late() {
                self.repeated += u64::from(self.said);
                self.since = cpu::tsc();
                let ack = if self.passive { flag::ACK } else { 0 };
                self.said = self.segment(card, flag::SYN | ack, &[], false);
            }
            return;
        }
        let mut probe = false;
        if self.acknowledged < end && late() {
            self.since = cpu::tsc();
            self.repeated += u64::from(self.next > self.acknowledged);
            self.next = self.acknowledged;
            probe = true;
        }
        let largest = match card.has_segments() {
            true => LARGEST / usize::from(self.mss) * usize::from(self.mss),
            false => usize::from(self.mss),
        };
        while self.next < self.to_send {
            let (left, mut room) = (self.to_send - self.next, self.limit.saturating_sub(self.next));
            if probe {
                (room, probe) = (room.max(1), false);
            }
            let len = left.min(room).min(largest as u64);
            // Not in little pieces while larger ones will be possible (3.8.6.2.1).
            let idle = self.next == self.acknowledged;
            let worth = len == left || len >= (largest as u64).min(self.widest / 2) || idle;
            if len == 0 || !worth || !card.can_send() {
                break;
            }
            let last = if len == left && self.close { flag::FIN } else { 0 };
            let data = pattern.at(self.next, len as usize);
            if !self.segment(card, flag::ACK | flag::PSH | last, data, largest > usize::from(self.mss)) {
                break;
            }
            self.next += len + u64::from(last);
        }
        if self.close && self.next == self.to_send && self.segment(card, flag::ACK | flag::FIN, &[], false) {
            self.next += 1;
        }
        if self.owed {
            self.segment(card, flag::ACK, &[], false);
        }
    }

    /// Gives the connection up, and says so to the other side.
    pub fn abort(&mut self, card: &mut Card) {
        if !self.reset {
            self.segment(card, flag::RST | flag::ACK, &[], false);
        }
    }

    fn segment(&mut self, card: &mut Card, flags: u8, data: &'static [u8], large: bool) -> bool {
        let syn = flags & flag::SYN != 0;
        // Of the scale only the first segments speak, and their own windows have none (RFC 7323, 2.2).
        let options: &[u8] = if syn { &[2, 4, 0x05, 0xB4, 3, 3, WINDOW_SHIFT, 1] } else { &[] };
        let sequence = match syn {
            true => self.start[0],
            false => self.start[0].wrapping_add(1).wrapping_add(self.next as u32),
        };
        let ack = match flags & flag::ACK {
            0 => 0,
            _ => self.start[1].wrapping_add(1).wrapping_add((self.received + u64::from(self.ended)) as u32),
        };
        let header = HEADER + options.len();
        let ((own, own_mac), (other, other_mac)) = (self.own, self.other);
        let mut frame = Writer::new(other_mac, own_mac, IPV4);
        frame.ip(TCP, own, other, header + data.len());
        let [from, to] = self.ports;
        frame.put(&from.to_be_bytes()).put(&to.to_be_bytes());
        frame.put(&sequence.to_be_bytes()).put(&ack.to_be_bytes());
        frame.put(&[(header as u8 / 4) << 4, flags]).put(&WINDOW.to_be_bytes()).put(&[0; 4]).put(options);
        let at = ETHERNET + IP_HEADER;
        let start = wire::pseudo(own, other, TCP, header + data.len());
        let mut undone = Undone::default();
        let check = if card.has_checksums() {
            undone.checksum = Some((at as u16, 16));
            wire::fold(start)
        } else {
            // The header's length is a multiple of four, so the sums may be added.
            let tcp = frame.bytes().get(at..).unwrap_or_default();
            !wire::fold(wire::sum(data, wire::sum(tcp, start)))
        };
        frame.set(at + 16, check);
        if large && data.len() > usize::from(self.mss) {
            undone.segments = Some((self.mss, (at + header) as u16));
        }
        let sent = card.send(undone, frame.bytes(), data);
        if sent && flags & flag::ACK != 0 {
            self.owed = false;
        }
        sent
    }
}
