//! Registers: between the plain types of `hypervisor` and KVM's.

use freestone_hypervisor::x86::{
    CpuidLeaf, DescriptorTable, MpState, Msr, Regs, Segment, SpecialRegs, VcpuState,
};
use freestone_hypervisor::{CpuState, Error, Result};
use kvm_bindings::*;

use crate::error::call;
use crate::vcpu::KvmVcpu;

/// Copies fields of the same name from one structure to another.
macro_rules! same_fields {
    ($from:expr => $to:ident { $($field:ident),* $(,)? }) => {
        $to { $($field: $from.$field,)* }
    };
}

fn from_segment(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        kind: s.type_,
        present: s.present != 0,
        dpl: s.dpl,
        db: s.db != 0,
        s: s.s != 0,
        l: s.l != 0,
        g: s.g != 0,
        avl: s.avl != 0,
        unusable: s.unusable != 0,
    }
}

fn to_segment(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind,
        present: s.present.into(),
        dpl: s.dpl,
        db: s.db.into(),
        s: s.s.into(),
        l: s.l.into(),
        g: s.g.into(),
        avl: s.avl.into(),
        unusable: s.unusable.into(),
        padding: 0,
    }
}

fn from_table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn to_table(t: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

/// Writes `regs` over `sregs`, which keeps what [`SpecialRegs`] has not: the bitmap of pending interrupts.
pub(crate) fn merge_special_regs(sregs: &mut kvm_sregs, regs: &SpecialRegs) {
    sregs.cs = to_segment(&regs.cs);
    sregs.ds = to_segment(&regs.ds);
    sregs.es = to_segment(&regs.es);
    sregs.fs = to_segment(&regs.fs);
    sregs.gs = to_segment(&regs.gs);
    sregs.ss = to_segment(&regs.ss);
    sregs.tr = to_segment(&regs.tr);
    sregs.ldt = to_segment(&regs.ldt);
    sregs.gdt = to_table(regs.gdt);
    sregs.idt = to_table(regs.idt);
    sregs.cr0 = regs.cr0;
    sregs.cr2 = regs.cr2;
    sregs.cr3 = regs.cr3;
    sregs.cr4 = regs.cr4;
    sregs.cr8 = regs.cr8;
    sregs.efer = regs.efer;
    sregs.apic_base = regs.apic_base;
}

fn from_special_regs(sregs: &kvm_sregs) -> SpecialRegs {
    SpecialRegs {
        cs: from_segment(&sregs.cs),
        ds: from_segment(&sregs.ds),
        es: from_segment(&sregs.es),
        fs: from_segment(&sregs.fs),
        gs: from_segment(&sregs.gs),
        ss: from_segment(&sregs.ss),
        tr: from_segment(&sregs.tr),
        ldt: from_segment(&sregs.ldt),
        gdt: from_table(&sregs.gdt),
        idt: from_table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
    }
}

fn to_cpuid_entry(leaf: &CpuidLeaf) -> kvm_cpuid_entry2 {
    let flags = if leaf.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    let CpuidLeaf { function, index, eax, ebx, ecx, edx, indexed: _ } = *leaf;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
}

/// MSRs in one call: the kernel refuses `MAX_IO_MSRS`, 256, already.
pub(crate) const MSRS_PER_CALL: usize = KVM_MAX_MSR_ENTRIES - 1;

/// The MSRs as KVM takes them, at most [`MSRS_PER_CALL`].
pub(crate) fn to_msrs(msrs: &[Msr]) -> Result<Msrs> {
    let entries: Vec<_> =
        msrs.iter().map(|msr| kvm_msr_entry { index: msr.index, reserved: 0, data: msr.value }).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::OutOfRange {
        what: "number of MSRs",
        value: msrs.len() as u64,
        reason: "KVM takes 255 at a time",
    })
}

/// KVM stops at the first MSR it cannot do, and says how many it did.
fn check_msrs(msrs: &[Msr], done: usize, access: &'static str) -> Result<()> {
    msrs.get(done).map_or(Ok(()), |msr| Err(Error::Msr { index: msr.index, access }))
}

impl CpuState for KvmVcpu {
    fn regs(&self) -> Result<Regs> {
        let regs = self.fd.get_regs().map_err(call("KVM_GET_REGS"))?;
        Ok(same_fields!(regs => Regs {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
        }))
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        let regs = same_fields!(regs => kvm_regs {
            rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
        });
        self.fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))
    }

    fn special_regs(&self) -> Result<SpecialRegs> {
        let sregs = self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        Ok(from_special_regs(&sregs))
    }

    fn set_special_regs(&mut self, regs: &SpecialRegs) -> Result<()> {
        let mut sregs = self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        merge_special_regs(&mut sregs, regs);
        self.fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))
    }

    fn set_cpuid(&mut self, leaves: &[CpuidLeaf]) -> Result<()> {
        let entries: Vec<_> = leaves.iter().map(to_cpuid_entry).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::OutOfRange {
            what: "number of CPUID leaves",
            value: leaves.len() as u64,
            reason: "KVM takes at most 256",
        })?;
        self.fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
        self.cpuid = leaves.to_vec();
        Ok(())
    }

    fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        for chunk in msrs.chunks_mut(MSRS_PER_CALL) {
            let mut entries = to_msrs(chunk)?;
            let done = self.fd.get_msrs(&mut entries).map_err(call("KVM_GET_MSRS"))?;
            check_msrs(chunk, done, "read")?;
            for (msr, entry) in chunk.iter_mut().zip(entries.as_slice()) {
                msr.value = entry.data;
            }
        }
        Ok(())
    }

    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        for chunk in msrs.chunks(MSRS_PER_CALL) {
            let entries = to_msrs(chunk)?;
            let done = self.fd.set_msrs(&entries).map_err(call("KVM_SET_MSRS"))?;
            check_msrs(chunk, done, "written")?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<VcpuState> {
        self.save_state()
    }

    fn restore(&mut self, state: &VcpuState) -> Result<()> {
        self.restore_state(state)
    }

    fn tell_paused(&mut self) -> Result<()> {
        self.tell_kvmclock()
    }

    fn mp_state(&self) -> Result<MpState> {
        let state = self.fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        match state.mp_state {
            KVM_MP_STATE_RUNNABLE => Ok(MpState::Runnable),
            KVM_MP_STATE_UNINITIALIZED => Ok(MpState::Uninitialized),
            KVM_MP_STATE_INIT_RECEIVED => Ok(MpState::InitReceived),
            KVM_MP_STATE_HALTED => Ok(MpState::Halted),
            KVM_MP_STATE_SIPI_RECEIVED => Ok(MpState::SipiReceived),
            other => Err(Error::OutOfRange {
                what: "KVM_MP_STATE",
                value: other.into(),
                reason: "it is none of an x86 processor without memory encryption",
            }),
        }
    }

    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        let mp_state = match state {
            MpState::Runnable => KVM_MP_STATE_RUNNABLE,
            MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
            MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
            MpState::Halted => KVM_MP_STATE_HALTED,
            MpState::SipiReceived => KVM_MP_STATE_SIPI_RECEIVED,
            _ => return Err(Error::Unsupported("this state of a vCPU")),
        };
        self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(call("KVM_SET_MP_STATE"))
    }

    fn lapic(&self) -> Result<[u8; 1024]> {
        let lapic = self.fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
        Ok(lapic.regs.map(i8::cast_unsigned))
    }

    fn set_lapic(&mut self, lapic: &[u8; 1024]) -> Result<()> {
        let lapic = kvm_lapic_state { regs: lapic.map(u8::cast_signed) };
        self.fd.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_survives_the_way_there_and_back() {
        let segment = Segment {
            base: 0x1234_5678_9ABC,
            limit: 0xF_FFFF,
            selector: 0x2B,
            kind: 0xB,
            present: true,
            dpl: 3,
            db: true,
            s: true,
            l: true,
            g: true,
            avl: true,
            unusable: true,
        };
        assert_eq!(from_segment(&to_segment(&segment)), segment);
        assert_eq!(from_segment(&to_segment(&Segment::default())), Segment::default());
    }

    #[test]
    fn pending_interrupts_survive_setting_special_registers() {
        let mut sregs = kvm_sregs { interrupt_bitmap: [1, 2, 3, 4], ..Default::default() };
        let regs = SpecialRegs { cr0: 0x11, cr8: 7, efer: 0x500, ..Default::default() };
        merge_special_regs(&mut sregs, &regs);
        assert_eq!(sregs.interrupt_bitmap, [1, 2, 3, 4]);
        assert_eq!(from_special_regs(&sregs), regs);
    }

    #[test]
    fn leaf_is_indexed_only_if_it_says_so() {
        let leaf = CpuidLeaf { function: 7, index: 1, indexed: true, eax: 1, ebx: 2, ecx: 3, edx: 4 };
        let entry = to_cpuid_entry(&leaf);
        assert_eq!((entry.function, entry.index, entry.flags), (7, 1, KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
        assert_eq!((entry.eax, entry.ebx, entry.ecx, entry.edx), (1, 2, 3, 4));
        assert_eq!(to_cpuid_entry(&CpuidLeaf { indexed: false, ..leaf }).flags, 0);
    }

    #[test]
    fn first_msr_that_was_not_done_is_named() {
        let msrs = [1, 2, 3].map(|index| Msr { index, value: 0 });
        check_msrs(&msrs, 3, "read").unwrap();
        let error = check_msrs(&msrs, 1, "written").unwrap_err();
        assert_eq!(error.to_string(), "MSR 0x2 cannot be written");
    }
}
