//! The balloon.

use serde::{Deserialize, Serialize};

/// A balloon device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Balloon {
    /// What the guest is to give up, in MiB.
    pub(crate) amount_mib: u32,
    /// Whether it takes memory back before it kills.
    pub(crate) deflate_on_oom: bool,
    /// Seconds between statistics; 0: none, ever.
    #[serde(default)]
    pub(crate) stats_polling_interval_s: u16,
    /// Whether runs of hinting can be asked for.
    #[serde(default)]
    pub(crate) free_page_hinting: bool,
    /// Whether the guest reports free pages as they become free.
    #[serde(default)]
    pub(crate) free_page_reporting: bool,
}

/// Another target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BalloonUpdate {
    /// In MiB.
    pub(crate) amount_mib: u32,
}

/// Another interval of statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BalloonStatsUpdate {
    /// In seconds.
    pub(crate) stats_polling_interval_s: u16,
}

/// A run of hinting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BalloonHintingStart {
    /// Whether the guest may use the pages again as soon as it has told them all.
    #[serde(default = "yes")]
    pub(crate) acknowledge_on_stop: bool,
}

fn yes() -> bool {
    true
}

impl Default for BalloonHintingStart {
    fn default() -> Self {
        Self { acknowledge_on_stop: yes() }
    }
}

/// How far hinting is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct BalloonHinting {
    /// The last command to the guest.
    pub(crate) host_cmd: u32,
    /// The last that the guest answered.
    pub(crate) guest_cmd: Option<u32>,
}

/// What is known of the balloon: what the guest never told is left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct BalloonStats {
    /// Pages of 4 KiB.
    pub(crate) target_pages: u32,
    /// Pages of 4 KiB.
    pub(crate) actual_pages: u32,
    pub(crate) target_mib: u32,
    pub(crate) actual_mib: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) swap_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) swap_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) free_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) total_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) available_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) disk_caches: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hugetlb_failures: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) oom_kill: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) alloc_stall: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) async_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) direct_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) async_reclaim: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) direct_reclaim: Option<u64>,
}
