//! What the tests of queues share.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(dead_code, reason = "no test file uses all of it")]

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use freestone_block::{Engine, Image, IoQueue, Op, RawImage, RawOptions, Submitted};
use freestone_memory::{Bytes, GuestAddress, MemoryView};
use rustix::event::{PollFd, PollFlags, Timespec};
use tempfile::TempDir;

/// A folder on a disk rather than in memory, where there is one: there requests take time.
pub fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// An image of `size` zeroes.
pub fn disk(dir: &TempDir, size: u64) -> Arc<RawImage> {
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().set_len(size).unwrap();
    Arc::new(RawOptions::new().open(&path).unwrap())
}

/// A queue, or `None` where the kernel has no io_uring for us.
pub fn queue(image: &Arc<RawImage>, engine: Engine, depth: u16) -> Option<Box<dyn IoQueue>> {
    let queue = Arc::clone(image).open_queue(engine, depth);
    match queue {
        Err(error) if engine == Engine::Uring && error.kind() == ErrorKind::Unsupported => {
            println!("SKIP: {error}");
            None
        }
        queue => Some(queue.unwrap()),
    }
}

pub fn uring_or_skip(image: &Arc<RawImage>, depth: u16) -> Option<Box<dyn IoQueue>> {
    queue(image, Engine::Uring, depth)
}

/// Commits, and waits until nothing is in flight.
pub fn wait_for_all(queue: &mut dyn IoQueue) -> Vec<(u64, io::Result<()>)> {
    let mut outcomes = Vec::new();
    queue.commit().unwrap();
    while queue.in_flight() > 0 {
        queue.wait().unwrap();
        queue.reap(&mut |tag, result| outcomes.push((tag, result)));
    }
    outcomes
}

/// One request from beginning to end.
pub fn run<'m>(queue: &mut dyn IoQueue, view: &'m MemoryView, op: Op<'_, 'm>) -> io::Result<()> {
    match queue.submit(0x5EED, view, op) {
        Submitted::Done(result) => result,
        Submitted::Pending => {
            let mut outcomes = wait_for_all(queue);
            let (tag, result) = outcomes.pop().unwrap();
            assert_eq!((tag, outcomes.len()), (0x5EED, 0));
            result
        }
    }
}

/// Bytes of guest memory.
pub fn bytes(view: &MemoryView, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    view.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// Whether a descriptor is readable now.
pub fn ready(source: &(dyn AsRawFd + Send + Sync)) -> bool {
    let fd = borrow(source);
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

fn borrow(source: &(dyn AsRawFd + Send + Sync)) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(source.as_raw_fd()) }
}

/// A file system of a few pages, for what happens when it is full.
pub struct SmallTmpfs(TempDir);

impl SmallTmpfs {
    /// `None` where mounting is not permitted.
    pub fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(dir.path());
        if mount.output().is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        println!("SKIP: a file system cannot be mounted here");
        None
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
