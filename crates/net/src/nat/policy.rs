//! What a machine may reach: [`Policy`].
//!
//! Rules are about the true destination, after the gateway's address became the host's loopback and the name server's became that
//! of the host, and after IPv4 addresses in IPv6 clothes were undressed.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use super::Protocol;

/// A network: an address and the length of its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// An address of the network.
    pub addr: IpAddr,
    /// Bits that all addresses of the network have in common: up to 32 or 128.
    pub prefix_len: u8,
}

/// Whether to allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Allow.
    Allow,
    /// Deny.
    Deny,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What to do with what matches.
    pub action: Action,
    /// The destination; `None`: any.
    pub network: Option<Cidr>,
    /// The destination's ports.
    pub ports: RangeInclusive<u16>,
    /// TCP or UDP only; `None`: both, and ICMP if all ports match.
    pub protocol: Option<Protocol>,
}

/// Rules for outgoing traffic: the first that matches decides. If none does: it is denied if there is a rule that allows, else
/// allowed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// The rules, in order.
    pub rules: Vec<Rule>,
}

impl Policy {
    /// Whether a connection or datagram may go to `to`.
    pub fn allows(&self, protocol: Protocol, to: SocketAddr) -> bool {
        // Not yet: nothing is reached.
        let _ = (protocol, to);
        false
    }
}
