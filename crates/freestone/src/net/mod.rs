//! The network of a machine: what `--net` says, the cards and what they are plugged into, and `freestone net`.

mod attach;
mod cable;
mod command;
mod control;
mod host;
mod show;
mod spec;
mod user;

pub(crate) use attach::{Pump, Threads, attach, check, check_metadata, count};
pub(crate) use command::{Net, What};
pub(crate) use control::Nics;
pub(crate) use host::{Host, look};
pub(crate) use spec::{Kind, NetSpec, TapSpec};
