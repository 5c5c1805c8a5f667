//! Where a serial port's input comes from: a terminal, a pipe, a socket or a file.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::escape::{EscapeAction, EscapeFilter, Escaped};
use crate::{Error, Result};

/// Bytes read in one step.
const CHUNK: usize = 4096;

/// Looks at input on its way to the guest.
pub trait InputFilter: Send {
    /// Takes `input` as it was typed and appends what the guest is to get.
    ///
    /// Called on the thread that drives the device's work: it must not block.
    fn filter(&mut self, input: &[u8], output: &mut Vec<u8>);
}

struct Escapes<F> {
    filter: EscapeFilter,
    act: F,
}

impl<F: FnMut(EscapeAction) + Send> InputFilter for Escapes<F> {
    fn filter(&mut self, input: &[u8], output: &mut Vec<u8>) {
        for byte in input {
            match self.filter.feed(*byte) {
                Escaped::Byte(byte) => output.push(byte),
                Escaped::Swallowed => {}
                Escaped::Action(action) => (self.act)(action),
            }
        }
    }
}

/// What a step of reading came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    /// Something was read: there may be more.
    Some,
    /// Nothing is there now, or ever again.
    Nothing,
}

/// A source of input.
///
/// It is read only when it has something to give, so a descriptor may be blocking or not, and one that is shared with others
/// (a terminal) keeps its mode. Nobody else should read it.
pub struct SerialInput {
    fd: Arc<OwnedFd>,
    filter: Option<Box<dyn InputFilter>>,
    buffer: Box<[u8]>,
    ended: bool,
}

impl SerialInput {
    /// Input from a file, pipe, socket or terminal.
    pub fn new(source: impl Into<OwnedFd>) -> Self {
        Self {
            fd: Arc::new(source.into()),
            filter: None,
            buffer: vec![0; CHUNK].into_boxed_slice(),
            ended: false,
        }
    }

    /// Input from a duplicate of this process' standard input. A terminal is to be put in raw mode by the caller.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated.
    pub fn stdin() -> Result<Self> {
        let fd = io::stdin().as_fd().try_clone_to_owned().map_err(Error::io("duplicate standard input"))?;
        Ok(Self::new(fd))
    }

    /// Sends input through `filter`, in place of any filter before.
    #[must_use]
    pub fn filter(mut self, filter: impl InputFilter + 'static) -> Self {
        self.filter = Some(Box::new(filter));
        self
    }

    /// Keeps escape sequences from the guest ([`EscapeFilter`]) and calls `act` on those that ask for something.
    ///
    /// `act` runs on the thread that drives the device's work: it must not block.
    #[must_use]
    pub fn escapes(self, act: impl FnMut(EscapeAction) + Send + 'static) -> Self {
        self.filter(Escapes { filter: EscapeFilter::new(), act })
    }

    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// Reads up to `room` bytes, filters them and appends them to `output`. Does not block.
    pub(super) fn fill(&mut self, room: usize, output: &mut Vec<u8>) -> Fill {
        if self.ended {
            return Fill::Nothing;
        }
        // Ready means: a read does not block, because there is input, or the end, or an error.
        let mut fds = [PollFd::new(&*self.fd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) => return Fill::Nothing,
            Ok(_) => {}
            Err(Errno::INTR) => return Fill::Some,
            Err(errno) => return self.give_up(errno),
        }
        let room = room.min(self.buffer.len());
        let Some(buffer) = self.buffer.get_mut(..room) else { return Fill::Nothing };
        let read = match rustix::io::read(&*self.fd, &mut *buffer) {
            Ok(0) => {
                tracing::debug!("serial input ended");
                self.ended = true;
                return Fill::Nothing;
            }
            Ok(read) => read,
            // Another reader was quicker.
            Err(Errno::AGAIN) => return Fill::Nothing,
            Err(Errno::INTR) => return Fill::Some,
            Err(errno) => return self.give_up(errno),
        };
        let input = buffer.get(..read).unwrap_or_default();
        match &mut self.filter {
            Some(filter) => filter.filter(input, output),
            None => output.extend_from_slice(input),
        }
        Fill::Some
    }

    fn give_up(&mut self, errno: Errno) -> Fill {
        tracing::warn!(error = %io::Error::from(errno), "serial input fails and is given up");
        self.ended = true;
        Fill::Nothing
    }
}

impl fmt::Debug for SerialInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialInput")
            .field("fd", &self.fd)
            .field("filtered", &self.filter.is_some())
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
