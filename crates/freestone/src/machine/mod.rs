//! A machine of the reference VMM: made from a configuration, conducted through its life, commanded from other threads.
//!
//! [`Vm`] belongs to the thread that made it and drives the devices there. Whoever else wants something of it (the API, the
//! control socket) has a [`Commander`] and sends it what to do.

#![allow(dead_code, unused_imports, reason = "until all of it is used")]

mod command;
mod config;
mod memory;
mod restore;
mod snapshot;
mod vm;

pub(crate) use command::Commander;
pub(crate) use config::{Config, ConfigSection};
pub(crate) use memory::{MemorySource, PageSource, RecordRequest, read as read_working_set};
pub(crate) use restore::{Named, Remap, RestoreRequest, restore};
pub(crate) use snapshot::{Kind, PROGRAM, SnapshotRequest};
pub(crate) use vm::{Origin, Status, Vm};
