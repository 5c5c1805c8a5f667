//! Device work as a value: a step that somebody drives, and that comes back by move when it is stopped.
//!
//! A [`Work`] owns what it works with (queues, files). [`spawn`] hands it to whoever drives it: the event loop, a thread of
//! its own, or a test. [`Task::stop`] waits for the step in progress, which is bounded, and returns the work.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Whether a step left something undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is ready: wait for a source.
    Idle,
    /// The step ended at its bound: call again soon, other work first.
    More,
}

/// A file descriptor whose readiness makes a [`Work`] ready.
pub type Source = Arc<dyn AsRawFd + Send + Sync>;

/// A bounded step of a device.
pub trait Work: Send {
    /// What makes this work ready. Asked once, when the work is spawned.
    ///
    /// Sources are watched for edges: an eventfd need not be read, and everything else must be read until it would
    /// block (or the step must return [`Progress::More`]).
    fn sources(&self) -> Vec<Source>;

    /// Does what is ready, up to a bound of its own choosing. Called once at the start, and may be called with nothing to do.
    fn process(&mut self) -> Progress;
}

impl<W: Work + ?Sized> Work for Box<W> {
    fn sources(&self) -> Vec<Source> {
        (**self).sources()
    }

    fn process(&mut self) -> Progress {
        (**self).process()
    }
}

/// What a driver of work learns from one turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// As [`Progress::Idle`].
    Idle,
    /// As [`Progress::More`].
    More,
    /// The work was stopped and taken away: forget it.
    Gone,
}

/// The shared side of a [`Task`]: what a driver holds.
pub trait Pollable: Send + Sync {
    /// Runs one step if the work is still there.
    fn poll(&self) -> Turn;
}

/// Somebody who drives work.
pub trait Spawn: Send + Sync {
    /// Drives `work` from now on, first without waiting, then whenever one of `sources` is ready. Does not block.
    ///
    /// # Errors
    /// If the driver cannot take more.
    fn register(&self, work: Arc<dyn Pollable>, sources: Vec<Source>) -> io::Result<Registration>;
}

/// Keeps work registered with its driver; dropping it ends that.
pub struct Registration(Option<Box<dyn FnOnce() + Send>>);

impl Registration {
    /// A registration that calls `end` when it is dropped.
    pub fn new(end: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(end)))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            end();
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registration")
    }
}

struct Slot<W> {
    work: Mutex<Option<W>>,
    /// Somebody waits to take the work away. Its driver begins no other step: it would take the lock again before whoever waits for
    /// it has woken up, as often as the work has more to do.
    ends: AtomicBool,
}

impl<W> Slot<W> {
    fn lock(&self) -> MutexGuard<'_, Option<W>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<W> {
        self.ends.store(true, Ordering::Relaxed);
        self.lock().take()
    }
}

impl<W: Work> Pollable for Slot<W> {
    fn poll(&self) -> Turn {
        if self.ends.load(Ordering::Relaxed) {
            return Turn::Gone;
        }
        match self.lock().as_mut() {
            None => Turn::Gone,
            Some(work) => match work.process() {
                Progress::Idle => Turn::Idle,
                Progress::More => Turn::More,
            },
        }
    }
}

/// Running work: stop it to get it back.
///
/// Dropping a task ends its work and drops it.
pub struct Task<W> {
    slot: Arc<Slot<W>>,
    _registration: Registration,
}

impl<W> Task<W> {
    /// Waits for the step in progress and returns the work. No step runs afterwards.
    ///
    /// Returns `None` only if the work was taken already, which its owner cannot do twice.
    pub fn stop(self) -> Option<W> {
        self.slot.take()
    }

    /// Looks at the work between two steps.
    pub fn with<R>(&self, f: impl FnOnce(&mut W) -> R) -> Option<R> {
        self.slot.lock().as_mut().map(f)
    }
}

impl<W> Drop for Task<W> {
    fn drop(&mut self) {
        drop(self.slot.take());
    }
}

impl<W> fmt::Debug for Task<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Task")
    }
}

/// Hands `work` to `spawner`.
///
/// # Errors
/// As [`Spawn::register`]; the work is then dropped.
pub fn spawn<W: Work + 'static>(spawner: &dyn Spawn, work: W) -> io::Result<Task<W>> {
    let sources = work.sources();
    let slot = Arc::new(Slot { work: Mutex::new(Some(work)), ends: AtomicBool::new(false) });
    let registration = spawner.register(Arc::clone(&slot) as Arc<dyn Pollable>, sources)?;
    Ok(Task { slot, _registration: registration })
}

type Registered = Arc<Mutex<Vec<(u64, Arc<dyn Pollable>)>>>;

/// Drives work only when told: for tests, fuzzers and VMMs with an event loop of their own.
#[derive(Clone, Default)]
pub struct ManualSpawner {
    work: Registered,
    next: Arc<Mutex<u64>>,
}

impl ManualSpawner {
    /// A driver with no work.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives every piece of work turns until all are idle or `max_turns` are spent; returns the turns taken.
    pub fn run(&self, max_turns: usize) -> usize {
        let mut turns = 0;
        loop {
            let work: Vec<_> = self.lock().iter().map(|(_, w)| Arc::clone(w)).collect();
            let mut more = false;
            for w in work {
                if turns == max_turns {
                    return turns;
                }
                turns += 1;
                more |= w.poll() == Turn::More;
            }
            if !more {
                return turns;
            }
        }
    }

    /// Pieces of work registered now.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether nothing is registered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, Arc<dyn Pollable>)>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spawn for ManualSpawner {
    fn register(&self, work: Arc<dyn Pollable>, _sources: Vec<Source>) -> io::Result<Registration> {
        let id = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        self.lock().push((id, work));
        let list = Arc::clone(&self.work);
        Ok(Registration::new(move || {
            list.lock().unwrap_or_else(PoisonError::into_inner).retain(|(i, _)| *i != id);
        }))
    }
}

impl fmt::Debug for ManualSpawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManualSpawner").field("work", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Countdown(u32);

    impl Work for Countdown {
        fn sources(&self) -> Vec<Source> {
            Vec::new()
        }
        fn process(&mut self) -> Progress {
            self.0 = self.0.saturating_sub(1);
            if self.0 == 0 { Progress::Idle } else { Progress::More }
        }
    }

    #[test]
    fn stopped_work_comes_back_as_it_was_left() {
        let spawner = ManualSpawner::new();
        let task = spawn(&spawner, Countdown(5)).unwrap();
        assert_eq!(spawner.run(2), 2);
        assert_eq!(task.stop().unwrap().0, 3);
        assert!(spawner.is_empty());
        assert_eq!(spawner.run(10), 0);
    }

    #[test]
    fn the_manual_driver_runs_until_all_is_idle() {
        let spawner = ManualSpawner::new();
        let a = spawn(&spawner, Countdown(3)).unwrap();
        let b = spawn(&spawner, Countdown(1)).unwrap();
        assert_eq!(spawner.run(100), 6);
        assert_eq!(a.with(|w| w.0), Some(0));
        drop(b);
        assert_eq!(spawner.len(), 1);
    }
}
