//! [`Image`]: what a block device needs of a disk image, whatever its format.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use freestone_memory::MemorySlice;

use crate::queue::{Engine, IoQueue};

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

    /// What else the image can do, and what it prefers. Never changes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Gives `len` bytes from `offset` on back to the host. What they read as afterwards is unspecified, but it is never
    /// another's data.
    ///
    /// # Errors
    /// Whatever the host says; `Unsupported` if [`Limits::discard`] is false.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes `len` bytes from `offset` on read as zeroes. With `unmap`, their storage may be given back to the host.
    ///
    /// # Errors
    /// Whatever the host says; `Unsupported` if [`Limits::write_zeroes`] is false.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let _ = (offset, len, unmap);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Looks at the image again, whose file may have been made larger or smaller, and returns the size in bytes, which
    /// [`size`](Self::size) says from now on.
    ///
    /// # Errors
    /// Whatever the host says; the size stays as it was.
    fn refresh_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    /// Says how the image is held from now on against others who would use its files. Whoever gives up more than reading has no
    /// request under way and makes none, until the image is its [own](Hold::Own) again: what was written is made durable first.
    ///
    /// Images that do not lock anything do nothing.
    ///
    /// # Errors
    /// `WouldBlock` if others hold the files in a way that excludes this; whatever else the host says. It is then held as it was,
    /// as far as others did not take it meanwhile.
    fn set_hold(&self, hold: Hold) -> io::Result<()> {
        let _ = hold;
        Ok(())
    }

    /// A queue for asynchronous requests on this image, for one worker; `depth` requests may be in flight at once.
    ///
    /// # Errors
    /// `Unsupported` if the image or the host does not have the engine; whatever the host says.
    fn open_queue(self: Arc<Self>, engine: Engine, depth: u16) -> io::Result<Box<dyn IoQueue>>;
}

/// How an image is held against other users of its files: see [`Image::set_hold`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Hold {
    /// As it was opened: one that can be written excludes all others, one that is read-only excludes writers.
    #[default]
    Own,
    /// Others may read, and nobody writes: overlays are laid over it.
    Share,
    /// Others may do what they want with it: it changes hands.
    None,
}

/// What an [`Image`] can do beyond reading and writing, and what it prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// [`Image::discard`] works.
    pub discard: bool,
    /// [`Image::write_zeroes`] works.
    pub write_zeroes: bool,
    /// Bytes in a physical block: writes of whole aligned blocks need no reading. A power of two, at least [`SECTOR_SIZE`].
    pub physical_block: u32,
    /// Bytes that requests are best aligned to and multiples of; 0: no preference.
    pub optimal_io: u32,
}

impl Default for Limits {
    /// Nothing but reading and writing, blocks of one sector.
    fn default() -> Self {
        Self { discard: false, write_zeroes: false, physical_block: 512, optimal_io: 0 }
    }
}
