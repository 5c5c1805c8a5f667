//! [`Image`]: what a block device needs of a disk image, whatever its format.

use std::fmt::Debug;
use std::io;

use freestone_memory::MemorySlice;

/// Bytes in a sector: the unit of sizes and offsets of disks.
pub const SECTOR_SIZE: u64 = 512;

/// A disk image: an array of bytes that is read and written at offsets, straight from and to guest memory.
///
/// All methods take `&self`, and several requests may run at once on different threads: an image with mutable state locks
/// inside. An image does not know virtio, and bounds are the caller's business only in so far as that a request beyond
/// [`size`](Self::size) fails.
pub trait Image: Send + Sync + Debug {
    /// Size in bytes: a multiple of [`SECTOR_SIZE`] and at least one sector.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills `bufs`, in their order, from byte `offset` on.
    ///
    /// # Errors
    /// Whatever the host says, and `UnexpectedEof` if the image ends too early. What the buffers hold is then unspecified.
    fn read_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes all of `bufs`, in their order, from byte `offset` on. The data is durable after the next
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    /// Whatever the host says. How much of the data is in the image is then unspecified.
    fn write_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()>;

    /// Makes durable every write that completed before this call.
    ///
    /// # Errors
    /// Whatever the host says; the data may then be lost.
    fn flush(&self) -> io::Result<()>;
}
