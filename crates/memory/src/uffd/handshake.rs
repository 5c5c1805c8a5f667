//! What monitor and page server say to each other: one message over a Unix socket, a JSON list of regions with the descriptor
//! beside it (`SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

use super::{Uffd, failed};
use crate::layout::PAGE_SIZE;
use crate::{Error, Result};

/// A longer message is refused: it is enough for 500 regions.
pub const MAX_HANDSHAKE: usize = 64 << 10;

/// One region of guest memory, as Firecracker tells a page server of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct UffdRegion {
    /// Where it is mapped in the monitor's process.
    pub base_host_virt_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset in the memory image.
    pub offset: u64,
    /// Bytes of a page. Messages of older monitors do not have it.
    #[serde(default)]
    pub page_size: u64,
    /// The same, in bytes in spite of its name, for older servers. Deprecated.
    #[serde(default)]
    pub page_size_kib: u64,
}

impl UffdRegion {
    /// `size` bytes at `base_host_virt_addr` in the monitor, at `offset` in the image.
    pub fn new(base_host_virt_addr: u64, size: u64, offset: u64, page_size: u64) -> Self {
        Self { base_host_virt_addr, size, offset, page_size, page_size_kib: page_size }
    }

    /// Bytes of a page, by whichever field has it.
    pub(super) fn page(&self) -> u64 {
        if self.page_size == 0 { self.page_size_kib } else { self.page_size }
    }

    /// Where the page at a host address is in the image.
    pub(super) fn offset_of(&self, address: u64) -> Option<u64> {
        let within = address.checked_sub(self.base_host_virt_addr).filter(|within| *within < self.size)?;
        Some(self.offset + (within - within % PAGE_SIZE))
    }

    /// Where the page at `offset` in the image is in the monitor.
    pub(super) fn address_of(&self, offset: u64) -> Option<u64> {
        let within = offset.checked_sub(self.offset).filter(|within| *within < self.size)?;
        Some(self.base_host_virt_addr + within)
    }
}

/// Hands the descriptor and the regions to a page server.
///
/// # Errors
/// - [`Error::Handshake`]: there are so many regions that the message is longer than [`MAX_HANDSHAKE`].
/// - [`Error::Uffd`]: the socket is closed.
pub fn send_handshake(mut socket: &UnixStream, uffd: &Uffd, regions: &[UffdRegion]) -> Result<()> {
    let refuse = |reason: String| Error::Handshake { reason };
    let body = serde_json::to_vec(regions).map_err(|error| refuse(error.to_string()))?;
    if body.len() > MAX_HANDSHAKE {
        return Err(refuse(format!("{} regions are too many", regions.len())));
    }
    let fds = [uffd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(refuse("no room for the descriptor".into()));
    }
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(&body)], &mut control, SendFlags::NOSIGNAL)
    });
    let sent = sent.map_err(|errno| failed("send the handshake")(errno.into()))?;
    // The descriptor went with the first byte.
    socket.write_all(body.get(sent..).unwrap_or_default()).map_err(failed("send the handshake"))
}

/// Receives the descriptor and the regions from a monitor, which may be any: what comes is bounded and checked for its form, and
/// [`PageServer::new`](super::PageServer::new) checks the regions. A timeout is the socket's.
///
/// # Errors
/// - [`Error::Handshake`]: it is no list of regions, too long, or without a descriptor.
/// - [`Error::Uffd`]: the socket failed or was closed too early.
pub fn receive_handshake(mut socket: &UnixStream) -> Result<(Uffd, Vec<UffdRegion>)> {
    let refuse = |reason: String| Error::Handshake { reason };
    let mut body = vec![0; MAX_HANDSHAKE];
    let (mut len, fd) = receive(socket, &mut body)?;
    let Some(fd) = fd else { return Err(refuse("there is no descriptor in it".into())) };
    loop {
        let (so_far, rest) = body.split_at_mut(len);
        match serde_json::from_slice::<Vec<UffdRegion>>(so_far) {
            Ok(regions) => {
                set_nonblocking(&fd)?;
                return Ok((Uffd::from_fd(fd), regions));
            }
            Err(error) if !error.is_eof() => return Err(refuse(error.to_string())),
            Err(_) if rest.is_empty() => return Err(refuse("it is too long".into())),
            Err(_) => {}
        }
        len += match socket.read(rest) {
            Ok(0) => return Err(failed("receive the handshake")(io::ErrorKind::UnexpectedEof.into())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other.map_err(failed("receive the handshake"))?,
        };
    }
}

/// The first bytes of the message, and the descriptor that came with them.
fn receive(socket: &UnixStream, body: &mut [u8]) -> Result<(usize, Option<OwnedFd>)> {
    // Room for a few, so that more than one is noticed; the kernel closes what does not fit.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(body)], &mut control, RecvFlags::CMSG_CLOEXEC)
    });
    let received = received.map_err(|errno| failed("receive the handshake")(errno.into()))?;
    if received.bytes == 0 {
        return Err(failed("receive the handshake")(io::ErrorKind::UnexpectedEof.into()));
    }
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let mut all: Vec<OwnedFd> = fds.by_ref().flatten().collect();
    match all.len() {
        0 | 1 => Ok((received.bytes, all.pop())),
        _ => Err(Error::Handshake { reason: "there is more than one descriptor in it".into() }),
    }
}

/// A server that polls must not be made to wait by the other side's choice.
fn set_nonblocking(fd: &OwnedFd) -> Result<()> {
    rustix::io::ioctl_fionbio(fd, true)
        .or_else(|_| {
            let flags = rustix::fs::fcntl_getfl(fd)?;
            rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
        })
        .map_err(|errno| failed("use the descriptor")(errno.into()))
}
