//! Work on a disk through the `virtio-drivers` crate.

use core::cell::UnsafeCell;

use freestone_guest_program::cpu;
use freestone_guest_program::virtio::{Device, Identity, Interrupt};
use virtio_drivers::Result;
use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::SomeTransport;

use crate::report::Report;
use crate::work::wait_for_interrupt;

type Disk<'a> = VirtIOBlk<Identity, SomeTransport<'a>>;

/// The built-in disk: see `demo` of the crate that embeds this program.
const BUILT_IN_SECTORS: u64 = 2047;
const BUILT_IN_ID: &[u8] = b"freestone-demo";

const CHUNK: usize = 128 * SECTOR_SIZE;

struct Buffer(UnsafeCell<[u8; CHUNK]>);

// SAFETY: only `work` takes it, once at a time, on the one processor that runs this.
unsafe impl Sync for Buffer {}

static BUFFER: Buffer = Buffer(UnsafeCell::new([0; CHUNK]));

fn word(index: u64) -> u64 {
    index.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5851_F42D_4C95_7F2D
}

/// Reads the disk; checks it and writes to it if it is the built-in one.
pub fn work(report: &mut Report, index: usize, device: &Device, transport: SomeTransport<'_>) {
    // Indices 1 to 13 are free for devices.
    let line = 1 + index as u32 % 13;
    let mut disk = match Disk::new(transport) {
        Ok(disk) => disk,
        Err(error) => {
            report.check("disk", format_args!("driver does not start: {error}"), false);
            return;
        }
    };
    // A queue is given its vector when it is set up, and that is now.
    let routed = match device.interrupt(line) {
        Some(Interrupt::Line) => true,
        Some(Interrupt::Message(vectors)) => vectors.set(),
        None => false,
    };
    // SAFETY: `work` is not re-entered, and the driver is done with the buffer when a request returns.
    let buffer = unsafe { &mut *BUFFER.0.get() };
    if let Err(error) = all(report, &mut disk, routed.then_some(line as usize), buffer) {
        report.check("disk", format_args!("request failed: {error}"), false);
    }
}

fn all(
    report: &mut Report,
    disk: &mut Disk<'_>,
    line: Option<usize>,
    buffer: &mut [u8; CHUNK],
) -> Result<()> {
    let mut id = [0; 20];
    let len = disk.device_id(&mut id)?;
    let id = id.get(..len).unwrap_or_default();
    let capacity = disk.capacity();
    let access = if disk.readonly() { "read-only" } else { "writable" };
    report.check(
        "disk",
        format_args!("id {:?}, {capacity} sectors, {access}", core::str::from_utf8(id).unwrap_or("?")),
        capacity > 0,
    );
    if let Some(line) = line {
        let arrived = read_by_interrupt(disk, line, buffer)?;
        disk.ack_interrupt();
        report.check("disk", format_args!("interrupt on completion"), arrived);
    }
    // From here on completions are polled for, which is quicker.
    disk.disable_interrupts();

    let built_in = capacity == BUILT_IN_SECTORS || id == BUILT_IN_ID;
    let sectors = capacity.min(BUILT_IN_SECTORS);
    let right = read(report, disk, sectors, built_in, buffer)?;
    if built_in && right && !disk.readonly() {
        write(report, disk, sectors, buffer)?;
    }
    disk.ack_interrupt();
    Ok(())
}

/// Reads the first sector and waits for its interrupt before it looks at the queue; returns whether one came.
///
/// A driver that polls takes a completion before the device asks whether it wants an interrupt for it, and then it wants none.
fn read_by_interrupt(disk: &mut Disk<'_>, line: usize, buffer: &mut [u8; CHUNK]) -> Result<bool> {
    let (sector, _) = buffer.split_at_mut(SECTOR_SIZE);
    let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
    let seen = cpu::interrupts(line);
    // SAFETY: request, buffer and response are not touched until the request is completed below; no way leads out before
    // that, for a device that never answers is ended by the watchdog.
    let token = unsafe { disk.read_blocks_nb(0, &mut request, sector, &mut response)? };
    let arrived = wait_for_interrupt(line, seen);
    while disk.peek_used() != Some(token) {
        core::hint::spin_loop();
    }
    // SAFETY: these are what the request was made with.
    unsafe { disk.complete_read_blocks(token, &request, sector, &mut response)? };
    Ok(arrived)
}

/// Reads the first `sectors`; returns whether they are what they should be.
fn read(
    report: &mut Report,
    disk: &mut Disk<'_>,
    sectors: u64,
    built_in: bool,
    buffer: &mut [u8; CHUNK],
) -> Result<bool> {
    let mut wrong = None;
    let mut ticks = 0;
    for first in (0..sectors).step_by(CHUNK / SECTOR_SIZE) {
        let len = (sectors - first).min((CHUNK / SECTOR_SIZE) as u64) as usize * SECTOR_SIZE;
        let Some(part) = buffer.get_mut(..len) else { break };
        part.fill(0xEE);
        let start = cpu::tsc();
        disk.read_blocks(first as usize, part)?;
        ticks += cpu::tsc().wrapping_sub(start);
        if built_in && wrong.is_none() {
            let bad = part
                .chunks_exact(8)
                .zip(first * 64..)
                .find(|(bytes, index)| **bytes != word(*index).to_le_bytes());
            wrong = bad.map(|(_, index)| index / 64);
        }
    }
    let bytes = sectors * SECTOR_SIZE as u64;
    let rate = report.rate(bytes, ticks);
    Ok(match wrong {
        Some(sector) => {
            report.check("disk", format_args!("sector {sector} is not what was put there"), false)
        }
        None if built_in => {
            report.check("disk", format_args!("{} KiB read, every word is right{rate}", bytes / 1024), true)
        }
        None => report.check(
            "disk",
            format_args!("{} KiB read (not the built-in disk){rate}", bytes / 1024),
            true,
        ),
    })
}

/// Writes the last sector, flushes, reads it back and restores it.
fn write(report: &mut Report, disk: &mut Disk<'_>, sectors: u64, buffer: &mut [u8; CHUNK]) -> Result<()> {
    let last = sectors.saturating_sub(1) as usize;
    let (old, rest) = buffer.split_at_mut(SECTOR_SIZE);
    let (new, rest) = rest.split_at_mut(SECTOR_SIZE);
    let (back, _) = rest.split_at_mut(SECTOR_SIZE);
    disk.read_blocks(last, old)?;
    for (to, from) in new.iter_mut().zip(old.iter()) {
        *to = !from;
    }
    disk.write_blocks(last, new)?;
    disk.flush()?;
    disk.read_blocks(last, back)?;
    let written = back == new;
    disk.write_blocks(last, old)?;
    disk.flush()?;
    disk.read_blocks(last, back)?;
    report.check(
        "disk",
        format_args!("sector {last} written, flushed, read back, restored"),
        written && back == old,
    );
    Ok(())
}
