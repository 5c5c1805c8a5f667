//! The instance as a whole.

use serde::{Deserialize, Serialize};

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct InstanceInfo {
    /// The program.
    pub(crate) app_name: &'static str,
    /// What `--id` said.
    pub(crate) id: String,
    /// How far the machine is.
    pub(crate) state: VmState,
    /// The program's version.
    pub(crate) vmm_version: &'static str,
}

/// How far a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum VmState {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// They do not.
    Paused,
}

/// The version of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Version {
    /// That of the Firecracker whose API this is.
    pub(crate) firecracker_version: &'static str,
}

/// Something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Action {
    /// What.
    pub(crate) action_type: ActionType,
}

/// What can be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum ActionType {
    /// Write a line of metrics.
    FlushMetrics,
    /// Make the machine and run it.
    InstanceStart,
    /// Press the keys by which the guest shuts down.
    SendCtrlAltDel,
}

/// Pause or resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmUpdate {
    /// Which.
    pub(crate) state: WantedState,
}

/// What a machine can be asked to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum WantedState {
    /// Its vCPUs do not run.
    Paused,
    /// They do.
    Resumed,
}
