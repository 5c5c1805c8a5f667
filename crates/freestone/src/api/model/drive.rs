//! Disks, and files as persistent memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Drive {
    /// Its name.
    pub(crate) drive_id: String,
    /// The partition that is the root, if the disk is.
    #[serde(default)]
    pub(crate) partuuid: Option<String>,
    /// Whether the guest's root is on it.
    pub(crate) is_root_device: bool,
    /// Whether the guest can flush.
    #[serde(default)]
    pub(crate) cache_type: CacheType,
    /// Whether the guest cannot write.
    #[serde(default)]
    pub(crate) is_read_only: Option<bool>,
    /// The image.
    #[serde(default)]
    pub(crate) path_on_host: Option<PathBuf>,
    /// Its limits.
    #[serde(default)]
    pub(crate) rate_limiter: Option<RateLimiter>,
    /// How the image is read and written.
    #[serde(default)]
    pub(crate) io_engine: Option<IoEngine>,
    /// The socket of a vhost-user backend, instead of an image.
    #[serde(default)]
    pub(crate) socket: Option<PathBuf>,
}

/// Whether the guest can flush what it wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CacheType {
    /// It cannot.
    #[default]
    Unsafe,
    /// It can.
    Writeback,
}

/// How an image is read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum IoEngine {
    /// By system calls that wait.
    #[default]
    Sync,
    /// By io_uring.
    Async,
}

/// Another image, other limits.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DriveUpdate {
    /// The disk.
    pub(crate) drive_id: String,
    /// The image from now on.
    #[serde(default)]
    pub(crate) path_on_host: Option<PathBuf>,
    /// The buckets that change.
    #[serde(default)]
    pub(crate) rate_limiter: Option<RateLimiter>,
}

/// A file as persistent memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pmem {
    /// Its name.
    pub(crate) id: String,
    /// The file.
    pub(crate) path_on_host: PathBuf,
    /// Whether the guest's root is on it.
    #[serde(default)]
    pub(crate) root_device: bool,
    /// Whether the guest cannot write.
    #[serde(default)]
    pub(crate) read_only: bool,
    /// Its limits.
    #[serde(default)]
    pub(crate) rate_limiter: Option<RateLimiter>,
}

/// Other limits.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PmemUpdate {
    /// The device.
    pub(crate) id: String,
    /// The buckets that change.
    #[serde(default)]
    pub(crate) rate_limiter: Option<RateLimiter>,
}
