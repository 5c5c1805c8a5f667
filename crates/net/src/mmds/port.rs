//! [`MmdsPort`] and its endpoints: what is for the service is taken out of the frames that pass.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::stack::{MAX_FRAME, Stack};
use super::store::count;
use super::wire::{self, DECIDES};
use super::{MmdsConfig, MmdsStore};
use crate::{
    Endpoint, Error, Frame, Offloads, Port, PortInfo, PortStats, Received, Result, Sent, Setup, Source,
    VnetHeader,
};

/// The MTU where a port knows none.
const MTU: u16 = 1500;
/// No time.
const NEVER: u64 = u64::MAX;

/// A port with the metadata service in front of it.
///
/// Frames of the service are not in the [`stats`](Port::stats) of the port, but in [`MmdsStore::counts`].
///
/// ```
/// # #[cfg(feature = "switch")]
/// # fn main() -> freestone_net::Result<()> {
/// use freestone_net::mmds::{MmdsConfig, MmdsPort, MmdsStore, MmdsVersion};
/// use freestone_net::switch::{PortOptions, Switch};
/// use serde_json::json;
///
/// let store = MmdsStore::default();
/// store.put(json!({"latest": {"meta-data": {"ami-id": "ami-1"}}}))?;
/// let inner = Box::new(Switch::default().port(PortOptions::default())?);
/// let port = MmdsPort::new(inner, MmdsConfig::new().version(MmdsVersion::V2), store.clone())?;
/// # drop(port);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "switch"))]
/// # fn main() {}
/// ```
#[derive(Debug)]
pub struct MmdsPort {
    inner: Box<dyn Port>,
    shared: Arc<Shared>,
}

/// What the port and its endpoints share.
struct Shared {
    config: MmdsConfig,
    store: MmdsStore,
    mtu: u16,
    /// Frames for the machine wait in the stack.
    ready: AtomicBool,
    /// When the stack has something to do, in nanoseconds since `epoch`.
    deadline: AtomicU64,
    epoch: Instant,
    stack: Mutex<Stack>,
    /// Expires at `deadline`, or before it.
    timer: OwnedFd,
    /// Another endpoint than the first made frames.
    wake: OwnedFd,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mmds").field("config", &self.config).finish_non_exhaustive()
    }
}

impl MmdsPort {
    /// Puts the service in front of `inner`.
    ///
    /// # Errors
    /// As [`MmdsConfig::check`]; [`Error::Io`] if the host gives no timer.
    pub fn new(inner: Box<dyn Port>, config: MmdsConfig, store: MmdsStore) -> Result<Self> {
        config.check()?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)
            .map_err(|error| Error::io("make a timer of a metadata service")(error.into()))?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| Error::io("make an event of a metadata service")(error.into()))?;
        let (mtu, epoch) = (inner.info().mtu.unwrap_or(MTU), Instant::now());
        let stack = Mutex::new(Stack::new(config.clone(), store.clone(), mtu, epoch));
        let (ready, deadline) = (AtomicBool::new(false), AtomicU64::new(NEVER));
        let shared = Shared { config, store, mtu, ready, deadline, epoch, stack, timer, wake };
        Ok(Self { inner, shared: Arc::new(shared) })
    }

    /// What it says.
    pub fn store(&self) -> &MmdsStore {
        &self.shared.store
    }

    /// How it presents itself.
    pub fn config(&self) -> &MmdsConfig {
        &self.shared.config
    }
}

impl Shared {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on the stack, then shows what came of it.
    fn work<T>(&self, now: Instant, work: impl FnOnce(&mut Stack) -> T) -> T {
        let mut stack = self.stack();
        let result = work(&mut stack);
        let deadline = stack.deadline(now).map_or(NEVER, |at| self.nanos(at));
        let before = self.deadline.load(Ordering::Relaxed);
        // A timer that expires too early does no harm, and mostly the time only moves away.
        if deadline != NEVER && (before > deadline || before <= self.nanos(now)) {
            self.deadline.store(deadline, Ordering::Release);
            self.arm(deadline.saturating_sub(self.nanos(now)));
        } else if deadline == NEVER && before <= self.nanos(now) {
            self.deadline.store(NEVER, Ordering::Release);
        }
        self.ready.store(stack.waiting().is_some(), Ordering::Release);
        result
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(NEVER)
    }

    fn arm(&self, nanos: u64) {
        let wait = Timespec::try_from(Duration::from_nanos(nanos.max(1)));
        let interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok(value) = wait.map(|it_value| Itimerspec { it_interval: interval, it_value }) else { return };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value) {
            tracing::debug!(%error, "cannot set the timer of a metadata service");
        }
    }
}

impl Port for MmdsPort {
    fn info(&self) -> PortInfo {
        self.inner.info()
    }

    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        let ends = self.inner.open(setup)?;
        let wrap = |(index, inner)| -> Box<dyn Endpoint> {
            let (shared, address) = (Arc::clone(&self.shared), self.shared.config.ipv4.octets());
            Box::new(MmdsEndpoint { inner, shared, address, first: index == 0, refused: false })
        };
        Ok(ends.into_iter().enumerate().map(wrap).collect())
    }

    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        self.inner.set_receive(receive)
    }

    fn set_active_pairs(&mut self, pairs: u16) -> Result<()> {
        self.inner.set_active_pairs(pairs)
    }

    fn reset(&mut self) {
        let (shared, now) = (&self.shared, Instant::now());
        shared.work(now, |stack| {
            *stack = Stack::new(shared.config.clone(), shared.store.clone(), shared.mtu, shared.epoch);
        });
        self.inner.reset();
    }

    fn stats(&self) -> Arc<PortStats> {
        self.inner.stats()
    }
}

/// One pair of queues. The first one gets the service's frames: it is always looked at.
struct MmdsEndpoint {
    inner: Box<dyn Endpoint>,
    shared: Arc<Shared>,
    address: [u8; 4],
    first: bool,
    /// The frame that was last found to need more room is the service's.
    refused: bool,
}

impl MmdsEndpoint {
    fn is_ready(&self) -> bool {
        self.first && self.shared.ready.load(Ordering::Acquire)
    }

    /// A frame for the service.
    #[cold]
    fn serve(&self, frame: &Frame<'_, '_>) {
        let mut bytes = vec![0; frame.len().min(MAX_FRAME)];
        let len = frame.read_at(0, &mut bytes);
        bytes.truncate(len);
        let now = Instant::now();
        self.shared.work(now, |stack| stack.input(now, bytes));
        if !self.first && self.shared.ready.load(Ordering::Acquire) {
            // Fails only when the counter is full, and then it was said often enough.
            let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        }
    }

    /// Gives the machine a frame of the service.
    #[cold]
    fn receive_own(&mut self, room: &Frame<'_, '_>) -> Option<Received> {
        let shared = &self.shared;
        let now = Instant::now();
        let needs = shared.stack().waiting()?;
        if needs > room.len() {
            self.refused = true;
            return Some(Received::NeedsRoom(needs));
        }
        let frame = shared.work(now, |stack| stack.take(now))?;
        count(&shared.store.counters().tx_frames);
        shared.store.counters().tx_bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        Some(Received::Frame(room.write_at(0, &frame), VnetHeader::default()))
    }
}

impl Endpoint for MmdsEndpoint {
    fn sources(&self) -> Vec<Source> {
        let mut sources = self.inner.sources();
        if self.first {
            sources.push(Arc::new(Descriptor(Arc::clone(&self.shared), |shared| &shared.timer)));
            sources.push(Arc::new(Descriptor(Arc::clone(&self.shared), |shared| &shared.wake)));
        }
        sources
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        let mut start = [0; DECIDES];
        let len = frame.read_at(0, &mut start);
        if wire::kind(self.address, start.get(..len).unwrap_or_default()).is_some() {
            // Checksums that the machine left undone are not looked at, and a segment of TCP may have any size.
            self.serve(&frame);
            return Sent::Done;
        }
        self.inner.transmit(header, frame)
    }

    fn flush(&mut self) {
        self.inner.flush();
        if self.first {
            let deadline = self.shared.deadline.load(Ordering::Acquire);
            if deadline != NEVER {
                let now = Instant::now();
                if self.shared.nanos(now) >= deadline {
                    self.shared.work(now, |stack| stack.poll(now));
                }
            }
        }
    }

    fn waiting(&mut self) -> Option<usize> {
        if self.is_ready()
            && let Some(len) = self.shared.stack().waiting()
        {
            return Some(len);
        }
        self.inner.waiting()
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        self.refused = false;
        if self.is_ready()
            && let Some(received) = self.receive_own(&room)
        {
            return received;
        }
        self.inner.receive(room)
    }

    fn drop_next(&mut self) {
        if std::mem::take(&mut self.refused) {
            let now = Instant::now();
            self.shared.work(now, |stack| stack.take(now));
        } else {
            self.inner.drop_next();
        }
    }
}

/// A descriptor of the port as a source.
struct Descriptor(Arc<Shared>, fn(&Shared) -> &OwnedFd);

impl std::os::fd::AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        (self.1)(&self.0).as_raw_fd()
    }
}
