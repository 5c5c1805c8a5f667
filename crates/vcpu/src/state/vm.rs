//! What a saved VM has beside memory and vCPUs.

use freestone_hypervisor::x86::{ChipKind, ChipState, ClockState, VmState};
use freestone_snapshot::Section;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A saved VM: section `vm`. The chips of the hypervisor and its paravirtual clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSection {
    chips: Vec<SavedChip>,
    clock: Option<SavedClock>,
}

impl Section for VmSection {
    const NAME: &'static str = "vm";
    const VERSION: u32 = 1;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedChip {
    kind: SavedChipKind,
    registers: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum SavedChipKind {
    PicMaster,
    PicSlave,
    IoApic,
    Pit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct SavedClock {
    guest_ns: u64,
    host_realtime_ns: Option<u64>,
    host_tsc: Option<u64>,
}

impl SavedChipKind {
    /// Bytes of its registers, by the KVM API.
    const fn len(self) -> usize {
        match self {
            Self::PicMaster | Self::PicSlave => 16,
            Self::IoApic => 216,
            Self::Pit => 112,
        }
    }
}

impl TryFrom<ChipKind> for SavedChipKind {
    type Error = Error;

    fn try_from(kind: ChipKind) -> Result<Self> {
        Ok(match kind {
            ChipKind::PicMaster => Self::PicMaster,
            ChipKind::PicSlave => Self::PicSlave,
            ChipKind::IoApic => Self::IoApic,
            ChipKind::Pit => Self::Pit,
            _ => return Err(Error::Unsaved("this chip of the hypervisor")),
        })
    }
}

impl From<SavedChipKind> for ChipKind {
    fn from(kind: SavedChipKind) -> Self {
        match kind {
            SavedChipKind::PicMaster => Self::PicMaster,
            SavedChipKind::PicSlave => Self::PicSlave,
            SavedChipKind::IoApic => Self::IoApic,
            SavedChipKind::Pit => Self::Pit,
        }
    }
}

impl TryFrom<VmState> for VmSection {
    type Error = Error;

    /// # Errors
    /// [`Error::Unsaved`] for what this version of the section has no place for.
    fn try_from(state: VmState) -> Result<Self> {
        let chip = |ChipState { kind, registers }| Ok(SavedChip { kind: kind.try_into()?, registers });
        let clock = |ClockState { guest_ns, host_realtime_ns, host_tsc }| SavedClock {
            guest_ns,
            host_realtime_ns,
            host_tsc,
        };
        Ok(Self {
            chips: state.chips.into_iter().map(chip).collect::<Result<_>>()?,
            clock: state.clock.map(clock),
        })
    }
}

impl TryFrom<VmSection> for VmState {
    type Error = Error;

    /// # Errors
    /// [`Error::Saved`] names the value that no VM has.
    fn try_from(saved: VmSection) -> Result<Self> {
        let mut seen = Vec::new();
        for SavedChip { kind, registers } in &saved.chips {
            if seen.contains(kind) {
                let (what, value) = ("number of chips of a kind", 2);
                return Err(Error::Saved { what, value, reason: "a VM has one of each" });
            }
            seen.push(*kind);
            if registers.len() != kind.len() {
                return Err(Error::Saved {
                    what: match kind {
                        SavedChipKind::PicMaster => "length of the first interrupt controller (8259A)",
                        SavedChipKind::PicSlave => "length of the second interrupt controller (8259A)",
                        SavedChipKind::IoApic => "length of the I/O APIC",
                        SavedChipKind::Pit => "length of the timer (8254)",
                    },
                    value: registers.len() as u64,
                    reason: "the structure of the KVM API has another",
                });
            }
        }
        let chip = |SavedChip { kind, registers }| ChipState { kind: kind.into(), registers };
        let clock = |SavedClock { guest_ns, host_realtime_ns, host_tsc }| ClockState {
            guest_ns,
            host_realtime_ns,
            host_tsc,
        };
        Ok(Self { chips: saved.chips.into_iter().map(chip).collect(), clock: saved.clock.map(clock) })
    }
}
