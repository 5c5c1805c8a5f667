//! A guest without a hypervisor gives memory to a balloon and is given memory by a memory device.

use std::error::Error;

use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::{Balloon, BalloonConfig, Mem, MemConfig, VirtioMmioPlug};

const MIB: u64 = 1 << 20;
/// Where the guest writes its requests, and finds the answers.
const REQUEST: u64 = 2 * MIB;
const ANSWER: u64 = 3 * MIB;

fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMem::anonymous(64 * MIB)?;
    let mut machine = TestWiring::new(memory.clone());

    let balloon = Balloon::new(BalloonConfig::new().target(8 * MIB))?;
    let balloon_handle = balloon.handle();
    let mem = Mem::new(&MemConfig::new(1024 * MIB))?;
    let mem_handle = mem.handle();
    let _balloon = machine.plug(VirtioMmioPlug::new(balloon, "balloon0"))?;
    let _mem = machine.plug(VirtioMmioPlug::new(mem, "mem0"))?;

    // The balloon wants 8 MiB. The guest has written to all of its memory, and gives the last 8 MiB.
    let mut arena = Arena::new(MIB, REQUEST);
    let (driver, mut queue) = start(&machine, &memory, &mut arena, 0)?;
    memory.view().write_slice(&vec![1; 56 << 20], GuestAddress(8 * MIB))?;
    let pages: Vec<u8> = (56 * 256..64 * 256).flat_map(u32::to_le_bytes).collect();
    for part in pages.chunks(1024) {
        memory.view().write_slice(part, GuestAddress(REQUEST))?;
        send(&machine, &driver, &mut queue, &[Buffer::readable(REQUEST, u32::try_from(part.len())?)])?;
    }
    println!("balloon: wanted {} MiB", balloon_handle.target() / MIB);
    println!("balloon: {} MiB went back to the host", balloon_handle.counts().inflated / MIB);

    // The host offers 64 MiB. The guest plugs the first 32 blocks of 2 MiB.
    let (driver, mut queue) = start(&machine, &memory, &mut arena, 1)?;
    mem_handle.request(64 * MIB)?;
    let base = driver.config_u64(16)?;
    let mut request = [0; 24];
    for (to, from) in request.iter_mut().skip(8).zip(base.to_le_bytes().into_iter().chain([32, 0])) {
        *to = from;
    }
    memory.view().write_slice(&request, GuestAddress(REQUEST))?;
    let buffers = [Buffer::readable(REQUEST, 24), Buffer::writable(ANSWER, 10)];
    send(&machine, &driver, &mut queue, &buffers)?;
    println!("mem: answer {}", memory.view().read_obj::<u16>(GuestAddress(ANSWER))?);
    println!("mem: {} MiB plugged at {base:#x}", mem_handle.plugged() / MIB);
    memory.view().write_obj(42u64, GuestAddress(base + 64 * MIB - 8))?;
    Ok(())
}

/// Starts the driver of the machine's `n`th device.
fn start(
    machine: &TestWiring,
    memory: &GuestMem,
    arena: &mut Arena,
    n: usize,
) -> Result<(MmioDriver, DriverQueue), Box<dyn Error>> {
    let mut driver = MmioDriver::new(machine.mmio_device(n).ok_or("no registers")?);
    driver.negotiate(u64::MAX)?;
    let queue = driver.setup_queue(memory, arena, 0, 16)?;
    driver.driver_ok()?;
    Ok((driver, queue))
}

/// Sends one request and waits for it.
fn send(
    machine: &TestWiring,
    driver: &MmioDriver,
    queue: &mut DriverQueue,
    buffers: &[Buffer],
) -> Result<(), Box<dyn Error>> {
    queue.add_chain(buffers)?;
    queue.publish()?;
    driver.kick(0)?;
    machine.run_work(100);
    queue.used()?.ok_or("no answer")?;
    Ok(())
}
