//! Saved vCPUs and VMs go on in new VMs, with a copy of the memory, as if nothing had happened.

use std::thread;
use std::time::Duration;

use freestone_hypervisor::x86::{
    ChipKind, ChipState, ClockPolicy, ClockState, MpState, Msr, Regs, VcpuState, VmState,
};
use freestone_hypervisor::{CpuState, Error, Exit, Hypervisor, Vcpu, Vm};
use freestone_kvm::{Kvm, KvmVcpu};

use crate::common::*;

const APIC: u64 = 0xFEE0_0000;
const HANDLER: u64 = 0x4000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const VECTOR: u64 = 0x40;
const IA32_TSC: u32 = 0x10;

/// Counts, and mixes what it counts into integer, SSE and x87 registers and into memory. At privilege level 3.
const WORKER: &[u8] = &[
    0xD9, 0xE8, // fld1
    0xD9, 0xEE, // fldz
    0x48, 0x69, 0xC0, 0x2D, 0xF4, 0x51, 0x58, // next: imul rax, rax, 0x5851f42d
    0x48, 0x05, 0x7E, 0x7B, 0x05, 0x14, // add rax, 0x14057b7e
    0x66, 0x48, 0x0F, 0x6E, 0xD0, // movq xmm2, rax
    0x66, 0x0F, 0xD4, 0xC2, // paddq xmm0, xmm2
    0x66, 0x0F, 0xEF, 0xC8, // pxor xmm1, xmm0
    0xF2, 0x48, 0x0F, 0x2A, 0xD8, // cvtsi2sd xmm3, rax
    0xF2, 0x0F, 0x58, 0xE3, // addsd xmm4, xmm3
    0xD8, 0xC1, // fadd st, st(1)
    0x48, 0x89, 0xC2, // mov rdx, rax
    0x48, 0xC1, 0xEA, 0x28, // shr rdx, 40
    0x81, 0xE2, 0xF8, 0x0F, 0x00, 0x00, // and edx, 0xff8
    0x48, 0x31, 0x04, 0x17, // xor [rdi + rdx], rax
    0x48, 0xFF, 0xC9, // dec rcx
    0x75, 0xC5, // jnz next
    0x0F, 0x11, 0x87, 0x00, 0x10, 0x00, 0x00, // movups [rdi + 0x1000], xmm0
    0x0F, 0x11, 0x8F, 0x10, 0x10, 0x00, 0x00, // movups [rdi + 0x1010], xmm1
    0x0F, 0x11, 0xA7, 0x20, 0x10, 0x00, 0x00, // movups [rdi + 0x1020], xmm4
    0xDD, 0x9F, 0x30, 0x10, 0x00, 0x00, // fstp qword [rdi + 0x1030]
    0x89, 0x03, // done: mov [rbx], eax
    0xEB, 0xFC, // jmp done
];

/// Waits for its turn, counts it, and gives the turn to the other vCPU. At privilege level 3.
const PLAYER: &[u8] = &[
    0x48, 0x39, 0x37, // wait: cmp [rdi], rsi
    0x75, 0xFB, // jne wait
    0x48, 0xFF, 0x47, 0x08, // inc qword [rdi + 8]
    0x48, 0x89, 0x17, // mov [rdi], rdx
    0x48, 0xFF, 0xC9, // dec rcx
    0x75, 0xEF, // jnz wait
    0x89, 0x03, // done: mov [rbx], eax
    0xEB, 0xFC, // jmp done
];

/// Starts the APIC's timer and halts until it fires, `rcx` times.
const SLEEPER: &[u8] = &[
    0xC7, 0x83, 0xF0, 0x00, 0x00, 0x00, 0xFF, 0x01, 0x00, 0x00, // mov dword [rbx + 0xf0], 0x1ff: enable
    0xC7, 0x83, 0xE0, 0x03, 0x00, 0x00, 0x0B, 0x00, 0x00,
    0x00, // mov dword [rbx + 0x3e0], 0xb: divide by 1
    0xC7, 0x83, 0x20, 0x03, 0x00, 0x00, 0x40, 0x00, 0x00,
    0x00, // mov dword [rbx + 0x320], 0x40: one shot
    0x89, 0xB3, 0x80, 0x03, 0x00, 0x00, // again: mov [rbx + 0x380], esi: ticks
    0xFB, // sti
    0xF4, // hlt
    0xFA, // cli
    0x48, 0xFF, 0xC9, // dec rcx
    0x75, 0xF2, // jnz again
    0xE6, 0x80, // out 0x80, al
    0xF4, // hlt
];

/// Sends itself an interrupt while it takes none, says so on port 0x81, then takes it and ends on port 0x80.
const SELF_INTERRUPTER: &[u8] = &[
    0xC7, 0x83, 0xF0, 0x00, 0x00, 0x00, 0xFF, 0x01, 0x00, 0x00, // mov dword [rbx + 0xf0], 0x1ff: enable
    0xC7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x40, 0x40, 0x04, 0x00, // mov dword [rbx + 0x300], self, 0x40
    0xE6, 0x81, // out 0x81, al
    0xFB, // sti
    0xF4, // hlt
    0xFA, // cli
    0xE6, 0x80, // out 0x80, al
    0xF4, // hlt
];

/// Counts the interrupt at [`DATA`].
const COUNTER: &[u8] = &[
    0x48, 0xFF, 0x04, 0x25, 0x00, 0x20, 0x00, 0x00, // inc qword [0x2000]
    0xC7, 0x83, 0xB0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, // mov dword [rbx + 0xb0], 0: end of interrupt
    0x48, 0xCF, // iretq
];

/// What is saved of a machine.
struct Saved {
    memory: [u8; 0x1_0000],
    vcpus: Vec<VcpuState>,
    vm: VmState,
}

fn save(machine: &Machine, vcpus: &mut [KvmVcpu]) -> Saved {
    let vcpus = vcpus.iter_mut().map(|vcpu| vcpu.save().unwrap()).collect();
    Saved { memory: machine.read(0), vcpus, vm: machine.vm.state().unwrap().save().unwrap() }
}

fn restore(kvm: &Kvm, saved: &Saved) -> (Machine, Vec<KvmVcpu>) {
    let (machine, mut vcpus) = empty(kvm, saved.vcpus.len());
    machine.write(0, &saved.memory);
    for (vcpu, state) in vcpus.iter_mut().zip(&saved.vcpus) {
        vcpu.restore(state).unwrap();
    }
    let vm = machine.vm.state().unwrap();
    vm.restore(&saved.vm).unwrap();
    vm.set_clock(&saved.vm.clock.unwrap(), ClockPolicy::Continue).unwrap();
    (machine, vcpus)
}

/// A machine with an interrupt controller and as many vCPUs, after reset.
fn empty(kvm: &Kvm, vcpus: usize) -> (Machine, Vec<KvmVcpu>) {
    let machine = Machine::new(kvm, &[]);
    machine.vm.irq_chip().unwrap();
    let vcpus = (0..).take(vcpus).map(|index| machine.vm.create_vcpu(index).unwrap()).collect();
    (machine, vcpus)
}

/// vCPUs in 64-bit mode at privilege level 3 with `code` at [`ENTRY`] and these registers.
fn user_mode(kvm: &Kvm, code: &[u8], regs: &[Regs]) -> (Machine, Vec<KvmVcpu>) {
    let (machine, mut vcpus) = empty(kvm, regs.len());
    machine.write(ENTRY, code);
    for (vcpu, regs) in vcpus.iter_mut().zip(regs) {
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        set_long_mode(&machine, vcpu, *regs);
        // The tables are the user's as well.
        for entry in (0x9000..0xC000).step_by(8) {
            let value = u64::from_le_bytes(machine.read(entry));
            machine.write(entry, &(if value == 0 { 0 } else { value | 4 }).to_le_bytes());
        }
        let mut special = vcpu.special_regs().unwrap();
        (special.cs.selector, special.cs.dpl) = (0x1B, 3);
        (special.ss.selector, special.ss.dpl) = (0x23, 3);
        (special.ds, special.es) = (special.ss, special.ss);
        // Vector instructions.
        special.cr4 |= 0x600;
        vcpu.set_special_regs(&special).unwrap();
        vcpu.set_mp_state(MpState::Runnable).unwrap();
    }
    (machine, vcpus)
}

/// A vCPU in 64-bit mode with `code` at [`ENTRY`], and an interrupt handler of [`VECTOR`].
fn with_interrupts(kvm: &Kvm, code: &[u8], regs: Regs) -> (Machine, Vec<KvmVcpu>) {
    let (machine, mut vcpus) = empty(kvm, 1);
    machine.write(ENTRY, code);
    machine.write(HANDLER, COUNTER);
    machine.write(GDT + 8, &0x00AF_9B00_0000_FFFF_u64.to_le_bytes());
    machine.write(GDT + 16, &0x00CF_9300_0000_FFFF_u64.to_le_bytes());
    let gate = HANDLER & 0xFFFF | 8 << 16 | 0x8E00 << 32;
    machine.write(IDT + VECTOR * 16, &gate.to_le_bytes());
    set_long_mode(&machine, &mut vcpus[0], Regs { rbx: APIC, ..regs });
    let mut special = vcpus[0].special_regs().unwrap();
    (special.gdt.base, special.gdt.limit) = (GDT, 0x17);
    (special.idt.base, special.idt.limit) = (IDT, 0xFFF);
    vcpus[0].set_special_regs(&special).unwrap();
    (machine, vcpus)
}

/// What made a vCPU leave the guest.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    Kicked,
    Done,
}

/// Runs until a kick, or until the guest says that it is done. Then its state is whole.
fn run(vcpu: &mut KvmVcpu) -> Left {
    let left = match vcpu.run().unwrap() {
        Exit::Interrupted => Left::Kicked,
        Exit::MmioWrite { gpa: MMIO, .. } | Exit::PioWrite { port: 0x80, .. } => Left::Done,
        exit => panic!("{exit:?}"),
    };
    vcpu.complete_exit().unwrap();
    left
}

/// Runs until the guest is done, and puts it into a new VM at every kick, which come after the given times and then no more.
/// Answers the machine at its end, and how often it moved.
fn run_with_moves(
    kvm: &Kvm,
    mut at: (Machine, Vec<KvmVcpu>),
    moments: impl IntoIterator<Item = Duration>,
) -> (Machine, Vec<KvmVcpu>, u32) {
    let mut moments = moments.into_iter();
    let mut moves = 0;
    let mut done = vec![false; at.1.len()];
    loop {
        let moment = moments.next();
        thread::scope(|scope| {
            let kickers: Vec<_> = at.1.iter().map(Vcpu::kicker).collect();
            for (vcpu, done) in at.1.iter_mut().zip(&mut done).filter(|(_, done)| !**done) {
                scope.spawn(|| *done = run(vcpu) == Left::Done);
            }
            if let Some(moment) = moment {
                thread::sleep(moment);
                kickers.iter().for_each(|kicker| kicker.kick());
            }
        });
        if done.iter().all(|&done| done) {
            return (at.0, at.1, moves);
        }
        let saved = save(&at.0, &mut at.1);
        at = restore(kvm, &saved);
        moves += 1;
    }
}

/// Times from 0 to `most` in no order.
fn moments(count: u64, most: Duration) -> impl Iterator<Item = Duration> {
    let nanos = u64::try_from(most.as_nanos()).unwrap();
    (1..=count).map(move |i| Duration::from_nanos(i.wrapping_mul(0x9E37_79B9_7F4A_7C15) % nanos))
}

/// All but the counter is equal, told part by part: a whole state is hard to read.
fn assert_same(now: &VcpuState, then: &VcpuState) {
    assert_eq!(now.cpuid, then.cpuid);
    assert_eq!((now.tsc_khz, now.mp_state), (then.tsc_khz, then.mp_state));
    assert_eq!((now.regs, now.special_regs), (then.regs, then.special_regs));
    assert_eq!((&now.xcrs, now.debug_regs), (&then.xcrs, then.debug_regs));
    assert_eq!(now.events, then.events);
    let msrs = |state: &VcpuState| {
        let msrs = state.msrs.iter().filter(|msr| msr.index != IA32_TSC);
        msrs.map(|msr| format!("{:#x}: {:#x}", msr.index, msr.value)).collect::<Vec<_>>()
    };
    assert_eq!(msrs(now), msrs(then));
    let differ = |now: &[u8], then: &[u8]| now.iter().zip(then).position(|(now, then)| now != then);
    assert_eq!(now.xsave.len(), then.xsave.len());
    assert_eq!(differ(&now.xsave, &then.xsave), None, "the XSAVE area differs there");
    let lapic = |state: &VcpuState| state.lapic.clone().unwrap();
    assert_eq!(differ(&*lapic(now), &*lapic(then)), None, "the APIC differs there");
}

fn tsc(state: &VcpuState) -> u64 {
    state.msrs.iter().find(|msr| msr.index == IA32_TSC).unwrap().value
}

#[test]
fn guest_that_moves_a_hundred_times_computes_what_one_does_that_stays() {
    let Some(kvm) = kvm("guest_that_moves_a_hundred_times_computes_what_one_does_that_stays") else { return };
    let _watchdog = Watchdog::new("guest_that_moves_a_hundred_times_computes_what_one_does_that_stays");
    let regs = Regs { rax: 1, rcx: 20_000_000, rdi: DATA, rbx: MMIO, ..Regs::default() };
    let guest = || user_mode(&kvm, WORKER, &[regs]);
    let (stayed, mut vcpus, _) = run_with_moves(&kvm, guest(), []);
    let expected = (stayed.read::<0x2000>(DATA), vcpus[0].regs().unwrap());
    let (moved, mut vcpus2, moves) = run_with_moves(&kvm, guest(), moments(100, Duration::from_micros(1500)));
    assert!(moves >= 20, "the guest was done after {moves} moves");
    assert!(moved.read::<0x2000>(DATA) == expected.0, "memory or vector registers differ");
    assert_eq!(vcpus2[0].regs().unwrap(), expected.1);
    assert_eq!(vcpus2[0].save().unwrap().xsave, vcpus[0].save().unwrap().xsave);
}

#[test]
fn two_vcpus_that_take_turns_lose_none_when_they_move() {
    let Some(kvm) = kvm("two_vcpus_that_take_turns_lose_none_when_they_move") else { return };
    let _watchdog = Watchdog::new("two_vcpus_that_take_turns_lose_none_when_they_move");
    // On a single processor each turn takes the other's whole slice of time.
    let alone = thread::available_parallelism().unwrap().get() == 1;
    let turns = if alone { 500 } else { 100_000 };
    let player = |rsi, rdx| Regs { rcx: turns, rdi: DATA, rbx: MMIO, rsi, rdx, ..Regs::default() };
    let guest = user_mode(&kvm, PLAYER, &[player(0, 1), player(1, 0)]);
    let (machine, _, moves) = run_with_moves(&kvm, guest, moments(30, Duration::from_millis(1)));
    assert!(moves > 0);
    assert_eq!(u64::from_le_bytes(machine.read(DATA + 8)), 2 * turns);
}

#[test]
fn timer_of_a_vcpu_that_moves_fires_each_time_it_was_set() {
    let Some(kvm) = kvm("timer_of_a_vcpu_that_moves_fires_each_time_it_was_set") else { return };
    let _watchdog = Watchdog::new("timer_of_a_vcpu_that_moves_fires_each_time_it_was_set");
    const TIMERS: u64 = 20;
    // The APIC's bus has 1 GHz: 5 ms.
    let guest = with_interrupts(&kvm, SLEEPER, Regs { rcx: TIMERS, rsi: 5_000_000, ..Regs::default() });
    let (machine, _, moves) = run_with_moves(&kvm, guest, moments(40, Duration::from_millis(7)));
    assert!(moves > 0);
    // KVM lets a timer that has fired do so once more when it is restored, lest an interrupt on its way be lost.
    let fired = u64::from_le_bytes(machine.read(DATA));
    assert!((TIMERS..=TIMERS + u64::from(moves)).contains(&fired), "{fired} after {moves} moves");
}

#[test]
fn halted_vcpu_is_halted_after_the_move() {
    let Some(kvm) = kvm("halted_vcpu_is_halted_after_the_move") else { return };
    let _watchdog = Watchdog::new("halted_vcpu_is_halted_after_the_move");
    // A timer of more than an hour.
    let (machine, mut vcpus) =
        with_interrupts(&kvm, SLEEPER, Regs { rcx: 1, rsi: u64::from(u32::MAX), ..Regs::default() });
    let kicker = vcpus[0].kicker();
    while vcpus[0].mp_state().unwrap() != MpState::Halted {
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(run(&mut vcpus[0]), Left::Kicked));
            thread::sleep(Duration::from_millis(5));
            kicker.kick();
        });
    }
    let (_machine, vcpus) = restore(&kvm, &save(&machine, &mut vcpus));
    assert_eq!(vcpus[0].mp_state().unwrap(), MpState::Halted);
}

#[test]
fn interrupt_that_is_pending_is_taken_after_the_move_and_once() {
    let Some(kvm) = kvm("interrupt_that_is_pending_is_taken_after_the_move_and_once") else { return };
    let _watchdog = Watchdog::new("interrupt_that_is_pending_is_taken_after_the_move_and_once");
    let (machine, mut vcpus) = with_interrupts(&kvm, SELF_INTERRUPTER, Regs::default());
    assert!(matches!(vcpus[0].run().unwrap(), Exit::PioWrite { port: 0x81, .. }));
    vcpus[0].complete_exit().unwrap();
    let (machine, mut vcpus) = restore(&kvm, &save(&machine, &mut vcpus));
    assert_eq!(u64::from_le_bytes(machine.read(DATA)), 0);
    assert_eq!(run(&mut vcpus[0]), Left::Done);
    assert_eq!(u64::from_le_bytes(machine.read(DATA)), 1);
}

#[test]
fn vcpu_that_waits_for_sipi_starts_where_it_says_after_the_move() {
    let Some(kvm) = kvm("vcpu_that_waits_for_sipi_starts_where_it_says_after_the_move") else { return };
    let _watchdog = Watchdog::new("vcpu_that_waits_for_sipi_starts_where_it_says_after_the_move");
    let code = [
        0xC7, 0x83, 0xF0, 0x00, 0x00, 0x00, 0xFF, 0x01, 0x00,
        0x00, // mov dword [rbx + 0xf0], 0x1ff: enable
        0xC7, 0x83, 0x10, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, // mov dword [rbx + 0x310], 1 << 24
        0xC7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x00, 0x45, 0x00, 0x00, // mov dword [rbx + 0x300], INIT
        0xE6, 0x81, // out 0x81, al
        0xC7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x02, 0x46, 0x00,
        0x00, // mov dword [rbx + 0x300], SIPI 0x2000
        0xE6, 0x82, // out 0x82, al
        0xF4, // hlt
    ];
    let (machine, mut vcpus) = empty(&kvm, 2);
    machine.write(ENTRY, &code);
    machine.write(DATA, &[0xE6, 0x80, 0xF4]); // out 0x80, al; hlt
    set_long_mode(&machine, &mut vcpus[0], Regs { rbx: APIC, ..Regs::default() });
    let (mut machine, mut vcpus) = restore(&kvm, &save(&machine, &mut vcpus));
    assert_eq!(vcpus[1].mp_state().unwrap(), MpState::Uninitialized);
    // Between INIT and SIPI, and once more between SIPI and the start.
    for port in [0x81, 0x82] {
        let exit = vcpus[0].run().unwrap();
        assert!(matches!(exit, Exit::PioWrite { port: at, .. } if at == port), "{exit:?}");
        vcpus[0].complete_exit().unwrap();
        let saved = save(&machine, &mut vcpus);
        (machine, vcpus) = restore(&kvm, &saved);
    }
    assert_eq!(run(&mut vcpus[1]), Left::Done);
    assert_eq!(vcpus[1].special_regs().unwrap().cs.base, DATA);
}

#[test]
fn what_is_saved_after_a_restore_is_what_was_restored() {
    let Some(kvm) = kvm("what_is_saved_after_a_restore_is_what_was_restored") else { return };
    let _watchdog = Watchdog::new("what_is_saved_after_a_restore_is_what_was_restored");
    let regs = Regs { rax: 1, rcx: u64::MAX, rdi: DATA, rbx: MMIO, ..Regs::default() };
    let (machine, mut vcpus) = user_mode(&kvm, WORKER, &[regs]);
    let kicker = vcpus[0].kicker();
    let mut time = Duration::from_millis(3);
    while vcpus[0].regs().unwrap().rcx == u64::MAX {
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(run(&mut vcpus[0]), Left::Kicked));
            thread::sleep(time);
            kicker.kick();
        });
        // A slow host may need more to begin at all.
        time *= 2;
    }
    let first = save(&machine, &mut vcpus);
    let (machine, mut vcpus) = restore(&kvm, &first);
    let second = save(&machine, &mut vcpus);
    assert_same(&second.vcpus[0], &first.vcpus[0]);
    assert_eq!(second.vm.chips, first.vm.chips);
    assert!(first.vcpus[0].xsave.iter().skip(160).take(80).any(|&byte| byte != 0), "XMM0 to XMM4 are in use");
}

#[test]
fn registers_of_all_kinds_come_back_as_they_were_saved() {
    let Some(kvm) = kvm("registers_of_all_kinds_come_back_as_they_were_saved") else { return };
    let (_machine, mut vcpus) = empty(&kvm, 1);
    vcpus[0].set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    let mut state = vcpus[0].save().unwrap();
    let host = kvm.host_cpu().unwrap();
    // XCR0 with x87, SSE and, where there is AVX, YMM.
    let avx = host.cpuid.iter().any(|leaf| leaf.function == 1 && leaf.ecx & 1 << 28 != 0);
    if avx {
        state.special_regs.cr4 |= 1 << 18;
        state.xcrs = vec![(0, 7)];
        state.xsave[512..520].copy_from_slice(&7_u64.to_le_bytes());
        state.xsave[576..832].fill(0x5A);
    }
    state.debug_regs.db = [0x1000, 0x2000, 0x3000, 0x4000];
    state.debug_regs.dr7 = 0x401;
    // SYSENTER_ESP, LSTAR, KERNEL_GS_BASE, PAT, TSC_AUX where the host lists it, the first MTRR.
    for (index, value) in
        [(0x175, 0x1234), (0xC000_0082, 0x5678), (0xC000_0102, 0x9ABC), (0x200, 0x8000_0006)]
    {
        state.msrs.iter_mut().filter(|msr| msr.index == index).for_each(|msr| msr.value = value);
    }
    state.events.nmi_masked = true;
    state.events.interrupt_shadow = 1;
    state.regs.rflags |= 0x200;
    let (_machine, mut vcpus) = empty(&kvm, 1);
    vcpus[0].restore(&state).unwrap();
    let mut now = vcpus[0].save().unwrap();
    // AMD has one shadow for `sti` and `mov ss`.
    assert_eq!(now.events.interrupt_shadow & 1, 1);
    now.events.interrupt_shadow = 1;
    assert_same(&now, &state);
}

#[test]
fn counter_goes_forward_and_those_of_two_vcpus_agree_after_the_move() {
    let Some(kvm) = kvm("counter_goes_forward_and_those_of_two_vcpus_agree_after_the_move") else { return };
    let (machine, mut vcpus) = empty(&kvm, 2);
    let saved = save(&machine, &mut vcpus);
    let (_machine, vcpus) = restore(&kvm, &saved);
    let read = |vcpu: &KvmVcpu| {
        let mut msr = [Msr { index: IA32_TSC, value: 0 }];
        vcpu.msrs(&mut msr).unwrap();
        msr[0].value
    };
    let (first, second, third) = (read(&vcpus[0]), read(&vcpus[1]), read(&vcpus[0]));
    assert!(first >= tsc(&saved.vcpus[0]), "{first} is before {}", tsc(&saved.vcpus[0]));
    assert!(first <= second && second <= third, "{first} {second} {third}");
}

#[test]
fn guest_with_kvmclock_is_told_that_it_was_paused() {
    const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    const TIME: u64 = 0x3000;
    /// Offset of the flags in `struct pvclock_vcpu_time_info`, and "the host has paused the guest" in them.
    const FLAGS: u64 = 29;
    const GUEST_STOPPED: u8 = 2;
    let Some(kvm) = kvm("guest_with_kvmclock_is_told_that_it_was_paused") else { return };
    let _watchdog = Watchdog::new("guest_with_kvmclock_is_told_that_it_was_paused");
    let (machine, mut vcpus) = empty(&kvm, 1);
    machine.write(ENTRY, &[0xE6, 0x80, 0xE6, 0x80, 0xE6, 0x80]); // out 0x80, al, three times
    set_real_mode(&mut vcpus[0], 0);
    vcpus[0].set_msrs(&[Msr { index: KVM_SYSTEM_TIME_NEW, value: TIME | 1 }]).unwrap();
    let flags = |machine: &Machine| machine.read::<1>(TIME + FLAGS)[0];
    assert_eq!(run(&mut vcpus[0]), Left::Done);
    assert_eq!(flags(&machine) & GUEST_STOPPED, 0);
    let (machine, mut vcpus) = restore(&kvm, &save(&machine, &mut vcpus));
    assert_eq!(run(&mut vcpus[0]), Left::Done);
    assert_eq!(flags(&machine) & GUEST_STOPPED, GUEST_STOPPED);
    // The guest takes the flag away when it has seen it. In the same VM a pause is told as well.
    machine.write(TIME + FLAGS, &[0]);
    vcpus[0].tell_paused().unwrap();
    assert_eq!(run(&mut vcpus[0]), Left::Done);
    assert_eq!(flags(&machine) & GUEST_STOPPED, GUEST_STOPPED);
}

#[test]
fn vcpu_without_kvmclock_need_not_be_told() {
    let Some(kvm) = kvm("vcpu_without_kvmclock_need_not_be_told") else { return };
    let (_machine, mut vcpus) = empty(&kvm, 1);
    vcpus[0].tell_paused().unwrap();
}

/// Waits for line 5 by the PIC, see [`interrupts`](crate::interrupts).
#[test]
fn interrupt_lines_work_in_the_new_vm_also_if_they_were_made_before_the_chips_were_restored() {
    let test = "interrupt_lines_work_in_the_new_vm_also_if_they_were_made_before_the_chips_were_restored";
    let Some(kvm) = kvm(test) else { return };
    let _watchdog = Watchdog::new(test);
    let (machine, mut vcpus) = empty(&kvm, 1);
    crate::interrupts::interrupt_guest(&machine);
    set_real_mode(&mut vcpus[0], 0);
    assert!(matches!(vcpus[0].run().unwrap(), Exit::PioWrite { port: 0x11, .. }));
    vcpus[0].complete_exit().unwrap();
    let saved = save(&machine, &mut vcpus);

    let (machine, mut vcpus) = empty(&kvm, 1);
    machine.write(0, &saved.memory);
    let irq = machine.vm.irq_chip().unwrap().unwrap().edge(5).unwrap();
    vcpus[0].restore(&saved.vcpus[0]).unwrap();
    machine.vm.state().unwrap().restore(&saved.vm).unwrap();
    for _ in 0..3 {
        irq.trigger().unwrap();
        let exit = vcpus[0].run().unwrap();
        assert!(matches!(exit, Exit::PioWrite { port: 0x10, .. }), "{exit:?}");
    }
}

#[test]
fn edge_that_came_before_the_save_is_taken_after_the_move() {
    let Some(kvm) = kvm("edge_that_came_before_the_save_is_taken_after_the_move") else { return };
    let _watchdog = Watchdog::new("edge_that_came_before_the_save_is_taken_after_the_move");
    let (machine, mut vcpus) = empty(&kvm, 1);
    crate::interrupts::interrupt_guest(&machine);
    set_real_mode(&mut vcpus[0], 0);
    assert!(matches!(vcpus[0].run().unwrap(), Exit::PioWrite { port: 0x11, .. }));
    vcpus[0].complete_exit().unwrap();
    machine.vm.irq_chip().unwrap().unwrap().edge(5).unwrap().trigger().unwrap();
    // An irqfd is told in its own time, on a worker of the kernel if need be.
    thread::sleep(Duration::from_millis(20));
    let (_machine, mut vcpus) = restore(&kvm, &save(&machine, &mut vcpus));
    let exit = vcpus[0].run().unwrap();
    assert!(matches!(exit, Exit::PioWrite { port: 0x10, .. }), "{exit:?}");
}

#[test]
fn clock_goes_on_where_it_stopped_or_moves_on_with_the_world() {
    let Some(kvm) = kvm("clock_goes_on_where_it_stopped_or_moves_on_with_the_world") else { return };
    let (machine, _vcpus) = empty(&kvm, 1);
    let vm = machine.vm.state().unwrap();
    let now = vm.save().unwrap().clock.unwrap();
    let hour = 3_600_000_000_000;
    // Saved an hour ago, when the guest's clock said two hours.
    let realtime = now.host_realtime_ns.unwrap() - hour;
    let saved = ClockState { guest_ns: 2 * hour, host_realtime_ns: Some(realtime), host_tsc: None };
    let set = |policy| {
        vm.set_clock(&saved, policy).unwrap();
        vm.save().unwrap().clock.unwrap().guest_ns
    };
    let continued = set(ClockPolicy::Continue);
    assert!((2 * hour..3 * hour).contains(&continued), "{continued}");
    let advanced = set(ClockPolicy::Advance);
    assert!((3 * hour..4 * hour).contains(&advanced), "{advanced}");
    let nameless = ClockState { host_realtime_ns: None, ..saved };
    assert!(matches!(vm.set_clock(&nameless, ClockPolicy::Advance), Err(Error::Unsupported(_))));
}

#[test]
fn state_that_is_too_long_or_too_short_is_refused_by_its_name() {
    let Some(kvm) = kvm("state_that_is_too_long_or_too_short_is_refused_by_its_name") else { return };
    let (machine, mut vcpus) = empty(&kvm, 1);
    let good = vcpus[0].save().unwrap();
    let mut refusal = |spoil: &dyn Fn(&mut VcpuState)| {
        let mut bad = good.clone();
        spoil(&mut bad);
        vcpus[0].restore(&bad).unwrap_err().to_string()
    };
    let leaf = good.cpuid.first().copied().unwrap_or_default();
    assert!(refusal(&|s| s.cpuid = vec![leaf; 257]).contains("number of CPUID leaves 0x101"));
    assert!(refusal(&|s| s.xsave.push(0)).contains("length of the XSAVE area 0x"));
    assert!(refusal(&|s| s.xsave.truncate(575)).contains("length of the XSAVE area 0x23f"));
    assert!(refusal(&|s| s.msrs = vec![Msr::default(); 1025]).contains("number of MSRs 0x401"));
    assert!(refusal(&|s| s.xcrs = vec![(0, 1); 17]).contains("control registers 0x11"));
    assert!(refusal(&|s| s.lapic = None).contains("local APIC"));
    let missing = refusal(&|s| s.msrs = vec![Msr { index: 0xDEAD_BEEF, value: 7 }]);
    assert_eq!(missing, "MSR 0xdeadbeef cannot be set to 0x7");
    // What was zero is zero here, too.
    let mut harmless = good.clone();
    harmless.msrs.insert(1, Msr { index: 0xDEAD_BEEF, value: 0 });
    vcpus[0].restore(&harmless).unwrap();

    let vm = machine.vm.state().unwrap();
    for kind in [ChipKind::PicMaster, ChipKind::PicSlave, ChipKind::IoApic, ChipKind::Pit] {
        for len in [0, 15, 513] {
            let chips = vec![ChipState { kind, registers: vec![0; len] }];
            let error = vm.restore(&VmState { chips, clock: None }).unwrap_err();
            assert!(matches!(error, Error::OutOfRange { what: "length of a chip's state", .. }), "{error:?}");
        }
    }
}

#[test]
fn chips_and_apics_are_refused_where_there_is_no_interrupt_controller() {
    let Some(kvm) = kvm("chips_and_apics_are_refused_where_there_is_no_interrupt_controller") else { return };
    let (machine, mut vcpus) = empty(&kvm, 1);
    let saved = save(&machine, &mut vcpus);
    let bare = Machine::new(&kvm, &[]);
    assert!(matches!(bare.vm.state().unwrap().restore(&saved.vm), Err(Error::Unsupported(_))));
    let mut vcpu = bare.vm.create_vcpu(0).unwrap();
    assert!(matches!(vcpu.restore(&saved.vcpus[0]), Err(Error::Unsupported(_))));
    // A VM without one is saved and restored without.
    let state = vcpu.save().unwrap();
    assert!(state.lapic.is_none() && bare.vm.state().unwrap().save().unwrap().chips.is_empty());
    let other = Machine::new(&kvm, &[]);
    other.vm.create_vcpu(0).unwrap().restore(&state).unwrap();
}
