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
#[cfg(any(feature = "mem", feature = "pmem"))]
mod device_memory;
mod error;
pub mod features;
#[cfg(feature = "mem")]
pub mod mem;
pub mod mmio;
#[cfg(feature = "net")]
pub mod net;
pub mod pci;
mod plug;
#[cfg(feature = "pmem")]
pub mod pmem;
pub mod queue;
pub mod rate;
#[cfg(feature = "rng")]
pub mod rng;
#[cfg(all(test, any(feature = "mem", feature = "net", feature = "pmem", feature = "vsock")))]
mod state_tests;
pub mod stats;
pub mod transport;
#[cfg(feature = "vsock")]
pub mod vsock;
mod worker;

#[cfg(feature = "balloon")]
pub use balloon::{
    Balloon, BalloonConfig, BalloonCounts, BalloonHandle, BalloonStatistics, HintRun, HintingStatus,
};
#[cfg(feature = "blk")]
pub use blk::{BlkCounts, BlkStats, Block, BlockConfig, BlockHandle};
pub use control::DeviceControl;
pub use device::{ActiveQueue, DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
pub use error::{Error, Result};
#[cfg(feature = "mem")]
pub use mem::{Mem, MemConfig, MemHandle, MemStatus};
pub use mmio::{MmioTransport, MmioWiring, VirtioMmioPlug};
#[cfg(feature = "net")]
pub use net::{Net, NetConfig, NetCounts, NetHandle, NetStats};
pub use pci::{PciTransport, PciWiring, VirtioPciPlug};
pub use plug::{Transport, VirtioPlug};
#[cfg(feature = "pmem")]
pub use pmem::{Pmem, PmemConfig, PmemCounts, PmemHandle, PmemStats};
pub use queue::{
    AttachedQueue, Chain, ChainBuffers, QueueConfig, QueueState, RingPosition, RingState, SpareBuffers,
    VirtQueue,
};
pub use stats::{DeviceStats, Latencies, QueueCounts, QueueStats};
pub use transport::{DeviceCore, Kicks, TransportOps};
pub use worker::{QueueWorker, RequestHandler};
