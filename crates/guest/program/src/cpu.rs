//! The processor: identification, time stamps, and the way back to privilege level 0.

use core::arch::x86_64::_rdtsc;
pub use core::arch::x86_64::CpuidResult;
use core::sync::atomic::{AtomicU64, Ordering};

core::arch::global_asm!(
    ".globl level0_cpuid",
    "level0_cpuid:",
    "push rbx",
    "mov r8, rsi",
    "mov eax, edi",
    "xor ecx, ecx",
    "cpuid",
    "mov [r8], eax",
    "mov [r8 + 4], ebx",
    "mov [r8 + 8], ecx",
    "mov [r8 + 12], edx",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    safe fn level0_cpuid(leaf: u64, registers: u64, c: u64) -> u64;
}

/// CPUID leaf, asked at privilege level 0: without hardware virtualization, level 3 may see the host's own.
pub fn cpuid(leaf: u32) -> CpuidResult {
    let mut registers = [0u32; 4];
    let at = registers.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: integer code that writes four words to the array.
    unsafe { at_level_0(level0_cpuid, u64::from(leaf), at, 0) };
    let [eax, ebx, ecx, edx] = registers;
    CpuidResult { eax, ebx, ecx, edx }
}

/// Time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC is in every 64-bit processor and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

unsafe extern "C" {
    fn boot_cpl0_call(function: extern "C" fn(u64, u64, u64) -> u64, a: u64, b: u64, c: u64) -> u64;
    static boot_exception_hook: AtomicU64;
    static boot_interrupt_counts: [AtomicU64; 16];
}

/// Runs `function(a, b, c)` at privilege level 0, with interrupts off.
///
/// # Safety
///
/// `function` is integer-only code written in assembly that may run at level 0 on a stack of 4 KiB.
pub unsafe fn at_level_0(function: extern "C" fn(u64, u64, u64) -> u64, a: u64, b: u64, c: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { boot_cpl0_call(function, a, b, c) }
}

/// Has all further exceptions jump to `hook` at level 0, with vector and error code on the stack; none is reported.
///
/// # Safety
///
/// `hook` is assembly that handles them.
pub unsafe fn hook_exceptions(hook: u64) {
    // SAFETY: the word exists in `boot.s` and is read with a single instruction.
    unsafe { &boot_exception_hook }.store(hook, Ordering::SeqCst);
}

/// How many interrupts of vector `32 + index` have arrived.
pub fn interrupts(index: usize) -> u64 {
    // SAFETY: the sixteen words exist in `boot.s`; handlers change them with a single instruction.
    unsafe { &boot_interrupt_counts }.get(index).map_or(0, |count| count.load(Ordering::SeqCst))
}

core::arch::global_asm!(
    ".globl level0_write_msr",
    "level0_write_msr:",
    "mov rcx, rdi",
    "mov rax, rsi",
    "mov rdx, rsi",
    "shr rdx, 32",
    "wrmsr",
    "xor eax, eax",
    "ret",
);

unsafe extern "C" {
    safe fn level0_write_msr(msr: u64, value: u64, unused: u64) -> u64;
}

/// Writes a model-specific register.
///
/// # Safety
///
/// The register exists and the value does not take the ground from under the program.
pub unsafe fn write_msr(msr: u32, value: u64) {
    // SAFETY: the function is three moves, a shift and WRMSR.
    unsafe { at_level_0(level0_write_msr, u64::from(msr), value, 0) };
}
