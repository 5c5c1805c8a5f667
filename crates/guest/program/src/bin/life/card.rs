//! The network card: a numbered echo request (ICMP) to a host of the network in every round, sent again when it is lost.

use freestone_guest_program::registers::Device;
use freestone_guest_program::ring::{Pages, Ring, RingMemory, WRITE};

use crate::clock::Patience;
use crate::memory::mix;

const MAC: u64 = 1 << 5;
const RX: usize = 0;
const TX: usize = 1;
/// Bytes of the card's header, of Ethernet's, of IPv4's, and of an echo request with its data.
const HEADER: usize = 12;
const ETHERNET: usize = 14;
const IP: usize = 20;
const ECHO: usize = 8 + 32;
const FRAME: usize = ETHERNET + IP + ECHO;
const ROOMS: usize = 8;
const ROOM: u32 = 4096;
const TX_SLOTS: usize = 16;
/// Time stamp counter's ticks before a request is sent again.
const AGAIN: u64 = 600_000_000;

static RINGS: [RingMemory; 2] = [RingMemory::new(), RingMemory::new()];
static RX_ROOMS: Pages<ROOMS> = Pages::new();
static TX_ROOM: Pages<1> = Pages::new();

/// Our address and that of who is asked.
#[derive(Clone, Copy)]
pub struct Addresses {
    pub own: [u8; 4],
    pub peer: [u8; 4],
}

pub struct Card {
    rx: Ring,
    tx: Ring,
    sent: usize,
    mac: [u8; 6],
    addresses: Addresses,
    peer_mac: Option<[u8; 6]>,
    data: [u8; 32],
    number: u16,
    is_answered: bool,
    asked: Patience,
    patience: Patience,
    /// Requests that were answered, and that were sent again.
    pub answers: u64,
    pub repeated: u64,
}

impl Card {
    pub fn new(device: &Device, addresses: Addresses) -> Option<Self> {
        let features = device.begin(MAC)?;
        let mac = core::array::from_fn(|i| match features & MAC {
            0 => *b"\x52\x54\x00\xF5\x00\x02".get(i).unwrap_or(&0),
            _ => device.config::<u8>(i as u64),
        });
        let [rx_memory, tx_memory] = &RINGS;
        let mut rx = Ring::enable(device, RX, rx_memory, false)?;
        let tx = Ring::enable(device, TX, tx_memory, false)?;
        device.go();
        for room in 0..ROOMS.min(rx.size()) {
            give_room(&mut rx, room);
        }
        rx.publish();
        let mut this = Self {
            rx,
            tx,
            sent: 0,
            mac,
            addresses,
            peer_mac: None,
            data: [0; 32],
            number: 0,
            is_answered: false,
            asked: Patience::new(),
            patience: Patience::new(),
            answers: 0,
            repeated: 0,
        };
        this.arp(1, [0xFF; 6], [0; 6], addresses.peer);
        Some(this)
    }

    fn send(&mut self, frame: &[u8]) {
        while self.tx.take().is_some() {}
        let (page, at) = (TX_ROOM.page(0), 256 * (self.sent % TX_SLOTS));
        page.write(at, &[0; HEADER]);
        page.write(at + HEADER, frame);
        let slot = self.sent % TX_SLOTS;
        self.sent += 1;
        self.tx.describe(slot, page.address() + at as u64, (HEADER + frame.len()) as u32, 0, 0);
        self.tx.submit(slot);
        self.tx.publish();
    }

    fn arp(&mut self, operation: u8, to: [u8; 6], target: [u8; 6], ip: [u8; 4]) {
        let mut frame = [0u8; 60];
        let parts: [&[u8]; 8] = [
            &to,
            &self.mac,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation],
            &self.mac,
            &self.addresses.own,
            &target,
            &ip,
            &[],
        ];
        put_all(&mut frame, &parts);
        self.send(&frame);
    }

    fn ask(&mut self) {
        let Some(to) = self.peer_mac else {
            self.arp(1, [0xFF; 6], [0; 6], self.addresses.peer);
            return;
        };
        let mut frame = [0u8; FRAME];
        let number = self.number.to_be_bytes();
        let parts: [&[u8]; 8] = [
            &to,
            &self.mac,
            &[8, 0, 0x45, 0, 0, (IP + ECHO) as u8, number[0], number[1], 0x40, 0, 64, 1, 0, 0],
            &self.addresses.own,
            &self.addresses.peer,
            &[8, 0, 0, 0, b'L', b'F'],
            &number,
            &self.data,
        ];
        put_all(&mut frame, &parts);
        let header = checksum(frame.get(ETHERNET..ETHERNET + IP).unwrap_or_default());
        let body = checksum(frame.get(ETHERNET + IP..).unwrap_or_default());
        for (at, sum) in [(ETHERNET + 10, header), (ETHERNET + IP + 2, body)] {
            if let Some(to) = frame.get_mut(at..at + 2) {
                to.copy_from_slice(&sum.to_be_bytes());
            }
        }
        self.send(&frame);
    }

    /// Begins this round's request.
    pub fn begin(&mut self, round: u64, hash: u64) {
        let words = [u64::from_le_bytes(*b"LIFENETW"), round, hash, mix(round ^ hash)];
        for (to, word) in self.data.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.number = round as u16;
        self.is_answered = false;
        (self.patience, self.asked) = (Patience::new(), Patience::new());
        self.ask();
    }

    /// Whether this round's request was answered; what is wrong.
    pub fn poll(&mut self) -> Result<bool, &'static str> {
        while let Some((room, len)) = self.rx.take() {
            let mut frame = [0u8; 128];
            let Some(len) = len.checked_sub(HEADER).filter(|_| room < ROOMS) else {
                return Err("net: short frame");
            };
            let len = len.min(frame.len());
            RX_ROOMS.page(room).read(HEADER, frame.get_mut(..len).unwrap_or_default());
            give_room(&mut self.rx, room);
            self.rx.publish();
            self.receive(frame.get(..len).unwrap_or_default())?;
        }
        if self.is_answered {
            self.answers += 1;
            return Ok(true);
        }
        if self.asked.used() > AGAIN {
            self.asked = Patience::new();
            self.repeated += 1;
            self.ask();
        }
        if self.patience.is_over() { Err("net: silent") } else { Ok(false) }
    }

    fn receive(&mut self, frame: &[u8]) -> Result<(), &'static str> {
        let from: Option<[u8; 6]> = frame.get(6..12).and_then(|mac| mac.first_chunk().copied());
        match (frame.get(12..14), frame.get(ETHERNET..)) {
            (Some([8, 6]), Some(arp)) => {
                let (sender, target) = (arp.get(14..18), arp.get(24..28));
                if target != Some(&self.addresses.own) || sender.is_none() {
                    return Ok(());
                }
                match (arp.get(7), from) {
                    (Some(2), Some(mac)) if sender == Some(&self.addresses.peer) => {
                        let first = self.peer_mac.replace(mac).is_none();
                        if first && !self.is_answered && self.number != 0 {
                            self.ask();
                        }
                    }
                    (Some(1), Some(mac)) => {
                        let ip = sender.and_then(|ip| ip.first_chunk().copied()).unwrap_or_default();
                        self.arp(2, mac, mac, ip);
                    }
                    _ => {}
                }
            }
            (Some([8, 0]), Some(ip)) => {
                let icmp = ip.get(IP..).unwrap_or_default();
                let ours = ip.get(9) == Some(&1) && ip.get(12..16) == Some(&self.addresses.peer);
                let is_reply = icmp.get(..2) == Some(&[0, 0]) && icmp.get(4..6) == Some(b"LF");
                // Answers to what was asked twice come twice.
                if !ours || !is_reply || icmp.get(6..8) != Some(&self.number.to_be_bytes()) {
                    return Ok(());
                }
                let icmp = icmp.get(..ECHO).ok_or("net: short answer")?;
                if icmp.get(8..) != Some(&self.data) || checksum(icmp) != 0 {
                    return Err("net: answer");
                }
                self.is_answered = true;
            }
            _ => {}
        }
        Ok(())
    }
}

fn give_room(rx: &mut Ring, room: usize) {
    rx.describe(room, RX_ROOMS.page(room).address(), ROOM, WRITE, 0);
    rx.submit(room);
}

fn put_all(frame: &mut [u8], parts: &[&[u8]]) {
    let mut at = 0;
    for part in parts {
        if let Some(to) = frame.get_mut(at..at + part.len()) {
            to.copy_from_slice(part);
        }
        at += part.len();
    }
}

/// The checksum of RFC 1071; 0 over bytes that hold a right one.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = bytes.chunks(2).fold(0u32, |sum, pair| match *pair {
        [a, b] => sum + u32::from(u16::from_be_bytes([a, b])),
        [a] => sum + (u32::from(a) << 8),
        _ => sum,
    });
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !(sum as u16)
}

/// Four numbers with dots between them.
pub fn parse_ip(text: &str) -> Option<[u8; 4]> {
    let mut ip = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut ip {
        *byte = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then_some(ip)
}
