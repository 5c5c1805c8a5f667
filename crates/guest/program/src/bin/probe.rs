//! Tells whether an operating system kernel could run here: whether SYSCALL arrives at privilege level 0 and whether level 0
//! has the instructions that kernels use.
//!
//! Word 0 of the parameter block is the step under way, word 1 the result (0 while running). The host reads them when the
//! program ends in whatever way.
#![no_std]
#![no_main]

use freestone_guest_program::{cpu, entry, machine, params, port, println};

entry!(main);
params!(0, 0);

const DONE: u16 = 0xF4;
const YES: u8 = 1;
const NO: u8 = 2;

core::arch::global_asm!(
    r#"
    .text
# An exception, at either level: the answer is no.
    .globl probe_exception
probe_exception:
    mov qword ptr [0x100008], 2
    mov al, 2
    out 0xF4, al
    jmp boot_reset

    .globl level0_enable_syscall
level0_enable_syscall:
    mov ecx, 0xC0000081                 # STAR: level 0 from 0x08, level 3 from 0x10
    xor eax, eax
    mov edx, 0x00100008
    wrmsr
    mov ecx, 0xC0000082                 # LSTAR
    mov eax, offset probe_syscall_entry
    xor edx, edx
    wrmsr
    mov ecx, 0xC0000084                 # SFMASK
    mov eax, 0x200
    wrmsr
    mov ecx, 0xC0000080                 # EFER: LME, LMA, SCE
    rdmsr
    or eax, 1
    wrmsr
    xor eax, eax
    ret

probe_syscall_entry:
    mov eax, cs
    and eax, 3
    jnz 1f
    sysretq
1:  jmp rcx

# The privilege level at which SYSCALL arrived.
    .globl probe_syscall
probe_syscall:
    push rbx
    mov rbx, rsp
    syscall
    mov rsp, rbx
    pop rbx
    ret

    .globl level0_popcnt
level0_popcnt:
    mov ecx, 0x33
    popcnt eax, ecx
    ret

    .globl level0_x87
level0_x87:
    fninit
    fld1
    fld1
    faddp
    fistp dword ptr [rsp - 8]
    mov eax, [rsp - 8]
    ret

    .globl level0_xgetbv
level0_xgetbv:
    mov rax, cr4
    or eax, 0x40000
    mov cr4, rax
    xor ecx, ecx
    xgetbv
    and eax, 1
    ret

    .globl level0_cmpxchg16b
level0_cmpxchg16b:
    push rbx
    sub rsp, 32
    mov rdi, rsp
    and rdi, -16
    xor eax, eax
    xor edx, edx
    mov [rdi], rax
    mov [rdi + 8], rax
    mov ebx, 7
    xor ecx, ecx
    lock cmpxchg16b xmmword ptr [rdi]
    mov rax, [rdi]
    add rsp, 32
    pop rbx
    ret

    .globl level0_sse
level0_sse:
    mov eax, 3
    cvtsi2sd xmm0, eax
    addsd xmm0, xmm0
    cvtsd2si eax, xmm0
    ret
    "#
);

unsafe extern "C" {
    static probe_exception: u8;
    safe fn level0_enable_syscall(a: u64, b: u64, c: u64) -> u64;
    safe fn probe_syscall() -> u32;
    safe fn level0_popcnt(a: u64, b: u64, c: u64) -> u64;
    safe fn level0_x87(a: u64, b: u64, c: u64) -> u64;
    safe fn level0_xgetbv(a: u64, b: u64, c: u64) -> u64;
    safe fn level0_cmpxchg16b(a: u64, b: u64, c: u64) -> u64;
    safe fn level0_sse(a: u64, b: u64, c: u64) -> u64;
}

type Step = extern "C" fn(u64, u64, u64) -> u64;

/// Whether all steps that this processor's CPUID promises do what they should.
fn all() -> bool {
    params::set(0, 1);
    // SAFETY: it writes the SYSCALL registers, which nothing else uses.
    unsafe { cpu::at_level_0(level0_enable_syscall, 0, 0, 0) };
    if probe_syscall() != 0 {
        return false;
    }
    let features = cpu::cpuid(1).ecx;
    let steps: [(Step, u32, u64); 5] = [
        (level0_popcnt, 1 << 23, 4),
        (level0_x87, 0, 2),
        (level0_xgetbv, 1 << 26, 1),
        (level0_cmpxchg16b, 1 << 13, 7),
        (level0_sse, 0, 6),
    ];
    for (number, (step, feature, expected)) in (2..).zip(steps) {
        if features & feature != feature {
            continue;
        }
        params::set(0, number);
        // SAFETY: each is a few instructions of assembly; that they may raise an exception is what this is about, and
        // the hook ends the program then.
        if unsafe { cpu::at_level_0(step, 0, 0, 0) } != expected {
            return false;
        }
    }
    true
}

extern "C" fn main(_: u64) -> ! {
    let hook = &raw const probe_exception;
    // SAFETY: the hook is written for this: it reports and ends.
    unsafe { cpu::hook_exceptions(hook.addr() as u64) };
    let result = if all() { YES } else { NO };
    params::set(1, u64::from(result));
    match result {
        YES => println!("probe: level 0 runs what a kernel needs"),
        _ => println!("probe: step {} failed", params::get(0)),
    }
    port::out8(DONE, result);
    machine::reset()
}
