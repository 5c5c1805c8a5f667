//! vCPUs and memory.

use serde::{Deserialize, Serialize};

/// vCPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineConfig {
    /// 1 to 32.
    pub(crate) vcpu_count: u8,
    /// Memory in MiB.
    pub(crate) mem_size_mib: u64,
    /// Whether two vCPUs are threads of one core.
    #[serde(default)]
    pub(crate) smt: bool,
    /// The CPU of an instance type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_template: Option<CpuTemplate>,
    /// Whether writes to memory are tracked, for snapshots of what changed.
    #[serde(default)]
    pub(crate) track_dirty_pages: bool,
    /// Pages of the host behind the memory.
    #[serde(default)]
    pub(crate) huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// What changes of a [`MachineConfig`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MachineUpdate {
    pub(crate) vcpu_count: Option<u8>,
    pub(crate) mem_size_mib: Option<u64>,
    pub(crate) smt: Option<bool>,
    pub(crate) cpu_template: Option<CpuTemplate>,
    pub(crate) track_dirty_pages: Option<bool>,
    pub(crate) huge_pages: Option<HugePages>,
}

/// A CPU of an instance type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    #[default]
    None,
}

/// Pages of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum HugePages {
    /// 4 KiB.
    #[default]
    None,
    /// As the host's kernel sees fit.
    Transparent,
    /// 2 MiB, set aside by the host.
    #[serde(rename = "2M")]
    Size2M,
}
