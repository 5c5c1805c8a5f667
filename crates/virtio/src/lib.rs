#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod blk;
mod control;
mod device;
mod error;
pub mod features;
pub mod mmio;
pub mod queue;
pub mod transport;
mod worker;

pub use blk::{BlkCounts, BlkStats, Block, BlockConfig};
pub use control::DeviceControl;
pub use device::{ActiveQueue, DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
pub use error::{Error, Result};
pub use mmio::{MmioTransport, MmioWiring, VirtioMmioPlug};
pub use queue::{AttachedQueue, Chain, ChainBuffers, QueueConfig, SpareBuffers, VirtQueue};
pub use transport::{DeviceCore, Kicks, TransportOps};
pub use worker::{QueueWorker, RequestHandler};
// Part of the API on purpose: the state of a queue in a form that other rust-vmm crates know.
pub use virtio_queue::QueueState;
