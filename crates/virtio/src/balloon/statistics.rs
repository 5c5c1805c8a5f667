//! The statistics queue (5.5.6.3), which the device drives: it keeps the driver's buffer, and giving it back is the request for
//! new statistics.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use freestone_bus::{EFD_NONBLOCK, EventFd, Progress, Source, TimerFd, Work};
use freestone_memory::GuestMem;

use super::handle::{Shared, lock};
use crate::device::{ActiveQueue, Worker};
use crate::queue::{AttachedQueue, Chain, ChainBuffers, SpareBuffers};
use crate::{DeviceControl, Result};

/// Bytes of one statistic: a tag and a value.
const ENTRY: usize = 10;
/// Statistics of one buffer that are looked at; the specification knows ten, Linux sixteen.
const MAX_ENTRIES: usize = 64;
/// Shortest interval between two requests.
const SHORTEST: Duration = Duration::from_millis(1);

/// What a driver says of the guest's memory (5.5.6.4). It need not say everything, and can say anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BalloonStatistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Number of major page faults.
    pub major_faults: Option<u64>,
    /// Number of minor page faults.
    pub minor_faults: Option<u64>,
    /// Bytes not used for anything.
    pub free: Option<u64>,
    /// Bytes in all.
    pub total: Option<u64>,
    /// Bytes that new applications could have without swapping, by estimate.
    pub available: Option<u64>,
    /// Bytes that can be reclaimed quickly without I/O.
    pub caches: Option<u64>,
    /// Number of huge pages that were allocated.
    pub huge_pages_allocated: Option<u64>,
    /// Number of allocations of huge pages that failed.
    pub huge_pages_failed: Option<u64>,
    /// Number of times that something was killed because memory ran out. This and what follows is said by Linux since 6.12.
    pub oom_kills: Option<u64>,
    /// Number of allocations that had to wait.
    pub allocation_stalls: Option<u64>,
    /// Memory that was scanned in the background.
    pub async_scanned: Option<u64>,
    /// Memory that was scanned by those who needed some.
    pub direct_scanned: Option<u64>,
    /// Memory that was reclaimed in the background.
    pub async_reclaimed: Option<u64>,
    /// Memory that was reclaimed by those who needed some.
    pub direct_reclaimed: Option<u64>,
}

impl BalloonStatistics {
    fn parse(buffers: &mut ChainBuffers<'_>) -> Result<Self> {
        let mut statistics = Self::default();
        for _ in 0..MAX_ENTRIES {
            if (buffers.readable_len() as usize) < ENTRY {
                break;
            }
            let (mut tag, mut value) = ([0; 2], [0; 8]);
            buffers.read(&mut tag)?;
            buffers.read(&mut value)?;
            statistics.set(u16::from_le_bytes(tag), u64::from_le_bytes(value));
        }
        Ok(statistics)
    }

    /// All values, by their tags.
    pub(super) fn to_array(self) -> [Option<u64>; 16] {
        [
            self.swap_in,
            self.swap_out,
            self.major_faults,
            self.minor_faults,
            self.free,
            self.total,
            self.available,
            self.caches,
            self.huge_pages_allocated,
            self.huge_pages_failed,
            self.oom_kills,
            self.allocation_stalls,
            self.async_scanned,
            self.direct_scanned,
            self.async_reclaimed,
            self.direct_reclaimed,
        ]
    }

    /// The reverse of [`to_array`](Self::to_array).
    pub(super) fn from_array(values: [Option<u64>; 16]) -> Self {
        let mut statistics = Self::default();
        for (tag, value) in (0..).zip(values) {
            if let Some(value) = value {
                statistics.set(tag, value);
            }
        }
        statistics
    }

    fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            8 => &mut self.huge_pages_allocated,
            9 => &mut self.huge_pages_failed,
            10 => &mut self.oom_kills,
            11 => &mut self.allocation_stalls,
            12 => &mut self.async_scanned,
            13 => &mut self.direct_scanned,
            14 => &mut self.async_reclaimed,
            15 => &mut self.direct_reclaimed,
            _ => return,
        };
        *field = Some(value);
    }
}

/// Says when statistics are due.
#[derive(Debug)]
pub(super) struct Clock {
    timer: Mutex<TimerFd>,
    schedule: Mutex<Schedule>,
    requested: AtomicBool,
    poke: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Schedule {
    interval: Option<Duration>,
    next: Option<Instant>,
}

impl Clock {
    pub(super) fn new() -> io::Result<Self> {
        let timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        Ok(Self {
            timer: Mutex::new(timer),
            schedule: Mutex::default(),
            requested: AtomicBool::new(false),
            poke: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// Statistics are due now.
    pub(super) fn request(&self) {
        self.requested.store(true, Ordering::Release);
        // Fails only when the counter is full, and then the worker has been woken often enough.
        if let Err(error) = self.poke.write(1) {
            tracing::trace!(%error, "wake-up dropped");
        }
    }

    /// Whether a request waits for its turn.
    pub(super) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    pub(super) fn interval(&self) -> Option<Duration> {
        lock(&self.schedule).interval
    }

    pub(super) fn set_interval(&self, interval: Option<Duration>) -> io::Result<()> {
        let mut schedule = lock(&self.schedule);
        schedule.interval = interval.map(|interval| interval.max(SHORTEST));
        self.rearm(&mut schedule)
    }

    /// Sets the next time. The timer fires once: it would have to be read to fire again by itself, and reading it blocks.
    fn rearm(&self, schedule: &mut Schedule) -> io::Result<()> {
        let mut timer = lock(&self.timer);
        // Looked at before the timer is set, so that the time has come when the timer fires.
        schedule.next = schedule.interval.and_then(|interval| Instant::now().checked_add(interval));
        let set = match schedule.interval {
            Some(interval) => timer.reset(interval, None),
            None => timer.clear(),
        };
        set.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    /// Whether statistics are due; if so, they are due again only after the next request or interval.
    fn take_due(&self) -> bool {
        let mut schedule = lock(&self.schedule);
        let on_time = schedule.next.is_some_and(|next| next <= Instant::now());
        if on_time && let Err(error) = self.rearm(&mut schedule) {
            tracing::warn!(%error, "cannot set the timer of a balloon: no more statistics");
        }
        self.requested.swap(false, Ordering::AcqRel) || on_time
    }
}

/// The timer, as something to wait for.
impl AsRawFd for Clock {
    fn as_raw_fd(&self) -> RawFd {
        lock(&self.timer).as_raw_fd()
    }
}

/// Serves the statistics queue.
pub(super) struct StatisticsWorker {
    mem: GuestMem,
    active: ActiveQueue,
    control: DeviceControl,
    shared: Arc<Shared>,
    /// The driver's buffer, to be given back when statistics are due. Others that it may add wait in the queue.
    held: Option<Chain>,
    spare: SpareBuffers,
}

impl StatisticsWorker {
    pub(super) fn new(
        mem: GuestMem,
        active: ActiveQueue,
        control: DeviceControl,
        shared: Arc<Shared>,
    ) -> Self {
        Self { mem, active, control, shared, held: None, spare: SpareBuffers::new() }
    }

    fn step(&mut self) -> Result<()> {
        let view = self.mem.view();
        let mut queue = self.active.queue.attach(&view)?;
        let mut buffers = self.spare.take();
        loop {
            if self.held.is_none()
                && let Some(chain) = queue.pop(&mut buffers)?
            {
                let statistics = BalloonStatistics::parse(&mut buffers)?;
                *lock(&self.shared.statistics) = Some(statistics);
                self.shared.counters.statistics.fetch_add(1, Ordering::Relaxed);
                self.held = Some(chain);
            }
            // The host's clock, and not the driver, makes this loop go on.
            if self.held.is_some() && self.shared.clock.take_due() {
                give_back(&mut queue, &mut self.held, &self.active.irq)?;
                continue;
            }
            if !queue.enable_kicks()? || self.held.is_some() {
                break;
            }
        }
        self.spare = buffers.into_spare();
        Ok(())
    }
}

/// Gives the buffer back, if there is one.
fn give_back(
    queue: &mut AttachedQueue<'_, '_>,
    held: &mut Option<Chain>,
    irq: &freestone_bus::Irq,
) -> Result<()> {
    let Some(chain) = held.take() else { return Ok(()) };
    queue.push_used(chain, 0)?;
    queue.publish()?;
    if queue.needs_interrupt()?
        && let Err(error) = irq.trigger()
    {
        tracing::warn!(%error, "cannot interrupt the guest");
    }
    Ok(())
}

impl Work for StatisticsWorker {
    fn sources(&self) -> Vec<Source> {
        let clock = &self.shared.clock;
        vec![self.active.kick.clone(), Arc::clone(clock) as Source, Arc::clone(&clock.poke) as Source]
    }

    fn process(&mut self) -> Progress {
        if !self.control.needs_reset()
            && let Err(error) = self.step()
        {
            self.control.fault(&error);
        }
        Progress::Idle
    }
}

impl Worker for StatisticsWorker {
    /// The buffer goes back to the driver, or it would be forgotten and there would be no statistics after a pause.
    fn into_queues(mut self: Box<Self>) -> Vec<ActiveQueue> {
        if self.held.is_some() && !self.control.needs_reset() {
            let view = self.mem.view();
            let attached = self.active.queue.attach(&view);
            let given =
                attached.and_then(|mut queue| give_back(&mut queue, &mut self.held, &self.active.irq));
            if let Err(error) = given {
                self.control.fault(&error);
            }
        }
        vec![self.active]
    }
}
