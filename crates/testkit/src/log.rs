//! Counting interrupts: what a test looks at instead of a processor.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freestone_bus::Irq;

/// Edges by line, and somebody who may wait for them.
#[derive(Debug, Default)]
pub(crate) struct Edges {
    seen: Mutex<BTreeMap<u32, Line>>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone, Copy)]
struct Line {
    raised: u64,
    taken: u64,
}

impl Edges {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Line>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn raise(&self, gsi: u32) {
        self.lock().entry(gsi).or_default().raised += 1;
        self.changed.notify_all();
    }

    /// Edges on `gsi` so far.
    pub(crate) fn count(&self, gsi: u32) -> u64 {
        self.lock().get(&gsi).map_or(0, |l| l.raised)
    }

    /// Takes one edge that nobody took yet.
    pub(crate) fn take(&self, gsi: u32) -> bool {
        match self.lock().get_mut(&gsi) {
            Some(line) if line.taken < line.raised => {
                line.taken += 1;
                true
            }
            _ => false,
        }
    }

    /// Waits until `done`, looking again whenever an edge or a [`wake`](Self::wake) comes; `false` after `timeout`.
    pub(crate) fn wait(&self, timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            if done() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // `done` was asked without the lock, so an edge may be missed here: look again soon.
            let nap = left.min(Duration::from_millis(5));
            drop(self.changed.wait_timeout(self.lock(), nap).unwrap_or_else(PoisonError::into_inner));
        }
    }

    pub(crate) fn wake(&self) {
        self.changed.notify_all();
    }

    pub(crate) fn irq(self: &Arc<Self>, gsi: u32) -> Irq {
        let edges = Arc::clone(self);
        Irq::from_fn(move || edges.raise(gsi))
    }
}
