//! Checks of what only a function of PCI has: capabilities, base address registers, interrupt vectors, the window into the BARs.

use freestone_memory::layout::{LAPIC_ADDR, PCI_ECAM, PCI_MMIO_END, PCI_MMIO_START, RAM_ABOVE_HOLE};

use super::{Bench, MEMORY, Make, ensure, storm};
use crate::Result;
use crate::driver::{Arena, DriverTransport, PciPart, PciRegisters, common, features, status};
use crate::hostile::{Hostile, Source};

/// Length of configuration space.
const CONFIG_LEN: u16 = 4096;
/// There is no vector (4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;
const COMMAND: u16 = 0x04;

/// The function and its capabilities are what a modern driver needs: IDs, no interrupt line, registers that lie in their BARs, do
/// not overlap and are aligned, as many queues as it says.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn describes_itself(make: Make<'_>) -> Result<()> {
    let bench = Bench::pci(make())?;
    let pci = bench.driver.transport();
    let (revision, pin) = (pci.config_read(0x08, 1)?, pci.config_read(0x3d, 1)?);
    ensure(revision >= 1, "revision", "4.1.2.2", || format!("{revision}"))?;
    ensure(pin == 0, "interrupt pin", "4.1.5", || format!("{pin}: only vectors are tested here"))?;
    let mut parts = pci.parts();
    for part in &parts {
        let bar = pci.bars().get(usize::from(part.bar)).copied().flatten();
        let inside = bar.is_some_and(|(base, len)| base.is_multiple_of(len) && part.offset + part.len <= len);
        ensure(inside && part.len > 0, "registers in a BAR", "4.1.4", || format!("{part:x?} of {bar:x?}"))?;
    }
    parts.sort_by_key(|part| (part.bar, part.offset));
    let overlap = parts.windows(2).find(|pair| match pair {
        [one, other] => one.bar == other.bar && one.offset + one.len > other.offset,
        _ => false,
    });
    ensure(overlap.is_none(), "registers in a BAR", "4.1.4", || format!("{overlap:x?} overlap"))?;
    let common = pci.common();
    let good = common.offset.is_multiple_of(4) && common.len >= common::LEN;
    ensure(good, "common configuration", "4.1.4.3.1", || format!("{common:x?}"))?;
    let (said, found) = (pci.common_read(common::NUM_QUEUES, 2)?, bench.driver.queue_count()?);
    ensure(said == u32::from(found), "number of queues", "4.1.4.3", || format!("{said} and not {found}"))
}

/// Reads and writes of configuration space at any offset and width, with any value, do no harm.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn survives_function_accesses(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::pci(make())?;
    bench.start(u64::MAX)?;
    let mut source = Source::seed(5);
    let id = bench.driver.transport().config_read(0, 4)?;
    for value in [0, u32::MAX, source.next_u32()] {
        for offset in 0..CONFIG_LEN {
            let pci = bench.driver.transport();
            for width in [1, 2, 4].into_iter().filter(|width| usize::from(offset % 4) + width <= 4) {
                pci.config_read(offset, width)?;
                pci.config_write(offset, width, value)?;
            }
        }
        bench.settle()?;
    }
    for _ in 0..20_000 {
        let width = 1 << source.below(3);
        // Most registers are at the beginning.
        let end = if source.below(4) == 0 { CONFIG_LEN.into() } else { 0x100 };
        let offset = u16::try_from(source.below(end)).unwrap_or(0) & !(width - 1);
        bench.driver.transport().config_write(offset, width.into(), source.next_u32())?;
    }
    let now = bench.driver.transport().config_read(0, 4)?;
    ensure(now == id, "device ID", "4.1.2", || format!("{now:#x} and not {id:#x}"))?;
    bench.recovers()
}

/// The registers are where the guest put their BAR and nowhere else, as long as it may be there; over RAM, over other devices and
/// out of reach the BAR answers to nobody, and comes back.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn follows_its_bar(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::pci(make())?;
    bench.start(u64::MAX)?;
    let pci = bench.driver.transport().clone();
    let before = bench.driver.status()?;
    let ranges = pci.bus().ranges().len();
    let bar = pci.common().bar;
    let (home, len) = pci.bars().get(usize::from(bar)).copied().flatten().unwrap_or((0, 1));
    let answers = |base: u64| {
        let mut status = [0];
        let gpa = base.wrapping_add(pci.common().offset + common::DEVICE_STATUS);
        pci.bus().view().read(gpa, &mut status).is_ok() && u32::from(status[0]) == before
    };
    let good = [PCI_MMIO_END - len, PCI_MMIO_START + 64 * len, home];
    for (n, &base) in good.iter().cycle().take(999).enumerate() {
        pci.move_bar(bar, base)?;
        let alone = good.iter().filter(|base| answers(**base)).count() == 1;
        ensure(answers(base) && alone, "moved BAR", "4.1.4", || format!("move {n} to {base:#x}"))?;
    }
    let sizing = u64::from(u32::MAX);
    for base in
        [0, MEMORY / 2, PCI_MMIO_START - len, PCI_MMIO_END, PCI_ECAM, LAPIC_ADDR, RAM_ABOVE_HOLE, sizing]
    {
        pci.move_bar(bar, base)?;
        ensure(!answers(home) && !answers(base & !(len - 1)), "BAR out of place", "4.1.4", || {
            format!("{base:#x}")
        })?;
        pci.move_bar(bar, home)?;
        ensure(answers(home), "BAR that moved back", "4.1.4", || format!("from {base:#x}"))?;
    }
    for _ in 0..1000 {
        pci.config_write(COMMAND, 2, 0)?;
        pci.config_write(COMMAND, 2, 6)?;
    }
    pci.config_write(COMMAND, 2, 0)?;
    ensure(!answers(home), "BAR without decoding", "4.1.4", || "it answers".to_owned())?;
    pci.config_write(COMMAND, 2, 6)?;
    ensure(answers(home), "BAR with decoding", "4.1.4", || "it does not answer".to_owned())?;
    let now = pci.bus().ranges().len();
    ensure(now == ranges, "ranges on the bus", "4.1.4", || format!("{now} and not {ranges}"))?;
    bench.driver.kick(0)?;
    bench.settle()?;
    bench.recovers()
}

/// Reads and writes of the MSI-X table, its pending bits and its control at any offset and width do no harm.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn survives_vector_accesses(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::pci(make())?;
    bench.start(u64::MAX)?;
    let pci = bench.driver.transport().clone();
    let mut source = Source::seed(7);
    let ranges = pci.register_ranges();
    let Some((table, range)) = ranges.last() else { return Ok(()) };
    for (enabled, masked) in [(true, true), (false, false), (true, false)] {
        pci.set_msix(enabled, masked)?;
        storm(table, range.start, range.end);
        for _ in 0..2000 {
            let offset = source.below(range.end) & !3;
            // Refusing is as good as taking.
            let _refused = table.write(offset, &source.next_u32().to_le_bytes());
            pci.set_msix(source.below(4) != 0, source.below(4) == 0)?;
        }
        bench.settle()?;
    }
    bench.recovers()
}

/// Each event can be mapped to each vector, and to none; a vector that does not exist is none, and a reset forgets the mapping.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn maps_events_to_vectors(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::pci(make())?;
    let count = bench.driver.queue_count()?;
    let pci = bench.driver.transport().clone();
    let vectors = pci.vectors();
    let events: Vec<_> = (0..count).map(Some).chain([None]).collect();
    for &event in &events {
        let wanted = (0..vectors).chain([NO_VECTOR, vectors, NO_VECTOR - 1]);
        for vector in wanted {
            let expected = if vector < vectors { vector } else { NO_VECTOR };
            let got = pci.set_vector(event, vector)?;
            ensure(got == u32::from(expected), "vector", "4.1.5.1.2", || {
                format!("{vector:#x} for {event:?} reads as {got:#x}")
            })?;
        }
        pci.set_vector(event, 0)?;
    }
    bench.driver.reset()?;
    for register in [common::CONFIG_MSIX_VECTOR, common::QUEUE_MSIX_VECTOR] {
        let vector = pci.common_read(register, 2)?;
        ensure(vector == u32::from(NO_VECTOR), "vector after reset", "4.1.5.1.2", || format!("{vector:#x}"))?;
    }
    // An event of a queue that does not exist.
    let got = pci.set_vector(Some(count), 0)?;
    ensure(got == u32::from(NO_VECTOR), "vector of a missing queue", "4.1.5.1.2", || format!("{got:#x}"))?;
    bench.recovers()
}

/// An interrupt of a masked vector waits, and comes once when the vector, the function or MSI-X as a whole is opened.
///
/// The interrupt is that of a device that a broken queue made give up. A device that does not notice is not checked.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn delivers_what_waited_behind_a_mask(make: Make<'_>) -> Result<()> {
    type Close = fn(&PciRegisters, bool) -> Result<()>;
    let closings: [(&str, Close); 3] = [
        ("vector mask", |pci, closed| pci.mask_vector(0, closed)),
        ("function mask", |pci, closed| pci.set_msix(true, closed)),
        ("disabled MSI-X", |pci, closed| pci.set_msix(!closed, false)),
    ];
    let mut bench = Bench::pci(make())?;
    let pci = bench.driver.transport().clone();
    let message = pci.message(0);
    for (what, close) in closings {
        pci.restore()?;
        for index in 0..bench.driver.queue_count()? {
            let before = bench.wiring.msi_count(message);
            if !gives_up(&mut bench, index, |pci| close(pci, true))? {
                continue;
            }
            let seen = (pci.is_pending(0)?, bench.wiring.msi_count(message) - before);
            ensure(seen == (true, 0), what, "4.1.5", || format!("pending and delivered: {seen:?}"))?;
            close(&pci, false)?;
            let seen = (pci.is_pending(0)?, bench.wiring.msi_count(message) - before);
            ensure(seen == (false, 1), what, "4.1.5", || format!("opened, pending and delivered: {seen:?}"))?;
        }
    }
    bench.recovers()
}

/// Starts the device, calls `prepare`, and breaks queue `index`. Whether the device noticed.
fn gives_up(
    bench: &mut Bench<PciRegisters>,
    index: u16,
    prepare: impl FnOnce(&PciRegisters) -> Result<()>,
) -> Result<bool> {
    bench.arena = Arena::new(0x1_0000, MEMORY);
    let mut queues = bench.start(!features::RING_PACKED)?;
    bench.settle()?;
    prepare(bench.driver.transport())?;
    if let Some(queue) = queues.get_mut(usize::from(index)) {
        Hostile::AvailJump.apply(queue, &mut bench.arena, &mut Source::seed(1))?;
    }
    bench.driver.kick(index)?;
    bench.settle()?;
    Ok(bench.driver.status()? & status::NEEDS_RESET != 0)
}

/// The window into the BARs reads and writes what is there, refuses what it must not do, and survives any aim.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn opens_a_window(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::pci(make())?;
    let pci = bench.driver.transport().clone();
    let PciPart { bar, offset, .. } = pci.common();
    let at = |field: u64| u32::try_from(offset + field).unwrap_or(0);
    pci.set_status(0)?;
    pci.window_write(bar, at(common::DEVICE_STATUS), 1, status::ACKNOWLEDGE)?;
    let now = pci.status()?;
    ensure(now == status::ACKNOWLEDGE, "write by the window", "4.1.4.9", || format!("status {now:#x}"))?;
    let now = pci.window_read(bar, at(common::DEVICE_STATUS), 1)?;
    ensure(now == status::ACKNOWLEDGE, "read by the window", "4.1.4.9", || format!("status {now:#x}"))?;
    pci.common_write(common::QUEUE_SELECT, 2, 0x1234)?;
    let now = pci.window_read(bar, at(common::QUEUE_SELECT), 2)?;
    ensure(now == 0x1234, "read by the window", "4.1.4.9", || format!("queue_select {now:#x}"))?;
    // It works without decoding: that is what it is for.
    pci.config_write(COMMAND, 2, 0)?;
    let now = pci.window_read(bar, at(common::DEVICE_STATUS), 1)?;
    ensure(now == status::ACKNOWLEDGE, "read by the window without decoding", "4.1.4.9", || {
        format!("status {now:#x}")
    })?;
    pci.config_write(COMMAND, 2, 6)?;
    bench.start(u64::MAX)?;
    let mut source = Source::seed(13);
    for _ in 0..20_000 {
        let bar = if source.below(4) == 0 { source.next_u32().to_le_bytes()[0] } else { bar };
        let offset = if source.below(4) == 0 {
            source.next_u32()
        } else {
            u32::try_from(source.below(0x1_0000)).unwrap_or(0)
        };
        let width = if source.below(8) == 0 { source.next_u32() } else { 1 << source.below(3) };
        pci.window_write(bar, offset, width, source.next_u32())?;
        pci.window_read(bar, offset, width)?;
    }
    bench.settle()?;
    bench.recovers()
}
