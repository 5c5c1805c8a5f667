# The part of every program that runs at privilege level 0: entered by PVH in 32-bit mode, it leaves for level 3 with
# all ports and the first 4 GiB open. Some hypervisors interpret level 0, slowly and without x87, SSE or popcnt, so all
# of this is plain integer code, and all tables are made by the assembler and the linker.

    .set BASE, 0x100000
    .set GATE_MAGIC, 0x46535430         # r10d of a call from level 3, see `boot_cpl0_call`

# ---- PVH entry -----------------------------------------------------------------------------------------------------

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot.text, "awx", @progbits
    .code32
    .globl pvh_entry
pvh_entry:
    mov edi, ebx                        # hvm_start_info, the first argument of main
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xC0000080                 # EFER
    mov eax, 0x100                      # LME
    xor edx, edx
    wrmsr
    mov eax, 0x80000033                 # PG, NE, ET, MP, PE
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    .byte 0xEA                          # far jump to the 64-bit segment
    .long boot_long_mode
    .word 0x08

    .code64
boot_long_mode:
    mov eax, 0x10
    mov ss, eax
    mov eax, 0x1B
    mov ds, eax
    mov es, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov eax, 0x28
    ltr ax
    lidt [boot_idt_pointer]
    mov esp, offset boot_kernel_stack_end
    push 0x1B                           # ss
    push offset boot_stack_end - 8      # rsp, as if main had been called
    push 0x02                           # rflags: interrupts off
    push 0x23                           # cs
    push offset {main}
    iretq

# ---- Exceptions and interrupts -------------------------------------------------------------------------------------

    .balign 16
boot_exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if ((0x60227D00 >> vector) & 1) == 0
    .byte 0x6A, 0                       # push 0 where the processor pushes no error code
    .endif
    .byte 0x6A, vector                  # push the vector
    jmp boot_exception
    .set vector, vector + 1
    .endr
    .balign 16
boot_interrupt_stubs:
    .set vector, 0
    .rept 16
    .balign 16
    .byte 0x6A, vector
    jmp boot_interrupt
    .set vector, vector + 1
    .endr

    .balign 16
# Stack: vector, error code, rip, cs, rflags, rsp, ss.
boot_exception:
    cmp dword ptr [rsp], 6
    jne 2f
    cmp r10d, GATE_MAGIC
    jne 2f
    test byte ptr [rsp + 24], 3
    jz 2f
    add rsp, 16
    add qword ptr [rsp], 2              # past the ud2
    call r11
    iretq
2:  cmp qword ptr [boot_exception_hook], 0
    je 3f
    jmp qword ptr [boot_exception_hook]
3:  mov rax, [rsp]
    mov edi, offset boot_report_vector
    mov ecx, 2
    call boot_hex
    mov rax, [rsp + 8]
    mov edi, offset boot_report_error
    mov ecx, 8
    call boot_hex
    mov rax, [rsp + 16]
    mov edi, offset boot_report_rip
    mov ecx, 16
    call boot_hex
    mov rax, cr2
    mov edi, offset boot_report_cr2
    mov ecx, 16
    call boot_hex
    mov esi, offset boot_report
    mov ecx, offset boot_report_length
boot_die_with:
    mov edx, 0x3F8
    cld
    rep outsb
    .globl boot_die
boot_die:
    mov edx, 0x505                      # pvpanic: the guest panicked
    mov eax, 1
    out dx, al
    .globl boot_reset
boot_reset:
    mov al, 0xFE                        # i8042: pulse the reset line
    out 0x64, al
    lidt [boot_no_idt]                  # nobody there: triple fault
    ud2

# Writes the last `ecx` hexadecimal digits of `rax` at `rdi`.
boot_hex:
    mov edx, eax
    and edx, 15
    mov dl, [rdx + boot_hex_digits]
    mov [rdi + rcx - 1], dl
    shr rax, 4
    dec ecx
    jnz boot_hex
    ret

# Stack: vector - 32, rip, cs, rflags, rsp, ss. Counts, tells the local APIC, and returns.
boot_interrupt:
    push rax
    mov eax, [rsp + 8]
    cmp eax, 15
    je 4f
    inc qword ptr [rax * 8 + boot_interrupt_counts]
    mov eax, 0xFEE000B0
    mov dword ptr [rax], 0
    pop rax
    add rsp, 8
    iretq
4:  mov esi, offset boot_timeout
    mov ecx, offset boot_timeout_length
    jmp boot_die_with

# u64 boot_cpl0_call(function, a, b, c): runs `function(a, b, c)` at privilege level 0 and returns its result.
# ud2 is the only way in that all hypervisors take: `int n` and SYSENTER do not arrive everywhere.
    .globl boot_cpl0_call
boot_cpl0_call:
    mov r11, rdi
    mov rdi, rsi
    mov rsi, rdx
    mov rdx, rcx
    mov r10d, GATE_MAGIC
    ud2
    xor r10d, r10d
    ret

# ---- Tables --------------------------------------------------------------------------------------------------------

    .section .boot.data, "awx", @progbits
    .balign 8
    .globl boot_exception_hook
boot_exception_hook:
    .quad 0
    .globl boot_interrupt_counts
boot_interrupt_counts:
    .fill 16, 8, 0
boot_no_idt:
    .quad 0, 0
boot_hex_digits:
    .ascii "0123456789abcdef"
boot_report:
    .ascii "\r\nfreestone guest: exception 0x"
boot_report_vector:
    .ascii "00 (error 0x"
boot_report_error:
    .ascii "00000000) at 0x"
boot_report_rip:
    .ascii "0000000000000000, cr2 0x"
boot_report_cr2:
    .ascii "0000000000000000\r\n"
    .set boot_report_length, . - boot_report
boot_timeout:
    .ascii "\r\nfreestone guest: timed out\r\n"
    .set boot_timeout_length, . - boot_timeout

    .balign 16
    .globl boot_gdt
boot_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF            # 0x08: 64-bit code, level 0
    .quad 0x00CF93000000FFFF            # 0x10: data, level 0
    .quad 0x00CFF3000000FFFF            # 0x18: data, level 3
    .quad 0x00AFFB000000FFFF            # 0x20: 64-bit code, level 3
    .word boot_tss_end - boot_tss - 1   # 0x28: task state
    .word boot_tss - BASE
    .byte BASE >> 16, 0x89, 0, 0
    .quad 0
    .quad 0x00CF9B000000FFFF            # 0x38: 32-bit code, level 0, for application processors
boot_gdt_end:
    .globl boot_gdt_pointer
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .quad boot_gdt
    .globl boot_idt_pointer
boot_idt_pointer:
    .word 48 * 16 - 1
    .quad boot_idt

    .balign 16
boot_idt:
    .set vector, 0
    .rept 48
    .word boot_exception_stubs + 16 * vector - BASE, 0x08
    .byte 0, 0x8E
    .word BASE >> 16
    .quad 0
    .set vector, vector + 1
    .endr

    .balign 16
boot_tss:
    .long 0
    .quad boot_kernel_stack_end, 0, 0   # rsp0, rsp1, rsp2
    .quad 0, 0, 0, 0, 0, 0, 0, 0        # reserved, ist1 to ist7
    .quad 0
    .word 0, 104                        # the I/O bitmap follows
    .fill 8192, 1, 0                    # every port is open to level 3
    .byte 0xFF
boot_tss_end:

    # Identity map of the first 4 GiB by 2 MiB pages, open to level 3; accessed and dirty are set so that nobody has to.
    .section .boot.tables, "awx", @progbits
    .balign 4096
    .globl boot_pml4
boot_pml4:
    .quad boot_pdpt + 0x27
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x27, boot_pd + 0x1027, boot_pd + 0x2027, boot_pd + 0x3027
    .fill 508, 8, 0
boot_pd:
    .set page, 0
    .rept 2048
    .quad page + 0xE7
    .set page, page + 0x200000
    .endr

    .section .boot.bss, "aw", @nobits
    .balign 16
    .skip 4096
boot_kernel_stack_end:
    .skip 65536
boot_stack_end:
    .text
