//! Starting the application processors, of which one can be given work at privilege level 3.
//!
//! A program that uses this names [`crate::application_processors!`] once.

use core::cell::UnsafeCell;
use core::fmt;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::{apic, cpu};

/// Where the trampoline goes: page aligned, below 1 MiB, and above what loaders put at the bottom of memory.
const TRAMPOLINE: usize = 0x1_0000;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;
/// Index of the task state's descriptor in the table of segments.
const TASK_STATE: usize = 5;
const IO_BITMAP: usize = 104;

/// By local APIC id: the processor has come up.
pub static UP: [AtomicU8; 256] = [const { AtomicU8::new(0) }; 256];
/// Application processors that have come up.
pub static COUNT: AtomicU32 = AtomicU32::new(0);
/// Address of the function for the first processor that comes up, or 0.
pub static WORK: AtomicU64 = AtomicU64::new(0);

/// What a processor at level 3 has of its own.
#[repr(C, align(4096))]
pub struct Own {
    gdt: [u64; 8],
    gdt_pointer: [u16; 8],
    task_state: [u8; IO_BITMAP + 8192 + 8],
    kernel_stack: [u8; 4096],
    stack: [u8; 16384],
}

/// Offsets that the way up needs.
pub const GDT_POINTER: usize = offset_of!(Own, gdt_pointer);
/// As above: the end of the stack of level 0.
pub const KERNEL_STACK_END: usize = offset_of!(Own, kernel_stack) + 4096;
/// As above: the end of the stack of level 3, less the return address that a function expects.
pub const STACK_END: usize = offset_of!(Own, stack) + 16384 - 8;

/// The only one.
pub struct Second(UnsafeCell<Own>);

// SAFETY: written by `prepare` before the processor that uses it is started; after that it is that processor's.
unsafe impl Sync for Second {}

impl fmt::Debug for Second {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Second")
    }
}

/// Tables and stacks of the processor that is given work.
pub static SECOND: Second = Second(UnsafeCell::new(Own {
    gdt: [0; 8],
    gdt_pointer: [0; 8],
    task_state: [0; IO_BITMAP + 8192 + 8],
    kernel_stack: [0; 4096],
    stack: [0; 16384],
}));

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Own")
    }
}

/// The way up of application processors, as part of this image.
#[macro_export]
macro_rules! application_processors {
    () => {
        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/smp.s")),
            up = sym $crate::smp::UP,
            count = sym $crate::smp::COUNT,
            work = sym $crate::smp::WORK,
            second = sym $crate::smp::SECOND,
            gdt_pointer = const $crate::smp::GDT_POINTER,
            kernel_stack_end = const $crate::smp::KERNEL_STACK_END,
            stack_end = const $crate::smp::STACK_END,
        );
    };
}

fn send(id: u32, command: u32) {
    apic::local(0x310).write(id << 24);
    apic::local(0x300).write(command);
}

fn wait(ticks: u64, done: impl Fn() -> bool) -> bool {
    let start = cpu::tsc();
    while !done() {
        if cpu::tsc().wrapping_sub(start) > ticks {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Whether the processor with this local APIC id has come up.
pub fn is_up(id: u32) -> bool {
    UP.get(id as usize).is_some_and(|up| up.load(Ordering::SeqCst) != 0)
}

/// Starts a processor by INIT and SIPI; whether it came up. The local APIC has to be on, and [`place_trampoline`] to be done.
pub fn start(id: u32) -> bool {
    send(id, INIT);
    wait(1 << 18, || false);
    send(id, STARTUP);
    // The architecture asks for a second one if the first is lost.
    if !wait(1 << 26, || is_up(id)) {
        send(id, STARTUP);
        wait(1 << 30, || is_up(id));
    }
    is_up(id)
}

/// Copies the way up to where a processor begins in real mode.
pub fn place_trampoline() {
    unsafe extern "C" {
        static smp_trampoline: u8;
        static smp_trampoline_end: u8;
    }
    let (start, end) = (&raw const smp_trampoline, &raw const smp_trampoline_end);
    let to = core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE);
    // SAFETY: the source is the trampoline; the destination is RAM that nobody uses once the tables have been read.
    unsafe { to.copy_from_nonoverlapping(start, end.addr() - start.addr()) };
}

/// Has the next processor that is started run `work` at level 3, with interrupts off and a stack of 16 KiB.
///
/// # Safety
///
/// Called once, before any processor is started; `work` shares nothing with this processor but what is made for that.
pub unsafe fn give_work(work: extern "C" fn() -> !) {
    unsafe extern "C" {
        static boot_gdt: [u64; 8];
    }
    let own = SECOND.0.get();
    // SAFETY: nobody else knows of it yet.
    let own = unsafe { &mut *own };
    // SAFETY: the assembler made eight entries, and only a busy bit of them ever changes.
    own.gdt = unsafe { (&raw const boot_gdt).read() };
    let base = own.task_state.as_ptr().expose_provenance() as u64;
    let limit = (IO_BITMAP + 8192) as u64;
    if let Some(entry) = own.gdt.get_mut(TASK_STATE) {
        *entry = limit | (base & 0xFF_FFFF) << 16 | 0x89 << 40 | (base >> 24 & 0xFF) << 56;
    }
    let stack = own.kernel_stack.as_ptr_range().end.expose_provenance() as u64;
    let fields: [(usize, &[u8]); 2] = [(4, &stack.to_le_bytes()), (102, &(IO_BITMAP as u16).to_le_bytes())];
    for (at, bytes) in fields {
        if let Some(to) = own.task_state.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }
    if let Some(end) = own.task_state.get_mut(IO_BITMAP + 8192) {
        *end = 0xFF;
    }
    let gdt = own.gdt.as_ptr().expose_provenance() as u64;
    own.gdt_pointer = [63, gdt as u16, (gdt >> 16) as u16, 0, 0, 0, 0, 0];
    WORK.store(work as *const () as u64, Ordering::SeqCst);
}
