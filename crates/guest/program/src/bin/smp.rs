//! Starts the application processors of the ACPI MADT and counts them.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::{apic, cpu, entry, machine, print, println};

entry!(main);

/// Where the trampoline goes: page aligned, below 1 MiB, and above what loaders put at the bottom of memory.
const TRAMPOLINE: usize = 0x1_0000;

// The way of an application processor: real mode at the trampoline's copy, protected mode there, long mode in the image.
// It runs at level 0, so it stays with plain integer code.
core::arch::global_asm!(
    r#"
    .section .boot.text, "awx", @progbits
    .code16
    .globl smp_trampoline
smp_trampoline:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0F, 0x01, 0x16        # lgdt, 32-bit base
    .word smp_gdt_pointer - smp_trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA                    # far jump, 32-bit offset
    .long 0x10000 + smp_protected - smp_trampoline
    .word 0x38
    .balign 4
smp_gdt_pointer:
    .word 0x3F
    .long boot_gdt
    .code32
smp_protected:
    mov eax, 0x10
    mov ds, eax
    mov ss, eax
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xC0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000033
    mov cr0, eax
    .byte 0xEA
    .long smp_long
    .word 0x08
    .globl smp_trampoline_end
smp_trampoline_end:
    .code64
smp_long:
    mov eax, 0xFEE00020                 # local APIC id
    mov eax, dword ptr [rax]
    shr eax, 24
    mov byte ptr [rax + {up}], 1
    lock inc dword ptr [{count}]
1:  cli
    hlt
    jmp 1b
    .text
    "#,
    up = sym UP,
    count = sym COUNT,
);

/// By local APIC id: the processor has come up.
static UP: [AtomicU8; 256] = [const { AtomicU8::new(0) }; 256];
/// Application processors that have come up.
static COUNT: AtomicU32 = AtomicU32::new(0);

const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;

fn send(id: u32, command: u32) {
    apic::local(0x310).write(id << 24);
    apic::local(0x300).write(command);
}

fn wait(ticks: u64, done: impl Fn() -> bool) -> bool {
    let start = cpu::tsc();
    while !done() {
        if cpu::tsc().wrapping_sub(start) > ticks {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

fn is_up(id: u32) -> bool {
    UP.get(id as usize).is_some_and(|up| up.load(Ordering::SeqCst) != 0)
}

fn start(id: u32) {
    send(id, INIT);
    wait(1 << 18, || false);
    send(id, STARTUP);
    // The architecture asks for a second one if the first is lost.
    if !wait(1 << 26, || is_up(id)) {
        send(id, STARTUP);
        wait(1 << 30, || is_up(id));
    }
}

fn copy_trampoline() {
    unsafe extern "C" {
        static smp_trampoline: u8;
        static smp_trampoline_end: u8;
    }
    let (start, end) = (&raw const smp_trampoline, &raw const smp_trampoline_end);
    let to = core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE);
    // SAFETY: the source is the trampoline; the destination is RAM that nobody uses once the tables have been read.
    unsafe { to.copy_from_nonoverlapping(start, end.addr() - start.addr()) };
}

extern "C" fn main(start_info: u64) -> ! {
    let acpi = Acpi::find(StartInfo::new(start_info));
    let own = apic::id();
    if let Some(slot) = UP.get(own as usize) {
        slot.store(1, Ordering::SeqCst);
    }
    let mut ids = [0; 255];
    let mut total = 0;
    for (slot, id) in ids.iter_mut().zip(acpi.iter().flat_map(Acpi::processors)) {
        *slot = id;
        total += 1;
    }
    copy_trampoline();
    apic::enable();
    for &id in ids.iter().take(total).filter(|&&id| id != own && id < 255) {
        start(id);
    }
    let up = ids.iter().take(total).filter(|&&id| is_up(id)).count();
    print!("smp: {up} of {total} cpus up (apic ids");
    for id in (0..256).filter(|&id| is_up(id)) {
        print!(" {id}");
    }
    println!(")");
    let extra = COUNT.load(Ordering::SeqCst) as usize + 1 != up;
    if up == 0 || up != total || extra { machine::fail() } else { machine::power_off(acpi.as_ref()) }
}
