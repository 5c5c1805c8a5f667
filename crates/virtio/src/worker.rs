//! [`QueueWorker`]: the worker of every device that answers each request on the spot.
//!
//! It drains the queue with kicks off, publishes completions in batches, interrupts at most once for each batch, and looks at
//! the queue for a short while before it asks for kicks again. One step serves at most a queue's worth of requests, and fewer
//! if they are slow.

use std::time::{Duration, Instant};

use freestone_bus::{Irq, Progress, Source, Work};
use freestone_memory::GuestMem;

use crate::device::{ActiveQueue, Worker};
use crate::queue::{AttachedQueue, ChainBuffers, SpareBuffers};
use crate::{DeviceControl, Result};

/// Most completions that are published at once; a larger number saves little.
const MAX_BATCH: u16 = 16;
/// Completions wait for their batch about this long at most.
const BATCH_TIME: Duration = Duration::from_micros(50);
/// A step that takes longer ends early, so that other work on the same thread, a pause or a reset need not wait for it.
const STEP_TIME: Duration = Duration::from_millis(2);

/// See [`QueueWorker::DEFAULT_POLL`].
pub(crate) const DEFAULT_POLL: Duration = Duration::from_micros(10);

/// Answers requests, one at a time.
pub trait RequestHandler: Send {
    /// Serves the request in `buffers` and returns how many bytes it wrote to their device-writable part, from its start.
    ///
    /// # Errors
    /// If the request is so malformed that it cannot even be answered: the device then stops until it is reset. What can be
    /// answered (a failed read, an unknown command) is not an error.
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32>;
}

/// Serves one queue with a [`RequestHandler`].
#[derive(Debug)]
pub struct QueueWorker<H> {
    mem: GuestMem,
    active: ActiveQueue,
    control: DeviceControl,
    handler: H,
    spare: SpareBuffers,
    poller: Poller,
    batch: Batch,
}

impl<H: RequestHandler> QueueWorker<H> {
    /// How long a worker looks at an empty queue before it asks for kicks, where that proves useful.
    pub const DEFAULT_POLL: Duration = DEFAULT_POLL;

    /// A worker of `active`.
    pub fn new(mem: GuestMem, active: ActiveQueue, control: DeviceControl, handler: H) -> Self {
        let poller = Poller::new(Self::DEFAULT_POLL);
        Self { mem, active, control, handler, spare: SpareBuffers::new(), poller, batch: Batch::new() }
    }

    /// Looks at an empty queue for `poll` before asking for kicks; zero never looks. A kick costs the driver an exit, so a
    /// driver that sends one request after the other gains much. Where no request comes in that time, the worker soon stops
    /// trying.
    #[must_use]
    pub fn poll(mut self, poll: Duration) -> Self {
        self.poller = Poller::new(poll);
        self
    }

    fn step(&mut self) -> Result<Progress> {
        let view = self.mem.view();
        let mut queue = self.active.queue.attach(&view)?;
        let mut buffers = self.spare.take();
        let mut budget = queue.size();
        self.batch.begin_step();
        let result = loop {
            let drained = drain(
                &mut queue,
                &mut self.handler,
                &mut buffers,
                &mut budget,
                &mut self.batch,
                &self.active.irq,
            );
            // What is done is done, even when the next request is nonsense.
            complete(&mut queue, &self.active.irq)?;
            if drained.is_err() || budget == 0 {
                break drained.map(|()| Progress::More);
            }
            if self.poller.poll(|| queue.has_next())? {
                continue;
            }
            if !queue.enable_kicks()? {
                break Ok(Progress::Idle);
            }
        };
        self.spare = buffers.into_spare();
        result
    }
}

/// Serves what waits, at most `budget` requests.
fn drain<'m, H: RequestHandler>(
    queue: &mut AttachedQueue<'_, 'm>,
    handler: &mut H,
    buffers: &mut ChainBuffers<'m>,
    budget: &mut u16,
    batch: &mut Batch,
    irq: &Irq,
) -> Result<()> {
    queue.disable_kicks()?;
    while *budget > 0 {
        let Some(chain) = queue.pop(buffers)? else { break };
        *budget -= 1;
        let written = handler.handle(buffers)?;
        queue.push_used(chain, written)?;
        match batch.add() {
            Batched::Wait => {}
            Batched::Publish => complete(queue, irq)?,
            Batched::EndStep => *budget = 0,
        }
    }
    Ok(())
}

/// Shows the driver what is done, and interrupts it if it wants that.
pub(crate) fn complete(queue: &mut AttachedQueue<'_, '_>, irq: &Irq) -> Result<()> {
    queue.publish()?;
    if queue.needs_interrupt()?
        && let Err(error) = irq.trigger()
    {
        tracing::warn!(%error, "cannot interrupt the guest");
    }
    Ok(())
}

impl<H: RequestHandler> Work for QueueWorker<H> {
    fn sources(&self) -> Vec<Source> {
        vec![self.active.kick.clone()]
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

impl<H: RequestHandler> Worker for QueueWorker<H> {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        vec![self.active]
    }
}

/// What to do after a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Batched {
    /// Let it wait for more.
    Wait,
    /// Publish what there is.
    Publish,
    /// Publish, and let others have the thread.
    EndStep,
}

/// Decides when completions are published: many at once where requests are quick, each by itself where they are slow.
///
/// The clock is read once for each full batch, so never for a driver with one quick request at a time.
#[derive(Debug)]
pub(crate) struct Batch {
    size: u16,
    waiting: u16,
    /// When the first and the last full batch of this step were published.
    step: Option<(Instant, Instant)>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self { size: MAX_BATCH, waiting: 0, step: None }
    }

    pub(crate) fn begin_step(&mut self) {
        self.waiting = 0;
        self.step = None;
    }

    pub(crate) fn add(&mut self) -> Batched {
        self.waiting += 1;
        if self.waiting < self.size {
            return Batched::Wait;
        }
        self.full_at(Instant::now())
    }

    fn full_at(&mut self, now: Instant) -> Batched {
        self.waiting = 0;
        let (first, last) = self.step.unwrap_or((now, now));
        if self.step.is_some() {
            let took = now.saturating_duration_since(last);
            if took > BATCH_TIME {
                self.size = (self.size / 2).max(1);
            } else if took < BATCH_TIME / 4 {
                self.size = (self.size * 2).min(MAX_BATCH);
            }
        }
        self.step = Some((first, now));
        if now.saturating_duration_since(first) > STEP_TIME { Batched::EndStep } else { Batched::Publish }
    }
}

/// Decides whether to look at an empty queue for a while.
///
/// A look that finds nothing makes it skip the next 1, 2, 4, and at last 256 occasions; one that finds something makes it look
/// every time.
#[derive(Debug)]
pub(crate) struct Poller {
    time: Duration,
    misses: u32,
    skip: u32,
}

impl Poller {
    const MAX_SKIP_SHIFT: u32 = 8;

    pub(crate) fn new(time: Duration) -> Self {
        Self { time, misses: 0, skip: 0 }
    }

    pub(crate) fn poll(&mut self, mut ready: impl FnMut() -> Result<bool>) -> Result<bool> {
        if self.time.is_zero() {
            return Ok(false);
        }
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(false);
        }
        let start = Instant::now();
        loop {
            if ready()? {
                self.misses = 0;
                return Ok(true);
            }
            if start.elapsed() >= self.time {
                break;
            }
            std::hint::spin_loop();
        }
        self.skip = 1 << self.misses.min(Self::MAX_SKIP_SHIFT);
        self.misses = self.misses.saturating_add(1);
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Publishes full batches `apart` from each other until a step ends, and says how many that took.
    fn batches_in_a_step(batch: &mut Batch, apart: Duration) -> usize {
        let start = Instant::now();
        batch.begin_step();
        let publish = |n: &u32| batch.full_at(start + apart * *n) == Batched::Publish;
        (0..1000).take_while(publish).count()
    }

    #[test]
    fn slow_requests_are_published_one_by_one_and_quick_ones_in_batches_again() {
        let mut batch = Batch::new();
        batches_in_a_step(&mut batch, Duration::from_micros(400));
        assert_eq!(batch.size, 1);
        batches_in_a_step(&mut batch, Duration::from_micros(30));
        assert_eq!(batch.size, 1, "neither quick nor slow: as it was");
        batches_in_a_step(&mut batch, Duration::from_micros(5));
        assert_eq!(batch.size, MAX_BATCH);
    }

    #[test]
    fn a_step_with_slow_requests_ends_early() {
        assert_eq!(batches_in_a_step(&mut Batch::new(), Duration::from_micros(500)), 5);
        assert_eq!(batches_in_a_step(&mut Batch::new(), Duration::from_micros(1)), 1000);
    }

    #[test]
    fn a_batch_is_full_after_its_size() {
        let mut batch = Batch::new();
        batch.begin_step();
        let full = (0..15).filter(|_| batch.add() != Batched::Wait).count();
        assert_eq!(full, 0);
        assert_ne!(batch.add(), Batched::Wait);
    }

    #[test]
    fn polling_in_vain_becomes_rare_and_success_brings_it_back() {
        let mut poller = Poller::new(Duration::from_nanos(1));
        let mut looks = Vec::new();
        for occasion in 0..20 {
            let mut looked = false;
            poller
                .poll(|| {
                    looked = true;
                    Ok(false)
                })
                .unwrap();
            if looked {
                looks.push(occasion);
            }
        }
        assert_eq!(looks, [0, 2, 5, 10, 19]);
        while !poller.poll(|| Ok(true)).unwrap() {}
        assert!(poller.poll(|| Ok(true)).unwrap());
    }

    #[test]
    fn without_time_there_is_no_poll() {
        assert!(!Poller::new(Duration::ZERO).poll(|| Ok(true)).unwrap());
    }
}
