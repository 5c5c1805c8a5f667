//! How registers name the parts of a 64-bit address of a queue.

/// The parts of a queue's address, as registers name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueArea {
    /// Descriptor area: the descriptor table or the packed ring.
    Descriptors,
    /// Driver area: the available ring or the driver's event suppression structure.
    Driver,
    /// Device area: the used ring or the device's event suppression structure.
    Device,
}

/// Half of a 64-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

impl Half {
    /// This half of `value`.
    pub fn get(self, value: u64) -> u32 {
        let shifted = match self {
            Self::Low => value & u64::from(u32::MAX),
            Self::High => value >> 32,
        };
        u32::try_from(shifted).unwrap_or(0)
    }

    /// `old` with this half replaced.
    pub fn set(self, old: u64, half: u32) -> u64 {
        match self {
            Self::Low => old & !u64::from(u32::MAX) | u64::from(half),
            Self::High => old & u64::from(u32::MAX) | u64::from(half) << 32,
        }
    }

    /// The half that a feature select register chooses: 0, 1, or none.
    pub(super) fn selected(select: u32) -> Option<Self> {
        match select {
            0 => Some(Self::Low),
            1 => Some(Self::High),
            _ => None,
        }
    }
}
