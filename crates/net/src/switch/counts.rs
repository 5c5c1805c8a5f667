//! What a switch counts, and shows.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Vlan;
use crate::{MacAddr, PortCounts};

/// Number of a port in its switch. A number is used again after its port is gone.
pub type PortId = u16;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident $name:ident,)*) => {
        /// Why a frame went nowhere.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As it is shown: in lower case, with underscores.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($name),)*
                }
            }
        }
    };
}

reasons! {
    /// Too short, too long, a sender that is no station, or a vnet header that cannot be.
    Malformed malformed,
    /// The sender's address is not that of the port, or belongs to another port.
    Spoofed spoofed,
    /// More than the port may send.
    Limited limited,
    /// More for everybody than the port may send.
    Storm storm,
    /// In a VLAN that the port is not in.
    Vlan vlan,
    /// For the bridge itself (IEEE 802.1D, 01:80:c2:00:00:00 to 0f): never forwarded.
    Reserved reserved,
    /// For somebody at the same port.
    Local local,
    /// From an isolated port to another.
    Isolated isolated,
    /// There is nobody else.
    Nobody nobody,
    /// The destination does not run.
    Closed closed,
    /// The destination did not take its frames in time. Counted there.
    Full full,
    /// What was left undone could not be done for the destination.
    Offload offload,
}

/// Why an address was not where it could be, and so on: events of one port.
#[derive(Debug, Default)]
pub(super) struct Counters {
    forwarded: AtomicU64,
    flooded: AtomicU64,
    learned: AtomicU64,
    moved: AtomicU64,
    unlearned: AtomicU64,
    drops: [AtomicU64; DropReason::ALL.len()],
}

impl Counters {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn forwarded(&self) {
        Self::add(&self.forwarded);
    }

    pub(super) fn flooded(&self) {
        Self::add(&self.flooded);
    }

    pub(super) fn learned(&self) {
        Self::add(&self.learned);
    }

    pub(super) fn moved(&self) {
        Self::add(&self.moved);
    }

    pub(super) fn unlearned(&self) {
        Self::add(&self.unlearned);
    }

    pub(super) fn dropped(&self, reason: DropReason) {
        if let Some(counter) = self.drops.get(reason as usize) {
            Self::add(counter);
        }
    }

    pub(super) fn counts(&self) -> SwitchCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut drops = [0; DropReason::ALL.len()];
        drops.iter_mut().zip(&self.drops).for_each(|(value, counter)| *value = get(counter));
        SwitchCounts {
            forwarded: get(&self.forwarded),
            flooded: get(&self.flooded),
            learned: get(&self.learned),
            moved: get(&self.moved),
            unlearned: get(&self.unlearned),
            drops,
        }
    }
}

/// Counters of a port or of a whole switch at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SwitchCounts {
    /// Frames that went to the one port they were for.
    pub forwarded: u64,
    /// Frames that went to all ports.
    pub flooded: u64,
    /// Addresses that were new.
    pub learned: u64,
    /// Addresses that came from another port.
    pub moved: u64,
    /// Frames whose sender was not learned for want of room.
    pub unlearned: u64,
    drops: [u64; DropReason::ALL.len()],
}

impl SwitchCounts {
    /// Frames that went nowhere for this reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get(reason as usize).copied().unwrap_or(0)
    }

    /// All reasons for which frames went nowhere.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> {
        DropReason::ALL.iter().copied().zip(self.drops).filter(|(_, count)| *count > 0)
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.forwarded += other.forwarded;
        self.flooded += other.flooded;
        self.learned += other.learned;
        self.moved += other.moved;
        self.unlearned += other.unlearned;
        self.drops.iter_mut().zip(other.drops).for_each(|(sum, count)| *sum += count);
    }
}

/// A port as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortSummary {
    /// Its number.
    pub id: PortId,
    /// Its name.
    pub name: String,
    /// Its VLANs.
    pub vlan: Vlan,
    /// Whether it talks to ports only that are not isolated.
    pub isolated: bool,
    /// The only address that it may send from.
    pub pinned: Option<MacAddr>,
    /// Pairs of queues; 0 if it is not open.
    pub pairs: usize,
    /// Frames that wait for the machine.
    pub waiting: usize,
    /// What went through, as the machine sees it.
    pub traffic: PortCounts,
    /// What the switch did with frames of this port.
    pub counts: SwitchCounts,
}

/// An address that was learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LearnedAddress {
    /// The address.
    pub mac: MacAddr,
    /// The VLAN in which it was seen.
    pub vlan: u16,
    /// Where.
    pub port: PortId,
    /// Whether it belongs to the port for good.
    pub pinned: bool,
    /// When it was seen last.
    pub age: Duration,
}

/// A switch at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SwitchInfo {
    /// Its ports, by number.
    pub ports: Vec<PortSummary>,
    /// Addresses, in order.
    pub table: Vec<LearnedAddress>,
    /// Counters of all ports together, and of those that are gone.
    pub counts: SwitchCounts,
}
