//! [`ThreadSpawner`]: work on a thread of its own, for work that blocks.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::work::{Pollable, Registration, Source, Spawn, Turn};
use crate::{Error, EventLoop, LoopHandle, Result};

/// Drives work on one thread that it owns, by an [`EventLoop`].
///
/// All work of one spawner takes turns: a step that blocks, as reads of a disk do, holds up the others of the same spawner
/// and nobody else. Give each device that blocks a spawner of its own.
///
/// Dropping it waits for the step in progress and ends the thread. Tasks that are left get no more turns, and their work can
/// still be taken back by [`Task::stop`](crate::Task::stop). Work that panics gets no more turns either; its thread goes on
/// with the others.
pub struct ThreadSpawner {
    handle: LoopHandle,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ThreadSpawner {
    /// Starts a thread. Linux shows the first 15 bytes of `name`.
    ///
    /// # Errors
    /// [`Error::Io`] if the host gives no thread, or no epoll or eventfd descriptor.
    pub fn new(name: &str) -> Result<Self> {
        let mut event_loop = EventLoop::new()?;
        let handle = event_loop.handle();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            // A NUL byte would end the name, and the standard library panics on it.
            .name(name.replace('\0', ""))
            .spawn(move || {
                if let Err(error) = event_loop.run_until(|| stopped.load(Ordering::Acquire)) {
                    tracing::error!(%error, "the event loop of a thread has ended");
                }
            })
            .map_err(Error::io("start a thread for work"))?;
        Ok(Self { handle, stop, thread: Some(thread) })
    }
}

impl Spawn for ThreadSpawner {
    fn register(&self, work: Arc<dyn Pollable>, sources: Vec<Source>) -> io::Result<Registration> {
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the thread for work has ended"));
        }
        self.handle.register(Arc::new(Contained { work, panicked: AtomicBool::new(false) }), sources)
    }
}

impl Drop for ThreadSpawner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.handle.wake() {
            // It cannot be told to end: do not wait for it.
            return tracing::warn!(%error, "cannot wake the thread for work");
        }
        let Some(thread) = self.thread.take() else { return };
        // The last owner may be work of this thread: then the thread ends by itself after this step.
        if thread.thread().id() != thread::current().id() && thread.join().is_err() {
            tracing::error!("the thread for work has panicked");
        }
    }
}

impl fmt::Debug for ThreadSpawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.thread.as_ref().and_then(|thread| thread.thread().name());
        f.debug_struct("ThreadSpawner").field("thread", &name).finish_non_exhaustive()
    }
}

/// Work whose panic ends at this wall.
struct Contained {
    work: Arc<dyn Pollable>,
    panicked: AtomicBool,
}

impl Pollable for Contained {
    fn poll(&self) -> Turn {
        if self.panicked.load(Ordering::Relaxed) {
            return Turn::Gone;
        }
        // Nobody looks at what the panic left half done, but the owner who takes the work back.
        catch_unwind(AssertUnwindSafe(|| self.work.poll())).unwrap_or_else(|_| {
            tracing::error!("work has panicked and gets no more turns");
            self.panicked.store(true, Ordering::Relaxed);
            Turn::Gone
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::{EFD_NONBLOCK, EventFd, Progress, Work, spawn};

    const LONG: Duration = Duration::from_secs(20);

    /// Tells the name of its thread at each turn; panics when told to.
    struct Teller {
        kick: Arc<EventFd>,
        told: Sender<Option<String>>,
        panics: bool,
    }

    impl Work for Teller {
        fn sources(&self) -> Vec<Source> {
            vec![Arc::clone(&self.kick) as Source]
        }
        fn process(&mut self) -> Progress {
            self.told.send(thread::current().name().map(str::to_owned)).unwrap();
            assert!(!self.panics, "as the test asks for");
            Progress::Idle
        }
    }

    fn teller(panics: bool) -> (Teller, Arc<EventFd>, Receiver<Option<String>>) {
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (told, turns) = channel();
        (Teller { kick: Arc::clone(&kick), told, panics }, kick, turns)
    }

    #[test]
    fn work_gets_its_turns_on_the_thread_of_that_name() {
        let spawner = ThreadSpawner::new("disk\0 0").unwrap();
        let (work, kick, turns) = teller(false);
        let _task = spawn(&spawner, work).unwrap();
        assert_eq!(turns.recv_timeout(LONG).unwrap().as_deref(), Some("disk 0"));
        kick.write(1).unwrap();
        assert_eq!(turns.recv_timeout(LONG).unwrap().as_deref(), Some("disk 0"));
    }

    #[test]
    fn work_that_outlives_its_spawner_gets_no_turn_and_comes_back() {
        let spawner = ThreadSpawner::new("worker").unwrap();
        let (work, kick, turns) = teller(false);
        let task = spawn(&spawner, work).unwrap();
        turns.recv_timeout(LONG).unwrap();
        drop(spawner);
        kick.write(1).unwrap();
        assert_eq!(turns.try_iter().count(), 0);
        assert!(task.stop().is_some());
        assert_eq!(turns.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
    }

    #[test]
    fn panic_of_one_work_leaves_the_others_their_turns_and_hangs_nobody() {
        let spawner = ThreadSpawner::new("worker").unwrap();
        let (bad, bad_kick, bad_turns) = teller(true);
        let bad = spawn(&spawner, bad).unwrap();
        bad_turns.recv_timeout(LONG).unwrap();
        let (good, kick, turns) = teller(false);
        let _good = spawn(&spawner, good).unwrap();
        turns.recv_timeout(LONG).unwrap();
        bad_kick.write(1).unwrap();
        kick.write(1).unwrap();
        turns.recv_timeout(LONG).unwrap();
        assert!(bad.stop().is_some(), "the owner has it back");
        drop(spawner);
        assert_eq!(bad_turns.try_iter().count(), 0);
    }

    #[test]
    fn spawner_may_be_dropped_by_its_own_work() {
        struct Last(Option<ThreadSpawner>, Sender<()>);
        impl Work for Last {
            fn sources(&self) -> Vec<Source> {
                Vec::new()
            }
            fn process(&mut self) -> Progress {
                if self.0.take().is_some() {
                    self.1.send(()).unwrap();
                }
                Progress::More
            }
        }
        let spawner = ThreadSpawner::new("worker").unwrap();
        let (told, dropped) = channel();
        let handle = spawner.handle.clone();
        let _task = spawn(&handle, Last(Some(spawner), told)).unwrap();
        dropped.recv_timeout(LONG).unwrap();
    }

    #[test]
    fn name_of_the_thread_is_in_the_debug_output() {
        let spawner = ThreadSpawner::new("disk").unwrap();
        assert!(format!("{spawner:?}").contains("\"disk\""));
    }
}
