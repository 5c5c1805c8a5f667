//! [`PairWorker`]: moves frames between a pair of queues and an endpoint of the port.
//!
//! Frames stay where they are: the endpoint takes them out of the guest's memory and puts them there. A step gives turns to both
//! directions, until neither has anything or its budget is spent.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use freestone_bus::{Irq, Progress, Source, Work};
use freestone_memory::GuestMem;
use freestone_net::{Endpoint, Offloads};

use super::receive::{Held, Outlet};
use super::stats::PairStats;
use super::transmit::Intake;
use super::{RxFilter, Shared, feature};
use crate::device::{ActiveQueue, Worker};
use crate::queue::{AttachedQueue, ChainBuffers, SpareBuffers};
use crate::rate::Gate;
use crate::worker::{Batch, Batched, Poller, complete};
use crate::{DeviceControl, Result};

/// Most frames of one direction before the other has its turn.
pub(super) const BURST: u16 = 64;

/// A pair of queues, of which a driver may have enabled one alone.
#[derive(Debug)]
pub(super) struct Queues {
    pub rx: Option<ActiveQueue>,
    pub tx: Option<ActiveQueue>,
}

/// Serves one pair of queues.
#[derive(Debug)]
pub(super) struct PairWorker {
    mem: GuestMem,
    control: DeviceControl,
    queues: Queues,
    io: Io,
    poller: Poller,
    batch: Batch,
    /// Allocations for the chain that was taken last, and for the room for a frame.
    spare: (SpareBuffers, SpareBuffers),
    held: VecDeque<Held>,
}

/// All that is not the queues.
#[derive(Debug)]
pub(super) struct Io {
    pub shared: Arc<Shared>,
    /// Number of the pair.
    pub index: u16,
    pub endpoint: Box<dyn Endpoint>,
    /// What the driver may leave undone.
    pub transmit: Offloads,
    /// The driver takes frames in several buffers.
    pub mergeable: bool,
    /// A copy of the driver's filter, and which it is.
    pub filter: RxFilter,
    pub filter_generation: u64,
    pub rx_gate: Option<Gate>,
    pub tx_gate: Option<Gate>,
    /// Since when a frame waits for more room than there is.
    pub starving: Option<Instant>,
}

impl Io {
    /// The counters of this pair. There are such for each.
    pub(super) fn count(&self, count: impl FnOnce(&PairStats)) {
        if let Some(stats) = self.shared.stats.pairs.get(usize::from(self.index)) {
            count(stats);
        }
    }

    pub(super) fn link_is_up(&self) -> bool {
        self.shared.link.load(Ordering::Acquire)
    }

    /// Whether the driver looks at this pair for frames.
    pub(super) fn is_active(&self) -> bool {
        self.index < self.shared.active_pairs.load(Ordering::Acquire)
    }

    /// Looks whether the driver changed its filter. Where it did not, that is one load.
    pub(super) fn refresh_filter(&mut self) {
        let generation = self.shared.filter_generation.load(Ordering::Acquire);
        if generation != self.filter_generation {
            self.filter.clone_from(&self.shared.filter());
            self.filter_generation = generation;
        }
    }
}

impl PairWorker {
    pub(super) fn new(
        (mem, control): (GuestMem, DeviceControl),
        queues: Queues,
        (index, features): (u16, u64),
        shared: Arc<Shared>,
        endpoint: Box<dyn Endpoint>,
        (rx_gate, tx_gate): (Option<Gate>, Option<Gate>),
    ) -> Self {
        // In this order: what changes in between is looked at once more.
        let filter_generation = shared.filter_generation.load(Ordering::Acquire);
        let filter = shared.filter().clone();
        let poller = Poller::new(shared.config.poll);
        let io = Io {
            shared,
            index,
            endpoint,
            transmit: feature::transmit(features),
            mergeable: features & feature::MRG_RXBUF != 0,
            filter,
            filter_generation,
            rx_gate,
            tx_gate,
            starving: None,
        };
        let (spare, held) = Default::default();
        Self { mem, control, queues, io, poller, batch: Batch::new(), spare, held }
    }

    fn step(&mut self) -> Result<Progress> {
        let Self { mem, queues, io, poller, batch, spare, held, .. } = self;
        let view = mem.view();
        let (mut rx, mut tx) = (None, None);
        for (queue, side) in [(&mut queues.rx, &mut rx), (&mut queues.tx, &mut tx)] {
            if let Some(ActiveQueue { queue, irq, .. }) = queue {
                *side = Some(Side { queue: queue.attach(&view)?, irq });
            }
        }
        io.endpoint.flush();
        batch.begin_step();
        let budget = [&rx, &tx].into_iter().flatten().map(|side| side.queue.size()).max().unwrap_or(BURST);
        let (buffers, room) = (spare.0.take(), spare.1.take());
        let mut turn = Turn { rx, tx, io, batch, budget, buffers, room, held };
        let result = turn.run(poller);
        turn.put_back();
        *spare = (turn.buffers.into_spare(), turn.room.into_spare());
        result
    }
}

/// A queue that is being worked on.
pub(super) struct Side<'a, 'q, 'm> {
    pub queue: AttachedQueue<'q, 'm>,
    pub irq: &'a Irq,
}

/// What a step works with.
pub(super) struct Turn<'a, 'q, 'm> {
    pub rx: Option<Side<'a, 'q, 'm>>,
    pub tx: Option<Side<'a, 'q, 'm>>,
    pub io: &'a mut Io,
    pub batch: &'a mut Batch,
    /// Frames that may still be moved.
    pub budget: u16,
    /// The chain that was taken last.
    pub buffers: ChainBuffers<'m>,
    /// Room for a frame: the buffers of the chains in `held`.
    pub room: ChainBuffers<'m>,
    pub held: &'a mut VecDeque<Held>,
}

impl Side<'_, '_, '_> {
    /// A frame was moved: shows the driver what is done, now and then. Whether the step may go on.
    pub(super) fn moved(&mut self, batch: &mut Batch) -> Result<bool> {
        Ok(match batch.add() {
            Batched::Wait => true,
            Batched::Publish => {
                complete(&mut self.queue, self.irq)?;
                true
            }
            Batched::EndStep => false,
        })
    }
}

impl Turn<'_, '_, '_> {
    /// Moves frames until neither side has any, or the budget is spent.
    fn run(&mut self, poller: &mut Poller) -> Result<Progress> {
        loop {
            let before = self.budget;
            let moved = self.transmit().and_then(|intake| {
                if self.budget != before {
                    self.io.endpoint.flush();
                }
                Ok((intake, self.receive()?))
            });
            // What is done is done, even when the next chain is nonsense.
            for side in [&mut self.rx, &mut self.tx].into_iter().flatten() {
                complete(&mut side.queue, side.irq)?;
            }
            let (intake, outlet) = moved?;
            if self.budget != before {
                self.io.endpoint.flush();
            }
            if self.budget == 0 {
                return Ok(Progress::More);
            }
            if self.budget == before && !self.look_again(poller, intake, outlet)? {
                return Ok(Progress::Idle);
            }
        }
    }

    /// Nothing was moved: whether there is something to be moved after all. If not, whoever brings it will wake the worker.
    fn look_again(&mut self, poller: &mut Poller, intake: Intake, outlet: Outlet) -> Result<bool> {
        // A port without room and a limit do not want to hear of more.
        if let Some(tx) = &mut self.tx
            && intake == Intake::Open
            && (poller.poll(|| tx.queue.has_next())? || tx.queue.enable_kicks()?)
        {
            return Ok(true);
        }
        // Buffers to receive into are asked for only where some are missing. All there are were taken, so the driver kicks for more.
        if let Some(rx) = &mut self.rx
            && outlet == Outlet::NoRoom
        {
            if rx.queue.enable_kicks()? {
                return Ok(true);
            }
            self.io.count(|stats| stats.rx_starved.add(1));
        }
        Ok(false)
    }
}

impl Work for PairWorker {
    fn sources(&self) -> Vec<Source> {
        let kicks = [&self.queues.rx, &self.queues.tx].into_iter().flatten();
        let mut sources: Vec<Source> = kicks.map(|queue| queue.kick.clone() as Source).collect();
        sources.extend([&self.io.rx_gate, &self.io.tx_gate].into_iter().flatten().map(Gate::source));
        let wake = self.io.shared.wakes.get(usize::from(self.io.index));
        sources.extend(wake.map(|wake| Arc::clone(wake) as Source));
        sources.extend(self.io.endpoint.sources());
        sources
    }

    fn process(&mut self) -> Progress {
        if self.control.needs_reset() {
            return Progress::Idle;
        }
        self.step().unwrap_or_else(|error| {
            self.control.fault(&error);
            Progress::Idle
        })
    }
}

impl Worker for PairWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        // The endpoint is dropped here: the port can be opened again.
        let Queues { rx, tx } = self.queues;
        [rx, tx].into_iter().flatten().collect()
    }
}
