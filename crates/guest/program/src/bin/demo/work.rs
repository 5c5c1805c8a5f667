//! Real work on memory, clock, serial port and timer.

use core::cell::UnsafeCell;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::{Range, StartInfo};
use freestone_guest_program::{apic, console, cpu, phys, port};

use crate::report::Report;

/// Checks the sums of all tables.
pub fn acpi(report: &mut Report, acpi: Option<&Acpi>) {
    let Some(acpi) = acpi else {
        report.check("acpi", format_args!("there is no RSDP"), false);
        return;
    };
    let tables = || core::iter::once(acpi.root()).chain(acpi.listed()).chain(acpi.dsdt());
    let wrong = tables().find(|table| !table.checksum_is_right());
    match wrong {
        Some(table) => {
            report.check("acpi", format_args!("checksum of {} at {:#x}", table.name(), table.at), false)
        }
        None => report.check(
            "acpi",
            format_args!("checksums of RSDP and {} tables", tables().count()),
            acpi.rsdp_is_right(),
        ),
    };
}

/// The scratch register keeps what is written, and the transmitter is ready.
pub fn serial(report: &mut Report) {
    let kept = [0x55, 0xAA, 0x00].iter().all(|&value| {
        port::out8(console::SCR, value);
        port::in8(console::SCR) == value
    });
    report.check(
        "serial",
        format_args!("scratch register, transmitter empty"),
        kept && port::in8(console::LSR) & 0x60 == 0x60,
    );
}

const PAGE: u64 = 4096;
const PAGES: usize = 16;
const WORDS: usize = PAGE as usize / 8;

struct Saved(UnsafeCell<[[u64; WORDS]; PAGES]>);

// SAFETY: only `memory_range` touches it, on the one processor that runs this.
unsafe impl Sync for Saved {}

static SAVED: Saved = Saved(UnsafeCell::new([[0; WORDS]; PAGES]));

/// Tests each range of RAM below 4 GiB and above the first MiB.
pub fn memory(report: &mut Report, info: Option<StartInfo>) {
    let image = phys::image();
    let first_free = image.end;
    for range in info.into_iter().flat_map(StartInfo::memory).filter(|range| range.kind == 1) {
        let start = range.start.max(first_free).next_multiple_of(PAGE);
        let end = range.start.saturating_add(range.len).min(phys::MAPPED) & !(PAGE - 1);
        if start < end {
            memory_range(report, Range { start, len: end - start, kind: 1 });
        }
    }
}

/// Writes every word of up to 16 pages, spread from the first to the last, with a value made of its address; reads all back; and
/// puts back what was there (a loader may have left something).
fn memory_range(report: &mut Report, range: Range) {
    let pages = range.len / PAGE;
    let count = pages.min(PAGES as u64);
    let last = count.saturating_sub(1).max(1);
    let page = |i: u64| range.start + (pages - 1) * i / last * PAGE;
    // SAFETY: this function is not re-entered and nothing else refers to the buffer.
    let saved = unsafe { &mut *SAVED.0.get() };
    for (i, save) in (0..count).zip(saved.iter_mut()) {
        for (at, word) in (page(i)..).step_by(8).zip(save.iter_mut()) {
            // SAFETY: the address is in RAM beyond the image, stack and zeroed memory, which end at `image_end`.
            *word = unsafe { phys::swap(at, pattern(at)) };
        }
    }
    // Measured from here on: the first touch is the host's work more than the memory's.
    let start = cpu::tsc();
    let wrong = (0..count)
        .flat_map(|i| (page(i)..page(i) + PAGE).step_by(8))
        .find(|&at| phys::read(at) != Some(pattern(at)));
    for (i, save) in (0..count).zip(saved.iter()) {
        for (at, word) in (page(i)..).step_by(8).zip(save.iter()) {
            // SAFETY: as above.
            unsafe { phys::write(at, *word) };
        }
    }
    let ticks = cpu::tsc().wrapping_sub(start);
    let end = range.start + range.len;
    match wrong {
        Some(at) => report.check("memory", format_args!("wrong value read at {at:#x}"), false),
        None => report.check(
            "memory",
            format_args!(
                "{count} pages spread over {:#x}..{end:#x} hold patterns{}",
                range.start,
                report.rate(2 * count * PAGE, ticks)
            ),
            true,
        ),
    };
}

fn pattern(at: u64) -> u64 {
    at.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17)
}

fn cmos(register: u8) -> u8 {
    port::out8(0x70, register);
    port::in8(0x71)
}

/// Reads date and time from the CMOS clock.
pub fn clock(report: &mut Report) {
    let mut before = None;
    // Equal twice in a row and no update in progress: not torn. An update takes 2 ms; many polls fit in that.
    for _ in 0..10_000 {
        if cmos(0x0A) & 0x80 != 0 {
            continue;
        }
        let now = [0x09, 0x08, 0x07, 0x04, 0x02, 0x00].map(cmos);
        if before == Some(now) {
            return date(report, now);
        }
        before = Some(now);
    }
    report.check("clock", format_args!("no two equal readings"), false);
}

fn date(report: &mut Report, raw: [u8; 6]) {
    let status = cmos(0x0B);
    let binary = status & 4 != 0;
    let [year, month, day, hour, minute, second] = raw;
    let number = |value: u8| if binary { value } else { (value >> 4) * 10 + (value & 15) };
    let mut hours = number(hour & 0x7F);
    if status & 2 == 0 {
        hours = hours % 12 + if hour & 0x80 != 0 { 12 } else { 0 };
    }
    let (year, month, day) = (number(year), number(month), number(day));
    let (minute, second) = (number(minute), number(second));
    let plausible = year <= 99
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hours < 24
        && minute < 60
        && second < 60;
    report.check(
        "clock",
        format_args!("20{year:02}-{month:02}-{day:02} {hours:02}:{minute:02}:{second:02}"),
        plausible,
    );
}

/// The local APIC's timer interrupts this program at level 3.
pub fn timer(report: &mut Report) {
    let start = cpu::tsc();
    apic::timer(0, 1000);
    let arrived = wait_for_interrupt(0, 0);
    let ticks = cpu::tsc().wrapping_sub(start);
    apic::watchdog();
    match report.microseconds(ticks) {
        Some(us) if arrived => report.check(
            "timer",
            format_args!("local APIC timer interrupt, set to 128 us, after {us} us"),
            true,
        ),
        _ => report.check("timer", format_args!("local APIC timer interrupt"), arrived),
    };
}

/// Waits until more than `seen` interrupts of `index` have arrived; false after a fraction of a second.
pub fn wait_for_interrupt(index: usize, seen: u64) -> bool {
    let start = cpu::tsc();
    while cpu::interrupts(index) <= seen {
        if cpu::tsc().wrapping_sub(start) > 1 << 29 {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}
