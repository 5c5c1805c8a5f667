//! The shortest guest: its first instructions after the PVH entry write one byte to COM1, and the next end the machine.
//!
//! Parameter block: word 0 is the port that powers off (0: reset by the keyboard controller), word 1 the byte to write
//! there, word 2 the byte to send first.
#![no_std]
#![no_main]

use freestone_guest_program as _;

freestone_guest_program::params!(0, 0, b'F' as u64);

core::arch::global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

    .section .boot.text, "awx", @progbits
    .code32
    .globl pvh_entry
pvh_entry:
    mov al, [0x100010]
    mov edx, 0x3F8
    out dx, al
    mov edx, [0x100000]
    test edx, edx
    jz 1f
    mov al, [0x100008]
    out dx, al
1:  mov al, 0xFE
    out 0x64, al
    lidt [start_no_idt]                 # still here: triple fault
    ud2
    .balign 8
start_no_idt:
    .quad 0
    .code64
    .text
    "#
);
