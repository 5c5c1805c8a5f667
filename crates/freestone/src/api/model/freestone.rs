//! What is beyond Firecracker's API, under `/freestone/`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::NetworkOverride;

/// Children of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fork {
    /// How many.
    pub(crate) count: u32,
    /// They are called NAME-1 and so on [default: the instance's name].
    #[serde(default)]
    pub(crate) name: Option<String>,
    /// Number of the first.
    #[serde(default = "one")]
    pub(crate) first: u32,
    /// Where their control sockets are made, as `ID.sock`, besides those in their folders.
    #[serde(default)]
    pub(crate) socket_dir: Option<PathBuf>,
    /// Whether they run at once.
    #[serde(default = "yes")]
    pub(crate) resume: bool,
    /// Other networks behind their cards, where `{}` is the child's number.
    #[serde(default)]
    pub(crate) network_overrides: Vec<NetworkOverride>,
}

fn one() -> u32 {
    1
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
    /// Its control socket.
    pub(crate) control: PathBuf,
}

/// What came of a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Family {
    /// In the order of their numbers.
    pub(crate) children: Vec<Forked>,
    /// Whether the machine itself stands still now: for its children if it did not before.
    pub(crate) paused: bool,
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
