//! How fast TCP goes through the NAT: an endpoint driven by hand in this thread, a socket on the host's loopback in another.
//!
//! The machine is the least there can be: it sends large segments from one place of its memory and acknowledges what it gets. So
//! what is measured is the NAT, beside the same bytes through a loopback connection without it.
//!
//! `cargo run --release -p freestone-net --features nat --example nat_throughput`
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a measurement"
)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend, MemoryView};
use freestone_net::nat::{Nat, NatConfig};
use freestone_net::{Endpoint, Frame, Gso, Offloads, Port, Received, Setup, Source, VnetHeader};
use rustix::event::epoll;

const TIME: Duration = Duration::from_secs(2);
/// Data in a large segment: 44 of the largest small ones, as Linux sends them.
const LARGE: usize = 44 * 1448;
const HEADERS: usize = 54;
/// Frames between two flushes, as a queue has them.
const BATCH: usize = 8;

fn main() {
    println!("loopback without NAT   {:7.2} Gbit/s", floor());
    println!("machine to host        {:7.2} Gbit/s", machine_to_host());
    println!("host to machine        {:7.2} Gbit/s", host_to_machine());
    println!("request and response   {:7.2} us", request_response());
    println!("connect and close      {:7.0} a second", connections());
}

fn rate(bytes: usize, start: Instant) -> f64 {
    bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9
}

/// Reads until the end.
fn sink(mut stream: TcpStream) {
    let mut buffer = vec![0; 256 << 10];
    while stream.read(&mut buffer).is_ok_and(|n| n > 0) {}
}

/// Writes until nobody reads.
fn fountain(mut stream: TcpStream) {
    let buffer = vec![0; LARGE];
    while stream.write_all(&buffer).is_ok() {}
}

fn floor() -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let reader = thread::spawn(move || sink(listener.accept().unwrap().0));
    let (buffer, start, mut bytes) = (vec![0; LARGE], Instant::now(), 0);
    while start.elapsed() < TIME {
        stream.write_all(&buffer).unwrap();
        bytes += LARGE;
    }
    drop(stream);
    reader.join().unwrap();
    rate(bytes, start)
}

/// A machine with one connection.
struct Machine {
    endpoint: Box<dyn Endpoint>,
    watch: OwnedFd,
    _source: Source,
    view: MemoryView,
    _nat: Nat,
    server: u16,
    client: u16,
    nxt: u32,
    una: u32,
    window: u32,
    expects: u32,
    flags: u8,
}

impl Machine {
    fn new(server: u16) -> Self {
        let mut config = NatConfig::default();
        config.limits.new_flows = 1_000_000;
        let mut nat = Nat::new(config).unwrap();
        let receive = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6;
        let endpoint = nat.open(&Setup { pairs: 1, receive }).unwrap().pop().unwrap();
        let source = endpoint.sources().pop().unwrap();
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        // SAFETY: the source keeps its descriptor open and is there until after the call.
        let fd = unsafe { BorrowedFd::borrow_raw(source.as_raw_fd()) };
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&watch, fd, epoll::EventData::new_u64(0), flags).unwrap();
        let view = GuestMem::anonymous(0x20_0000).unwrap().view();
        let (nxt, una, window, expects, flags) = (0, 0, 0, 0, 0);
        let (client, _source) = (1000, source);
        Self { endpoint, watch, _source, view, _nat: nat, server, client, nxt, una, window, expects, flags }
    }

    /// Sends a segment with `len` bytes of data.
    fn send(&mut self, flags: u8, len: usize) {
        let mut frame = [0u8; 62];
        frame[..6].copy_from_slice(&[0x52, 0x55, 10, 0, 2, 2]);
        frame[6..14].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1, 8, 0]);
        let options = if flags & 2 == 0 { 0 } else { 8 };
        let total = u16::try_from(40 + options + len).unwrap().to_be_bytes();
        frame[14..26].copy_from_slice(&[0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame[26..30].copy_from_slice(&Ipv4Addr::new(10, 0, 2, 15).octets());
        frame[30..34].copy_from_slice(&Ipv4Addr::new(10, 0, 2, 2).octets());
        let mut sum =
            frame[14..34].chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum::<u32>();
        sum = (sum >> 16) + (sum & 0xFFFF);
        sum = !((sum >> 16) + sum) & 0xFFFF;
        frame[24..26].copy_from_slice(&sum.to_be_bytes()[2..]);
        frame[34..36].copy_from_slice(&self.client.to_be_bytes());
        frame[36..38].copy_from_slice(&self.server.to_be_bytes());
        frame[38..42].copy_from_slice(&self.nxt.to_be_bytes());
        frame[42..46].copy_from_slice(&self.expects.to_be_bytes());
        frame[46] = if options == 0 { 0x50 } else { 0x70 };
        frame[47] = flags;
        // A window of 4 MiB, shifted by 7.
        frame[48..50].copy_from_slice(&0x8000u16.to_be_bytes());
        frame[54..62].copy_from_slice(&[2, 4, 5, 0xB4, 1, 3, 3, 7]);
        let headers = HEADERS + options;
        self.view.write_slice(&frame[..headers], GuestAddress(0x1000)).unwrap();
        let slices = [(0x1000, headers), (0x10_0000, len)]
            .map(|(at, len)| self.view.get_slice(GuestAddress(at), len).unwrap());
        let mut header = VnetHeader { checksum: Some((34, 16)), ..VnetHeader::default() };
        if len > 1448 {
            header.gso = Some(Gso::Tcp4);
            header.gso_size = 1448;
        }
        self.endpoint.transmit(&header, Frame::new(&slices));
        self.nxt = self.nxt.wrapping_add(u32::try_from(len).unwrap() + u32::from(flags & 3 != 0));
    }

    /// Takes a frame, if there is one; returns how much data it had.
    fn take(&mut self) -> Option<usize> {
        self.endpoint.waiting()?;
        let slices = [self.view.get_slice(GuestAddress(0x8_0000), 0x1_1000).unwrap()];
        let Received::Frame(len, _) = self.endpoint.receive(Frame::new(&slices)) else { return None };
        let mut head = [0; HEADERS];
        Frame::new(&slices).read_at(0, &mut head);
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        self.flags = head[47];
        let data = if self.flags & 2 == 0 { len - HEADERS } else { 0 };
        self.una = word(42);
        let scale = if self.flags & 2 == 0 { 3 } else { 0 };
        self.window = u32::from(u16::from_be_bytes([head[48], head[49]])) << scale;
        let fin_or_syn = u32::from(self.flags & 3 != 0);
        self.expects = word(38).wrapping_add(u32::try_from(data).unwrap() + fin_or_syn);
        Some(data)
    }

    /// Takes a frame, and waits for it.
    fn next(&mut self) -> usize {
        loop {
            if let Some(len) = self.take() {
                return len;
            }
            self.wait();
        }
    }

    fn wait(&mut self) {
        let time = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        let mut events = Vec::with_capacity(1);
        epoll::wait(&self.watch, rustix::buffer::spare_capacity(&mut events), Some(&time)).unwrap();
        self.endpoint.flush();
    }

    fn connect(&mut self) {
        self.expects = 0;
        self.client = self.client.checked_add(1).unwrap_or(1000);
        self.send(2, 0);
        self.endpoint.flush();
        loop {
            self.next();
            if self.flags & 2 != 0 {
                break;
            }
        }
        self.send(16, 0);
        self.endpoint.flush();
    }

    fn free(&self) -> usize {
        usize::try_from(self.window.saturating_sub(self.nxt.wrapping_sub(self.una))).unwrap()
    }
}

/// A machine connected to a thread that does `with`.
fn connected(with: impl FnOnce(TcpStream) + Send + 'static) -> Machine {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut machine = Machine::new(listener.local_addr().unwrap().port());
    thread::spawn(move || with(listener.accept().unwrap().0));
    machine.connect();
    machine
}

fn machine_to_host() -> f64 {
    let mut machine = connected(sink);
    machine.window = 65535;
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < TIME {
        let mut sent = 0;
        while sent < BATCH && machine.free() >= LARGE {
            machine.send(16, LARGE);
            bytes += LARGE;
            sent += 1;
        }
        machine.endpoint.flush();
        let mut got = false;
        while machine.take().is_some() {
            got = true;
        }
        if sent == 0 && !got {
            machine.wait();
        }
    }
    rate(bytes, start)
}

fn host_to_machine() -> f64 {
    let mut machine = connected(fountain);
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < TIME {
        let mut got = 0;
        while got < BATCH {
            let Some(len) = machine.take() else { break };
            bytes += len;
            got += 1;
            if got % 2 == 0 {
                machine.send(16, 0);
            }
        }
        if got == 0 {
            machine.wait();
            continue;
        }
        machine.send(16, 0);
        machine.endpoint.flush();
    }
    rate(bytes, start)
}

fn request_response() -> f64 {
    let mut machine = connected(|mut stream| {
        stream.set_nodelay(true).unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
    });
    let (start, mut count) = (Instant::now(), 0u32);
    while start.elapsed() < TIME {
        machine.send(16, 1);
        machine.endpoint.flush();
        while machine.next() == 0 {}
        count += 1;
    }
    start.elapsed().as_secs_f64() * 1e6 / f64::from(count)
}

fn connections() -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut machine = Machine::new(listener.local_addr().unwrap().port());
    thread::spawn(move || listener.incoming().for_each(drop));
    let (start, mut count) = (Instant::now(), 0u32);
    while start.elapsed() < TIME {
        machine.connect();
        while machine.flags & 1 == 0 {
            machine.next();
        }
        machine.send(17, 0);
        machine.endpoint.flush();
        count += 1;
    }
    f64::from(count) / start.elapsed().as_secs_f64()
}
