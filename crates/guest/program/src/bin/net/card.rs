//! The network card (virtio 1.2, section 5.1): one pair of queues, polled.

use freestone_guest_program::registers::Device;
use freestone_guest_program::ring::{NEXT, Ring, WRITE};

use crate::memory::{Head, RINGS, ROOM, RX_SLOTS, Room, TX_SLOTS};

/// Features that the driver knows.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const ALL: u64 = CSUM | GUEST_CSUM | MAC | GUEST_TSO4 | HOST_TSO4 | EVENT_IDX;
}

/// Bytes of the header before a frame (5.1.6).
const HEADER: usize = 12;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM` and `VIRTIO_NET_HDR_F_DATA_VALID`.
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const TCPV4: u8 = 1;
/// The receive queue and the transmit queue.
const RX: usize = 0;
const TX: usize = 1;

/// What the card is asked to finish.
#[derive(Clone, Copy, Default)]
pub struct Undone {
    /// Where the sum of TCP or UDP begins in the frame, and where it goes from there.
    pub checksum: Option<(u16, u16)>,
    /// Bytes of data in each segment, and of headers: the frame is to be cut.
    pub segments: Option<(u16, u16)>,
}

/// A frame that came.
pub struct Received {
    room: Room,
    len: usize,
}

impl Received {
    /// From the Ethernet header on.
    pub fn frame(&self) -> &[u8] {
        self.room.bytes(self.len).get(HEADER..).unwrap_or_default()
    }

    /// Whether somebody else vouches for the checksum of TCP and UDP.
    pub fn is_trusted(&self) -> bool {
        self.room.bytes(1).first().is_some_and(|flags| flags & (NEEDS_CSUM | DATA_VALID) != 0)
    }
}

/// The card.
pub struct Card {
    /// Its address.
    pub mac: [u8; 6],
    /// What was negotiated.
    pub features: u64,
    /// Frames sent and received.
    pub frames: [u64; 2],
    rx: Ring,
    tx: Ring,
    /// Slots to send from that the card does not have.
    free: [u8; TX_SLOTS],
    free_len: usize,
}

impl Card {
    /// Brings the device up and gives it all room for frames.
    pub fn new(device: &Device) -> Option<Self> {
        let features = device.begin(feature::ALL)?;
        let mac = core::array::from_fn(|i| match features & feature::MAC {
            0 => *b"\x52\x54\x00\xF5\x00\x01".get(i).unwrap_or(&0),
            _ => device.config::<u8>(i as u64),
        });
        let event_idx = features & feature::EVENT_IDX != 0;
        let (mut rx, tx) = (enable(device, RX, event_idx)?, enable(device, TX, event_idx)?);
        let slots = TX_SLOTS.min(tx.size() / 2);
        device.go();
        for slot in 0..RX_SLOTS.min(rx.size()) {
            // SAFETY: nothing has it yet.
            submit(&mut rx, unsafe { Room::new(slot) });
        }
        rx.publish();
        let free = core::array::from_fn(|i| i as u8);
        Some(Self { mac, features, frames: [0; 2], rx, tx, free, free_len: slots })
    }

    /// Whether the card computes checksums.
    pub fn has_checksums(&self) -> bool {
        self.features & feature::CSUM != 0
    }

    /// Whether the card cuts large segments.
    pub fn has_segments(&self) -> bool {
        self.has_checksums() && self.features & feature::HOST_TSO4 != 0
    }

    /// Kicks so far.
    pub fn kicks(&self) -> u64 {
        self.rx.kicks + self.tx.kicks
    }

    /// A frame that came; it has to be given back.
    pub fn receive(&mut self) -> Option<Received> {
        let (slot, len) = self.rx.take()?;
        self.frames[1] += 1;
        // SAFETY: the card says that it is done with the room.
        Some(Received { room: unsafe { Room::new(slot) }, len })
    }

    /// Lets the card have the frame's room.
    pub fn give_back(&mut self, received: Received) {
        submit(&mut self.rx, received.room);
    }

    /// Whether a frame can be sent now.
    pub fn can_send(&mut self) -> bool {
        while self.free_len < TX_SLOTS
            && let Some((head, _)) = self.tx.take()
        {
            if let Some(slot) = self.free.get_mut(self.free_len) {
                *slot = (head / 2) as u8;
                self.free_len += 1;
            }
        }
        self.free_len > 0
    }

    /// Sends a frame of `head`, which is copied, and `data`, which is not; whether there was room. It goes with [`Self::publish`].
    pub fn send(&mut self, undone: Undone, head: &[u8], data: &'static [u8]) -> bool {
        if !self.can_send() {
            return false;
        }
        self.free_len -= 1;
        let slot = self.free.get(self.free_len).copied().map_or(0, usize::from);
        // SAFETY: the card is done with slots that are free.
        let mut at = unsafe { Head::new(slot) };
        let mut header = [0; HEADER];
        if let Some((start, offset)) = undone.checksum {
            header[0] = NEEDS_CSUM;
            header[6..8].copy_from_slice(&start.to_le_bytes());
            header[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        if let Some((size, headers)) = undone.segments {
            header[1] = TCPV4;
            header[2..4].copy_from_slice(&headers.to_le_bytes());
            header[4..6].copy_from_slice(&size.to_le_bytes());
        }
        at.write(0, &header);
        if !at.write(HEADER, head) {
            self.free_len += 1;
            return false;
        }
        let (first, second) = (2 * at.slot(), 2 * at.slot() + 1);
        let more = if data.is_empty() { 0 } else { NEXT };
        self.tx.describe(first, at.address(), (HEADER + head.len()) as u32, more, second as u16);
        self.tx.describe(second, data.as_ptr().expose_provenance() as u64, data.len() as u32, 0, 0);
        self.tx.submit(first);
        self.frames[0] += 1;
        true
    }

    /// Shows the card what was sent and given back.
    pub fn publish(&mut self) {
        self.tx.publish();
        self.rx.publish();
    }
}

fn enable(device: &Device, queue: usize, event_idx: bool) -> Option<Ring> {
    Ring::enable(device, queue, RINGS.get(queue)?, event_idx)
}

fn submit(rx: &mut Ring, room: Room) {
    rx.describe(room.slot(), room.address(), ROOM as u32, WRITE, 0);
    rx.submit(room.slot());
}
