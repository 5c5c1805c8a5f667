//! The ioctls of a tap (`Documentation/networking/tuntap.rst` of Linux, `linux/if_tun.h`).
//!
//! The only unsafe code of this crate.

use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Longest name of an interface: `IFNAMSIZ` without the zero at its end.
pub(super) const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// `struct ifreq`, with its union as bytes.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; 24],
}

const _: () = assert!(size_of::<IfReq>() == size_of::<libc::ifreq>());

impl IfReq {
    fn new(name: &str) -> io::Result<Self> {
        let mut request = Self { name: [0; libc::IFNAMSIZ], value: [0; 24] };
        let to = request.name.get_mut(..name.len()).filter(|to| to.len() <= MAX_NAME);
        to.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn name(&self) -> String {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }

    fn flags(&self) -> c_int {
        let [a, b, ..] = self.value;
        c_int::from(u16::from_ne_bytes([a, b]))
    }

    fn set_flags(&mut self, flags: c_int) {
        let [a, b, c, d] = flags.to_ne_bytes();
        let low = if cfg!(target_endian = "little") { [a, b] } else { [c, d] };
        if let Some(to) = self.value.first_chunk_mut() {
            *to = low;
        }
    }
}

/// An ioctl whose argument is a pointer to `T`.
fn by_pointer<T>(fd: BorrowedFd<'_>, request: libc::Ioctl, value: &mut T) -> io::Result<()> {
    // SAFETY: `value` is a live, exclusive reference, and every caller below gives the type that its request reads and writes: an
    // `ifreq` or an `int`, both plain data without padding that matters. The kernel keeps no pointer. `fd` is open while it is
    // borrowed; on a descriptor of another kind the request is refused.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(value)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ioctl whose argument is a number.
fn by_value(fd: BorrowedFd<'_>, request: libc::Ioctl, value: c_uint) -> io::Result<()> {
    // SAFETY: the requests of the callers below take a number, so nothing of ours is read or written. `fd` is open while it is
    // borrowed; on a descriptor of another kind the request is refused.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, libc::c_ulong::from(value)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the descriptor of `/dev/net/tun` a queue of the interface `name`, which is made if there is none; returns its name.
pub(super) fn set_interface(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<String> {
    let mut request = IfReq::new(name)?;
    request.set_flags(flags);
    by_pointer(fd, libc::TUNSETIFF, &mut request)?;
    Ok(request.name())
}

/// The name and flags of the interface that a descriptor is a queue of.
pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    let mut request = IfReq::new("")?;
    by_pointer(fd, libc::TUNGETIFF, &mut request)?;
    Ok((request.name(), request.flags()))
}

/// Sets what the reader lets be left undone: `TUN_F_*`.
pub(super) fn set_offload(fd: BorrowedFd<'_>, bits: c_uint) -> io::Result<()> {
    by_value(fd, libc::TUNSETOFFLOAD, bits)
}

/// Sets the length of the header in front of each frame, and that its fields are little-endian on every machine.
pub(super) fn set_header(fd: BorrowedFd<'_>, len: c_int) -> io::Result<()> {
    let mut len = len;
    by_pointer(fd, libc::TUNSETVNETHDRSZ, &mut len)?;
    let mut little: c_int = 1;
    match by_pointer(fd, libc::TUNSETVNETLE, &mut little) {
        // It is so anyway.
        Err(_) if cfg!(target_endian = "little") => Ok(()),
        other => other,
    }
}

/// Attaches a queue of an interface with several, or detaches it: then the interface sends nothing to it.
pub(super) fn set_attached(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = IfReq::new("")?;
    request.set_flags(if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE });
    by_pointer(fd, libc::TUNSETQUEUE, &mut request)
}

/// Lets the interface stay when its last descriptor is closed, or not.
pub(super) fn set_persistent(fd: BorrowedFd<'_>, persistent: bool) -> io::Result<()> {
    by_value(fd, libc::TUNSETPERSIST, c_uint::from(persistent))
}

/// The largest IP packet of an interface of this thread's network namespace.
pub(super) fn mtu(name: &str) -> io::Result<c_int> {
    let socket = control_socket()?;
    let mut request = IfReq::new(name)?;
    by_pointer(socket_fd(&socket), libc::SIOCGIFMTU, &mut request)?;
    Ok(request.value.first_chunk().map_or(0, |bytes| c_int::from_ne_bytes(*bytes)))
}

/// Brings an interface of this thread's network namespace up.
pub(super) fn bring_up(name: &str) -> io::Result<()> {
    let socket = control_socket()?;
    let mut request = IfReq::new(name)?;
    by_pointer(socket_fd(&socket), libc::SIOCGIFFLAGS, &mut request)?;
    if request.flags() & libc::IFF_UP != 0 {
        return Ok(());
    }
    request.set_flags(request.flags() | libc::IFF_UP);
    by_pointer(socket_fd(&socket), libc::SIOCSIFFLAGS, &mut request)
}

/// A socket only to ask about interfaces.
fn control_socket() -> io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?)
}

fn socket_fd(socket: &std::os::fd::OwnedFd) -> BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(socket)
}
