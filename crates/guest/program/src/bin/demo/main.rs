//! The built-in guest of the reference VMM: says what it found, does real work on each part, and powers off with a summary.
#![no_std]
#![no_main]

mod disk;
mod found;
mod report;
mod virtio;
mod work;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::virtio::Devices;
use freestone_guest_program::{apic, console, cpu, entry, machine, println};

use report::Report;

entry!(main);

extern "C" fn main(start_info: u64) -> ! {
    let start = cpu::tsc();
    println!("Freestone built-in guest: 64-bit Rust at privilege level 3, no operating system.");
    apic::enable();
    apic::watchdog();

    let info = StartInfo::new(start_info);
    let acpi = Acpi::find(info);
    let mut report = Report::new(found::tsc_khz());
    println!("Found:");
    found::processor(acpi.as_ref(), &report);
    found::memory(info);
    found::acpi(acpi.as_ref());
    let devices = Devices::new(info, acpi.as_ref());
    found::devices(&devices);

    println!("Work:");
    report.check("boot", format_args!("entered by PVH with a start info"), info.is_some());
    work::acpi(&mut report, acpi.as_ref());
    work::serial(&mut report);
    work::memory(&mut report, info);
    work::clock(&mut report);
    work::timer(&mut report);
    for (index, device) in devices.iter().enumerate() {
        apic::watchdog();
        virtio::work(&mut report, index, &device);
    }
    apic::stop_timer();

    let elapsed = report.microseconds(cpu::tsc().wrapping_sub(start));
    if let Some(us) = elapsed {
        println!("That took {}.{:03} ms.", us / 1000, us % 1000);
    }
    println!("freestone guest: {} checks passed, {} failed", report.passed(), report.failed());
    console::flush();
    if report.failed() == 0 { machine::power_off(acpi.as_ref()) } else { machine::fail() }
}
