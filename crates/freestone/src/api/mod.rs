//! The HTTP API over a Unix socket: Firecracker's operations and JSON, and our own under `/freestone/`.
//!
//! From the outside in: [`server`] has the sockets, [`http`] the protocol, [`operation`] what is asked, [`controller`] and
//! [`carry_out`] what it means in each state, [`resources`] what a machine is to be made of, and [`engine`] what makes it. All but
//! the last is one thread, and none of it knows of KVM.

mod carry_out;
mod connection;
mod controller;
pub(crate) mod engine;
pub(crate) mod fault;
mod http;
pub(crate) mod logger;
pub(crate) mod mailbox;
mod metrics;
mod mmds;
pub(crate) mod model;
mod operation;
pub(crate) mod resources;
mod server;
#[cfg(test)]
mod tests;

pub(crate) use controller::{Controller, End, Instance};
pub(crate) use metrics::open_sink;
pub(crate) use server::{Server, Socket};

/// The Firecracker whose API this is.
pub(crate) const API_VERSION: &str = "1.17.0";
/// Who answers.
const APP_NAME: &str = "Freestone";
/// Bytes of a body if nothing else is said.
pub(crate) const MAX_BODY: usize = 51200;
