//! The local APIC and the I/O APIC, memory-mapped: a timer, a watchdog and edge-triggered device interrupts.
//!
//! Interrupts go to vectors 32 and up, whose handler in `boot.s` counts them; see [`crate::cpu::interrupts`].

use crate::cpu;
use crate::phys::Register;

/// Base of the vectors that are counted.
pub const VECTORS: u32 = 32;
/// Index of the vector that ends the program with the words `timed out`.
const WATCHDOG: u32 = 15;
/// Index of the spurious vector.
const SPURIOUS: u32 = 14;

/// A local APIC register by its offset.
pub const fn local(offset: u32) -> Register {
    // SAFETY: the local APIC is at its architectural address, and programs have interrupts of nobody else to lose.
    unsafe { Register::new(0xFEE0_0000 + offset) }
}

core::arch::global_asm!(
    ".globl level0_interrupts_on",
    "level0_interrupts_on:",
    "or qword ptr [rsp + 24], 0x200", // rflags of the frame, below return address, rip and cs
    "xor eax, eax",
    "ret",
);

unsafe extern "C" {
    safe fn level0_interrupts_on(a: u64, b: u64, c: u64) -> u64;
}

/// Id of the processor this runs on.
pub fn id() -> u32 {
    local(0x20).read() >> 24
}

/// Switches the local APIC and interrupts on; nothing is routed to them yet, and the legacy PIC stays off.
pub fn enable() {
    local(0x350).write(0x1_0000); // LINT0, where the PIC is: masked
    local(0xF0).write(0x100 | (VECTORS + SPURIOUS));
    local(0x3E0).write(0b1010); // timer: divide by 128
    // SAFETY: it sets one bit in the saved flags, and handlers for all vectors in use are in place.
    unsafe { cpu::at_level_0(level0_interrupts_on, 0, 0, 0) };
}

/// Sends one timer interrupt at vector `32 + index` after `ticks` of the timer (128 ns each under KVM).
pub fn timer(index: u32, ticks: u32) {
    local(0x320).write(VECTORS + index);
    local(0x380).write(ticks);
}

/// Sends a timer interrupt at vector `32 + index` every `ticks` of the timer.
pub fn periodic(index: u32, ticks: u32) {
    local(0x320).write(1 << 17 | (VECTORS + index));
    local(0x380).write(ticks);
}

/// Sends an interrupt at vector `32 + index` to another processor.
pub fn send(id: u32, index: u32) {
    local(0x310).write(id << 24);
    local(0x300).write(0x4000 | (VECTORS + index));
}

/// Whether there is a local APIC.
pub fn is_there() -> bool {
    !matches!(local(0x30).read(), 0 | u32::MAX)
}

/// Ends the program, in about ten seconds, unless called again. Replaces a timer that is running.
pub fn watchdog() {
    timer(WATCHDOG, 78_000_000);
}

/// Stops timer and watchdog.
pub fn stop_timer() {
    local(0x380).write(0);
}

/// Routes pin `pin` of the I/O APIC, edge-triggered, to this processor at vector `32 + index`. False: no such pin.
pub fn route(pin: u32, index: u32) -> bool {
    // SAFETY: the I/O APIC is at its usual address; where it is not, writes are lost and the version is nonsense.
    let (select, window) = unsafe { (Register::new(0xFEC0_0000), Register::new(0xFEC0_0010)) };
    select.write(1);
    let version = window.read();
    if version == u32::MAX || pin > version >> 16 & 0xFF {
        return false;
    }
    select.write(0x11 + 2 * pin);
    window.write(id() << 24);
    select.write(0x10 + 2 * pin);
    window.write(VECTORS + index);
    true
}
