//! What a network card did that its queues do not know: frames, and why some were dropped.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one pair of queues: written by its worker alone.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct PairStats {
    pub tx_frames: Counter,
    pub tx_bytes: Counter,
    pub tx_malformed: Counter,
    pub tx_offloads: Counter,
    pub tx_length: Counter,
    pub tx_link_down: Counter,
    pub tx_busy: Counter,
    pub rx_frames: Counter,
    pub rx_bytes: Counter,
    pub rx_filtered: Counter,
    pub rx_too_large: Counter,
    pub rx_offloads: Counter,
    pub rx_link_down: Counter,
    pub rx_inactive: Counter,
    pub rx_useless: Counter,
    pub rx_starved: Counter,
}

/// A counter with one writer: adding is a load and a store, and no locked instruction.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(super) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}

/// Counts what a [`Net`](super::Net) device did; to be read at any time, from any thread. What each queue did is in
/// [`DeviceStats`](crate::DeviceStats), what went through the port in [`PortStats`](freestone_net::PortStats).
#[derive(Debug, Default)]
pub struct NetStats {
    pub(super) pairs: Box<[PairStats]>,
    pub(super) commands: Counter,
    pub(super) refused: Counter,
}

/// [`NetStats`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct NetCounts {
    /// Frames from the driver that went to the port.
    pub tx_frames: u64,
    /// Their bytes, without headers of virtio-net.
    pub tx_bytes: u64,
    /// Frames from the driver that were dropped because their header makes no sense.
    pub tx_malformed: u64,
    /// Frames from the driver that were dropped because they leave undone what was not negotiated.
    pub tx_offloads: u64,
    /// Frames from the driver that were dropped because they are too short or too long for Ethernet.
    pub tx_length: u64,
    /// Frames from the driver that were dropped because the link was down.
    pub tx_link_down: u64,
    /// Times that the port had no room for a frame, which then waited.
    pub tx_busy: u64,
    /// Frames that the driver got.
    pub rx_frames: u64,
    /// Their bytes, without headers of virtio-net.
    pub rx_bytes: u64,
    /// Frames for the driver that it did not want: by their address or VLAN.
    pub rx_filtered: u64,
    /// Frames for the driver that were dropped because its buffers cannot hold them, or that are too short for Ethernet.
    pub rx_too_large: u64,
    /// Frames for the driver that were dropped because they leave undone what it did not allow.
    pub rx_offloads: u64,
    /// Frames for the driver that were dropped because the link was down.
    pub rx_link_down: u64,
    /// Frames for the driver that were dropped because it does not look at the queue that they came for.
    pub rx_inactive: u64,
    /// Buffers of the driver that were too short for even a header, and were given back empty.
    pub rx_useless: u64,
    /// Times that frames had to wait for buffers of the driver.
    pub rx_starved: u64,
    /// Commands in the control queue.
    pub commands: u64,
    /// Those of them that were answered with an error.
    pub refused: u64,
}

impl NetStats {
    pub(super) fn new(pairs: u16) -> Self {
        Self { pairs: (0..pairs).map(|_| PairStats::default()).collect(), ..Self::default() }
    }

    /// The counts so far, of all pairs of queues together. They are not taken at one instant.
    pub fn counts(&self) -> NetCounts {
        let get = |counter: &Counter| counter.0.load(Ordering::Relaxed);
        let sum = |counter: fn(&PairStats) -> &Counter| {
            self.pairs.iter().fold(0u64, |sum, pair| sum.wrapping_add(get(counter(pair))))
        };
        NetCounts {
            tx_frames: sum(|pair| &pair.tx_frames),
            tx_bytes: sum(|pair| &pair.tx_bytes),
            tx_malformed: sum(|pair| &pair.tx_malformed),
            tx_offloads: sum(|pair| &pair.tx_offloads),
            tx_length: sum(|pair| &pair.tx_length),
            tx_link_down: sum(|pair| &pair.tx_link_down),
            tx_busy: sum(|pair| &pair.tx_busy),
            rx_frames: sum(|pair| &pair.rx_frames),
            rx_bytes: sum(|pair| &pair.rx_bytes),
            rx_filtered: sum(|pair| &pair.rx_filtered),
            rx_too_large: sum(|pair| &pair.rx_too_large),
            rx_offloads: sum(|pair| &pair.rx_offloads),
            rx_link_down: sum(|pair| &pair.rx_link_down),
            rx_inactive: sum(|pair| &pair.rx_inactive),
            rx_useless: sum(|pair| &pair.rx_useless),
            rx_starved: sum(|pair| &pair.rx_starved),
            commands: get(&self.commands),
            refused: get(&self.refused),
        }
    }
}

impl NetCounts {
    /// Frames from the driver that were dropped.
    pub fn tx_dropped(&self) -> u64 {
        self.tx_malformed + self.tx_offloads + self.tx_length + self.tx_link_down
    }

    /// Frames for the driver that were dropped, but for those that it did not want.
    pub fn rx_dropped(&self) -> u64 {
        self.rx_too_large + self.rx_offloads + self.rx_link_down + self.rx_inactive
    }
}

impl fmt::Display for NetCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tx_frames, tx_bytes, rx_frames, rx_bytes, rx_filtered, .. } = self;
        write!(f, "{tx_frames} frames sent ({tx_bytes} bytes, {} dropped), ", self.tx_dropped())?;
        write!(
            f,
            "{rx_frames} received ({rx_bytes} bytes, {} dropped, {rx_filtered} filtered)",
            self.rx_dropped()
        )
    }
}
