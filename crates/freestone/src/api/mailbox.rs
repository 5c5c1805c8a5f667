//! What other threads tell the API's: answers of the engine, events, the end of the machine. An eventfd wakes it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use super::controller::Finish;

/// Events that wait for the API's thread; more are dropped and counted.
const MAX_EVENTS: usize = 256;

/// Which request an answer belongs to: a connection and its age, so that a late answer never reaches a later client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket {
    pub(crate) slot: usize,
    pub(crate) age: u64,
}

impl Ticket {
    /// Of a request that no client made.
    pub(crate) const NOBODY: Self = Self { slot: usize::MAX, age: 0 };
}

/// Something to hear.
pub(crate) enum Message {
    /// An answer of the engine, and what follows from it.
    Finish(Ticket, Finish),
    /// Something happened.
    Event(Value),
    /// The machine ended: the exit status, and why.
    Ended(u8, String),
    /// The API is to end, and the machine with it.
    Stop,
}

/// Both ends.
pub(crate) struct Mailbox {
    messages: Mutex<Messages>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Messages {
    queue: VecDeque<Message>,
    events: usize,
    dropped: u64,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { messages: Mutex::default(), wake }))
    }

    fn lock(&self) -> MutexGuard<'_, Messages> {
        // Nothing panics while it is held.
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn send(&self, message: Message) {
        {
            let mut messages = self.lock();
            if matches!(message, Message::Event(_)) {
                if messages.events == MAX_EVENTS {
                    messages.dropped += 1;
                    return;
                }
                messages.events += 1;
            }
            messages.queue.push_back(message);
        }
        // It fails only if the counter is full: then it is readable already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// All there is, and how many events there was no room for.
    pub(crate) fn take(&self) -> (VecDeque<Message>, u64) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        let mut messages = self.lock();
        messages.events = 0;
        (std::mem::take(&mut messages.queue), std::mem::take(&mut messages.dropped))
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").field("waiting", &self.lock().queue.len()).finish_non_exhaustive()
    }
}

/// The engine's end: tells what happens to the machine. May be cloned and used by any thread; it never waits.
#[derive(Debug, Clone)]
pub(crate) struct Notifier(Arc<Mailbox>);

impl Notifier {
    pub(crate) fn new(mailbox: &Arc<Mailbox>) -> Self {
        Self(Arc::clone(mailbox))
    }

    /// Something happened; clients of `/freestone/events` hear of it. `event` is an object with a member `event`.
    pub(crate) fn event(&self, event: Value) {
        self.0.send(Message::Event(event));
    }

    /// The machine ended, with this exit status of the process. The API ends too.
    pub(crate) fn ended(&self, status: u8, reason: impl Into<String>) {
        self.0.send(Message::Ended(status, reason.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_beyond_the_room_are_counted_and_dropped() {
        let mailbox = Mailbox::new().unwrap();
        let notifier = Notifier::new(&mailbox);
        for n in 0..MAX_EVENTS + 3 {
            notifier.event(Value::from(n));
        }
        notifier.ended(0, "off");
        let (messages, dropped) = mailbox.take();
        assert_eq!((messages.len(), dropped), (MAX_EVENTS + 1, 3));
        assert!(matches!(messages.back(), Some(Message::Ended(0, _))));
        assert_eq!(mailbox.take().1, 0);
    }
}
