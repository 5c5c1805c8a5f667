//! Answers each line typed on COM1 with the same line, until one is `quit`. Interrupts are off: it polls.
#![no_std]
#![no_main]

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::{console, entry, machine, println};

entry!(main);

extern "C" fn main(start_info: u64) -> ! {
    let acpi = Acpi::find(StartInfo::new(start_info));
    println!("echo: type, end with quit");
    let mut line = [0u8; 200];
    let mut len = 0;
    loop {
        let Some(byte) = console::read() else {
            core::hint::spin_loop();
            continue;
        };
        if byte != b'\r' && byte != b'\n' {
            if let Some(slot) = line.get_mut(len) {
                *slot = byte;
                len += 1;
            }
            continue;
        }
        let text = core::str::from_utf8(line.get(..len).unwrap_or_default()).unwrap_or("(not UTF-8)");
        if text == "quit" {
            println!("echo: bye");
            machine::power_off(acpi.as_ref());
        }
        if len > 0 {
            println!("echo: {text}");
        }
        len = 0;
    }
}
