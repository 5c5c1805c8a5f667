//! The Linux guest's part: each round counts, verifies and writes memory and files, has two echoes, and looks at the clocks.

use std::fs::{self, File};
use std::io::{BufRead, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use freestone_guest::life::{MAX_SECTORS, SECTOR, mix, record, record_of};
use vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use super::MESSAGE;

/// An answer that takes longer is lost, as the connection then is.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a server may be away.
const AWAY_LIMIT: u32 = 300;
/// Every so many rounds a whole file is written and another one is read, past the cache.
const FILE_EVERY: u64 = 16;
/// Bytes of such a file.
const FILE: usize = 64 << 10;
/// Words of a page, of which one in eight is written in each round.
const PAGE: usize = 512;
const PART: u64 = 8;

/// What the guest does.
#[derive(Debug, Args)]
pub struct Options {
    /// Directory for files, on a file system of the disk under test.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Port of the host's vsock echo server.
    #[arg(long)]
    vsock: Option<u32>,
    /// A TCP echo server.
    #[arg(long)]
    tcp: Option<SocketAddr>,
    /// Rounds to the end, unless it comes before.
    #[arg(long, default_value_t = u64::MAX)]
    rounds: u64,
    /// Rounds from line to line.
    #[arg(long, default_value_t = 1)]
    every: u64,
    /// MiB of the working set.
    #[arg(long, default_value_t = 8)]
    memory: usize,
}

/// Lives until the end.
pub fn run(options: &Options) -> Result<()> {
    match live(options) {
        Ok(round) => {
            println!("GUEST life done {round}");
            Ok(())
        }
        Err(error) => {
            println!("GUEST LIFE BAD {error:#}");
            Err(error)
        }
    }
}

fn live(options: &Options) -> Result<u64> {
    let end = listen_for_the_end();
    let other = Other::start();
    let mut memory = Memory::new(options.memory << 20);
    let mut files = options.dir.as_deref().map(Files::new).transpose()?;
    let mut talkers = Vec::new();
    if let Some(port) = options.vsock {
        talkers.push(Talker::new("vsock", move || {
            let stream = VsockStream::connect(&VsockAddr::new(VMADDR_CID_HOST, port))?;
            stream.set_read_timeout(Some(ANSWER_LIMIT))?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        }));
    }
    if let Some(at) = options.tcp {
        talkers.push(Talker::new("tcp", move || {
            let stream = TcpStream::connect_timeout(&at, ANSWER_LIMIT)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER_LIMIT))?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        }));
    }
    println!("GUEST life begins memory={} talkers={}", options.memory << 10, talkers.len());
    let (mut hash, mut clocks, mut round) = (0, Clocks::new(), 0);
    while round < options.rounds && !end.load(Ordering::Acquire) {
        round += 1;
        let read = memory.round(round)?;
        if let Some(files) = &mut files {
            files.round(round, hash).with_context(|| format!("files in round {round}"))?;
        }
        for talker in &mut talkers {
            talker.say(round, hash)?;
        }
        let time = clocks.read()?;
        hash = mix(hash ^ read ^ round);
        if round.is_multiple_of(options.every.max(1)) {
            let told: String =
                talkers.iter().map(|talker| format!(" {}={}", talker.name, talker.answers)).collect();
            let lost: u64 = talkers.iter().map(|talker| talker.lost).sum();
            let disk = files.as_ref().map_or_else(String::new, |_| format!(" disk={round}"));
            println!(
                "GUEST life {round} hash={hash:016x}{disk}{told} lost={lost} second={} {time} random={}",
                other.rounds()?,
                random()?
            );
        }
    }
    Ok(round)
}

/// Becomes true when standard input says `end`.
fn listen_for_the_end() -> Arc<AtomicBool> {
    let end = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&end);
    thread::spawn(move || {
        let lines = std::io::stdin().lock().lines();
        for line in lines.map_while(Result::ok) {
            if line.contains("end") {
                told.store(true, Ordering::Release);
                return;
            }
        }
    });
    end
}

/// A working set of which one page in eight is written in a round, as in the built-in guest.
struct Memory(Vec<u64>);

fn word(round: u64, page: u64, word: u64) -> u64 {
    let stamp = round.saturating_sub((round + page) % PART);
    mix(stamp.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ page << 48)
        .wrapping_add(word.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

impl Memory {
    fn new(bytes: usize) -> Self {
        let mut this = Self(vec![0; bytes / 8 / PAGE * PAGE]);
        this.pages()
            .for_each(|(page, words)| words.iter_mut().zip(0..).for_each(|(w, i)| *w = word(0, page, i)));
        this
    }

    fn pages(&mut self) -> impl Iterator<Item = (u64, &mut [u64])> {
        (0..).zip(self.0.chunks_exact_mut(PAGE))
    }

    fn round(&mut self, round: u64) -> Result<u64> {
        let mut hash = round;
        for (page, words) in self.pages() {
            for (is, i) in words.iter_mut().zip(0..) {
                ensure!(
                    *is == word(round - 1, page, i),
                    "memory: word {i} of page {page} is {is:#x} in round {round}"
                );
                hash = hash.rotate_left(1) ^ *is;
            }
            if (round + page).is_multiple_of(PART) {
                words.iter_mut().zip(0..).for_each(|(w, i)| *w = word(round, page, i));
            }
        }
        Ok(mix(hash))
    }
}

/// Files on the disk: records in a ring, each durable before the next round, and whole files that replace one another.
struct Files {
    dir: PathBuf,
    records: File,
    hashes: Vec<u64>,
}

impl Files {
    fn new(dir: &Path) -> Result<Self> {
        let path = dir.join("records");
        let records = File::options().create(true).truncate(true).read(true).write(true).open(&path);
        let records = records.with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { dir: dir.to_owned(), records, hashes: vec![0; usize::try_from(MAX_SECTORS)?] })
    }

    fn round(&mut self, round: u64, hash: u64) -> Result<()> {
        let place = |round: u64| (round % MAX_SECTORS) * SECTOR as u64;
        let slot = self.hashes.get_mut(usize::try_from(round % MAX_SECTORS)?).context("no slot")?;
        *slot = hash;
        let bytes: Vec<u8> = (0..64).flat_map(|word| record(round, hash, word).to_le_bytes()).collect();
        self.records.write_all_at(&bytes, place(round))?;
        self.records.sync_data()?;
        if round.is_multiple_of(FILE_EVERY) {
            fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")?;
            self.replace(round)?;
        }
        let back = round.saturating_sub(1 + mix(round) % (MAX_SECTORS - 1));
        if back > 0 {
            let mut sector = [0; SECTOR];
            self.records.read_exact_at(&mut sector, place(back))?;
            let expected = self.hashes.get(usize::try_from(back % MAX_SECTORS)?).map(|hash| (back, *hash));
            ensure!(record_of(&sector) == expected, "the record of round {back} is {:?}", record_of(&sector));
        }
        Ok(())
    }

    /// Writes a file under another name, renames it, and checks and removes the one before.
    fn replace(&self, round: u64) -> Result<()> {
        let content = |round: u64| -> Vec<u8> {
            (0..FILE as u64 / 8).flat_map(|word| mix(round ^ word << 40).to_le_bytes()).collect()
        };
        let (new, path) = (self.dir.join("new"), |round: u64| self.dir.join(format!("file.{round}")));
        let mut file = File::create(&new)?;
        file.write_all(&content(round))?;
        file.sync_all()?;
        fs::rename(&new, path(round))?;
        File::open(&self.dir)?.sync_all()?;
        let before = round - FILE_EVERY;
        if before > 0 {
            ensure!(fs::read(path(before))? == content(before), "file {before} is not what was written");
            fs::remove_file(path(before))?;
        }
        Ok(())
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

type Connect = Box<dyn Fn() -> std::io::Result<Box<dyn Stream>>>;

/// Has a server echo a message in each round, over one connection as long as that lives.
struct Talker {
    name: &'static str,
    connect: Connect,
    stream: Option<Box<dyn Stream>>,
    answers: u64,
    lost: u64,
}

impl Talker {
    fn new(name: &'static str, connect: impl Fn() -> std::io::Result<Box<dyn Stream>> + 'static) -> Self {
        Self { name, connect: Box::new(connect), stream: None, answers: 0, lost: 0 }
    }

    fn say(&mut self, round: u64, hash: u64) -> Result<()> {
        let words = [u64::from_le_bytes(*b"LIFETALK"), round, hash, mix(round ^ hash)];
        let message: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        for _ in 0..AWAY_LIMIT {
            let stream = match &mut self.stream {
                Some(stream) => stream,
                None => match (self.connect)() {
                    Ok(stream) => self.stream.insert(stream),
                    Err(_) => {
                        thread::sleep(Duration::from_millis(100));
                        continue;
                    }
                },
            };
            let mut answer = [0; MESSAGE];
            match stream.write_all(&message).and_then(|()| stream.read_exact(&mut answer)) {
                Ok(()) => {
                    ensure!(answer == *message, "{}: another answer in round {round}", self.name);
                    self.answers += 1;
                    return Ok(());
                }
                Err(_) => {
                    self.stream = None;
                    self.lost += 1;
                }
            }
        }
        bail!("{}: nobody there in round {round}", self.name)
    }
}

/// The clocks may not go back.
struct Clocks {
    start: Instant,
    monotonic: Instant,
    real: SystemTime,
}

impl Clocks {
    fn new() -> Self {
        let now = Instant::now();
        Self { start: now, monotonic: now, real: SystemTime::now() }
    }

    fn read(&mut self) -> Result<String> {
        let (monotonic, real) = (Instant::now(), SystemTime::now());
        ensure!(monotonic >= self.monotonic, "CLOCK_MONOTONIC went back");
        ensure!(real >= self.real, "CLOCK_REALTIME went back");
        (self.monotonic, self.real) = (monotonic, real);
        let clock = (monotonic - self.start).as_nanos();
        let real = real.duration_since(UNIX_EPOCH).context("before 1970")?.as_millis();
        Ok(format!("clock={clock} real={real}"))
    }
}

/// Bytes that no two guests of one snapshot should share.
fn random() -> Result<String> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("reading /dev/urandom")?;
    Ok(format!("{:016x}", u64::from_le_bytes(bytes)))
}

/// A second thread with memory of its own.
struct Other {
    rounds: Arc<AtomicU64>,
    is_bad: Arc<AtomicBool>,
}

impl Other {
    fn start() -> Self {
        let (rounds, is_bad) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, bad) = (Arc::clone(&rounds), Arc::clone(&is_bad));
        thread::spawn(move || {
            let mut memory = Memory::new(256 << 10);
            for round in 1.. {
                if memory.round(round).is_err() {
                    bad.store(true, Ordering::Release);
                    return;
                }
                counter.store(round, Ordering::Release);
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self { rounds, is_bad }
    }

    fn rounds(&self) -> Result<u64> {
        ensure!(!self.is_bad.load(Ordering::Acquire), "memory of the second thread");
        Ok(self.rounds.load(Ordering::Acquire))
    }
}
