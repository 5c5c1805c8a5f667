//! A machine of the reference VMM: made from a configuration, conducted through its life, commanded from other threads.
//!
//! [`Vm`] belongs to the thread that made it and drives the devices there. Whoever else wants something of it (the API, the
//! control socket) has a [`Commander`] and sends it what to do.

mod command;
mod config;
mod fork;
mod memory;
mod migrate;
mod restore;
mod snapshot;
mod vm;

pub(crate) use command::Commander;
pub(crate) use config::Config;
pub(crate) use fork::{Child, ForkRequest, ForkSource, fork};
pub(crate) use memory::{MemorySource, PageSource, RecordRequest};
pub(crate) use migrate::{Arrival, MigrateRequest, Place as MigratePlace, receive};
pub(crate) use restore::{Named, Remap, RestoreRequest, restore};
pub(crate) use snapshot::{Kind, SnapshotRequest};
pub(crate) use vm::{Origin, Vm};
