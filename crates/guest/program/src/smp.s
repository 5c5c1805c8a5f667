# The way of an application processor: real mode at the trampoline's copy, protected mode there, long mode in the image.
# At level 0 it stays with plain integer code. The first one to come leaves for level 3 if the program has work for it.

    .section .boot.text, "awx", @progbits
    .code16
    .globl smp_trampoline
smp_trampoline:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0F, 0x01, 0x16        # lgdt, 32-bit base
    .word smp_boot_gdt_pointer - smp_trampoline
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA                    # far jump, 32-bit offset
    .long 0x10000 + smp_protected - smp_trampoline
    .word 0x38
    .balign 4
smp_boot_gdt_pointer:
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
    xor edi, edi
    xchg rdi, qword ptr [{work}]
    test rdi, rdi
    jz 1f
    lgdt [{second} + {gdt_pointer}]
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
    mov esp, offset {second} + {kernel_stack_end}
    push 0x1B                           # ss
    push offset {second} + {stack_end}  # rsp, as if the function had been called
    push 0x02                           # rflags: interrupts off
    push 0x23                           # cs
    push rdi
    iretq
1:  cli
    hlt
    jmp 1b
    .text
