//! The microVM metadata service: a small HTTP server at a link-local address, inside a port.
//!
//! [`MmdsPort`] is put around the port of a card. It answers the machine's ARP requests for its address and TCP to it, and lets
//! everything else through: that costs a look at the first bytes of each frame that the machine sends, and one load for each that it
//! gets. What it says is in an [`MmdsStore`], which several cards may share and which any thread may change.
//!
//! The service speaks as Firecracker's: `GET` of a path gives the value there, as JSON or as the plain text of EC2's IMDS; with
//! [`MmdsVersion::V2`] only to those who fetched a token before. A connection carries several requests, one after the other.
//!
//! It is not a web server: there is no TLS, nothing can be changed from inside, and bodies of requests are thrown away. What the
//! machine can make it remember is bounded: [`MAX_CONNECTIONS`], [`MAX_REQUEST`], [`MAX_TOKENS`]. Connections are not part of a
//! machine's saved state: those that a restored machine remembers are reset.

mod http;
mod port;
mod service;
mod stack;
mod store;
mod wire;

use std::net::Ipv4Addr;

pub use port::MmdsPort;
pub use store::{DEFAULT_LIMIT, MmdsCounts, MmdsStore};

use crate::{Error, MacAddr, Result};

/// Connections at once, over one card. When there are as many, the one that was idle longest gives way to a new one, if that was for
/// ten seconds; else the new one is refused.
pub const MAX_CONNECTIONS: usize = 30;
/// Bytes of a request without its body.
pub const MAX_REQUEST: usize = 8192;
/// Tokens at once. With another one, that which expires first is forgotten.
pub const MAX_TOKENS: usize = 1024;
/// The longest life of a token, in seconds: six hours.
pub const MAX_TOKEN_TTL: u32 = 21600;

/// The Ethernet address of the service, administered locally.
pub const MMDS_MAC: MacAddr = MacAddr([0x02, 0x4D, 0x4D, 0x44, 0x53, 0x01]);

/// How the service knows who may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MmdsVersion {
    /// Everybody may. Tokens are given and not needed.
    #[default]
    V1,
    /// Who has fetched a token by `PUT /latest/api/token`.
    V2,
}

/// How the service presents itself to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MmdsConfig {
    /// Its address: link-local, not in the first or last /24 of these (RFC 3927, section 2.1). The default is 169.254.169.254.
    pub ipv4: Ipv4Addr,
    /// How it knows who may ask.
    pub version: MmdsVersion,
    /// Answers are plain text whatever the machine accepts, as those of EC2 are.
    pub imds_compat: bool,
}

impl Default for MmdsConfig {
    fn default() -> Self {
        Self { ipv4: Ipv4Addr::new(169, 254, 169, 254), version: MmdsVersion::V1, imds_compat: false }
    }
}

impl MmdsConfig {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`ipv4`](Self::ipv4).
    #[must_use]
    pub fn ipv4(mut self, address: Ipv4Addr) -> Self {
        self.ipv4 = address;
        self
    }

    /// Sets [`version`](Self::version).
    #[must_use]
    pub fn version(mut self, version: MmdsVersion) -> Self {
        self.version = version;
        self
    }

    /// Sets [`imds_compat`](Self::imds_compat).
    #[must_use]
    pub fn imds_compat(mut self, on: bool) -> Self {
        self.imds_compat = on;
        self
    }

    /// Whether it makes sense.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that is not as [`ipv4`](Self::ipv4) says.
    pub fn check(&self) -> Result<()> {
        match self.ipv4.octets() {
            [169, 254, 1..=254, _] => Ok(()),
            _ => Err(Error::invalid(
                "address of the metadata service",
                self.ipv4.to_string(),
                "it must be from 169.254.1.0 to 169.254.254.255",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_link_local_and_not_reserved() {
        for good in ["169.254.169.254", "169.254.1.0", "169.254.254.255"] {
            MmdsConfig::new().ipv4(good.parse().unwrap()).check().unwrap();
        }
        for bad in ["169.254.0.1", "169.254.255.1", "10.0.0.1", "169.253.1.1", "0.0.0.0"] {
            assert!(MmdsConfig::new().ipv4(bad.parse().unwrap()).check().is_err(), "{bad}");
        }
    }
}
