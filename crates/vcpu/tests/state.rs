//! What the sections of vCPUs and VMs hold, and what they refuse.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io::Write;

use freestone_hypervisor::x86::*;
use freestone_hypervisor::{CpuState, Hypervisor, Vm};
use freestone_snapshot::{Arch, Header, Limits, Reader, Sections, State, Writer};
use freestone_testkit::{dev_kvm_usable, skip};
use freestone_vcpu::{Error, VcpuSection, VmSection};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

fn segment(base: u64, selector: u16, kind: u8, bits: u16) -> Segment {
    let bit = |n: u32| bits & 1 << n != 0;
    Segment {
        base,
        limit: 0xF_FFFF,
        selector,
        kind,
        present: bit(0),
        dpl: 3,
        db: bit(1),
        s: bit(2),
        l: bit(3),
        g: bit(4),
        avl: bit(5),
        unusable: bit(6),
    }
}

/// A state in which no two fields of a kind are equal, so that none can change places unseen.
fn vcpu_state() -> VcpuState {
    let mut next = 0x1111_0000_0000_0000_u64;
    let mut count = move || {
        next += 0x0001_0000_0101;
        next
    };
    let regs = Regs {
        rax: count(),
        rbx: count(),
        rcx: count(),
        rdx: count(),
        rsi: count(),
        rdi: count(),
        rsp: count(),
        rbp: count(),
        r8: count(),
        r9: count(),
        r10: count(),
        r11: count(),
        r12: count(),
        r13: count(),
        r14: count(),
        r15: count(),
        rip: count(),
        rflags: count(),
    };
    let special_regs = SpecialRegs {
        cs: segment(count(), 0x08, 0xB, 0b1),
        ds: segment(count(), 0x10, 0x3, 0b10),
        es: segment(count(), 0x18, 0x2, 0b100),
        fs: segment(count(), 0x20, 0x1, 0b1000),
        gs: segment(count(), 0x28, 0x4, 0b1_0000),
        ss: segment(count(), 0x30, 0x5, 0b10_0000),
        tr: segment(count(), 0x38, 0xA, 0b100_0000),
        ldt: segment(count(), 0x40, 0x9, 0b111_1111),
        gdt: DescriptorTable { base: count(), limit: 0x7F },
        idt: DescriptorTable { base: count(), limit: 0xFFF },
        cr0: count(),
        cr2: count(),
        cr3: count(),
        cr4: count(),
        cr8: count(),
        efer: count(),
        apic_base: count(),
    };
    let leaf =
        |function, index, indexed| CpuidLeaf { function, index, indexed, eax: 1, ebx: 2, ecx: 3, edx: 4 };
    let lapic: Vec<u8> = (0..=255).cycle().take(1024).collect();
    VcpuState {
        cpuid: vec![leaf(0, 0, false), leaf(7, 1, true)],
        tsc_khz: Some(2_250_000),
        mp_state: MpState::Halted,
        regs,
        special_regs,
        xcrs: vec![(0, 7)],
        xsave: (0..=250).cycle().take(4096).collect(),
        debug_regs: DebugRegs { db: [1, 2, 3, 4], dr6: 5, dr7: 6 },
        lapic: Some(lapic.into_boxed_slice().try_into().unwrap()),
        msrs: vec![Msr { index: 0x10, value: 99 }, Msr { index: 0xC000_0080, value: 0x500 }],
        events: VcpuEvents {
            exception_injected: true,
            exception_nr: 14,
            exception_error_code: 0x123,
            exception_payload: 0x4567,
            interrupt_nr: 0x40,
            interrupt_shadow: 2,
            nmi_pending: true,
            sipi_vector: 0x9A,
            smi_inside_nmi: true,
            triple_fault_pending: true,
            ..VcpuEvents::default()
        },
    }
}

fn vm_state() -> VmState {
    let chip =
        |kind, len, first: u8| ChipState { kind, registers: (first..=255).cycle().take(len).collect() };
    VmState {
        chips: vec![
            chip(ChipKind::PicMaster, 16, 1),
            chip(ChipKind::PicSlave, 16, 2),
            chip(ChipKind::IoApic, 216, 3),
            chip(ChipKind::Pit, 112, 4),
        ],
        clock: Some(ClockState { guest_ns: 1, host_realtime_ns: Some(2), host_tsc: Some(3) }),
    }
}

fn sections() -> State {
    let mut state = State::new();
    state.put_instance("0", &VcpuSection::try_from(vcpu_state()).unwrap()).unwrap();
    state.put(&VmSection::try_from(vm_state()).unwrap()).unwrap();
    state
}

/// A new version of a section gets a golden snapshot of its own by `FREESTONE_BLESS=1`; those of older versions stay, and
/// are to be restored for as long as the section can be upgraded from them.
#[test]
fn golden_snapshot_of_version_1_restores_as_ever_and_is_what_is_saved() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/cpu-1.snapshot");
    let mut writer = Writer::new(Vec::new(), &Header::new(Arch::X86_64, "golden").unwrap()).unwrap();
    sections().write_to(&mut writer).unwrap();
    let now = writer.finish().unwrap();
    if std::env::var_os("FREESTONE_BLESS").is_some() {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).unwrap();
        file.write_all(&now).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    let mut read = Sections::load(Reader::new(golden.as_slice(), Limits::default()).unwrap()).unwrap();
    let vcpu: VcpuSection = read.take_instance("0").unwrap();
    let vm: VmSection = read.take().unwrap();
    assert_eq!(VcpuState::try_from(vcpu).unwrap(), vcpu_state());
    assert_eq!(VmState::try_from(vm).unwrap(), vm_state());
    assert!(now == golden, "a section has changed: it needs a new version");
}

#[test]
fn every_field_comes_back_at_its_place() {
    let section = VcpuSection::try_from(vcpu_state()).unwrap();
    assert_eq!(VcpuState::try_from(section).unwrap(), vcpu_state());
    for mp_state in [
        MpState::Runnable,
        MpState::Uninitialized,
        MpState::InitReceived,
        MpState::Halted,
        MpState::SipiReceived,
    ] {
        let state = VcpuState { mp_state, lapic: None, ..vcpu_state() };
        assert_eq!(VcpuState::try_from(VcpuSection::try_from(state.clone()).unwrap()).unwrap(), state);
    }
}

fn refusal(spoil: impl FnOnce(&mut VcpuState)) -> String {
    let mut state = vcpu_state();
    spoil(&mut state);
    VcpuState::try_from(VcpuSection::try_from(state).unwrap()).unwrap_err().to_string()
}

#[test]
fn values_that_no_vcpu_has_are_refused_by_their_names() {
    let many = |n| vec![CpuidLeaf::default(); n];
    assert_eq!(
        refusal(|s| s.cpuid = many(257)),
        "the saved number of CPUID leaves is 0x101: a vCPU has at most 256"
    );
    assert!(refusal(|s| s.xcrs = vec![(0, 1); 17]).contains("extended control registers is 0x11"));
    assert!(refusal(|s| s.msrs = vec![Msr::default(); 1025]).contains("number of MSRs is 0x401"));
    assert!(refusal(|s| s.xsave.truncate(575)).contains("length of the XSAVE area is 0x23f"));
    assert!(refusal(|s| s.xsave.resize(65537, 0)).contains("length of the XSAVE area is 0x10001"));
    assert!(refusal(|s| s.tsc_khz = Some(0)).contains("frequency of the time-stamp counter is 0x0"));
    assert!(refusal(|s| s.special_regs.tr.kind = 16).contains("type of a segment is 0x10"));
    assert!(refusal(|s| s.special_regs.ldt.dpl = 4).contains("privilege level of a segment is 0x4"));
    assert!(refusal(|s| s.events.exception_nr = 32).contains("vector of an exception is 0x20"));
    assert!(refusal(|s| s.events.interrupt_shadow = 4).contains("interrupt shadow is 0x4"));
}

#[test]
fn chips_of_a_wrong_length_or_doubled_are_refused_by_their_names() {
    let refusal = |spoil: &dyn Fn(&mut VmState)| {
        let mut state = vm_state();
        spoil(&mut state);
        VmState::try_from(VmSection::try_from(state).unwrap()).unwrap_err().to_string()
    };
    assert!(
        refusal(&|s| s.chips[0].registers.push(0)).contains("first interrupt controller (8259A) is 0x11")
    );
    assert!(
        refusal(&|s| s.chips[1].registers.clear()).contains("second interrupt controller (8259A) is 0x0")
    );
    assert!(refusal(&|s| s.chips[2].registers.truncate(215)).contains("length of the I/O APIC is 0xd7"));
    assert!(refusal(&|s| s.chips[3].registers.truncate(72)).contains("length of the timer (8254) is 0x48"));
    assert!(refusal(&|s| s.chips.push(s.chips[0].clone())).contains("number of chips of a kind is 0x2"));
}

/// Flips of bits, bytes in another place, a cut, an addition: at up to four places.
fn damage() -> impl Strategy<Value = Vec<(u8, prop::sample::Index, u8)>> {
    prop::collection::vec((0_u8..12, any::<prop::sample::Index>(), any::<u8>()), 1..=4)
}

fn damaged(body: &[u8], damage: &[(u8, prop::sample::Index, u8)]) -> Vec<u8> {
    let mut body = body.to_vec();
    for (how, place, byte) in damage {
        if body.is_empty() {
            break;
        }
        // Most of a section is XSAVE area and APIC, where few values are special: aim at the rest as often.
        let at = if byte % 2 == 0 { place.index(body.len()) } else { place.index(body.len().min(700)) };
        match how {
            0..=8 => body[at] ^= 1 << (byte % 8),
            9 => body[at] = *byte,
            10 => body.truncate(at),
            _ => body.insert(at, *byte),
        }
    }
    body
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_section_gives_an_error_or_a_state_within_its_bounds(damage in damage()) {
        // As short as it may be, which makes the test quick.
        let short = VcpuState { xsave: vec![0; 576], ..vcpu_state() };
        let body = postcard::to_allocvec(&VcpuSection::try_from(short).unwrap()).unwrap();
        if let Ok(section) = postcard::from_bytes::<VcpuSection>(&damaged(&body, &damage)) {
            match VcpuState::try_from(section) {
                Ok(state) => prop_assert!(state.cpuid.len() <= 256 && state.msrs.len() <= 1024),
                Err(error) => {
                    let named = matches!(error, Error::Saved { .. });
                    prop_assert!(named);
                }
            }
        }
        let body = postcard::to_allocvec(&VmSection::try_from(vm_state()).unwrap()).unwrap();
        if let Ok(section) = postcard::from_bytes::<VmSection>(&damaged(&body, &damage)) {
            match VmState::try_from(section) {
                Ok(state) => prop_assert!(state.chips.len() <= 4),
                Err(error) => {
                    let named = matches!(error, Error::Saved { .. });
                    prop_assert!(named);
                }
            }
        }
    }
}

/// Not run on the vCPU afterwards: what is asked here is whether the way into the kernel is safe.
#[test]
fn kvm_takes_or_refuses_what_is_left_of_ten_thousand_damaged_sections() {
    let test = "kvm_takes_or_refuses_what_is_left_of_ten_thousand_damaged_sections";
    if let Err(reason) = dev_kvm_usable() {
        return skip(test, &reason);
    }
    let kvm = freestone_kvm::Kvm::open().unwrap();
    let machine = || {
        let vm = kvm.create_vm().unwrap();
        vm.irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        (vm, vcpu)
    };
    let (vm, mut vcpu) = machine();
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    let vcpu_body = postcard::to_allocvec(&VcpuSection::try_from(vcpu.save().unwrap()).unwrap()).unwrap();
    let vm_body =
        postcard::to_allocvec(&VmSection::try_from(vm.state().unwrap().save().unwrap()).unwrap()).unwrap();
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut taken, mut refused, mut undecoded) = (0, 0, 0);
    for _ in 0..10_000 {
        let damage = damage().new_tree(&mut runner).unwrap().current();
        let section = postcard::from_bytes::<VcpuSection>(&damaged(&vcpu_body, &damage)).ok();
        match section.and_then(|section| VcpuState::try_from(section).ok()) {
            None => undecoded += 1,
            Some(state) => match vcpu.restore(&state) {
                Ok(()) => taken += 1,
                Err(_) => refused += 1,
            },
        }
        let section = postcard::from_bytes::<VmSection>(&damaged(&vm_body, &damage)).ok();
        if let Some(state) = section.and_then(|section| VmState::try_from(section).ok()) {
            let _ = vm.state().unwrap().restore(&state);
            if let Some(clock) = state.clock {
                let _ = vm.state().unwrap().set_clock(&clock, ClockPolicy::Advance);
            }
        }
    }
    eprintln!("{taken} taken, {refused} refused by KVM, {undecoded} refused before");
    assert!(taken > 0 && refused > 0 && undecoded > 0, "{taken} {refused} {undecoded}");
    // And the kernel goes on.
    let (_vm, mut vcpu) = machine();
    let good = postcard::from_bytes::<VcpuSection>(&vcpu_body).unwrap();
    vcpu.restore(&VcpuState::try_from(good).unwrap()).unwrap();
}
