//! The contract of [`PROBE`](crate::PROBE).
//!
//! The program checks, one step after the other, what an operating system kernel needs and what a hypervisor that
//! interprets level 0 does not have: SYSCALL that arrives at level 0, then popcnt, x87, xgetbv, cmpxchg16b and SSE at level 0, each only if
//! CPUID promises it. It prints a line on COM1, writes [`YES`] or [`NO`] to [`DONE_PORT`](crate::DONE_PORT), and resets. It has no loops.
//!
//! `KVM_RUN` may also end in an internal error. Then the answer is no as well, and word [`STEP`] of the parameter block says at which
//! step; [`step_name`] names it.

/// Written to [`DONE_PORT`](crate::DONE_PORT): a kernel can run here.
pub const YES: u8 = 1;
/// Written to [`DONE_PORT`](crate::DONE_PORT): it cannot.
pub const NO: u8 = 2;
/// Word of the parameter block: the step under way.
pub const STEP: usize = 0;
/// Word of the parameter block: [`YES`] or [`NO`], or 0 if the program did not come to an end.
pub const RESULT: usize = 1;

/// What a step tries.
pub const fn step_name(step: u64) -> &'static str {
    match step {
        0 => "reaching 64-bit code",
        1 => "SYSCALL from privilege level 3 to 0",
        2 => "popcnt at privilege level 0",
        3 => "x87 at privilege level 0",
        4 => "xgetbv at privilege level 0",
        5 => "cmpxchg16b at privilege level 0",
        6 => "SSE2 at privilege level 0",
        _ => "an unknown step",
    }
}
