//! What is beyond Firecracker's API, under `/freestone/`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Children of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fork {
    /// How many.
    pub(crate) count: u32,
    /// Where their API sockets are made, as `ID.sock`; without it they have none.
    #[serde(default)]
    pub(crate) socket_dir: Option<PathBuf>,
    /// Whether they run at once.
    #[serde(default = "yes")]
    pub(crate) resume: bool,
}

fn yes() -> bool {
    true
}

/// A child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Forked {
    /// Its name.
    pub(crate) id: String,
    /// Its process.
    pub(crate) pid: u32,
    /// Its API socket, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) api_socket: Option<PathBuf>,
}

/// A port of the host that leads to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Forward {
    /// The card; not needed if one alone has a user network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) iface_id: Option<String>,
    /// `tcp:127.0.0.1:2222-:22`; to remove it, the host side is enough.
    pub(crate) forward: String,
}

/// All of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Forwards {
    /// In the order of the cards.
    pub(crate) forwards: Vec<Forward>,
}
