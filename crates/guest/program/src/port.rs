//! Port I/O. The I/O bitmap of `boot.s` opens all ports to level 3.

use core::arch::asm;

/// Writes a byte.
pub fn out8(port: u16, value: u8) {
    // SAFETY: port output touches no memory of this program.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes 16 bits.
pub fn out16(port: u16, value: u16) {
    // SAFETY: port output touches no memory of this program.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte.
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: port input touches no memory of this program.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads 16 bits.
pub fn in16(port: u16) -> u16 {
    let value: u16;
    // SAFETY: port input touches no memory of this program.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Writes `bytes` with one `rep outsb`: one exit for the whole string.
pub fn out_string(port: u16, bytes: &[u8]) {
    // SAFETY: `rep outsb` reads `rcx` bytes from `rsi`, which is what the slice covers; the direction flag is clear.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
            options(readonly, nostack, preserves_flags));
    }
}
