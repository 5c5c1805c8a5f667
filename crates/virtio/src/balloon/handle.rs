//! The host's side of a balloon, and what it shares with the workers.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::statistics::{BalloonStatistics, Clock};
use super::{PAGE_SIZE, feature};
use crate::{DeviceControl, Error, Result};

/// `VIRTIO_BALLOON_CMD_ID_STOP`: no hints are wanted now (5.5.6.5).
pub(super) const STOP: u32 = 0;
/// `VIRTIO_BALLOON_CMD_ID_DONE`: no hints are wanted, and the hinted pages may be used.
pub(super) const DONE: u32 = 1;

/// How far a run of free page hinting is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum HintRun {
    /// None was asked for, or the last one is over.
    #[default]
    Idle,
    /// Asked for; the driver has not begun, or has begun with something else.
    Requested,
    /// The driver sends hints.
    Running,
    /// The driver has no more hints. It waits for [`BalloonHandle::stop_hinting`] to use the pages again.
    Finished,
}

/// What was said about a run of free page hinting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct HintingStatus {
    /// How far it is.
    pub run: HintRun,
    /// The last command of the host: 0 before the first, 1 when the driver may use its pages, else the number of a run.
    pub host_command: u32,
    /// The last command of the driver: 0 when it has no more hints, else the number of a run. `None` before the first.
    pub guest_command: Option<u32>,
}

/// The run of hints. Pages are given back with this locked, so that none is after [`DONE`] is shown.
#[derive(Debug, Default)]
pub(super) struct Hinting {
    pub(super) run: HintRun,
    pub(super) last_id: u32,
    /// When the driver has no more hints, it waits for the host.
    pub(super) hold: bool,
    guest_command: Option<u32>,
}

/// Counts what a balloon did.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) inflated: AtomicU64,
    pub(super) deflated: AtomicU64,
    pub(super) reported: AtomicU64,
    pub(super) hinted: AtomicU64,
    pub(super) ignored: AtomicU64,
    pub(super) statistics: AtomicU64,
    pub(super) errors: AtomicU64,
}

/// What a balloon did so far, in bytes where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BalloonCounts {
    /// Given back to the host because the driver inflated the balloon.
    pub inflated: u64,
    /// Named in the deflate queue.
    pub deflated: u64,
    /// Given back because the driver reported it as free.
    pub reported: u64,
    /// Given back because the driver hinted at it.
    pub hinted: u64,
    /// Named for inflation, and no memory that can be given back.
    pub ignored: u64,
    /// Number of buffers with statistics.
    pub statistics: u64,
    /// Number of times that the host refused to take memory.
    pub errors: u64,
}

/// What device, workers and handles share.
#[derive(Debug)]
pub(super) struct Shared {
    features: u64,
    /// The fields of the configuration space.
    pub(super) target: AtomicU32,
    pub(super) actual: AtomicU32,
    pub(super) command: AtomicU32,
    pub(super) poison: AtomicU32,
    hinting: Mutex<Hinting>,
    control: Mutex<Option<DeviceControl>>,
    pub(super) statistics: Mutex<Option<BalloonStatistics>>,
    pub(super) clock: Arc<Clock>,
    pub(super) counters: Counters,
}

impl Shared {
    pub(super) fn new(features: u64) -> io::Result<Self> {
        Ok(Self {
            features,
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            command: AtomicU32::new(STOP),
            poison: AtomicU32::new(0),
            hinting: Mutex::default(),
            control: Mutex::default(),
            statistics: Mutex::default(),
            clock: Arc::new(Clock::new()?),
            counters: Counters::default(),
        })
    }

    pub(super) fn started(&self, control: &DeviceControl) {
        *lock(&self.control) = Some(control.clone());
    }

    /// The driver is gone: what it wrote is void, what the host asked for stays.
    pub(super) fn reset(&self) {
        *lock(&self.control) = None;
        *lock(&self.statistics) = None;
        self.actual.store(0, Ordering::Release);
        self.poison.store(0, Ordering::Release);
        let mut hinting = self.hinting();
        (hinting.run, hinting.guest_command) = (HintRun::Idle, None);
        drop(hinting);
        self.command.store(STOP, Ordering::Release);
    }

    pub(super) fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        self.target.store(pages, Ordering::Release);
    }

    /// Tells the driver that the configuration space changed, if there is a driver.
    fn changed(&self) {
        if let Some(control) = &*lock(&self.control) {
            control.config_changed();
        }
    }

    pub(super) fn hinting(&self) -> MutexGuard<'_, Hinting> {
        lock(&self.hinting)
    }

    /// The driver sent a command ID with its hints.
    pub(super) fn hint_command(&self, id: u32) {
        let mut hinting = self.hinting();
        hinting.guest_command = Some(id);
        if hinting.run == HintRun::Idle {
            return;
        }
        if id == self.command.load(Ordering::Acquire) {
            hinting.run = HintRun::Running;
        } else if id == STOP && hinting.run == HintRun::Running && hinting.hold {
            hinting.run = HintRun::Finished;
        } else if id == STOP && hinting.run == HintRun::Running {
            // It has no more. What it sent is given back already, so it may use its pages.
            self.end_hinting(hinting);
        } else {
            // Hints of another run, which are ignored.
            hinting.run = HintRun::Requested;
        }
    }

    fn end_hinting(&self, mut hinting: MutexGuard<'_, Hinting>) {
        hinting.run = HintRun::Idle;
        self.command.store(DONE, Ordering::Release);
        drop(hinting);
        self.changed();
    }

    /// Adds what was given back to `counter`. What the host refuses is said once and counted.
    pub(super) fn count(&self, counter: &AtomicU64, given_back: freestone_memory::Result<u64>) -> u64 {
        match given_back {
            Ok(bytes) => {
                counter.fetch_add(bytes, Ordering::Relaxed);
                bytes
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                if self.counters.errors.fetch_add(1, Ordering::Relaxed) == 0 {
                    tracing::warn!(%error, source, "the host does not take memory back; not said again");
                }
                0
            }
        }
    }
}

/// No state here is left half changed by a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's side of a [`Balloon`](super::Balloon): cheap to clone, to be used from any thread, at any time.
#[derive(Debug, Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Asks the driver for `bytes` of the guest's memory, rounded down to 4 KiB, and at most 16 TiB. The driver gives what it
    /// can, in its own time: see [`actual`](Self::actual).
    pub fn set_target(&self, bytes: u64) {
        self.shared.set_target(bytes);
        self.shared.changed();
    }

    /// Bytes asked for.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target.load(Ordering::Acquire)) * PAGE_SIZE
    }

    /// Bytes in the balloon, as the driver says. 0 after a reset.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::Acquire)) * PAGE_SIZE
    }

    /// What the driver said of the guest's memory last. `None` before the first time, and after a reset.
    pub fn statistics(&self) -> Option<BalloonStatistics> {
        *lock(&self.shared.statistics)
    }

    /// Asks for statistics now. The answer is in [`statistics`](Self::statistics) once [`BalloonCounts::statistics`] has risen;
    /// there is none while the driver has no buffer in the queue.
    pub fn request_statistics(&self) {
        self.shared.clock.request();
    }

    /// Asks for statistics every `interval`, at least 1 ms, from now on. `None` ends that.
    ///
    /// # Errors
    /// [`Error::Io`] if the timer cannot be set.
    pub fn set_statistics_interval(&self, interval: Option<Duration>) -> Result<()> {
        self.shared.clock.set_interval(interval).map_err(Error::io("set the timer of a balloon"))
    }

    /// The interval, if there is one.
    pub fn statistics_interval(&self) -> Option<Duration> {
        self.shared.clock.interval()
    }

    /// Whether the device offers statistics.
    pub fn has_statistics(&self) -> bool {
        self.shared.features & feature::STATS_VQ != 0
    }

    /// Whether the device offers free page hinting.
    pub fn has_hinting(&self) -> bool {
        self.shared.features & feature::FREE_PAGE_HINT != 0
    }

    /// Asks the driver to name its free pages, once. A run that goes on is begun anew. When the driver has no more, it may use the
    /// pages again at once.
    ///
    /// # Errors
    /// [`Error::Config`] if the device does not offer it.
    pub fn start_hinting(&self) -> Result<()> {
        self.begin_hinting(false)
    }

    /// The same, but when the driver has no more, it keeps the pages until [`stop_hinting`](Self::stop_hinting).
    ///
    /// # Errors
    /// As [`start_hinting`](Self::start_hinting).
    pub fn start_hinting_and_hold(&self) -> Result<()> {
        self.begin_hinting(true)
    }

    fn begin_hinting(&self, hold: bool) -> Result<()> {
        if self.shared.features & feature::FREE_PAGE_HINT == 0 {
            return Err(Error::Config {
                device: "virtio-balloon".to_owned(),
                reason: "free page hinting is not offered",
            });
        }
        let mut hinting = self.shared.hinting();
        // The two lowest numbers mean something else.
        hinting.last_id = hinting.last_id.checked_add(1).unwrap_or(0).max(DONE + 1);
        (hinting.run, hinting.hold) = (HintRun::Requested, hold);
        self.shared.command.store(hinting.last_id, Ordering::Release);
        drop(hinting);
        self.shared.changed();
        Ok(())
    }

    /// Ends a run of hints. When this returns, no page is given back because of a hint.
    pub fn stop_hinting(&self) {
        let hinting = self.shared.hinting();
        if hinting.run != HintRun::Idle {
            self.shared.end_hinting(hinting);
        }
    }

    /// How far the run of hints is.
    pub fn hint_run(&self) -> HintRun {
        self.shared.hinting().run
    }

    /// What was said about the run of hints.
    pub fn hinting_status(&self) -> HintingStatus {
        let hinting = self.shared.hinting();
        HintingStatus {
            run: hinting.run,
            host_command: self.shared.command.load(Ordering::Acquire),
            guest_command: hinting.guest_command,
        }
    }

    /// What the balloon did so far. The counts are not taken at one instant.
    pub fn counts(&self) -> BalloonCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { inflated, deflated, reported, hinted, ignored, statistics, errors } =
            &self.shared.counters;
        BalloonCounts {
            inflated: get(inflated),
            deflated: get(deflated),
            reported: get(reported),
            hinted: get(hinted),
            ignored: get(ignored),
            statistics: get(statistics),
            errors: get(errors),
        }
    }
}
