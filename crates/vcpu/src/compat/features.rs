//! The registers of CPUID whose bits are features, and the names of the bits, as Linux writes them in `/proc/cpuinfo`.

use freestone_hypervisor::x86::CpuidLeaf;

/// A register of an answer.
#[derive(Debug, Clone, Copy)]
enum Out {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register whose bits say what a processor can do.
#[derive(Debug)]
pub(super) struct Register {
    pub(super) function: u32,
    pub(super) index: u32,
    out: Out,
    /// Bits that describe the VM, or that a guest changes, or that say what a processor does not do.
    pub(super) ignored: u32,
    /// From bit 0 on, by blanks; `-` has no name.
    names: &'static str,
}

impl Register {
    pub(super) fn of(&self, leaf: &CpuidLeaf) -> u32 {
        match self.out {
            Out::Eax => leaf.eax,
            Out::Ebx => leaf.ebx,
            Out::Ecx => leaf.ecx,
            Out::Edx => leaf.edx,
        }
    }

    /// The name of a bit, or its place if it has none.
    pub(super) fn name(&self, bit: usize) -> String {
        match self.names.split_whitespace().nth(bit) {
            Some(name) if name != "-" => name.to_owned(),
            _ => format!("bit {bit} of CPUID {:#x}.{:#x} {:?}", self.function, self.index, self.out),
        }
    }
}

pub(super) const REGISTERS: &[Register] = &[
    Register {
        function: 1,
        index: 0,
        out: Out::Ecx,
        // OSXSAVE follows CR4; the hypervisor bit and the x2APIC are the hypervisor's.
        ignored: 1 << 27 | 1 << 31 | 1 << 21,
        names: "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca \
                sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    },
    Register {
        function: 1,
        index: 0,
        out: Out::Edx,
        // HTT says that the VM has several processors.
        ignored: 1 << 28,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx \
                fxsr sse sse2 ss ht tm ia64 pbe",
    },
    Register {
        function: 7,
        index: 0,
        out: Out::Ebx,
        // What x87 no longer does.
        ignored: 1 << 6 | 1 << 13,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx \
                rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er \
                avx512cd sha_ni avx512bw avx512vl",
    },
    Register {
        function: 7,
        index: 0,
        out: Out::Ecx,
        // OSPKE follows CR4; bits 17 to 21 are a number.
        ignored: 1 << 4 | 0x1f << 17,
        names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 user_shstk gfni vaes vpclmulqdq avx512_vnni \
                avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid keylocker bus_lock_detect cldemote - \
                movdiri movdir64b enqcmd sgx_lc pks",
    },
    Register {
        function: 7,
        index: 0,
        out: Out::Edx,
        ignored: 0,
        names: "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
                rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
                avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
                ssbd",
    },
    Register {
        function: 7,
        index: 1,
        out: Out::Eax,
        ignored: 0,
        names: "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - \
                fred lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist - - movrs -",
    },
    Register {
        function: 0xd,
        index: 1,
        out: Out::Eax,
        ignored: 0,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    Register {
        function: 0x4000_0001,
        index: 0,
        out: Out::Eax,
        ignored: 0,
        names: "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
                kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control \
                kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control \
                - - - - - - kvm_clocksource_stable",
    },
    Register {
        function: 0x8000_0001,
        index: 0,
        out: Out::Ecx,
        // CMP_LEGACY says that the VM has several processors.
        ignored: 1 << 1,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - \
                lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    },
    Register {
        function: 0x8000_0001,
        index: 0,
        out: Out::Edx,
        // AMD repeats here what leaf 1 says.
        ignored: 0x0183_f3ff,
        names: "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    },
    Register {
        function: 0x8000_0007,
        index: 0,
        out: Out::Edx,
        // The rest is about power and temperature.
        ignored: !(1 << 8),
        names: "- - - - - - - - nonstop_tsc",
    },
    Register {
        function: 0x8000_0008,
        index: 0,
        out: Out::Ebx,
        // What is preferred, what is always on, and what a processor is not hurt by.
        ignored: 1 << 16 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 26,
        names: "clzero irperf xsaveerptr invlpgb rdpru - mbe - - wbnoinvd - - amd_ibpb int_wbinvd amd_ibrs amd_stibp - - - - \
                efer_lmsle_unsupported - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret",
    },
    Register {
        function: 0x8000_0021,
        index: 0,
        out: Out::Eax,
        // The rest says what a processor does not do, or is about SMM.
        ignored: !(1 << 2 | 1 << 6 | 1 << 8),
        names: "- - lfence_rdtsc - - - null_sel_clr_base - autoibrs",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn register(function: u32, index: u32, out: &str) -> &'static Register {
        let is = |r: &&Register| (r.function, r.index, &*format!("{:?}", r.out)) == (function, index, out);
        REGISTERS.iter().find(is).unwrap()
    }

    #[test]
    fn names_are_at_their_bits() {
        // One from the end of every list, by the manuals.
        for (function, index, out, bit, name) in [
            (1, 0, "Ecx", 30, "rdrand"),
            (1, 0, "Edx", 26, "sse2"),
            (7, 0, "Ebx", 16, "avx512f"),
            (7, 0, "Ebx", 31, "avx512vl"),
            (7, 0, "Ecx", 22, "rdpid"),
            (7, 0, "Ecx", 31, "pks"),
            (7, 0, "Edx", 31, "ssbd"),
            (7, 0, "Edx", 20, "ibt"),
            (7, 1, "Eax", 26, "lam"),
            (0xd, 1, "Eax", 3, "xsaves"),
            (0x4000_0001, 0, "Eax", 24, "kvm_clocksource_stable"),
            (0x8000_0001, 0, "Ecx", 29, "mwaitx"),
            (0x8000_0001, 0, "Edx", 29, "lm"),
            (0x8000_0001, 0, "Edx", 31, "3dnow"),
            (0x8000_0007, 0, "Edx", 8, "nonstop_tsc"),
            (0x8000_0008, 0, "Ebx", 24, "amd_ssbd"),
            (0x8000_0021, 0, "Eax", 8, "autoibrs"),
        ] {
            assert_eq!(register(function, index, out).name(bit), name);
        }
    }

    #[test]
    fn bit_without_name_is_told_by_its_place() {
        assert_eq!(register(7, 0, "Edx").name(0), "bit 0 of CPUID 0x7.0x0 Edx");
        assert_eq!(register(0xd, 1, "Eax").name(31), "bit 31 of CPUID 0xd.0x1 Eax");
    }
}
