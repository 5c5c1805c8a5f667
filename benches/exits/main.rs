//! What an exit costs: raw KVM beside the whole way through Freestone, and the dispatcher alone. See the README.

mod devices;
mod raw;
mod scripted;
mod whole;

use clap::Parser;
use freestone_benches::{CommonArgs, Fallible, host, rounds};
use freestone_guest::exits::{Command, Operation};
use serde_json::{Value, json};

use crate::devices::{FREE_PORT, LOCKED_MMIO, LOCKED_PORT, MMIO, PORT};
use crate::raw::Raw;
use crate::whole::Whole;

/// Measure what exits cost, beside raw KVM.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Rounds of each measurement; the medians are printed.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,

    /// Operations in a round.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    count: u32,

    /// Processor to run the vCPU on [default: the last one this process may use].
    #[arg(long, value_name = "CPU")]
    cpu: Option<usize>,
}

/// What runs the guest.
trait Subject {
    /// Tells the guest what to do next.
    fn command(&mut self, command: Command) -> Fallible<()>;

    /// Lets the guest do it.
    fn round(&mut self) -> Fallible<()>;
}

/// A kind of exit.
struct Kind {
    name: &'static str,
    operation: Operation,
    /// Port or address of the device.
    address: u64,
    /// Port or address of its form behind a lock.
    locked: u64,
    /// How many exits an operation may be, at most.
    accesses: u32,
}

const fn kind(name: &'static str, operation: Operation, address: u64, locked: u64) -> Kind {
    let accesses = if matches!(operation, Operation::StringOut) { 64 } else { 1 };
    Kind { name, operation, address, locked, accesses }
}

const KINDS: [Kind; 6] = [
    kind("PIO out", Operation::PortOut, PORT as u64, LOCKED_PORT as u64),
    kind("PIO in", Operation::PortIn, PORT as u64, LOCKED_PORT as u64),
    kind("MMIO write", Operation::MmioWrite, MMIO, LOCKED_MMIO),
    kind("MMIO read", Operation::MmioRead, MMIO, LOCKED_MMIO),
    kind("string out, 64 bytes", Operation::StringOut, PORT as u64, LOCKED_PORT as u64),
    kind("bare exit, no device", Operation::PortOut, FREE_PORT as u64, FREE_PORT as u64),
];

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if args.common.list {
        return std::process::ExitCode::SUCCESS;
    }
    match bench(&args) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exits: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Fallible<()> {
    let scripted = dispatcher_alone()?;
    let kvm = match host::kvm_unusable() {
        Some(reason) => {
            println!("SKIP exits: {reason}");
            json!({ "skipped": reason })
        }
        None => beside_raw_kvm(args)?,
    };
    args.common.write_json(&json!({ "bench": "exits", "dispatcher": scripted, "kvm": kvm }))
}

fn dispatcher_alone() -> Fallible<Value> {
    /// Rounds of each case.
    const ROUNDS: usize = 15;
    println!("From exit to device and back, without a hypervisor (ns per exit, median of {ROUNDS} rounds)\n");
    println!("{:<26} {:>10} {:>10}", "", "1 thread", "2 threads");
    let two = host::cpus().len() >= 2;
    let mut results = Vec::new();
    for case in scripted::CASES {
        let alone = scripted::measure(case, 1, ROUNDS)?;
        let both = if two { scripted::measure(case, 2, ROUNDS)? } else { f64::NAN };
        println!("{:<26} {alone:>10.1} {both:>10.1}", case.name);
        results.push(json!({ "case": case.name, "ns_1_thread": alone, "ns_2_threads": both }));
    }
    println!();
    Ok(Value::Array(results))
}

/// Nanoseconds per operation of each round, for each subject.
#[derive(Default)]
struct Series {
    floor: Vec<f64>,
    again: Vec<f64>,
    free: Vec<f64>,
    locked: Vec<f64>,
}

fn beside_raw_kvm(args: &Args) -> Fallible<Value> {
    let cpu = args.cpu.or_else(|| host::cpus().last().copied()).unwrap_or(0);
    host::pin(cpu).map_err(|e| format!("cannot run on processor {cpu}: {e}"))?;
    let (mut floor, mut again, mut whole) = (Raw::new()?, Raw::new()?, Whole::new()?);
    println!(
        "Through KVM, on processor {cpu} (ns per operation, medians of {} rounds of {}; ratios to the floor's round beside)\n",
        args.rounds, args.count
    );
    println!(
        "{:<26} {:>10} {:>10} {:>9} {:>9} {:>9}",
        "", "floor", "freestone", "ratio", "Mutex", "floor/floor"
    );
    let mut results = Vec::new();
    for level_0 in [false, true] {
        let level = if level_0 { 0 } else { 3 };
        let mut series: [Series; KINDS.len()] = Default::default();
        for round in 0..=args.rounds {
            for (kind, series) in KINDS.iter().zip(&mut series) {
                let of = |address| Command {
                    operation: kind.operation,
                    level_0,
                    count: (args.count / kind.accesses).max(1).into(),
                    address,
                };
                let (command, locked) = (of(kind.address), of(kind.locked));
                let mut subjects: [(&mut dyn Subject, Command, &mut Vec<f64>); 3] = [
                    (&mut floor, command, &mut series.floor),
                    (&mut whole, command, &mut series.free),
                    (&mut again, command, &mut series.again),
                ];
                // Nobody is always first.
                subjects.rotate_left(round as usize % 3);
                for (subject, command, values) in subjects {
                    measure(subject, command, values)?;
                }
                measure(&mut whole, locked, &mut series.locked)?;
                if round == 0 {
                    // It warmed the caches.
                    *series = Series::default();
                }
            }
        }
        for (kind, series) in KINDS.iter().zip(&series) {
            results.push(report(kind.name, level, series));
        }
    }
    println!();
    Ok(Value::Array(results))
}

fn measure(subject: &mut dyn Subject, command: Command, values: &mut Vec<f64>) -> Fallible<()> {
    subject.command(command)?;
    let begin = host::thread_time();
    subject.round()?;
    let elapsed = host::thread_time() - begin;
    // The guest's call of the done port is one operation more.
    let operations = u32::try_from(command.count)?.saturating_add(1);
    values.push(elapsed / f64::from(operations));
    Ok(())
}

fn report(name: &str, level: u8, series: &Series) -> Value {
    let (floor, free) = (rounds::median(&series.floor), rounds::median(&series.free));
    let ratio = |values: &[f64]| rounds::ratio(values, &series.floor);
    let (ratio, locked, noise) = (ratio(&series.free), ratio(&series.locked), ratio(&series.again));
    let label = format!("{name}, CPL{level}");
    println!("{label:<26} {floor:>10.0} {free:>10.0} {ratio:>9.3} {locked:>9.3} {noise:>9.3}");
    json!({
        "kind": name, "cpl": level, "floor_ns": floor, "freestone_ns": free, "ratio": ratio, "mutex_ratio": locked,
        "floor_to_floor_ratio": noise, "floor_p10_ns": rounds::percentile(&series.floor, 10),
        "freestone_p10_ns": rounds::percentile(&series.free, 10),
    })
}
