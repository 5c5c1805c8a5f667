//! Many descriptors as one source of an event loop: what the sockets of a machine are watched by.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use freestone_vmm::bus::Source;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;

/// `epoll` as a source of work. It is for the outer loop to watch for edges: its owner goes on until [`ready`] finds nothing.
pub(crate) fn source(epoll: &Arc<OwnedFd>) -> Source {
    Arc::new(EpollSource(Arc::clone(epoll)))
}

/// What is ready now, at most `most` of it, without waiting.
pub(crate) fn ready(epoll: &OwnedFd, most: usize) -> Vec<epoll::Event> {
    let mut events = Vec::with_capacity(most);
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), Some(&now)) {
        Ok(_) => events,
        Err(_) => Vec::new(),
    }
}

struct EpollSource(Arc<OwnedFd>);

impl AsRawFd for EpollSource {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
