//! A whole machine: a guest with a virtio card in a user-mode network, in Freestone and in QEMU. Both have the same guest, which polls.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use freestone_benches::rounds::CycleFrom;
use freestone_benches::{Fallible, host, rounds};
use freestone_bus::ThreadSpawner;
use freestone_guest::NET;
use freestone_guest::net::{MAX_REQUESTS, PERIOD, Report, bytes};
use freestone_kvm::Kvm;
use freestone_memory::GuestMem;
use freestone_net::nat::{Nat, NatConfig};
use freestone_virtio::net::{Net, NetConfig};
use freestone_virtio::{Transport, VirtioPlug};
use freestone_vmm::devices::{I8042Plug, PciRootPlug, PowerPlug, SerialInput, SerialPlug};
use freestone_vmm::{MachineBuilder, Payload};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::Args;
use crate::traffic;

/// Where the guest finds the host's loopback.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Bytes of the round that tells how many there are to be in the others, and the most.
const FIRST: u64 = 4 << 20;
const MOST: u64 = 4 << 30;

/// This process is the machine: what the guest is told comes by standard input.
pub fn machine() -> Fallible<()> {
    let kvm = Kvm::open()?;
    let thread = Arc::new(ThreadSpawner::new("net0")?);
    let card = Net::new(Nat::new(NatConfig::default())?, NetConfig::new())?;
    let mut machine = MachineBuilder::new(&kvm)
        .memory(GuestMem::anonymous(64 << 20)?)
        .device(SerialPlug::com1(std::io::stdout(), Some(SerialInput::stdin()?)))
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .device(PciRootPlug::new())
        .device(VirtioPlug::new(Transport::Pci, card, "net0").spawner(thread))
        .payload(Payload::Image { bytes: NET.into(), cmdline: String::new() })
        .build()?;
    machine.run()?;
    Ok(())
}

/// A process with a machine. Between rounds it is stopped, because its guest never sleeps.
struct Vm {
    process: Child,
    tell: ChildStdin,
    lines: Receiver<String>,
}

impl Vm {
    /// Starts it and has the guest take an address.
    fn start(mut command: Command) -> Fallible<Self> {
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (tell, hear) = (process.stdin.take(), process.stdout.take());
        let (hear, (to, lines)) = (hear.ok_or("no pipe")?, channel());
        std::thread::spawn(move || {
            for line in BufReader::new(hear).lines().map_while(Result::ok) {
                if to.send(line).is_err() {
                    return;
                }
            }
        });
        let mut this = Self { process, tell: tell.ok_or("no pipe")?, lines };
        this.command("dhcp")?;
        Ok(this)
    }

    fn signal(&self, signal: Signal) -> Fallible<()> {
        let pid = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw).ok_or("no process")?;
        Ok(kill_process(pid, signal)?)
    }

    /// The answer to a command.
    fn command(&mut self, command: &str) -> Fallible<Report> {
        self.signal(Signal::CONT)?;
        writeln!(self.tell, "{command}")?;
        let report = self.answer();
        self.signal(Signal::STOP)?;
        report
    }

    fn answer(&self) -> Fallible<Report> {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(60));
            if let Some(report) = Report::parse(&line.map_err(|_| "the guest does not answer")?) {
                return Ok(report?);
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Who talks with the host's programs.
enum Way {
    /// A program of the host.
    Floor,
    Vm(Vm),
}

struct Subject {
    name: &'static str,
    way: Way,
}

fn subjects(image: &std::path::Path) -> Fallible<(Vec<Subject>, Vec<Value>)> {
    let mut freestone = Command::new(std::env::current_exe()?);
    freestone.arg("--machine");
    let qemu = |accelerator| {
        let mut qemu = Command::new("qemu-system-x86_64");
        // Without ACPI its devices are on the command line. Its PCI machines have firmware that takes long where level 0 is interpreted.
        qemu.args(["-M", "microvm,acpi=off", "-m", "64", "-accel", accelerator]);
        qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        qemu.args(["-global", "virtio-mmio.force-legacy=false", "-netdev", "user,id=net0"]);
        qemu.args(["-device", "virtio-net-device,netdev=net0", "-kernel"]).arg(image);
        qemu
    };
    let (mut all, mut skipped) = (vec![Subject { name: "floor", way: Way::Floor }], Vec::new());
    for (name, command) in
        [("freestone", freestone), ("qemu", qemu("kvm")), ("qemu, tcg", qemu("tcg,thread=multi"))]
    {
        if name == "qemu, tcg" && all.iter().any(|subject| subject.name == "qemu") {
            continue;
        }
        match Vm::start(command) {
            Ok(vm) => all.push(Subject { name, way: Way::Vm(vm) }),
            Err(error) => {
                println!("SKIP {name}: {error}");
                skipped.push(json!({ "subject": name, "skipped": error.to_string() }));
            }
        }
    }
    Ok((all, skipped))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Send,
    Receive,
    Ping,
    Connect,
}

const LINES: [(&str, &str, Kind); 4] = [
    ("guest to host", "MB/s", Kind::Send),
    ("host to guest", "MB/s", Kind::Receive),
    ("request/response", "us", Kind::Ping),
    ("connections", "1/s", Kind::Connect),
];

/// The tables.
pub fn bench(args: &Args) -> Fallible<Value> {
    if let Some(reason) = host::kvm_unusable() {
        return Err(reason.into());
    }
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("net.elf");
    std::fs::write(&image, NET)?;
    let (mut subjects, skipped) = subjects(&image)?;
    println!(
        "A guest that polls, with a virtio card in a user-mode network (medians of {} rounds of about {} ms; x is the ratio to the floor's \
         round beside, above 1 is quicker)\n",
        args.rounds, args.ms
    );
    println!(
        "{:<18} {:<10} {:>5} {:>10} {:>8} {:>14} {:>12}",
        "", "", "", "median", "x floor", "bytes a frame", "repeated"
    );
    let (echo, short) = (traffic::echo_server()?, traffic::short_server(1)?);
    let servers = Servers { echo, short, ticks: host::ticks_per_nanosecond() };
    let mut lines = Vec::new();
    for (name, unit, kind) in LINES.into_iter().filter(|(name, ..)| args.wants(name)) {
        let series = measure(args, kind, &mut subjects, servers)?;
        lines.extend(report((name, unit, kind), &subjects, &series));
    }
    println!();
    Ok(json!({ "lines": lines, "skipped": skipped }))
}

/// What a subject's rounds gave: for [`Kind::Ping`] microseconds, else so many per second.
#[derive(Debug, Default)]
struct Series {
    values: Vec<f64>,
    /// Frames that the guest sent and received with how many bytes, and what it had to say again.
    frames: u64,
    bytes: u64,
    repeated: u64,
}

fn measure(args: &Args, kind: Kind, subjects: &mut [Subject], servers: Servers) -> Fallible<Vec<Series>> {
    let mut series: Vec<Series> = subjects.iter().map(|_| Series::default()).collect();
    let mut amounts =
        vec![if matches!(kind, Kind::Send | Kind::Receive) { FIRST } else { 64 }; subjects.len()];
    for round in 0..=args.rounds {
        let first = usize::try_from(round)?;
        for ((subject, series), amount) in
            subjects.iter_mut().zip(&mut series).zip(&mut amounts).cycle_from(first)
        {
            let value = once(kind, &mut subject.way, *amount, servers, series)
                .map_err(|error| format!("{}: {error}", subject.name))?;
            if round > 0 {
                series.values.push(value);
                continue;
            }
            // It warmed up, and tells how much there is time for.
            let each = if kind == Kind::Ping { value * 1e-6 } else { 1.0 / value };
            *amount = share(args.ms, each, if kind == Kind::Ping { MAX_REQUESTS } else { MOST });
            *series = Series::default();
        }
    }
    Ok(series)
}

/// How many take so long, if one takes `each` seconds.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most MOST, at least 1")]
fn share(ms: u64, each: f64, most: u64) -> u64 {
    (Duration::from_millis(ms).as_secs_f64() / each).clamp(1.0, number(most)) as u64
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn number(value: u64) -> f64 {
    value as f64
}

/// What measurements share: servers of the host that are there all the time, and the rate of the clock.
#[derive(Debug, Clone, Copy)]
struct Servers {
    echo: SocketAddr,
    short: SocketAddr,
    /// Of the time stamp counter, in a nanosecond.
    ticks: f64,
}

/// One measurement.
fn once(kind: Kind, way: &mut Way, amount: u64, servers: Servers, series: &mut Series) -> Fallible<f64> {
    let (to, server) = serve(kind, amount, servers)?;
    let ticks = servers.ticks;
    let value = match way {
        Way::Floor => floor(kind, to, amount)?,
        Way::Vm(vm) => {
            let name = match kind {
                Kind::Send => "send",
                Kind::Receive => "receive",
                Kind::Ping => "ping",
                Kind::Connect => "connect",
            };
            let report = vm.command(&format!("{name} {GATEWAY}:{} {amount}", to.port()))?;
            let get = |name| report.get(name).ok_or_else(|| format!("no {name} in {report:?}"));
            series.frames += get(if kind == Kind::Receive { "received" } else { "sent" })?;
            series.bytes += amount;
            series.repeated += report.get("repeated").unwrap_or(0);
            match kind {
                Kind::Ping => number(get("median")?) / ticks * 1e-3,
                _ => number(amount) / (number(get("ticks")?) / ticks * 1e-9),
            }
        }
    };
    if let Some(server) = server {
        server.join().map_err(|_| "the server failed")??;
    }
    Ok(value)
}

/// A server of the host, and what is there to wait for.
type Server = (SocketAddr, Option<JoinHandle<std::io::Result<()>>>);

fn serve(kind: Kind, amount: u64, servers: Servers) -> Fallible<Server> {
    let listener = match kind {
        Kind::Ping => return Ok((servers.echo, None)),
        Kind::Connect => return Ok((servers.short, None)),
        Kind::Send | Kind::Receive => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?,
    };
    let at = listener.local_addr()?;
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        if kind == Kind::Receive {
            send(&mut stream, amount)?;
        }
        let mut room = vec![0; traffic::CALL];
        while stream.read(&mut room)? > 0 {}
        Ok(())
    });
    Ok((at, Some(server)))
}

/// Sends so much of what the guest expects.
fn send(stream: &mut TcpStream, amount: u64) -> std::io::Result<()> {
    let period = bytes(0, PERIOD);
    let mut left = amount;
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(PERIOD).min(PERIOD);
        stream.write_all(period.get(..n).unwrap_or_default())?;
        left -= u64::try_from(n).unwrap_or(left);
    }
    Ok(())
}

/// The guest's work, by a program of the host.
fn floor(kind: Kind, to: SocketAddr, amount: u64) -> Fallible<f64> {
    let begin = Instant::now();
    let per_second = |begin: Instant| number(amount) / begin.elapsed().as_secs_f64();
    let mut byte = [bytes(0, 1).first().copied().unwrap_or_default()];
    if kind == Kind::Connect {
        for _ in 0..amount {
            let mut stream = TcpStream::connect(to)?;
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            stream.read_exact(&mut byte).err().ok_or("an answer that nobody asked for")?;
        }
        return Ok(per_second(begin));
    }
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let begin = Instant::now();
    match kind {
        Kind::Send => {
            send(&mut stream, amount)?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_exact(&mut byte).err().ok_or("an answer that nobody asked for")?;
        }
        Kind::Receive => {
            let (mut room, mut left) = (vec![0; traffic::CALL], amount);
            while left > 0 {
                left -= match stream.read(&mut room)? {
                    0 => return Err("the end came early".into()),
                    n => u64::try_from(n)?,
                };
            }
            stream.shutdown(Shutdown::Write)?;
            stream.read_exact(&mut byte).err().ok_or("more came than was asked for")?;
        }
        Kind::Ping | Kind::Connect => {
            let mut times = Vec::new();
            for _ in 0..amount {
                let begin = Instant::now();
                stream.write_all(&byte)?;
                stream.read_exact(&mut byte)?;
                times.push(begin.elapsed().as_secs_f64() * 1e6);
            }
            return Ok(rounds::median(&times));
        }
    }
    Ok(per_second(begin))
}

fn report((name, unit, kind): (&str, &str, Kind), subjects: &[Subject], series: &[Series]) -> Vec<Value> {
    let Some(floor) = series.first() else { return Vec::new() };
    let mut out = Vec::new();
    for (subject, series) in subjects.iter().zip(series) {
        let ratio = rounds::ratio(&series.values, &floor.values);
        let ratio = if kind == Kind::Ping { 1.0 / ratio } else { ratio };
        let scale = if matches!(kind, Kind::Send | Kind::Receive) { 1e-6 } else { 1.0 };
        let median = scale * rounds::median(&series.values);
        let frame = series.bytes.checked_div(series.frames).filter(|_| scale < 1.0).unwrap_or(0);
        let Series { repeated, .. } = series;
        println!(
            "{name:<18} {:<10} {unit:>5} {median:>10.0} {ratio:>8.2} {frame:>14} {repeated:>12}",
            subject.name
        );
        out.push(json!({
            "line": name, "subject": subject.name, "unit": unit, "median": median, "x_floor": ratio,
            "bytes_per_frame": frame, "repeated": repeated,
        }));
    }
    out
}
