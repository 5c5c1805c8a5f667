//! What this machine has: processor, memory map, ACPI tables, devices.

use core::cell::UnsafeCell;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::{cpu, machine, port, print, println};

use crate::report::Report;
use freestone_guest_program::virtio::Devices;

/// Text of up to 48 bytes out of registers, without zeros and outer blanks.
struct Text {
    bytes: [u8; 48],
    len: usize,
}

impl Text {
    fn new() -> Self {
        Self { bytes: [0; 48], len: 0 }
    }

    fn push(&mut self, registers: &[u32]) {
        for byte in registers.iter().flat_map(|register| register.to_le_bytes()).filter(|&byte| byte != 0) {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(self.bytes.get(..self.len).unwrap_or_default()).unwrap_or("?").trim()
    }
}

/// The hypervisor's signature leaf, where there is one.
fn hypervisor() -> Option<cpu::CpuidResult> {
    (cpu::cpuid(1).ecx & 1 << 31 != 0).then(|| cpu::cpuid(0x4000_0000))
}

/// Prints vendor, model, hypervisor and the number of processors.
pub fn processor(acpi: Option<&Acpi>, report: &Report) {
    let (mut vendor, mut brand, mut host) = (Text::new(), Text::new(), Text::new());
    let leaf = cpu::cpuid(0);
    vendor.push(&[leaf.ebx, leaf.edx, leaf.ecx]);
    if cpu::cpuid(0x8000_0000).eax >= 0x8000_0004 {
        for leaf in 0x8000_0002..=0x8000_0004 {
            let part = cpu::cpuid(leaf);
            brand.push(&[part.eax, part.ebx, part.ecx, part.edx]);
        }
    }
    if let Some(leaf) = hypervisor() {
        host.push(&[leaf.ebx, leaf.ecx, leaf.edx]);
    }
    print!("  cpu     {} ({})", brand.as_str(), vendor.as_str());
    let count = acpi.map_or(1, |acpi| acpi.processors().count());
    print!(", {count} processor{}", if count == 1 { "" } else { "s" });
    if let Some(khz) = report.tsc_khz() {
        print!(", TSC {}.{:03} MHz", khz / 1000, khz % 1000);
    }
    match host.as_str() {
        "" => println!(", no hypervisor signature"),
        host => println!(", under {host}"),
    }
}

/// Frequency of the time stamp counter: by kvm-clock, else by CPUID leaf 0x15.
pub fn tsc_khz() -> Option<u64> {
    let features = hypervisor().filter(|leaf| leaf.ebx == u32::from_le_bytes(*b"KVMK"));
    if features.is_some() && cpu::cpuid(0x4000_0001).eax & 1 << 3 != 0 {
        return kvm_clock_khz();
    }
    if cpu::cpuid(0).eax >= 0x15 {
        let leaf = cpu::cpuid(0x15);
        let khz = u64::from(leaf.ecx) * u64::from(leaf.ebx);
        return khz.checked_div(u64::from(leaf.eax) * 1000).filter(|&khz| khz != 0);
    }
    None
}

/// `pvclock_vcpu_time_info` as 32-bit words: 6 is the multiplier, the low byte of 7 the shift.
#[repr(C, align(64))]
struct ClockPage(UnsafeCell<[u32; 8]>);

// SAFETY: only this processor reads it; the host writes it while this processor is stopped.
unsafe impl Sync for ClockPage {}

static CLOCK: ClockPage = ClockPage(UnsafeCell::new([0; 8]));

fn kvm_clock_khz() -> Option<u64> {
    const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;
    let page = CLOCK.0.get();
    // SAFETY: CPUID says that the register exists; the host writes 32 bytes at the address, which are ours for good.
    unsafe { cpu::write_msr(MSR_KVM_SYSTEM_TIME_NEW, page.addr() as u64 | 1) };
    // SAFETY: reads of our own memory, volatile because the host has written it.
    let [.., multiplier, rest] = unsafe { page.cast::<[u32; 8]>().read_volatile() };
    // SAFETY: disables what was enabled.
    unsafe { cpu::write_msr(MSR_KVM_SYSTEM_TIME_NEW, 0) };
    let khz = (1_000_000u64 << 32).checked_div(u64::from(multiplier))?;
    // Nanoseconds are ticks << shift (or >> -shift), times multiplier, >> 32.
    Some(match rest as u8 as i8 {
        shift @ 0..=31 => khz >> shift,
        shift @ -31..0 => khz << -shift,
        _ => return None,
    })
}

/// Prints the memory map.
pub fn memory(info: Option<StartInfo>) {
    for range in info.into_iter().flat_map(StartInfo::memory).filter(|range| range.len > 0) {
        let kind = match range.kind {
            1 => "RAM",
            2 => "reserved",
            3 => "ACPI tables",
            4 => "ACPI NVS",
            5 => "unusable",
            7 => "persistent",
            _ => "other",
        };
        let end = range.start.wrapping_add(range.len);
        println!("  memory  {:#011x}..{end:#011x} {:>8} KiB {kind}", range.start, range.len / 1024);
    }
}

/// Prints the tables.
pub fn acpi(acpi: Option<&Acpi>) {
    let Some(acpi) = acpi else {
        println!("  acpi    no RSDP");
        return;
    };
    print!("  acpi    RSDP at {:#x}: {}", acpi.rsdp, acpi.root().name());
    for table in acpi.listed().chain(acpi.dsdt()) {
        print!(" {}", table.name());
    }
    match acpi.s5_sleep_type() {
        Some(value) => println!("; S5 by sleep type {value}"),
        None => println!("; no S5"),
    }
}

/// Prints the devices that can be found without touching them too hard.
pub fn devices(devices: &Devices) {
    println!("  device  serial port at 0x3f8");
    println!("  device  real-time clock at 0x70");
    let events = port::in8(machine::PVPANIC);
    if events != 0xFF && events & 1 != 0 {
        println!("  device  pvpanic at {:#x}, events {events:#x}", machine::PVPANIC);
    }
    for device in devices.iter() {
        println!("  device  {device}");
    }
    if devices.iter().count() == 0 {
        println!("  device  no virtio device, neither on the command line nor on PCI");
    }
}
