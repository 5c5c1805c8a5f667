//! Vectored I/O of files and sockets straight into and out of guest memory, without a copy.
//!
//! Crates that forbid `unsafe` (block devices, image formats) do their file I/O through these functions. They are
//! `preadv(2)` and `pwritev(2)` (for one slice `pread(2)` and `pwrite(2)`) over [`VolatileSlice`]s, and `preadv2(2)` where it must not wait, and nothing more: no
//! queueing, no retry of short transfers.
//!
//! The system calls are made through libc and not through rustix or `std`, because those take `IoSliceMut`, which is a
//! `&mut [u8]`. The guest may write to the same bytes at any moment, so such a reference must not exist, not even for
//! the time of the call. An `iovec` holds a raw pointer and makes no such promise.

mod stream;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

pub use stream::{
    Take, discard, read_vectored, receive_vectored, send_vectored, set_peek_offset, write_vectored,
};

/// Slices that are handed over without allocating.
const INLINE: usize = 16;
/// Slices the kernel takes in one call (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

const NO_IOVEC: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };

/// Reads from `fd` at byte `offset` into `bufs`, in their order, and marks what was written as dirty.
///
/// Returns how many bytes were read. That is less than the slices hold at the end of the file and whenever the kernel
/// transfers less (it never moves more than 2 GiB at once): the caller decides whether to go on. Interrupted calls are
/// repeated. An error after some bytes were read is reported by the next call, as with `read(2)`.
///
/// # Errors
/// What `preadv(2)` reports; `InvalidInput` when the offset, or the end of the transfer, is above `i64::MAX`.
pub fn read_vectored_at<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    bufs: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    if let [buf] = bufs {
        let done = transfer_one(buf, offset, |at, len, offset| {
            // SAFETY: `at..at + len` is the memory of a `VolatileSlice` borrowed for the whole call: mapped, writable by the
            // slice's contract, and never turned into a reference here. `fd` is open while it is borrowed. PREAD64 takes these
            // four arguments.
            unsafe { libc::syscall(libc::SYS_pread64, fd.as_raw_fd(), at, len, offset) }
        })?;
        mark_dirty(bufs, done);
        return Ok(done);
    }
    let done = transfer(bufs, offset, |iov, offset| {
        // SAFETY: `transfer` gives iovecs that each describe the memory of a `VolatileSlice` borrowed for the whole call:
        // mapped, writable by the slice's contract, and never turned into a reference here. `iov.len()` is at most
        // IOV_MAX, so it is the true number of initialised entries behind the pointer. `fd` is open while it is borrowed.
        unsafe { libc::preadv(fd.as_raw_fd(), iov.as_ptr(), count(iov), offset) }
    })?;
    mark_dirty(bufs, done);
    Ok(done)
}

/// As [`read_vectored_at`], but never waits for a device: only what the host has in memory is read (`RWF_NOWAIT`).
///
/// Returns how many bytes were read: fewer than the slices hold where the rest is not in memory, or at the end of the file.
///
/// # Errors
/// As [`read_vectored_at`]; `WouldBlock` when not even the first byte is in memory; `EOPNOTSUPP` when the file system cannot
/// tell (tmpfs, for one, which has everything in memory).
pub fn read_vectored_at_nowait<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    bufs: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    let done = transfer(bufs, offset, |iov, offset| {
        // SAFETY: as in `read_vectored_at`; the flag changes when the call returns, not what it does with the memory.
        unsafe { libc::preadv2(fd.as_raw_fd(), iov.as_ptr(), count(iov), offset, libc::RWF_NOWAIT) }
    })?;
    mark_dirty(bufs, done);
    Ok(done)
}

/// Writes `bufs`, in their order, to `fd` at byte `offset`.
///
/// Returns how many bytes were written, which may be less than the slices hold. Interrupted calls are repeated. An error
/// after some bytes were written is reported by the next call, as with `write(2)`.
///
/// # Errors
/// What `pwritev(2)` reports; `InvalidInput` when the offset, or the end of the transfer, is above `i64::MAX`.
pub fn write_vectored_at<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    bufs: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<usize> {
    if let [buf] = bufs {
        return transfer_one(buf, offset, |at, len, offset| {
            // SAFETY: as in `read_vectored_at`; the kernel only reads the memory, as told below.
            unsafe { libc::syscall(libc::SYS_pwrite64, fd.as_raw_fd(), at, len, offset) }
        });
    }
    transfer(bufs, offset, |iov, offset| {
        // SAFETY: as in `read_vectored_at`; the kernel only reads the memory. The guest may change it meanwhile: then the
        // file gets a mixture, which is the guest's own doing and no concern of memory safety.
        unsafe { libc::pwritev(fd.as_raw_fd(), iov.as_ptr(), count(iov), offset) }
    })
}

/// Number of entries as the system call wants it; `transfer` never makes more than IOV_MAX.
fn count(iov: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iov.len()).unwrap_or(0)
}

/// The offset of a transfer of `length` bytes as the system calls want it; `length` is `None` if it does not fit 64 bits.
fn checked_offset(offset: u64, length: Option<u64>) -> io::Result<libc::off_t> {
    let end = length.and_then(|length| offset.checked_add(length));
    // What is not above the end fits as well.
    end.and_then(|end| libc::off_t::try_from(end).ok().and(libc::off_t::try_from(offset).ok())).ok_or_else(
        || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("transfer at offset {offset} goes beyond the largest file offset"),
            )
        },
    )
}

/// One slice by one system call, repeated while it is interrupted.
///
/// A request of a disk is mostly one slice. The kernel does a call without iovecs in less time, and a call that is made
/// directly is no cancellation point of the C library, which costs two locked instructions where there are several threads.
fn transfer_one<B: BitmapSlice>(
    buf: &VolatileSlice<'_, B>,
    offset: u64,
    call: impl Fn(*mut u8, usize, libc::off_t) -> libc::c_long,
) -> io::Result<usize> {
    let offset = checked_offset(offset, u64::try_from(buf.len()).ok())?;
    if buf.is_empty() {
        return Ok(0);
    }
    // As in `one_chunk`, the slice's lifetime keeps the memory mapped.
    let guard = buf.ptr_guard_mut();
    repeat(|| call(guard.as_ptr(), guard.len(), offset))
}

/// Makes a call again while it is interrupted. A negative result means errno.
fn repeat<T: TryInto<usize>>(call: impl Fn() -> T) -> io::Result<usize> {
    loop {
        if let Ok(done) = call().try_into() {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Calls `call` for chunks of at most `IOV_MAX` slices until all are done or one comes out short.
fn transfer<B: BitmapSlice>(
    bufs: &[VolatileSlice<'_, B>],
    offset: u64,
    call: impl Fn(&[libc::iovec], libc::off_t) -> libc::ssize_t,
) -> io::Result<usize> {
    let length = bufs.iter().try_fold(0u64, |sum, buf| sum.checked_add(u64::try_from(buf.len()).ok()?));
    checked_offset(offset, length)?;
    if bufs.len() <= INLINE {
        let mut iov = [NO_IOVEC; INLINE];
        return one_chunk(bufs, &mut iov, offset, &call).map(|(done, _)| done);
    }
    let mut iov = vec![NO_IOVEC; bufs.len().min(IOV_MAX)];
    let mut total = 0;
    for chunk in bufs.chunks(IOV_MAX) {
        // `total` is at most `length`, so the sum is at most the end that was checked above.
        match one_chunk(chunk, &mut iov, offset + total as u64, &call) {
            Ok((done, wanted)) => {
                total += done;
                if done < wanted {
                    break;
                }
            }
            Err(_) if total > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(total)
}

/// One system call, repeated while it is interrupted. Returns the bytes moved and the bytes wanted.
fn one_chunk<B: BitmapSlice>(
    bufs: &[VolatileSlice<'_, B>],
    iov: &mut [libc::iovec],
    offset: u64,
    call: impl Fn(&[libc::iovec], libc::off_t) -> libc::ssize_t,
) -> io::Result<(usize, usize)> {
    let mut used = 0;
    let mut wanted = 0;
    for (entry, buf) in iov.iter_mut().zip(bufs.iter().filter(|buf| !buf.is_empty())) {
        // The guard is not kept: without vm-memory's Xen backend it owns nothing. The slice's lifetime keeps the
        // memory mapped until the call has returned.
        let guard = buf.ptr_guard_mut();
        *entry = libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
        used += 1;
        wanted += guard.len();
    }
    if used == 0 {
        return Ok((0, 0));
    }
    let iov = iov.get(..used).unwrap_or_default();
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    repeat(|| call(iov, offset)).map(|done| (done, wanted))
}

/// Marks the first `len` bytes of `bufs` as dirty.
fn mark_dirty<B: BitmapSlice>(bufs: &[VolatileSlice<'_, B>], len: usize) {
    let mut left = len;
    for buf in bufs {
        let part = left.min(buf.len());
        if part > 0 {
            buf.bitmap().mark_dirty(0, part);
        }
        left -= part;
        if left == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

    use super::*;
    use crate::{GuestMem, GuestMemBuilder};

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn content(file: &mut File) -> Vec<u8> {
        let mut content = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut content).unwrap();
        content
    }

    #[test]
    fn read_scatters_the_file_over_the_slices_in_order() {
        let file = file(b"..one-two");
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        let bufs = [(0x1000, 4), (0x10, 3)].map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        assert_eq!(read_vectored_at(file.as_fd(), &bufs, 2).unwrap(), 7);
        assert_eq!(&view.read_obj::<[u8; 5]>(GuestAddress(0x1000)).unwrap(), b"one-\0");
        assert_eq!(&view.read_obj::<[u8; 4]>(GuestAddress(0x10)).unwrap(), b"two\0");
    }

    #[test]
    fn write_gathers_the_slices_in_order() {
        let mut file = file(b"--");
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        view.write_slice(b"abc", GuestAddress(0xFFF)).unwrap();
        let bufs = [(0x1000, 2), (0xFFF, 1)].map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        assert_eq!(write_vectored_at(file.as_fd(), &bufs, 2).unwrap(), 3);
        assert_eq!(content(&mut file), b"--bca");
    }

    #[test]
    fn read_at_the_end_of_the_file_is_short() {
        let file = file(b"12345");
        let mem = GuestMem::anonymous(0x1000).unwrap();
        let view = mem.view();
        let bufs = [view.get_slice(GuestAddress(0), 100).unwrap()];
        assert_eq!(read_vectored_at(file.as_fd(), &bufs, 3).unwrap(), 2);
        assert_eq!(read_vectored_at(file.as_fd(), &bufs, 5).unwrap(), 0);
    }

    #[test]
    fn read_marks_only_the_pages_that_were_written() {
        let file = file(&[7; 0x1001]);
        let mem = GuestMemBuilder::new(0x1_0000).dirty_log(true).build().unwrap();
        let view = mem.view();
        let bufs = [
            view.get_slice(GuestAddress(0x8000), 0x1000).unwrap(),
            view.get_slice(GuestAddress(0x2000), 0x3000).unwrap(),
        ];
        read_vectored_at(file.as_fd(), &bufs, 0).unwrap();
        let pages: Vec<u64> = mem.take_dirty().unwrap()[0].pages().collect();
        assert_eq!(pages, [0x2000, 0x8000]);
    }

    #[test]
    fn write_marks_nothing() {
        let file = file(b"");
        let mem = GuestMemBuilder::new(0x1_0000).dirty_log(true).build().unwrap();
        let view = mem.view();
        write_vectored_at(file.as_fd(), &[view.get_slice(GuestAddress(0), 0x3000).unwrap()], 0).unwrap();
        assert_eq!(mem.take_dirty().unwrap()[0].count(), 0);
    }

    #[test]
    fn more_slices_than_the_kernel_takes_at_once_are_chunked() {
        let slices = 3 * IOV_MAX + 5;
        let original: Vec<u8> = (0..slices * 3).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let source = file(&original);
        let mut target = file(b"");
        let mut memory = vec![0; slices * 3];
        let whole = VolatileSlice::from(memory.as_mut_slice());
        let bufs: Vec<_> = (0..slices).map(|i| whole.subslice(i * 3, 3).unwrap()).collect();
        assert_eq!(read_vectored_at(source.as_fd(), &bufs, 0).unwrap(), slices * 3);
        assert_eq!(write_vectored_at(target.as_fd(), &bufs, 0).unwrap(), slices * 3);
        assert_eq!(content(&mut target), original);
    }

    #[test]
    fn read_that_may_not_wait_reads_what_the_host_has_in_memory() {
        // Written a moment ago, so it is in memory. Some file systems cannot tell.
        let file = file(b"..cached");
        let mem = GuestMemBuilder::new(0x1_0000).dirty_log(true).build().unwrap();
        let view = mem.view();
        let bufs = [view.get_slice(GuestAddress(0x3000), 6).unwrap()];
        match read_vectored_at_nowait(file.as_fd(), &bufs, 2) {
            Ok(done) => {
                assert_eq!(done, 6);
                assert_eq!(&view.read_obj::<[u8; 6]>(GuestAddress(0x3000)).unwrap(), b"cached");
                assert_eq!(mem.take_dirty().unwrap()[0].pages().collect::<Vec<_>>(), [0x3000]);
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{error}"),
        }
    }

    #[test]
    fn chunked_read_stops_at_the_end_of_the_file() {
        let source = file(&[1; IOV_MAX + 10]);
        let mut memory = vec![0; 4 * IOV_MAX];
        let whole = VolatileSlice::from(memory.as_mut_slice());
        let bufs: Vec<_> = (0..whole.len()).map(|i| whole.subslice(i, 1).unwrap()).collect();
        assert_eq!(read_vectored_at(source.as_fd(), &bufs, 0).unwrap(), IOV_MAX + 10);
    }

    #[test]
    fn chunk_that_comes_out_short_is_the_last() {
        let calls = std::cell::Cell::new(0);
        let mut memory = vec![0; 2 * IOV_MAX];
        let whole = VolatileSlice::from(memory.as_mut_slice());
        let bufs: Vec<_> = (0..whole.len()).map(|i| whole.subslice(i, 1).unwrap()).collect();
        // A second call would fill the wrong slices.
        let done = transfer(&bufs, 0, |iov, _| {
            calls.set(calls.get() + 1);
            libc::ssize_t::try_from(iov.len() - 1).unwrap()
        });
        assert_eq!((done.unwrap(), calls.get()), (IOV_MAX - 1, 1));
    }

    #[test]
    fn error_after_some_chunks_is_a_short_count() {
        // No file fails at its second kilobyte on request, so a closure stands for the system call.
        let calls = std::cell::Cell::new(0);
        let mut memory = vec![0; 2 * IOV_MAX];
        let whole = VolatileSlice::from(memory.as_mut_slice());
        let bufs: Vec<_> = (0..whole.len()).map(|i| whole.subslice(i, 1).unwrap()).collect();
        let done = transfer(&bufs, 0, |iov, _| {
            calls.set(calls.get() + 1);
            if calls.get() == 1 {
                return iov.len().try_into().unwrap();
            }
            // SAFETY: there is no such descriptor; the call only sets errno to EBADF.
            unsafe { libc::close(-1) }.try_into().unwrap()
        });
        assert_eq!(done.unwrap(), IOV_MAX);
    }

    #[test]
    fn empty_slices_are_passed_over() {
        let file = file(b"xyz");
        let mut memory = [0u8; 3];
        let whole = VolatileSlice::from(memory.as_mut_slice());
        let empty = whole.subslice(0, 0).unwrap();
        assert_eq!(read_vectored_at(file.as_fd(), &[empty, whole, empty], 0).unwrap(), 3);
        assert_eq!(&memory, b"xyz");
    }

    #[test]
    fn nothing_to_do_is_not_an_error() {
        let file = file(b"xyz");
        assert_eq!(read_vectored_at::<()>(file.as_fd(), &[], 0).unwrap(), 0);
        assert_eq!(write_vectored_at::<()>(file.as_fd(), &[], 0).unwrap(), 0);
    }

    #[test]
    fn offset_beyond_the_largest_is_refused() {
        let file = file(b"xyz");
        let mut memory = [0u8; 3];
        let bufs = [VolatileSlice::from(memory.as_mut_slice())];
        for offset in [u64::MAX, 1 << 63, (1 << 63) - 3] {
            let error = read_vectored_at(file.as_fd(), &bufs, offset).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{offset:#x}");
            assert!(error.to_string().contains(&offset.to_string()), "{error}");
        }
        assert_eq!(read_vectored_at(file.as_fd(), &bufs, (1 << 63) - 4).unwrap(), 0);
    }

    #[test]
    fn error_of_the_kernel_is_passed_on() {
        let read_only = File::open("/dev/null").unwrap();
        let mut memory = [0u8; 3];
        let bufs = [VolatileSlice::from(memory.as_mut_slice())];
        let error = write_vectored_at(read_only.as_fd(), &bufs, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn slices_of_a_region_and_of_the_whole_memory_are_alike() {
        let file = file(b"region");
        let mem = GuestMem::anonymous(0x1000).unwrap();
        let region = &mem.regions()[0];
        let slice = VolatileMemory::get_slice(&***region, 0x20, 6).unwrap();
        read_vectored_at(file.as_fd(), &[slice], 0).unwrap();
        assert_eq!(&mem.view().read_obj::<[u8; 6]>(GuestAddress(0x20)).unwrap(), b"region");
    }
}
