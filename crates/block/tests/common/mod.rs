//! A disk in guest memory's terms, and the tools of others to compare with.
#![expect(clippy::indexing_slicing, reason = "tests")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use freestone_block::Image;
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use tempfile::TempDir;

/// Guest memory of 8 MiB, to read and write images through.
pub struct Window(GuestMem);

impl Window {
    pub fn new() -> Self {
        Self(GuestMem::anonymous(8 << 20).unwrap())
    }

    /// Writes in two slices that do not adjoin.
    pub fn write(&self, disk: &dyn Image, offset: u64, data: &[u8]) -> std::io::Result<()> {
        let view = self.0.view();
        let half = data.len() / 2;
        view.write_slice(&data[..half], GuestAddress(0)).unwrap();
        view.write_slice(&data[half..], GuestAddress(4 << 20)).unwrap();
        let slices = [
            view.get_slice(GuestAddress(0), half).unwrap(),
            view.get_slice(GuestAddress(4 << 20), data.len() - half).unwrap(),
        ];
        disk.write_vectored_at(&slices, offset)
    }

    pub fn read(&self, disk: &dyn Image, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let view = self.0.view();
        let half = len / 3;
        let slices = [
            view.get_slice(GuestAddress(0), half).unwrap(),
            view.get_slice(GuestAddress(4 << 20), len - half).unwrap(),
        ];
        disk.read_vectored_at(&slices, offset)?;
        let mut data = vec![0; len];
        view.read_slice(&mut data[..half], GuestAddress(0)).unwrap();
        view.read_slice(&mut data[half..], GuestAddress(4 << 20)).unwrap();
        Ok(data)
    }

    /// The whole disk.
    pub fn read_all(&self, disk: &dyn Image) -> Vec<u8> {
        let mut all = Vec::new();
        while (all.len() as u64) < disk.size() {
            let len = (disk.size() - all.len() as u64).min(3 << 20);
            all.extend(self.read(disk, all.len() as u64, usize::try_from(len).unwrap()).unwrap());
        }
        all
    }
}

/// Random numbers, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

pub fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Whether `qemu-img` is there; if not, says that `test` is skipped.
pub fn no_qemu(test: &str) -> bool {
    let missing = Command::new("qemu-img").arg("--version").output().is_err();
    if missing {
        freestone_testkit::skip(test, "qemu-img is not installed");
    }
    missing
}

/// Runs a program and wants it to succeed.
pub fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub fn qemu_img(args: &[&str]) {
    run("qemu-img", args);
}

/// Runs commands of `qemu-io` on an image.
pub fn qemu_io(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(text(path));
    let output = run("qemu-io", &args);
    let said = String::from_utf8_lossy(&output.stdout).to_string();
    assert!(!said.contains("failed"), "{said}");
}

/// What `qemu-img check` says of an image that must be clean.
pub fn assert_clean(path: &Path) {
    qemu_img(&["check", "-q", "-f", "qcow2", text(path)]);
}

/// The contents as `qemu-img` sees them.
pub fn qemu_contents(dir: &TempDir, path: &Path) -> Vec<u8> {
    let raw = dir.path().join("contents.raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)]);
    std::fs::read(raw).unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn path(dir: &TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}
