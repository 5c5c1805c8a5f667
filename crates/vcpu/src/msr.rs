//! Model-specific registers that firmware would have set before it enters a kernel.
//!
//! EFER and the APIC base are not here: they are part of the special registers. Registers that a kernel expects to be zero
//! are zero after reset and are not written.

use freestone_hypervisor::CpuState;
use freestone_hypervisor::x86::Msr;

use crate::{Error, Result};

/// `IA32_MISC_ENABLE` (Intel SDM, volume 4, table 2-2).
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MTRR_DEF_TYPE` (Intel SDM, volume 3, section 13.11.2.1).
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Fast string operations.
const FAST_STRINGS: u64 = 1;
/// MTRRs on and write-back by default. The fixed-range registers stay off: they are zero, which would mean "uncacheable".
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// What [`configure_msrs`] writes. A guest starts without any of them, only slower on some hosts.
pub const BOOT_MSRS: [Msr; 2] = [
    Msr { index: IA32_MISC_ENABLE, value: FAST_STRINGS },
    Msr { index: IA32_MTRR_DEF_TYPE, value: MTRR_WRITE_BACK },
];

/// Writes [`BOOT_MSRS`] and returns those that this host refuses; the guest does without them.
///
/// # Errors
/// None today: every register of the list is optional. The signature leaves room for one that is not.
pub fn configure_msrs(vcpu: &mut dyn CpuState) -> Result<Vec<u32>> {
    set_optional(vcpu, &BOOT_MSRS)
}

/// Writes `msrs`, and returns the indices of those that are refused.
///
/// # Errors
/// [`Error::Hypervisor`] if `msrs` is empty and the hypervisor refuses even that.
pub fn set_optional(vcpu: &mut dyn CpuState, msrs: &[Msr]) -> Result<Vec<u32>> {
    let Err(source) = vcpu.set_msrs(msrs) else {
        return Ok(Vec::new());
    };
    if msrs.is_empty() {
        return Err(Error::Hypervisor { op: "set no model-specific register", source });
    }
    // Some were refused: one call for each tells which.
    let mut refused = Vec::new();
    for msr in msrs {
        if let Err(error) = vcpu.set_msrs(std::slice::from_ref(msr)) {
            tracing::debug!(msr = format_args!("{:#x}", msr.index), %error, "optional MSR is refused");
            refused.push(msr.index);
        }
    }
    Ok(refused)
}
