//! [`QueueWorker`]: the worker of every device that answers each request on the spot.
//!
//! It drains the queue with kicks off, publishes completions in batches, raises one interrupt for what it drained, and looks
//! at the queue for a short while before it asks for kicks again. One step serves at most a queue's worth of requests.

use std::time::{Duration, Instant};

use freestone_bus::{Progress, Source, Work};
use freestone_memory::GuestMem;

use crate::device::{ActiveQueue, Worker};
use crate::queue::{AttachedQueue, ChainBuffers, SpareBuffers};
use crate::{DeviceControl, Result};

/// Completions that are published at once. A driver that polls sees them this early; a larger number saves little.
const BATCH: u16 = 16;

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
}

impl<H: RequestHandler> QueueWorker<H> {
    /// How long a worker looks at an empty queue before it asks for kicks, where that proves useful.
    pub const DEFAULT_POLL: Duration = Duration::from_micros(10);

    /// A worker of `active`.
    pub fn new(mem: GuestMem, active: ActiveQueue, control: DeviceControl, handler: H) -> Self {
        let poller = Poller::new(Self::DEFAULT_POLL);
        Self { mem, active, control, handler, spare: SpareBuffers::new(), poller }
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
        let result = loop {
            let drained = drain(&mut queue, &mut self.handler, &mut buffers, &mut budget);
            // What is done is done, even when the next request is nonsense.
            queue.publish()?;
            if queue.needs_interrupt()?
                && let Err(error) = self.active.irq.trigger()
            {
                tracing::warn!(queue = self.active.index, %error, "cannot interrupt the guest");
            }
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
) -> Result<()> {
    queue.disable_kicks()?;
    let mut unpublished = 0;
    while *budget > 0 {
        let Some(chain) = queue.pop(buffers)? else { break };
        *budget -= 1;
        let written = handler.handle(buffers)?;
        queue.push_used(chain, written)?;
        unpublished += 1;
        if unpublished == BATCH {
            queue.publish()?;
            unpublished = 0;
        }
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

/// Decides whether to look at an empty queue for a while.
///
/// A look that finds nothing makes it skip the next 1, 2, 4, and at last 256 occasions; one that finds something makes it look
/// every time.
#[derive(Debug)]
struct Poller {
    time: Duration,
    misses: u32,
    skip: u32,
}

impl Poller {
    const MAX_SKIP_SHIFT: u32 = 8;

    fn new(time: Duration) -> Self {
        Self { time, misses: 0, skip: 0 }
    }

    fn poll(&mut self, mut ready: impl FnMut() -> Result<bool>) -> Result<bool> {
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
