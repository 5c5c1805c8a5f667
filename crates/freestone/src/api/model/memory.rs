//! Memory to plug.

use serde::{Deserialize, Serialize};

/// Memory that can be plugged while the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemoryHotplug {
    /// All of it, in MiB.
    pub(crate) total_size_mib: u32,
    /// What the host sets aside at a time, in MiB.
    #[serde(default = "slot")]
    pub(crate) slot_size_mib: u32,
    /// What the guest plugs at a time, in MiB.
    #[serde(default = "block")]
    pub(crate) block_size_mib: u32,
}

fn slot() -> u32 {
    128
}

fn block() -> u32 {
    2
}

/// Another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemoryHotplugUpdate {
    /// In MiB.
    pub(crate) requested_size_mib: u32,
}

/// How far plugging is, all in MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct MemoryHotplugStatus {
    pub(crate) total_size_mib: u32,
    pub(crate) slot_size_mib: u32,
    pub(crate) block_size_mib: u32,
    /// What the guest uses.
    pub(crate) plugged_size_mib: u32,
    /// What it was asked to use.
    pub(crate) requested_size_mib: u32,
}
