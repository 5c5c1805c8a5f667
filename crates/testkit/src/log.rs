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
    /// Edges that were on their way when the VM was saved from which this one was restored.
    restored: u64,
    taken: u64,
}

impl Line {
    fn is_pending(self) -> bool {
        self.taken < self.raised.saturating_add(self.restored)
    }
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
            Some(line) if line.is_pending() => {
                line.taken += 1;
                true
            }
            _ => false,
        }
    }

    /// The lines below 32 with an edge that nobody took yet, one bit each.
    pub(crate) fn pending(&self) -> u32 {
        let lines = self.lock();
        let pending = lines.iter().filter(|(_, line)| line.is_pending());
        pending.map(|(&gsi, _)| 1_u32.checked_shl(gsi).unwrap_or(0)).fold(0, |all, bit| all | bit)
    }

    /// Gives each of these lines an edge that nobody took yet, and that no device raised here.
    pub(crate) fn restore(&self, pending: u32) {
        let mut lines = self.lock();
        for gsi in (0..u32::BITS).filter(|gsi| pending & 1 << gsi != 0) {
            lines.entry(gsi).or_default().restored += 1;
        }
        drop(lines);
        self.changed.notify_all();
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
