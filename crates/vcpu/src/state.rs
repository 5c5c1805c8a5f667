//! Stub.
#![expect(missing_docs, missing_debug_implementations, reason = "stub")]
use freestone_hypervisor::x86::{VcpuState, VmState};
use freestone_snapshot::Section;
use serde::{Deserialize, Serialize};

use crate::Result;

#[derive(Serialize, Deserialize)]
pub struct VcpuSection(u8);
impl Section for VcpuSection {
    const NAME: &'static str = "vcpu";
    const VERSION: u32 = 1;
}
impl From<&VcpuState> for VcpuSection {
    fn from(_: &VcpuState) -> Self {
        Self(0)
    }
}
impl TryFrom<VcpuSection> for VcpuState {
    type Error = crate::Error;
    fn try_from(_: VcpuSection) -> Result<Self> {
        Err(crate::Error::NotPaused { index: 0 })
    }
}
#[derive(Serialize, Deserialize)]
pub struct VmSection(u8);
impl Section for VmSection {
    const NAME: &'static str = "vm";
    const VERSION: u32 = 1;
}
impl From<&VmState> for VmSection {
    fn from(_: &VmState) -> Self {
        Self(0)
    }
}
impl TryFrom<VmSection> for VmState {
    type Error = crate::Error;
    fn try_from(_: VmSection) -> Result<Self> {
        Err(crate::Error::NotPaused { index: 0 })
    }
}
