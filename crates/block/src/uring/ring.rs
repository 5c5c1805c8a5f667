//! [`Ring`]: an io_uring instance and all that is lent to the kernel through it.
//!
//! The rule that everything here serves: from the moment an entry is in the submission queue until its completion was taken from
//! the completion queue, its slot is neither changed nor freed. The slot owns the iovecs and keeps guest memory mapped, so the
//! kernel's pointers are good for as long as it has them. If the kernel cannot be waited for, the slots are leaked.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use freestone_memory::{MemorySlice, MemoryView};
use io_uring::{IoUring, Probe, opcode};
use rustix::event::EventfdFlags;

use super::slot::{Request, Slot, Step};

/// `IORING_ENTER_GETEVENTS`: wait for completions.
const GETEVENTS: u32 = 1;

/// Pointers to guest memory and to zeroes, with what keeps both in place.
#[derive(Debug)]
struct Slots(Vec<Slot>);

const _: () = {
    const fn is_send<T: Send>() {}
    // All else in a slot but its iovecs.
    is_send::<(Option<Request>, MemoryView)>();
};

// SAFETY: all in a slot is `Send` but its iovecs, see above. These point into memory that the slot's own view keeps mapped, or
// at a static. Neither belongs to a thread, and nothing but the kernel follows the pointers.
unsafe impl Send for Slots {}

/// A ring for one file.
pub(super) struct Ring {
    ring: IoUring,
    /// One for each request that may be in flight; never grows, so that the queues of the ring cannot overflow.
    slots: Slots,
    free: Vec<u16>,
    /// Outcomes that were not asked for yet.
    ready: VecDeque<(u64, io::Result<()>)>,
    event: Arc<OwnedFd>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("depth", &self.slots.0.len())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

impl Ring {
    /// A ring on which `file` is registered and up to `depth` requests may be in flight.
    ///
    /// # Errors
    /// `Unsupported` if the kernel has no io_uring, or an old one, or does not let us; `InvalidInput` for a depth of zero or
    /// more than the kernel takes; whatever the host says.
    pub(super) fn open(file: BorrowedFd<'_>, depth: u16) -> io::Result<Self> {
        if depth == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a queue for no requests at all"));
        }
        // The completion queue is twice as long as the submission queue, which is as long as there are slots.
        let ring = IoUring::new(depth.into()).map_err(unsupported)?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe).map_err(|_| too_old())?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(too_old());
        }
        submitter.register_files(&[file.as_raw_fd()])?;
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        submitter.register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            slots: Slots((0..depth).map(|_| Slot::new()).collect()),
            // The last is taken first: the slots used last are used again.
            free: (0..depth).rev().collect(),
            ready: VecDeque::with_capacity(depth.into()),
            event: Arc::new(event),
        })
    }

    /// Whether another request can be taken.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight() < self.slots.0.len() && !self.free.is_empty()
    }

    /// Requests whose outcome was not taken yet.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.0.len() - self.free.len() + self.ready.len()
    }

    /// Becomes readable when there are completions.
    pub(super) fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    /// Makes this eventfd readable instead.
    pub(super) fn set_event(&mut self, event: OwnedFd) -> io::Result<()> {
        let submitter = self.ring.submitter();
        submitter.unregister_eventfd()?;
        submitter.register_eventfd(event.as_raw_fd())?;
        self.event = Arc::new(event);
        // What completed in between was told nobody.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
        Ok(())
    }

    /// Queues a request on guest memory, the first `done` bytes of which are done.
    ///
    /// # Errors
    /// `InvalidInput` if a buffer is not of `view`; `WouldBlock` if there is no room.
    pub(super) fn lend(
        &mut self,
        request: Request,
        view: &MemoryView,
        bufs: &[MemorySlice<'_>],
        done: usize,
    ) -> io::Result<()> {
        self.queue(|slot| slot.set_buffers(request, view, bufs, done))
    }

    /// Queues a request without guest memory.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room.
    pub(super) fn start(&mut self, request: Request) -> io::Result<()> {
        self.queue(|slot| {
            slot.set(request);
            Ok(())
        })
    }

    fn queue(&mut self, set: impl FnOnce(&mut Slot) -> io::Result<()>) -> io::Result<()> {
        let index = *self.free.last().ok_or(io::ErrorKind::WouldBlock)?;
        let slot = self.slots.0.get_mut(usize::from(index)).ok_or(io::ErrorKind::WouldBlock)?;
        set(slot)?;
        self.push(index).inspect_err(|_| {
            if let Some(slot) = self.slots.0.get_mut(usize::from(index)) {
                slot.clear();
            }
        })?;
        self.free.pop();
        Ok(())
    }

    /// Puts the slot's next entry into the submission queue. On an error it is not in there.
    fn push(&mut self, index: u16) -> io::Result<()> {
        let slot = self.slots.0.get(usize::from(index));
        let entry = slot.and_then(Slot::entry).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the entry's pointers are to the slot's iovecs and to what those describe: memory inside regions of the view
        // that the slot holds, or a static that is only read. The slot is busy from here on and is left alone until its
        // completion was taken; see the head of this module. The kernel may write guest memory meanwhile: no reference to it
        // exists, for it is only ever accessed as volatile.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(index.into())) };
        // Cannot be full: each slot has at most one entry in it.
        pushed.map_err(|_| io::ErrorKind::WouldBlock.into())
    }

    /// Gives the kernel what is in the submission queue.
    ///
    /// # Errors
    /// Whatever the host says; the rest stays in the queue.
    pub(super) fn commit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes in what the kernel completed, and lets go on what is done only in part.
    pub(super) fn collect(&mut self) {
        let mut again = false;
        while let Some((index, result)) = self.next_completion() {
            again |= self.complete(index, result);
        }
        if again && self.commit().is_err() {
            // Nobody but us knows that there is something to commit: have the caller come back.
            let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
        }
    }

    fn next_completion(&mut self) -> Option<(u16, i32)> {
        self.ring.completion().find_map(|entry| {
            // Only slot numbers were ever submitted.
            u16::try_from(entry.user_data()).ok().map(|index| (index, entry.result()))
        })
    }

    /// Takes in one completion; says whether something was put into the submission queue.
    fn complete(&mut self, index: u16, result: i32) -> bool {
        let Some(slot) = self.slots.0.get_mut(usize::from(index)).filter(|slot| slot.is_busy()) else {
            return false;
        };
        let outcome = match slot.complete(result) {
            Step::Done(outcome) => outcome,
            Step::Again => match self.push(index) {
                Ok(()) => return true,
                Err(error) => Err(error),
            },
        };
        self.finish(index, outcome);
        false
    }

    fn finish(&mut self, index: u16, outcome: io::Result<()>) {
        if let Some(tag) = self.slots.0.get_mut(usize::from(index)).and_then(Slot::clear) {
            self.ready.push_back((tag, outcome));
            self.free.push(index);
        }
    }

    /// The next outcome of those that were taken in.
    pub(super) fn take_outcome(&mut self) -> Option<(u64, io::Result<()>)> {
        self.ready.pop_front()
    }

    /// Waits until there is an outcome, if anything is in flight.
    ///
    /// # Errors
    /// Whatever the host says.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        loop {
            self.collect();
            if !self.ready.is_empty() || self.in_flight() == 0 {
                return Ok(());
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until the kernel has no use of any slot. What it was not given yet is not begun.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            while let Some((index, result)) = self.next_completion() {
                // What is done in part is left at that; this marks dirty what was read.
                if let Some(slot) = self.slots.0.get_mut(usize::from(index)).filter(|slot| slot.is_busy()) {
                    drop(slot.complete(result));
                    self.finish(index, Ok(()));
                }
            }
            // Entries that the kernel has not taken are not waited for: nothing will ever look at them.
            let busy = self.slots.0.len() - self.free.len();
            if busy <= self.ring.submission().len() {
                return Ok(());
            }
            // SAFETY: nothing is submitted, and there is no further argument.
            match unsafe { self.ring.submitter().enter::<()>(0, 1, GETEVENTS, None) } {
                Ok(_) => {}
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The slots are out of harm's way first, whatever happens below.
        if let Err(error) = self.drain() {
            let slots = std::mem::take(&mut self.slots.0);
            let leaked = slots.iter().filter(|slot| slot.is_busy()).count();
            std::mem::forget(slots);
            tracing::error!(%error, leaked, "requests in flight cannot be waited for: their memory is never freed");
        }
        // Closing the ring would do this some time later, and the image would stay locked until then.
        let _ = self.ring.submitter().unregister_files();
    }
}

fn too_old() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is too old: 5.6 is needed")
}

/// Says that there is no io_uring where that is what the kernel's error means.
fn unsupported(error: io::Error) -> io::Error {
    let why = match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring",
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is not permitted here (see the sysctl kernel.io_uring_disabled)"
        }
        _ => return error,
    };
    io::Error::new(io::ErrorKind::Unsupported, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_that_has_or_permits_no_io_uring_is_said_to() {
        for (errno, word) in
            [(libc::ENOSYS, "has no"), (libc::EPERM, "not permitted"), (libc::EACCES, "not permitted")]
        {
            let error = unsupported(io::Error::from_raw_os_error(errno));
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            assert!(error.to_string().contains(word), "{error}");
        }
        assert_eq!(
            unsupported(io::Error::from_raw_os_error(libc::ENOMEM)).kind(),
            io::ErrorKind::OutOfMemory
        );
    }
}
