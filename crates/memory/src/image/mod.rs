//! Memory images: guest memory in a file, for snapshots, forks and migrations.
//!
//! An image is raw pages. The ranges of its [`ImageLayout`] lie one after the other, so that range *k* begins at the sum of the
//! lengths of those before it; pages of zeros are holes. There is no header: such a file can be mapped as it is
//! ([`GuestMemBuilder::image`](crate::GuestMemBuilder::image)), and other monitors read it. What else is to be known - the
//! layout, which pages a difference has, checksums - is plain data, which the caller keeps beside it.
//!
//! | file | written by | used by |
//! |---|---|---|
//! | full image | [`write_full`] | `GuestMemBuilder::image`, a page server |
//! | difference: only the pages in its [`Extents`] | [`write_diff`] | [`apply_diff`] on a copy of its base, [`overlay`] |
//! | sealed memfd | [`to_memfd`], [`frozen_memfd`] | `GuestMemBuilder::image` in many processes at once |
//!
//! Writing is not crash-safe by itself: write to a new file, `sync_all` it, and rename it. A full disk is an [`Error::Image`]
//! from the write, or an error from `sync_all`; the guest's memory is not changed by either.
//!
//! Layouts and extents that come from a file are checked when they are made, and all functions here rest on that.

mod extents;
mod file;
mod layout;
mod memory;
mod sums;
#[cfg(test)]
mod tests;
mod write;

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FlockOperation;

pub use extents::{Extent, Extents};
pub use file::{apply_diff, copy_sparse, verify};
pub use layout::ImageLayout;
pub use memory::{frozen_memfd, overlay, to_memfd};
pub use write::{ImageStats, write_diff, write_full};

use crate::{Error, Result};

/// Bytes of an image that one checksum is for.
pub const CHUNK: u64 = 1 << 20;

/// Is told from time to time how many bytes of how many are done.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Opens an image to be read or mapped, and takes a shared lock on it (`flock(2)`) that lasts as long as the file is open, so
/// as long as it is mapped. Who changes images, as [`lock_exclusive`] says, keeps off it then.
///
/// # Errors
/// - [`Error::Image`]: it cannot be opened.
/// - [`Error::ImageRefused`]: it is no regular file, or somebody is changing it.
pub fn open(path: &Path) -> Result<File> {
    // A FIFO would wait for its other end.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let opened = File::options().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(|source| Error::Image { doing: "open", offset: 0, source })?;
    let kind = file.metadata().map_err(|source| Error::Image { doing: "open", offset: 0, source })?;
    if !kind.is_file() {
        return Err(Error::ImageRefused { reason: "it is no regular file" });
    }
    lock(&file, FlockOperation::NonBlockingLockShared, "somebody else is changing it")?;
    Ok(file)
}

/// Takes the lock that a change of an image in place needs. Nobody has it [open] then, or will.
///
/// # Errors
/// [`Error::ImageRefused`] if it is in use; [`Error::Image`] if the file system cannot lock.
pub fn lock_exclusive(file: &File) -> Result<()> {
    lock(file, FlockOperation::NonBlockingLockExclusive, "it is in use")
}

fn lock(file: &File, operation: FlockOperation, busy: &'static str) -> Result<()> {
    match rustix::fs::flock(file, operation) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::ImageRefused { reason: busy }),
        other => other.map_err(|errno| failed("lock", 0)(errno.into())),
    }
}

/// Whether two descriptors are of one file.
fn same(a: &File, b: &File) -> Result<bool> {
    let of = |file: &File| file.metadata().map(|data| (data.dev(), data.ino())).map_err(failed("measure", 0));
    Ok(of(a)? == of(b)?)
}

/// Makes the error of an operation that the system refused.
fn failed(doing: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Image { doing, offset, source }
}
