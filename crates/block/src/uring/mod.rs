//! [`UringQueue`]: requests on a raw image by io_uring(7).
//!
//! Here is what is asked of the kernel and when; what is lent to it, and until when, is in `ring`.

#[expect(unsafe_code, reason = "the kernel is given pointers to guest memory")]
mod ring;
mod slot;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use freestone_memory::io::read_vectored_at_nowait;
use freestone_memory::{MemorySlice, MemoryView};

use crate::image::Image;
use crate::queue::{IoQueue, Op, Submitted};
use crate::raw::RawImage;
use crate::raw::holes::{PUNCH, Target, Zeroing};
use ring::Ring;
use slot::{Request, Work};

/// Which requests go to io_uring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// All.
    Always,
    /// Those that would keep the thread waiting. What the page cache can do at once is a plain system call: a read of what is
    /// in it, and a write, which only fills it.
    WhatWaits,
}

/// Requests on a [`RawImage`] by io_uring(7): any number of them are submitted by one system call, and wait for nobody.
/// Made by [`Image::open_queue`].
///
/// The file is registered, so that the kernel need not look it up for each request. Guest memory is read and written in place,
/// and stays mapped while a request has use of it, whatever becomes of the device, the queue or the machine: each request keeps the
/// [`MemoryView`] it came with, and buffers that are not of that view are refused.
///
/// Some requests are carried out on the spot: those that [`Image`] refuses, a discard of a block device, buffers that
/// `O_DIRECT` does not take, and with [`Engine::Auto`](crate::Engine::Auto) what does not wait for a device.
///
/// A flush covers the writes that completed before it was committed, as virtio wants it: the others are not waited for.
///
/// A queue may be sent to another thread. When the thread that committed a request ends, the kernel gives up what has not begun;
/// such a request is begun again from wherever the queue is driven next.
#[derive(Debug)]
pub struct UringQueue {
    ring: Ring,
    policy: Policy,
    image: Arc<RawImage>,
}

impl UringQueue {
    /// A queue for `depth` requests at once. Fails as [`Image::open_queue`] does.
    pub(crate) fn open(image: Arc<RawImage>, depth: u16, policy: Policy) -> io::Result<Self> {
        let ring = Ring::open(image.as_fd(), depth)?;
        Ok(Self { ring, policy, image })
    }

    fn read<'m>(
        &mut self,
        tag: u64,
        view: &'m MemoryView,
        bufs: &[MemorySlice<'m>],
        offset: u64,
    ) -> io::Result<Submitted> {
        let wanted = self.image.check(bufs, offset)?;
        if !self.image.takes(bufs, offset) {
            return Ok(Submitted::Done(self.image.read_vectored_at(bufs, offset)));
        }
        let mut done = 0;
        if self.policy == Policy::WhatWaits {
            match read_vectored_at_nowait(self.image.as_fd(), bufs, offset) {
                Ok(n) => done = n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    tracing::debug!(path = %self.image.path().display(), "reads cannot be tried: all go to io_uring");
                    self.policy = Policy::Always;
                }
                Err(error) => return Err(error),
            }
        }
        if done == wanted {
            return Ok(Submitted::Done(Ok(())));
        }
        let request = Request { tag, work: Work::Read, offset, len: wanted as u64 };
        self.ring.lend(request, view, bufs, done).map(|()| Submitted::Pending)
    }

    fn write<'m>(
        &mut self,
        tag: u64,
        view: &'m MemoryView,
        bufs: &[MemorySlice<'m>],
        offset: u64,
    ) -> io::Result<Submitted> {
        let wanted = self.image.check(bufs, offset)?;
        if wanted == 0 || self.policy == Policy::WhatWaits || !self.image.takes(bufs, offset) {
            return Ok(Submitted::Done(self.image.write_vectored_at(bufs, offset)));
        }
        self.image.check_writable()?;
        let request = Request { tag, work: Work::Write, offset, len: wanted as u64 };
        self.ring.lend(request, view, bufs, 0).map(|()| Submitted::Pending)
    }

    fn start<'m>(&mut self, tag: u64, view: &'m MemoryView, op: Op<'_, 'm>) -> io::Result<Submitted> {
        if !self.ring.has_room() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let request = match op {
            Op::Read { bufs, offset } => return self.read(tag, view, bufs, offset),
            Op::Write { bufs, offset } => return self.write(tag, view, bufs, offset),
            Op::Flush if self.image.read_only() => return Ok(Submitted::Done(Ok(()))),
            Op::Flush => Request { tag, work: Work::Flush, offset: 0, len: 0 },
            Op::Discard { offset, len } => {
                self.image.check_discard(offset, len)?;
                if len == 0 || self.image.target() == Target::Device {
                    return Ok(Submitted::Done(self.image.discard(offset, len)));
                }
                Request { tag, work: Work::Punch(PUNCH), offset, len }
            }
            Op::WriteZeroes { offset, len, unmap } => {
                self.image.check_range(offset, len)?;
                self.image.check_writable()?;
                if len == 0 {
                    return Ok(Submitted::Done(Ok(())));
                }
                Request { tag, work: Work::Zero(Zeroing::first(unmap)), offset, len }
            }
        };
        self.ring.start(request).map(|()| Submitted::Pending)
    }
}

impl IoQueue for UringQueue {
    fn submit<'m>(&mut self, tag: u64, view: &'m MemoryView, op: Op<'_, 'm>) -> Submitted {
        self.start(tag, view, op).unwrap_or_else(|error| Submitted::Done(Err(error)))
    }

    fn commit(&mut self) -> io::Result<()> {
        self.ring.commit()
    }

    fn reap(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        self.ring.collect();
        while let Some((tag, result)) = self.ring.take_outcome() {
            done(tag, result);
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        self.ring.wait()
    }

    fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    fn completion_source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.ring.event())
    }

    fn notify_by(&mut self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.ring.set_event(event.try_clone_to_owned()?)
    }
}
