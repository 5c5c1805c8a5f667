//! TCP of the service: smoltcp's sockets over packets of one machine, and what is said on each connection.
//!
//! Packets have their Ethernet header put on and taken off here: an answer goes to the station that the question came from, so there
//! are no routes and no neighbours. Nothing here waits; the time of the next thing to do is [`Stack::deadline`].

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use super::http::{Answer, Parser};
use super::service;
use super::store::{MmdsStore, count};
use super::wire::{self, ETHERNET, Kind};
use super::{MAX_CONNECTIONS, MmdsConfig};
use crate::MacAddr;

const PORT: u16 = 80;
/// Bytes of a connection's buffers.
const RX_BUFFER: usize = 4096;
const TX_BUFFER: usize = 16384;
/// Frames for the machine that wait at most, but for one more answer.
const MAX_WAITING: usize = 64;
/// The largest frame that is looked at.
pub(super) const MAX_FRAME: usize = ETHERNET + 65535;
/// A connection without a word ends after this time.
const IDLE: Duration = Duration::from_secs(60);
/// One that was idle so long gives way to a new one when there are too many.
const GIVES_WAY: Duration = Duration::from_secs(10);
/// Rounds of taking, answering and sending for one frame.
const MAX_ROUNDS: usize = 8;

/// The link below the IP packets.
#[derive(Debug)]
struct Link {
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    /// Stations by their IP address; the last one that spoke is last.
    stations: Vec<(Ipv4Addr, MacAddr)>,
    mtu: usize,
    /// Something was not sent because too much waited.
    stalled: bool,
}

/// A connection, or the socket that waits for one.
struct Connection {
    handle: SocketHandle,
    parser: Parser,
    /// What is still to be sent, from `sent` on.
    answer: Vec<u8>,
    sent: usize,
    /// Nothing more is said after the answer.
    closing: bool,
    established: bool,
    /// When something last happened.
    since: Instant,
}

/// All of it.
pub(super) struct Stack {
    config: MmdsConfig,
    store: MmdsStore,
    interface: Interface,
    sockets: SocketSet<'static>,
    link: Link,
    connections: Vec<Connection>,
    epoch: Instant,
}

impl Stack {
    /// `mtu` is that of the machine's card.
    pub(super) fn new(config: MmdsConfig, store: MmdsStore, mtu: u16, now: Instant) -> Self {
        let mut link = Link {
            incoming: None,
            outgoing: VecDeque::new(),
            stations: Vec::new(),
            mtu: usize::from(mtu).clamp(576, 1500),
            stalled: false,
        };
        let mut settings = Config::new(HardwareAddress::Ip);
        settings.random_seed = random();
        let mut interface = Interface::new(settings, &mut link, StackInstant::ZERO);
        // There is room for more than one.
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(config.ipv4), 32));
        });
        let (sockets, connections) = (SocketSet::new(Vec::new()), Vec::new());
        Self { config, store, interface, sockets, link, connections, epoch: now }
    }

    /// The machine sent `frame`, which is for the service.
    pub(super) fn input(&mut self, now: Instant, frame: Vec<u8>) {
        let counters = self.store.counters();
        count(&counters.rx_frames);
        let address = self.config.ipv4.octets();
        // What was decided by may have changed before it was copied.
        let taken = match wire::kind(address, &frame) {
            _ if self.link.outgoing.len() >= MAX_WAITING => false,
            None => false,
            Some(Kind::Arp) => match wire::arp_reply(address, &frame) {
                Some(reply) => {
                    self.link.outgoing.push_back(reply);
                    true
                }
                None => false,
            },
            Some(Kind::Tcp) => self.segment(now, frame),
        };
        if !taken {
            count(&self.store.counters().rx_dropped);
        }
    }

    fn segment(&mut self, now: Instant, mut frame: Vec<u8>) -> bool {
        let Some((ip, mac)) = wire::sender(self.config.ipv4.octets(), &frame) else { return false };
        self.link.learn(ip, mac);
        frame.drain(..ETHERNET);
        self.link.incoming = Some(frame);
        self.listen(now);
        self.poll(now);
        true
    }

    /// Does what is to be done by now.
    pub(super) fn poll(&mut self, now: Instant) {
        let time = self.time(now);
        for _ in 0..MAX_ROUNDS {
            self.link.stalled = false;
            self.interface.poll(time, &mut self.link, &mut self.sockets);
            if !self.serve(now) {
                break;
            }
        }
    }

    /// When [`poll`](Self::poll) is worth calling though the machine sent nothing.
    pub(super) fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let time = self.time(now);
        let stack = self.interface.poll_at(time, &self.sockets).filter(|_| !self.link.stalled);
        let stack = stack.map(|at| {
            now + Duration::from_micros(
                at.total_micros().saturating_sub(time.total_micros()).try_into().unwrap_or(0),
            )
        });
        let busy = self.connections.iter().filter(|connection| connection.established);
        let idle = busy.map(|connection| connection.since + IDLE).min();
        [stack, idle].into_iter().flatten().min()
    }

    /// Bytes of the next frame for the machine.
    pub(super) fn waiting(&self) -> Option<usize> {
        self.link.outgoing.front().map(Vec::len)
    }

    /// Takes that frame out.
    pub(super) fn take(&mut self, now: Instant) -> Option<Vec<u8>> {
        let frame = self.link.outgoing.pop_front()?;
        if self.link.stalled && self.link.outgoing.is_empty() {
            self.poll(now);
        }
        Some(frame)
    }

    fn time(&self, now: Instant) -> StackInstant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        StackInstant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    /// Sees to it that somebody listens, if there may be one more connection.
    fn listen(&mut self, now: Instant) {
        if self.connections.iter().any(|connection| !connection.established) {
            return;
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            let oldest = self.connections.iter().enumerate().min_by_key(|(_, connection)| connection.since);
            match oldest {
                Some((index, oldest)) if now.saturating_duration_since(oldest.since) >= GIVES_WAY => {
                    self.forget(index);
                }
                _ => return,
            }
        }
        let mut socket =
            Socket::new(SocketBuffer::new(vec![0; RX_BUFFER]), SocketBuffer::new(vec![0; TX_BUFFER]));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        if let Err(error) = socket.listen(PORT) {
            tracing::warn!(?error, "metadata service cannot listen");
            return;
        }
        let handle = self.sockets.add(socket);
        let (parser, answer) = Default::default();
        let connection =
            Connection { handle, parser, answer, sent: 0, closing: false, established: false, since: now };
        self.connections.push(connection);
    }

    /// Takes what came, answers, and sends. Whether there is something to send now.
    fn serve(&mut self, now: Instant) -> bool {
        let Self { config, store, sockets, connections, .. } = self;
        let (mut over, mut moved) = (Vec::new(), false);
        for (index, connection) in connections.iter_mut().enumerate() {
            let socket = sockets.get_mut::<Socket>(connection.handle);
            if socket.state() == State::Listen {
                // As new, also after a connection that was given up before it began.
                connection.established = false;
                continue;
            }
            if !connection.established {
                connection.established = true;
                connection.since = now;
                count(&store.counters().connections_created);
            }
            if connection.serve(socket, config, store, now) {
                connection.since = now;
                moved = true;
            }
            if now.saturating_duration_since(connection.since) >= IDLE && socket.is_open() {
                // The reset is sent by the next poll, after which the socket is closed.
                socket.abort();
                connection.since = now;
                moved = true;
            } else if matches!(socket.state(), State::Closed | State::TimeWait) {
                over.push(index);
            }
        }
        for index in over.into_iter().rev() {
            self.forget(index);
        }
        moved
    }

    fn forget(&mut self, index: usize) {
        let connection = self.connections.swap_remove(index);
        self.sockets.remove(connection.handle);
        count(&self.store.counters().connections_destroyed);
    }
}

impl Connection {
    /// Whether anything moved.
    fn serve(
        &mut self,
        socket: &mut Socket<'_>,
        config: &MmdsConfig,
        store: &MmdsStore,
        now: Instant,
    ) -> bool {
        let mut moved = self.send(socket);
        // One answer at a time: who does not read what it asked for is not heard.
        while self.answer.is_empty() && !self.closing {
            match self.parser.next() {
                Some(Ok(request)) => {
                    let answer = service::answer(config, store, now, &request);
                    self.answer(&answer, store, request.keep_alive, request.method == "HEAD");
                }
                Some(Err(refusal)) => {
                    self.answer(&Answer::text(refusal.status, refusal.reason), store, false, false);
                }
                None => {
                    let mut data = [0; 1024];
                    let room = self.parser.wants().min(data.len());
                    let got = socket.recv_slice(data.get_mut(..room).unwrap_or_default()).unwrap_or(0);
                    if got == 0 {
                        break;
                    }
                    self.parser.push(data.get(..got).unwrap_or_default());
                }
            }
            moved |= true;
            self.send(socket);
        }
        if self.answer.is_empty() && (self.closing || !socket.may_recv()) && socket.may_send() {
            let open = !matches!(socket.state(), State::SynReceived);
            if open {
                socket.close();
                moved = true;
            }
        }
        if self.closing {
            // Read and lost, so that the end is seen.
            while socket.recv(|data| (data.len(), data.len())).is_ok_and(|len| len > 0) {
                moved = true;
            }
        }
        moved
    }

    fn answer(&mut self, answer: &Answer, store: &MmdsStore, keep_alive: bool, head_only: bool) {
        count(&store.counters().requests);
        if answer.status != super::http::Status::Ok {
            count(&store.counters().errors);
        }
        self.answer = answer.bytes(keep_alive, head_only);
        self.sent = 0;
        self.closing = !keep_alive;
    }

    /// Gives the socket what it has room for.
    fn send(&mut self, socket: &mut Socket<'_>) -> bool {
        let rest = self.answer.get(self.sent..).unwrap_or_default();
        if rest.is_empty() {
            return false;
        }
        let sent = socket.send_slice(rest).unwrap_or(0);
        self.sent += sent;
        if self.sent >= self.answer.len() {
            self.answer = Vec::new();
            self.sent = 0;
        }
        sent > 0
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // Sequence numbers that the machine may guess harm nobody but itself.
    if let Err(error) = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        tracing::debug!(%error, "no random bytes");
    }
    u64::from_ne_bytes(bytes)
}

impl Link {
    fn learn(&mut self, ip: Ipv4Addr, mac: MacAddr) {
        if self.stations.last() == Some(&(ip, mac)) {
            return;
        }
        self.stations.retain(|(known, _)| *known != ip);
        if self.stations.len() > MAX_CONNECTIONS {
            self.stations.remove(0);
        }
        self.stations.push((ip, mac));
    }

    /// Where a packet goes.
    fn station(&self, packet: &[u8]) -> MacAddr {
        let to = packet.get(16..20).and_then(|to| <[u8; 4]>::try_from(to).ok()).map(Ipv4Addr::from);
        let known = self.stations.iter().find(|(ip, _)| Some(*ip) == to);
        known.or(self.stations.last()).map_or(MacAddr::BROADCAST, |(_, mac)| *mac)
    }
}

impl Device for Link {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(self)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Outgoing<'_>> {
        if self.outgoing.len() >= MAX_WAITING {
            self.stalled = true;
            return None;
        }
        Some(Outgoing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // What the machine sends has not been anywhere where it could be damaged, and it may have left the checksum to us.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// A packet from the machine.
#[derive(Debug)]
pub(super) struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

/// Room for a packet to the machine.
#[derive(Debug)]
pub(super) struct Outgoing<'a>(&'a mut Link);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; ETHERNET.saturating_add(len)];
        let (header, body) = packet.split_at_mut(ETHERNET);
        let result = f(body);
        header.copy_from_slice(&wire::ethernet(self.0.station(body)));
        self.0.outgoing.push_back(packet);
        result
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};

    use super::*;

    const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn stack(now: Instant) -> Stack {
        Stack::new(MmdsConfig::new(), MmdsStore::default(), 1500, now)
    }

    /// A frame with a segment from `port`.
    fn segment(port: u16, control: TcpControl, seq: i32, ack: Option<TcpSeqNumber>, data: &[u8]) -> Vec<u8> {
        let service = MmdsConfig::default().ipv4;
        let tcp = TcpRepr {
            src_port: port,
            dst_port: PORT,
            control,
            seq_number: TcpSeqNumber(seq),
            ack_number: ack,
            window_len: 8000,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: data,
        };
        let ip = Ipv4Repr {
            src_addr: MACHINE,
            dst_addr: service,
            next_header: IpProtocol::Tcp,
            payload_len: tcp.buffer_len(),
            hop_limit: 64,
        };
        let caps = ChecksumCapabilities::default();
        let mut packet = vec![0; ip.buffer_len() + tcp.buffer_len()];
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut packet), &caps);
        let (from, to) = (MACHINE.into(), service.into());
        tcp.emit(&mut TcpPacket::new_unchecked(&mut packet[ip.buffer_len()..]), &from, &to, &caps);
        let mut frame = [[2; 6], [0x52, 0x54, 0, 0, 0, 1]].concat();
        frame.extend([8, 0]);
        frame.extend(packet);
        frame
    }

    /// Flags and the number that follows all that the service has sent.
    fn taken(stack: &mut Stack, now: Instant) -> Option<(bool, TcpSeqNumber)> {
        let frame = stack.take(now)?;
        let tcp = TcpPacket::new_checked(&frame[ETHERNET + 20..]).unwrap();
        Some((tcp.rst(), tcp.seq_number() + tcp.segment_len()))
    }

    fn connect(stack: &mut Stack, port: u16, now: Instant) -> bool {
        stack.input(now, segment(port, TcpControl::Syn, 0, None, &[]));
        let (reset, next) = taken(stack, now).unwrap();
        if !reset {
            stack.input(now, segment(port, TcpControl::None, 1, Some(next), &[]));
        }
        assert_eq!(stack.waiting(), None);
        !reset
    }

    #[test]
    fn a_connection_without_a_word_is_reset_when_its_time_has_come() {
        let start = Instant::now();
        let mut stack = stack(start);
        assert_eq!(stack.deadline(start), None, "nothing is to be done where nobody asks");
        assert!(connect(&mut stack, 1000, start));
        assert_eq!(stack.deadline(start), Some(start + IDLE));
        stack.poll(start + IDLE - Duration::from_millis(1));
        assert_eq!(stack.waiting(), None);
        let late = start + IDLE;
        stack.poll(late);
        assert!(taken(&mut stack, late).unwrap().0, "reset");
        stack.poll(late);
        let counts = stack.store.counts();
        assert_eq!((counts.connections_created, counts.connections_destroyed), (1, 1));
        assert_eq!(stack.deadline(late), None);
    }

    #[test]
    fn the_connection_that_was_idle_longest_gives_way_when_there_are_too_many() {
        let start = Instant::now();
        let mut stack = stack(start);
        for port in (1000..).take(MAX_CONNECTIONS) {
            assert!(connect(&mut stack, port, start + Duration::from_millis(port.into())));
        }
        let now = start + Duration::from_secs(2);
        assert!(!connect(&mut stack, 2000, now), "all of them are new");
        let now = start + Duration::from_millis(1000) + GIVES_WAY;
        assert!(connect(&mut stack, 2001, now));
        assert!(!connect(&mut stack, 2002, now), "the others are younger");
        assert_eq!(stack.connections.len(), MAX_CONNECTIONS);
    }

    #[test]
    fn an_answer_that_got_lost_is_sent_again() {
        let start = Instant::now();
        let mut stack = stack(start);
        stack.store.put(serde_json::json!({"a": "b"})).unwrap();
        stack.input(start, segment(1, TcpControl::Syn, 0, None, &[]));
        let (_, next) = taken(&mut stack, start).unwrap();
        stack.input(start, segment(1, TcpControl::Psh, 1, Some(next), b"GET /a HTTP/1.1\r\n\r\n"));
        let first = std::iter::from_fn(|| stack.take(start)).last().unwrap();
        assert!(first.ends_with(b"\r\n\r\nb"));
        let again = stack.deadline(start).unwrap();
        assert!(again < start + IDLE);
        stack.poll(again);
        assert!(stack.take(again).unwrap().ends_with(b"\r\n\r\nb"));
    }
}
