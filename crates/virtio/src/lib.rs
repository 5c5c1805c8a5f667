#![cfg_attr(feature = "blk", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "blk"),
    doc = "virtio 1.2 devices and transports that know no hypervisor; each device is a feature."
)]
#![forbid(unsafe_code)]

#[cfg(feature = "balloon")]
pub mod balloon;
#[cfg(feature = "blk")]
pub mod blk;
#[cfg(feature = "console")]
pub mod console;
mod control;
mod device;
mod error;
pub mod features;
#[cfg(feature = "mem")]
pub mod mem;
pub mod mmio;
pub mod pci;
mod plug;
#[cfg(feature = "pmem")]
pub mod pmem;
pub mod queue;
pub mod rate;
#[cfg(feature = "rng")]
pub mod rng;
pub mod stats;
pub mod transport;
#[cfg(feature = "vsock")]
pub mod vsock;
mod worker;

#[cfg(feature = "blk")]
pub use blk::{BlkCounts, BlkStats, Block, BlockConfig};
pub use control::DeviceControl;
pub use device::{ActiveQueue, DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
pub use error::{Error, Result};
pub use mmio::{MmioTransport, MmioWiring, VirtioMmioPlug};
pub use pci::{PciTransport, PciWiring, VirtioPciPlug};
pub use plug::{Transport, plug, plug_with_stats};
pub use queue::{
    AttachedQueue, Chain, ChainBuffers, QueueConfig, QueueState, RingPosition, RingState, SpareBuffers,
    VirtQueue,
};
pub use stats::{DeviceStats, Latencies, QueueCounts, QueueStats};
pub use transport::{DeviceCore, Kicks, TransportOps};
pub use worker::{QueueWorker, RequestHandler};
