//! [`Slot`]: a request that the kernel has, and how far it has got.
//!
//! A slot only describes memory; nothing here follows a pointer. But `ring` hands the pointers of [`Slot::entry`] to the kernel,
//! and what makes that sound is here: every iovec is inside a region that the slot's own view keeps mapped, or is a block of
//! zeroes that is only written from; and no method but `entry` is called while the kernel has them.

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

#[cfg(test)]
mod tests {
    use freestone_memory::{GuestAddress, GuestMem, GuestMemBuilder};

    use super::*;

    fn memory() -> GuestMem {
        GuestMemBuilder::new(0x1_0000).dirty_log(true).build().unwrap()
    }

    /// A slot with a request on 0x1800 bytes from sector 8 on, in three buffers.
    fn slot(mem: &GuestMem, work: Work) -> Slot {
        let view = mem.view();
        let bufs = [(0x1000, 0x800), (0x4000, 0x1000 - 0x200), (0x8000, 0x200)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let mut slot = Slot::new();
        let request = Request { tag: 5, work, offset: 4096, len: 0x1800 };
        slot.set_buffers(request, &view, &bufs, 0).unwrap();
        slot
    }

    fn lengths(slot: &Slot) -> Vec<usize> {
        slot.iov[slot.first..].iter().map(|iovec| iovec.iov_len).collect()
    }

    fn dirty(mem: &GuestMem) -> Vec<u64> {
        mem.take_dirty().unwrap()[0].pages().collect()
    }

    #[test]
    fn short_transfer_goes_on_where_it_stopped() {
        let mem = memory();
        let mut slot = slot(&mem, Work::Read);
        let start = slot.iov[1].iov_base.addr();
        assert!(matches!(slot.complete(0x900), Step::Again));
        assert_eq!(lengths(&slot), [0xD00, 0x200]);
        assert_eq!(slot.iov[slot.first].iov_base.addr(), start + 0x100);
        let request = slot.request.unwrap();
        assert_eq!((request.offset, request.len), (4096 + 0x900, 0xF00));
        assert_eq!(dirty(&mem), [0x1000, 0x4000]);
        assert!(matches!(slot.complete(0xF00), Step::Done(Ok(()))));
        assert_eq!(dirty(&mem), [0x4000, 0x8000]);
        assert_eq!(slot.clear(), Some(5));
    }

    #[test]
    fn transfer_of_nothing_is_the_end_of_the_file() {
        let mem = memory();
        for (work, kind) in
            [(Work::Read, io::ErrorKind::UnexpectedEof), (Work::Write, io::ErrorKind::WriteZero)]
        {
            let Step::Done(Err(error)) = slot(&mem, work).complete(0) else { panic!("{work:?}") };
            assert_eq!(error.kind(), kind);
        }
    }

    #[test]
    fn interrupted_requests_are_begun_again_but_not_for_ever() {
        let mem = memory();
        for errno in [libc::EINTR, libc::EAGAIN, libc::ECANCELED] {
            let mut slot = slot(&mem, Work::Write);
            for _ in 0..MAX_TRIES {
                assert!(matches!(slot.complete(-errno), Step::Again));
                assert_eq!(lengths(&slot), [0x800, 0xE00, 0x200]);
            }
            let Step::Done(Err(error)) = slot.complete(-errno) else { panic!("{errno}") };
            assert_eq!(error.raw_os_error(), Some(errno));
        }
    }

    #[test]
    fn read_that_fails_counts_as_having_filled_its_buffers() {
        let mem = memory();
        let step = slot(&mem, Work::Read).complete(-libc::EIO);
        assert!(matches!(step, Step::Done(Err(_))));
        assert_eq!(dirty(&mem), [0x1000, 0x4000, 0x8000]);
        slot(&mem, Work::Write).complete(-libc::EIO);
        assert!(dirty(&mem).is_empty());
    }

    #[test]
    fn zeroes_are_written_where_the_host_has_no_other_way() {
        let mut slot = Slot::new();
        let len = 2 * 1024 * 1024 + 512;
        slot.set(Request { tag: 1, work: Work::Zero(Zeroing::Punch), offset: 512, len });
        assert!(slot.iov.is_empty());
        assert!(matches!(slot.complete(-libc::EOPNOTSUPP), Step::Again));
        assert!(slot.iov.is_empty());
        assert!(matches!(slot.complete(-libc::EOPNOTSUPP), Step::Again));
        assert_eq!(lengths(&slot).iter().sum::<usize>(), 1 << 20);
        assert!(matches!(slot.complete(1 << 20), Step::Again));
        assert!(matches!(slot.complete((1 << 20) - 512), Step::Again));
        assert_eq!(lengths(&slot), [1024]);
        assert_eq!(slot.request.unwrap().offset, 2 * 1024 * 1024);
        assert!(matches!(slot.complete(1024), Step::Done(Ok(()))));
    }

    #[test]
    fn full_disk_is_no_reason_to_try_another_way() {
        let mut slot = Slot::new();
        slot.set(Request { tag: 1, work: Work::Zero(Zeroing::Range), offset: 0, len: 512 });
        let Step::Done(Err(error)) = slot.complete(-libc::ENOSPC) else { panic!() };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn buffer_that_reaches_out_of_its_region_is_refused() {
        let mem = memory();
        let view = mem.view();
        let region = &mem.regions()[0];
        let base = region.as_ptr();
        let inside = |offset: usize, len| {
            let iovec = libc::iovec { iov_base: base.wrapping_add(offset).cast(), iov_len: len };
            region_of(&view, &iovec).is_some()
        };
        assert!(inside(0, 0x1_0000) && inside(0xFFFF, 1) && inside(0x1_0000, 0));
        assert!(
            !inside(0xFFFF, 2) && !inside(0x1_0000, 1) && !inside(usize::MAX, 1) && !inside(1, usize::MAX)
        );
    }
}
