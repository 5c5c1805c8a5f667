//! The kernel's interface (`linux/userfaultfd.h`), as far as it is needed.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `UFFD_API`: the only version there is.
const API: u64 = 0xAA;
/// `UFFD_FEATURE_EVENT_REMOVE`: pages that are given back are told.
pub(super) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MODE_MISSING: u64 = 1;

/// `_IO(0xAA, 0x00)` of the device.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xAA00;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = 0xC018_AA3F;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::Ioctl = 0xC020_AA00;
/// `_IOR(0xAA, 0x01, struct uffdio_range)`.
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_AA01;
/// `_IOR(0xAA, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: libc::Ioctl = 0x8010_AA02;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`.
const UFFDIO_COPY: libc::Ioctl = 0xC028_AA03;
/// `_IOWR(0xAA, 0x04, struct uffdio_zeropage)`.
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xC020_AA04;

#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgs {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgs {
    range: RangeArgs,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgs {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct ZeroArgs {
    range: RangeArgs,
    mode: u64,
    zeroed: i64,
}

// The size is part of the number of an ioctl.
const _: () = {
    assert!(size_of::<ApiArgs>() == 0x18 && size_of::<RangeArgs>() == 0x10);
    assert!(size_of::<RegisterArgs>() == 0x20 && size_of::<CopyArgs>() == 0x28);
    assert!(size_of::<ZeroArgs>() == 0x20);
};

/// Makes a descriptor by `/dev/userfaultfd`.
pub(super) fn create_by_device(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: the request takes flags by value, and touches no memory.
    let fd =
        unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Does what every descriptor needs first.
pub(super) fn enable(fd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut args = ApiArgs { api: API, features, ioctls: 0 };
    // SAFETY: `args` is what the request wants (its size is in the number) and outlives the call, which writes only to it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut args) })
}

/// Has faults in a range of this process reported. The caller's mapping must live as long as the faults are to be served; when it
/// goes, so does this.
pub(super) fn register(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut args = RegisterArgs { range: RangeArgs { start, len }, mode: MODE_MISSING, ioctls: 0 };
    // SAFETY: `args` is what the request wants and outlives the call, which writes only to it. The range is memory that belongs
    // to a guest: no reference into it exists, and an access to it may wait, which is safe.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut args) })
}

/// Ends what [`register`] began: who waits gets on, and pages that are missing read as zeros.
pub(super) fn unregister(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut args = RangeArgs { start, len };
    // SAFETY: `args` is what the request wants and outlives the call. What changes is how missing pages of the range are filled in.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut args) })
}

/// Fills pages that are missing at `to` in the process of the descriptor, and wakes those who wait for them. Returns how many bytes
/// were done before the first page that could not be: 0 is never returned.
pub(super) fn copy(fd: BorrowedFd<'_>, to: u64, pages: &[u8]) -> io::Result<u64> {
    let src = pages.as_ptr().addr() as u64;
    let mut args = CopyArgs { dst: to, src, len: pages.len() as u64, mode: 0, copied: 0 };
    // SAFETY: `args` is what the request wants and outlives the call, which writes only to it and reads `pages`, whose true
    // address and length are given. What the kernel writes to is memory registered with the descriptor and nothing else, which the
    // other side gave away for just that.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_COPY, &raw mut args) };
    done(rc, args.copied)
}

/// As [`copy`], with zeros.
pub(super) fn zero(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<u64> {
    let mut args = ZeroArgs { range: RangeArgs { start, len }, mode: 0, zeroed: 0 };
    // SAFETY: as in `copy`; nothing of ours is read.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut args) };
    done(rc, args.zeroed)
}

/// Wakes who waits for a page that is there by now.
pub(super) fn wake(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut args = RangeArgs { start, len };
    // SAFETY: `args` is what the request wants and outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_WAKE, &raw mut args) })
}

fn check(rc: libc::c_int) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The result of filling in: bytes, even of a call that failed after some.
fn done(rc: libc::c_int, bytes: i64) -> io::Result<u64> {
    let error = io::Error::last_os_error();
    match u64::try_from(bytes) {
        Ok(bytes) if bytes > 0 => Ok(bytes),
        _ if rc < 0 => Err(error),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// What a descriptor tells (`struct uffd_msg`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Somebody waits for the page at this address.
    Fault { address: u64 },
    /// Pages between these addresses were given back.
    Remove { start: u64, end: u64 },
    /// Something that was not asked for.
    Other,
}

/// Bytes of an event.
pub(super) const EVENT_LEN: usize = 32;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

impl Event {
    pub(super) fn parse(bytes: &[u8; EVENT_LEN]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |index: usize| words.get(index).map_or(0, |word| u64::from_ne_bytes(*word));
        match bytes.first() {
            Some(&EVENT_PAGEFAULT) => Self::Fault { address: word(2) },
            Some(&EVENT_REMOVE) => Self::Remove { start: word(1), end: word(2) },
            _ => Self::Other,
        }
    }
}
