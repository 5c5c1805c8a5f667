//! [`NetHandle`]: what can be done with a network card while a machine has it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use freestone_net::{MacAddr, PortStats};

use super::{NetStats, RxFilter, Shared, feature};
use crate::rate::RateLimiter;

/// What can be done with a [`Net`](super::Net) device while it works, from any thread. It may outlive the device.
#[derive(Debug, Clone)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// Plugs the cable in or pulls it out, and tells the driver. Without it nothing goes in or out: frames of either side are
    /// dropped and counted.
    pub fn set_link(&self, up: bool) {
        let shared = &self.0;
        let mut driver = shared.driver();
        if shared.link.swap(up, Ordering::AcqRel) != up {
            driver.tell(feature::STATUS);
        }
        drop(driver);
        // Frames that waited for buffers while it was up are not to be delivered when it is up again.
        shared.wake_all();
    }

    /// Whether the cable is in.
    pub fn link(&self) -> bool {
        self.0.link.load(Ordering::Acquire)
    }

    /// Asks the driver to announce itself to the network, as it must when it has moved: `VIRTIO_NET_F_GUEST_ANNOUNCE`. Returns
    /// whether there is a driver that can.
    pub fn announce(&self) -> bool {
        let shared = &self.0;
        let mut driver = shared.driver();
        let can = driver.has(feature::GUEST_ANNOUNCE);
        if can {
            shared.announce.store(true, Ordering::Release);
            driver.tell(feature::GUEST_ANNOUNCE);
        }
        can
    }

    /// Whether the driver was asked to announce itself and has not said yet that it did.
    pub fn announcing(&self) -> bool {
        self.0.announce.load(Ordering::Acquire)
    }

    /// Changes the limits of what the machine receives and transmits, or takes them away. New buckets begin full.
    pub fn set_rate_limiters(&self, rx: Option<RateLimiter>, tx: Option<RateLimiter>) {
        self.0.rx_throttle.set(rx);
        self.0.tx_throttle.set(tx);
    }

    /// The limits of what the machine receives and transmits.
    pub fn rate_limiters(&self) -> (Option<RateLimiter>, Option<RateLimiter>) {
        (self.0.rx_throttle.limiter(), self.0.tx_throttle.limiter())
    }

    /// Times that a worker waited because of the limit of what the machine receives, and of what it transmits.
    pub fn throttled(&self) -> (u64, u64) {
        (self.0.rx_throttle.waits(), self.0.tx_throttle.waits())
    }

    /// The card's address, which the driver may have changed.
    pub fn mac(&self) -> MacAddr {
        self.0.filter().mac
    }

    /// Which frames the driver wants.
    pub fn filter(&self) -> RxFilter {
        self.0.filter().clone()
    }

    /// Pairs of queues that the driver receives on.
    pub fn active_pairs(&self) -> u16 {
        self.0.active_pairs.load(Ordering::Acquire)
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<NetStats> {
        Arc::clone(&self.0.stats)
    }

    /// The port's counters.
    pub fn port_stats(&self) -> Arc<PortStats> {
        self.0.port().stats()
    }
}
