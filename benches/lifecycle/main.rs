//! Creating, pausing, saving, restoring, forking and moving a machine, beside raw KVM and the bare host. See the README.

mod exec;
mod guest;
mod pause;
mod rows;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::Ordering;

use clap::Parser;
use freestone_benches::rounds::CycleFrom;
use freestone_benches::{CommonArgs, Fallible, host, observe, rounds as statistics};
use serde_json::{Value, json};

use rows::{Places, Row};

/// Measure a machine's life, beside raw KVM.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// How often each is done; the medians are printed. Rows that take long are done a quarter as often.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,

    /// Only rows whose names have this in them. May be repeated.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,

    /// Only see whether everything runs.
    #[arg(long)]
    quick: bool,

    /// Do not count system calls.
    #[arg(long)]
    no_calls: bool,

    /// A folder on a disk.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    folder: PathBuf,

    /// The `freestone` to measure; without one, the rows from exec on are left out.
    #[arg(long, value_name = "FILE", env = "FREESTONE_BENCH_BINARY")]
    freestone: Option<PathBuf>,

    /// Do one thing with marks for strace around it.
    #[arg(long, hide = true)]
    once: Option<String>,
}

const MEMORY: &str = "/dev/shm";

fn main() -> ExitCode {
    let outcome = match exec::asked() {
        Some(outcome) => outcome,
        None => {
            let args = Args::parse();
            if args.common.list { Ok(()) } else { bench(&args) }
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lifecycle: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Fallible<()> {
    if let Some(reason) = host::kvm_unusable() {
        println!("SKIP lifecycle: {reason}");
        return args.common.write_json(&json!({ "bench": "lifecycle", "skipped": reason }));
    }
    let tmpfs = if Path::new(MEMORY).is_dir() { PathBuf::from(MEMORY) } else { std::env::temp_dir() };
    let places = Places { tmpfs, disk: args.folder.clone() };
    if let Some(name) = &args.once {
        return once(name, &places);
    }
    let wanted =
        |name: &str| args.only.is_empty() || args.only.iter().any(|only| name.contains(only.as_str()));
    let rounds = if args.quick { 2 } else { args.rounds };
    println!(
        "Microseconds, medians of up to {rounds} rounds; x is the ratio to the floor of the same round\n"
    );
    println!(
        "{:<46} {:<18} {:>11} {:>11} {:>7} {:>7} {:>6}",
        "", "", "median", "10th of 100", "x", "best x", "calls"
    );
    let mut results = Vec::new();
    // First of all, while no other row has left memory to use again.
    if wanted("private memory of a fork") {
        let (made, ran) = rows::private_memory(if args.quick { 4 } else { 100 })?;
        println!(
            "private memory of a fork, KiB: {made:.0} before it runs, {ran:.0} after its first instruction"
        );
        results.push(json!({ "row": "private memory of a fork", "made_kib": made, "ran_kib": ran }));
    }
    for row in rows::rows() {
        if wanted(&row.name) {
            results.push(measure(&row, &places, args, rounds)?);
        }
    }
    match &args.freestone {
        Some(binary) if wanted("exec") => results.extend(exec::measure(binary, rounds)?),
        None if wanted("exec") => println!("SKIP from exec: give --freestone FILE"),
        _ => {}
    }
    args.common.write_json(&json!({ "bench": "lifecycle", "rows": results }))
}

fn measure(row: &Row, places: &Places, args: &Args, rounds: u32) -> Fallible<Value> {
    let failed = |error| format!("{}: {error}", row.name);
    let mut subjects = row.make(places).map_err(failed)?;
    let mut series = vec![Vec::new(); subjects.len()];
    let rounds = (rounds / row.slow).max(2);
    for round in 0..=rounds {
        for (at, (name, subject)) in subjects.iter_mut().enumerate().cycle_from(round as usize) {
            let micros = subject().map_err(|error| format!("{}, {name}: {error}", row.name))?;
            // The first round brings everything into memory.
            if let (1.., Some(values)) = (round, series.get_mut(at)) {
                values.push(micros);
            }
        }
    }
    let names: Vec<_> = subjects.iter().map(|(name, _)| *name).collect();
    drop(subjects);
    let floor = series.first().cloned().unwrap_or_default();
    let mut lines = Vec::new();
    for (at, (name, values)) in names.iter().zip(&series).enumerate() {
        let calls = if args.no_calls || args.quick { None } else { calls(&row.name, name, args)? };
        let (median, low) = (statistics::median(values), statistics::percentile(values, 10));
        let ratio = statistics::ratio(values, &floor);
        let best = low / statistics::percentile(&floor, 10);
        println!(
            "{:<46} {name:<18} {median:>11.0} {low:>11.0} {ratio:>7.2} {best:>7.2} {:>6}",
            if at == 0 { row.name.as_str() } else { "" },
            calls.map_or("-".to_owned(), |calls| calls.to_string()),
        );
        lines.push(json!({
            "subject": name, "median_us": median, "p10_us": low, "ratio": ratio, "best_ratio": best, "calls": calls,
        }));
    }
    Ok(json!({ "row": row.name, "subjects": lines }))
}

/// Does one subject of one row, warm, with marks around it.
fn once(name: &str, places: &Places) -> Fallible<()> {
    let (row, subject) = name.split_once('/').ok_or("--once ROW/SUBJECT")?;
    let row = rows::rows().into_iter().find(|other| other.name == row).ok_or("no such row")?;
    let mut subjects = row.make(places)?;
    let (_, subject) = subjects.iter_mut().find(|(other, _)| *other == subject).ok_or("no such subject")?;
    subject()?;
    guest::MARKED.store(true, Ordering::SeqCst);
    subject()?;
    guest::MARKED.store(false, Ordering::SeqCst);
    Ok(())
}

/// System calls of one subject between its marks; `None` without strace.
fn calls(row: &str, subject: &str, args: &Args) -> Fallible<Option<usize>> {
    let dir = tempfile::tempdir()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--folder").arg(&args.folder).arg("--once").arg(format!("{row}/{subject}"));
    observe::marked_calls(&command, &dir.path().join("strace.log"))
}
