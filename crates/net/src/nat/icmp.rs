//! ICMP echo.
use std::net::IpAddr;
use std::time::Instant;

use super::FlowInfo;
use super::context::{Context, Ready};

#[derive(Debug, Default)]
pub(super) struct Icmp;
impl Icmp {
    pub(super) fn new() -> Self {
        Self
    }
    pub(super) fn packet(&mut self, _: &mut Context<'_>, _: IpAddr, _: IpAddr, _: &[u8]) {}
    pub(super) fn ready(&mut self, _: &mut Context<'_>, _: Ready) {}
    pub(super) fn timers(&mut self, _: &mut Context<'_>) -> Option<Instant> {
        None
    }
    pub(super) fn flows(&self, _: Instant) -> Vec<FlowInfo> {
        Vec::new()
    }
    pub(super) fn reset(&mut self) {}
}
