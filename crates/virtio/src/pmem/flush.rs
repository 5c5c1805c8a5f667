//! The flush queue (5.19.6): requests that wait together are served by one sync.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use freestone_bus::{Irq, Progress, Source, Work};
use freestone_memory::GuestMem;

use super::Backend;
use crate::device::{ActiveQueue, Worker};
use crate::queue::{AttachedQueue, Chain, ChainBuffers};
use crate::rate::Gate;
use crate::{DeviceControl, Error, Result};

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const FLUSH: u32 = 0;
/// The answers (5.19.6.2).
const SUCCESS: u32 = 0;
const FAILURE: u32 = u32::MAX;
/// Bytes of an answer.
const ANSWER: u32 = 4;

/// Serves the flush queue.
pub(super) struct FlushWorker {
    mem: GuestMem,
    active: ActiveQueue,
    control: DeviceControl,
    backend: Arc<Backend>,
    gate: Option<Gate>,
}

/// A request that waits for its answer.
struct Waiting<'m> {
    chain: Chain,
    buffers: ChainBuffers<'m>,
    flush: bool,
}

impl FlushWorker {
    pub(super) fn new(
        mem: GuestMem,
        active: ActiveQueue,
        control: DeviceControl,
        backend: Arc<Backend>,
        gate: Option<Gate>,
    ) -> Self {
        Self { mem, active, control, backend, gate }
    }

    /// Serves all requests that wait, at most a queue's worth, with one sync.
    fn step(&mut self) -> Result<Progress> {
        let view = self.mem.view();
        let mut queue = self.active.queue.attach(&view)?;
        queue.disable_kicks()?;
        if let Some(gate) = &self.gate
            && gate.is_limited()
            && queue.has_next()?
            && !gate.open()
        {
            // The timer wakes it.
            return Ok(Progress::Idle);
        }
        let mut waiting = Vec::new();
        let taken = take(&mut queue, &mut waiting);
        // What came before a request that is nonsense is answered all the same.
        let answers = serve(&self.backend, &waiting);
        if let Some(gate) = &self.gate
            && waiting.iter().any(|request| request.flush)
        {
            gate.charge(self.backend.size);
        }
        answer(&mut queue, &answers, waiting)?;
        complete(&mut queue, &self.active.irq)?;
        taken?;
        Ok(if queue.enable_kicks()? { Progress::More } else { Progress::Idle })
    }
}

/// Takes what is in the queue, at most as much as it holds.
fn take<'m>(queue: &mut AttachedQueue<'_, 'm>, waiting: &mut Vec<Waiting<'m>>) -> Result<()> {
    for _ in 0..queue.size() {
        let mut buffers = ChainBuffers::new();
        let Some(chain) = queue.pop(&mut buffers)? else { break };
        let mut kind = [0; 4];
        buffers.read(&mut kind)?;
        let room = buffers.writable_len();
        if room < ANSWER {
            let (have, want) = (room.into(), ANSWER.into());
            return Err(Error::ShortRequest { direction: "device-writable", have, want });
        }
        waiting.push(Waiting { chain, buffers, flush: u32::from_le_bytes(kind) == FLUSH });
    }
    Ok(())
}

/// The answer to each request.
fn serve(backend: &Backend, waiting: &[Waiting<'_>]) -> Vec<u32> {
    let synced = waiting.iter().any(|request| request.flush).then(|| backend.sync());
    let done = synced.is_some_and(|synced| synced.is_ok());
    let answers = waiting.iter().map(|request| if request.flush && done { SUCCESS } else { FAILURE });
    let answers: Vec<_> = answers.collect();
    let errors = answers.iter().filter(|answer| **answer != SUCCESS).count();
    backend.stats.requests.fetch_add(waiting.len() as u64, Ordering::Relaxed);
    backend.stats.errors.fetch_add(errors as u64, Ordering::Relaxed);
    answers
}

fn answer(queue: &mut AttachedQueue<'_, '_>, answers: &[u32], waiting: Vec<Waiting<'_>>) -> Result<()> {
    for (mut request, answer) in waiting.into_iter().zip(answers) {
        request.buffers.write(&answer.to_le_bytes())?;
        queue.push_used(request.chain, ANSWER)?;
    }
    Ok(())
}

fn complete(queue: &mut AttachedQueue<'_, '_>, irq: &Irq) -> Result<()> {
    queue.publish()?;
    if queue.needs_interrupt()?
        && let Err(error) = irq.trigger()
    {
        tracing::warn!(%error, "cannot interrupt the guest");
    }
    Ok(())
}

impl Work for FlushWorker {
    fn sources(&self) -> Vec<Source> {
        let mut sources: Vec<Source> = vec![self.active.kick.clone()];
        sources.extend(self.gate.as_ref().map(Gate::source));
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

impl Worker for FlushWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        vec![self.active]
    }
}
