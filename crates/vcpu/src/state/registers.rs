//! The parts of a saved vCPU, field for field as in `hypervisor`.

use freestone_hypervisor::x86::{
    CpuidLeaf, DebugRegs, DescriptorTable, MpState, Regs, Segment, SpecialRegs, VcpuEvents,
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A saved type with fields of the same names as another, and the ways there and back. A field with `as` is of a saved type
/// itself.
macro_rules! saved {
    ($(#[$meta:meta])* $saved:ident = $live:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub(super) struct $saved {
            $($field: $kind,)*
        }

        impl From<$live> for $saved {
            fn from(live: $live) -> Self {
                Self { $($field: live.$field.into(),)* }
            }
        }

        impl From<$saved> for $live {
            fn from(saved: $saved) -> Self {
                Self { $($field: saved.$field.into(),)* }
            }
        }
    };
}

saved! {
    SavedRegs = Regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64, r8: u64, r9: u64, r10: u64,
        r11: u64, r12: u64, r13: u64, r14: u64, r15: u64, rip: u64, rflags: u64,
    }
}

saved! {
    SavedSegment = Segment {
        base: u64, limit: u32, selector: u16, kind: u8, present: bool, dpl: u8, db: bool, s: bool, l: bool, g: bool,
        avl: bool, unusable: bool,
    }
}

saved! { SavedTable = DescriptorTable { base: u64, limit: u16 } }

saved! {
    SavedSpecialRegs = SpecialRegs {
        cs: SavedSegment, ds: SavedSegment, es: SavedSegment, fs: SavedSegment, gs: SavedSegment, ss: SavedSegment,
        tr: SavedSegment, ldt: SavedSegment, gdt: SavedTable, idt: SavedTable,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
    }
}

saved! {
    SavedLeaf = CpuidLeaf { function: u32, index: u32, indexed: bool, eax: u32, ebx: u32, ecx: u32, edx: u32 }
}

saved! { SavedDebugRegs = DebugRegs { db: [u64; 4], dr6: u64, dr7: u64 } }

saved! {
    SavedEvents = VcpuEvents {
        exception_injected: bool, exception_nr: u8, exception_has_error_code: bool, exception_pending: bool,
        exception_error_code: u32, exception_has_payload: bool, exception_payload: u64,
        interrupt_injected: bool, interrupt_nr: u8, interrupt_soft: bool, interrupt_shadow: u8,
        nmi_injected: bool, nmi_pending: bool, nmi_masked: bool, sipi_vector: u32,
        smi_smm: bool, smi_pending: bool, smi_inside_nmi: bool, smi_latched_init: bool, triple_fault_pending: bool,
    }
}

impl SavedSegment {
    fn check(&self) -> Result<()> {
        at_most("type of a segment", self.kind.into(), 0xf, "it has 4 bits")?;
        at_most("privilege level of a segment", self.dpl.into(), 3, "it has 2 bits")
    }
}

impl SavedSpecialRegs {
    pub(super) fn check(&self) -> Result<()> {
        let Self { cs, ds, es, fs, gs, ss, tr, ldt, .. } = self;
        [cs, ds, es, fs, gs, ss, tr, ldt].into_iter().try_for_each(SavedSegment::check)
    }
}

impl SavedEvents {
    pub(super) fn check(&self) -> Result<()> {
        at_most(
            "vector of an exception",
            self.exception_nr.into(),
            31,
            "exceptions have the vectors 0 to 31",
        )?;
        at_most("interrupt shadow", self.interrupt_shadow.into(), 3, "it has 2 bits")
    }
}

/// Refuses a `value` over `limit`.
pub(super) fn at_most(what: &'static str, value: u64, limit: u64, reason: &'static str) -> Result<()> {
    if value <= limit { Ok(()) } else { Err(Error::Saved { what, value, reason }) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum SavedMpState {
    Runnable,
    Uninitialized,
    InitReceived,
    Halted,
    SipiReceived,
}

impl TryFrom<MpState> for SavedMpState {
    type Error = Error;

    fn try_from(live: MpState) -> Result<Self> {
        Ok(match live {
            MpState::Runnable => Self::Runnable,
            MpState::Uninitialized => Self::Uninitialized,
            MpState::InitReceived => Self::InitReceived,
            MpState::Halted => Self::Halted,
            MpState::SipiReceived => Self::SipiReceived,
            _ => return Err(Error::Unsaved("this state of a vCPU")),
        })
    }
}

impl From<SavedMpState> for MpState {
    fn from(saved: SavedMpState) -> Self {
        match saved {
            SavedMpState::Runnable => Self::Runnable,
            SavedMpState::Uninitialized => Self::Uninitialized,
            SavedMpState::InitReceived => Self::InitReceived,
            SavedMpState::Halted => Self::Halted,
            SavedMpState::SipiReceived => Self::SipiReceived,
        }
    }
}
