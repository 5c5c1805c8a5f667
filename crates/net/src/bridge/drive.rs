//! Driving a bridge on a thread of its own.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Bridge;
use crate::{Error, Result};

/// Events taken at once; those of the sources are not even looked at.
const EVENTS: usize = 16;
/// What an event of `stop` carries; those of the sources carry 0.
const STOP: u64 = 1;

impl Bridge {
    /// Moves frames until `stop` is readable or its other end is closed: an eventfd, a pipe, a socket. Waits when there is nothing
    /// to do.
    ///
    /// # Errors
    /// If the host gives no epoll descriptor, or cannot watch `stop`.
    pub fn run_until(&mut self, stop: impl AsFd) -> Result<()> {
        let failed = || Error::io("wait for the sources of a bridge");
        let epoll = Epoll::new().map_err(failed())?;
        let add = |fd, events, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data));
        add(stop.as_fd().as_raw_fd(), EventSet::IN, STOP).map_err(failed())?;
        // Kept until the end: a source is watched as long as it is open.
        let sources = self.sources();
        for source in &sources {
            if let Err(error) = add(source.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, 0) {
                tracing::debug!(%error, "a source cannot be watched");
            }
        }
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let timeout = if self.step() { 0 } else { -1 };
            let ready = match epoll.wait(timeout, &mut events) {
                Ok(count) => events.get(..count).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => &[],
                Err(error) => return Err(failed()(error)),
            };
            if ready.iter().any(|event| event.data() == STOP) {
                return Ok(());
            }
        }
    }
}
