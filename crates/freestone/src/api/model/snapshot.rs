//! Snapshots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A snapshot to make.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SnapshotCreate {
    /// The memory file.
    pub(crate) mem_file_path: PathBuf,
    /// The state file.
    pub(crate) snapshot_path: PathBuf,
    /// All memory or what was written.
    #[serde(default)]
    pub(crate) snapshot_type: SnapshotType,
}

/// What is in the memory file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SnapshotType {
    /// All memory.
    #[default]
    Full,
    /// What was written since the last snapshot.
    Diff,
}

/// A snapshot to go on from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SnapshotLoad {
    /// The state file.
    pub(crate) snapshot_path: PathBuf,
    /// The memory file; deprecated.
    #[serde(default)]
    pub(crate) mem_file_path: Option<PathBuf>,
    /// Where memory comes from.
    #[serde(default)]
    pub(crate) mem_backend: Option<MemoryBackend>,
    /// Deprecated for `track_dirty_pages`.
    #[serde(default)]
    pub(crate) enable_diff_snapshots: bool,
    /// Whether writes are tracked from now on.
    #[serde(default)]
    pub(crate) track_dirty_pages: bool,
    /// Whether the machine runs at once.
    #[serde(default)]
    pub(crate) resume_vm: bool,
    /// Cards that are plugged into something else.
    #[serde(default)]
    pub(crate) network_overrides: Vec<NetworkOverride>,
    /// The vsock's socket.
    #[serde(default)]
    pub(crate) vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock jumps to the present.
    #[serde(default)]
    pub(crate) clock_realtime: bool,
    /// Pages of the host behind the memory.
    #[serde(default)]
    pub(crate) huge_pages: RestorePages,
}

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemoryBackend {
    /// Of what kind it is.
    pub(crate) backend_type: BackendType,
    /// The file, or the socket of the page server.
    pub(crate) backend_path: PathBuf,
}

/// Of what kind a memory backend is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum BackendType {
    /// A memory file, mapped privately.
    File,
    /// A page server behind userfaultfd.
    Uffd,
}

/// Pages of the host behind restored memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum RestorePages {
    /// As they were.
    #[default]
    Snapshot,
    /// 4 KiB.
    None,
    /// As the host's kernel sees fit.
    Transparent,
    /// 2 MiB, set aside by the host.
    #[serde(rename = "2M")]
    Size2M,
}

/// A card that is plugged into something else.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NetworkOverride {
    /// The card.
    pub(crate) iface_id: String,
    /// The tap of the host.
    pub(crate) host_dev_name: String,
}

/// Another socket of the vsock.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VsockOverride {
    /// Where.
    pub(crate) uds_path: PathBuf,
}
