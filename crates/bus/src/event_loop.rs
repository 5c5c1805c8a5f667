//! The event loop: drives work on one thread by epoll, through the rust-vmm event-manager.
//!
//! Work is handed over from any thread through an inbox, so [`LoopHandle`] never blocks and may be used from inside work.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::work::{Pollable, Registration, Source, Spawn, Turn};
use crate::{Error, Result};

enum Command {
    Add(u64, Arc<dyn Pollable>, Vec<Source>),
    Remove(u64),
}

struct Inbox {
    commands: Mutex<Vec<Command>>,
    wake: EventFd,
    next_id: AtomicU64,
}

impl Inbox {
    fn post(&self, command: Command) -> io::Result<()> {
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let first = commands.is_empty();
        commands.push(command);
        drop(commands);
        // Whoever left a command here wakes the loop, which takes all that it finds.
        if first { self.wake.write(1) } else { Ok(()) }
    }

    /// Takes work off the loop. If the loop has not heard of it yet, it never will: work that is stopped and started again faster
    /// than the loop looks here must not pile up, or the loop would be busy with what is gone and never come to what is there.
    fn remove(&self, id: u64) -> io::Result<()> {
        let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let unheard =
            commands.iter().position(|command| matches!(command, Command::Add(other, ..) if *other == id));
        let unheard = unheard.map(|index| commands.remove(index));
        drop(commands);
        // With the lock released: the work may be dropped here, which may end other work.
        match unheard {
            Some(_) => Ok(()),
            None => self.post(Command::Remove(id)),
        }
    }
}

/// Work that returned [`Turn::More`], waiting for another turn; each piece once, however often it was woken meanwhile.
type Ready = Arc<Mutex<Vec<Arc<dyn Pollable>>>>;

fn lock(ready: &Ready) -> MutexGuard<'_, Vec<Arc<dyn Pollable>>> {
    ready.lock().unwrap_or_else(PoisonError::into_inner)
}

fn waits(ready: &Ready, work: &Arc<dyn Pollable>) -> bool {
    lock(ready).iter().any(|other| Arc::ptr_eq(other, work))
}

/// One subscriber of the event manager: the inbox, or a piece of work with its sources.
enum Subscriber {
    Wake(Arc<Inbox>),
    Work { work: Arc<dyn Pollable>, sources: Vec<Source>, ready: Ready },
}

impl Subscriber {
    fn turn(work: &Arc<dyn Pollable>, ready: &Ready) {
        if work.poll() == Turn::More && !waits(ready, work) {
            lock(ready).push(Arc::clone(work));
        }
    }
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        match self {
            // The commands are carried out by the loop itself, after dispatch.
            Self::Wake(inbox) => {
                if let Err(error) = inbox.wake.read() {
                    tracing::debug!(%error, "spurious wake-up of the event loop");
                }
            }
            Self::Work { work, ready, .. } => Self::turn(work, ready),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        match self {
            Self::Wake(inbox) => watch(ops, Events::new(&inbox.wake, EventSet::IN)),
            Self::Work { work, sources, ready } => {
                // Each by itself: one that cannot be watched must not deafen the others.
                for source in sources.iter() {
                    let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
                    watch(ops, Events::new_raw(source.as_raw_fd(), events));
                }
                Self::turn(work, ready);
            }
        }
    }
}

fn watch(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        // Regular files cannot be watched and are always ready: such work lives on `Progress::More`.
        tracing::debug!(?error, "a source cannot be watched");
    }
}

/// Drives work on the thread that calls [`run_once`](Self::run_once).
pub struct EventLoop {
    manager: EventManager<Subscriber>,
    inbox: Arc<Inbox>,
    ready: Ready,
    ids: HashMap<u64, SubscriberId>,
}

impl EventLoop {
    /// A loop with no work.
    ///
    /// # Errors
    /// [`Error::Io`] if the host gives no epoll or eventfd descriptor.
    pub fn new() -> Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK).map_err(Error::io("create an eventfd for the event loop"))?;
        let inbox = Arc::new(Inbox { commands: Mutex::default(), wake, next_id: AtomicU64::new(0) });
        let mut manager = EventManager::new()
            .map_err(|e| Error::Io { op: "create the event loop", source: io::Error::other(e) })?;
        manager.add_subscriber(Subscriber::Wake(Arc::clone(&inbox)));
        Ok(Self { manager, inbox, ready: Ready::default(), ids: HashMap::new() })
    }

    /// A handle that hands over work, for any thread.
    pub fn handle(&self) -> LoopHandle {
        LoopHandle { inbox: Arc::clone(&self.inbox) }
    }

    /// Waits for events, at most `timeout_ms` (-1: for ever), and gives every ready piece of work one turn.
    ///
    /// # Errors
    /// [`Error::Io`] if epoll fails.
    pub fn run_once(&mut self, timeout_ms: i32) -> Result<()> {
        self.take_commands();
        let again = std::mem::take(&mut *lock(&self.ready));
        let timeout = if again.is_empty() { timeout_ms } else { 0 };
        self.manager
            .run_with_timeout(timeout)
            .map_err(|e| Error::Io { op: "wait for events", source: io::Error::other(e) })?;
        for work in again {
            // Unless an event just gave it its turn.
            if !waits(&self.ready, &work) {
                Subscriber::turn(&work, &self.ready);
            }
        }
        self.take_commands();
        Ok(())
    }

    /// Runs until `stop` says so; it is asked after every round, so wake the loop by [`LoopHandle::wake`] after changing
    /// what it looks at.
    ///
    /// # Errors
    /// As [`run_once`](Self::run_once).
    pub fn run_until(&mut self, mut stop: impl FnMut() -> bool) -> Result<()> {
        while !stop() {
            self.run_once(-1)?;
        }
        Ok(())
    }

    fn take_commands(&mut self) {
        let commands =
            std::mem::take(&mut *self.inbox.commands.lock().unwrap_or_else(PoisonError::into_inner));
        for command in commands {
            match command {
                Command::Add(id, work, sources) => {
                    let ready = Arc::clone(&self.ready);
                    let subscriber = Subscriber::Work { work, sources, ready };
                    self.ids.insert(id, self.manager.add_subscriber(subscriber));
                }
                Command::Remove(id) => {
                    if let Some(Err(error)) = self.ids.remove(&id).map(|s| self.manager.remove_subscriber(s))
                    {
                        tracing::warn!(?error, "cannot take work off the event loop");
                    }
                }
            }
        }
    }
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop").field("work", &self.ids.len()).finish_non_exhaustive()
    }
}

/// Hands work to an [`EventLoop`] from any thread.
#[derive(Clone)]
pub struct LoopHandle {
    inbox: Arc<Inbox>,
}

impl LoopHandle {
    /// Makes the loop finish its current wait.
    ///
    /// # Errors
    /// If the eventfd cannot be written.
    pub fn wake(&self) -> io::Result<()> {
        self.inbox.wake.write(1)
    }
}

impl Spawn for LoopHandle {
    fn register(&self, work: Arc<dyn Pollable>, sources: Vec<Source>) -> io::Result<Registration> {
        let id = self.inbox.next_id.fetch_add(1, Ordering::Relaxed);
        self.inbox.post(Command::Add(id, work, sources))?;
        let inbox = Arc::clone(&self.inbox);
        Ok(Registration::new(move || {
            if let Err(error) = inbox.remove(id) {
                tracing::warn!(%error, "cannot wake the event loop");
            }
        }))
    }
}

impl fmt::Debug for LoopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoopHandle")
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::work::{Progress, Work, spawn};

    /// Counts its turns; asks for `more` turns each time it is woken.
    struct Counter {
        sources: Vec<Source>,
        turns: Arc<AtomicUsize>,
        more: usize,
    }

    impl Work for Counter {
        fn sources(&self) -> Vec<Source> {
            self.sources.clone()
        }
        fn process(&mut self) -> Progress {
            self.turns.fetch_add(1, Ordering::Relaxed);
            if self.more > 0 {
                self.more -= 1;
                Progress::More
            } else {
                Progress::Idle
            }
        }
    }

    fn counter(kick: &Arc<EventFd>, more: usize) -> (Counter, Arc<AtomicUsize>) {
        let turns = Arc::new(AtomicUsize::new(0));
        (Counter { sources: vec![kick.clone()], turns: turns.clone(), more }, turns)
    }

    #[test]
    fn work_gets_a_first_turn_and_one_for_each_kick_without_reading_the_eventfd() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (work, turns) = counter(&kick, 0);
        let _task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(0).unwrap();
        assert_eq!(turns.load(Ordering::Relaxed), 1);
        for n in 2..5 {
            kick.write(1).unwrap();
            event_loop.run_once(1000).unwrap();
            assert_eq!(turns.load(Ordering::Relaxed), n);
        }
        event_loop.run_once(0).unwrap();
        assert_eq!(turns.load(Ordering::Relaxed), 4, "no turn without an edge");
    }

    #[test]
    fn a_kick_before_the_loop_knows_the_work_is_not_lost() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        kick.write(1).unwrap();
        let (work, turns) = counter(&kick, 0);
        let _task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(1000).unwrap();
        assert!(turns.load(Ordering::Relaxed) >= 1);
    }

    #[test]
    fn work_that_has_more_to_do_is_called_again_without_an_event() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (work, turns) = counter(&kick, 3);
        let _task = spawn(&event_loop.handle(), work).unwrap();
        for _ in 0..8 {
            event_loop.run_once(0).unwrap();
        }
        assert_eq!(turns.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn work_that_always_has_more_gets_one_turn_a_round_however_often_it_is_woken() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (work, turns) = counter(&kick, usize::MAX);
        let _task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(0).unwrap();
        for _ in 0..20 {
            let before = turns.load(Ordering::Relaxed);
            kick.write(1).unwrap();
            event_loop.run_once(0).unwrap();
            assert_eq!(turns.load(Ordering::Relaxed) - before, 1);
        }
        assert_eq!(lock(&event_loop.ready).len(), 1);
    }

    #[test]
    fn the_same_source_can_be_spawned_again_right_after_a_stop() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (work, turns) = counter(&kick, 0);
        let task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(0).unwrap();
        let work = task.stop().unwrap();
        let _task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(0).unwrap();
        kick.write(1).unwrap();
        event_loop.run_once(1000).unwrap();
        assert_eq!(turns.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn stopped_work_gets_no_more_turns() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (work, turns) = counter(&kick, 0);
        let task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(0).unwrap();
        drop(task);
        kick.write(1).unwrap();
        event_loop.run_once(0).unwrap();
        event_loop.run_once(0).unwrap();
        assert_eq!(turns.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_source_that_cannot_be_watched_still_gets_turns_while_it_has_more() {
        let mut event_loop = EventLoop::new().unwrap();
        let file: Source = Arc::new(File::open("/proc/self/exe").unwrap());
        let turns = Arc::new(AtomicUsize::new(0));
        let work = Counter { sources: vec![file], turns: turns.clone(), more: 2 };
        let _task = spawn(&event_loop.handle(), work).unwrap();
        for _ in 0..5 {
            event_loop.run_once(0).unwrap();
        }
        assert_eq!(turns.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_source_that_cannot_be_watched_does_not_keep_the_others_from_being_watched() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let file: Source = Arc::new(File::open("/proc/self/exe").unwrap());
        let turns = Arc::new(AtomicUsize::new(0));
        let work = Counter { sources: vec![file, kick.clone()], turns: turns.clone(), more: 0 };
        let _task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(0).unwrap();
        kick.write(1).unwrap();
        event_loop.run_once(1000).unwrap();
        assert_eq!(turns.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn work_that_comes_and_goes_before_the_loop_looks_leaves_nothing_behind() {
        let mut event_loop = EventLoop::new().unwrap();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (work, turns) = counter(&kick, 0);
        let mut task = spawn(&event_loop.handle(), work).unwrap();
        event_loop.run_once(0).unwrap();
        for _ in 0..100 {
            task = spawn(&event_loop.handle(), task.stop().unwrap()).unwrap();
        }
        let waiting = event_loop.inbox.commands.lock().unwrap().len();
        assert_eq!(waiting, 2, "the first goes and the last comes");
        event_loop.run_once(0).unwrap();
        assert_eq!((turns.load(Ordering::Relaxed), event_loop.ids.len()), (2, 1));
    }

    #[test]
    fn another_thread_can_wake_the_loop() {
        let mut event_loop = EventLoop::new().unwrap();
        let handle = event_loop.handle();
        let stop = Arc::new(AtomicUsize::new(0));
        let flag = stop.clone();
        let thread = std::thread::spawn(move || {
            flag.store(1, Ordering::Release);
            handle.wake().unwrap();
        });
        event_loop.run_until(|| stop.load(Ordering::Acquire) == 1).unwrap();
        thread.join().unwrap();
    }
}
