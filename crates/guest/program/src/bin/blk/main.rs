//! Reads and writes blocks of a virtio disk at random, as fast as the device answers: the guest of the disk bench.
//!
//! It polls, and takes no interrupts. The host writes a command into the parameter block whenever the program writes to port
//! 0xF4; what the words mean is told in `freestone_guest::blk`. Each command begins with a reset of the device.
#![no_std]
#![no_main]

mod memory;
mod packed;
mod split;

use core::hint::spin_loop;

use freestone_guest_program::acpi::Acpi;
use freestone_guest_program::pvh::StartInfo;
use freestone_guest_program::registers::Device;
use freestone_guest_program::virtio::BLOCK as BLOCK_DEVICE;
use freestone_guest_program::{cpu, entry, machine, params, port};

use memory::{BLOCK, MAX_DEPTH, MAX_QUEUES, Slots};
use packed::Packed;
use split::Split;

entry!(main);
params!(0);

/// Features that the driver knows.
mod feature {
    pub const MULTI_QUEUE: u64 = 1 << 12;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Offsets in the configuration of a block device: capacity in sectors, number of queues.
const CAPACITY: u64 = 0;
const NUM_QUEUES: u64 = 34;

/// Words of the parameter block that the host writes.
mod command {
    pub const OPERATION: u64 = 0;
    pub const COUNT: u64 = 1;
    pub const DEPTH: u64 = 2;
    pub const QUEUES: u64 = 3;
    pub const SEED: u64 = 4;
    pub const FEATURES: u64 = 5;
}

/// Words that this program writes.
mod result {
    pub const TICKS: u64 = 8;
    pub const KICKS: u64 = 9;
    pub const WRONG: u64 = 10;
    pub const BLOCKS: u64 = 11;
    pub const TRANSPORT: u64 = 12;
    pub const FEATURES: u64 = 13;
}

const DONE: u16 = 0xF4;
/// Time stamp counter's ticks, some seconds, after which a device that answers nothing is given up.
const PATIENCE: u64 = 30_000_000_000;

/// Why a command was not done; the value is what is written to the port.
#[derive(Clone, Copy)]
enum Failure {
    Unknown = 2,
    NoDevice = 3,
    Refused = 4,
    Silent = 5,
}

#[derive(Clone, Copy, PartialEq)]
enum Operation {
    Verify,
    Read,
    Write,
}

extern "C" fn main(info: u64) -> ! {
    let info = StartInfo::new(info);
    let acpi = Acpi::find(info);
    let device = Device::find(BLOCK_DEVICE, info, acpi.as_ref());
    let mut status = 1;
    loop {
        // The host changes the block before this returns.
        port::out8(DONE, status);
        let operation = match params::get(command::OPERATION) {
            0 => machine::reset(),
            1 => Ok(Operation::Verify),
            2 => Ok(Operation::Read),
            3 => Ok(Operation::Write),
            _ => Err(Failure::Unknown),
        };
        let device = device.as_ref().ok_or(Failure::NoDevice);
        let done = operation.and_then(|operation| work(device?, operation));
        status = done.map_or_else(|failure| failure as u8, |()| 1);
    }
}

/// Brings the device up, works with it, and leaves what came of it in the parameter block.
fn work(device: &Device, operation: Operation) -> Result<(), Failure> {
    let depth = (params::get(command::DEPTH) as usize).clamp(1, MAX_DEPTH);
    let wanted = (params::get(command::QUEUES) as usize).clamp(1, MAX_QUEUES);
    let features = device.begin(params::get(command::FEATURES)).ok_or(Failure::Refused)?;
    params::set(result::FEATURES, features);
    params::set(result::TRANSPORT, device.transport());
    let sectors =
        u64::from(device.config::<u32>(CAPACITY + 4)) << 32 | u64::from(device.config::<u32>(CAPACITY));
    let blocks = sectors / (BLOCK as u64 / 512);
    params::set(result::BLOCKS, blocks);
    if blocks == 0 || wanted > queues(device, features) {
        return Err(Failure::Refused);
    }
    let plan = Plan {
        operation,
        count: params::get(command::COUNT),
        blocks,
        random: params::get(command::SEED) | 1,
        begun: 0,
    };
    let slots = |queue| Slots::new(queue, depth, operation == Operation::Write);
    if features & feature::RING_PACKED != 0 {
        let mut queues = [Packed::new(slots(0), device, features), Packed::new(slots(1), device, features)];
        finish(device, queues.get_mut(..wanted).unwrap_or_default(), plan)
    } else {
        let mut queues = [Split::new(slots(0), device, features), Split::new(slots(1), device, features)];
        finish(device, queues.get_mut(..wanted).unwrap_or_default(), plan)
    }
}

/// How many queues the device has.
fn queues(device: &Device, features: u64) -> usize {
    if features & feature::MULTI_QUEUE == 0 { 1 } else { device.config::<u16>(NUM_QUEUES).into() }
}

/// A queue of either format.
trait Queue {
    /// The requests' memory.
    fn slots(&mut self) -> &mut Slots;
    /// Tells the device where the queue is.
    fn enable(&mut self) -> Option<()>;
    /// Puts the request of `slot` into the ring.
    fn submit(&mut self, slot: usize);
    /// Shows what was submitted to the device, and kicks it if it asks for that.
    fn publish(&mut self);
    /// A request that the device is done with.
    fn take(&mut self) -> Option<usize>;
    /// How often the device was kicked.
    fn kicks(&self) -> u64;
}

/// Which blocks are still to be asked for.
struct Plan {
    operation: Operation,
    count: u64,
    blocks: u64,
    random: u64,
    begun: u64,
}

impl Plan {
    /// The next block: at random, but one after the other for a verification.
    fn next(&mut self) -> Option<u64> {
        if self.begun == self.count {
            return None;
        }
        self.begun += 1;
        if self.operation == Operation::Verify {
            return Some((self.begun - 1) % self.blocks);
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        Some(((u128::from(self.random) * u128::from(self.blocks)) >> 64) as u64)
    }
}

fn finish<Q: Queue>(device: &Device, queues: &mut [Q], mut plan: Plan) -> Result<(), Failure> {
    for queue in &mut *queues {
        queue.enable().ok_or(Failure::Refused)?;
    }
    device.go();
    let start = cpu::tsc();
    let done = carry_out(queues, &mut plan);
    params::set(result::TICKS, cpu::tsc().wrapping_sub(start));
    params::set(result::KICKS, queues.iter().map(Queue::kicks).sum());
    // Nothing writes to our memory after this.
    device.reset();
    params::set(result::WRONG, done?);
    Ok(())
}

/// Keeps every slot of every queue busy until all is done; returns how many requests failed or brought wrong data.
fn carry_out<Q: Queue>(queues: &mut [Q], plan: &mut Plan) -> Result<u64, Failure> {
    let (mut done, mut wrong) = (0, 0);
    for queue in &mut *queues {
        for slot in 0..queue.slots().depth() {
            let Some(block) = plan.next() else { break };
            queue.slots().prepare(slot, block);
            queue.submit(slot);
        }
        queue.publish();
    }
    let mut heard = cpu::tsc();
    while done < plan.count {
        let before = done;
        for queue in &mut *queues {
            let first = done;
            while let Some(slot) = queue.take() {
                done += 1;
                wrong += u64::from(!queue.slots().succeeded(slot));
                if plan.operation == Operation::Verify {
                    wrong += u64::from(!queue.slots().is_as_expected(slot));
                }
                if let Some(block) = plan.next() {
                    queue.slots().prepare(slot, block);
                    queue.submit(slot);
                }
            }
            if done != first {
                queue.publish();
            }
        }
        if done != before {
            heard = 0;
        } else if heard == 0 {
            heard = cpu::tsc();
        } else if cpu::tsc().wrapping_sub(heard) > PATIENCE {
            return Err(Failure::Silent);
        } else {
            spin_loop();
        }
    }
    Ok(wrong)
}
