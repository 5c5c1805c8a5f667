//! What a virtio disk costs: the device without a hypervisor, and driven by a guest. See the README.

mod guest;
mod image;
mod queue;

use clap::Parser;
use freestone_benches::{CommonArgs, Fallible, host, rounds};
use serde_json::{Value, json};

/// Measure the virtio disk, beside the same work without virtio.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Rounds of each measurement; the medians are printed.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,

    /// Requests in a round.
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = clap::value_parser!(u32).range(64..=10_000_000))]
    count: u32,

    /// Size of the image in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    size: u32,

    /// Only the lines whose names contain this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Folder for the image; one in memory is meant.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    folder: std::path::PathBuf,

    /// A few short rounds on a small image: to see that it works.
    #[arg(long)]
    quick: bool,
}

/// Where threads are kept.
#[derive(Debug, Clone, Copy)]
struct Processors {
    vcpu: usize,
    /// The event loop, and whatever has no vCPU.
    device: usize,
}

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.as_deref().is_none_or(|text| name.contains(text))
    }
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if args.common.list {
        return std::process::ExitCode::SUCCESS;
    }
    match bench(args) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blk: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn bench(mut args: Args) -> Fallible<()> {
    if args.quick {
        (args.rounds, args.count, args.size) = (args.rounds.min(3), args.count.min(512), args.size.min(8));
    }
    let folder = tempfile::tempdir_in(&args.folder)
        .map_err(|error| format!("no folder in {}: {error}", args.folder.display()))?;
    println!(
        "4 KiB at random places of {} MiB, medians of {} rounds of {} requests; ratios to the floor's round beside\n",
        args.size, args.rounds, args.count
    );
    // Asked before this thread is pinned.
    let cpus = host::cpus();
    let first = cpus.first().copied().unwrap_or(0);
    let on = Processors { vcpu: first, device: cpus.last().copied().unwrap_or(first) };
    let alone = queue::bench(&args, folder.path(), on)?;
    let guest = match host::kvm_unusable() {
        Some(reason) => {
            println!("SKIP driven by a guest: {reason}");
            json!({ "skipped": reason })
        }
        None => guest::bench(&args, folder.path(), on)?,
    };
    args.common.write_json(&json!({ "bench": "blk", "device": alone, "guest": guest }))
}

/// Bytes of a request.
const BLOCK_BYTES: f64 = 4096.0;

/// A number of ticks or kicks, of which 2^53 never come together.
#[expect(clippy::cast_precision_loss, reason = "far less than 2^53")]
fn number(value: u64) -> f64 {
    value as f64
}

/// Nanoseconds per request of each round.
type Times = Vec<f64>;

/// The head of a table.
fn head(title: &str) {
    println!("{title}\n");
    println!("{:<44} {:>8} {:>12} {:>9} {:>8} {:>8}", "", "ns", "requests/s", "MiB/s", "ratio", "kicks/k");
}

/// A line of a table: `floor` is the line it is compared with.
fn line(name: &str, times: &Times, floor: &Times, kicks: Option<f64>) -> Value {
    let (ns, ratio) = (rounds::median(times), rounds::ratio(times, floor));
    let (requests, mib) = (1e9 / ns, 1e9 / ns * BLOCK_BYTES / f64::from(1 << 20));
    let kicks_text = kicks.map_or(String::new(), |kicks| format!("{kicks:.1}"));
    println!("{name:<44} {ns:>8.0} {requests:>12.0} {mib:>9.0} {ratio:>8.2} {kicks_text:>8}");
    json!({
        "name": name, "ns": ns, "ns_p10": rounds::percentile(times, 10), "requests_per_second": requests,
        "bytes_per_second": requests * BLOCK_BYTES, "ratio": ratio, "kicks_per_thousand": kicks,
    })
}
