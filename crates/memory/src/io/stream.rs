//! The same for what has no positions: sockets, taps, pipes.
//!
//! A header of the caller's own goes in front of the guest's bytes in one call, and any part of the slices can be chosen, so a
//! packet is moved as it lies. Nothing here waits: a socket is asked not to, and whatever else must have been opened with
//! `O_NONBLOCK`.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::{IOV_MAX, NO_IOVEC, repeat};

/// A frame of 64 KiB in pages, with what is in front of it, fits.
const INLINE: usize = 32;

/// What happens to the bytes that [`receive_vectored`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// They leave the socket.
    Away,
    /// They stay there (`MSG_PEEK`): with `SO_PEEK_OFF`, the next peek goes on behind them.
    Peek,
}

/// Reads from `fd` (`readv(2)`): first `prefix` is filled, then the bytes `range` of `bufs` taken as one sequence. Marks what was
/// written as dirty.
///
/// Returns how many bytes were read, those of `prefix` included. Interrupted calls are repeated.
///
/// # Errors
/// What `readv(2)` reports; `InvalidInput` for more than 1024 slices.
pub fn read_vectored<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    prefix: &mut [u8],
    bufs: &[VolatileSlice<'_, B>],
    range: Range<usize>,
) -> io::Result<usize> {
    let front = iovec(prefix.as_mut_ptr(), prefix.len());
    let done = gather(front, bufs, range.clone(), |iov| {
        // SAFETY: `gather` gives iovecs that describe `prefix`, which is borrowed mutably, and memory of `VolatileSlice`s: mapped
        // and writable by the slices' contract, borrowed for the whole call, and never turned into a reference here. There are
        // `iov.len()` initialised entries, at most IOV_MAX. `fd` is open while it is borrowed.
        unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), count(iov)) }
    })?;
    mark_dirty(bufs, range.start, done.saturating_sub(prefix.len()));
    Ok(done)
}

/// Writes to `fd` (`writev(2)`): first `prefix`, then the bytes `range` of `bufs` taken as one sequence.
///
/// Returns how many bytes were written, those of `prefix` included. Interrupted calls are repeated.
///
/// # Errors
/// What `writev(2)` reports; `InvalidInput` for more than 1024 slices.
pub fn write_vectored<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    prefix: &[u8],
    bufs: &[VolatileSlice<'_, B>],
    range: Range<usize>,
) -> io::Result<usize> {
    gather(iovec(prefix.as_ptr().cast_mut(), prefix.len()), bufs, range, |iov| {
        // SAFETY: as in `read_vectored`; the kernel only reads the memory, `prefix` too. The guest may change its part meanwhile:
        // then the other side gets a mixture, which is the guest's own doing and no concern of memory safety.
        unsafe { libc::writev(fd.as_raw_fd(), iov.as_ptr(), count(iov)) }
    })
}

/// Receives from the socket `fd` (`recvmsg(2)`) without waiting: first `prefix` is filled, then the bytes `range` of `bufs` taken
/// as one sequence. Marks what was written as dirty.
///
/// Returns how many bytes were received, those of `prefix` included. Interrupted calls are repeated.
///
/// # Errors
/// What `recvmsg(2)` reports, `WouldBlock` if there is nothing; `InvalidInput` for more than 1024 slices.
pub fn receive_vectored<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    prefix: &mut [u8],
    bufs: &[VolatileSlice<'_, B>],
    range: Range<usize>,
    take: Take,
) -> io::Result<usize> {
    let flags = match take {
        Take::Away => libc::MSG_DONTWAIT,
        Take::Peek => libc::MSG_DONTWAIT | libc::MSG_PEEK,
    };
    let front = iovec(prefix.as_mut_ptr(), prefix.len());
    let done = gather(front, bufs, range.clone(), |iov| {
        let mut message = message(iov);
        // SAFETY: `message` has no name and no control data, and names the iovecs of `gather`, of which the same holds as in
        // `read_vectored`; they live until the call returns. `fd` is open while it is borrowed.
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) }
    })?;
    mark_dirty(bufs, range.start, done.saturating_sub(prefix.len()));
    Ok(done)
}

/// Sends to the connected socket `fd` (`sendmsg(2)`) without waiting and without a signal: first `prefix`, then the bytes `range`
/// of `bufs` taken as one sequence.
///
/// Returns how many bytes were taken, those of `prefix` included. Interrupted calls are repeated.
///
/// # Errors
/// What `sendmsg(2)` reports, `WouldBlock` if nothing can be taken; `InvalidInput` for more than 1024 slices.
pub fn send_vectored<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    prefix: &[u8],
    bufs: &[VolatileSlice<'_, B>],
    range: Range<usize>,
) -> io::Result<usize> {
    gather(iovec(prefix.as_ptr().cast_mut(), prefix.len()), bufs, range, |iov| {
        let message = message(iov);
        // SAFETY: as in `receive_vectored`; the kernel only reads the memory, as in `write_vectored`.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
    })
}

/// Takes up to `len` bytes out of the TCP socket `fd` without waiting and without looking at them (`MSG_TRUNC`). Only TCP: other
/// sockets would want memory.
///
/// Returns how many bytes left the socket. Interrupted calls are repeated.
///
/// # Errors
/// What `recv(2)` reports, `WouldBlock` if there is nothing.
pub fn discard(fd: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    repeat(|| {
        // SAFETY: the kernel writes to no memory: TCP does not with this flag, and others are told of a null pointer, to which
        // nothing can be written. `fd` is open while it is borrowed.
        unsafe { libc::recv(fd.as_raw_fd(), ptr::null_mut(), len, libc::MSG_DONTWAIT | libc::MSG_TRUNC) }
    })
}

/// Lets the next [`Take::Peek`] on the socket `fd` begin `offset` bytes behind the first that is there, and those after it where
/// the one before ended (`SO_PEEK_OFF`).
///
/// # Errors
/// What `setsockopt(2)` reports: kernels before 6.9 do not know this of TCP.
pub fn set_peek_offset(fd: BorrowedFd<'_>, offset: u32) -> io::Result<()> {
    let offset = libc::c_int::try_from(offset)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "offset beyond what a socket holds"))?;
    let len = libc::socklen_t::try_from(size_of_val(&offset)).unwrap_or(0);
    repeat(|| {
        // SAFETY: the option's value is an int, which lives until the call returns. `fd` is open while it is borrowed.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEEK_OFF,
                (&raw const offset).cast(),
                len,
            )
        }
    })
    .map(|_| ())
}

fn iovec(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: len }
}

/// A message to or from nobody in particular, without control data.
fn message(iov: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all of `msghdr` is numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_ptr().cast_mut();
    message.msg_iovlen = iov.len();
    message
}

/// Number of entries as the system call wants it; `gather` never makes more than IOV_MAX.
fn count(iov: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iov.len()).unwrap_or(0)
}

/// Calls `call` with `front` and the bytes `range` of `bufs`; repeats it while it is interrupted.
fn gather<B: BitmapSlice>(
    front: libc::iovec,
    bufs: &[VolatileSlice<'_, B>],
    range: Range<usize>,
    call: impl Fn(&[libc::iovec]) -> libc::ssize_t,
) -> io::Result<usize> {
    let mut inline = [NO_IOVEC; INLINE];
    let mut heap;
    let room: &mut [libc::iovec] = if bufs.len() < INLINE {
        &mut inline
    } else if bufs.len() < IOV_MAX {
        heap = vec![NO_IOVEC; bufs.len() + 1];
        &mut heap
    } else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more slices than one call takes"));
    };
    let mut used = 0;
    let mut entries = room.iter_mut();
    let mut add = |entry: libc::iovec| {
        if let Some(next) = entries.next() {
            *next = entry;
            used += 1;
        }
    };
    if front.iov_len > 0 {
        add(front);
    }
    let (mut skip, mut left) = (range.start, range.end.saturating_sub(range.start));
    for buf in bufs {
        if left == 0 {
            break;
        }
        if skip >= buf.len() {
            skip -= buf.len();
            continue;
        }
        let len = (buf.len() - skip).min(left);
        // The guard is not kept: without vm-memory's Xen backend it owns nothing. The slice's lifetime keeps the memory mapped
        // until the call has returned.
        let base = buf.ptr_guard_mut().as_ptr();
        // `skip` is less than the slice's length, so the address is inside the slice.
        add(iovec(base.wrapping_add(skip), len));
        skip = 0;
        left -= len;
    }
    let iov = room.get(..used).unwrap_or_default();
    let iov = if iov.is_empty() { &[iovec(ptr::NonNull::dangling().as_ptr(), 0)] } else { iov };
    repeat(|| call(iov))
}

/// Marks `len` bytes of `bufs` as dirty, from the byte `skip` of all on.
fn mark_dirty<B: BitmapSlice>(bufs: &[VolatileSlice<'_, B>], skip: usize, len: usize) {
    let (mut skip, mut left) = (skip, len);
    for buf in bufs {
        if left == 0 {
            break;
        }
        let start = skip.min(buf.len());
        let part = left.min(buf.len() - start);
        if part > 0 {
            buf.bitmap().mark_dirty(start, part);
        }
        skip -= start;
        left -= part;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::{GuestMem, GuestMemBuilder};

    fn filled() -> GuestMem {
        let mem = GuestMemBuilder::new(0x1_0000).dirty_log(true).build().unwrap();
        mem.view().write_slice(b"abcdefgh", GuestAddress(0x1000)).unwrap();
        mem.view().write_slice(b"ijkl", GuestAddress(0x5000)).unwrap();
        mem.take_dirty();
        mem
    }

    #[test]
    fn send_takes_a_header_and_any_part_of_the_slices() {
        let mem = filled();
        let view = mem.view();
        let bufs = [(0x1000, 8), (0x5000, 4)].map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let (a, b) = UnixDatagram::pair().unwrap();
        let mut got = [0; 64];
        for (range, want) in [
            (0..12, &b"<abcdefghijkl"[..]),
            (6..10, b"<ghij"),
            (8..9, b"<i"),
            (3..5, b"<de"),
            (12..12, b"<"),
            (11..40, b"<l"),
        ] {
            assert_eq!(send_vectored(a.as_fd(), b"<", &bufs, range.clone()).unwrap(), want.len());
            assert_eq!(b.recv(&mut got).unwrap(), want.len());
            assert_eq!(&got[..want.len()], want, "{range:?}");
            assert_eq!(write_vectored(a.as_fd(), b"<", &bufs, range).unwrap(), want.len());
            assert_eq!(b.recv(&mut got).unwrap(), want.len());
        }
    }

    #[test]
    fn receive_fills_the_header_first_and_marks_what_it_wrote() {
        let mem = filled();
        let view = mem.view();
        let bufs = [(0x1000, 8), (0x5000, 4)].map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let (a, b) = UnixStream::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        let mut header = [0; 2];
        let nothing = receive_vectored(b.as_fd(), &mut header, &bufs, 7..12, Take::Away).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        (&a).write_all(b"HHXYZ").unwrap();
        assert_eq!(receive_vectored(b.as_fd(), &mut header, &bufs, 7..12, Take::Peek).unwrap(), 5);
        header = [0; 2];
        assert_eq!(receive_vectored(b.as_fd(), &mut header, &bufs, 7..12, Take::Away).unwrap(), 5);
        assert_eq!(&header, b"HH");
        assert_eq!(&view.read_obj::<[u8; 8]>(GuestAddress(0x1000)).unwrap(), b"abcdefgX");
        assert_eq!(&view.read_obj::<[u8; 4]>(GuestAddress(0x5000)).unwrap(), b"YZkl");
        let dirty = mem.take_dirty().unwrap();
        assert_eq!(dirty[0].pages().collect::<Vec<_>>(), [0x1000, 0x5000]);
        (&a).write_all(b"12").unwrap();
        assert_eq!(read_vectored(b.as_fd(), &mut [], &bufs, 0..1).unwrap(), 1);
        assert_eq!(&view.read_obj::<[u8; 2]>(GuestAddress(0x1000)).unwrap(), b"1b");
        drop(a);
        let mut rest = Vec::new();
        (&b).read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"2");
    }

    #[test]
    fn bytes_of_tcp_are_peeked_from_an_offset_and_leave_without_a_copy() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        assert_eq!(discard(b.as_fd(), 1).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        a.write_all(b"abcdefgh").unwrap();
        drop(a);
        assert_eq!(discard(b.as_fd(), 2).unwrap(), 2);
        let mut got = [0; 3];
        let peek = |got: &mut [u8]| {
            receive_vectored(b.as_fd(), got, &[] as &[VolatileSlice<'_>], 0..0, Take::Peek).unwrap()
        };
        if set_peek_offset(b.as_fd(), 1).is_ok() {
            assert_eq!((peek(&mut got), &got), (3, b"def"));
            assert_eq!(discard(b.as_fd(), 3).unwrap(), 3);
            assert_eq!((peek(&mut got), &got), (2, b"ghf"));
            assert_eq!(peek(&mut got), 0);
        }
        assert_eq!(set_peek_offset(b.as_fd(), u32::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn more_slices_than_one_call_takes_are_refused() {
        let mut memory = [0u8; 1];
        let slice = VolatileSlice::from(memory.as_mut_slice());
        let bufs: Vec<_> = (0..2000).map(|_| slice.subslice(0, 1).unwrap()).collect();
        let (a, _b) = UnixDatagram::pair().unwrap();
        let error = send_vectored(a.as_fd(), &[], &bufs, 0..10).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(send_vectored(a.as_fd(), &[], &bufs[..100], 0..50).unwrap(), 50);
    }
}
