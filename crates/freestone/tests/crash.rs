//! The VMM is killed at random moments while its guest writes: the image stays consistent, and every write that was flushed is there.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use freestone_guest::writer;

const SIZE: u64 = 16 << 20;
const BLOCKS: u64 = SIZE / writer::BLOCK as u64;
/// Writes of one life are numbered from its number times this on.
const LIFE: u64 = 1 << 32;

fn freestone() -> Command {
    Command::new(env!("CARGO_BIN_EXE_freestone"))
}

/// A disk, the guest that writes to it, and what must be on it.
struct Disk {
    _dir: tempfile::TempDir,
    kernel: PathBuf,
    image: PathBuf,
    format: &'static str,
    /// The write that each block is of, at least.
    writes: HashMap<u64, u64>,
}

impl Disk {
    fn new(format: &'static str, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, image) = (dir.path().join("writer.elf"), dir.path().join("disk.img"));
        fs::File::create(&kernel).unwrap().write_all(freestone_guest::WRITER).unwrap();
        let mut create = freestone();
        create.args(["image", "create", "-f", format]).args(options).arg(&image).arg("16M");
        assert!(create.output().unwrap().status.success());
        Self { _dir: dir, kernel, image, format, writes: HashMap::new() }
    }

    fn start(&self, life: u64, more: &str) -> Child {
        let disk = format!("path={},format={}{more}", self.image.display(), self.format);
        let mut run = freestone();
        run.args(["run", "--memory", "32M", "--cmdline", &format!("first={}", life * LIFE + 1)]);
        run.arg("--kernel").arg(&self.kernel).args(["--disk", &disk]);
        run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Lets the guest write for `time` after its first flush, kills the VMM, and looks at what is left. Returns how many writes
    /// were durable.
    fn live_and_die(&mut self, life: u64, time: Duration, more: &str) -> u64 {
        let mut child = self.start(life, more);
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let (first_line, began) = mpsc::channel();
        let reader = thread::spawn(move || {
            let mut text = String::new();
            output.read_line(&mut text).unwrap();
            // Nobody listens where that took too long.
            let _ = first_line.send(());
            output.read_to_string(&mut text).unwrap();
            text
        });
        // However long a busy host takes to start it. What went wrong is said below.
        let _ = began.recv_timeout(Duration::from_secs(20));
        thread::sleep(time);
        child.kill().unwrap();
        child.wait().unwrap();
        let mut errors = String::new();
        child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        let text = reader.join().unwrap();
        assert!(!text.contains("failed") && errors.is_empty(), "{text}{errors}");
        // The last line may be cut.
        let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
        let durable = complete.lines().filter_map(|line| line.trim().strip_prefix("durable ")).next_back();
        let durable = durable.map_or(life * LIFE, |n| n.parse().unwrap());
        for n in life * LIFE + 1..=durable {
            self.writes.insert(writer::block(n, BLOCKS), n);
        }
        self.check(life, durable);
        durable - life * LIFE
    }

    fn check(&mut self, life: u64, durable: u64) {
        for (block, bytes) in (0..).zip(self.content().chunks_exact(writer::BLOCK)) {
            let wanted = self.writes.get(&block).copied();
            if bytes.iter().all(|&byte| byte == 0) {
                assert_eq!(wanted, None, "block {block} lost its write");
                continue;
            }
            let found = writer::write_of(bytes).unwrap_or_else(|| unreadable(block));
            assert_eq!(writer::block(found, BLOCKS), block, "write {found} is in the wrong place");
            // A later write may be there although nobody was told yet.
            let later = found > durable && found / LIFE == life;
            assert!(wanted == Some(found) || later, "block {block} holds write {found} and not {wanted:?}");
            self.writes.insert(block, found);
        }
    }

    /// The disk's bytes, by another implementation where it is no raw image.
    fn content(&self) -> Vec<u8> {
        if self.format == "raw" {
            return fs::read(&self.image).unwrap();
        }
        let check = qemu_img(&["check", "-f", self.format], &self.image);
        // 3: clusters that nobody uses, which a crash may leave behind.
        assert!(matches!(check.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&check.stdout));
        let raw = self.image.with_extension("raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", self.format, "-O", "raw"]).arg(&self.image).arg(&raw);
        assert!(convert.output().unwrap().status.success());
        fs::read(raw).unwrap()
    }
}

#[expect(clippy::panic, reason = "tests")]
fn unreadable(block: u64) -> u64 {
    panic!("block {block} is torn")
}

fn qemu_img(args: &[&str], image: &Path) -> std::process::Output {
    Command::new("qemu-img").args(args).arg(image).output().unwrap()
}

/// Whether the tests of this file can run; says why if they cannot.
fn possible(test: &str) -> bool {
    if let Err(reason) = freestone_testkit::dev_kvm_usable() {
        freestone_testkit::skip(test, &reason);
        return false;
    }
    if Command::new("qemu-img").arg("--version").output().is_err() {
        freestone_testkit::skip(test, "qemu-img is not installed");
        return false;
    }
    true
}

/// Kills `lives` VMMs, one after the other, each at another moment.
fn kill(disk: &mut Disk, lives: u64, more: &str) {
    let mut random = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
    let mut durable = 0;
    for life in 1..=lives {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let time = u64::try_from((random >> 40) % 120_000).unwrap();
        durable += disk.live_and_die(life, Duration::from_micros(time), more);
    }
    assert!(durable > lives * 4, "the guests wrote {durable} blocks in {lives} lives");
}

#[test]
fn fifty_kills_leave_a_qcow2_image_consistent_with_every_flushed_write() {
    if !possible("fifty_kills_leave_a_qcow2_image_consistent_with_every_flushed_write") {
        return;
    }
    let mut disk = Disk::new("qcow2", &[]);
    kill(&mut disk, 50, "");
    let repaired =
        freestone().args(["image", "check", "--repair", "-f", "qcow2"]).arg(&disk.image).output().unwrap();
    assert!(repaired.status.success(), "{}", String::from_utf8_lossy(&repaired.stderr));
    assert!(qemu_img(&["check", "-f", "qcow2"], &disk.image).status.success());
}

#[test]
fn small_clusters_survive_kills_as_well() {
    if !possible("small_clusters_survive_kills_as_well") {
        return;
    }
    kill(&mut Disk::new("qcow2", &["-o", "cluster_size=512"]), 10, "");
}

#[test]
fn a_raw_image_has_every_flushed_write_with_each_engine() {
    if !possible("a_raw_image_has_every_flushed_write_with_each_engine") {
        return;
    }
    for engine in ["sync", "uring", "auto"] {
        kill(&mut Disk::new("raw", &[]), 5, &format!(",engine={engine}"));
    }
    kill(&mut Disk::new("raw", &[]), 5, ",cache=writethrough");
}
