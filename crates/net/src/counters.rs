//! [`PortStats`]: what went through a port.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a port, seen from the machine that is plugged into it. Written by whoever moves frames, read by any thread.
#[derive(Debug, Default)]
pub struct PortStats {
    tx_frames: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
    rx_frames: AtomicU64,
    rx_bytes: AtomicU64,
    rx_dropped: AtomicU64,
}

/// The values of [`PortStats`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PortCounts {
    /// Frames that the machine sent; one that is to be cut into segments counts as one.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames that it sent and that went nowhere: malformed, forbidden, or nobody had room.
    pub tx_dropped: u64,
    /// Frames for the machine.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames for the machine that it had no room for.
    pub rx_dropped: u64,
}

impl PortStats {
    /// Counts a frame that the machine sent.
    pub fn sent(&self, bytes: usize) {
        self.tx_frames.fetch_add(1, Ordering::Relaxed);
        self.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts a frame that the machine sent and that went nowhere.
    pub fn send_dropped(&self) {
        self.tx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a frame that the machine got.
    pub fn received(&self, bytes: usize) {
        self.rx_frames.fetch_add(1, Ordering::Relaxed);
        self.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts a frame that the machine did not get.
    pub fn receive_dropped(&self) {
        self.rx_dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// The values now.
    pub fn counts(&self) -> PortCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PortCounts {
            tx_frames: get(&self.tx_frames),
            tx_bytes: get(&self.tx_bytes),
            tx_dropped: get(&self.tx_dropped),
            rx_frames: get(&self.rx_frames),
            rx_bytes: get(&self.rx_bytes),
            rx_dropped: get(&self.rx_dropped),
        }
    }
}
