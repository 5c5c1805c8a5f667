//! [`Slot`]: a request that the kernel has, and how far it has got.
//!
//! A slot only describes memory; nothing here follows a pointer.

use std::io;

use freestone_memory::vm_memory::bitmap::Bitmap;
use freestone_memory::vm_memory::mmap::MmapRegion;
use freestone_memory::{GuestMemoryBackend, MemoryMap, MemorySlice, MemoryView, Region};
use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;

use crate::raw::holes::{ZERO_BLOCKS, Zeroing, is_unsupported, zeroes};

/// Iovecs that the kernel takes at once (`UIO_MAXIOV`). What is more follows when these are done.
const IOV_MAX: usize = 1024;
/// Bytes that the kernel moves at once (`MAX_RW_COUNT`), and that one iovec is cut to.
const MAX_BYTES: u32 = 0x7FFF_F000;
/// The file: the first and only one that is registered.
const FILE: types::Fixed = types::Fixed(0);
/// How often a request that was interrupted is begun again without progress.
const MAX_TRIES: u8 = 100;

/// What a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Read,
    Write,
    Flush,
    Punch(FallocateFlags),
    Zero(Zeroing),
}

/// A request, with the caller's name for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) tag: u64,
    pub(super) work: Work,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What a completion means for the request.
#[derive(Debug)]
pub(super) enum Step {
    /// It is over.
    Done(io::Result<()>),
    /// It goes on: the slot's next entry is to be submitted.
    Again,
}

/// A place for a request; the buffers are kept for the next.
#[derive(Debug)]
pub(super) struct Slot {
    /// The request as far as it is not done; `None` if the slot is free.
    request: Option<Request>,
    iov: Vec<libc::iovec>,
    /// The iovecs before this one are done.
    first: usize,
    /// Keeps mapped what `iov` is about.
    view: Option<MemoryView>,
    tries: u8,
}

impl Slot {
    pub(super) fn new() -> Self {
        // Enough for most requests; it grows once for those with more.
        Self { request: None, iov: Vec::with_capacity(16), first: 0, view: None, tries: 0 }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.request.is_some()
    }

    /// Takes a request that has no buffers of the guest.
    pub(super) fn set(&mut self, request: Request) {
        (self.request, self.tries) = (Some(request), 0);
        self.point_at_zeroes();
    }

    /// Takes a request on `bufs`, the first `done` bytes of which are done.
    ///
    /// # Errors
    /// `InvalidInput` if a buffer is not inside one region of `view`; the slot stays free.
    pub(super) fn set_buffers(
        &mut self,
        request: Request,
        view: &MemoryView,
        bufs: &[MemorySlice<'_>],
        done: usize,
    ) -> io::Result<()> {
        self.clear();
        for buf in bufs {
            if buf.is_empty() {
                continue;
            }
            let guard = buf.ptr_guard_mut();
            let iovec = libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
            if region_of(view, &iovec).is_none() {
                self.iov.clear();
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a buffer is outside of the guest memory it is said to be of",
                ));
            }
            self.iov.push(iovec);
        }
        self.view = Some(view.clone());
        self.request = Some(request);
        // Marks nothing: who moved these bytes did.
        self.advance(done, false);
        Ok(())
    }

    /// Frees the slot and returns the tag of what was in it.
    pub(super) fn clear(&mut self) -> Option<u64> {
        self.iov.clear();
        (self.first, self.tries, self.view) = (0, 0, None);
        self.request.take().map(|request| request.tag)
    }

    /// What to ask of the kernel next. It holds pointers to `iov` and to what `iov` points at.
    pub(super) fn entry(&self) -> Option<squeue::Entry> {
        let Request { work, offset, len, .. } = self.request?;
        let fallocate = |mode: FallocateFlags| {
            opcode::Fallocate::new(FILE, len).offset(offset).mode(mode.bits().cast_signed()).build()
        };
        Some(match work {
            Work::Flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Punch(mode) => fallocate(mode),
            Work::Zero(way) => match way.mode() {
                Some(mode) => fallocate(mode),
                None => self.transfer(false, offset)?,
            },
            Work::Read => self.transfer(true, offset)?,
            Work::Write => self.transfer(false, offset)?,
        })
    }

    fn transfer(&self, read: bool, offset: u64) -> Option<squeue::Entry> {
        let left = self.iov.get(self.first..)?;
        let count = u32::try_from(left.len().min(IOV_MAX)).ok()?;
        let first = left.first()?;
        Some(if count == 1 {
            let base: *mut u8 = first.iov_base.cast();
            let len = u32::try_from(first.iov_len).unwrap_or(u32::MAX).min(MAX_BYTES);
            match read {
                true => opcode::Read::new(FILE, base, len).offset(offset).build(),
                false => opcode::Write::new(FILE, base, len).offset(offset).build(),
            }
        } else {
            match read {
                true => opcode::Readv::new(FILE, left.as_ptr(), count).offset(offset).build(),
                false => opcode::Writev::new(FILE, left.as_ptr(), count).offset(offset).build(),
            }
        })
    }

    /// What the kernel's `result` means. The kernel has no use of the slot any more when this is called.
    pub(super) fn complete(&mut self, result: i32) -> Step {
        let Some(request) = self.request else { return Step::Done(Ok(())) };
        let Ok(moved) = usize::try_from(result) else {
            return self.failed(request, result.saturating_neg());
        };
        let reading = request.work == Work::Read;
        match request.work {
            Work::Flush | Work::Punch(_) => return Step::Done(Ok(())),
            Work::Zero(way) if way.mode().is_some() => return Step::Done(Ok(())),
            _ if moved > 0 => self.advance(moved, reading),
            Work::Read => return Step::Done(Err(io::ErrorKind::UnexpectedEof.into())),
            Work::Write | Work::Zero(_) => return Step::Done(Err(io::ErrorKind::WriteZero.into())),
        }
        self.tries = 0;
        if self.request.is_none_or(|request| request.len == 0) {
            return Step::Done(Ok(()));
        }
        self.point_at_zeroes();
        Step::Again
    }

    fn failed(&mut self, request: Request, errno: i32) -> Step {
        match request.work {
            Work::Zero(way) if is_unsupported(errno) && way.next().is_some() => {
                self.request = way.next().map(|way| Request { work: Work::Zero(way), ..request });
                self.point_at_zeroes();
                return Step::Again;
            }
            // ECANCELED: the thread that committed it ended before it began.
            _ if matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED) && self.tries < MAX_TRIES => {
                self.tries += 1;
                return Step::Again;
            }
            // Some of it may have been read before the error.
            Work::Read => self.advance(usize::MAX, true),
            _ => {}
        }
        Step::Done(Err(io::Error::from_raw_os_error(errno)))
    }

    /// Moves the request on by `moved` bytes, and marks them as dirty if they were read into guest memory.
    fn advance(&mut self, moved: usize, dirty: bool) {
        let mut left = moved;
        while let Some(iovec) = self.iov.get_mut(self.first).filter(|_| left > 0) {
            let part = left.min(iovec.iov_len);
            if let Some((region, offset)) =
                self.view.as_deref().filter(|_| dirty).and_then(|map| region_of(map, iovec))
            {
                MmapRegion::bitmap(region).mark_dirty(offset, part);
            }
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(part);
            iovec.iov_len -= part;
            left -= part;
            if iovec.iov_len == 0 {
                self.first += 1;
            }
        }
        let moved = moved.saturating_sub(left) as u64;
        if let Some(request) = &mut self.request {
            request.offset = request.offset.saturating_add(moved);
            request.len = request.len.saturating_sub(moved);
        }
    }

    /// Makes the iovecs point at the next zeroes, if the request is to write such.
    fn point_at_zeroes(&mut self) {
        let Some(Request { work: Work::Zero(Zeroing::Write), len: mut left, .. }) = self.request else {
            return;
        };
        (self.first, self.view) = (0, None);
        self.iov.clear();
        while left > 0 && self.iov.len() < ZERO_BLOCKS {
            let part = usize::try_from(left).unwrap_or(usize::MAX).min(zeroes().len());
            self.iov.push(libc::iovec { iov_base: zeroes().as_ptr().cast_mut().cast(), iov_len: part });
            left -= part as u64;
        }
    }
}

/// The region of `map` that the whole of `iovec` is inside, and where in it.
fn region_of<'a>(map: &'a MemoryMap, iovec: &libc::iovec) -> Option<(&'a Region, usize)> {
    map.iter().find_map(|region| {
        let offset = iovec.iov_base.addr().checked_sub(region.as_ptr().addr())?;
        let inside = offset.checked_add(iovec.iov_len).is_some_and(|end| end <= region.size());
        inside.then_some((region, offset))
    })
}
