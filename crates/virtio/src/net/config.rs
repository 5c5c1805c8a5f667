//! [`NetConfig`]: how a network card presents its port; and the configuration space that says so to the driver.

use std::time::Duration;

use freestone_net::{MacAddr, PortInfo};

use super::feature;
use crate::rate::RateLimiter;
use crate::worker::DEFAULT_POLL;
use crate::{Error, Result};

/// Bytes of the configuration space up to and with `duplex` (5.1.4).
pub(super) const CONFIG_LEN: usize = 17;
/// Most pairs of queues: each has a worker.
const MAX_PAIRS: u16 = 256;
/// `VIRTIO_NET_S_LINK_UP`
const LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`
const ANNOUNCE: u16 = 2;
/// Full duplex (5.1.4).
const DUPLEX_FULL: u8 = 1;

/// How a [`Net`](super::Net) device presents its port.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NetConfig {
    /// The card's address. Default: what the port says, or else a random one.
    pub mac: Option<MacAddr>,
    /// The largest IP packet that the driver should send: from 68 to 65535, and no more than the port's. Default: the port's.
    pub mtu: Option<u16>,
    /// Pairs of queues, from 1 to what the port has, at most 256: each is served by a worker of its own. Default: 1.
    pub pairs: u16,
    /// Entries of each queue: a power of two from 4 to 32768. Default: 256.
    pub queue_size: u16,
    /// Limit of frames and bytes that the machine receives, for all queues together. Default: none.
    pub rx_limiter: Option<RateLimiter>,
    /// Limit of frames and bytes that the machine transmits, for all queues together. Default: none.
    pub tx_limiter: Option<RateLimiter>,
    /// How long a worker looks at an empty transmit queue before it asks for kicks; see
    /// [`QueueWorker::poll`](crate::QueueWorker::poll). Default: 10 us.
    pub poll: Duration,
    /// What the driver tells its users of the speed, in Mbit/s, and that it is full duplex. It limits nothing. Default: unknown.
    pub speed: Option<u32>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            mac: None,
            mtu: None,
            pairs: 1,
            queue_size: 256,
            rx_limiter: None,
            tx_limiter: None,
            poll: DEFAULT_POLL,
            speed: None,
        }
    }
}

/// One setter for each field, named as the field.
macro_rules! setters {
    ($($field:ident: $type:ty = $value:expr),* $(,)?) => {$(
        #[doc = concat!("Sets [`", stringify!($field), "`](Self::", stringify!($field), ").")]
        #[must_use]
        pub fn $field(mut self, $field: $type) -> Self {
            self.$field = $value;
            self
        }
    )*};
}

impl NetConfig {
    /// The default configuration.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        mac: MacAddr = Some(mac),
        mtu: u16 = Some(mtu),
        pairs: u16 = pairs,
        queue_size: u16 = queue_size,
        rx_limiter: RateLimiter = Some(rx_limiter),
        tx_limiter: RateLimiter = Some(tx_limiter),
        poll: Duration = poll,
        speed: u32 = Some(speed),
    }

    /// Whether this is possible with a port; `device` is for the message.
    pub(super) fn check(&self, device: &str, info: &PortInfo) -> Result<()> {
        let max = info.max_pairs.min(MAX_PAIRS);
        let largest = info.mtu.unwrap_or(u16::MAX);
        let rules = [
            (
                (1..=max).contains(&self.pairs),
                "a network card has 1 to 256 pairs of queues, and no more than its port",
            ),
            (
                self.queue_size.is_power_of_two() && (4..=32768).contains(&self.queue_size),
                "queue sizes must be powers of two from 4 to 32768",
            ),
            (self.mac.is_none_or(MacAddr::is_station), "the address is that of a group, or of nobody"),
            (
                self.mtu.is_none_or(|mtu| (68..=largest).contains(&mtu)),
                "the MTU is from 68 to 65535 bytes, and no more than that of the port",
            ),
        ];
        match rules.iter().find(|(kept, _)| !kept) {
            Some((_, reason)) => Err(Error::Config { device: device.to_owned(), reason }),
            None => Ok(()),
        }
    }

    /// The MTU that the driver is told.
    pub(super) fn mtu_for(&self, info: &PortInfo) -> Option<u16> {
        self.mtu.or(info.mtu).filter(|mtu| *mtu >= 68)
    }

    /// The features that go with this and a port.
    pub(super) fn features(&self, info: &PortInfo) -> u64 {
        let mut features = feature::offered(info.transmit, info.receive);
        let mut offer = |when: bool, bit: u64| features |= if when { bit } else { 0 };
        offer(self.mtu_for(info).is_some(), feature::MTU);
        offer(self.pairs > 1, feature::MQ);
        offer(self.speed.is_some(), feature::SPEED_DUPLEX);
        feature::settled(features)
    }
}

/// What the configuration space says now.
#[derive(Debug)]
pub(super) struct Space {
    pub mac: MacAddr,
    pub link_up: bool,
    pub announce: bool,
}

impl Space {
    /// The bytes, for a card with `config` and `mtu`. Fields of features that are not offered are 0.
    pub(super) fn bytes(&self, config: &NetConfig, mtu: Option<u16>) -> [u8; CONFIG_LEN] {
        let [a, b, c, d, e, f] = self.mac.0;
        let status = if self.link_up { LINK_UP } else { 0 } | if self.announce { ANNOUNCE } else { 0 };
        let [s0, s1] = status.to_le_bytes();
        let [p0, p1] = if config.pairs > 1 { config.pairs } else { 0 }.to_le_bytes();
        let [m0, m1] = mtu.unwrap_or(0).to_le_bytes();
        let [v0, v1, v2, v3] = config.speed.unwrap_or(0).to_le_bytes();
        let duplex = if config.speed.is_some() { DUPLEX_FULL } else { 0 };
        [a, b, c, d, e, f, s0, s1, p0, p1, m0, m1, v0, v1, v2, v3, duplex]
    }
}
