//! One connection: the protocol's state, credit and closing, with no I/O at all.
//!
//! Counters run modulo 2^32 (virtio 1.2, section 5.10.6.3). What the guest says of itself only ever limits what it is sent.

use std::time::Instant;

use super::host::StreamId;
use super::packet::{Header, op, shutdown};
use super::ring::{ByteRing, CAPACITY, CREDIT};
use crate::Result;
use crate::queue::ChainBuffers;

/// The guest is told of room in the buffer once this much was freed.
const UPDATE_AFTER: u32 = CREDIT / 4;

/// Where the bytes of a packet come from.
pub(super) trait Payload {
    /// Bytes there are.
    fn len(&self) -> u32;
    /// The next bytes.
    fn read(&mut self, to: &mut [u8]) -> Result<()>;
}

impl Payload for ChainBuffers<'_> {
    fn len(&self) -> u32 {
        self.readable_len()
    }

    fn read(&mut self, to: &mut [u8]) -> Result<()> {
        ChainBuffers::read(self, to)
    }
}

/// What a packet of the guest means for its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// The guest accepted what the host asked for.
    Accepted,
    /// The guest ended it.
    Ended,
    /// The guest broke the protocol.
    Violation,
}

/// Whether a connection has a future.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Live,
    /// All is said: confirm it with a RST.
    Finished,
    /// All is said, and the guest does not wait for an answer.
    Forgotten,
}

/// Packets that are due and carry no data; each at most once, so a guest cannot make them pile up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub stream: StreamId,
    /// The host asked and the guest did not answer yet.
    requested: bool,
    due: Due,

    /// On the way to the host.
    pub ring: ByteRing,
    /// Bytes the guest sent (`rx_cnt`).
    received: u32,
    /// What the guest last heard of [`forwarded`](Self::forwarded).
    told: u32,
    /// The host stream takes no more: what the guest sends is dropped.
    host_deaf: bool,
    /// [`shutdown`] bits that the guest sent, and which of them the host stream knows of.
    guest_shutdown: u32,
    passed_shutdown: u32,
    /// The guest forgot the connection after an orderly end; its last bytes are still on the way.
    guest_gone: bool,

    /// Bytes for the guest, sent or read ahead (`tx_cnt`).
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// The host stream came to its end.
    host_done: bool,
    /// [`shutdown`] bits that were sent to the guest.
    said_shutdown: u32,
    credit_asked: bool,

    /// The stream may be read or written without [`WouldBlock`](std::io::ErrorKind::WouldBlock).
    pub readable: bool,
    pub writable: bool,
    /// It waits for its turn to send to the guest.
    pub queued: bool,
    /// It has bytes to be flushed at the end of the batch.
    pub dirty: bool,
    pub deadline: Option<Instant>,
}

impl Connection {
    fn new(stream: StreamId) -> Self {
        Self {
            stream,
            requested: false,
            due: Due::default(),
            ring: ByteRing::default(),
            received: 0,
            told: 0,
            host_deaf: false,
            guest_shutdown: 0,
            passed_shutdown: 0,
            guest_gone: false,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            host_done: false,
            said_shutdown: 0,
            credit_asked: false,
            readable: false,
            writable: true,
            queued: false,
            dirty: false,
            deadline: None,
        }
    }

    /// The guest asked by `request`, and the host side accepted.
    pub fn from_guest(stream: StreamId, request: &Header) -> Self {
        let mut connection = Self::new(stream);
        connection.due.response = true;
        connection.take_credit(request);
        connection
    }

    /// The host asks.
    pub fn from_host(stream: StreamId) -> Self {
        let mut connection = Self::new(stream);
        connection.requested = true;
        connection.due.request = true;
        connection
    }

    /// Bytes that left the buffer (`fwd_cnt`).
    pub fn forwarded(&self) -> u32 {
        self.received.wrapping_sub(u32::try_from(self.ring.len()).unwrap_or(CREDIT))
    }

    /// Whether the host waits for the guest's answer.
    pub fn is_requested(&self) -> bool {
        self.requested
    }

    /// Whether the guest knows of the connection, so that it must hear of its end.
    pub fn is_known_to_guest(&self) -> bool {
        !self.due.request && !self.guest_gone
    }

    pub fn is_guest_gone(&self) -> bool {
        self.guest_gone
    }

    /// Whether the guest still wants data.
    pub fn guest_receives(&self) -> bool {
        self.guest_shutdown & shutdown::RECEIVE == 0
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
            self.due.credit_request = false;
        }
    }

    /// Bytes that the guest has room for. A guest whose `fwd_cnt` is ahead of what it was sent has room for nothing.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Takes a packet of the guest whose `len` was checked against `payload`.
    pub fn receive(&mut self, header: &Header, payload: &mut dyn Payload) -> Result<Verdict> {
        self.take_credit(header);
        if self.requested {
            return Ok(match header.op {
                // A guest cannot answer what it was not asked.
                op::RESPONSE if !self.due.request => {
                    self.requested = false;
                    Verdict::Accepted
                }
                op::RST => Verdict::Ended,
                _ => Verdict::Violation,
            });
        }
        Ok(match header.op {
            op::RW => return self.receive_data(header.len, payload),
            op::CREDIT_UPDATE => Verdict::Keep,
            op::CREDIT_REQUEST => {
                self.due.credit_update = true;
                Verdict::Keep
            }
            op::SHUTDOWN => {
                self.guest_shutdown |= header.flags & shutdown::BOTH;
                Verdict::Keep
            }
            op::RST if self.guest_shutdown & shutdown::SEND != 0 && !self.ring.is_empty() => {
                self.guest_gone = true;
                self.guest_shutdown = shutdown::BOTH;
                Verdict::Keep
            }
            op::RST => Verdict::Ended,
            _ => Verdict::Violation,
        })
    }

    fn receive_data(&mut self, len: u32, payload: &mut dyn Payload) -> Result<Verdict> {
        let n = usize::try_from(len).unwrap_or(usize::MAX);
        if self.guest_shutdown & shutdown::SEND != 0 || n > CAPACITY - self.ring.len() {
            return Ok(Verdict::Violation);
        }
        self.received = self.received.wrapping_add(len);
        if !self.host_deaf {
            self.ring.append(n, |to| payload.read(to))?;
        }
        self.consider_update();
        Ok(Verdict::Keep)
    }

    /// The host stream took the oldest `n` bytes.
    pub fn wrote(&mut self, n: usize) {
        self.ring.consume(n);
        self.consider_update();
    }

    fn consider_update(&mut self) {
        let untold = self.forwarded().wrapping_sub(self.told);
        self.due.credit_update |= untold >= UPDATE_AFTER;
    }

    /// The host stream takes no more.
    pub fn host_stopped_reading(&mut self) {
        self.host_deaf = true;
        self.ring.clear();
        self.consider_update();
    }

    /// The host stream came to its end.
    pub fn host_stopped_writing(&mut self) {
        self.host_done = true;
    }

    pub fn host_takes_data(&self) -> bool {
        !self.host_deaf
    }

    /// Bytes that may be read from the host stream now, for the guest. Asks the guest for credit if that is what is missing.
    pub fn may_read(&mut self) -> u32 {
        if !self.can_read() {
            return 0;
        }
        let credit = self.credit();
        if credit == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.due.credit_request = true;
        }
        credit
    }

    fn can_read(&self) -> bool {
        self.readable && !self.requested && !self.host_done && !self.guest_gone && self.guest_receives()
    }

    /// Bytes were read from the host stream.
    pub fn read(&mut self, n: u32) {
        self.sent = self.sent.wrapping_add(n);
    }

    /// [`shutdown`] bits that the guest has not heard.
    fn shutdown_due(&self) -> u32 {
        if self.requested {
            return 0;
        }
        let send = if self.host_done { shutdown::SEND } else { 0 };
        let receive = if self.host_deaf { shutdown::RECEIVE } else { 0 };
        let wanted = send | receive;
        if wanted & !self.said_shutdown == 0 { 0 } else { wanted }
    }

    /// Whether there is something for the guest, or may be.
    pub fn wants_turn(&mut self) -> bool {
        if self.guest_gone {
            return false;
        }
        // The order matters: this may make a credit request due.
        self.may_read() > 0 || self.due != Due::default() || self.shutdown_due() != 0
    }

    /// The next packet without data: its operation and flags.
    pub fn take_control(&mut self) -> Option<(u16, u32)> {
        if self.guest_gone {
            return None;
        }
        let due = &mut self.due;
        let op = if std::mem::take(&mut due.request) {
            op::REQUEST
        } else if std::mem::take(&mut due.response) {
            op::RESPONSE
        } else if std::mem::take(&mut due.credit_update) {
            op::CREDIT_UPDATE
        } else if std::mem::take(&mut due.credit_request) {
            op::CREDIT_REQUEST
        } else {
            let flags = self.shutdown_due();
            self.said_shutdown |= flags;
            return (flags != 0).then_some((op::SHUTDOWN, flags));
        };
        Some((op, 0))
    }

    /// Fills in the credit of a packet that is sent now.
    pub fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = CREDIT;
        header.fwd_cnt = self.forwarded();
        self.told = header.fwd_cnt;
        self.due.credit_update = false;
    }

    /// [`shutdown`] bits, seen from the guest, that the host stream must be told of now. Data goes before the end of file.
    pub fn pass_shutdown(&mut self) -> u32 {
        let mut pass = self.guest_shutdown;
        if !self.ring.is_empty() {
            pass &= !shutdown::SEND;
        }
        let new = pass & !self.passed_shutdown;
        self.passed_shutdown |= new;
        new
    }

    pub fn fate(&self) -> Fate {
        match (self.guest_shutdown == shutdown::BOTH && self.ring.is_empty(), self.guest_gone) {
            (false, _) => Fate::Live,
            (true, false) => Fate::Finished,
            (true, true) => Fate::Forgotten,
        }
    }

    /// Whether it must come to something in bounded time: an answer, or its end.
    pub fn is_timed(&self) -> bool {
        self.requested || self.guest_shutdown == shutdown::BOTH || self.said_shutdown == shutdown::BOTH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Payload for &[u8] {
        fn len(&self) -> u32 {
            u32::try_from(<[u8]>::len(self)).unwrap()
        }

        fn read(&mut self, to: &mut [u8]) -> Result<()> {
            let (now, later) = self.split_at(to.len());
            to.copy_from_slice(now);
            *self = later;
            Ok(())
        }
    }

    fn packet(op: u16) -> Header {
        Header { op, buf_alloc: 1000, ..Header::default() }
    }

    fn open() -> Connection {
        let mut connection = Connection::from_guest(StreamId(1), &packet(op::REQUEST));
        assert_eq!(connection.take_control(), Some((op::RESPONSE, 0)));
        connection
    }

    fn data(connection: &mut Connection, n: usize) -> Verdict {
        let header = Header { len: u32::try_from(n).unwrap(), ..packet(op::RW) };
        connection.receive(&header, &mut &*vec![7; n]).unwrap()
    }

    fn receive(connection: &mut Connection, header: Header) -> Verdict {
        connection.receive(&header, &mut &[][..]).unwrap()
    }

    #[test]
    fn the_guest_may_send_what_the_buffer_holds_and_not_a_byte_more() {
        let mut connection = open();
        assert_eq!(data(&mut connection, CAPACITY), Verdict::Keep);
        assert_eq!(data(&mut connection, 1), Verdict::Violation);
        connection.wrote(1);
        assert_eq!(data(&mut connection, 1), Verdict::Keep);
        assert_eq!(connection.forwarded(), 1);
    }

    #[test]
    fn the_guest_hears_of_credit_after_a_quarter_of_the_buffer() {
        let mut connection = open();
        data(&mut connection, CAPACITY);
        connection.wrote(CAPACITY / 4 - 1);
        assert_eq!(connection.take_control(), None);
        connection.wrote(1);
        assert_eq!(connection.take_control(), Some((op::CREDIT_UPDATE, 0)));
        let mut header = Header::default();
        connection.stamp(&mut header);
        assert_eq!((header.buf_alloc, header.fwd_cnt), (CREDIT, CREDIT / 4));
        assert_eq!(connection.take_control(), None);
    }

    #[test]
    fn any_packet_carries_the_credit_and_saves_an_update() {
        let mut connection = open();
        data(&mut connection, CAPACITY);
        connection.wrote(CAPACITY);
        connection.stamp(&mut Header::default());
        assert_eq!(connection.take_control(), None);
    }

    #[test]
    fn the_guest_is_asked_for_credit_once_when_it_has_none() {
        let mut connection = open();
        connection.readable = true;
        assert_eq!(connection.may_read(), 1000);
        connection.read(1000);
        assert_eq!(connection.may_read(), 0);
        assert_eq!(connection.take_control(), Some((op::CREDIT_REQUEST, 0)));
        assert_eq!(connection.may_read(), 0);
        assert_eq!(connection.take_control(), None);
        receive(&mut connection, Header { fwd_cnt: 10, ..packet(op::CREDIT_UPDATE) });
        assert_eq!(connection.may_read(), 10);
    }

    #[test]
    fn counters_wrap() {
        let mut connection = open();
        connection.readable = true;
        connection.sent = u32::MAX - 5;
        connection.received = u32::MAX - 5;
        connection.told = connection.received;
        receive(&mut connection, Header { fwd_cnt: u32::MAX - 5, ..packet(op::CREDIT_UPDATE) });
        assert_eq!(connection.may_read(), 1000);
        connection.read(10);
        assert_eq!(connection.sent, 4);
        assert_eq!(connection.may_read(), 990);
        data(&mut connection, 10);
        connection.wrote(10);
        assert_eq!(connection.forwarded(), 4);
    }

    #[test]
    fn a_guest_that_freed_more_than_it_was_sent_gets_nothing() {
        let mut connection = open();
        connection.readable = true;
        receive(&mut connection, Header { fwd_cnt: 1, ..packet(op::CREDIT_UPDATE) });
        assert_eq!(connection.may_read(), 0);
    }

    #[test]
    fn data_after_the_end_of_data_is_a_violation() {
        let mut connection = open();
        receive(&mut connection, Header { flags: shutdown::SEND, ..packet(op::SHUTDOWN) });
        assert_eq!(data(&mut connection, 1), Verdict::Violation);
    }

    #[test]
    fn the_host_reads_the_end_of_file_after_the_last_byte() {
        let mut connection = open();
        data(&mut connection, 5);
        receive(&mut connection, Header { flags: shutdown::SEND, ..packet(op::SHUTDOWN) });
        assert_eq!(connection.pass_shutdown(), 0);
        connection.wrote(5);
        assert_eq!(connection.pass_shutdown(), shutdown::SEND);
        assert_eq!(connection.pass_shutdown(), 0, "once");
        assert_eq!(connection.fate(), Fate::Live);
        receive(&mut connection, Header { flags: shutdown::RECEIVE, ..packet(op::SHUTDOWN) });
        assert_eq!(connection.fate(), Fate::Finished);
    }

    #[test]
    fn the_last_bytes_outlive_a_reset_after_an_orderly_end_only() {
        let mut connection = open();
        data(&mut connection, 5);
        assert_eq!(receive(&mut connection, packet(op::RST)), Verdict::Ended);

        let mut connection = open();
        data(&mut connection, 5);
        receive(&mut connection, Header { flags: shutdown::BOTH, ..packet(op::SHUTDOWN) });
        assert_eq!(receive(&mut connection, packet(op::RST)), Verdict::Keep);
        assert_eq!(connection.fate(), Fate::Live);
        connection.wrote(5);
        assert_eq!(connection.fate(), Fate::Forgotten);
    }

    #[test]
    fn a_guest_cannot_answer_before_it_was_asked() {
        let mut connection = Connection::from_host(StreamId(1));
        assert_eq!(receive(&mut connection, packet(op::RESPONSE)), Verdict::Violation);
        let mut connection = Connection::from_host(StreamId(1));
        assert_eq!(connection.take_control(), Some((op::REQUEST, 0)));
        assert_eq!(receive(&mut connection, packet(op::RESPONSE)), Verdict::Accepted);
        assert_eq!(receive(&mut connection, packet(op::RESPONSE)), Verdict::Violation);
    }

    #[test]
    fn what_a_deaf_host_does_not_take_is_dropped_and_credited() {
        let mut connection = open();
        data(&mut connection, CAPACITY);
        connection.host_stopped_reading();
        assert_eq!(data(&mut connection, CAPACITY), Verdict::Keep);
        assert_eq!(connection.forwarded(), 2 * CREDIT);
        assert_eq!(connection.take_control(), Some((op::CREDIT_UPDATE, 0)));
        assert_eq!(connection.take_control(), Some((op::SHUTDOWN, shutdown::RECEIVE)));
        connection.host_stopped_writing();
        assert_eq!(connection.take_control(), Some((op::SHUTDOWN, shutdown::BOTH)));
        assert_eq!(connection.take_control(), None);
        assert!(connection.is_timed());
    }
}
