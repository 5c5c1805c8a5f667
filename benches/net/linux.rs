//! A Linux TCP stack as the guest: programs in a network namespace whose only card is a tap, with a NAT on the other end.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use freestone_benches::rounds::CycleFrom;
use freestone_benches::{Fallible, rounds};
use serde_json::{Value, json};

use crate::Args;
use crate::ns::{self, Agent, Namespace, Process};
use crate::traffic::{self, Task};

/// Threads of the server of short connections, and of its most demanding client.
const PARALLEL: usize = 32;

/// A way from the guest's programs to the host's.
struct Subject {
    name: &'static str,
    agent: Agent,
    /// How the agent reaches the host's loopback.
    host: Ipv4Addr,
    /// How the host reaches the agent.
    forward: SocketAddr,
    nat: Option<Process>,
    /// Dropped last.
    _namespace: Option<Namespace>,
}

impl Subject {
    /// Both programs on the host's loopback.
    fn floor() -> Fallible<Self> {
        let agent = Agent::start(None)?;
        let forward = (Ipv4Addr::LOCALHOST, agent.port).into();
        Ok(Self { name: "floor", agent, host: Ipv4Addr::LOCALHOST, forward, nat: None, _namespace: None })
    }

    /// The agent in a namespace behind the NAT that `start` starts.
    fn behind(name: &'static str, start: impl Fn(&str, SocketAddr) -> Fallible<Process>) -> Fallible<Self> {
        let namespace = Namespace::new(name)?;
        // At most 15 letters.
        let tap = format!("fb{}{}", &name.get(..1).unwrap_or_default(), std::process::id());
        let forward = ns::free_port()?;
        let nat = start(&tap, forward).map_err(|error| format!("{name}: {error}"))?;
        namespace.adopt(&tap)?;
        let agent = Agent::start(Some(&namespace))?;
        let host = Ipv4Addr::new(10, 0, 2, 2);
        let mut this = Self { name, agent, host, forward, nat: Some(nat), _namespace: Some(namespace) };
        this.warm()?;
        Ok(this)
    }

    /// Waits until a byte comes through.
    fn warm(&mut self) -> Fallible<()> {
        let echo = traffic::echo_server()?;
        let mut last = None;
        for _ in 0..3 {
            self.agent.begin(Task::Ping { to: (self.host, echo.port()).into(), ms: 1 })?;
            match self.agent.finish() {
                Ok(_) => return Ok(()),
                Err(error) => last = Some(error),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(format!("{}: nothing comes through: {}", self.name, last.ok_or("no answer")?).into())
    }
}

/// Starts a NAT that makes a tap of this name and leads this address to the agent.
type Start = fn(&str, SocketAddr) -> Fallible<Process>;

/// What is measured.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Bytes per second; the guest connects.
    Throughput { streams: usize, to_guest: bool },
    /// Bytes per second; the host connects by the forward.
    Forwarded { to_guest: bool },
    /// Median and 99th percentile of a request of one byte, in microseconds.
    Ping,
    /// Connections per second.
    Connections { threads: usize },
}

struct Line {
    name: &'static str,
    unit: &'static str,
    kind: Kind,
}

const LINES: &[Line] = &[
    Line { name: "guest to host", unit: "MB/s", kind: Kind::Throughput { streams: 1, to_guest: false } },
    Line {
        name: "guest to host, 8 streams",
        unit: "MB/s",
        kind: Kind::Throughput { streams: 8, to_guest: false },
    },
    Line { name: "host to guest", unit: "MB/s", kind: Kind::Throughput { streams: 1, to_guest: true } },
    Line {
        name: "host to guest, 8 streams",
        unit: "MB/s",
        kind: Kind::Throughput { streams: 8, to_guest: true },
    },
    Line { name: "hostfwd, to guest", unit: "MB/s", kind: Kind::Forwarded { to_guest: true } },
    Line { name: "hostfwd, to host", unit: "MB/s", kind: Kind::Forwarded { to_guest: false } },
    Line { name: "request/response", unit: "us", kind: Kind::Ping },
    Line { name: "connections", unit: "1/s", kind: Kind::Connections { threads: 1 } },
    Line { name: "connections, 32 at once", unit: "1/s", kind: Kind::Connections { threads: PARALLEL } },
];

/// Servers of the host that are there all the time.
struct Servers {
    echo: u16,
    short: u16,
}

/// What one round of one subject gave. NaN: it failed.
#[derive(Debug, Default, Clone)]
struct Series {
    /// The figure; for `Ping` the median.
    values: Vec<f64>,
    /// For `Ping` the 99th percentile.
    tails: Vec<f64>,
    /// Processors that the NAT used.
    load: Vec<f64>,
    failed: Option<String>,
}

/// All lines, with each NAT that works here.
pub fn bench(args: &Args) -> Fallible<Value> {
    println!(
        "A Linux guest's TCP through a NAT (medians of {} rounds of {} ms; ratios to the round beside, above 1 is quicker)\n",
        args.rounds, args.ms
    );
    let servers =
        Servers { echo: traffic::echo_server()?.port(), short: traffic::short_server(PARALLEL)?.port() };
    let mut subjects = vec![Subject::floor()?];
    let starts: [(_, Start); 2] = [("slirp", ns::slirp), ("freestone", ns::freestone)];
    let mut skipped = Vec::new();
    for (name, start) in starts {
        match Subject::behind(name, start) {
            Ok(subject) => subjects.push(subject),
            Err(error) => {
                println!("SKIP {name}: {error}");
                skipped.push(json!({ "subject": name, "skipped": error.to_string() }));
            }
        }
    }
    println!(
        "{:<26} {:>5} {:>10} {:>10} {:>10} {:>8} {:>8} {:>8} {:>8}",
        "", "", "floor", "slirp", "freestone", "x floor", "x slirp", "slirp %", "freest. %"
    );
    let mut lines = Vec::new();
    for line in LINES.iter().filter(|line| args.wants(line.name)) {
        let series = measure(args, line, &mut subjects, &servers)?;
        lines.extend(report(line, &subjects, &series));
    }
    println!();
    Ok(json!({ "lines": lines, "skipped": skipped }))
}

fn measure(args: &Args, line: &Line, subjects: &mut [Subject], servers: &Servers) -> Fallible<Vec<Series>> {
    let mut series = vec![Series::default(); subjects.len()];
    for round in 0..=args.rounds {
        let first = usize::try_from(round)?;
        for (subject, series) in subjects.iter_mut().zip(&mut series).cycle_from(first) {
            if series.failed.is_some() {
                continue;
            }
            let time = |subject: &Subject| subject.nat.as_ref().map_or(f64::NAN, Process::processor_time);
            let (begin, before) = (Instant::now(), time(subject));
            match once(line.kind, subject, servers, args.ms) {
                // The first round warms up.
                Ok(_) if round == 0 => {}
                Ok((value, tail)) => {
                    series.values.push(value);
                    series.tails.push(tail);
                    series.load.push((time(subject) - before) / begin.elapsed().as_secs_f64());
                }
                Err(error) => {
                    println!("FAILED {}, {}: {error}", line.name, subject.name);
                    series.failed = Some(error.to_string());
                }
            }
        }
    }
    Ok(series)
}

/// One measurement: the figure, and a second one that only `Ping` has.
fn once(kind: Kind, subject: &mut Subject, servers: &Servers, ms: u64) -> Fallible<(f64, f64)> {
    // Nobody is surprised by connections of a round before.
    let listener = traffic::listen(Ipv4Addr::LOCALHOST, 0)?;
    let host = subject.host;
    let to = move |port| SocketAddr::from((host, port));
    let here = listener.local_addr()?.port();
    let per_second = |values: Vec<f64>| match *values.as_slice() {
        [n, seconds] => Ok((n / seconds, f64::NAN)),
        _ => Err(format!("strange values: {values:?}")),
    };
    let mut both = |guest: Task, ours: Task, guest_first: bool| -> Fallible<_> {
        // Whoever accepts begins: with the forward that is the guest.
        subject.agent.begin(guest)?;
        let ours = ours.run(&listener);
        let theirs = subject.agent.finish();
        let (ours, theirs) = (ours?, theirs?);
        Ok(per_second(if guest_first { theirs } else { ours })?)
    };
    let forward = subject.forward;
    match kind {
        Kind::Throughput { streams, to_guest: false } => {
            both(Task::Send { to: to(here), streams, ms }, Task::Sink { streams }, false)
        }
        Kind::Throughput { streams, to_guest: true } => {
            both(Task::Receive { to: to(here), streams }, Task::Source { streams, ms }, true)
        }
        Kind::Forwarded { to_guest: true } => {
            both(Task::Sink { streams: 1 }, Task::Send { to: forward, streams: 1, ms }, true)
        }
        Kind::Forwarded { to_guest: false } => {
            both(Task::Source { streams: 1, ms }, Task::Receive { to: forward, streams: 1 }, false)
        }
        Kind::Ping => {
            subject.agent.begin(Task::Ping { to: to(servers.echo), ms })?;
            match *subject.agent.finish()?.as_slice() {
                [median, tail] => Ok((median, tail)),
                _ => Err("strange values".into()),
            }
        }
        Kind::Connections { threads } => {
            subject.agent.begin(Task::Connect { to: to(servers.short), threads, ms })?;
            Ok(per_second(subject.agent.finish()?)?)
        }
    }
}

fn report(line: &Line, subjects: &[Subject], series: &[Series]) -> Vec<Value> {
    let empty = Series::default();
    let of = |name: &str| {
        let found = subjects.iter().zip(series).find(|(subject, _)| subject.name == name);
        found.map_or(&empty, |(_, series)| series)
    };
    let all = [of("floor"), of("slirp"), of("freestone")];
    let is_ping = matches!(line.kind, Kind::Ping);
    let scale = if line.unit == "MB/s" { 1e-6 } else { 1.0 };
    let mut out = vec![print(line.name, line.unit, scale, is_ping, all.map(|s| s.values.as_slice()), all)];
    if is_ping {
        out.push(print(
            "request/response, p99",
            line.unit,
            scale,
            true,
            all.map(|s| s.tails.as_slice()),
            all,
        ));
    }
    out
}

fn print(name: &str, unit: &str, scale: f64, less: bool, values: [&[f64]; 3], all: [&Series; 3]) -> Value {
    let [floor, slirp, freestone] = values;
    let ratio = |beside| {
        let ratio = rounds::ratio(freestone, beside);
        if less { 1.0 / ratio } else { ratio }
    };
    let ratios = [ratio(floor), ratio(slirp)];
    let medians = values.map(|values| scale * rounds::median(values));
    let [_, slirp_load, load] = all.map(|series| 100.0 * rounds::median(&series.load));
    print!("{name:<26} {unit:>5}");
    medians.iter().for_each(|value| print!(" {value:>10.0}"));
    ratios.iter().for_each(|ratio| print!(" {ratio:>8.2}"));
    println!(" {slirp_load:>8.0} {load:>8.0}");
    let [floor, slirp, freestone] = medians;
    let [to_floor, to_slirp] = ratios;
    json!({
        "line": name, "unit": unit, "floor": floor, "slirp": slirp, "freestone": freestone,
        "x_floor": to_floor, "x_slirp": to_slirp, "slirp_processors": slirp_load / 100.0,
        "freestone_processors": load / 100.0,
        "failed": all.map(|series| series.failed.clone()),
    })
}
