//! What a NAT counts and shows.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Protocol;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of a NAT, from its making on.
        #[derive(Debug, Default)]
        pub struct NatStats {
            $($name: AtomicU64,)*
        }

        /// The values of [`NatStats`] at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[non_exhaustive]
        pub struct NatCounts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl NatStats {
            /// The values now.
            pub fn counts(&self) -> NatCounts {
                NatCounts { $($name: self.$name.load(Ordering::Relaxed),)* }
            }

            $(
                /// Counts one more.
                pub(super) fn $name(&self) {
                    self.$name.fetch_add(1, Ordering::Relaxed);
                }
            )*
        }

        impl NatCounts {
            /// All counters, by name.
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Frames that are no Ethernet, ARP, IPv4 or IPv6, or not for the gateway.
    ignored,
    /// Packets with a header that is impossible, or a wrong checksum.
    malformed,
    /// Packets whose sender is not of the machine's network.
    spoofed,
    /// Connections, datagrams and echo requests that the policy denied.
    denied,
    /// What was refused because of a limit.
    limited,
    /// IP fragments.
    fragments,
    /// Frames for the machine that were dropped because too many waited.
    overflowed,
    /// TCP connections by the machine that were made.
    tcp_opened,
    /// TCP connections to the machine that were made.
    tcp_accepted,
    /// TCP connections that could not be made.
    tcp_failed,
    /// TCP connections that ended orderly.
    tcp_closed,
    /// TCP connections that were reset or timed out.
    tcp_reset,
    /// TCP segments that were sent to the machine again.
    tcp_retransmitted,
    /// UDP flows.
    udp_opened,
    /// ICMP echo requests that were passed on or answered.
    icmp_echoes,
    /// DNS queries.
    dns_queries,
    /// DHCP messages that were answered.
    dhcp_answers,
}

/// How far a flow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FlowState {
    /// Being made.
    Opening,
    /// In use.
    Open,
    /// One side is done.
    HalfClosed,
    /// Both are done.
    Closing,
}

/// A connection, or datagrams that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowInfo {
    /// `None`: ICMP echo; the ports are its identifier and 0 then.
    pub protocol: Option<Protocol>,
    /// The machine's side.
    pub guest: SocketAddr,
    /// The other side as the machine sees it.
    pub server: SocketAddr,
    /// The other side as it is; `None` for what has no address.
    pub peer: Option<SocketAddr>,
    /// Whether the machine began.
    pub outgoing: bool,
    /// How far it is.
    pub state: FlowState,
    /// Bytes from the machine.
    pub sent: u64,
    /// Bytes to the machine.
    pub received: u64,
    /// Since when there is it.
    pub age: Duration,
    /// Since when nothing happened.
    pub idle: Duration,
}
