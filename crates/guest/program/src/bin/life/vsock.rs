//! One vsock stream to a server of the host that sends everything back: a numbered message in every round.
//!
//! When the device says that its transport was reset (virtio 1.2, 5.10.6.7), or the other side resets the stream, it connects anew and
//! sends this round's message again.

use freestone_guest_program::registers::Device;
use freestone_guest_program::ring::{NEXT, Pages, Ring, RingMemory, WRITE};

use crate::clock::Patience;
use crate::memory::mix;

/// Queues.
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// The host's context id.
const HOST: u64 = 2;
const FIRST_PORT: u32 = 1024;
const STREAM: u16 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: u32 = 0;
/// Operations (5.10.6).
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}
const HEADER: usize = 44;
const MESSAGE: usize = 32;
const ROOMS: usize = 4;
const ROOM: u32 = 4096;
const EVENTS: usize = 4;
/// Time stamp counter's ticks before a refused connection is tried again.
const AGAIN: u64 = 150_000_000;

static RINGS: [RingMemory; 3] = [RingMemory::new(), RingMemory::new(), RingMemory::new()];
static RX_ROOMS: Pages<ROOMS> = Pages::new();
/// One slot of 128 bytes for each packet under way.
static TX_ROOM: Pages<1> = Pages::new();
const TX_SLOTS: usize = 32;
static EVENT_ROOM: Pages<1> = Pages::new();

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// No connection; one is asked for when the wait is over.
    Closed,
    Connecting,
    Connected,
}

#[derive(Clone, Copy)]
struct Packet {
    len: usize,
    op: u16,
    buf_alloc: u32,
    fwd_cnt: u32,
}

pub struct Vsock {
    device: Device,
    rx: Ring,
    tx: Ring,
    events: Ring,
    sent: usize,
    cid: u64,
    host_port: u32,
    port: u32,
    state: State,
    wait: Patience,
    /// Bytes that were taken, and sent, and what the host allows.
    taken: u32,
    given: u32,
    allowed: u32,
    message: [u8; MESSAGE],
    message_is_sent: bool,
    echo: [u8; MESSAGE],
    echo_len: usize,
    patience: Patience,
    /// Messages that came back.
    pub echoes: u64,
    /// How often the connection was lost, and how often the device said so.
    pub lost: u64,
    pub resets: u64,
}

impl Vsock {
    pub fn new(device: Device, host_port: u32) -> Option<Self> {
        device.begin(0)?;
        let [rx_memory, tx_memory, event_memory] = &RINGS;
        let mut rx = Ring::enable(&device, RX, rx_memory, false)?;
        let tx = Ring::enable(&device, TX, tx_memory, false)?;
        let mut events = Ring::enable(&device, EVENT, event_memory, false)?;
        device.go();
        for room in 0..ROOMS.min(rx.size()) {
            give_room(&mut rx, room);
        }
        rx.publish();
        for slot in 0..EVENTS.min(events.size()) {
            give_event(&mut events, slot);
        }
        events.publish();
        let mut this = Self {
            cid: 0,
            device,
            rx,
            tx,
            events,
            sent: 0,
            host_port,
            port: FIRST_PORT,
            state: State::Closed,
            wait: Patience::new(),
            taken: 0,
            given: 0,
            allowed: 0,
            message: [0; MESSAGE],
            message_is_sent: false,
            echo: [0; MESSAGE],
            echo_len: 0,
            patience: Patience::new(),
            echoes: 0,
            lost: 0,
            resets: 0,
        };
        this.read_cid();
        this.connect();
        Some(this)
    }

    fn read_cid(&mut self) {
        self.cid = u64::from(self.device.config::<u32>(0)) | u64::from(self.device.config::<u32>(4)) << 32;
    }

    fn connect(&mut self) {
        self.port = if self.port > 60_000 { FIRST_PORT } else { self.port + 1 };
        (self.taken, self.given, self.allowed, self.echo_len) = (0, 0, 0, 0);
        self.message_is_sent = false;
        self.state = State::Connecting;
        self.send(op::REQUEST, false);
    }

    fn close(&mut self) {
        self.lost += u64::from(self.state == State::Connected);
        self.state = State::Closed;
        self.wait = Patience::new();
    }

    /// Sends a packet, with this round's message or without.
    fn send(&mut self, operation: u16, with_message: bool) {
        while self.tx.take().is_some() {}
        let slot = self.sent % TX_SLOTS;
        self.sent += 1;
        let (page, at) = (TX_ROOM.page(0), 128 * slot);
        let len = if with_message { MESSAGE } else { 0 };
        page.write(at, &self.cid.to_le_bytes());
        page.write(at + 8, &HOST.to_le_bytes());
        page.write(at + 16, &self.port.to_le_bytes());
        page.write(at + 20, &self.host_port.to_le_bytes());
        page.write(at + 24, &(len as u32).to_le_bytes());
        page.write(at + 28, &STREAM.to_le_bytes());
        page.write(at + 30, &operation.to_le_bytes());
        page.write(at + 32, &0u32.to_le_bytes());
        page.write(at + 36, &(ROOM * ROOMS as u32).to_le_bytes());
        page.write(at + 40, &self.taken.to_le_bytes());
        let address = page.address() + at as u64;
        let (first, second) = (2 * slot, 2 * slot + 1);
        self.tx.describe(first, address, HEADER as u32, if with_message { NEXT } else { 0 }, second as u16);
        if with_message {
            page.write(at + 64, &self.message);
            self.tx.describe(second, address + 64, len as u32, 0, 0);
            self.given = self.given.wrapping_add(len as u32);
        }
        self.tx.submit(first);
        self.tx.publish();
    }

    /// Begins this round's message.
    pub fn begin(&mut self, round: u64, hash: u64) {
        let words = [u64::from_le_bytes(*b"LIFEVSOC"), round, hash, mix(round ^ hash)];
        for (to, word) in self.message.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.message_is_sent = false;
        self.echo_len = 0;
        self.patience = Patience::new();
        self.try_to_send();
    }

    fn try_to_send(&mut self) {
        if self.state == State::Connected
            && !self.message_is_sent
            && self.allowed.wrapping_sub(self.given) >= MESSAGE as u32
        {
            self.message_is_sent = true;
            self.send(op::RW, true);
        }
    }

    /// Whether this round's message came back; what is wrong.
    pub fn poll(&mut self) -> Result<bool, &'static str> {
        while let Some((head, len)) = self.events.take() {
            let event: u32 = EVENT_ROOM.page(0).get(8 * head);
            give_event(&mut self.events, head);
            self.events.publish();
            if len != 4 || event != TRANSPORT_RESET {
                return Err("vsock: event");
            }
            self.resets += 1;
            self.close();
            self.read_cid();
            self.connect();
        }
        while let Some((head, len)) = self.rx.take() {
            let packet = self.packet(head, len)?;
            if let Some(packet) = packet {
                self.take(packet, head)?;
            }
            give_room(&mut self.rx, head);
            self.rx.publish();
        }
        if self.state == State::Closed && self.wait.used() > AGAIN {
            self.connect();
        }
        self.try_to_send();
        if self.echo_len == MESSAGE {
            if self.echo != self.message {
                return Err("vsock: echo");
            }
            self.echoes += 1;
            return Ok(true);
        }
        if self.patience.is_over() { Err("vsock: silent") } else { Ok(false) }
    }

    /// A packet for this connection, if it is one; packets of former connections are not.
    fn packet(&self, head: usize, len: usize) -> Result<Option<Packet>, &'static str> {
        let page = RX_ROOMS.page(head);
        if head >= ROOMS || len < HEADER {
            return Err("vsock: short packet");
        }
        let (from, to): (u64, u64) = (page.get(0), page.get(8));
        let (from_port, to_port): (u32, u32) = (page.get(16), page.get(20));
        let data = page.get::<u32>(24) as usize;
        if from != HOST || page.get::<u16>(28) != STREAM || HEADER + data != len {
            return Err("vsock: header");
        }
        let ours = to == self.cid && to_port == self.port && from_port == self.host_port;
        Ok(ours.then(|| Packet {
            len: data,
            op: page.get(30),
            buf_alloc: page.get(36),
            fwd_cnt: page.get(40),
        }))
    }

    fn take(&mut self, packet: Packet, room: usize) -> Result<(), &'static str> {
        self.allowed = packet.fwd_cnt.wrapping_add(packet.buf_alloc);
        match (packet.op, self.state) {
            (op::RESPONSE, State::Connecting) => self.state = State::Connected,
            (op::RST, State::Connecting | State::Connected) => self.close(),
            (op::SHUTDOWN, State::Connected) => {
                self.send(op::RST, false);
                self.close();
            }
            (op::RW, State::Connected) => {
                let end = self.echo_len + packet.len;
                let Some(to) = self.echo.get_mut(self.echo_len..end) else {
                    return Err("vsock: more bytes than were sent");
                };
                if !self.message_is_sent {
                    return Err("vsock: bytes that were not asked for");
                }
                RX_ROOMS.page(room).read(HEADER, to);
                self.echo_len = end;
                self.taken = self.taken.wrapping_add(packet.len as u32);
            }
            (op::CREDIT_UPDATE, _) => {}
            (op::CREDIT_REQUEST, State::Connected) => self.send(op::CREDIT_UPDATE, false),
            // Of the moment in which a connection ended.
            (_, State::Closed) => {}
            _ => return Err("vsock: operation"),
        }
        Ok(())
    }
}

fn give_room(rx: &mut Ring, room: usize) {
    rx.describe(room, RX_ROOMS.page(room).address(), ROOM, WRITE, 0);
    rx.submit(room);
}

fn give_event(events: &mut Ring, slot: usize) {
    let page = EVENT_ROOM.page(0);
    page.put(8 * slot, !0u32);
    events.describe(slot, page.address() + 8 * slot as u64, 8, WRITE, 0);
    events.submit(slot);
}
