//! The relay of UDP.
use std::net::SocketAddr;
use std::time::Instant;

use super::context::{Context, Ready};
use super::{FlowInfo, Forward};
use crate::{Error, Frame, Result};

#[derive(Debug, Default)]
pub(super) struct Udp;
impl Udp {
    pub(super) fn new() -> Self {
        Self
    }
    pub(super) fn datagram(&mut self, _: &mut Context<'_>, _: SocketAddr, _: SocketAddr, _: Frame<'_, '_>) {}
    pub(super) fn ready(&mut self, _: &mut Context<'_>, _: Ready) {}
    pub(super) fn timers(&mut self, _: &mut Context<'_>) -> Option<Instant> {
        None
    }
    pub(super) fn flows(&self, _: Instant) -> Vec<FlowInfo> {
        Vec::new()
    }
    pub(super) fn reset(&mut self) {}
    pub(super) fn listen(&mut self, _: &mut Context<'_>, forward: &Forward) -> Result<SocketAddr> {
        Err(Error::invalid("forward", forward.host.to_string(), "not yet"))
    }
    pub(super) fn unlisten(&mut self, _: SocketAddr) -> bool {
        false
    }
}
