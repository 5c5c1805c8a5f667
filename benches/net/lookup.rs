//! What a packet costs that has nothing to say, when there are many connections: finding its connection, mostly.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use freestone_benches::disk::Random;
use freestone_benches::rounds::CycleFrom;
use freestone_benches::{Fallible, host, rounds};
use freestone_memory::MemoryView;
use freestone_net::nat::NatConfig;
use freestone_net::{Endpoint, Frame, Received, Sent, Source, VnetHeader};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::Args;
use crate::engine;
use crate::guest::{self, Guest};
use crate::smol::SmolRelay;
use crate::traffic::{self, count};

/// Packets that are given before the endpoint is told to answer.
const BATCHES: [usize; 2] = [1, 32];

/// Takes everything and does nothing: what the driver itself costs.
struct Nothing;

impl Endpoint for Nothing {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn transmit(&mut self, _: &VnetHeader, _: Frame<'_, '_>) -> Sent {
        Sent::Done
    }

    fn waiting(&mut self) -> Option<usize> {
        None
    }

    fn receive(&mut self, _: Frame<'_, '_>) -> Received {
        Received::Nothing
    }

    fn drop_next(&mut self) {}
}

/// Accepts for ever and keeps what comes.
fn server() -> Fallible<SocketAddr> {
    let listener = traffic::listen(Ipv4Addr::LOCALHOST, 0)?;
    let at = listener.local_addr()?;
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            kept.push(stream);
        }
    });
    Ok(at)
}

/// Lets this process have as many files as it may. Returns how many.
fn raise_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let want = limit.maximum.unwrap_or(65536).max(65536);
    // Only the privileged may raise the maximum.
    for maximum in [Some(want), limit.maximum] {
        if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok() {
            break;
        }
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The table.
pub fn bench(args: &Args) -> Fallible<Value> {
    host::pin(host::cpus().first().copied().unwrap_or(0))?;
    let files = raise_files();
    println!(
        "An acknowledgement that says nothing new, on any of N connections (ns, medians of {} rounds; the driver's part is `driver`)\n",
        args.rounds
    );
    println!("{:<12} {:>6} {:>10} {:>10} {:>10}", "connections", "batch", "driver", "smoltcp", "freestone");
    let mem = guest::memory()?;
    let view = mem.view();
    let mut lines = Vec::new();
    for connections in [1, 100, 1000, 8000] {
        if u64::try_from(connections)? * 2 + 100 > files {
            println!("SKIP {connections} connections: only {files} files");
            continue;
        }
        let mut subjects = subjects(&view, connections)?;
        for batch in BATCHES {
            lines.push(line(args, &mut subjects, connections, batch)?);
        }
    }
    println!();
    Ok(lines.into())
}

/// Guests with so many connections each.
fn subjects(view: &MemoryView, connections: usize) -> Fallible<Vec<(&'static str, Guest<'_>)>> {
    let server = server()?;
    let port = server.port();
    let mut driver = Guest::new(view, Box::new(Nothing), true)?;
    (0..connections).try_for_each(|_| driver.pretend(port))?;
    let relay = SmolRelay::new(port, server, connections, 2048)?;
    let mut smoltcp = Guest::new(view, Box::new(relay), true)?;
    for _ in 0..connections {
        smoltcp.connect(port)?;
    }
    let mut config = NatConfig::default();
    (config.limits.tcp_flows, config.limits.new_flows) = (connections, u32::MAX);
    let mut freestone = Guest::new(view, engine::nat(config)?, true)?;
    for _ in 0..connections {
        freestone.connect(port)?;
    }
    Ok(vec![("driver", driver), ("smoltcp", smoltcp), ("freestone", freestone)])
}

fn line(
    args: &Args,
    subjects: &mut [(&'static str, Guest<'_>)],
    connections: usize,
    batch: usize,
) -> Fallible<Value> {
    let packets = batch * if args.quick { 2 } else { 32 };
    let mut random = Random::default();
    let mut times: Vec<Vec<f64>> = subjects.iter().map(|_| Vec::new()).collect();
    for round in 0..=args.rounds {
        let any = || usize::try_from(random.below(connections as u64));
        let numbers = std::iter::repeat_with(any).take(packets).collect::<Result<Vec<_>, _>>()?;
        let first = usize::try_from(round)?;
        for ((_, guest), times) in subjects.iter_mut().zip(&mut times).cycle_from(first) {
            let begin = Instant::now();
            for numbers in numbers.chunks(batch) {
                guest.repeat(numbers)?;
            }
            if round > 0 {
                times.push(begin.elapsed().as_secs_f64() * 1e9 / count(packets));
            }
        }
    }
    let names = subjects.iter().map(|(name, _)| *name);
    let medians: Vec<_> = names.zip(times.iter().map(|times| rounds::median(times))).collect();
    let of = |wanted| medians.iter().find(|(name, _)| *name == wanted).map_or(f64::NAN, |(_, ns)| *ns);
    let [driver, smoltcp, freestone] = ["driver", "smoltcp", "freestone"].map(of);
    println!("{connections:<12} {batch:>6} {driver:>10.0} {smoltcp:>10.0} {freestone:>10.0}");
    Ok(json!({
        "connections": connections, "batch": batch, "driver_ns": driver, "smoltcp_ns": smoltcp, "freestone_ns": freestone,
    }))
}
