//! What the I/O engines of disk images cost, beside bare system calls and a bare io_uring. See the README.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use freestone_benches::disk::{BLOCK, Batch, Calls, Random, Ring};
use freestone_benches::rounds::CycleFrom;
use freestone_benches::{CommonArgs, Fallible, rounds};
use freestone_block::{Engine, Image, IoQueue, Op, RawOptions, Submitted};
use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use serde_json::{Value, json};

/// Measure the I/O engines of disk images, beside bare system calls and a bare io_uring.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Rounds of each measurement; the medians are printed.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,

    /// Requests in a round.
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(32..=10_000_000))]
    count: u32,

    /// Size of the image in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65536))]
    size: u32,

    /// Folder on a disk [default: the folder for temporary files].
    #[arg(long, value_name = "DIR")]
    disk: Option<PathBuf>,

    /// A few short rounds on a small image: to see that it works.
    #[arg(long)]
    quick: bool,
}

/// A queue of ours with its guest memory.
struct Queue {
    queue: Box<dyn IoQueue>,
    mem: GuestMem,
    write: bool,
}

impl Queue {
    fn new(image: &Arc<dyn Image>, engine: Engine, depth: usize, write: bool) -> Fallible<Self> {
        let queue = Arc::clone(image).open_queue(engine, u16::try_from(depth)?)?;
        let mem = GuestMem::anonymous(u64::try_from(depth * BLOCK)?)?;
        Ok(Self { queue, mem, write })
    }
}

impl Batch for Queue {
    fn batch(&mut self, offsets: &[u64]) -> Fallible<()> {
        let view = self.mem.view();
        for (tag, offset) in (0..).zip(offsets) {
            let bufs = [view.get_slice(GuestAddress(tag * BLOCK as u64), BLOCK)?];
            let op = match self.write {
                true => Op::Write { bufs: &bufs, offset: *offset },
                false => Op::Read { bufs: &bufs, offset: *offset },
            };
            if let Submitted::Done(result) = self.queue.submit(tag, &view, op) {
                result?;
            }
        }
        self.queue.commit()?;
        let mut failed = None;
        while self.queue.in_flight() > 0 {
            self.queue.wait()?;
            self.queue.reap(&mut |_, result| failed = failed.take().or(result.err()));
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }
}

/// Where the image is.
struct Place {
    name: &'static str,
    path: PathBuf,
    direct: bool,
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if args.common.list {
        return std::process::ExitCode::SUCCESS;
    }
    match bench(args) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("block: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn bench(mut args: Args) -> Fallible<()> {
    if args.quick {
        (args.rounds, args.count, args.size) = (args.rounds.min(3), args.count.min(128), args.size.min(8));
    }
    let disk = match &args.disk {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let memory = tempfile::tempdir_in("/dev/shm");
    let mut places = Vec::new();
    match &memory {
        Ok(folder) => {
            places.push(Place { name: "tmpfs", path: folder.path().join("disk.raw"), direct: false })
        }
        Err(error) => println!("SKIP tmpfs: {error}"),
    }
    let path = disk.path().join("disk.raw");
    places.push(Place { name: "disk, cached", path: path.clone(), direct: false });
    places.push(Place { name: "disk, direct", path, direct: true });
    println!(
        "4 KiB at random places of {} MiB (ns per request, medians of {} rounds of {}; ratios to the floor's round beside)\n",
        args.size, args.rounds, args.count
    );
    println!(
        "{:<26} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8}",
        "", "calls", "io_uring", "sync", "uring", "auto", "sync/c", "uring/u", "auto/min"
    );
    let mut results = Vec::new();
    for place in &places {
        create(&place.path, args.size)?;
        for write in [false, true] {
            for depth in [1, 32] {
                match measure(&args, place, write, depth) {
                    Ok(result) => results.push(result),
                    Err(error) => {
                        println!("SKIP {}: {error}", place.name);
                        results.push(json!({ "place": place.name, "skipped": error.to_string() }));
                    }
                }
            }
        }
    }
    println!();
    args.common.write_json(&json!({ "bench": "block", "requests": results }))
}

/// An image with something in each block, all of which is on the disk and in the page cache.
fn create(path: &Path, mib: u32) -> io::Result<()> {
    let mut file = File::create(path)?;
    let chunk = vec![0xA5; 1 << 20];
    for _ in 0..mib {
        file.write_all(&chunk)?;
    }
    file.sync_all()
}

fn measure(args: &Args, place: &Place, write: bool, depth: usize) -> Fallible<Value> {
    let flags = if place.direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&place.path)?;
    let image: Arc<dyn Image> = Arc::new(RawOptions::new().direct(place.direct).open(&place.path)?);
    let mut subjects: [Box<dyn Batch>; 5] = [
        Box::new(Calls::new(file.try_clone()?, depth, write)),
        Box::new(Ring::new(&file, depth, write)?),
        Box::new(Queue::new(&image, Engine::Sync, depth, write)?),
        Box::new(Queue::new(&image, Engine::Uring, depth, write)?),
        Box::new(Queue::new(&image, Engine::Auto, depth, write)?),
    ];
    let mut times: [Vec<f64>; 5] = Default::default();
    let mut random = Random::default();
    let count = usize::try_from(args.count)?;
    for round in 0..=args.rounds {
        let offsets = random.offsets(count, u64::from(args.size) << 20);
        let first = usize::try_from(round)? % subjects.len();
        for (subject, times) in subjects.iter_mut().zip(&mut times).cycle_from(first) {
            let begin = Instant::now();
            for offsets in offsets.chunks(depth) {
                subject.batch(offsets)?;
            }
            let elapsed = begin.elapsed().as_secs_f64() * 1e9 / f64::from(args.count);
            // The first round warms the caches.
            if round > 0 {
                times.push(elapsed);
            }
        }
        if write && !place.direct {
            // What was written is not left to be paid for by a later round.
            file.sync_data()?;
        }
    }
    Ok(report(place.name, write, depth, &times))
}

fn report(place: &str, write: bool, depth: usize, times: &[Vec<f64>; 5]) -> Value {
    let [calls, ring, sync, uring, auto] = times;
    let lower: Vec<f64> = calls.iter().zip(ring).map(|(a, b)| a.min(*b)).collect();
    let medians = times.each_ref().map(|times| rounds::median(times));
    let ratios = [rounds::ratio(sync, calls), rounds::ratio(uring, ring), rounds::ratio(auto, &lower)];
    let operation = if write { "write" } else { "read" };
    print!("{:<26}", format!("{place}, {operation}, QD{depth}"));
    medians.iter().for_each(|ns| print!(" {ns:>9.0}"));
    ratios.iter().for_each(|ratio| print!(" {ratio:>8.2}"));
    println!();
    let [calls, ring, sync, uring, auto] = medians;
    let [sync_ratio, uring_ratio, auto_ratio] = ratios;
    json!({
        "place": place, "operation": operation, "depth": depth, "floor_calls_ns": calls, "floor_uring_ns": ring,
        "sync_ns": sync, "uring_ns": uring, "auto_ns": auto, "sync_ratio": sync_ratio, "uring_ratio": uring_ratio,
        "auto_ratio": auto_ratio,
    })
}
