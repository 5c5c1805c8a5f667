//! Kicks, stops and new starts of the same work from several threads: nothing that was asked for is forgotten.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use freestone_bus::{EFD_NONBLOCK, EventFd, Progress, Source, ThreadSpawner, Work, spawn};

/// Does what was asked for by then.
struct Server {
    kick: Arc<EventFd>,
    asked: Arc<AtomicU64>,
    done: Arc<AtomicU64>,
    /// Says after each step that there is more, whatever there is.
    restless: bool,
}

impl Server {
    fn new(restless: bool) -> Self {
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self { kick, asked: Arc::default(), done: Arc::default(), restless }
    }
}

impl Work for Server {
    fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(&self.kick) as Source]
    }

    fn process(&mut self) -> Progress {
        self.done.store(self.asked.load(Ordering::SeqCst), Ordering::SeqCst);
        if self.restless { Progress::More } else { Progress::Idle }
    }
}

#[test]
fn one_kick_is_enough_though_the_work_is_taken_away_and_started_again_all_the_time() {
    const ROUNDS: u64 = 2000;
    let spawner = ThreadSpawner::new("work").unwrap();
    let work = Server::new(false);
    let (kick, asked, done) = (work.kick.clone(), work.asked.clone(), work.done.clone());
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=ROUNDS {
                asked.store(n, Ordering::SeqCst);
                kick.write(1).unwrap();
                while done.load(Ordering::SeqCst) < n {
                    thread::yield_now();
                }
            }
            over.store(true, Ordering::SeqCst);
        });
        let mut task = spawn(&spawner, work).unwrap();
        while !over.load(Ordering::SeqCst) {
            task = spawn(&spawner, task.stop().unwrap()).unwrap();
            // Only now and then a stop, so that most rounds live on their kick alone.
            let before = done.load(Ordering::SeqCst);
            while done.load(Ordering::SeqCst) < (before + before % 4).min(ROUNDS) {
                thread::yield_now();
            }
        }
    });
    assert_eq!(done.load(Ordering::SeqCst), ROUNDS);
}

#[test]
fn work_that_never_rests_is_stopped_all_the_same() {
    let spawner = ThreadSpawner::new("work").unwrap();
    let mut work = Server::new(true);
    for n in 1..=500 {
        work.asked.store(n, Ordering::SeqCst);
        let done = work.done.clone();
        let task = spawn(&spawner, work).unwrap();
        while done.load(Ordering::SeqCst) < n {
            thread::yield_now();
        }
        work = task.stop().unwrap();
    }
}

#[test]
fn work_gets_its_turns_though_it_is_started_again_without_a_break() {
    let spawner = ThreadSpawner::new("work").unwrap();
    let work = Server::new(false);
    let (asked, done) = (work.asked.clone(), work.done.clone());
    let mut task = spawn(&spawner, work).unwrap();
    for n in 1..=200 {
        asked.store(n, Ordering::SeqCst);
        while done.load(Ordering::SeqCst) < n {
            task = spawn(&spawner, task.stop().unwrap()).unwrap();
        }
    }
}
