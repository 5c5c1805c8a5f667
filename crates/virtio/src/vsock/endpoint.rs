//! [`Endpoint`]: all connections of a device, between packets on one side and a [`HostSide`] on the other. It knows no queues.
//!
//! Whatever either side does, it holds at most [`CREDIT`](super::ring::CREDIT) bytes for each connection, one read-ahead for
//! the whole device, and a bounded number of replies.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::connection::{Connection, Fate, Payload, Verdict};
use super::host::{HostEvent, HostSide, StreamId};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op, shutdown};
use super::stats::{VsockStats, count};
use crate::Result;

/// Largest payload of a packet of the guest.
const MAX_PAYLOAD: u32 = 64 << 10;
/// Most bytes that are read from a host stream at once. They are spread over as many packets as the guest's buffers need.
const READ_AHEAD: usize = 64 << 10;
/// With so many resets waiting for the guest's buffers, no more packets are taken from it.
const MAX_REPLIES: usize = 256;
/// Ports of connections that the host opens begin here, as in Firecracker.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The ports of a connection. The guest has one address and the host another, so ports are enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    host_port: u32,
    guest_port: u32,
}

/// A RST that belongs to no connection, or no more.
#[derive(Debug, Clone, Copy)]
struct Reset {
    from_cid: u64,
    key: Key,
    kind: u16,
}

/// The packet that goes next.
#[derive(Debug, Clone, Copy)]
enum Ready {
    Reset(Reset),
    Control(Key, u16, u32),
    Data,
}

/// Bytes read from one host stream that wait for the guest's buffers. Credit was taken for them.
#[derive(Debug)]
struct ReadAhead {
    data: Box<[u8]>,
    key: Key,
    start: usize,
    end: usize,
}

impl ReadAhead {
    fn drop_of(&mut self, key: Key) {
        if self.key == key {
            self.start = self.end;
        }
    }
}

/// What an endpoint is made with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub cid: u64,
    pub max_connections: usize,
    pub timeout: Duration,
}

#[derive(Debug)]
pub(super) struct Endpoint {
    limits: Limits,
    host: Box<dyn HostSide>,
    stats: Arc<VsockStats>,
    connections: HashMap<Key, Connection>,
    streams: HashMap<StreamId, Key>,
    /// Connections that have something for the guest, in the order of their turns.
    turns: VecDeque<Key>,
    /// Connections with new bytes for the host.
    dirty: Vec<Key>,
    resets: VecDeque<Reset>,
    deadlines: BTreeSet<(Instant, Key)>,
    ahead: ReadAhead,
    ready: Option<Ready>,
    events: Vec<HostEvent>,
    next_port: u32,
    now: Instant,
    transport_reset: bool,
}

impl Endpoint {
    pub fn new(host: Box<dyn HostSide>, limits: Limits, stats: Arc<VsockStats>) -> Self {
        let nobody = Key { host_port: 0, guest_port: 0 };
        Self {
            limits,
            host,
            stats,
            connections: HashMap::new(),
            streams: HashMap::new(),
            turns: VecDeque::new(),
            dirty: Vec::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            ahead: ReadAhead { data: vec![0; READ_AHEAD].into(), key: nobody, start: 0, end: 0 },
            ready: None,
            events: Vec::new(),
            next_port: FIRST_HOST_PORT,
            now: Instant::now(),
            transport_reset: false,
        }
    }

    pub fn host(&self) -> &dyn HostSide {
        &*self.host
    }

    /// Drops all connections, and tells nobody in the guest.
    pub fn reset(&mut self) {
        for stream in self.streams.drain().map(|(stream, _)| stream) {
            self.host.close(stream);
        }
        self.connections.clear();
        self.turns.clear();
        self.dirty.clear();
        self.resets.clear();
        self.deadlines.clear();
        self.ahead.start = self.ahead.end;
        self.ready = None;
        self.transport_reset = false;
        self.stats.connections.store(0, Ordering::Relaxed);
    }

    /// Drops all connections, and lets the guest know by an event (5.10.6.7).
    pub fn reset_transport(&mut self) {
        self.reset();
        self.transport_reset = true;
    }

    pub fn transport_reset_is_due(&self) -> bool {
        self.transport_reset
    }

    pub fn transport_reset_was_told(&mut self) {
        self.transport_reset = false;
    }

    /// Begins a step at time `now`: ends what was not opened or closed in time.
    pub fn begin(&mut self, now: Instant) {
        self.now = now;
        while let Some(&(deadline, key)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now) {
            self.deadlines.remove(&(deadline, key));
            count(&self.stats.timeouts, 1);
            self.abort(key);
        }
    }

    /// When [`begin`](Self::begin) must be called next, if nothing else happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Takes up what happened on the host side. Returns whether there may be more.
    pub fn poll_host(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        let more = self.host.poll(&mut events);
        for event in events.drain(..) {
            self.host_event(event);
        }
        self.events = events;
        more
    }

    fn host_event(&mut self, event: HostEvent) {
        let (stream, readable, writable) = match event {
            HostEvent::Connect { stream, port } => return self.host_connects(stream, port),
            HostEvent::Ready { stream, readable, writable } => (stream, readable, writable),
            HostEvent::HungUp(stream) => (stream, true, false),
        };
        // An event of a stream that was closed since.
        let Some(&key) = self.streams.get(&stream) else { return };
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.readable |= readable;
        connection.writable |= writable;
        if matches!(event, HostEvent::HungUp(_)) {
            if connection.is_requested() {
                return self.abort(key);
            }
            connection.host_stopped_reading();
        }
        if writable { self.flush_one(key) } else { self.settle(key) }
    }

    fn host_connects(&mut self, stream: StreamId, guest_port: u32) {
        let key = self.free_key(guest_port).filter(|_| self.has_room());
        let Some(key) = key else {
            count(&self.stats.refused, 1);
            self.host.close(stream);
            return;
        };
        self.insert(key, Connection::from_host(stream));
    }

    /// A port of the host with which `guest_port` has no connection. Fewer tries than there are connections find one.
    fn free_key(&mut self, guest_port: u32) -> Option<Key> {
        for _ in 0..=self.connections.len() {
            let host_port = self.next_port;
            self.next_port = host_port.checked_add(1).filter(|p| *p != u32::MAX).unwrap_or(FIRST_HOST_PORT);
            let key = Key { host_port, guest_port };
            if !self.connections.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }

    fn has_room(&self) -> bool {
        self.connections.len() < self.limits.max_connections
    }

    fn insert(&mut self, key: Key, connection: Connection) {
        self.streams.insert(connection.stream, key);
        self.connections.insert(key, connection);
        self.stats.connections.store(self.connections.len() as u64, Ordering::Relaxed);
        self.settle(key);
    }

    /// Whether packets of the guest are taken. If not, the guest must supply buffers first.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_REPLIES
    }

    /// Takes a packet of the guest. Its data reaches the host with [`flush`](Self::flush).
    pub fn receive(&mut self, header: &Header, payload: &mut dyn Payload) -> Result<()> {
        count(&self.stats.packets_from_guest, 1);
        if header.src_cid != self.limits.cid {
            // There is nobody to answer.
            count(&self.stats.violations, 1);
            return Ok(());
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            count(&self.stats.violations, 1);
            self.refuse(header);
            return Ok(());
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let known = self.connections.get_mut(&key).filter(|connection| !connection.is_guest_gone());
        let Some(connection) = known else {
            if header.op == op::REQUEST && !self.connections.contains_key(&key) {
                self.guest_connects(key, header);
            } else {
                self.refuse(header);
            }
            return Ok(());
        };
        let fits = header.op != op::RW || header.len <= payload.len().min(MAX_PAYLOAD);
        let verdict = if fits { connection.receive(header, payload)? } else { Verdict::Violation };
        self.carry_out(key, verdict);
        Ok(())
    }

    fn carry_out(&mut self, key: Key, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match verdict {
            Verdict::Violation => {
                count(&self.stats.violations, 1);
                return self.abort(key);
            }
            Verdict::Ended => {
                if connection.is_requested() {
                    count(&self.stats.refused, 1);
                }
                drop(self.remove(key));
                return;
            }
            Verdict::Accepted => {
                if self.host.accepted(connection.stream, key.host_port).is_err() {
                    return self.abort(key);
                }
                count(&self.stats.opened_by_host, 1);
                // What the program sent after its request was not looked at yet.
                connection.readable = true;
            }
            Verdict::Keep => {}
        }
        if !connection.guest_receives() {
            self.ahead.drop_of(key);
        }
        if !connection.ring.is_empty() && !connection.dirty {
            connection.dirty = true;
            self.dirty.push(key);
        }
        self.settle(key);
    }

    fn guest_connects(&mut self, key: Key, request: &Header) {
        let stream = if self.has_room() {
            self.host.connect(key.host_port)
        } else {
            Err(io::Error::from(io::ErrorKind::QuotaExceeded))
        };
        match stream {
            Ok(stream) => {
                count(&self.stats.opened_by_guest, 1);
                self.insert(key, Connection::from_guest(stream, request));
            }
            Err(error) => {
                tracing::debug!(port = key.host_port, %error, "the guest's connection is refused");
                count(&self.stats.refused, 1);
                self.refuse(request);
            }
        }
    }

    /// Answers a packet with a RST. A RST is not answered, or two sides could do so for ever.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            let key = Key { host_port: header.dst_port, guest_port: header.src_port };
            self.resets.push_back(Reset { from_cid: header.dst_cid, key, kind: header.kind });
        }
    }

    /// Gives the host what packets brought since the last call.
    pub fn flush(&mut self) {
        while let Some(key) = self.dirty.pop() {
            self.flush_one(key);
        }
    }

    fn flush_one(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.dirty = false;
        while connection.writable && !connection.ring.is_empty() {
            match self.host.write(connection.stream, connection.ring.front()) {
                Ok(n) if n > 0 => {
                    count(&self.stats.bytes_to_host, n);
                    connection.wrote(n);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => connection.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    connection.host_stopped_reading();
                    // If the peer is gone, its end of file tells.
                    connection.readable = true;
                }
            }
        }
        self.settle(key);
    }

    /// Draws the consequences of a change: tells the host stream, ends the connection, sets its deadline, gives it a turn.
    fn settle(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let pass = connection.pass_shutdown();
        if pass & shutdown::SEND != 0 && connection.host_takes_data() {
            self.host.shutdown(connection.stream, Shutdown::Write);
        }
        if pass & shutdown::RECEIVE != 0 {
            self.host.shutdown(connection.stream, Shutdown::Read);
        }
        match connection.fate() {
            Fate::Live => {}
            Fate::Finished | Fate::Forgotten => return self.abort(key),
        }
        match (connection.is_timed(), connection.deadline) {
            (true, None) => {
                let deadline = self.now + self.limits.timeout;
                connection.deadline = Some(deadline);
                self.deadlines.insert((deadline, key));
            }
            (false, Some(deadline)) => {
                connection.deadline = None;
                self.deadlines.remove(&(deadline, key));
            }
            _ => {}
        }
        if !connection.queued && connection.wants_turn() {
            connection.queued = true;
            self.turns.push_back(key);
        }
    }

    /// Ends a connection; the guest hears of it if it knows the connection.
    fn abort(&mut self, key: Key) {
        if self.remove(key).is_some_and(|connection| connection.is_known_to_guest()) {
            self.resets.push_back(Reset { from_cid: HOST_CID, key, kind: TYPE_STREAM });
        }
    }

    fn remove(&mut self, key: Key) -> Option<Connection> {
        let connection = self.connections.remove(&key)?;
        self.streams.remove(&connection.stream);
        self.host.close(connection.stream);
        if let Some(deadline) = connection.deadline {
            self.deadlines.remove(&(deadline, key));
        }
        if connection.queued {
            self.turns.retain(|other| *other != key);
        }
        self.ahead.drop_of(key);
        self.stats.connections.store(self.connections.len() as u64, Ordering::Relaxed);
        Some(connection)
    }

    /// Whether there is, or may be, something for the guest.
    pub fn wants_buffers(&self) -> bool {
        self.ready.is_some()
            || !self.resets.is_empty()
            || self.ahead.start < self.ahead.end
            || !self.turns.is_empty()
    }

    /// Makes the next packet for the guest ready, reading from host streams by turns. To be called only when the guest has a
    /// buffer; [`take`](Self::take) then fills it.
    pub fn prepare(&mut self) -> bool {
        if self.ready.is_none() {
            self.ready = if let Some(reset) = self.resets.pop_front() {
                Some(Ready::Reset(reset))
            } else if self.ahead.start < self.ahead.end {
                Some(Ready::Data)
            } else {
                self.next_turn()
            };
        }
        self.ready.is_some()
    }

    fn next_turn(&mut self) -> Option<Ready> {
        for _ in 0..self.turns.len() {
            let key = self.turns.pop_front()?;
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            let ready = match connection.take_control() {
                Some((op, flags)) => Some(Ready::Control(key, op, flags)),
                None => self.read_ahead(key),
            };
            self.settle(key);
            if ready.is_some() {
                return ready;
            }
        }
        None
    }

    fn read_ahead(&mut self, key: Key) -> Option<Ready> {
        let connection = self.connections.get_mut(&key)?;
        let credit = usize::try_from(connection.may_read()).unwrap_or(usize::MAX);
        let to = self.ahead.data.get_mut(..credit.min(READ_AHEAD)).filter(|to| !to.is_empty())?;
        let room = to.len();
        match self.host.read(connection.stream, to) {
            Ok(0) => connection.host_stopped_writing(),
            Ok(n) => {
                let n = n.min(room);
                connection.read(u32::try_from(n).unwrap_or(0));
                (self.ahead.key, self.ahead.start, self.ahead.end) = (key, 0, n);
                return Some(Ready::Data);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => connection.readable = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::debug!(%error, "a host stream broke");
                connection.host_stopped_writing();
                connection.host_stopped_reading();
            }
        }
        None
    }

    /// The packet that [`prepare`](Self::prepare) made ready, with at most `room` bytes of data.
    pub fn take(&mut self, room: usize) -> Option<(Header, &[u8])> {
        let mut header =
            Header { src_cid: HOST_CID, dst_cid: self.limits.cid, kind: TYPE_STREAM, ..Header::default() };
        let mut data = &[][..];
        let key = match self.ready.take()? {
            Ready::Reset(reset) => {
                (header.op, header.src_cid, header.kind) = (op::RST, reset.from_cid, reset.kind);
                count(&self.stats.resets, 1);
                reset.key
            }
            Ready::Control(key, op, flags) => {
                (header.op, header.flags) = (op, flags);
                key
            }
            Ready::Data => {
                let ahead = &mut self.ahead;
                let end = ahead.end.min(ahead.start.saturating_add(room));
                data = ahead.data.get(ahead.start..end)?;
                ahead.start = end;
                header.op = op::RW;
                header.len = u32::try_from(data.len()).unwrap_or(0);
                count(&self.stats.bytes_to_guest, data.len());
                ahead.key
            }
        };
        (header.src_port, header.dst_port) = (key.host_port, key.guest_port);
        if header.op != op::RST
            && let Some(connection) = self.connections.get_mut(&key)
        {
            connection.stamp(&mut header);
        }
        count(&self.stats.packets_to_guest, 1);
        Some((header, data))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.reset();
    }
}
