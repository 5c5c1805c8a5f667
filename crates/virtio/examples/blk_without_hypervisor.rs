//! A virtio disk with no hypervisor: a driver writes a message through the device, reads it back, and measures what a request
//! costs.
//!
//! `cargo run --release -p freestone-virtio --example blk_without_hypervisor`

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use freestone_block::{Image, RawOptions};
use freestone_bus::Device;
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::{BlkStats, Block, BlockConfig, DeviceStats, VirtioMmioPlug, features};

const IN: u32 = 0;
const OUT: u32 = 1;
/// Sectors of the disk.
const SECTORS: u64 = 1 << 15;
/// Where each of the requests in flight has its header, status and data.
const HEADERS: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const DEPTH: u16 = 32;

struct Disk {
    memory: GuestMem,
    machine: TestWiring,
    driver: MmioDriver,
    queue: DriverQueue,
    stats: Arc<BlkStats>,
    queues: DeviceStats,
    _device: Box<dyn Device>,
}

impl Disk {
    fn new(path: &std::path::Path, wanted: u64) -> Result<Self, Box<dyn Error>> {
        std::fs::File::create(path)?.set_len(SECTORS * 512)?;
        let block = Block::new(Arc::new(RawOptions::new().open(path)?), BlockConfig::new());
        let stats = block.stats();
        let memory = GuestMem::anonymous(4 << 20)?;
        let mut machine = TestWiring::new(memory.clone());
        let plug = VirtioMmioPlug::new(block, "disk0");
        let queues = plug.stats();
        let device = machine.plug(plug)?;
        let mut driver = MmioDriver::new(machine.mmio_device(0).ok_or("the device has no registers")?);
        driver.negotiate(wanted)?;
        let queue = driver.setup_queue(&memory, &mut Arena::new(0x1000, HEADERS), 0, 256)?;
        driver.driver_ok()?;
        queue.suppress_interrupts()?;
        Ok(Self { memory, machine, driver, queue, stats, queues, _device: device })
    }

    /// Offers request `slot`: 4 KiB from or to `sector`.
    fn offer(&mut self, slot: u16, kind: u32, sector: u64) -> Result<(), Box<dyn Error>> {
        let (header, data) = (HEADERS + 32 * u64::from(slot), DATA + 4096 * u64::from(slot));
        self.memory.view().write_obj(kind, GuestAddress(header))?;
        self.memory.view().write_obj(sector, GuestAddress(header + 8))?;
        let data = Buffer { gpa: data, len: 4096, writable: kind == IN };
        self.queue.add_chain(&[Buffer::readable(header, 16), data, Buffer::writable(header + 16, 1)])?;
        Ok(())
    }

    /// Lets the device do what was offered.
    fn go(&mut self) -> Result<(), Box<dyn Error>> {
        if self.queue.publish()? {
            self.driver.kick(0)?;
        }
        self.machine.run_work(1);
        while self.queue.used()?.is_some() {}
        Ok(())
    }
}

/// Nanoseconds of the same reads with no device.
fn floor(path: &std::path::Path, memory: &GuestMem, requests: u64) -> Result<u128, Box<dyn Error>> {
    let image = RawOptions::new().lock(false).open(path)?;
    let view = memory.view();
    let start = Instant::now();
    for n in 0..requests {
        let data = view.get_slice(GuestAddress(DATA + 4096 * (n % u64::from(DEPTH))), 4096)?;
        image.read_vectored_at(&[data], 512 * (n * 37 % (SECTORS - 8)))?;
    }
    Ok(start.elapsed().as_nanos() / u128::from(requests))
}

/// Writes a message and reads it back, then reads at random and says what that cost.
fn run(format: &str, wanted: u64) -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("disk.raw");
    let mut disk = Disk::new(&path, wanted)?;

    disk.memory.view().write_slice(b"freestone", GuestAddress(DATA))?;
    disk.offer(0, OUT, 8)?;
    disk.go()?;
    disk.offer(1, IN, 8)?;
    disk.go()?;
    let message: [u8; 9] = disk.memory.view().read_obj(GuestAddress(DATA + 4096))?;
    println!("{format} rings, read back: {:?}", String::from_utf8_lossy(&message));

    let rounds = 2000;
    let mut busy = std::time::Duration::ZERO;
    for round in 0..rounds {
        for slot in 0..DEPTH {
            disk.offer(slot, IN, (round * 37 + u64::from(slot) * 8) % (SECTORS - 8))?;
        }
        if disk.queue.publish()? {
            disk.driver.kick(0)?;
        }
        let start = Instant::now();
        disk.machine.run_work(1);
        busy += start.elapsed();
        while disk.queue.used()?.is_some() {}
    }
    let requests = rounds * u64::from(DEPTH);
    println!("{} ns per 4 KiB read, {DEPTH} at a time", busy.as_nanos() / u128::from(requests));
    println!("{} ns of them in the file", floor(&path, &disk.memory, requests)?);
    println!("{}\n{}", disk.stats.counts(), disk.queues);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    run("split", !features::RING_PACKED)?;
    run("packed", u64::MAX)
}
