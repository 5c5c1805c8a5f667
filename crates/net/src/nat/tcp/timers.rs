//! [`Timers`]: one deadline for each flow.

use std::collections::BTreeSet;
use std::time::Instant;

/// Deadlines of flows, by their index. Each has one at most, so all are bounded by the number of flows.
#[derive(Debug, Default)]
pub(super) struct Timers {
    order: BTreeSet<(Instant, u32)>,
}

impl Timers {
    /// Wants `index` to be called at `deadline` or before. `current` is what it waits for now.
    ///
    /// A later deadline changes nothing: the call comes early, and the flow asks again. So what restarts a timer for each segment
    /// costs nothing.
    pub(super) fn set(&mut self, index: u32, current: &mut Option<Instant>, deadline: Instant) {
        if let Some(current) = *current {
            if current <= deadline {
                return;
            }
            self.order.remove(&(current, index));
        }
        self.order.insert((deadline, index));
        *current = Some(deadline);
    }

    /// Forgets the deadline of `index`.
    pub(super) fn clear(&mut self, index: u32, current: &mut Option<Instant>) {
        if let Some(current) = current.take() {
            self.order.remove(&(current, index));
        }
    }

    /// The next deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        self.order.first().map(|(deadline, _)| *deadline)
    }

    /// Takes the next one that is due; the flow's `current` is no more.
    pub(super) fn due(&mut self, now: Instant) -> Option<u32> {
        let first = *self.order.first().filter(|(deadline, _)| *deadline <= now)?;
        self.order.remove(&first);
        Some(first.1)
    }
}
