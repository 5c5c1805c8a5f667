//! Chains that look like requests of some device, in reproducible runs that can be disturbed: what the device has used in the end
//! must be the same with and without the disturbance.

use std::collections::BTreeMap;

use freestone_memory::{Bytes, GuestAddress};

use super::{Bench, MEMORY, Make, ensure};
use crate::driver::{Arena, Buffer, DriverQueue, DriverTransport, status};
use crate::hostile::Source;
use crate::{Error, Result};

/// Where arenas of the checks begin.
pub(super) const ARENA: u64 = 0x1_0000;
/// Times that chains are offered in a run, and chains of each queue at a time.
const ROUNDS: usize = 2;
const CHAINS: usize = 2;
/// Disturbances after each offer: after one turn of the device's work, after two more, after three more, and so on.
const STEPS: usize = 3;
/// Kicks at the end of a run.
const LAST_LOOKS: usize = 16;
/// Lengths of buffers. Some devices take nothing but whole records or sectors.
const LENGTHS: [u32; 8] = [1, 4, 8, 16, 40, 64, 512, 4096];

/// What the chains of a run look like. What one device answers is nonsense to another.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    /// A header, data, and a place for a status.
    Request,
    /// A request without data.
    Command,
    /// Nothing but buffers that the device reads.
    Readable,
    /// Nothing but buffers that the device writes.
    Writable,
    /// Anything.
    Mixed,
}

impl Shape {
    pub(super) const ALL: [Self; 5] =
        [Self::Request, Self::Command, Self::Readable, Self::Writable, Self::Mixed];

    /// Lengths of the buffers, and whether the device writes them.
    fn buffers(self, source: &mut Source<'_>) -> Vec<(u32, bool)> {
        let mut len = || {
            let n = usize::try_from(source.below(LENGTHS.len() as u64)).unwrap_or(0);
            LENGTHS.get(n).copied().unwrap_or(1)
        };
        match self {
            Self::Request => {
                let data = len().next_multiple_of(512);
                let is_read = len() > 16;
                vec![(16, false), (data, is_read), (1, true)]
            }
            Self::Command => vec![(24, false), (10, true)],
            Self::Readable => vec![(44, false), (len(), false)],
            Self::Writable => vec![(len(), true), (len(), true)],
            Self::Mixed => {
                let readable = source.below(3);
                let writable = source.below(3).max(u64::from(readable == 0));
                let mut len = || 1 + u32::try_from(source.below(0x800)).unwrap_or(0);
                let mut some = |n, writable| (0..n).map(|_| (len(), writable)).collect::<Vec<_>>();
                let mut all = some(readable, false);
                all.extend(some(writable, true));
                all
            }
        }
    }
}

/// Adds up to [`CHAINS`] chains to each queue and shows them to the device. Notes in `offered` how much the device may write.
pub(super) fn offer<T: DriverTransport>(
    bench: &mut Bench<T>,
    queues: &mut [DriverQueue],
    shape: Shape,
    source: &mut Source<'_>,
    offered: &mut [BTreeMap<u16, u64>],
) -> Result<()> {
    let memory = bench.memory();
    for (queue, offered) in queues.iter_mut().zip(offered) {
        for _ in 0..CHAINS {
            let mut buffers = Vec::new();
            for (len, writable) in shape.buffers(source) {
                let gpa = bench.arena.alloc(len.into(), 16)?;
                fill(&memory, gpa, len, source)?;
                buffers.push(Buffer { gpa, len, writable });
            }
            let writable = buffers.iter().filter(|b| b.writable).map(|b| u64::from(b.len)).sum();
            match queue.add_chain(&buffers) {
                Ok(head) => offered.insert(head, writable),
                // A small queue has no more than one or two at a time.
                Err(Error::Full { .. }) => break,
                Err(error) => return Err(error),
            };
        }
        queue.publish()?;
    }
    Ok(())
}

/// Arbitrary bytes, of which the first are often a small number: the kind of a request.
fn fill(memory: &freestone_memory::GuestMem, gpa: u64, len: u32, source: &mut Source<'_>) -> Result<()> {
    let mut bytes: Vec<u8> =
        (0..len.min(64).div_ceil(8)).flat_map(|_| source.next_u64().to_le_bytes()).collect();
    if source.below(4) != 0 {
        let kind = source.below(16).to_le_bytes();
        bytes.iter_mut().zip(kind).for_each(|(to, from)| *to = from);
    }
    bytes.truncate(usize::try_from(len).unwrap_or(0));
    let written = memory.view().write_slice(&bytes, GuestAddress(gpa));
    written.map_err(|source| Error::Memory { gpa, len: bytes.len(), source })
}

/// What came of a run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The device asks for a reset. What it has used until then depends on the order of its turns, and is not in `used`.
    faulted: bool,
    /// Chains that the device used, of each queue.
    used: Vec<Vec<u16>>,
}

impl Outcome {
    /// Whether the device used everything that it used in the other run.
    pub(super) fn has_all_of(&self, other: &Self) -> bool {
        let all = |(found, wanted): (&Vec<u16>, &Vec<u16>)| wanted.iter().all(|head| found.contains(head));
        self.faulted == other.faulted && self.used.iter().zip(&other.used).all(all)
    }
}

/// Does something to a device in the midst of a run.
pub(super) type Disturb<'a, T> = &'a mut dyn FnMut(&mut Bench<T>, &[DriverQueue]) -> Result<()>;

/// One run on a device that was reset.
pub(super) fn run_on<T: DriverTransport>(
    bench: &mut Bench<T>,
    wanted: u64,
    shape: Shape,
    disturb: Disturb<'_, T>,
) -> Result<Outcome> {
    bench.arena = Arena::new(ARENA, MEMORY);
    let mut source = Source::seed(shape as u64);
    let mut queues = bench.start(wanted)?;
    let mut offered = vec![BTreeMap::new(); queues.len()];
    for _ in 0..ROUNDS {
        offer(bench, &mut queues, shape, &mut source, &mut offered)?;
        kick_all(bench)?;
        for turns in 0..STEPS {
            bench.wiring.run_work(turns);
            disturb(bench, &queues)?;
        }
    }
    bench.settle()?;
    disturb(bench, &queues)?;
    // What is under way in the host is not seen by the work alone.
    for _ in 0..LAST_LOOKS {
        kick_all(bench)?;
        bench.settle()?;
    }
    outcome(bench, &mut queues, &offered)
}

fn outcome<T: DriverTransport>(
    bench: &Bench<T>,
    queues: &mut [DriverQueue],
    offered: &[BTreeMap<u16, u64>],
) -> Result<Outcome> {
    let faulted = bench.driver.status()? & status::NEEDS_RESET != 0;
    let mut all = Vec::new();
    for (queue, offered) in queues.iter_mut().zip(offered) {
        let mut used = Vec::new();
        // That each chain was offered and not used before is checked by the queue.
        while let Some(chain) = queue.used()? {
            let max = offered.get(&chain.head).copied().unwrap_or(0);
            ensure(u64::from(chain.len) <= max, "used length", "2.7.8.2", || {
                format!("{} bytes written to a chain with {max} that can be", chain.len)
            })?;
            used.push(chain.head);
        }
        used.sort_unstable();
        all.push(used);
    }
    Ok(Outcome { faulted, used: if faulted { Vec::new() } else { all } })
}

/// Every shape of chains with all ring formats: `fits` says whether what comes of a run with the disturbance is what comes of one
/// without.
pub(super) fn undisturbed_by<T: DriverTransport>(
    make: Make<'_>,
    what: &'static str,
    section: &'static str,
    fits: fn(&Outcome, &Outcome) -> bool,
    mut disturb: impl FnMut(&mut Bench<T>, &[DriverQueue]) -> Result<()>,
) -> Result<()> {
    for (set, wanted) in Bench::<T>::on(make())?.ring_features()?.into_iter().enumerate() {
        // With few features a device does nothing that it does not do with many.
        let shapes: &[_] = if set % 2 == 0 { &Shape::ALL } else { &[Shape::Request, Shape::Writable] };
        for &shape in shapes {
            let expected = run_on(&mut Bench::<T>::on(make())?, wanted, shape, &mut |_, _| Ok(()))?;
            let mut bench = Bench::<T>::on(make())?;
            let found = run_on(&mut bench, wanted, shape, &mut disturb)?;
            ensure(fits(&found, &expected), what, section, || {
                format!("{shape:?} with features {wanted:#x}: {found:?} and not {expected:?}")
            })?;
            bench.recovers()?;
        }
    }
    Ok(())
}

/// Kicks every queue once.
pub(super) fn kick_all<T: DriverTransport>(bench: &Bench<T>) -> Result<()> {
    (0..bench.driver.queue_count()?).try_for_each(|index| bench.driver.kick(index))
}

/// All memory that was handed out.
pub(super) fn snapshot<T: DriverTransport>(bench: &Bench<T>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(bench.arena.next()).unwrap_or(0)];
    let read = bench.memory().view().read_slice(&mut bytes, GuestAddress(0));
    read.map_err(|source| Error::Memory { gpa: 0, len: bytes.len(), source })?;
    Ok(bytes)
}

/// Kicks every queue and lets the device work: it must not touch memory.
pub(super) fn is_still<T: DriverTransport>(
    bench: &Bench<T>,
    when: &'static str,
    section: &'static str,
) -> Result<()> {
    let before = snapshot(bench)?;
    kick_all(bench)?;
    bench.settle()?;
    let after = snapshot(bench)?;
    // All at once: byte by byte takes longer than all the rest of a check.
    if before == after {
        return Ok(());
    }
    let changed = before.iter().zip(after).position(|(old, new)| *old != new);
    ensure(changed.is_none(), when, section, || {
        format!("the device writes to {:#x}", changed.unwrap_or_default())
    })
}
