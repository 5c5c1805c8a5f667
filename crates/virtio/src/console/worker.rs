//! The worker of a console: all queues, in one piece of work, because control messages and ports belong together.

use std::sync::Arc;
use std::time::Duration;

use freestone_bus::{Progress, Source, TimerFd, Work};
use freestone_memory::GuestMem;

use super::control::MESSAGE_LEN;
use super::port::{CHUNK, PortState};
use super::{Shared, State};
use crate::device::{ActiveQueue, Resources, Worker};
use crate::queue::{AttachedQueue, Chain, ChainBuffers, SpareBuffers};
use crate::worker::complete;
use crate::{DeviceControl, Error, Result};

/// Queue of control messages to the driver, and from it.
const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
/// Requests of one queue in a step.
const BUDGET: usize = 64;
/// When the host's end of a port is full, it is tried again after this time.
const RETRY: Duration = Duration::from_millis(10);

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Bytes for the guest of a port.
    Receive(usize),
    /// Bytes from the guest of a port.
    Transmit(usize),
    ToDriver,
    FromDriver,
}

impl Role {
    /// The role of queue `index`: the first port's two, the control queues, then the other ports' (5.3.2).
    fn of(index: u16) -> Self {
        match index {
            CONTROL_RX => Self::ToDriver,
            CONTROL_TX => Self::FromDriver,
            _ => {
                let port = if index < CONTROL_RX { 0 } else { usize::from(index / 2).saturating_sub(1) };
                if index.is_multiple_of(2) { Self::Receive(port) } else { Self::Transmit(port) }
            }
        }
    }
}

/// A transmitted request of which the host's end has taken a part only.
#[derive(Debug)]
struct Partial {
    chain: Chain,
    rest: Vec<u8>,
}

#[derive(Debug)]
struct Lane {
    active: ActiveQueue,
    role: Role,
    partial: Option<Partial>,
}

/// Serves all queues of a console.
#[derive(Debug)]
pub(super) struct ConsoleWorker {
    mem: GuestMem,
    lanes: Vec<Lane>,
    control: DeviceControl,
    shared: Arc<Shared>,
    timer: Arc<TimerSource>,
    spare: SpareBuffers,
}

/// A timer as a source of work.
struct TimerSource(std::sync::Mutex<TimerFd>, std::os::fd::RawFd);

impl std::os::fd::AsRawFd for TimerSource {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.1
    }
}

impl std::fmt::Debug for TimerSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TimerSource")
    }
}

impl ConsoleWorker {
    pub(super) fn new(resources: Resources, shared: Arc<Shared>) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let Resources { mem, queues, control, .. } = resources;
        let lanes = queues
            .into_iter()
            .map(|active| Lane { role: Role::of(active.index), active, partial: None })
            .collect();
        let timer = TimerFd::new().map_err(|e| Error::Io { op: "create a timer", source: e.into() })?;
        let fd = timer.as_raw_fd();
        let timer = Arc::new(TimerSource(std::sync::Mutex::new(timer), fd));
        Ok(Self { mem, lanes, control, shared, timer, spare: SpareBuffers::new() })
    }

    fn step(&mut self) -> Result<Progress> {
        let view = self.mem.view();
        let mut state = self.shared.lock();
        let mut buffers = self.spare.take();
        let (mut more, mut full) = (false, false);
        for lane in &mut self.lanes {
            let Lane { active, role, partial } = lane;
            let mut queue = active.queue.attach(&view)?;
            queue.disable_kicks()?;
            let served = match *role {
                Role::Receive(port) => receive(&mut queue, &mut state, port, &mut buffers),
                Role::Transmit(port) => transmit(&mut queue, &mut state, port, &mut buffers, partial),
                Role::FromDriver => from_driver(&mut queue, &mut state, &mut buffers),
                Role::ToDriver => to_driver(&mut queue, &mut state, &mut buffers),
            };
            queue.publish()?;
            if queue.needs_interrupt()?
                && let Err(error) = active.irq.trigger()
            {
                tracing::warn!(%error, "cannot interrupt the guest");
            }
            match served? {
                Served::All => more |= queue.enable_kicks()?,
                // What would be found now is known already.
                Served::Waiting => _ = queue.enable_kicks()?,
                Served::Budget | Served::Heard => more = true,
                Served::HostFull => {
                    full = true;
                    _ = queue.enable_kicks()?;
                }
            }
        }
        self.spare = buffers.into_spare();
        if full {
            self.try_again_later();
        }
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn try_again_later(&self) {
        let mut timer = self.timer.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Err(error) = timer.reset(RETRY, None) {
            tracing::warn!(%error, "cannot set a timer: a console port waits for the guest's next byte");
        }
    }
}

/// Why a queue's turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Served {
    /// The queue is empty.
    All,
    /// The queue has buffers that wait for something to be put in them.
    Waiting,
    /// There is more, but others have their turn first.
    Budget,
    /// The driver said something that other queues may act on.
    Heard,
    /// The host's end takes nothing now.
    HostFull,
}

/// Puts the host's bytes into the guest's buffers.
fn receive<'m>(
    queue: &mut AttachedQueue<'_, 'm>,
    state: &mut State,
    port: usize,
    buffers: &mut ChainBuffers<'m>,
) -> Result<Served> {
    let multiport = state.multiport;
    let Some(port) = state.ports.get_mut(port) else { return Ok(Served::Waiting) };
    // A port that the guest has not opened keeps its bytes (5.3.6.1).
    if multiport && !port.guest_open {
        return Ok(Served::Waiting);
    }
    for _ in 0..BUDGET {
        if !queue.has_next()? {
            return Ok(Served::All);
        }
        if port.input().is_empty() {
            return Ok(Served::Waiting);
        }
        let Some(chain) = queue.pop(buffers)? else { return Ok(Served::All) };
        let room = buffers.writable_len() as usize;
        let bytes = port.input();
        let bytes = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        buffers.write(bytes)?;
        let count = bytes.len();
        port.taken(count);
        queue.push_used(chain, u32::try_from(count).unwrap_or(u32::MAX))?;
    }
    Ok(Served::Budget)
}

/// Gives the guest's bytes to the host.
fn transmit<'m>(
    queue: &mut AttachedQueue<'_, 'm>,
    state: &mut State,
    port: usize,
    buffers: &mut ChainBuffers<'m>,
    partial: &mut Option<Partial>,
) -> Result<Served> {
    let Some(port) = state.ports.get_mut(port) else { return Ok(Served::Waiting) };
    if !port.flush_unsent() {
        return Ok(Served::HostFull);
    }
    if let Some(Partial { chain, mut rest }) = partial.take() {
        let done = port.output(&rest);
        if done < rest.len() {
            rest.drain(..done);
            *partial = Some(Partial { chain, rest });
            return Ok(Served::HostFull);
        }
        queue.push_used(chain, 0)?;
    }
    let mut budget = BUDGET * 1024;
    while budget > 0 {
        let Some(chain) = queue.pop(buffers)? else { return Ok(Served::All) };
        let length = buffers.readable_len() as usize;
        budget = budget.saturating_sub(length.max(1024));
        if let Some(rest) = pass_on(port, buffers)? {
            *partial = Some(Partial { chain, rest });
            return Ok(Served::HostFull);
        }
        queue.push_used(chain, 0)?;
    }
    Ok(Served::Budget)
}

/// Most bytes of one request; a driver that sends more in one piece loses the rest, for it would hold up everybody.
pub(super) const MAX_REQUEST: usize = 1 << 20;

/// Gives a request to the host's end. Returns what is left of it if that is full.
fn pass_on(port: &mut PortState, buffers: &mut ChainBuffers<'_>) -> Result<Option<Vec<u8>>> {
    let mut chunk = [0; CHUNK];
    let length = buffers.readable_len() as usize;
    let mut left = length.min(MAX_REQUEST);
    port.drop_bytes(length - left);
    while left > 0 {
        let take = left.min(CHUNK);
        let Some(part) = chunk.get_mut(..take) else { break };
        buffers.read(part)?;
        left -= take;
        let done = port.output(part);
        if done < take {
            let mut rest = part.get(done..).unwrap_or_default().to_vec();
            let from = rest.len();
            rest.resize(from + left, 0);
            buffers.read(rest.get_mut(from..).unwrap_or_default())?;
            return Ok(Some(rest));
        }
    }
    Ok(None)
}

/// Takes control messages of the driver.
fn from_driver<'m>(
    queue: &mut AttachedQueue<'_, 'm>,
    state: &mut State,
    buffers: &mut ChainBuffers<'m>,
) -> Result<Served> {
    for heard in 0..BUDGET {
        let Some(chain) = queue.pop(buffers)? else {
            return Ok(if heard == 0 { Served::All } else { Served::Heard });
        };
        let mut message = [0; MESSAGE_LEN];
        // A message that is too short says nothing.
        if buffers.read(&mut message).is_ok() {
            let State { size, ports, control, .. } = state;
            control.take(message, ports, *size);
        }
        queue.push_used(chain, 0)?;
    }
    Ok(Served::Budget)
}

/// Gives control messages to the driver.
fn to_driver<'m>(
    queue: &mut AttachedQueue<'_, 'm>,
    state: &mut State,
    buffers: &mut ChainBuffers<'m>,
) -> Result<Served> {
    while let Some(message) = state.control.next() {
        let Some(chain) = queue.pop(buffers)? else {
            state.control.put_back(message);
            return Ok(Served::All);
        };
        let room = buffers.writable_len() as usize;
        // A buffer that is too small gets nothing; the message is lost to this driver.
        let written =
            if room >= message.len() { buffers.write(&message).map(|()| message.len())? } else { 0 };
        queue.push_used(chain, u32::try_from(written).unwrap_or(0))?;
    }
    Ok(Served::Waiting)
}

impl Work for ConsoleWorker {
    fn sources(&self) -> Vec<Source> {
        let mut sources: Vec<Source> = vec![self.shared.wake.clone(), self.timer.clone()];
        sources.extend(self.lanes.iter().map(|lane| lane.active.kick.clone() as Source));
        sources.extend(self.shared.lock().ports.iter().filter_map(PortState::source));
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

impl Worker for ConsoleWorker {
    /// A request that the host's end took a part of is given back as done: the rest waits with the port.
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        let Self { mem, lanes, shared, .. } = *self;
        let view = mem.view();
        let mut state = shared.lock();
        lanes
            .into_iter()
            .map(|Lane { mut active, role, partial }| {
                if let (Some(Partial { chain, rest }), Role::Transmit(port)) = (partial, role) {
                    if let Some(port) = state.ports.get_mut(port) {
                        port.unsent = rest;
                    }
                    let given = active.queue.attach(&view).and_then(|mut queue| {
                        queue.push_used(chain, 0)?;
                        complete(&mut queue, &active.irq)
                    });
                    if let Err(error) = given {
                        tracing::debug!(%error, "a console request could not be given back");
                    }
                }
                active
            })
            .collect()
    }
}
