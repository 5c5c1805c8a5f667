//! Registers that count: general ones, SSE ones and the x87 stack hold numbers while a loop runs, and with them the control words, which
//! are not those of a fresh processor. Nothing of it is in memory until the end.

/// Words of the result.
const WORDS: usize = 64;
const GENERAL: usize = 14;
const SSE: usize = 16;
const SSE_AT: usize = 16;
const X87_AT: usize = 48;
const CONTROL_AT: usize = 56;
/// Flush-less, round up, all exceptions masked; and: truncate, extended precision, all exceptions masked.
const MXCSR: u32 = 0x5F80;
const X87_CONTROL: u16 = 0x0F7F;
/// What the last SSE register holds, and is added to the others.
const STEP: u64 = 0x1_0000_0001;

core::arch::global_asm!(
    r#"
    .globl life_lanes
life_lanes:                             # seed, rounds, result
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rdx
    sub rsp, 24
    stmxcsr [rsp]
    mov dword ptr [rsp + 4], {mxcsr}
    ldmxcsr [rsp + 4]
    fninit
    mov word ptr [rsp + 8], {x87_control}
    fldcw [rsp + 8]
    mov rax, rdi
    shr rax, 2
    mov [rsp + 8], rax
    .rept 7
    fild qword ptr [rsp + 8]
    inc qword ptr [rsp + 8]
    .endr
    mov rcx, rsi
    movabs rax, {step}
    movq xmm15, rax
    movq xmm0, rdi
    punpcklqdq xmm0, xmm0
    .irp pair, "1,xmm0", "2,xmm1", "3,xmm2", "4,xmm3", "5,xmm4", "6,xmm5", "7,xmm6", "8,xmm7", "9,xmm8", "10,xmm9", "11,xmm10", "12,xmm11", "13,xmm12", "14,xmm13"
    movdqa xmm\pair
    .endr
    paddq xmm1, xmm0
    paddq xmm2, xmm2
    paddq xmm3, xmm1
    lea rax, [rdi + 1]
    lea rbx, [rdi + 2]
    lea rbp, [rdi + 3]
    lea rsi, [rdi + 4]
    lea rdx, [rdi + 5]
    lea r8, [rdi + 6]
    lea r9, [rdi + 7]
    lea r10, [rdi + 8]
    lea r11, [rdi + 9]
    lea r12, [rdi + 10]
    lea r13, [rdi + 11]
    lea r14, [rdi + 12]
    lea r15, [rdi + 13]
    .balign 16
1:  add rax, 1
    add rbx, 2
    add rbp, 3
    add rsi, 4
    add rdx, 5
    add r8, 6
    add r9, 7
    add r10, 8
    add r11, 9
    add r12, 10
    add r13, 11
    add r14, 12
    add r15, 13
    .irp lane, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14
    paddq xmm\lane, xmm15
    .endr
    dec rcx
    jnz 1b
    xchg rax, [rsp + 24]                # the result's address
    mov [rax + 8], rbx
    mov [rax + 16], rbp
    mov [rax + 24], rsi
    mov [rax + 32], rdx
    mov [rax + 40], r8
    mov [rax + 48], r9
    mov [rax + 56], r10
    mov [rax + 64], r11
    mov [rax + 72], r12
    mov [rax + 80], r13
    mov [rax + 88], r14
    mov [rax + 96], r15
    mov [rax + 104], rdi
    mov rbx, [rsp + 24]
    mov [rax], rbx
    .irp lane, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movdqu [rax + 128 + 16 * \lane], xmm\lane
    .endr
    .irp slot, 6, 5, 4, 3, 2, 1, 0
    fistp qword ptr [rax + 384 + 8 * \slot]
    .endr
    stmxcsr [rax + 448]
    fnstcw [rax + 456]
    fninit
    ldmxcsr [rsp]
    add rsp, 32
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    "#,
    mxcsr = const MXCSR,
    x87_control = const X87_CONTROL,
    step = const STEP,
);

unsafe extern "C" {
    fn life_lanes(seed: u64, rounds: u64, result: *mut u64);
}

/// Has all registers count for `rounds` rounds; the name of the first that is wrong.
pub fn run(seed: u64, rounds: u64) -> Result<(), &'static str> {
    let rounds = rounds.max(1);
    let mut words = [0u64; WORDS];
    // SAFETY: it writes the 58 words that are named here, and leaves registers as the calling convention wants them.
    unsafe { life_lanes(seed, rounds, words.as_mut_ptr()) };
    let word = |at: usize| words.get(at).copied().unwrap_or(0);
    for n in 0..GENERAL - 1 {
        let step = n as u64 + 1;
        if word(n) != seed.wrapping_add(step).wrapping_add(step.wrapping_mul(rounds)) {
            return Err("general registers");
        }
    }
    if word(GENERAL - 1) != seed {
        return Err("general registers");
    }
    for n in 0..SSE - 1 {
        let start = match n {
            1 | 2 => seed.wrapping_mul(2),
            3 => seed.wrapping_mul(3),
            _ => seed,
        };
        let low = start.wrapping_add(STEP.wrapping_mul(rounds));
        if [word(SSE_AT + 2 * n), word(SSE_AT + 2 * n + 1)] != [low, start] {
            return Err("SSE registers");
        }
    }
    if [word(SSE_AT + 30), word(SSE_AT + 31)] != [STEP, 0] {
        return Err("SSE registers");
    }
    if (0..7).any(|n| word(X87_AT + n) != (seed >> 2) + n as u64) {
        return Err("x87 registers");
    }
    let control = [word(CONTROL_AT) as u32 & !0x3F, word(CONTROL_AT + 1) as u32];
    if control == [MXCSR, X87_CONTROL.into()] { Ok(()) } else { Err("control words of SSE or x87") }
}
