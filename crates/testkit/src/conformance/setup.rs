//! Checks of the order in which a driver does things, and of what it must not do to a device that works: the status out of order,
//! queues that change while they are live, kicks at any time, rings in the wrong place; and of the configuration space.

use std::collections::BTreeMap;

use freestone_memory::{Bytes, GuestAddress};

use super::traffic::{ARENA, Outcome, Shape, is_still, kick_all, offer, undisturbed_by};
use super::{Bench, MEMORY, Make, QUEUE_SIZE, ensure};
use crate::driver::{
    Arena, Buffer, DriverQueue, DriverTransport, QueuePart, desc_flags, features, packed_flags, status,
};
use crate::hostile::Source;
use crate::{Error, Result};

/// Where queues are moved to that must not move.
const DECOY: u64 = MEMORY - 0x2_0000;
const DECOY_LEN: usize = 0x2_0000;
/// Bytes of the configuration space that are looked at: more than any device has.
const CONFIG: usize = 0x120;
const PARTS: [QueuePart; 3] = [QueuePart::Descriptors, QueuePart::Driver, QueuePart::Device];

/// At every offset and width, reads agree with one another as long as the generation does not change: before and after writes at
/// every offset and width.
///
/// # Errors
/// [`Error::Protocol`].
pub fn reads_config_consistently<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    consistent(&bench)?;
    for wanted in bench.ring_features()? {
        bench.start(wanted)?;
        consistent(&bench)?;
        for value in [0, 0xff, 0x5a] {
            for offset in 0..CONFIG as u64 {
                for width in [1, 2, 4, 8] {
                    // Refusing is as good as taking.
                    let _refused = bench.driver.write_config(offset, &vec![value; width]);
                }
            }
            bench.settle()?;
            consistent(&bench)?;
        }
    }
    bench.recovers()
}

fn consistent<T: DriverTransport>(bench: &Bench<T>) -> Result<()> {
    let generation = bench.driver.transport().config_generation()?;
    // A device without configuration space may refuse every read.
    let read = |offset: usize, width: usize| {
        let mut data = vec![0; width];
        let read = bench.driver.read_config(offset as u64, &mut data);
        read.ok().map(|()| data)
    };
    let bytes: Vec<u8> = (0..CONFIG + 8).map(|at| read(at, 1).map_or(0, |data| data.iter().sum())).collect();
    for offset in 0..CONFIG {
        for width in [1, 2, 4, 8] {
            let (Some(data), Some(expected)) = (read(offset, width), bytes.get(offset..offset + width))
            else {
                continue;
            };
            let changed = bench.driver.transport().config_generation()? != generation;
            ensure(changed || data == expected, "configuration space", "2.5.1", || {
                format!("{width} bytes at {offset:#x} read as {data:x?}, one by one as {expected:x?}")
            })?;
        }
    }
    Ok(())
}

/// Before FEATURES_OK and DRIVER_OK, in whatever order the status is written, the device does not look at its queues: not when
/// chains are offered, nor when it is kicked. Then it finds what was offered before.
///
/// # Errors
/// [`Error::Protocol`].
pub fn waits_for_driver_ok<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
    let mut bench = Bench::<T>::on(make())?;
    let orders: &[&[u32]] = &[
        &[],
        &[ACKNOWLEDGE],
        &[DRIVER],
        &[DRIVER_OK],
        &[FEATURES_OK, DRIVER_OK],
        &[ACKNOWLEDGE, DRIVER_OK],
        &[ACKNOWLEDGE, DRIVER, DRIVER_OK],
        &[ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK],
        &[ACKNOWLEDGE | DRIVER | FEATURES_OK, FAILED, DRIVER_OK],
        &[FAILED, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK],
        &[0xff],
        &[0x30, ACKNOWLEDGE | DRIVER, status::NEEDS_RESET, DRIVER_OK],
    ];
    let all = bench.all_features()?;
    for bits in [all & !features::RING_PACKED, features::VERSION_1, 0, u64::MAX] {
        for order in orders {
            bench.driver.reset()?;
            bench.arena = Arena::new(ARENA, MEMORY);
            bench.driver.set_driver_features(bits)?;
            let mut queues = Vec::new();
            for index in 0..bench.driver.queue_count()? {
                let memory = bench.memory();
                let queue = bench.driver.setup_queue(&memory, &mut bench.arena, index, QUEUE_SIZE)?;
                queues.push(queue);
            }
            let mut offered = vec![BTreeMap::new(); queues.len()];
            offer(&mut bench, &mut queues, Shape::Request, &mut Source::seed(1), &mut offered)?;
            for &value in *order {
                bench.driver.transport().set_status(value)?;
                let ready = FEATURES_OK | DRIVER_OK;
                if bench.driver.status()? & ready != ready {
                    is_still(&bench, "memory before DRIVER_OK", "3.1.1")?;
                }
            }
            bench.settle()?;
            queues.iter_mut().try_for_each(|queue| while_some(|| queue.used()))?;
        }
    }
    bench.recovers()
}

fn while_some<R>(mut next: impl FnMut() -> Result<Option<R>>) -> Result<()> {
    while next()?.is_some() {}
    Ok(())
}

/// Registers of queues that are live: whatever is written there, the device goes on with the queues that it has.
///
/// # Errors
/// [`Error::Protocol`].
pub fn keeps_live_queues<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut source = Source::seed(3);
    undisturbed_by::<T>(make, "queue registers of a live queue", "4.2.2.2", Outcome::eq, |bench, queues| {
        let decoy = vec![0xa5; DECOY_LEN];
        write(bench, DECOY, &decoy)?;
        for (index, queue) in (0..).zip(queues) {
            let transport = bench.driver.transport();
            for part in PARTS {
                transport.set_queue_address(index, part, DECOY + source.below(0x100) * 16)?;
            }
            for size in [0, 1, 3, u32::from(queue.size() / 2), 0x8000, 0xffff] {
                transport.set_queue_size(index, size)?;
            }
            // A transport may say that it takes no vector now.
            let _refused = transport.set_queue_live(index);
            ensure(transport.queue_is_live(index)?, "live queue", "4.2.2.2", || {
                format!("queue {index} is not live any more")
            })?;
        }
        kick_all(bench)?;
        bench.wiring.run_work(1);
        let mut now = vec![0; DECOY_LEN];
        let read = bench.memory().view().read_slice(&mut now, GuestAddress(DECOY));
        read.map_err(|source| Error::Memory { gpa: DECOY, len: DECOY_LEN, source })?;
        ensure(now == decoy, "live queue", "4.2.2.2", || "the device follows it to another place".to_owned())
    })
}

fn write<T: DriverTransport>(bench: &Bench<T>, gpa: u64, data: &[u8]) -> Result<()> {
    let written = bench.memory().view().write_slice(data, GuestAddress(gpa));
    written.map_err(|source| Error::Memory { gpa, len: data.len(), source })
}

/// Status bits that are written again, and features that are written after FEATURES_OK, change nothing.
///
/// # Errors
/// [`Error::Protocol`].
pub fn is_activated_once<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    undisturbed_by::<T>(make, "second activation", "3.1.1", Outcome::eq, |bench, _| {
        let before = bench.driver.status()?;
        let negotiated = bench.driver.negotiated();
        for bits in [0, u64::MAX, negotiated ^ features::RING_PACKED, negotiated ^ features::EVENT_IDX] {
            bench.driver.set_driver_features(bits)?;
            bench.driver.add_status(status::FEATURES_OK)?;
            bench.driver.add_status(status::DRIVER_OK)?;
            bench.driver.transport().set_driver_features(2, u32::MAX)?;
        }
        let now = bench.driver.status()?;
        ensure(now == before, "status", "2.1", || format!("{now:#x} and not {before:#x}"))
    })
}

/// Kicks without end, of all queues and of those that do not exist, with and without requests: they are worth one, or nothing.
///
/// # Errors
/// [`Error::Protocol`].
pub fn survives_kick_storms<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    undisturbed_by::<T>(make, "kick storm", "2.7.13", Outcome::eq, |bench, queues| {
        let count = u16::try_from(queues.len()).unwrap_or(u16::MAX);
        for _ in 0..50 {
            kick_all(bench)?;
            for index in [count, count + 1, 0x7fff, u16::MAX] {
                // Refusing is as good as taking.
                let _refused = bench.driver.kick(index);
            }
        }
        bench.wiring.run_work(1);
        Ok(())
    })
}

/// Each part of a queue over each other part, at several distances, with chains in it: no harm is done.
///
/// # Errors
/// [`Error::Protocol`].
pub fn survives_overlapping_rings<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    for wanted in bench.ring_features()? {
        for (moved, over) in PARTS.iter().flat_map(|moved| PARTS.map(|over| (*moved, over))) {
            for distance in [0, 4, 16, 0x40, 0xfc] {
                let at = |queue: &DriverQueue| match over {
                    QueuePart::Descriptors => queue.desc_addr(),
                    QueuePart::Driver => queue.avail_addr(),
                    QueuePart::Device => queue.used_addr(),
                };
                misplaced(&mut bench, wanted, moved, |queue| at(queue) + distance)?;
            }
        }
    }
    bench.recovers()
}

/// Queues and buffers over the registers of devices, the device's own among them: nothing happens to the registers.
///
/// # Errors
/// [`Error::Protocol`].
pub fn survives_addresses_of_registers<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    let ranges = bench.wiring.mmio_bus().ranges();
    let places: Vec<u64> = ranges.iter().flat_map(|(first, _)| [*first, first + 0x10]).collect();
    for wanted in bench.ring_features()? {
        for &gpa in &places {
            for part in PARTS {
                misplaced(&mut bench, wanted, part, |_| gpa)?;
            }
            over_registers(&mut bench, wanted, gpa)?;
        }
    }
    bench.recovers()
}

/// Starts the device with one part of every queue elsewhere, and offers chains.
fn misplaced<T: DriverTransport>(
    bench: &mut Bench<T>,
    wanted: u64,
    part: QueuePart,
    place: impl Fn(&DriverQueue) -> u64,
) -> Result<()> {
    bench.arena = Arena::new(ARENA, MEMORY);
    let bits = bench.driver.negotiate(wanted)?;
    let mut queues = Vec::new();
    for index in 0..bench.driver.queue_count()? {
        let max = u16::try_from(bench.driver.queue_max(index)?).unwrap_or(u16::MAX);
        let memory = bench.memory();
        let queue = DriverQueue::negotiated(&memory, &mut bench.arena, max.min(QUEUE_SIZE), bits)?;
        bench.driver.describe_queue(index, &queue)?;
        bench.driver.transport().set_queue_address(index, part, place(&queue))?;
        bench.driver.transport().set_queue_live(index)?;
        queues.push(queue);
    }
    // The device may refuse here, or say later that it needs a reset.
    let _status = bench.driver.add_status(status::DRIVER_OK);
    let mut offered = vec![BTreeMap::new(); queues.len()];
    for seed in 0..3 {
        let shape = if seed == 1 { Shape::Writable } else { Shape::Request };
        // The driver may find its own ring broken.
        let _broken = offer(bench, &mut queues, shape, &mut Source::seed(seed), &mut offered);
        kick_all(bench)?;
        bench.settle()?;
    }
    Ok(())
}

/// Offers chains whose buffers, and whose indirect table, are over registers at `gpa`.
fn over_registers<T: DriverTransport>(bench: &mut Bench<T>, wanted: u64, gpa: u64) -> Result<()> {
    bench.arena = Arena::new(ARENA, MEMORY);
    let mut queues = bench.start(wanted)?;
    bench.settle()?;
    let before = bench.driver.status()?;
    for round in 0..3 {
        for queue in &mut queues {
            match round {
                0 => drop(queue.add_chain(&[Buffer::writable(gpa, 64)])),
                1 => drop(queue.add_chain(&[Buffer::readable(gpa, 64), Buffer::writable(gpa, 64)])),
                _ => {
                    let whose = if queue.is_packed() { packed_flags::AVAIL } else { 0 };
                    let flags = desc_flags::INDIRECT | whose;
                    queue.set_desc(0, crate::driver::Desc { addr: gpa, len: 32, flags, next: 0 })?;
                    if !queue.is_packed() {
                        queue.offer_raw(0)?;
                    }
                }
            }
            queue.publish()?;
        }
        kick_all(bench)?;
        bench.settle()?;
        let now = bench.driver.status()? & !status::NEEDS_RESET;
        ensure(now == before & !status::NEEDS_RESET, "registers as buffers", "2.7", || {
            format!("the status was {before:#x} and is {now:#x}")
        })?;
    }
    Ok(())
}
