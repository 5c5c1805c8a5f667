//! From exec to the guest's first byte: the reference VMM beside a VMM of raw KVM calls. See the README.

mod floor;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use freestone_benches::floor::Order;
use freestone_benches::{CommonArgs, Fallible, host, observe, rounds};
use freestone_guest::start::FIRST_BYTE;
use serde_json::{Value, json};

/// Measure from exec to the guest's first byte, beside raw KVM.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Starts of each VMM; the medians are printed.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,

    /// The `freestone` to measure [default: the release build of this checkout, built now].
    #[arg(long, value_name = "FILE", env = "FREESTONE_BENCH_BINARY")]
    freestone: Option<PathBuf>,
}

/// Guest memory: what `--memory` is given, and in bytes.
const MEMORY: [(&str, u64); 2] = [("128M", 128 << 20), ("4G", 4 << 30)];

/// How long a VMM is left alone before its memory is looked at.
const SETTLE: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    if let Some(outcome) = floor::asked() {
        return finish(outcome);
    }
    let args = Args::parse();
    if args.common.list { ExitCode::SUCCESS } else { finish(bench(&args)) }
}

fn finish(outcome: Fallible<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("start: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Fallible<()> {
    if let Some(reason) = host::kvm_unusable() {
        println!("SKIP start: {reason}");
        return args.common.write_json(&json!({ "bench": "start", "skipped": reason }));
    }
    let binary = match &args.freestone {
        Some(path) => path.clone(),
        None => build()?,
    };
    let dir = tempfile::tempdir()?;
    let kernel = |name: &str, image| -> Fallible<PathBuf> {
        let path = dir.path().join(name);
        std::fs::write(&path, image)?;
        Ok(path)
    };
    let vmms = Vmms {
        binary,
        start: kernel("start", freestone_guest::START)?,
        echo: kernel("echo", freestone_guest::ECHO)?,
    };

    let times = times(args, &vmms)?;
    let calls = calls(&vmms, &dir.path().join("strace.log"))?;
    let idle = idle(&vmms)?;
    args.common.write_json(&json!({ "bench": "start", "time": times, "system_calls": calls, "idle": idle }))
}

/// Builds the reference VMM as a release, beside this bench.
fn build() -> Fallible<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--package", "freestone", "--bin", "freestone"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .map_err(|e| format!("cannot start cargo to build freestone: {e}; give --freestone FILE"))?;
    if !status.success() {
        return Err("building freestone failed; give --freestone FILE".into());
    }
    // This bench is `TARGET/release/deps/start-HASH`.
    let bench = std::env::current_exe()?;
    let path = bench.ancestors().nth(2).ok_or("this bench is in no target folder")?.join("freestone");
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("no {}; give --freestone FILE", path.display()).into())
    }
}

/// The programs to start.
struct Vmms {
    binary: PathBuf,
    start: PathBuf,
    echo: PathBuf,
}

impl Vmms {
    fn freestone(&self, kernel: &Path, memory: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.env_remove("FREESTONE_LOG").args(["run", "--memory", memory, "--kernel"]).arg(kernel);
        command
    }
}

fn times(args: &Args, vmms: &Vmms) -> Fallible<Value> {
    println!(
        "From exec to the guest's first byte (ms, medians of {} starts each, interleaved)\n",
        args.rounds
    );
    println!(
        "{:<8} {:>9} {:>11} {:>8} {:>12} {:>13} {:>20}",
        "memory", "floor", "freestone", "ratio", "best ratio", "floor/floor", "floor irqchip first"
    );
    let mut results = Vec::new();
    for (memory, bytes) in MEMORY {
        let mut series: [Vec<f64>; 4] = Default::default();
        for round in 0..=args.rounds {
            let commands = [
                floor::command(Order::MemoryFirst, bytes, &vmms.start)?,
                vmms.freestone(&vmms.start, memory),
                floor::command(Order::MemoryFirst, bytes, &vmms.start)?,
                floor::command(Order::IrqchipFirst, bytes, &vmms.start)?,
            ];
            let mut turns: Vec<_> = commands.into_iter().zip(&mut series).collect();
            // What a VMM leaves for the kernel to clean up slows the next one: nobody always follows the same.
            let first = round as usize % turns.len();
            turns.rotate_left(first);
            if round / 4 % 2 == 1 {
                turns.reverse();
            }
            for (command, values) in turns {
                let elapsed = observe::first_byte(command, FIRST_BYTE)?;
                // The first round brings the programs into memory.
                if round > 0 {
                    values.push(elapsed.as_secs_f64() * 1e3);
                }
            }
        }
        let [floor, freestone, again, late] = &series;
        let medians = series.each_ref().map(|values| rounds::median(values));
        let (ratio, noise) = (rounds::ratio(freestone, floor), rounds::ratio(again, floor));
        // On a busy host, the starts that nobody disturbed say more.
        let best = rounds::percentile(freestone, 10) / rounds::percentile(floor, 10);
        println!(
            "{memory:<8} {:>9.2} {:>11.2} {ratio:>8.3} {best:>12.3} {noise:>13.3} {:>20.2}",
            medians[0], medians[1], medians[3]
        );
        results.push(json!({
            "memory": memory, "floor_ms": medians[0], "freestone_ms": medians[1], "ratio": ratio,
            "floor_to_floor_ratio": noise, "best_tenth_ratio": best,
            "floor_irqchip_first_ms": rounds::median(late), "floor_p10_ms": rounds::percentile(floor, 10),
            "freestone_p10_ms": rounds::percentile(freestone, 10),
        }));
    }
    println!();
    Ok(Value::Array(results))
}

fn calls(vmms: &Vmms, log: &Path) -> Fallible<Value> {
    let (memory, bytes) = MEMORY[0];
    let first = char::from(FIRST_BYTE);
    let floor = observe::calls(&floor::command(Order::MemoryFirst, bytes, &vmms.start)?, log, first)?;
    let freestone = observe::calls(&vmms.freestone(&vmms.start, memory), log, first)?;
    let (Some(floor), Some(freestone)) = (floor, freestone) else {
        println!("SKIP system calls: strace is not installed\n");
        return Ok(Value::Null);
    };
    println!("{:<34} {:>9} {:>11}", "System calls (strace)", "floor", "freestone");
    println!("{:<34} {:>9} {:>11}", "to the first byte", floor.to_first_byte, freestone.to_first_byte);
    println!("{:<34} {:>9} {:>11}", "in all", floor.total, freestone.total);
    let names: Vec<String> = freestone.by_name.iter().map(|(name, n)| format!("{name} {n}")).collect();
    println!("freestone's, to the first byte: {}\n", names.join(", "));
    let json = |calls: &observe::Calls| json!({ "to_first_byte": calls.to_first_byte, "total": calls.total, "by_name": calls.by_name });
    Ok(json!({ "floor": json(&floor), "freestone": json(&freestone) }))
}

fn idle(vmms: &Vmms) -> Fallible<Value> {
    let (memory, bytes) = MEMORY[0];
    let banner = b"end with quit\r\n";
    let floor = floor::command(Order::MemoryFirst, bytes, &vmms.echo)?;
    let floor = observe::idle(floor, banner, bytes, SETTLE)?;
    let freestone = observe::idle(vmms.freestone(&vmms.echo, memory), banner, bytes, SETTLE)?;
    println!("{:<34} {:>9} {:>11}", "While the guest waits for input", "floor", "freestone");
    println!("{:<34} {:>9} {:>11}", "Pss without guest memory, KiB", floor.pss_kib, freestone.pss_kib);
    println!("{:<34} {:>9} {:>11}", "of it private, KiB", floor.private_kib, freestone.private_kib);
    println!("{:<34} {:>9} {:>11}", "threads", floor.threads, freestone.threads);
    let json = |idle: observe::Idle| json!({ "pss_kib": idle.pss_kib, "private_kib": idle.private_kib, "threads": idle.threads });
    Ok(json!({ "floor": json(floor), "freestone": json(freestone) }))
}
