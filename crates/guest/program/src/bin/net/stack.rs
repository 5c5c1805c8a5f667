//! The least of an IPv4 host: answers ARP and echo requests, asks for addresses by ARP, and has one TCP connection at a time.

use freestone_guest_program::cpu;

use crate::card::{Card, Undone};
use crate::memory::Pattern;
use crate::tcp::{Connection, Segment};
use crate::wire::{self, ARP, ETHERNET, ICMP, IPV4, Ip, TCP, UDP, Writer, long, short};

/// An Ethernet address.
pub type Mac = [u8; 6];
/// To all.
pub const BROADCAST: Mac = [0xFF; 6];
/// Ticks of the time stamp counter, some tenths of a second, after which something is said again.
pub const AGAIN: u64 = 1_000_000_000;
/// Ticks, some seconds, after which nobody is waited for any more.
pub const PATIENCE: u64 = 30_000_000_000;
/// Frames that are looked at before anything else is done.
const BATCH: usize = 64;

/// Why a command was not done.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    Usage,
    NoAddress,
    NoNeighbour,
    Silent,
    Reset,
    WrongData,
    Ended,
}

impl Failure {
    /// In words.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Usage => "not a command",
            Self::NoAddress => "there is no address",
            Self::NoNeighbour => "nobody answers ARP",
            Self::Silent => "no answer",
            Self::Reset => "the connection was reset",
            Self::WrongData => "wrong data",
            Self::Ended => "the connection ended early",
        }
    }
}

/// Where this host is.
#[derive(Clone, Copy, Default)]
pub struct Address {
    pub ip: Ip,
    pub prefix: u32,
    pub gateway: Option<Ip>,
}

/// A datagram or an echo reply that somebody waits for.
#[derive(Clone, Copy)]
pub struct Inbox {
    /// Protocol, and port of UDP or identifier of ICMP.
    pub wanted: Option<(u8, u16)>,
    pub bytes: [u8; 600],
    pub len: usize,
}

/// The host.
pub struct Stack {
    pub card: Card,
    pub pattern: Pattern,
    pub address: Option<Address>,
    pub connection: Option<Connection>,
    /// The port that takes connections.
    pub listening: Option<u16>,
    pub inbox: Inbox,
    /// Who was asked for by ARP, and the answer.
    neighbour: Option<(Ip, Option<Mac>)>,
    /// Frames with a wrong checksum.
    pub bad: u64,
    ports: u16,
}

impl Stack {
    pub fn new(card: Card, pattern: Pattern) -> Self {
        // Not the same ports again when a machine comes up again: the host may remember them.
        let ports = cpu::tsc() as u16;
        let inbox = Inbox { wanted: None, bytes: [0; 600], len: 0 };
        let (address, connection, listening, neighbour, bad) = (None, None, None, None, 0);
        Self { card, pattern, address, connection, listening, inbox, neighbour, bad, ports }
    }

    /// A local port that was not used lately.
    pub fn next_port(&mut self) -> u16 {
        self.ports = self.ports.wrapping_add(1);
        0xC000 | self.ports
    }

    /// Takes what came, and sends what can be sent; whether anything came.
    pub fn poll(&mut self) -> bool {
        let mut any = false;
        for _ in 0..BATCH {
            let Some(received) = self.card.receive() else { break };
            any = true;
            self.take(received.frame(), received.is_trusted());
            self.card.give_back(received);
        }
        if let Some(mut connection) = self.connection.take() {
            connection.output(&mut self.card, self.pattern);
            self.connection = Some(connection);
        }
        self.card.publish();
        any
    }

    /// Polls until `done` says something.
    pub fn until<T>(
        &mut self,
        mut done: impl FnMut(&mut Self) -> Option<Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut heard = cpu::tsc();
        loop {
            if self.poll() {
                heard = 0;
            } else {
                core::hint::spin_loop();
            }
            if let Some(result) = done(self) {
                return result;
            }
            if heard == 0 {
                heard = cpu::tsc();
            } else if cpu::tsc().wrapping_sub(heard) > PATIENCE {
                return Err(Failure::Silent);
            }
        }
    }

    /// Sends a small frame.
    pub fn send(&mut self, frame: &Writer) {
        // What finds no room is lost, as on any network.
        self.card.send(Undone::default(), frame.bytes(), &[]);
    }

    /// The Ethernet address that leads to `to`.
    pub fn resolve(&mut self, to: Ip) -> Result<Mac, Failure> {
        let address = self.address.ok_or(Failure::NoAddress)?;
        let near = address.ip.is_near(to, address.prefix);
        let next = if near { to } else { address.gateway.ok_or(Failure::NoAddress)? };
        if let Some((ip, Some(mac))) = self.neighbour
            && ip == next
        {
            return Ok(mac);
        }
        self.neighbour = Some((next, None));
        let mut asked = 0;
        let found = self.until(|stack| {
            if let Some((_, Some(mac))) = stack.neighbour {
                return Some(Ok(mac));
            }
            if cpu::tsc().wrapping_sub(asked) > AGAIN {
                asked = cpu::tsc();
                stack.arp(1, BROADCAST, [0; 6], next);
            }
            None
        });
        found.map_err(|_| Failure::NoNeighbour)
    }

    fn arp(&mut self, operation: u8, to: Mac, target: Mac, ip: Ip) {
        let (mac, own) = (self.card.mac, self.address.unwrap_or_default().ip);
        let mut frame = Writer::new(to, mac, ARP);
        frame.put(&[0, 1, 8, 0, 6, 4, 0, operation]).put(&mac).put(&own.0).put(&target).put(&ip.0);
        self.send(&frame);
    }

    fn take(&mut self, frame: &[u8], trusted: bool) {
        match (short(frame, 12), frame.get(ETHERNET..)) {
            (ARP, Some(packet)) => self.take_arp(packet),
            (IPV4, Some(packet)) => self.take_ip(frame, packet, trusted),
            _ => {}
        }
    }

    fn take_arp(&mut self, packet: &[u8]) {
        let (Some(mac), Some(ip), Some(target)) = (
            packet.get(8..).and_then(|rest| rest.first_chunk()).copied(),
            packet.get(14..).and_then(|rest| rest.first_chunk()).copied().map(Ip),
            packet.get(24..).and_then(|rest| rest.first_chunk()).copied().map(Ip),
        ) else {
            return;
        };
        match short(packet, 6) {
            1 if self.address.is_some_and(|address| address.ip == target) => self.arp(2, mac, mac, ip),
            2 => {
                if let Some((wanted, found @ None)) = &mut self.neighbour
                    && *wanted == ip
                {
                    *found = Some(mac);
                }
            }
            _ => {}
        }
    }

    fn take_ip(&mut self, frame: &[u8], packet: &[u8], trusted: bool) {
        let header = usize::from(packet.first().copied().unwrap_or(0) & 15) * 4;
        let total = usize::from(short(packet, 2));
        let (Some(ip), Some(body)) = (packet.get(..header), packet.get(header..total)) else { return };
        if ip.len() < 20 || short(ip, 6) & 0x3FFF != 0 {
            return;
        }
        if wire::fold(wire::sum(ip, 0)) != 0xFFFF {
            self.bad += 1;
            return;
        }
        let (from, to) = (Ip(long(ip, 12).to_be_bytes()), Ip(long(ip, 16).to_be_bytes()));
        let protocol = ip.get(9).copied().unwrap_or(0);
        let ours = self.address.is_none_or(|address| address.ip == to);
        let mac = frame.get(6..12).and_then(|mac| mac.first_chunk()).copied().unwrap_or_default();
        let start = match protocol {
            ICMP => 0,
            // A datagram without a checksum.
            UDP if short(body, 6) == 0 => u64::from(u16::MAX),
            _ => wire::pseudo(from, to, protocol, body.len()),
        };
        let summed = protocol == UDP && short(body, 6) == 0 || trusted && protocol != ICMP;
        if !summed && wire::fold(wire::sum(body, start)) != 0xFFFF {
            self.bad += 1;
            return;
        }
        match protocol {
            TCP if ours => self.take_tcp(from, mac, body),
            ICMP if ours && body.first() == Some(&8) => self.answer_echo(from, mac, body),
            ICMP if ours && body.first() == Some(&0) => self.deliver((ICMP, short(body, 4)), body),
            UDP => self.deliver((UDP, short(body, 2)), body),
            _ => {}
        }
    }

    fn deliver(&mut self, what: (u8, u16), body: &[u8]) {
        if self.inbox.wanted != Some(what) || self.inbox.len > 0 {
            return;
        }
        let len = body.len().min(self.inbox.bytes.len());
        if let (Some(to), Some(from)) = (self.inbox.bytes.get_mut(..len), body.get(..len)) {
            to.copy_from_slice(from);
            self.inbox.len = len;
        }
    }

    fn answer_echo(&mut self, from: Ip, mac: Mac, body: &[u8]) {
        let Some(rest) = body.get(4..).filter(|rest| rest.len() <= 512) else { return };
        let own = self.address.unwrap_or_default().ip;
        let mut frame = Writer::new(mac, self.card.mac, IPV4);
        let check = !wire::fold(wire::sum(rest, 0));
        frame.ip(ICMP, own, from, body.len()).put(&[0, 0]).put(&check.to_be_bytes()).put(rest);
        self.send(&frame);
    }

    fn take_tcp(&mut self, from: Ip, mac: Mac, body: &[u8]) {
        let Some(segment) = Segment::parse(body) else { return };
        let own = self.address.unwrap_or_default().ip;
        match &mut self.connection {
            Some(connection) if connection.is(from, &segment) => {
                return connection.input(&segment, self.pattern);
            }
            None if self.listening == Some(segment.to) && segment.is_first() => {
                self.connection = Some(Connection::accept((own, self.card.mac), (from, mac), &segment));
                return;
            }
            // The next command may be the one that takes it: it will come again.
            Some(_) if segment.is_first() => return,
            _ => {}
        }
        if let Some(frame) = segment.refusal((own, self.card.mac), (from, mac)) {
            self.send(&frame);
        }
    }
}
