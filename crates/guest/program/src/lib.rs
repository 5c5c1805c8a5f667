//! What the guest programs share: the way in ([`entry!`]), ports, console, boot information, ACPI tables and the way
//! out.
//!
//! A program is compiled Rust at privilege level 3. Level 0 is the few hundred bytes of `boot.s`.
#![no_std]

extern crate alloc;

pub mod acpi;
pub mod apic;
pub mod console;
pub mod cpu;
mod heap;
pub mod machine;
mod mem;
pub mod params;
pub mod pci;
pub mod phys;
pub mod port;
pub mod pvh;
pub mod registers;
pub mod ring;
pub mod smp;
pub mod virtio;

/// Makes `$main`, an `extern "C" fn(start_info: u64) -> !`, the program of this image.
///
/// It is called at privilege level 3 with interrupts off, a stack of 64 KiB and all of the first 4 GiB mapped, with the
/// guest-physical address of the PVH start info.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/boot.s")),
            main = sym $main
        );
    };
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    crate::println!("freestone guest: {info}");
    machine::fail()
}
