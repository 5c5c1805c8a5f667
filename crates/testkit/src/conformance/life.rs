//! Checks of the ends of a device's work: reset at every point, pause and resume, queues that are taken away, with requests in
//! flight.

use std::collections::BTreeMap;

use super::traffic::{ARENA, Outcome, Shape, is_still, kick_all, offer, run_on, undisturbed_by};
use super::{Bench, MEMORY, Make, QUEUE_SIZE, ensure, lifecycle};
use crate::Result;
use crate::driver::{Arena, DriverQueue, DriverTransport, features, status};
use crate::hostile::Source;

/// Steps of [`bring_up`].
pub(super) const POINTS: usize = 14;

/// The first `steps` steps from a device after reset to one with requests half-way: its initialization (3.1.1), chains that are
/// offered before the device may look at them, kicks, and turns of its work.
fn bring_up<T: DriverTransport>(
    bench: &mut Bench<T>,
    wanted: u64,
    shape: Shape,
    steps: usize,
) -> Result<Vec<DriverQueue>> {
    bring_up_with(bench, wanted, shape, steps, &mut |_, _| Ok(()))
}

/// Does something to a device after so many steps.
pub(super) type Between<'a, T> = &'a mut dyn FnMut(&mut Bench<T>, usize) -> Result<()>;

/// As [`bring_up`], with something done before the first step and after each.
pub(super) fn bring_up_with<T: DriverTransport>(
    bench: &mut Bench<T>,
    wanted: u64,
    shape: Shape,
    steps: usize,
    between: Between<'_, T>,
) -> Result<Vec<DriverQueue>> {
    let mut source = Source::seed(steps as u64);
    let memory = bench.memory();
    let bits = bench.driver.device_features()? & (wanted | features::VERSION_1);
    let mut queues = Vec::new();
    let count = bench.driver.queue_count()?;
    let mut offered = vec![BTreeMap::new(); count.into()];
    for step in 0..steps {
        between(bench, step)?;
        match step {
            0 => bench.driver.add_status(status::ACKNOWLEDGE)?,
            1 => bench.driver.add_status(status::DRIVER)?,
            2 => bench.driver.set_driver_features(bits)?,
            3 => bench.driver.add_status(status::FEATURES_OK)?,
            4 => {
                for index in 0..count {
                    let max = bench.driver.queue_max(index)?;
                    let size = u16::try_from(max).unwrap_or(u16::MAX).min(QUEUE_SIZE);
                    let queue = DriverQueue::negotiated(&memory, &mut bench.arena, size, bits)?;
                    bench.driver.describe_queue(index, &queue)?;
                    queues.push(queue);
                }
            }
            5 => offer(bench, &mut queues, shape, &mut source, &mut offered)?,
            6 => (0..count).try_for_each(|index| bench.driver.transport().set_queue_live(index))?,
            7 | 10 => kick_all(bench)?,
            8 => bench.driver.driver_ok()?,
            9 => offer(bench, &mut queues, shape, &mut source, &mut offered)?,
            turns => drop(bench.wiring.run_work(turns - 10)),
        }
    }
    between(bench, steps)?;
    Ok(queues)
}

/// A reset after each step of the initialization, with chains offered before and after DRIVER_OK, between any two turns of the
/// device's work: the registers are as in the beginning, memory is not touched any more, and the next driver finds a device that
/// does what a fresh one does.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn resets_at_every_point<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    for wanted in Bench::<T>::on(make())?.ring_features()? {
        let mut expected = Vec::new();
        for shape in Shape::ALL {
            expected.push(run_on(&mut Bench::<T>::on(make())?, wanted, shape, &mut |_, _| Ok(()))?);
        }
        for shape in [Shape::Request, Shape::Readable, Shape::Writable] {
            let mut bench = Bench::<T>::on(make())?;
            for point in 0..=POINTS {
                bench.driver.reset()?;
                bench.arena = Arena::new(ARENA, MEMORY);
                bring_up(&mut bench, wanted, shape, point)?;
                bench.driver.reset()?;
                is_as_in_the_beginning(&bench)?;
                is_still(&bench, "memory after reset", "2.4.1")?;
                // One after the other: each takes its time.
                let next = Shape::ALL.into_iter().zip(&expected).cycle().nth(point);
                let Some((shape, expected)) = next else { continue };
                let found = run_on(&mut bench, wanted, shape, &mut |_, _| Ok(()))?;
                ensure(found == *expected, "work after a reset", "2.4.1", || {
                    format!("{shape:?} after a reset at point {point}: {found:?} and not {expected:?}")
                })?;
            }
        }
    }
    Ok(())
}

fn is_as_in_the_beginning<T: DriverTransport>(bench: &Bench<T>) -> Result<()> {
    let why = bench.driver.take_interrupt()?;
    ensure(why == 0, "interrupt status after reset", "4.2.2.1", || format!("{why:#x}"))?;
    for index in 0..bench.driver.queue_count()? {
        let live = bench.driver.transport().queue_is_live(index)?;
        ensure(!live, "queue after reset", "4.2.2.1", || format!("queue {index} is still live"))?;
    }
    Ok(())
}

/// Pause and resume between any two turns of the device's work, with requests in flight: a paused device does not touch memory, and
/// in the end every request was used that an undisturbed device uses, once.
///
/// # Errors
/// [`Error::Lifecycle`](crate::Error::Lifecycle) or [`Error::Protocol`](crate::Error::Protocol).
pub fn loses_nothing_when_paused<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    // A device may give back early what it holds, such as a place for something that has not come.
    let fits = Outcome::has_all_of;
    undisturbed_by::<T>(make, "requests in flight over a pause", "2.7", fits, |bench, _| {
        lifecycle(bench, "pause", |d| d.pause())?;
        is_still(bench, "memory of a paused device", "2.7")?;
        lifecycle(bench, "resume", |d| d.resume())
    })
}

/// A reset of a paused device: resuming it does not bring the former driver's queues back.
///
/// # Errors
/// [`Error::Lifecycle`](crate::Error::Lifecycle) or [`Error::Protocol`](crate::Error::Protocol).
pub fn resets_while_paused<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    for wanted in bench.ring_features()? {
        for point in 0..=POINTS {
            bench.driver.reset()?;
            bench.arena = Arena::new(ARENA, MEMORY);
            bring_up(&mut bench, wanted, Shape::Request, point)?;
            lifecycle(&mut bench, "pause", |d| d.pause())?;
            bench.driver.reset()?;
            is_as_in_the_beginning(&bench)?;
            is_still(&bench, "memory of a device reset while paused", "2.4.1")?;
            lifecycle(&mut bench, "resume", |d| d.resume())?;
            is_still(&bench, "memory of a device resumed after a reset", "2.4.1")?;
        }
    }
    bench.recovers()
}

/// Queues that the driver takes away, where the transport has that: before DRIVER_OK they can be enabled again elsewhere; with
/// requests in flight nothing of a queue that is not live is touched, and the others go on.
///
/// # Errors
/// [`Error::Protocol`](crate::Error::Protocol).
pub fn disables_queues<T: DriverTransport>(make: Make<'_>) -> Result<()> {
    let mut bench = Bench::<T>::on(make())?;
    for wanted in bench.ring_features()? {
        for turns in 0..3 {
            bench.driver.reset()?;
            bench.arena = Arena::new(ARENA, MEMORY);
            // Up to queues that are live, and not yet DRIVER_OK.
            bring_up(&mut bench, wanted, Shape::Request, 8)?;
            let bits = bench.driver.device_features()? & (wanted | features::VERSION_1);
            let mut queues = Vec::new();
            for index in 0..bench.driver.queue_count()? {
                let max = u16::try_from(bench.driver.queue_max(index)?).unwrap_or(u16::MAX);
                let memory = bench.memory();
                let queue = DriverQueue::negotiated(&memory, &mut bench.arena, max.min(QUEUE_SIZE), bits)?;
                bench.driver.transport().set_queue_dead(index)?;
                if !bench.driver.transport().queue_is_live(index)? {
                    bench.driver.enable_queue(index, &queue)?;
                }
                queues.push(queue);
            }
            bench.driver.driver_ok()?;
            let mut offered = vec![BTreeMap::new(); queues.len()];
            offer(&mut bench, &mut queues, Shape::Request, &mut Source::seed(turns), &mut offered)?;
            kick_all(&bench)?;
            bench.wiring.run_work(usize::try_from(turns).unwrap_or(0));
            for index in 0..bench.driver.queue_count()? {
                bench.driver.transport().set_queue_dead(index)?;
                bench.settle()?;
                // Not before a reset (4.2.2.2).
                let _refused = bench.driver.transport().set_queue_live(index);
            }
            let mut live = false;
            for index in 0..bench.driver.queue_count()? {
                live |= bench.driver.transport().queue_is_live(index)?;
            }
            if !live {
                offer(&mut bench, &mut queues, Shape::Writable, &mut Source::seed(turns), &mut offered)?;
                is_still(&bench, "memory of a device without live queues", "4.2.2.2")?;
            }
        }
    }
    bench.recovers()
}
