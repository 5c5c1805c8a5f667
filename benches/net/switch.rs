//! What a frame through the switch costs, beside a pair of sockets and beside two copies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use freestone_benches::rounds::CycleFrom;
use freestone_benches::{Fallible, host, rounds};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend, MemorySlice, MemoryView};
use freestone_net::switch::{PortOptions, Switch, SwitchPort};
use freestone_net::{Endpoint, Frame, Port, Received, Sent, Setup, VnetHeader};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::Args;
use crate::guest::{DATA, HEADERS, large_headers, large_undone};
use crate::traffic::count;
use crate::watch::Watch;

/// Frames that are given before the other side is asked.
const BATCH: usize = 32;
/// Frames on the way between two threads, and their bytes: less than what the switch keeps for a port.
const ON_THE_WAY: usize = 256;
const BYTES_ON_THE_WAY: usize = 1 << 20;
/// Where frames that come are put; those that go are at the start.
const ROOM: u64 = 1 << 20;

/// Sizes, with what is left undone in such a frame.
fn sizes() -> Fallible<[(&'static str, usize, VnetHeader); 3]> {
    let whole = VnetHeader::default();
    Ok([("64", 64, whole), ("1514", 1514, whole), ("64 KiB, TSO", HEADERS + DATA, large_undone()?)])
}

fn memory() -> Fallible<GuestMem> {
    let mem = GuestMem::anonymous(2 << 20)?;
    let view = mem.view();
    for at in (0..2u64 << 20).step_by(4096) {
        view.write_slice(&[0x5A; 4096], GuestAddress(at))?;
    }
    view.write_slice(&large_headers(false, DATA)?, GuestAddress(0))?;
    Ok(mem)
}

fn slice(view: &MemoryView, at: u64, len: usize) -> Fallible<MemorySlice<'_>> {
    Ok(view.get_slice(GuestAddress(at), len)?)
}

/// Two ports of a switch that knows who is where. The ports must be kept.
struct Pair {
    _ports: [SwitchPort; 2],
    a: Box<dyn Endpoint>,
    b: Box<dyn Endpoint>,
}

impl Pair {
    fn new(view: &MemoryView) -> Fallible<Self> {
        let switch = Switch::default();
        let mut ports = [switch.port(PortOptions::default())?, switch.port(PortOptions::default())?];
        let mut ends = Vec::new();
        for port in &mut ports {
            let receive = port.info().receive;
            ends.extend(port.open(&Setup { pairs: 1, receive })?);
        }
        let [a, b] = <[_; 2]>::try_from(ends).map_err(|_| "not two endpoints")?;
        let mut this = Self { _ports: ports, a, b };
        // The second has been heard of when the first begins.
        view.write_slice(&large_headers(true, 10)?, GuestAddress(ROOM))?;
        let hello = [slice(view, ROOM, 64)?];
        this.b.transmit(&VnetHeader::default(), Frame::new(&hello));
        this.b.flush();
        take(this.a.as_mut(), Frame::new(&hello))?;
        Ok(this)
    }
}

/// Takes all that waits; how many.
fn take(end: &mut dyn Endpoint, room: Frame<'_, '_>) -> Fallible<usize> {
    let mut n = 0;
    while end.waiting().is_some() {
        match end.receive(room) {
            Received::Frame(..) => n += 1,
            Received::Nothing => break,
            Received::NeedsRoom(len) => return Err(format!("a frame of {len} bytes").into()),
        }
    }
    Ok(n)
}

/// What moves frames.
enum Subject {
    /// Two copies, into a buffer and out of it.
    Copies,
    /// Packets through a pair of sockets.
    Sockets(OwnedFd, OwnedFd),
    Switch(Pair),
}

impl Subject {
    fn all(view: &MemoryView, threads: usize) -> Fallible<Vec<(&'static str, Self)>> {
        let mut all =
            vec![("sockets", Self::sockets(threads == 1)?), ("switch", Self::Switch(Pair::new(view)?))];
        if threads == 1 {
            all.insert(0, ("copies", Self::Copies));
        }
        Ok(all)
    }

    fn sockets(nonblocking: bool) -> Fallible<Self> {
        let flags = if nonblocking { SocketFlags::NONBLOCK } else { SocketFlags::empty() };
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::sockopt::set_socket_send_buffer_size(&a, 4 << 20)?;
        Ok(Self::Sockets(a, b))
    }

    /// Moves `frames` frames on this thread.
    fn here(&mut self, view: &MemoryView, len: usize, undone: &VnetHeader, frames: usize) -> Fallible<()> {
        let (out, room) = ([slice(view, 0, len)?], [slice(view, ROOM, len)?]);
        let (mut bytes, mut left) = (vec![0x5A; len], frames);
        while left > 0 {
            left -= match self {
                Self::Copies => {
                    out.iter().try_for_each(|slice| slice.read_slice(&mut bytes, 0))?;
                    room.iter().try_for_each(|slice| slice.write_slice(&bytes, 0))?;
                    1
                }
                Self::Sockets(a, b) => through_sockets(a.as_fd(), b.as_fd(), &mut bytes, left.min(BATCH))?,
                Self::Switch(pair) => {
                    for _ in 0..left.min(BATCH) {
                        pair.a.transmit(undone, Frame::new(&out));
                    }
                    pair.a.flush();
                    match take(pair.b.as_mut(), Frame::new(&room))? {
                        0 => return Err("no frame comes through".into()),
                        n => n,
                    }
                }
            };
        }
        Ok(())
    }

    /// Moves `frames` frames from this thread to another one.
    fn across(&mut self, view: &MemoryView, len: usize, undone: &VnetHeader, frames: usize) -> Fallible<()> {
        let out = [slice(view, 0, len)?];
        let most = ON_THE_WAY.min(BYTES_ON_THE_WAY / len);
        let other = host::cpus().last().copied().unwrap_or(0);
        let (done, failed) = (&AtomicUsize::new(0), &AtomicBool::new(false));
        std::thread::scope(|scope| {
            let thread = match self {
                Self::Copies => return Err("not between threads".into()),
                Self::Sockets(a, b) => {
                    let b = (*b).as_fd();
                    let thread = scope.spawn(move || receive_packets(b, len, other, frames));
                    let bytes = vec![0x5A; len];
                    for _ in 0..frames {
                        rustix::net::send(&a, &bytes, SendFlags::NOSIGNAL)?;
                    }
                    thread
                }
                Self::Switch(Pair { a, b, .. }) => {
                    let thread = scope.spawn(move || {
                        let result = receive_frames(b.as_mut(), view, len, other, frames, done);
                        failed.store(result.is_err(), Ordering::Relaxed);
                        result
                    });
                    for sent in 0..frames {
                        if sent % BATCH == 0 {
                            a.flush();
                        }
                        while sent.saturating_sub(done.load(Ordering::Relaxed)) > most {
                            a.flush();
                            if failed.load(Ordering::Relaxed) {
                                break;
                            }
                            std::thread::yield_now();
                        }
                        if a.transmit(undone, Frame::new(&out)) == Sent::Busy {
                            return Err("busy".into());
                        }
                    }
                    a.flush();
                    thread
                }
            };
            thread.join().map_err(|_| "a thread failed")?.map_err(Into::into)
        })
    }
}

/// Sends as many packets as go and receives them.
fn through_sockets(a: BorrowedFd<'_>, b: BorrowedFd<'_>, bytes: &mut [u8], most: usize) -> io::Result<usize> {
    for sent in 0..most {
        match rustix::net::send(a, bytes, SendFlags::NOSIGNAL) {
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) if sent > 0 => break,
            Err(error) => return Err(error.into()),
        }
    }
    let mut n = 0;
    loop {
        match rustix::net::recv(b, &mut *bytes, RecvFlags::empty()) {
            Ok(_) => n += 1,
            Err(rustix::io::Errno::AGAIN) => return Ok(n),
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive_packets(from: BorrowedFd<'_>, len: usize, cpu: usize, frames: usize) -> Result<(), String> {
    host::pin(cpu).map_err(|e| e.to_string())?;
    let mut bytes = vec![0; len];
    (0..frames).try_for_each(|_| {
        rustix::net::recv(from, &mut bytes, RecvFlags::empty()).map(|_| ()).map_err(|e| e.to_string())
    })
}

fn receive_frames(
    end: &mut dyn Endpoint,
    view: &MemoryView,
    len: usize,
    cpu: usize,
    frames: usize,
    done: &AtomicUsize,
) -> Result<(), String> {
    host::pin(cpu).map_err(|e| e.to_string())?;
    let room = [slice(view, ROOM, len).map_err(|e| e.to_string())?];
    let room = Frame::new(&room);
    let watch = Watch::new(end).map_err(|e| e.to_string())?;
    let mut n = 0;
    while n < frames {
        let took = take(end, room).map_err(|e| e.to_string())?;
        n += took;
        done.store(n, Ordering::Relaxed);
        if took == 0 {
            watch.wait().map_err(|e| e.to_string())?;
            end.flush();
        }
    }
    Ok(())
}

/// The table.
pub fn bench(args: &Args) -> Fallible<Value> {
    host::pin(host::cpus().first().copied().unwrap_or(0))?;
    println!("Frames through the switch (ns for each, medians of {} rounds)\n", args.rounds);
    println!(
        "{:<12} {:>8} {:>9} {:>9} {:>9} {:>11} {:>11} {:>12}",
        "bytes", "threads", "copies", "sockets", "switch", "x sockets", "frames/s", "GB/s"
    );
    let mem = memory()?;
    let view = mem.view();
    let mut lines = Vec::new();
    for threads in [1, 2] {
        for (name, len, undone) in sizes()? {
            if args.wants(name) {
                lines.push(line(args, &view, threads, (name, len, &undone))?);
            }
        }
    }
    println!();
    Ok(lines.into())
}

fn line(
    args: &Args,
    view: &MemoryView,
    threads: usize,
    (name, len, undone): (&str, usize, &VnetHeader),
) -> Fallible<Value> {
    let frames = if args.quick { 64 } else { (256 << 20) / (len + 8192) };
    let mut subjects = Subject::all(view, threads)?;
    let mut times: Vec<Vec<f64>> = subjects.iter().map(|_| Vec::new()).collect();
    for round in 0..=args.rounds {
        let first = usize::try_from(round)?;
        for ((who, subject), times) in subjects.iter_mut().zip(&mut times).cycle_from(first) {
            let begin = Instant::now();
            match threads {
                1 => subject.here(view, len, undone, frames),
                _ => subject.across(view, len, undone, frames),
            }
            .map_err(|error| format!("{who}: {error}"))?;
            if round > 0 {
                times.push(begin.elapsed().as_secs_f64() * 1e9 / count(frames));
            }
        }
    }
    let of = |wanted| {
        let mut all = subjects.iter().zip(&times);
        all.find(|((name, _), _)| *name == wanted).map_or(&[][..], |(_, times)| times.as_slice())
    };
    let [copies, sockets, switch] = ["copies", "sockets", "switch"].map(of);
    let ratio = rounds::ratio(sockets, switch);
    let [copies, sockets, switch] = [copies, sockets, switch].map(rounds::median);
    println!(
        "{name:<12} {threads:>8} {copies:>9.0} {sockets:>9.0} {switch:>9.0} {ratio:>11.2} {:>11.0} {:>12.2}",
        1e9 / switch,
        count(len) / switch
    );
    Ok(json!({
        "bytes": len, "threads": threads, "copies_ns": copies, "sockets_ns": sockets, "switch_ns": switch,
        "x_sockets": ratio,
    }))
}
