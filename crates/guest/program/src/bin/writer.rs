//! Writes numbered blocks to a disk until it is killed, and says which are durable.
//!
//! The command line says where to begin, `first=N`. Write number `n` goes to block `mix(n)` modulo the blocks of 4 KiB that the disk
//! has, and fills it with words that `n` makes. After every fourth write and a flush, `durable n` is on COM1.
#![no_std]
#![no_main]

use core::cell::UnsafeCell;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::virtio::{BLOCK as DISK, Devices, Identity};
use freestone_guest_program::{entry, machine, println};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::Transport;

entry!(main);

const BLOCK: usize = 4096;
const SECTORS: usize = BLOCK / SECTOR_SIZE;
/// Writes between two flushes.
const BATCH: u64 = 4;

#[repr(C, align(4096))]
struct Buffer(UnsafeCell<[u8; BLOCK]>);

// SAFETY: only `main` takes it, once.
unsafe impl Sync for Buffer {}

static BUFFER: Buffer = Buffer(UnsafeCell::new([0; BLOCK]));

fn mix(n: u64) -> u64 {
    (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 17).wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 7
}

extern "C" fn main(start_info: u64) -> ! {
    let info = StartInfo::new(start_info);
    let acpi = Acpi::find(info);
    let words = info.map_or("", StartInfo::command_line).split_ascii_whitespace();
    let first = words.filter_map(|word| word.strip_prefix("first=")?.parse::<u64>().ok()).next();
    let devices = Devices::new(info, acpi.as_ref());
    let disks = devices.iter().filter(|device| device.id() == DISK);
    let transport = disks.filter_map(|device| device.transport().ok()).next();
    let Some(transport) = transport else {
        println!("writer: there is no disk");
        machine::fail();
    };
    match VirtIOBlk::<Identity, _>::new(transport) {
        // SAFETY: the only reference to the buffer; this function does not return.
        Ok(mut disk) => write(&mut disk, first.unwrap_or(1), unsafe { &mut *BUFFER.0.get() }),
        Err(error) => println!("writer: the driver does not start: {error}"),
    }
    machine::fail()
}

/// Writes until the disk fails.
fn write<T: Transport>(disk: &mut VirtIOBlk<Identity, T>, first: u64, buffer: &mut [u8; BLOCK]) {
    let blocks = disk.capacity() / SECTORS as u64;
    println!("writer: {blocks} blocks");
    for n in first.. {
        let block = mix(n) % blocks.max(1);
        for (word, i) in buffer.chunks_exact_mut(8).zip(0u64..) {
            word.copy_from_slice(&(n ^ i << 48).to_le_bytes());
        }
        if let Err(error) = disk.write_blocks(block as usize * SECTORS, buffer) {
            println!("writer: write {n} failed: {error}");
            return;
        }
        if n.is_multiple_of(BATCH) {
            if let Err(error) = disk.flush() {
                println!("writer: flush after {n} failed: {error}");
                return;
            }
            println!("durable {n}");
        }
    }
}
