//! What block devices can do by ioctl(2) alone.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{Opcode, Setter, ioctl};

/// `BLKDISCARD` of linux/fs.h.
const BLKDISCARD: Opcode = 0x1277;

/// Discards `len` bytes from `offset` on of a block device.
pub(crate) fn discard(device: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD takes a pointer to two u64, start and length in bytes, and only reads them.
    let request = unsafe { Setter::<BLKDISCARD, [u64; 2]>::new([offset, len]) };
    // SAFETY: the request is the one described above. On a descriptor that is no block device it is an error and does nothing.
    unsafe { ioctl(device, request) }.map_err(io::Error::from)
}
