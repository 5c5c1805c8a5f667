//! A saved vCPU.

use freestone_hypervisor::x86::{Msr, VcpuState};
use freestone_snapshot::Section;
use serde::{Deserialize, Serialize};

use super::registers::{
    SavedDebugRegs, SavedEvents, SavedLeaf, SavedMpState, SavedRegs, SavedSpecialRegs, at_most,
};
use crate::cpuid::MAX_LEAVES;
use crate::{Error, Result};

/// The most model-specific registers of a saved vCPU. KVM keeps fewer than 300.
pub const MAX_MSRS: usize = 1024;
/// The most extended control registers of a saved vCPU (`KVM_MAX_XCRS`). Processors have two.
pub const MAX_XCRS: usize = 16;
/// Bytes of the shortest XSAVE area: the legacy region and the header (Intel SDM, volume 1, section 13.4).
pub const MIN_XSAVE: usize = 576;
/// Bytes of the longest XSAVE area. That of a processor with AMX is 11008 bytes long.
pub const MAX_XSAVE: usize = 64 << 10;

/// A saved vCPU: section `vcpu`, with the vCPU's number as instance.
///
/// ```
/// use freestone_hypervisor::{CpuState, Hypervisor, Vm, x86::VcpuState};
/// use freestone_snapshot::{Arch, Header, State};
/// use freestone_testkit::scripted::{Script, ScriptedHypervisor};
/// use freestone_vcpu::VcpuSection;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut vcpu = ScriptedHypervisor::new(Script::new()).create_vm()?.create_vcpu(0)?;
/// let state = vcpu.save()?;
/// let mut saved = State::new();
/// saved.put_instance("0", &VcpuSection::try_from(state.clone())?)?;
///
/// let mut sections = saved.into_sections(Header::new(Arch::host(), "example")?);
/// let section: VcpuSection = sections.take_instance("0")?;
/// assert_eq!(VcpuState::try_from(section)?, state);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuSection {
    cpuid: Vec<SavedLeaf>,
    tsc_khz: Option<u32>,
    mp_state: SavedMpState,
    regs: SavedRegs,
    special_regs: SavedSpecialRegs,
    xcrs: Vec<(u32, u64)>,
    #[serde(with = "super::bytes")]
    xsave: Vec<u8>,
    debug_regs: SavedDebugRegs,
    lapic: Option<Vec<u8>>,
    msrs: Vec<(u32, u64)>,
    events: SavedEvents,
}

impl Section for VcpuSection {
    const NAME: &'static str = "vcpu";
    const VERSION: u32 = 1;
}

impl TryFrom<VcpuState> for VcpuSection {
    type Error = Error;

    /// # Errors
    /// [`Error::Unsaved`] for what this version of the section has no place for.
    fn try_from(state: VcpuState) -> Result<Self> {
        Ok(Self {
            cpuid: state.cpuid.into_iter().map(Into::into).collect(),
            tsc_khz: state.tsc_khz,
            mp_state: state.mp_state.try_into()?,
            regs: state.regs.into(),
            special_regs: state.special_regs.into(),
            xcrs: state.xcrs,
            xsave: state.xsave,
            debug_regs: state.debug_regs.into(),
            lapic: state.lapic.map(|lapic| lapic.to_vec()),
            msrs: state.msrs.into_iter().map(|msr| (msr.index, msr.value)).collect(),
            events: state.events.into(),
        })
    }
}

impl TryFrom<VcpuSection> for VcpuState {
    type Error = Error;

    /// # Errors
    /// [`Error::Saved`] names the value that no vCPU has.
    fn try_from(saved: VcpuSection) -> Result<Self> {
        saved.check()?;
        let lapic = match saved.lapic {
            None => None,
            Some(bytes) => {
                Some(bytes.into_boxed_slice().try_into().map_err(|bytes: Box<[u8]>| Error::Saved {
                    what: "length of the local APIC",
                    value: bytes.len() as u64,
                    reason: "it is 1024 bytes",
                })?)
            }
        };
        Ok(Self {
            cpuid: saved.cpuid.into_iter().map(Into::into).collect(),
            tsc_khz: saved.tsc_khz,
            mp_state: saved.mp_state.into(),
            regs: saved.regs.into(),
            special_regs: saved.special_regs.into(),
            xcrs: saved.xcrs,
            xsave: saved.xsave,
            debug_regs: saved.debug_regs.into(),
            lapic,
            msrs: saved.msrs.into_iter().map(|(index, value)| Msr { index, value }).collect(),
            events: saved.events.into(),
        })
    }
}

impl VcpuSection {
    fn check(&self) -> Result<()> {
        let counts = [
            ("number of CPUID leaves", self.cpuid.len(), MAX_LEAVES, "a vCPU has at most 256"),
            ("number of extended control registers", self.xcrs.len(), MAX_XCRS, "a vCPU has at most 16"),
            ("number of MSRs", self.msrs.len(), MAX_MSRS, "a vCPU has at most 1024"),
            ("length of the XSAVE area", self.xsave.len(), MAX_XSAVE, "it is at most 64 KiB"),
        ];
        for (what, count, limit, reason) in counts {
            at_most(what, count as u64, limit as u64, reason)?;
        }
        if self.xsave.len() < MIN_XSAVE {
            return Err(Error::Saved {
                what: "length of the XSAVE area",
                value: self.xsave.len() as u64,
                reason: "it is at least 576 bytes",
            });
        }
        if self.tsc_khz == Some(0) {
            let what = "frequency of the time-stamp counter";
            return Err(Error::Saved { what, value: 0, reason: "a counter counts" });
        }
        self.special_regs.check()?;
        self.events.check()
    }
}
