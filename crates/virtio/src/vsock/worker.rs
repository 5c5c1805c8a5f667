//! The one worker of a vsock device: it moves packets between the queues and the [`Endpoint`].

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freestone_bus::{Irq, Progress, Source, Work};
use freestone_memory::GuestMem;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::endpoint::Endpoint;
use super::packet::{HEADER_LEN, Header};
use crate::device::{ActiveQueue, Worker};
use crate::queue::{AttachedQueue, ChainBuffers, SpareBuffers};
use crate::worker::{Batch, Batched, Poller, complete};
use crate::{DeviceControl, Error, Resources, Result};

/// Numbers of the queues (5.10.2).
pub(super) const RX: u16 = 0;
pub(super) const TX: u16 = 1;
pub(super) const EVENT: u16 = 2;
/// The transport reset event (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// An endpoint that outlives the workers. Locked once for a step; nobody else wants it while a worker runs.
pub(super) type SharedEndpoint = Arc<Mutex<Endpoint>>;

pub(super) fn lock(endpoint: &SharedEndpoint) -> MutexGuard<'_, Endpoint> {
    endpoint.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
pub(super) struct VsockWorker {
    mem: GuestMem,
    control: DeviceControl,
    rx: Option<ActiveQueue>,
    tx: Option<ActiveQueue>,
    event: Option<ActiveQueue>,
    endpoint: SharedEndpoint,
    timer: Timer,
    spare: SpareBuffers,
    poller: Poller,
    batch: Batch,
}

impl VsockWorker {
    pub fn new(resources: Resources, endpoint: SharedEndpoint, poll: Duration) -> Result<Self> {
        let Resources { mem, queues, control, .. } = resources;
        let (mut rx, mut tx, mut event) = (None, None, None);
        for queue in queues {
            match queue.index {
                RX => rx = Some(queue),
                TX => tx = Some(queue),
                EVENT => event = Some(queue),
                _ => {}
            }
        }
        Ok(Self {
            mem,
            control,
            rx,
            tx,
            event,
            endpoint,
            timer: Timer::new()?,
            spare: SpareBuffers::new(),
            poller: Poller::new(poll),
            batch: Batch::new(),
        })
    }

    fn step(&mut self) -> Result<Progress> {
        // Without both queues there is nothing to be said.
        let (Some(rx), Some(tx)) = (&mut self.rx, &mut self.tx) else { return Ok(Progress::Idle) };
        let view = self.mem.view();
        let mut endpoint = lock(&self.endpoint);
        endpoint.begin(Instant::now());
        let mut buffers = self.spare.take();
        if endpoint.transport_reset_is_due()
            && let Some(event) = &mut self.event
        {
            let mut queue = event.queue.attach(&view)?;
            tell_transport_reset(&mut queue, &mut buffers, &mut endpoint)?;
            complete(&mut queue, &event.irq)?;
        }
        let more_of_host = endpoint.poll_host();
        self.batch.begin_step();
        let mut turn = Turn {
            budget: tx.queue.size().max(rx.queue.size()),
            rx: rx.queue.attach(&view)?,
            rx_irq: &rx.irq,
            tx: tx.queue.attach(&view)?,
            tx_irq: &tx.irq,
            endpoint: &mut endpoint,
            batch: &mut self.batch,
        };
        let progress = turn.run(&mut buffers, &mut self.poller)?;
        self.spare = buffers.into_spare();
        self.timer.set(endpoint.next_deadline());
        Ok(if more_of_host { Progress::More } else { progress })
    }
}

/// Puts a transport reset event into the event queue, or asks for a kick when the driver leaves a buffer there.
fn tell_transport_reset<'m>(
    queue: &mut AttachedQueue<'_, 'm>,
    buffers: &mut ChainBuffers<'m>,
    endpoint: &mut Endpoint,
) -> Result<()> {
    let event = TRANSPORT_RESET.to_le_bytes();
    let len = u32::try_from(event.len()).unwrap_or(0);
    for _ in 0..queue.size() {
        if !queue.has_next()? && !queue.enable_kicks()? {
            break;
        }
        let Some(chain) = queue.pop(buffers)? else { break };
        // A buffer that cannot hold it goes back as it is.
        if buffers.writable_len() >= len {
            buffers.write(&event)?;
            queue.push_used(chain, len)?;
            endpoint.transport_reset_was_told();
            break;
        }
        queue.push_used(chain, 0)?;
    }
    Ok(())
}

/// What a step works with.
struct Turn<'a, 'q, 'm> {
    rx: AttachedQueue<'q, 'm>,
    rx_irq: &'a Irq,
    tx: AttachedQueue<'q, 'm>,
    tx_irq: &'a Irq,
    endpoint: &'a mut Endpoint,
    batch: &'a mut Batch,
    /// Packets that may still be moved.
    budget: u16,
}

impl<'m> Turn<'_, '_, 'm> {
    /// Moves packets until neither side has any, or the budget is spent.
    fn run(&mut self, buffers: &mut ChainBuffers<'m>, poller: &mut Poller) -> Result<Progress> {
        self.rx.disable_kicks()?;
        self.tx.disable_kicks()?;
        loop {
            let before = self.budget;
            let transmitted = self.transmit(buffers);
            // Data goes to the host in the largest pieces there are.
            self.endpoint.flush();
            let moved = transmitted.and_then(|()| self.receive(buffers));
            // What is done is done, even when the next packet is nonsense.
            complete(&mut self.tx, self.tx_irq)?;
            complete(&mut self.rx, self.rx_irq)?;
            moved?;
            if self.budget == 0 {
                return Ok(Progress::More);
            }
            let takes_packets = self.endpoint.takes_packets();
            if self.budget != before || takes_packets && poller.poll(|| self.tx.has_next())? {
                continue;
            }
            // Kicks are wanted only for what can be used: of the receive queue, if something waits for its buffers.
            let more = takes_packets && self.tx.enable_kicks()?;
            let more = self.endpoint.wants_buffers() && self.rx.enable_kicks()? || more;
            return Ok(if more { Progress::More } else { Progress::Idle });
        }
    }

    /// Takes packets from the guest.
    fn transmit(&mut self, buffers: &mut ChainBuffers<'m>) -> Result<()> {
        while self.budget > 0 && self.endpoint.takes_packets() {
            let Some(chain) = self.tx.pop(buffers)? else { break };
            self.budget -= 1;
            let mut header = [0; HEADER_LEN];
            // Copied once: what is checked is what is used.
            buffers.read(&mut header)?;
            self.endpoint.receive(&Header::from_bytes(&header), buffers)?;
            self.tx.push_used(chain, 0)?;
            match self.batch.add() {
                Batched::Wait => {}
                Batched::Publish => complete(&mut self.tx, self.tx_irq)?,
                Batched::EndStep => self.budget = 0,
            }
        }
        Ok(())
    }

    /// Gives packets to the guest, while it has buffers.
    fn receive(&mut self, buffers: &mut ChainBuffers<'m>) -> Result<()> {
        while self.budget > 0 && self.rx.has_next()? && self.endpoint.prepare() {
            let Some(chain) = self.rx.pop(buffers)? else { break };
            self.budget -= 1;
            let room = (buffers.writable_len() as usize).saturating_sub(HEADER_LEN);
            // A buffer without room for data would be used up in vain, for ever.
            let Some((header, data)) = self.endpoint.take(room).filter(|_| room > 0) else {
                let (have, want) = (buffers.writable_len().into(), HEADER_LEN as u64 + 1);
                return Err(Error::ShortRequest { direction: "device-writable", have, want });
            };
            buffers.write(&header.to_bytes())?;
            buffers.write(data)?;
            let written = u32::try_from(HEADER_LEN + data.len()).unwrap_or(u32::MAX);
            self.rx.push_used(chain, written)?;
            match self.batch.add() {
                Batched::Wait => {}
                Batched::Publish => complete(&mut self.rx, self.rx_irq)?,
                Batched::EndStep => self.budget = 0,
            }
        }
        Ok(())
    }
}

impl Work for VsockWorker {
    fn sources(&self) -> Vec<Source> {
        let kicks = [&self.rx, &self.tx, &self.event].into_iter().flatten();
        let mut sources: Vec<Source> = kicks.map(|queue| queue.kick.clone() as Source).collect();
        sources.push(self.timer.fd.clone());
        sources.extend(lock(&self.endpoint).host().sources());
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

impl Worker for VsockWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        [self.rx, self.tx, self.event].into_iter().flatten().collect()
    }
}

/// Wakes the worker at the next deadline.
#[derive(Debug)]
struct Timer {
    fd: Arc<OwnedFd>,
    set_to: Option<Instant>,
}

impl Timer {
    fn new() -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags);
        let fd = fd.map_err(|e| Error::io("create a timer for vsock")(e.into()))?;
        Ok(Self { fd: Arc::new(fd), set_to: None })
    }

    /// A timer without a deadline is left to itself: it wakes the worker once in vain.
    fn set(&mut self, deadline: Option<Instant>) {
        let Some(at) = deadline.filter(|_| deadline != self.set_to) else { return };
        // 0 would stop the timer.
        let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let tv_sec = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
        let it_value = Timespec { tv_sec, tv_nsec: left.subsec_nanos().into() };
        let value = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        match timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &value) {
            Ok(_) => self.set_to = deadline,
            Err(error) => tracing::debug!(%error, "cannot set a timer for vsock"),
        }
    }
}
