//! [`BlkWorker`]: serves one queue of a block device by an [`IoQueue`].
//!
//! What an engine does on the spot is answered on the spot. What is under way is remembered in a slot whose number is its tag:
//! the driver's name for the request and the guest address of its status byte, no reference to guest memory. The engine keeps
//! the memory of the data itself. Stopping waits until nothing is under way, so nothing touches guest memory afterwards.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use freestone_block::{Image, IoQueue, Op, Submitted, SyncQueue};
use freestone_bus::{Irq, Progress, Source, Work};
use freestone_memory::{
    Bytes, GuestAddress, GuestMem, GuestMemoryBackend, GuestMemoryRegion, MemorySlice, MemoryView,
};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::Shared;
use super::request::{Failure, Header, Kind, Request, Rules, status};
use super::stats::count;
use crate::device::{ActiveQueue, Worker};
use crate::queue::{AttachedQueue, Chain, ChainBuffers, SpareBuffers};
use crate::rate::Gate;
use crate::worker::{Batch, Batched, Poller, complete};
use crate::{DeviceControl, Error, Result};

/// Most requests of a queue that are under way at once.
pub(super) const MAX_DEPTH: u16 = 256;
/// Times that an engine may refuse to wait before a worker that stops gives its requests up.
const MAX_REFUSALS: u32 = 16;

/// Serves one queue.
#[derive(Debug)]
pub(super) struct BlkWorker {
    mem: GuestMem,
    active: ActiveQueue,
    control: DeviceControl,
    core: Core,
    spare: SpareBuffers,
    poller: Poller,
    batch: Batch,
}

/// An engine, for an image.
#[derive(Debug)]
pub(super) struct Io {
    pub queue: Box<dyn IoQueue>,
    pub image: Arc<dyn Image>,
    /// Which image that is.
    pub generation: u64,
}

/// Requests of one queue and their engine, apart from the queue itself.
#[derive(Debug)]
struct Core {
    shared: Arc<Shared>,
    rules: Rules,
    io: Box<dyn IoQueue>,
    /// The image that `io` is for, and which that is.
    image: Arc<dyn Image>,
    generation: u64,
    /// Readable when the image was replaced. `None` if nobody can do that.
    wake: Option<Arc<OwnedFd>>,
    slots: Slots,
    /// Completions that were reaped and not yet looked at.
    done: Vec<(u64, io::Result<()>)>,
    gate: Option<Gate>,
}

/// Why a worker takes no more requests for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    /// There are none, or its turn is over.
    Open,
    /// As many are under way as may be.
    Full,
    /// The rate limit says so.
    Limited,
}

impl BlkWorker {
    pub(super) fn new(
        mem: GuestMem,
        active: ActiveQueue,
        control: DeviceControl,
        poller: Poller,
        (shared, rules, io, wake): (Arc<Shared>, Rules, Io, Option<Arc<OwnedFd>>),
        gate: Option<Gate>,
    ) -> Self {
        let slots = Slots::new(active.queue.size().min(MAX_DEPTH));
        let Io { queue: io, image, generation } = io;
        let core = Core { shared, rules, io, image, generation, wake, slots, done: Vec::new(), gate };
        Self { mem, active, control, core, spare: SpareBuffers::new(), poller, batch: Batch::new() }
    }

    fn step(&mut self) -> Result<Progress> {
        if self.core.is_stale() {
            self.change_image()?;
        }
        let Self { mem, active, core, spare, poller, batch, .. } = self;
        let view = mem.view();
        let mut queue = active.queue.attach(&view)?;
        let mut buffers = spare.take();
        let mut budget = queue.size();
        batch.begin_step();
        let result = loop {
            core.settle(&mut queue, &view)?;
            let drained =
                core.drain(&mut queue, &view, &mut buffers, (&mut budget, &mut *batch), &active.irq);
            let committed = core.commit();
            // What is done is done, even when the next request is nonsense.
            complete(&mut queue, &active.irq)?;
            let intake = match drained {
                Ok(intake) if budget > 0 => intake,
                drained => break drained.map(|_| Progress::More),
            };
            if !core.done.is_empty() {
                continue;
            }
            let open = intake == Intake::Open;
            if (open || core.in_flight()) && poller.poll(|| Ok(core.reap() || (open && queue.has_next()?)))? {
                continue;
            }
            // Full or limited, it does not want to hear of requests: a completion or the timer wakes it.
            if open && queue.enable_kicks()? {
                continue;
            }
            break Ok(if committed { Progress::Idle } else { Progress::More });
        };
        *spare = buffers.into_spare();
        result
    }

    /// Ends what is under way on an image that was replaced, and goes on with the new one.
    #[cold]
    fn change_image(&mut self) -> Result<()> {
        self.finish()?;
        let core = &mut self.core;
        // The driver may have been told that its writes are done; nobody will flush them there later.
        if !core.rules.read_only
            && let Err(error) = core.image.flush()
        {
            core.shared.host_error("flush the image that was replaced", &error);
        }
        let mut io = core.shared.open_queue(self.active.queue.size())?;
        if let Some(wake) = &core.wake
            && let Err(error) = io.queue.notify_by(wake.as_fd())
        {
            tracing::debug!(%error, "completions cannot be told by another event: requests block their worker");
            io.queue = Box::new(SyncQueue::new(Arc::clone(&io.image)));
        }
        (core.io, core.image, core.generation) = (io.queue, io.image, io.generation);
        Ok(())
    }

    /// Waits until nothing is under way, and tells the driver what became of it.
    fn finish(&mut self) -> Result<()> {
        let Self { mem, active, core, .. } = self;
        let view = mem.view();
        let mut queue = active.queue.attach(&view)?;
        let mut refusals = 0;
        loop {
            core.settle(&mut queue, &view)?;
            if !core.in_flight() {
                break;
            }
            if let Err(error) = core.io.commit().and_then(|()| core.io.wait()) {
                refusals += 1;
                if refusals == MAX_REFUSALS {
                    return Err(Error::io("wait for a disk's requests")(error));
                }
            }
        }
        complete(&mut queue, &active.irq)
    }
}

impl Core {
    /// Whether the image was replaced.
    fn is_stale(&self) -> bool {
        self.shared.generation.load(Ordering::Acquire) != self.generation
    }

    fn in_flight(&self) -> bool {
        self.io.in_flight() > 0
    }

    /// Takes what completed; whether there is any.
    fn reap(&mut self) -> bool {
        if self.in_flight() {
            let done = &mut self.done;
            self.io.reap(&mut |tag, result| done.push((tag, result)));
        }
        !self.done.is_empty()
    }

    /// Hands what was submitted to the host. If that fails, it is to be tried again.
    fn commit(&mut self) -> bool {
        if !self.in_flight() {
            return true;
        }
        let committed = self.io.commit();
        if let Err(error) = &committed {
            self.shared.host_error("submit", error);
        }
        committed.is_ok()
    }

    /// Goes on with, or answers, all requests that completed.
    fn settle(&mut self, queue: &mut AttachedQueue<'_, '_>, view: &MemoryView) -> Result<()> {
        self.reap();
        while let Some((tag, result)) = self.done.pop() {
            let Some(mut slot) = self.slots.take(tag) else {
                tracing::debug!(tag, "completion of a request that is not under way");
                continue;
            };
            match self.proceed(view, &mut slot.request, Submitted::Done(result)) {
                None => self.slots.put(slot),
                Some(result) => {
                    let (status, written) = self.outcome(&slot.request, result);
                    view.write_obj(status, GuestAddress(slot.status)).map_err(|_| slot.lost())?;
                    queue.push_used(slot.chain, used_len(written, slot.room))?;
                }
            }
        }
        Ok(())
    }

    /// Takes requests up to the budget.
    fn drain<'m>(
        &mut self,
        queue: &mut AttachedQueue<'_, 'm>,
        view: &'m MemoryView,
        buffers: &mut ChainBuffers<'m>,
        (budget, batch): (&mut u16, &mut Batch),
        irq: &Irq,
    ) -> Result<Intake> {
        queue.disable_kicks()?;
        while *budget > 0 {
            if self.slots.full() {
                return Ok(Intake::Full);
            }
            if let Some(gate) = &self.gate
                && gate.is_limited()
                && queue.has_next()?
                && !gate.open()
            {
                return Ok(Intake::Limited);
            }
            let Some(chain) = queue.pop(buffers)? else { break };
            // After the request was seen: it may have been made because the image was replaced.
            if self.is_stale() {
                queue.undo(chain);
                *budget = 0;
                break;
            }
            *budget -= 1;
            if self.begin(chain, queue, view, buffers)? {
                match batch.add() {
                    Batched::Wait => {}
                    Batched::Publish => complete(queue, irq)?,
                    Batched::EndStep => *budget = 0,
                }
            }
        }
        Ok(Intake::Open)
    }

    /// Begins a request; whether it is answered already.
    fn begin<'m>(
        &mut self,
        chain: Chain,
        queue: &mut AttachedQueue<'_, 'm>,
        view: &'m MemoryView,
        buffers: &mut ChainBuffers<'m>,
    ) -> Result<bool> {
        let header = Header::take(buffers)?;
        let answer = buffers.split_last()?;
        // What is left of the device-writable part is all data; on success of a read, all of it is written.
        let room = buffers.writable_len();
        let checked = self.rules.check(header, buffers, self.shared.now());
        if let Some(gate) = &self.gate {
            gate.charge(checked.as_ref().map_or(0, |request| request.len.into()));
        }
        let (status, written) = match checked {
            Err(failure) => self.refuse(header, &failure),
            Ok(mut request) => {
                let first = match request.kind {
                    Kind::Read => Some(Op::Read { bufs: buffers.writable(), offset: request.offset }),
                    Kind::Write => Some(Op::Write { bufs: buffers.readable(), offset: request.offset }),
                    _ => None,
                };
                let first = first.map_or(Submitted::Done(Ok(())), |op| self.submit(view, op));
                let done = match first {
                    // The usual request is one operation that is done.
                    Submitted::Done(result) if request.is_last() => Some(result),
                    first => self.proceed(view, &mut request, first),
                };
                let Some(result) = done else {
                    self.slots.put(Slot::new(chain, request, room, &answer, view)?);
                    return Ok(false);
                };
                self.outcome(&request, result)
            }
        };
        answer.write_obj(status, 0)?;
        queue.push_used(chain, used_len(written, room))?;
        Ok(true)
    }

    /// Submits what is left of a request, one operation after the other, as long as each is done on the spot. `None` if one is
    /// under way, by the tag of the next slot.
    fn proceed(
        &mut self,
        view: &MemoryView,
        request: &mut Request,
        mut submitted: Submitted,
    ) -> Option<io::Result<()>> {
        loop {
            match submitted {
                Submitted::Pending => return None,
                Submitted::Done(Err(error)) => return Some(Err(error)),
                Submitted::Done(Ok(())) => {}
            }
            let Some(op) = request.next_op() else { return Some(Ok(())) };
            submitted = self.submit(view, op);
        }
    }

    /// Submits an operation by the tag of the next slot.
    #[inline]
    fn submit<'m>(&mut self, view: &'m MemoryView, op: Op<'_, 'm>) -> Submitted {
        match self.io.submit(self.slots.next_tag(), view, op) {
            Submitted::Done(Err(error)) => self.make_room(view, op, error),
            submitted => submitted,
        }
    }

    /// After an error: if it was that there is no room, waits for some and tries again. Each turn makes some, until nothing is
    /// in the way.
    #[cold]
    fn make_room<'m>(&mut self, view: &'m MemoryView, op: Op<'_, 'm>, mut error: io::Error) -> Submitted {
        while error.kind() == io::ErrorKind::WouldBlock && self.in_flight() {
            let before = self.done.len();
            if let Err(error) = self.io.commit().and_then(|()| self.io.wait()) {
                return Submitted::Done(Err(error));
            }
            self.reap();
            if self.done.len() == before {
                break;
            }
            match self.io.submit(self.slots.next_tag(), view, op) {
                Submitted::Done(Err(again)) => error = again,
                submitted => return submitted,
            }
        }
        Submitted::Done(Err(error))
    }

    /// Counts what became of a request. Returns its status and the bytes of data that were written.
    #[inline]
    fn outcome(&self, request: &Request, result: io::Result<()>) -> (u8, u32) {
        if let Err(error) = result {
            return self.failed(request, error);
        }
        let stats = &self.shared.stats;
        match request.kind {
            Kind::Read => {
                count(&stats.reads, 1);
                count(&stats.read_bytes, request.len.into());
            }
            Kind::Write => {
                count(&stats.writes, 1);
                count(&stats.written_bytes, request.len.into());
            }
            Kind::Flush => count(&stats.flushes, 1),
            Kind::Discard => count(&stats.discards, 1),
            Kind::WriteZeroes => count(&stats.write_zeroes, 1),
            Kind::GetId => {}
        }
        (status(VIRTIO_BLK_S_OK), request.written)
    }

    #[cold]
    fn failed(&self, request: &Request, error: io::Error) -> (u8, u32) {
        count(&self.shared.stats.errors, 1);
        count(&self.shared.stats.host_errors, 1);
        self.shared.host_error(request.kind.name(), &error);
        (Failure::Host(error).status(), 0)
    }

    #[cold]
    fn refuse(&self, header: Header, failure: &Failure) -> (u8, u32) {
        count(&self.shared.stats.errors, 1);
        let Header { kind, sector } = header;
        tracing::debug!(kind, sector, %failure, "disk request refused");
        (failure.status(), 0)
    }
}

/// The length for the used ring: it counts from the start of the writable part, and must not claim bytes that were not written
/// (2.7.8.2). The status is the byte after `room` bytes of data.
fn used_len(written: u32, room: u32) -> u32 {
    if written == room { written.saturating_add(1) } else { written }
}

/// A request that is under way.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    request: Request,
    room: u32,
    /// Guest-physical address of the status byte.
    status: u64,
}

impl Slot {
    fn new(
        chain: Chain,
        request: Request,
        room: u32,
        answer: &MemorySlice<'_>,
        view: &MemoryView,
    ) -> Result<Self> {
        let status = guest_address(view, answer).ok_or(Error::Buffer { addr: 0, len: 1 })?;
        Ok(Self { chain, request, room, status })
    }

    /// Guest memory went away under the request.
    fn lost(&self) -> Error {
        Error::Buffer { addr: self.status, len: 1 }
    }
}

/// Where in guest memory `slice` begins: the reverse of looking it up in `view`.
fn guest_address(view: &MemoryView, slice: &MemorySlice<'_>) -> Option<u64> {
    let at = slice.ptr_guard().as_ptr().addr();
    view.iter().find_map(|region| {
        let offset = at.checked_sub(region.as_ptr().addr())? as u64;
        (offset < region.len()).then(|| region.start_addr().0.checked_add(offset))?
    })
}

/// Requests under way, by tag.
#[derive(Debug)]
struct Slots {
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    limit: usize,
}

impl Slots {
    /// Room for `limit` requests, allocated when the first of them come.
    fn new(limit: u16) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), limit: limit.into() }
    }

    fn full(&self) -> bool {
        self.free.is_empty() && self.slots.len() >= self.limit
    }

    /// The tag of the slot that is put next.
    fn next_tag(&self) -> u64 {
        self.free.last().copied().unwrap_or(self.slots.len()) as u64
    }

    fn put(&mut self, slot: Slot) {
        match self.free.pop().and_then(|index| self.slots.get_mut(index)) {
            Some(place) => *place = Some(slot),
            None => self.slots.push(Some(slot)),
        }
    }

    fn take(&mut self, tag: u64) -> Option<Slot> {
        let index = usize::try_from(tag).ok()?;
        let slot = self.slots.get_mut(index)?.take()?;
        self.free.push(index);
        Some(slot)
    }
}

impl Work for BlkWorker {
    fn sources(&self) -> Vec<Source> {
        let mut sources: Vec<Source> = vec![self.active.kick.clone()];
        sources.extend(self.core.io.completion_source());
        sources.extend(self.core.wake.iter().map(|wake| Arc::clone(wake) as Source));
        sources.extend(self.core.gate.as_ref().map(Gate::source));
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

impl Worker for BlkWorker {
    fn into_queues(mut self: Box<Self>) -> Vec<ActiveQueue> {
        // A device that waits for a reset leaves its queues alone; the engine waits all the same when it is dropped.
        if (self.core.in_flight() || !self.core.done.is_empty())
            && !self.control.needs_reset()
            && let Err(error) = self.finish()
        {
            self.control.fault(&error);
        }
        let Self { active, core, .. } = *self;
        drop(core);
        vec![active]
    }
}

#[cfg(test)]
mod tests {
    use freestone_memory::GuestMemBuilder;
    use freestone_memory::layout::RamRange;

    use super::*;

    #[test]
    fn the_guest_address_of_a_slice_is_that_it_was_looked_up_by() {
        let ranges = [(0, 0x4000), (0x4000, 0x4000), (0x10_0000, 0x1000)];
        let ranges = ranges.map(|(start, len)| RamRange { start, len }).to_vec();
        let view = GuestMemBuilder::with_ranges(ranges).build().unwrap().view();
        for addr in [0, 0x3fff, 0x4000, 0x7fff, 0x10_0000, 0x10_0fff] {
            let slice = view.get_slice(GuestAddress(addr), 1).unwrap();
            assert_eq!(guest_address(&view, &slice), Some(addr));
        }
        let other = GuestMem::anonymous(0x4000).unwrap().view();
        assert_eq!(guest_address(&view, &other.get_slice(GuestAddress(0), 1).unwrap()), None);
    }
}
