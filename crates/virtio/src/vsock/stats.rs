//! Counters of a vsock device.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what a vsock device did; to be read at any time, from any thread.
#[derive(Debug, Default)]
pub struct VsockStats {
    pub(super) connections: AtomicU64,
    pub(super) opened_by_guest: AtomicU64,
    pub(super) opened_by_host: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) resets: AtomicU64,
    pub(super) violations: AtomicU64,
    pub(super) timeouts: AtomicU64,
    pub(super) packets_from_guest: AtomicU64,
    pub(super) packets_to_guest: AtomicU64,
    pub(super) bytes_to_host: AtomicU64,
    pub(super) bytes_to_guest: AtomicU64,
}

/// [`VsockStats`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct VsockCounts {
    /// Connections there are now, with those being opened or closed.
    pub connections: u64,
    /// Connections that the guest opened to the host.
    pub opened_by_guest: u64,
    /// Connections that the host opened and the guest accepted.
    pub opened_by_host: u64,
    /// Connections that were refused, by either side or because there were too many.
    pub refused: u64,
    /// RST packets to the guest, for whatever reason; an orderly close ends with one too.
    pub resets: u64,
    /// Packets that broke the protocol: wrong addresses, lengths, types, operations, or more data than there was credit for.
    pub violations: u64,
    /// Connections that were not opened or closed in time.
    pub timeouts: u64,
    /// Packets taken from the guest.
    pub packets_from_guest: u64,
    /// Packets given to the guest.
    pub packets_to_guest: u64,
    /// Payload that host streams took.
    pub bytes_to_host: u64,
    /// Payload given to the guest.
    pub bytes_to_guest: u64,
}

impl VsockStats {
    /// The counts so far. They are not taken at one instant.
    pub fn counts(&self) -> VsockCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VsockCounts {
            connections: get(&self.connections),
            opened_by_guest: get(&self.opened_by_guest),
            opened_by_host: get(&self.opened_by_host),
            refused: get(&self.refused),
            resets: get(&self.resets),
            violations: get(&self.violations),
            timeouts: get(&self.timeouts),
            packets_from_guest: get(&self.packets_from_guest),
            packets_to_guest: get(&self.packets_to_guest),
            bytes_to_host: get(&self.bytes_to_host),
            bytes_to_guest: get(&self.bytes_to_guest),
        }
    }
}

impl fmt::Display for VsockCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connections, opened_by_guest, opened_by_host, refused, resets, violations, .. } = self;
        write!(
            f,
            "{connections} connections now, {opened_by_guest} by the guest, {opened_by_host} by the host, {refused} refused, \
             {} bytes to the host, {} bytes to the guest, {resets} resets, {violations} violations, {} timeouts",
            self.bytes_to_host, self.bytes_to_guest, self.timeouts
        )
    }
}

/// Counters have one writer.
pub(super) fn count(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}
