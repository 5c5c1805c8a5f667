//! [`IoQueue`]: asynchronous requests on an image, for one worker, with the engine behind it hidden.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use freestone_memory::{MemorySlice, MemoryView};

use crate::Image;

/// How requests are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Engine {
    /// What was measured to be quickest for this image on this host.
    #[default]
    Auto,
    /// Each request is a system call of the worker's thread.
    Sync,
    /// io_uring(7), with requests submitted in batches.
    Uring,
}

/// What is asked of an image.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Op<'a, 'm> {
    /// Fill the buffers from a byte offset on.
    Read {
        /// Where to.
        bufs: &'a [MemorySlice<'m>],
        /// First byte.
        offset: u64,
    },
    /// Write the buffers from a byte offset on.
    Write {
        /// Where from.
        bufs: &'a [MemorySlice<'m>],
        /// First byte.
        offset: u64,
    },
    /// Make durable every write that completed before.
    Flush,
    /// As [`Image::discard`].
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// As [`Image::write_zeroes`].
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether the storage may be given back.
        unmap: bool,
    },
}

/// What became of a request at once.
#[derive(Debug)]
pub enum Submitted {
    /// It is done; [`IoQueue::reap`] will not mention it.
    Done(io::Result<()>),
    /// It is under way; [`IoQueue::reap`] will say what became of it.
    Pending,
}

/// Requests of one worker on one image.
///
/// Requests in flight have no order among each other. Dropping a queue waits for what is in flight, so the memory of a request
/// is never touched after its queue is gone.
pub trait IoQueue: Send + Debug {
    /// Asks for `op` under the caller's name `tag`. `view` is the view of guest memory that the buffers are of: it is kept
    /// until the request completes. What is left pending may wait for [`commit`](Self::commit).
    ///
    /// The outcome is as that of the like-named method of [`Image`]; a request for which there is no room is
    /// `Done(Err(WouldBlock))`.
    fn submit<'m>(&mut self, tag: u64, view: &'m MemoryView, op: Op<'_, 'm>) -> Submitted;

    /// Hands what was submitted to the host, all at once.
    ///
    /// # Errors
    /// Whatever the host says; the requests stay pending and a later call tries again.
    fn commit(&mut self) -> io::Result<()>;

    /// Calls `done` with the tag and the outcome of every request that completed. Does not wait.
    fn reap(&mut self, done: &mut dyn FnMut(u64, io::Result<()>));

    /// Waits until one request completes, if any is in flight.
    ///
    /// # Errors
    /// Whatever the host says.
    fn wait(&mut self) -> io::Result<()>;

    /// Requests that are pending.
    fn in_flight(&self) -> usize;

    /// Becomes readable when a request completes; watch it for edges. `None` if nothing is ever pending.
    fn completion_source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>>;

    /// Lets completions be told by `event`, an eventfd that the caller watches already, and no longer by
    /// [`completion_source`](Self::completion_source). For a queue that takes the place of another under a worker.
    ///
    /// # Errors
    /// `Unsupported` if the queue cannot; whatever the host says.
    fn notify_by(&mut self, event: BorrowedFd<'_>) -> io::Result<()> {
        let _ = event;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An [`IoQueue`] that carries every request out on the spot. It works with any image.
#[derive(Debug)]
pub struct SyncQueue {
    image: Arc<dyn Image>,
}

impl SyncQueue {
    /// A queue of `image`.
    pub fn new(image: Arc<dyn Image>) -> Self {
        Self { image }
    }
}

impl IoQueue for SyncQueue {
    fn submit<'m>(&mut self, _tag: u64, _view: &'m MemoryView, op: Op<'_, 'm>) -> Submitted {
        Submitted::Done(match op {
            Op::Read { bufs, offset } => self.image.read_vectored_at(bufs, offset),
            Op::Write { bufs, offset } => self.image.write_vectored_at(bufs, offset),
            Op::Flush => self.image.flush(),
            Op::Discard { offset, len } => self.image.discard(offset, len),
            Op::WriteZeroes { offset, len, unmap } => self.image.write_zeroes(offset, len, unmap),
        })
    }

    fn commit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, _done: &mut dyn FnMut(u64, io::Result<()>)) {}

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn completion_source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        None
    }

    /// Nothing is ever to be told.
    fn notify_by(&mut self, _event: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
}
