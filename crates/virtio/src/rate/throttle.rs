//! [`Throttle`]: a [`Meter`] that workers share, with a clock and timers.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use freestone_bus::{Source, TimerFd};

use super::{Meter, RateLimiter};

/// A worker that must wait longer looks again after this time.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// The rate limit of a device: shared by its workers, changeable at any time. Clones are the same.
#[derive(Debug, Clone)]
pub struct Throttle(Arc<Shared>);

struct Shared {
    /// Whether there is a limit: all that a worker looks at where there is none.
    limited: AtomicBool,
    /// Times that a worker had to wait.
    waits: AtomicU64,
    epoch: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    limiter: Option<RateLimiter>,
    meter: Option<Meter>,
    timers: Vec<Weak<Timer>>,
}

impl Throttle {
    /// A throttle with this limit, or none.
    pub fn new(limiter: Option<RateLimiter>) -> Self {
        let throttle = Self(Arc::new(Shared {
            limited: AtomicBool::new(false),
            waits: AtomicU64::new(0),
            epoch: Instant::now(),
            state: Mutex::default(),
        }));
        throttle.set(limiter);
        throttle
    }

    /// Changes the limit. Buckets begin full; workers that wait go on.
    pub fn set(&self, limiter: Option<RateLimiter>) {
        let limiter = limiter.filter(|limiter| *limiter != RateLimiter::default());
        let mut state = self.0.lock();
        state.limiter = limiter;
        state.meter = limiter.map(|limiter| Meter::new(&limiter, self.0.now()));
        self.0.limited.store(limiter.is_some(), Ordering::Release);
        // Under the lock: whoever decided by the old limit to wait has set its timer already.
        state.timers.retain(|timer| timer.upgrade().map(|timer| timer.arm(Duration::ZERO)).is_some());
    }

    /// The limit, if there is one.
    pub fn limiter(&self) -> Option<RateLimiter> {
        self.0.lock().limiter
    }

    /// Times that a worker had to wait.
    pub fn waits(&self) -> u64 {
        self.0.waits.load(Ordering::Relaxed)
    }

    /// A worker's side.
    ///
    /// # Errors
    /// If the host gives no timer.
    pub fn gate(&self) -> io::Result<Gate> {
        let timer = Arc::new(Timer(Mutex::new(TimerFd::new()?)));
        let mut state = self.0.lock();
        state.timers.retain(|timer| timer.strong_count() > 0);
        state.timers.push(Arc::downgrade(&timer));
        Ok(Gate { throttle: Arc::clone(&self.0), timer })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttle").field("limiter", &self.lock().limiter).finish_non_exhaustive()
    }
}

/// One worker's side of a [`Throttle`]. Where there is no limit, a question costs one load.
#[derive(Debug)]
pub struct Gate {
    throttle: Arc<Shared>,
    timer: Arc<Timer>,
}

impl Gate {
    /// Becomes ready when the worker may go on after it was told to wait. It is for edges and need not be read.
    pub fn source(&self) -> Source {
        Arc::clone(&self.timer) as Source
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.throttle.limited.load(Ordering::Acquire)
    }

    /// Whether the worker may take another request. If not, [`source`](Self::source) will say when.
    pub fn open(&self) -> bool {
        !self.is_limited() || self.open_by_meter()
    }

    #[cold]
    fn open_by_meter(&self) -> bool {
        let now = self.throttle.now();
        let mut state = self.throttle.lock();
        let wait = state.meter.as_mut().map_or(0, |meter| meter.wait(now));
        if wait == 0 {
            return true;
        }
        self.throttle.waits.fetch_add(1, Ordering::Relaxed);
        // A limit that cannot be kept is better than a device that never goes on.
        !self.timer.arm(Duration::from_nanos(wait))
    }

    /// Pays for one request with this many bytes of data.
    pub fn charge(&self, bytes: u64) {
        if self.is_limited() {
            let now = self.throttle.now();
            if let Some(meter) = &mut self.throttle.lock().meter {
                meter.charge(now, bytes, 1);
            }
        }
    }
}

/// A timer that can be set through a shared reference. Setting it also takes back that it has expired, so nobody reads it.
#[derive(Debug)]
struct Timer(Mutex<TimerFd>);

impl Timer {
    /// Expires once after `wait`. Returns whether it will.
    fn arm(&self, wait: Duration) -> bool {
        let wait = wait.clamp(Duration::from_nanos(1), LONGEST_WAIT);
        let armed = self.0.lock().unwrap_or_else(PoisonError::into_inner).reset(wait, None);
        if let Err(error) = &armed {
            tracing::warn!(%error, "cannot set the timer of a rate limit");
        }
        armed.is_ok()
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::super::TokenBucket;
    use super::*;

    fn one_an_hour() -> Option<RateLimiter> {
        Some(RateLimiter::new().ops(TokenBucket::new(1, Duration::from_secs(3600))))
    }

    fn expired(gate: &Gate) -> bool {
        // A timer that was set and is no longer armed has expired.
        !gate.timer.0.lock().unwrap().is_armed().unwrap()
    }

    #[test]
    fn without_a_limit_the_gate_is_open() {
        let throttle = Throttle::new(Some(RateLimiter::new()));
        let gate = throttle.gate().unwrap();
        gate.charge(u64::MAX);
        assert!(gate.open() && !gate.is_limited());
        assert_eq!((throttle.limiter(), throttle.waits()), (None, 0));
    }

    #[test]
    fn workers_share_the_tokens() {
        let throttle = Throttle::new(one_an_hour());
        let (a, b) = (throttle.gate().unwrap(), throttle.gate().unwrap());
        assert!(a.open() && b.open());
        a.charge(0);
        assert!(!a.open() && !b.open());
        assert!(!expired(&a) && !expired(&b));
        assert_eq!(throttle.waits(), 2);
    }

    #[test]
    fn a_change_wakes_those_who_wait() {
        let throttle = Throttle::new(one_an_hour());
        let gate = throttle.gate().unwrap();
        gate.charge(0);
        assert!(!gate.open());
        throttle.set(None);
        assert!(gate.open());
        while !expired(&gate) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn gates_that_are_gone_are_forgotten() {
        let throttle = Throttle::new(None);
        for _ in 0..10 {
            throttle.gate().unwrap();
        }
        assert_eq!(throttle.0.lock().timers.len(), 1);
        throttle.set(one_an_hour());
        assert!(throttle.0.lock().timers.is_empty());
    }
}
