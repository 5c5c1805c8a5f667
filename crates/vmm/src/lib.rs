#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod board;
mod builder;
mod error;
mod exit;
mod firmware;
mod inventory;
mod machine;
pub mod migrate;
mod paused;
mod payload;
mod restore;
mod saved;
pub mod store;
mod vcpus;

pub use builder::MachineBuilder;
pub use error::{Error, Result};
pub use exit::ExitReason;
pub use inventory::Inventory;
pub use machine::{Attention, Machine, MachineHandle, State};
pub use paused::Paused;
pub use payload::{FileSource, Payload};
pub use saved::MachineSection;

// One facade: a VMM needs no other dependency than this crate and a hypervisor.
pub use freestone_block as block;
pub use freestone_bus as bus;
pub use freestone_devices as devices;
pub use freestone_hypervisor as hypervisor;
#[cfg(feature = "kvm")]
pub use freestone_kvm as kvm;
pub use freestone_loader as loader;
pub use freestone_memory as memory;
pub use freestone_net as net;
pub use freestone_snapshot as snapshot;
pub use freestone_vcpu as vcpu;
pub use freestone_virtio as virtio;
