//! User-mode NAT: a network for one machine, made of ordinary sockets of the host. No privileges, no helper process.
//!
//! The NAT ends the machine's connections and datagrams and makes the host's of them, so no packet of the machine ever leaves.
//! [`Nat`] is the [`Port`](crate::Port); [`NatHandle`] changes and shows it while it works.
//!
//! Inside: `engine` takes frames apart and drives everything; `tcp`, `udp`, `icmp` relay; `link` is ARP and IPv6 neighbour
//! discovery, `dhcp` and `dns` are the services; `dial` is the one place where sockets to the host are made, and asks `policy`.

mod admission;
mod config;
mod context;
mod dhcp;
mod dial;
mod dns;
mod emit;
mod engine;
mod forward;
mod fragment;
mod handle;
mod icmp;
mod link;
mod outbox;
mod policy;
mod port;
mod stats;
mod tcp;
#[cfg(test)]
mod test_context;
mod udp;

pub use config::{Forward, GuestForward, GuestTarget, Ipv4Config, Ipv6Config, Limits, NatConfig, Protocol};
pub use dial::{Dial, HostDial};
pub use handle::NatHandle;
pub use policy::{Action, Cidr, Policy, Rule};
pub use port::Nat;
pub use stats::{FlowInfo, FlowState, NatCounts, NatStats};
