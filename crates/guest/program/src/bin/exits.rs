//! Makes exits of one kind, as many as the host asks for: the guest of the exit benches.
//!
//! The host writes a command into the parameter block, lets the processor run until it writes 1 to port 0xF4, and may then
//! write the next command. Words of the block: 0 the operation, 1 how often, 2 the port or guest-physical address, 3 (written by
//! the guest) the time stamp counter's ticks that it took.
#![no_std]
#![no_main]

use freestone_guest_program::{cpu, entry, machine, params, port};

entry!(main);
params!(1, 1, 0x80);

/// Added to an operation: do it at privilege level 0.
const LEVEL_0: u64 = 0x100;
const DONE: u16 = 0xF4;

// Each runs `rdi` times an operation on the port or address `rsi`, at either level.
core::arch::global_asm!(
    r#"
    .text
    .balign 64
exits_port_out:
    mov edx, esi
    mov eax, 0x55
1:  out dx, al
    dec rdi
    jnz 1b
    ret
    .balign 64
exits_port_in:
    mov edx, esi
1:  in al, dx
    dec rdi
    jnz 1b
    ret
    .balign 64
exits_mmio_write:
    mov eax, 0x55
1:  mov dword ptr [rsi], eax
    dec rdi
    jnz 1b
    ret
    .balign 64
exits_mmio_read:
1:  mov eax, dword ptr [rsi]
    dec rdi
    jnz 1b
    ret
    .balign 64
exits_string_out:
    mov edx, esi
    cld
1:  mov esi, 0x100000
    mov ecx, 64
    rep outsb
    dec rdi
    jnz 1b
    ret
    .balign 64
exits_nothing:
1:  dec rdi
    jnz 1b
    ret
    "#
);

type Operation = extern "C" fn(u64, u64, u64) -> u64;

unsafe extern "C" {
    safe fn exits_port_out(count: u64, at: u64, unused: u64) -> u64;
    safe fn exits_port_in(count: u64, at: u64, unused: u64) -> u64;
    safe fn exits_mmio_write(count: u64, at: u64, unused: u64) -> u64;
    safe fn exits_mmio_read(count: u64, at: u64, unused: u64) -> u64;
    safe fn exits_string_out(count: u64, at: u64, unused: u64) -> u64;
    safe fn exits_nothing(count: u64, at: u64, unused: u64) -> u64;
}

fn operation(mode: u64) -> Option<Operation> {
    Some(match mode & !LEVEL_0 {
        1 => exits_port_out,
        2 => exits_port_in,
        3 => exits_mmio_write,
        4 => exits_mmio_read,
        5 => exits_string_out,
        6 => exits_nothing,
        _ => return None,
    })
}

extern "C" fn main(_: u64) -> ! {
    loop {
        let (mode, count, at) = (params::get(0), params::get(1), params::get(2));
        if mode == 0 {
            machine::reset();
        }
        let Some(operation) = operation(mode) else {
            port::out8(DONE, 2);
            continue;
        };
        let start = cpu::tsc();
        if count == 0 {
            // Every operation is done at least once.
        } else if mode & LEVEL_0 == 0 {
            operation(count, at, 0);
        } else {
            // SAFETY: the operations are integer-only assembly without calls.
            unsafe { cpu::at_level_0(operation, count, at, 0) };
        }
        params::set(3, cpu::tsc().wrapping_sub(start));
        port::out8(DONE, 1);
    }
}
