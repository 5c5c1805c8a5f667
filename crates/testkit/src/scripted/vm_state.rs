//! Save and restore of the scripted VM's chips and clock.
//!
//! The chips have no registers that a script could set. They keep what was restored, and the I/O APIC's `irr` says which
//! lines have an edge that no script took yet: those are there again after a restore.

use std::sync::PoisonError;

use freestone_hypervisor::x86::{ChipKind, ChipState, ClockPolicy, ClockState, VmState};
use freestone_hypervisor::{Error, Result, SaveVm};

use super::vm::ScriptedVm;

/// Length of each chip's registers in the KVM API.
const CHIPS: [(ChipKind, usize); 4] =
    [(ChipKind::PicMaster, 16), (ChipKind::PicSlave, 16), (ChipKind::IoApic, 216), (ChipKind::Pit, 112)];
/// Where `irr` is in `struct kvm_ioapic_state`.
const IRR: usize = 16;

/// The registers of a chip from `irr` on.
fn irr(registers: &mut [u8]) -> Option<&mut [u8; 4]> {
    registers.get_mut(IRR..)?.first_chunk_mut()
}

impl SaveVm for ScriptedVm {
    fn save(&self) -> Result<VmState> {
        let mut state = self.shared.vm_state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if self.shared.has_irq_chip() && state.chips.is_empty() {
            let chip = |(kind, len)| ChipState { kind, registers: vec![0; len] };
            state.chips = CHIPS.map(chip).to_vec();
        }
        for chip in state.chips.iter_mut().filter(|chip| chip.kind == ChipKind::IoApic) {
            if let Some(irr) = irr(&mut chip.registers) {
                *irr = self.shared.edges.pending().to_le_bytes();
            }
        }
        // A clock that stands still.
        state.clock.get_or_insert(ClockState { guest_ns: 0, host_realtime_ns: Some(0), host_tsc: None });
        Ok(state)
    }

    fn restore(&self, state: &VmState) -> Result<()> {
        for ChipState { kind, registers } in &state.chips {
            if !self.shared.has_irq_chip() {
                return Err(Error::Unsupported("the state of a chip that this VM has not"));
            }
            if !CHIPS.contains(&(*kind, registers.len())) {
                let (what, value) = ("length of a chip's state", registers.len() as u64);
                return Err(Error::OutOfRange { what, value, reason: "KVM's structure has another" });
            }
        }
        let mut chips = state.chips.clone();
        for chip in chips.iter_mut().filter(|chip| chip.kind == ChipKind::IoApic) {
            if let Some(irr) = irr(&mut chip.registers) {
                self.shared.edges.restore(u32::from_le_bytes(*irr));
            }
        }
        self.shared.vm_state.lock().unwrap_or_else(PoisonError::into_inner).chips = chips;
        self.shared.call("restore chips".to_owned());
        Ok(())
    }

    /// The policy is recorded among the calls; the clock stands where it was set.
    fn set_clock(&self, clock: &ClockState, policy: ClockPolicy) -> Result<()> {
        self.shared.vm_state.lock().unwrap_or_else(PoisonError::into_inner).clock = Some(*clock);
        self.shared.call(format!("set_clock {policy:?}"));
        Ok(())
    }
}
