//! Starts the application processors of the ACPI MADT and counts them.
#![no_std]
#![no_main]

use core::sync::atomic::Ordering;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::{apic, application_processors, entry, machine, print, println, smp};

entry!(main);
application_processors!();

extern "C" fn main(start_info: u64) -> ! {
    let acpi = Acpi::find(StartInfo::new(start_info));
    let own = apic::id();
    if let Some(slot) = smp::UP.get(own as usize) {
        slot.store(1, Ordering::SeqCst);
    }
    let mut ids = [0; 255];
    let mut total = 0;
    for (slot, id) in ids.iter_mut().zip(acpi.iter().flat_map(Acpi::processors)) {
        *slot = id;
        total += 1;
    }
    smp::place_trampoline();
    apic::enable();
    for &id in ids.iter().take(total).filter(|&&id| id != own && id < 255) {
        smp::start(id);
    }
    let up = ids.iter().take(total).filter(|&&id| smp::is_up(id)).count();
    print!("smp: {up} of {total} cpus up (apic ids");
    for id in (0..256).filter(|&id| smp::is_up(id)) {
        print!(" {id}");
    }
    println!(")");
    let extra = smp::COUNT.load(Ordering::SeqCst) as usize + 1 != up;
    if up == 0 || up != total || extra { machine::fail() } else { machine::power_off(acpi.as_ref()) }
}
