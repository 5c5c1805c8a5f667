//! virtio-vsock (virtio 1.2, section 5.10): stream sockets between a guest and programs of the host, with no network between.
//!
//! [`Vsock`] is the device. What it connects the guest to is a [`HostSide`]; [`UnixHost`] is the usual one. Datagrams and
//! SEQPACKET sockets are not offered.
//!
//! The protocol is in `connection` and `endpoint`, which know no queues and no sockets; the worker joins them to the queues.

mod connection;
mod endpoint;
mod host;
pub mod packet;
mod ring;
mod stats;
#[cfg(test)]
mod tests;
mod unix;
mod worker;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use freestone_snapshot::{Restoring, Saving};

pub use host::{HostEvent, HostSide, StreamId};
pub use stats::{VsockCounts, VsockStats};
pub use unix::UnixHost;

use crate::device::{DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::{Error, Result};
use endpoint::{Endpoint, Limits};
use worker::{SharedEndpoint, VsockWorker, lock};

/// Feature bits of this device type that are offered, as masks (5.10.3).
pub mod feature {
    /// `VIRTIO_VSOCK_F_STREAM`: stream sockets.
    pub const STREAM: u64 = 1 << 0;
}

/// Bytes of the configuration space: the guest's CID (5.10.4).
const CONFIG_LEN: u32 = 8;
/// The first CID that a guest can have (5.10.4).
const FIRST_GUEST_CID: u32 = 3;

/// How a [`Vsock`] device behaves.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct VsockConfig {
    /// The guest's CID: from 3 to 4294967294.
    pub cid: u32,
    /// Entries of each queue: a power of two up to 32768. Default: 256.
    pub queue_size: u16,
    /// Connections there may be at once, with those being opened or closed. Each takes up to 64 KiB. Default: 1024.
    pub max_connections: usize,
    /// How long the guest may take to answer a connection or to close one, and how long the last bytes of a closed connection
    /// may wait for the program of the host. Default: 8 s.
    pub timeout: Duration,
    /// How long the worker looks at an empty queue before it asks for kicks, where that proves useful. Default: 10 us.
    pub poll: Duration,
}

impl VsockConfig {
    /// The default configuration for a guest with this CID.
    pub fn new(cid: u32) -> Self {
        Self {
            cid,
            queue_size: 256,
            max_connections: 1024,
            timeout: Duration::from_secs(8),
            poll: Duration::from_micros(10),
        }
    }

    /// Sets [`queue_size`](Self::queue_size).
    #[must_use]
    pub fn queue_size(mut self, queue_size: u16) -> Self {
        self.queue_size = queue_size;
        self
    }

    /// Sets [`max_connections`](Self::max_connections).
    #[must_use]
    pub fn max_connections(mut self, max_connections: usize) -> Self {
        self.max_connections = max_connections;
        self
    }

    /// Sets [`timeout`](Self::timeout).
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets [`poll`](Self::poll).
    #[must_use]
    pub fn poll(mut self, poll: Duration) -> Self {
        self.poll = poll;
        self
    }
}

/// A virtio socket device.
///
/// Connections live until the device is reset: pausing and resuming keeps them. They do not survive in a restored machine.
#[derive(Debug)]
pub struct Vsock {
    info: DeviceInfo,
    cid: u64,
    poll: Duration,
    endpoint: SharedEndpoint,
    stats: Arc<VsockStats>,
}

impl Vsock {
    /// A device that connects its guest to `host`.
    ///
    /// # Errors
    /// [`Error::Config`] if the CID is none that a guest can have.
    pub fn new(host: impl HostSide + 'static, config: VsockConfig) -> Result<Self> {
        let VsockConfig { cid, queue_size, max_connections, timeout, poll } = config;
        if cid < FIRST_GUEST_CID || cid == u32::MAX {
            let device = format!("vsock with CID {cid}");
            return Err(Error::Config { device, reason: "a guest's CID is from 3 to 4294967294" });
        }
        let cid = u64::from(cid);
        let stats = Arc::<VsockStats>::default();
        let limits = Limits { cid, max_connections, timeout };
        let endpoint = Endpoint::new(Box::new(host), limits, Arc::clone(&stats));
        let info = DeviceInfo {
            device_type: DeviceType::VSOCK,
            features: feature::STREAM,
            queue_max_sizes: vec![queue_size; 3],
            config_len: CONFIG_LEN,
        };
        Ok(Self { info, cid, poll, endpoint: Arc::new(Mutex::new(endpoint)), stats })
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<VsockStats> {
        Arc::clone(&self.stats)
    }

    /// For machines that restore a guest from a snapshot.
    pub fn transport_reset(&self) -> TransportReset {
        TransportReset(Arc::clone(&self.endpoint))
    }
}

/// Tells the guest of a [`Vsock`] device that its connections are gone, as they are after it was restored from a snapshot.
#[derive(Debug, Clone)]
pub struct TransportReset(SharedEndpoint);

impl TransportReset {
    /// Drops all connections, and tells the guest by a transport reset event when the device goes on, so that it drops its own
    /// and reads its CID again (virtio 1.2, section 5.10.6.7). To be called while the device is paused. A reset by the driver
    /// makes it void.
    pub fn send(&self) {
        lock(&self.0).reset_transport();
    }
}

impl VirtioDevice for Vsock {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = self.cid.to_le_bytes();
        let space = space.get(offset..).unwrap_or_default();
        data.iter_mut().zip(space).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let worker = VsockWorker::new(resources, Arc::clone(&self.endpoint), self.poll)?;
        Ok(vec![Box::new(worker)])
    }

    fn reset(&mut self) {
        lock(&self.endpoint).reset();
    }

    /// Connections do not survive, and there is nothing else.
    fn save(&self, _: &mut Saving<'_>) -> freestone_bus::Result<()> {
        Ok(())
    }

    /// As [`TransportReset::send`]: when the device goes on, the guest learns that its connections are gone, and reads its CID
    /// again, which may be another one now.
    fn restore(&mut self, _: u64, _: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        lock(&self.endpoint).reset_transport();
        Ok(())
    }

    fn shutdown(&mut self) -> Result<()> {
        lock(&self.endpoint).reset();
        Ok(())
    }
}
