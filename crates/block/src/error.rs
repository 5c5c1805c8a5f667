//! The error type of this crate.

use std::io;
use std::path::PathBuf;

/// What can go wrong when a disk image is opened.
///
/// Errors of reads and writes are plain [`io::Error`]s: they go to the guest as a failed request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened or examined.
    #[error("disk {path:?}: cannot {op}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What was being done.
        op: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The path names something that is neither a regular file nor a block device.
    #[error("disk {path:?} is {what}")]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is instead, with its article.
        what: &'static str,
    },
    /// Reading is allowed, writing is not.
    #[error("disk {path:?} cannot be opened for writing: {reason}; add ,ro to attach it read-only")]
    NotWritable {
        /// The image.
        path: PathBuf,
        /// The operating system's reason.
        reason: io::ErrorKind,
    },
    /// Another process, or another disk of this one, uses the image in a way that excludes this use.
    #[error("disk {path:?} is locked by another process")]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// The page cache cannot be gone around.
    #[error("disk {path:?} cannot be used with direct I/O in sectors of 512 bytes; do without direct")]
    Direct {
        /// The image.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The image has not even one sector.
    #[error("disk {path:?} has {size} bytes: the smallest disk is one sector of 512 bytes")]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The file is not an image of its format, or a damaged one.
    #[error("disk {path:?} is not a valid image: {reason}")]
    Malformed {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The image needs something that this crate does not have, or was built without.
    #[error("disk {path:?} uses {feature}, which is not supported")]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it needs.
        feature: String,
    },
    /// The image names a backing file, and that was not allowed.
    #[error("disk {path:?} has the backing file {backing:?}; add ,backing=on to let it open other files")]
    BackingDenied {
        /// The image.
        path: PathBuf,
        /// What it names.
        backing: String,
    },
    /// Images that are laid over each other in a way that cannot be opened.
    #[error("the chain of backing files with {path:?} in it {what}")]
    Chain {
        /// An image of the chain.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The image cannot be made as it was asked for.
    #[error("cannot make the image {path:?}: {reason}")]
    Create {
        /// The image.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
