//! [`Queue`]: frames that wait for one queue pair of a port.
//!
//! Whoever sends holds the lock for a push; the one who receives takes all that wait at once. The eventfd is written only when
//! the receiver has seen an empty queue and may be asleep.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::packet::Packet;
use crate::{Error, Result};

/// Most frames that wait.
pub(super) const MAX_FRAMES: usize = 1024;
/// Most memory that they take.
pub(super) const MAX_BYTES: usize = 4 << 20;

/// What one port has in the queue.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    frames: usize,
    bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Arc<Packet>>,
    bytes: usize,
    /// By number of the port.
    shares: Vec<Share>,
    /// The receiver found nothing, and nobody woke it since.
    asleep: bool,
    closed: bool,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    /// It waits, and its receiver is about.
    Awake,
    /// It waits; its receiver must be woken, by the one who was told.
    Asleep,
    /// There is no room.
    Full,
    /// Nobody will take it.
    Closed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    event: Arc<OwnedFd>,
}

impl Queue {
    pub(super) fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("make an eventfd for a switch port")(e.into()))?;
        let state = State { asleep: true, ..State::default() };
        Ok(Self { state: Mutex::new(state), event: Arc::new(event) })
    }

    pub(super) fn source(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame from the port `from`, if there is room and the port has not more in the queue than is still free: so one that
    /// floods leaves room for all others.
    pub(super) fn push(&self, packet: &Arc<Packet>, from: u16) -> Pushed {
        let (from, size) = (usize::from(from), packet.capacity());
        let mut state = self.lock();
        let state = &mut *state;
        if state.closed {
            return Pushed::Closed;
        }
        if state.shares.len() <= from {
            state.shares.resize(from + 1, Share::default());
        }
        let (waiting, bytes) = (state.frames.len(), state.bytes);
        let Some(share) = state.shares.get_mut(from) else {
            return Pushed::Full;
        };
        if share.frames + 1 > MAX_FRAMES.saturating_sub(waiting)
            || share.bytes + size > MAX_BYTES.saturating_sub(bytes)
        {
            return Pushed::Full;
        }
        share.frames += 1;
        share.bytes += size;
        state.bytes += size;
        state.frames.push_back(Arc::clone(packet));
        if std::mem::take(&mut state.asleep) { Pushed::Asleep } else { Pushed::Awake }
    }

    /// Takes all that wait into `empty`, which is. If there is nothing the next push says that the receiver is asleep.
    pub(super) fn take_all(&self, empty: &mut VecDeque<Arc<Packet>>) {
        let mut state = self.lock();
        std::mem::swap(&mut state.frames, empty);
        state.bytes = 0;
        state.shares.fill(Share::default());
        state.asleep = empty.is_empty();
    }

    /// Nothing will be taken any more.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        *state = State { closed: true, ..State::default() };
    }

    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then the receiver has an event waiting.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Frames that wait here, beside those that the receiver took already.
    pub(super) fn len(&self) -> usize {
        self.lock().frames.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_push_after_an_empty_look_wakes() {
        let queue = Queue::new().unwrap();
        let packet = Arc::new(Packet::new(2048));
        let mut taken = VecDeque::new();
        assert_eq!(queue.push(&packet, 0), Pushed::Asleep);
        assert_eq!(queue.push(&packet, 0), Pushed::Awake);
        queue.take_all(&mut taken);
        assert_eq!(taken.len(), 2);
        assert_eq!(queue.push(&packet, 0), Pushed::Awake);
        taken.clear();
        queue.take_all(&mut taken);
        taken.clear();
        queue.take_all(&mut taken);
        assert_eq!(queue.push(&packet, 0), Pushed::Asleep);
    }

    #[test]
    fn one_that_floods_leaves_room_for_others() {
        let queue = Queue::new().unwrap();
        let packet = Arc::new(Packet::new(2048));
        let pushed = |from, n: usize| (0..n).filter(|_| queue.push(&packet, from) != Pushed::Full).count();
        assert_eq!(pushed(0, 10_000), MAX_FRAMES / 2);
        assert_eq!(pushed(7, 100), 100);
        assert_eq!(pushed(8, 100), 100);
        assert!(queue.len() <= MAX_FRAMES);
    }

    #[test]
    fn large_frames_are_bounded_by_memory() {
        let queue = Queue::new().unwrap();
        let packet = Arc::new(Packet::new(65_536));
        let pushed = (0..1000).filter(|_| queue.push(&packet, 0) != Pushed::Full).count();
        assert_eq!(pushed, MAX_BYTES / 65_536 / 2);
    }

    #[test]
    fn a_closed_queue_takes_nothing_and_keeps_nothing() {
        let queue = Queue::new().unwrap();
        let packet = Arc::new(Packet::new(2048));
        queue.push(&packet, 0);
        queue.close();
        assert_eq!(Arc::strong_count(&packet), 1);
        assert_eq!(queue.push(&packet, 0), Pushed::Closed);
    }
}
