//! Local APIC state that firmware would leave behind: where the 8259 and NMI wires of the boot processor go.

use freestone_hypervisor::CpuState;

use crate::{Error, Result};

/// Offset of the LVT entry of LINT0 (Intel SDM, volume 3, table 12-1).
pub const LVT_LINT0: usize = 0x350;
/// Offset of the LVT entry of LINT1.
pub const LVT_LINT1: usize = 0x360;

const MASKED: u32 = 1 << 16;
const DELIVERY_MODE: u32 = 0b111 << 8;
const DELIVERY_NMI: u32 = 0b100 << 8;
const DELIVERY_EXTINT: u32 = 0b111 << 8;

/// Sets LINT0 to ExtINT and LINT1 to NMI, both unmasked: "virtual wire mode" (MP specification 1.4, section 3.6.2.2).
///
/// For the boot processor of a VM whose hypervisor has the interrupt controller.
///
/// # Errors
/// [`Error::Hypervisor`] if there is no local APIC or the hypervisor fails.
pub fn configure_lints(vcpu: &mut dyn CpuState) -> Result<()> {
    let mut apic = vcpu.lapic().map_err(Error::hv("read the local APIC"))?;
    route(&mut apic, LVT_LINT0, DELIVERY_EXTINT);
    route(&mut apic, LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&apic).map_err(Error::hv("set the local APIC"))
}

fn route(apic: &mut [u8; 1024], offset: usize, delivery: u32) {
    if let Some(register) = apic.get_mut(offset..).and_then(<[u8]>::first_chunk_mut::<4>) {
        let value = u32::from_le_bytes(*register);
        *register = (value & !(MASKED | DELIVERY_MODE) | delivery).to_le_bytes();
    }
}
