//! The state in which a guest's first instruction runs.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_hypervisor::x86::{Regs, Segment, SpecialRegs};
use freestone_hypervisor::{CpuState, Hypervisor, Vm};
use freestone_memory::layout::{BOOT_GDT, BOOT_PAGE_TABLES, ZERO_PAGE};
use freestone_memory::paging::{self, PagingState};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemBuilder, layout::RamRange};
use freestone_testkit::{Script, ScriptedHypervisor, ScriptedVcpu};
use freestone_vcpu::{BootState, Error, boot, configure_boot, lapic, msr};

fn vcpu(hypervisor: &ScriptedHypervisor) -> ScriptedVcpu {
    hypervisor.create_vm().unwrap().create_vcpu(0).unwrap()
}

fn booted(state: BootState) -> (Regs, SpecialRegs, GuestMem) {
    let mem = GuestMem::anonymous(64 << 20).unwrap();
    let mut vcpu = vcpu(&ScriptedHypervisor::new(Script::new()));
    configure_boot(&mut vcpu, &mem, &state).unwrap();
    (vcpu.regs().unwrap(), vcpu.special_regs().unwrap(), mem)
}

fn data_segments(s: &SpecialRegs) -> [Segment; 5] {
    [s.ds, s.es, s.fs, s.gs, s.ss]
}

#[test]
fn pvh_enters_flat_protected_mode_with_the_start_info_in_ebx() {
    let (regs, special, _) = booted(BootState::Protected32 { entry: 0x100_0000, ebx: 0x5000, esi: 0 });
    assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x5000, 2));
    // PE and nothing else that can be written; ET always reads as one.
    assert_eq!((special.cr0, special.cr4, special.efer), (0x11, 0, 0));
    let cs = special.cs;
    assert_eq!(
        (cs.base, cs.limit, cs.kind, cs.db, cs.l, cs.g, cs.s),
        (0, u32::MAX, 0xb, true, false, true, true)
    );
    for s in data_segments(&special) {
        assert_eq!(
            (s.base, s.limit, s.kind, s.db, s.present, s.unusable),
            (0, u32::MAX, 3, true, true, false)
        );
    }
    let tr = special.tr;
    assert_eq!((tr.base, tr.limit, tr.kind, tr.s, tr.present), (0, 0x67, 0xb, false, true));
}

#[test]
fn linux_32_bit_enters_flat_protected_mode_with_the_boot_parameters_in_esi() {
    let (regs, special, _) = booted(BootState::Protected32 { entry: 0x100_0000, ebx: 0, esi: ZERO_PAGE });
    assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0000, ZERO_PAGE, 2));
    assert_eq!((regs.rbx, regs.rbp, regs.rdi), (0, 0, 0));
    assert_eq!((special.cr0, special.cr4, special.efer), (0x11, 0, 0));
    assert_eq!((special.cs.selector, special.cs.base, special.cs.limit), (0x10, 0, u32::MAX));
    for s in data_segments(&special) {
        assert_eq!((s.selector, s.base, s.limit), (0x18, 0, u32::MAX));
    }
}

#[test]
fn linux_64_bit_enters_long_mode_with_the_boot_parameters_in_rsi() {
    let (regs, special, _) = booted(BootState::Long64 { entry: 0x100_0200, rsi: ZERO_PAGE });
    assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, ZERO_PAGE, 2));
    assert_eq!(special.cr0, 0x8000_0011);
    assert_eq!(special.cr4, 0x20);
    assert_eq!(special.efer, 0x500);
    assert_eq!(special.cr3, BOOT_PAGE_TABLES);
    assert_eq!((special.cs.selector, special.cs.l, special.cs.db), (0x10, true, false));
    for s in data_segments(&special) {
        assert_eq!(s.selector, 0x18);
    }
}

#[test]
fn the_low_4_gib_are_identity_mapped_for_a_64_bit_start() {
    let (_, special, mem) = booted(BootState::Long64 { entry: 0x100_0200, rsi: ZERO_PAGE });
    let state = PagingState::new(special.cr0, special.cr3, special.cr4, special.efer);
    let view = mem.view();
    for gva in [0, ZERO_PAGE, 0x100_0200, 0xd000_0000, 0xfee0_0000, boot::IDENTITY_MAPPED - 1] {
        let page = paging::translate(&*view, &state, gva).unwrap();
        assert_eq!(page.gpa.0, gva);
        assert!(page.writable && page.executable && !page.user);
    }
    paging::translate(&*view, &state, boot::IDENTITY_MAPPED).unwrap_err();
}

#[test]
fn the_gdt_in_memory_has_the_descriptors_of_the_loaded_segments() {
    let descriptor = |mem: &GuestMem, selector: u16| {
        mem.view().read_obj::<u64>(GuestAddress(BOOT_GDT + u64::from(selector))).unwrap()
    };
    let (_, special, mem) = booted(BootState::Protected32 { entry: 0, ebx: 0, esi: 0 });
    assert_eq!((special.gdt.base, special.gdt.limit), (BOOT_GDT, 31));
    assert_eq!(descriptor(&mem, 0), 0);
    assert_eq!(descriptor(&mem, boot::BOOT_CS), 0x00cf_9b00_0000_ffff);
    assert_eq!(descriptor(&mem, boot::BOOT_DS), 0x00cf_9300_0000_ffff);
    let (_, _, mem) = booted(BootState::Long64 { entry: 0, rsi: 0 });
    assert_eq!(descriptor(&mem, boot::BOOT_CS), 0x00af_9b00_0000_ffff);
}

#[test]
fn real_mode_starts_at_segment_and_offset_with_all_segments_alike() {
    let (regs, special, _) = booted(BootState::Real16 { segment: 0x07c0, offset: 0x10 });
    assert_eq!((regs.rip, regs.rflags), (0x10, 2));
    assert_eq!(special.cr0, 0x10);
    for s in data_segments(&special).into_iter().chain([special.cs]) {
        assert_eq!((s.selector, s.base, s.limit, s.db, s.l), (0x07c0, 0x7c00, 0xffff, false, false));
    }
    assert_eq!((special.idt.base, special.idt.limit), (0, 0x3ff));
}

#[test]
fn what_is_not_part_of_the_boot_state_stays_as_the_reset_left_it() {
    for state in [
        BootState::Real16 { segment: 0, offset: 0 },
        BootState::Protected32 { entry: 0, ebx: 0, esi: 0 },
        BootState::Long64 { entry: 0, rsi: 0 },
    ] {
        assert_eq!(booted(state).1.apic_base, 0xfee0_0900, "{state:?}");
    }
}

#[test]
fn an_address_that_does_not_fit_the_mode_is_refused_by_value() {
    let mem = GuestMem::anonymous(1 << 20).unwrap();
    let mut vcpu = vcpu(&ScriptedHypervisor::new(Script::new()));
    for state in [
        BootState::Protected32 { entry: 1 << 32, ebx: 0, esi: 0 },
        BootState::Protected32 { entry: 0, ebx: 1 << 32, esi: 0 },
        BootState::Protected32 { entry: 0, ebx: 0, esi: 1 << 32 },
        BootState::Long64 { entry: 1 << 32, rsi: 0 },
        BootState::Long64 { entry: 0, rsi: 1 << 32 },
    ] {
        let error = configure_boot(&mut vcpu, &mem, &state).unwrap_err();
        assert!(matches!(error, Error::Address { value: 0x1_0000_0000, .. }), "{state:?}: {error:?}");
    }
}

#[test]
fn memory_too_small_for_the_tables_is_an_error() {
    let mut vcpu = vcpu(&ScriptedHypervisor::new(Script::new()));
    let page = GuestMemBuilder::with_ranges(vec![RamRange { start: 0, len: 0x1000 }]).build().unwrap();
    let error = configure_boot(&mut vcpu, &page, &BootState::Long64 { entry: 0, rsi: 0 }).unwrap_err();
    assert!(matches!(error, Error::PageTables { gpa: BOOT_PAGE_TABLES, .. }), "{error:?}");
    let high =
        GuestMemBuilder::with_ranges(vec![RamRange { start: 0x10_0000, len: 0x1000 }]).build().unwrap();
    let error =
        configure_boot(&mut vcpu, &high, &BootState::Protected32 { entry: 0, ebx: 0, esi: 0 }).unwrap_err();
    assert!(matches!(error, Error::Memory { gpa: BOOT_GDT, .. }), "{error:?}");
}

#[test]
fn boot_msrs_are_set() {
    let hypervisor = ScriptedHypervisor::new(Script::new());
    assert!(msr::configure_msrs(&mut vcpu(&hypervisor)).unwrap().is_empty());
    let msrs = hypervisor.probe().cpu(0).unwrap().msrs;
    assert_eq!(msrs.get(&msr::IA32_MISC_ENABLE), Some(&1));
    assert_eq!(msrs.get(&msr::IA32_MTRR_DEF_TYPE), Some(&0x806));
}

#[test]
fn boot_msrs_that_a_host_refuses_are_reported_and_the_others_set() {
    let hypervisor = ScriptedHypervisor::new(Script::new()).refuse_msrs(&[msr::IA32_MISC_ENABLE]);
    assert_eq!(msr::configure_msrs(&mut vcpu(&hypervisor)).unwrap(), [msr::IA32_MISC_ENABLE]);
    let msrs = hypervisor.probe().cpu(0).unwrap().msrs;
    assert_eq!(msrs.keys().collect::<Vec<_>>(), [&msr::IA32_MTRR_DEF_TYPE]);
}

#[test]
fn lint0_is_extint_and_lint1_is_nmi_and_both_are_unmasked() {
    let hypervisor = ScriptedHypervisor::new(Script::new());
    let mut vcpu = vcpu(&hypervisor);
    let mut reset = [0u8; 1024];
    // After reset every LVT entry is masked.
    for offset in [lapic::LVT_LINT0, lapic::LVT_LINT1] {
        reset[offset..offset + 4].copy_from_slice(&0x1_0000u32.to_le_bytes());
    }
    vcpu.set_lapic(&reset).unwrap();
    lapic::configure_lints(&mut vcpu).unwrap();
    let apic = vcpu.lapic().unwrap();
    let register = |offset: usize| u32::from_le_bytes(apic[offset..offset + 4].try_into().unwrap());
    assert_eq!(register(lapic::LVT_LINT0), 0x700);
    assert_eq!(register(lapic::LVT_LINT1), 0x400);
    let changed = apic.iter().zip(&reset).filter(|(a, b)| a != b).count();
    assert_eq!(changed, 4, "nothing else of the local APIC changes");
}
