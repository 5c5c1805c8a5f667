#![doc = include_str!("../README.md")]
// One module may: `tap::sys`, which has the ioctls of a tap.
#![deny(unsafe_code)]

mod bridge;
mod counters;
mod error;
mod frame;
pub mod gso;
mod header;
mod mac;
mod port;

#[cfg(feature = "mmds")]
pub mod mmds;
#[cfg(feature = "nat")]
pub mod nat;
#[cfg(feature = "pcap")]
pub mod pcap;
#[cfg(feature = "stream")]
pub mod stream;
#[cfg(feature = "switch")]
pub mod switch;
#[cfg(feature = "tap")]
pub mod tap;

pub use bridge::{Bridge, BridgeCounts};
pub use counters::{PortCounts, PortStats};
pub use error::{Error, Result};
pub use frame::Frame;
#[cfg(any(feature = "tap", feature = "switch", feature = "nat"))]
pub(crate) use header::SharedOffloads;
pub use header::{Gso, Offloads, VnetHeader};
pub use mac::MacAddr;
pub use port::{Endpoint, Port, PortInfo, Received, Sent, Setup, Source};
