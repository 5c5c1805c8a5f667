//! Network cards and sockets.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NetworkInterface {
    /// Its name.
    pub(crate) iface_id: String,
    /// The tap of the host; or `freestone:` and what `freestone run --net` takes.
    pub(crate) host_dev_name: String,
    /// The guest's MAC address.
    #[serde(default)]
    pub(crate) guest_mac: Option<String>,
    /// The largest packet, told to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mtu: Option<u16>,
    /// Limits of what the guest receives.
    #[serde(default)]
    pub(crate) rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what it sends.
    #[serde(default)]
    pub(crate) tx_rate_limiter: Option<RateLimiter>,
}

/// Other limits.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NetworkUpdate {
    /// The card.
    pub(crate) iface_id: String,
    /// The buckets that change.
    #[serde(default)]
    pub(crate) rx_rate_limiter: Option<RateLimiter>,
    /// The buckets that change.
    #[serde(default)]
    pub(crate) tx_rate_limiter: Option<RateLimiter>,
}

/// Sockets between guest and host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vsock {
    /// The guest's number, 3 or more.
    pub(crate) guest_cid: u32,
    /// The socket on the host.
    pub(crate) uds_path: PathBuf,
    /// Deprecated, and without meaning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) vsock_id: Option<String>,
}
