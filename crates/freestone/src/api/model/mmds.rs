//! The metadata service.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// How the guest reaches its metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MmdsConfig {
    /// What the guest speaks.
    #[serde(default)]
    pub(crate) version: MmdsVersion,
    /// The cards that lead there.
    pub(crate) network_interfaces: Vec<String>,
    /// The service's address.
    #[serde(default = "address")]
    pub(crate) ipv4_address: Ipv4Addr,
    /// Whether answers are text whatever the guest accepts, as those of EC2.
    #[serde(default)]
    pub(crate) imds_compat: bool,
}

fn address() -> Ipv4Addr {
    Ipv4Addr::new(169, 254, 169, 254)
}

/// What the guest speaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MmdsVersion {
    /// Questions without a token.
    #[default]
    V1,
    /// A token first.
    V2,
}
