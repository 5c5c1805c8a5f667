//! Control of a running machine: `freestone run --control SOCKET` listens, `freestone ctl SOCKET COMMAND` asks, and
//! `freestone net SOCKET` about the network.
//!
//! A request is one line of JSON, the answer another: `{"ok": ...}` or `{"error": "..."}`; before the answer to one that takes
//! long there are lines `{"progress": {"done": ..., "total": ...}}`. The socket is the user's own (mode
//! 0600); clients are served on the machine's event loop, a few at a time, and none can hold it up.

mod client;
mod life;
mod protocol;
mod server;
mod target;

pub(crate) use client::{Ctl, ask, ask_with, ctl, net};
pub(crate) use life::Life;
pub(crate) use protocol::{Controls, Request, limiter};
pub(crate) use server::ControlServer;
pub(crate) use target::Target;
