//! [`Socket`]: the host's end of a flow.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::time::Duration;

use freestone_memory::io::{Take, discard, receive_vectored, send_vectored, set_peek_offset};
use rustix::net::{RecvFlags, SendFlags, Shutdown, sockopt};

use crate::Frame;

/// The host's end of a flow. What it received stays in it until the machine acknowledged it, so that it can be read again.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    /// TCP, not a Unix socket.
    tcp: bool,
    /// Where the kernel would read next without taking away; `None` if it cannot begin anywhere but at the start.
    offset: Option<u32>,
    /// The program at the other end.
    child: Option<Child>,
}

impl Socket {
    pub(super) fn tcp(fd: OwnedFd) -> Self {
        // Both sides already decide when to send.
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        Self::new(fd, true, None)
    }

    pub(super) fn unix(fd: OwnedFd, child: Option<Child>) -> Self {
        Self::new(fd, false, child)
    }

    fn new(fd: OwnedFd, tcp: bool, child: Option<Child>) -> Self {
        let offset = set_peek_offset(fd.as_fd(), 0).is_ok().then_some(0);
        Self { fd, tcp, offset, child }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether a program is at the other end.
    pub(super) fn has_program(&self) -> bool {
        self.child.is_some()
    }

    /// Takes the error that happened, if one did.
    pub(super) fn error(&self) -> Option<io::Error> {
        match sockopt::socket_error(&self.fd) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }

    /// Sends bytes of guest memory.
    pub(super) fn send_frame(&self, payload: Frame<'_, '_>) -> io::Result<usize> {
        send_vectored(self.fd(), &[], payload.slices(), payload.range())
    }

    /// Sends bytes of our own.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
    }

    /// Tells the host that nothing more comes.
    pub(super) fn shut(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    /// Reads the bytes from `offset` on into `room` and leaves them. 0 means that the host is done; `hangup` tells whether it may be.
    pub(super) fn peek(
        &mut self,
        offset: u32,
        room: Frame<'_, '_>,
        hangup: bool,
        scratch: &mut Vec<u8>,
    ) -> io::Result<usize> {
        if let Some(current) = self.offset {
            if current != offset {
                set_peek_offset(self.fd(), offset)?;
            }
            let n = receive_vectored(self.fd(), &mut [], room.slices(), room.range(), Take::Peek);
            let read = n.as_ref().map_or(0, |n| u32::try_from(*n).unwrap_or(u32::MAX));
            self.offset = Some(offset.saturating_add(read));
            return n;
        }
        // The kernel is old: what is before `offset` has to be read as well.
        let before = usize::try_from(offset).unwrap_or(usize::MAX);
        scratch.resize(before, 0);
        let n = receive_vectored(self.fd(), scratch, room.slices(), room.range(), Take::Peek)?;
        match n.saturating_sub(before) {
            0 if before > 0 && !hangup => Err(io::ErrorKind::WouldBlock.into()),
            n => Ok(n),
        }
    }

    /// Takes `len` bytes out, which were read before.
    pub(super) fn discard(&mut self, len: u32, scratch: &mut Vec<u8>) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(usize::MAX);
            let n = if self.tcp {
                discard(self.fd(), n)?
            } else {
                scratch.resize(n.min(65536), 0);
                rustix::net::recv(&self.fd, scratch.as_mut_slice(), RecvFlags::DONTWAIT)?.1
            };
            if n == 0 {
                return Ok(());
            }
            left = left.saturating_sub(u32::try_from(n).unwrap_or(u32::MAX));
        }
        // The kernel counts from the new start as well.
        self.offset = self.offset.map(|offset| offset.saturating_sub(len));
        Ok(())
    }

    /// Closes it such that the other end learns that something went wrong. Returns the program that was at the other end.
    pub(super) fn abort(mut self) -> Option<Child> {
        if self.tcp {
            let _ = sockopt::set_socket_linger(&self.fd, Some(Duration::ZERO));
        }
        if let Some(child) = &mut self.child {
            let _ = child.kill();
        }
        self.child.take()
    }

    /// Closes it orderly. Returns the program that was at the other end.
    pub(super) fn close(mut self) -> Option<Child> {
        self.child.take()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use freestone_memory::own_slice;

    use super::*;

    #[test]
    fn bytes_are_read_again_and_discarded_whatever_the_kernel_can() {
        for old_kernel in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let fd = listener.accept().unwrap().0.into();
            let mut socket = if old_kernel {
                Socket { fd, tcp: true, offset: None, child: None }
            } else {
                Socket::tcp(fd)
            };
            let peek = |socket: &mut Socket, offset, len: usize, hangup| {
                let mut bytes = vec![0; len];
                let slices = [own_slice(&mut bytes)];
                let n = socket.peek(offset, Frame::new(&slices), hangup, &mut Vec::new());
                n.map(|n| bytes[..n].to_vec()).map_err(|error| error.kind())
            };
            assert_eq!(peek(&mut socket, 0, 9, false), Err(io::ErrorKind::WouldBlock));
            host.write_all(b"abcdefgh").unwrap();
            assert_eq!(peek(&mut socket, 0, 3, false).unwrap(), b"abc");
            assert_eq!(peek(&mut socket, 3, 3, false).unwrap(), b"def");
            socket.discard(2, &mut Vec::new()).unwrap();
            assert_eq!(peek(&mut socket, 4, 9, false).unwrap(), b"gh");
            assert_eq!(peek(&mut socket, 6, 9, false), Err(io::ErrorKind::WouldBlock));
            assert_eq!(peek(&mut socket, 0, 2, false).unwrap(), b"cd");
            drop(host);
            while peek(&mut socket, 6, 9, true) == Err(io::ErrorKind::WouldBlock) {}
            assert_eq!(peek(&mut socket, 6, 9, true).unwrap(), b"");
            assert_eq!(peek(&mut socket, 5, 9, true).unwrap(), b"h");
        }
    }
}
