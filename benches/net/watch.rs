//! Waiting for an endpoint.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use freestone_benches::Fallible;
use freestone_net::{Endpoint, Source};
use rustix::event::{Timespec, epoll};

/// Watches the sources of an endpoint for edges.
pub struct Watch {
    poll: OwnedFd,
    _sources: Vec<Source>,
}

impl Watch {
    /// Of this endpoint.
    pub fn new(endpoint: &dyn Endpoint) -> Fallible<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let sources = endpoint.sources();
        for source in &sources {
            // SAFETY: the source is open: it is kept as long as it is watched.
            let fd = unsafe { BorrowedFd::borrow_raw(source.as_raw_fd()) };
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&poll, fd, epoll::EventData::new_u64(0), flags)?;
        }
        Ok(Self { poll, _sources: sources })
    }

    /// Waits until it is worth asking again; an error after five seconds.
    pub fn wait(&self) -> Fallible<()> {
        let mut events = Vec::with_capacity(4);
        let patience = Timespec { tv_sec: 5, tv_nsec: 0 };
        match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&patience))? {
            0 => Err("the endpoint does not go on".into()),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}
