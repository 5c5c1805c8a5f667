//! What the disk benches share: requests in batches, and their floor, the same reads and writes by bare system calls and by a
//! bare io_uring, as tightly as they go.
//!
//! The floor trusts its caller's numbers and has one buffer for each request of a batch.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use crate::Fallible;

/// Bytes of a request.
pub const BLOCK: usize = 4096;

/// What carries out requests.
pub trait Batch {
    /// One request for each offset in bytes, as many at once as there are; returns when all are done.
    ///
    /// # Errors
    /// If one of them fails.
    fn batch(&mut self, offsets: &[u64]) -> Fallible<()>;
}

/// Numbers without a pattern: xorshift.
#[derive(Debug)]
pub struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }
}

impl Random {
    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// Offsets of `count` blocks at random places of `bytes`.
    pub fn offsets(&mut self, count: usize, bytes: u64) -> Vec<u64> {
        (0..count).map(|_| self.below(bytes / BLOCK as u64) * BLOCK as u64).collect()
    }
}

/// `preadv(2)` and `pwritev(2)`, one after the other.
#[derive(Debug)]
pub struct Calls {
    file: File,
    buffers: Vec<u8>,
    write: bool,
    plain: bool,
}

impl Calls {
    /// Reads or writes of `file`, at most `depth` in a batch.
    pub fn new(file: File, depth: usize, write: bool) -> Self {
        Self { file, buffers: aligned(depth), write, plain: false }
    }

    /// By `pread(2)` and `pwrite(2)`, made directly: the least that a request can be.
    #[must_use]
    pub fn plain(self) -> Self {
        Self { plain: true, ..self }
    }
}

impl Batch for Calls {
    fn batch(&mut self, offsets: &[u64]) -> Fallible<()> {
        let fd = self.file.as_raw_fd();
        for (buffer, offset) in blocks(&mut self.buffers).zip(offsets) {
            let iov = libc::iovec { iov_base: buffer.cast(), iov_len: BLOCK };
            let at = libc::off_t::try_from(*offset)?;
            let done = match (self.plain, self.write) {
                // SAFETY: the one iovec describes a block of our own buffers.
                (false, true) => unsafe { libc::pwritev(fd, &raw const iov, 1, at) as i64 },
                // SAFETY: as above; nobody else uses the buffer.
                (false, false) => unsafe { libc::preadv(fd, &raw const iov, 1, at) as i64 },
                // SAFETY: the buffer is a block of our own.
                (true, true) => unsafe { libc::syscall(libc::SYS_pwrite64, fd, buffer, BLOCK, at) },
                // SAFETY: as above; nobody else uses the buffer.
                (true, false) => unsafe { libc::syscall(libc::SYS_pread64, fd, buffer, BLOCK, at) },
            };
            if usize::try_from(done) != Ok(BLOCK) {
                return Err(io::Error::last_os_error().into());
            }
        }
        Ok(())
    }
}

/// One system call for a batch.
pub struct Ring {
    ring: IoUring,
    buffers: Vec<u8>,
    write: bool,
}

impl Ring {
    /// Reads or writes of `file`, at most `depth` in a batch.
    ///
    /// # Errors
    /// If the host gives no io_uring.
    pub fn new(file: &File, depth: usize, write: bool) -> Fallible<Self> {
        let ring = IoUring::new(u32::try_from(depth)?)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self { ring, buffers: aligned(depth), write })
    }
}

impl Batch for Ring {
    fn batch(&mut self, offsets: &[u64]) -> Fallible<()> {
        let file = types::Fixed(0);
        let len = u32::try_from(BLOCK)?;
        for (buffer, offset) in blocks(&mut self.buffers).zip(offsets) {
            let entry = match self.write {
                true => opcode::Write::new(file, buffer, len).offset(*offset).build(),
                false => opcode::Read::new(file, buffer, len).offset(*offset).build(),
            };
            // SAFETY: the buffers are ours, and are not used until all requests are done, below.
            unsafe { self.ring.submission().push(&entry) }?;
        }
        let mut left = offsets.len();
        while left > 0 {
            self.ring.submit_and_wait(left)?;
            for entry in self.ring.completion() {
                left -= 1;
                if usize::try_from(entry.result()) != Ok(BLOCK) {
                    return Err(io::Error::from_raw_os_error(-entry.result()).into());
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("write", &self.write).finish_non_exhaustive()
    }
}

fn aligned(depth: usize) -> Vec<u8> {
    vec![0x5A; (depth + 1) * BLOCK]
}

fn blocks(buffers: &mut [u8]) -> impl Iterator<Item = *mut u8> {
    let skip = buffers.as_ptr().align_offset(BLOCK);
    buffers.get_mut(skip..).unwrap_or_default().chunks_exact_mut(BLOCK).map(<[u8]>::as_mut_ptr)
}
