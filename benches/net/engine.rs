//! The NAT's engine without a card and without a kernel on the guest's side: what a frame costs, beside the same bytes through a
//! TCP connection of the host, and beside a relay on smoltcp.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::mpsc;
use std::time::Instant;

use freestone_benches::rounds::CycleFrom;
use freestone_benches::{Fallible, host, rounds};
use freestone_memory::MemoryView;
use freestone_net::nat::{Nat, NatConfig};
use freestone_net::{Endpoint, Port, Setup};
use serde_json::{Value, json};

use crate::Args;
use crate::guest::{self, DATA, Guest};
use crate::smol::SmolRelay;
use crate::traffic::{self, CALL, count};

/// Buffers of a connection of smoltcp.
const SMOL_BUFFER: usize = 512 << 10;

/// The host's program: reads all it gets, and sends so many bytes whenever it is told.
struct Server {
    at: SocketAddr,
    orders: mpsc::Sender<usize>,
}

impl Server {
    fn start(cpu: usize) -> Fallible<Self> {
        let listener = traffic::listen(Ipv4Addr::LOCALHOST, 0)?;
        let at = listener.local_addr()?;
        let (orders, todo) = mpsc::channel::<usize>();
        std::thread::spawn(move || -> std::io::Result<()> {
            host::pin(cpu)?;
            let (mut stream, _) = listener.accept()?;
            let mut reader = stream.try_clone()?;
            std::thread::spawn(move || {
                let mut data = vec![0; CALL];
                while reader.read(&mut data).is_ok_and(|n| n > 0) {}
            });
            let data = vec![0x5A; CALL];
            for bytes in todo {
                let mut left = bytes;
                while left > 0 {
                    let n = left.min(data.len());
                    stream.write_all(data.get(..n).unwrap_or_default())?;
                    left -= n;
                }
            }
            Ok(())
        });
        Ok(Self { at, orders })
    }
}

/// One way for the bytes.
enum Way<'m> {
    /// A connection of the host, with buffers that take turns as the guest's do.
    Floor(TcpStream, Vec<u8>),
    Guest(Guest<'m>, usize),
}

impl Way<'_> {
    fn send(&mut self, frames: usize) -> Fallible<()> {
        match self {
            Self::Floor(stream, data) => {
                for buffer in data.chunks_exact(DATA).cycle().take(frames) {
                    stream.write_all(buffer)?;
                }
                Ok(())
            }
            Self::Guest(guest, connection) => guest.send(*connection, frames),
        }
    }

    fn receive(&mut self, bytes: usize) -> Fallible<()> {
        match self {
            Self::Floor(stream, data) => {
                let mut left = bytes;
                while left > 0 {
                    let room = data.get_mut(..left.min(CALL)).unwrap_or_default();
                    left -= match stream.read(room)? {
                        0 => return Err("closed".into()),
                        n => n,
                    };
                }
                Ok(())
            }
            Self::Guest(guest, connection) => guest.receive(*connection, bytes),
        }
    }
}

struct Subject<'m> {
    name: &'static str,
    server: Server,
    way: Way<'m>,
}

/// Wall clock and processor time of a frame, in nanoseconds.
#[derive(Default)]
struct Series {
    wall: Vec<f64>,
    processor: Vec<f64>,
}

/// The tables.
pub fn bench(args: &Args) -> Fallible<Value> {
    let cpus = host::cpus();
    let [ours, .., theirs] = *cpus.as_slice() else { return Err("needs two processors".into()) };
    host::pin(ours)?;
    let mem = guest::memory()?;
    let view = mem.view();
    let frames: usize = if args.quick { 64 } else { 1024 };
    println!(
        "Frames with {DATA} bytes of data (ns for each, medians of {} rounds of {frames}; ratios to the floor beside)\n",
        args.rounds
    );
    println!(
        "{:<16} {:<10} {:>9} {:>9} {:>8} {:>8} {:>8} {:>7}",
        "", "", "ns", "cpu ns", "GB/s", "x wall", "x cpu", "waits"
    );
    let mut lines = Vec::new();
    for to_guest in [false, true] {
        let name = if to_guest { "host to guest" } else { "guest to host" };
        if args.wants(name) {
            let mut subjects = subjects(&view, theirs)?;
            let series = measure(args, &mut subjects, frames, to_guest)?;
            lines.extend(report(name, &mut subjects, &series));
        }
    }
    println!();
    Ok(json!({ "frames": lines }))
}

fn subjects(view: &MemoryView, cpu: usize) -> Fallible<Vec<Subject<'_>>> {
    let server = Server::start(cpu)?;
    let stream = TcpStream::connect(server.at)?;
    let mut all = vec![Subject { name: "floor", server, way: Way::Floor(stream, vec![0x5A; 16 * DATA]) }];
    let server = Server::start(cpu)?;
    let relay = SmolRelay::new(server.at.port(), server.at, 1, SMOL_BUFFER)?;
    all.push(behind("smoltcp", view, server, Box::new(relay), false)?);
    all.push(behind("freestone", view, Server::start(cpu)?, nat(NatConfig::default())?, true)?);
    Ok(all)
}

/// The endpoint of a NAT. It keeps what it needs of the port.
pub fn nat(config: NatConfig) -> Fallible<Box<dyn Endpoint>> {
    let mut nat = Nat::new(config)?;
    let receive = nat.info().receive;
    nat.open(&Setup { pairs: 1, receive })?.pop().ok_or_else(|| "a NAT without an endpoint".into())
}

fn behind<'m>(
    name: &'static str,
    view: &'m MemoryView,
    server: Server,
    endpoint: Box<dyn Endpoint>,
    segments: bool,
) -> Fallible<Subject<'m>> {
    let mut guest = Guest::new(view, endpoint, segments)?;
    let connection = guest.connect(server.at.port())?;
    Ok(Subject { name, server, way: Way::Guest(guest, connection) })
}

fn measure(
    args: &Args,
    subjects: &mut [Subject<'_>],
    frames: usize,
    to_guest: bool,
) -> Fallible<Vec<Series>> {
    let mut series: Vec<Series> = subjects.iter().map(|_| Series::default()).collect();
    for round in 0..=args.rounds {
        let first = usize::try_from(round)?;
        for (subject, series) in subjects.iter_mut().zip(&mut series).cycle_from(first) {
            let (begin, processor) = (Instant::now(), host::thread_time());
            if to_guest {
                subject.server.orders.send(frames * DATA)?;
                subject.way.receive(frames * DATA)
            } else {
                subject.way.send(frames)
            }
            .map_err(|error| format!("{}: {error}", subject.name))?;
            if round > 0 {
                series.wall.push(begin.elapsed().as_secs_f64() * 1e9 / count(frames));
                series.processor.push((host::thread_time() - processor) / count(frames));
            }
        }
    }
    Ok(series)
}

fn report(line: &str, subjects: &mut [Subject<'_>], series: &[Series]) -> Vec<Value> {
    let mut out = Vec::new();
    let Some(floor) = series.first() else { return out };
    for (subject, series) in subjects.iter().zip(series) {
        let (wall, processor) = (rounds::median(&series.wall), rounds::median(&series.processor));
        let ratios =
            [rounds::ratio(&series.wall, &floor.wall), rounds::ratio(&series.processor, &floor.processor)];
        let [x_wall, x_processor] = ratios;
        let waits = match &subject.way {
            Way::Floor(..) => 0,
            Way::Guest(guest, _) => guest.waits,
        };
        let rate = count(DATA) / wall;
        println!(
            "{line:<16} {:<10} {wall:>9.0} {processor:>9.0} {rate:>8.2} {x_wall:>8.2} {x_processor:>8.2} {waits:>7}",
            subject.name
        );
        out.push(json!({
            "line": line, "subject": subject.name, "ns": wall, "processor_ns": processor, "gb_per_s": rate,
            "x_wall": x_wall, "x_processor": x_processor, "waits": waits,
        }));
    }
    out
}
