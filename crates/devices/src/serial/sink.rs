//! Where a serial port's output goes: a writer that may be slow, full or broken.

use std::fmt;
use std::io::{ErrorKind, Write};
use std::sync::atomic::Ordering;

use super::SerialCounters;

/// Output that may wait for a sink that would block, in bytes. Past this the newest is dropped.
const KEPT: usize = 64 * 1024;

/// What a write to the sink came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drain {
    /// Nothing is left: all was written or lost.
    Empty,
    /// The sink would block: try again later.
    Again,
}

/// A writer and what it did not take yet.
pub(super) struct Sink {
    out: Box<dyn Write + Send>,
    buffer: Vec<u8>,
    failed: bool,
}

impl Sink {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out, buffer: Vec::new(), failed: false }
    }

    /// Takes `bytes` over, behind what is still there, and leaves an empty buffer.
    pub(super) fn take(&mut self, bytes: &mut Vec<u8>, counters: &SerialCounters) {
        if self.buffer.is_empty() {
            // Both keep their capacity: no allocation per line.
            std::mem::swap(&mut self.buffer, bytes);
            return;
        }
        let room = KEPT.saturating_sub(self.buffer.len()).min(bytes.len());
        self.buffer.extend(bytes.iter().take(room));
        counters.lost.fetch_add((bytes.len() - room) as u64, Ordering::Relaxed);
        bytes.clear();
    }

    /// What is there.
    pub(super) fn unwritten(&self) -> &[u8] {
        &self.buffer
    }

    /// Loses what is there.
    pub(super) fn give_up(&mut self, counters: &SerialCounters) {
        counters.lost.fetch_add(self.buffer.len() as u64, Ordering::Relaxed);
        self.buffer.clear();
    }

    /// Writes what is there. An error loses it: the guest's console must not stop the guest.
    pub(super) fn drain(&mut self, counters: &SerialCounters) -> Drain {
        let mut done = 0;
        let mut outcome = Drain::Empty;
        while let Some(rest @ [_, ..]) = self.buffer.get(done..) {
            let error = match self.out.write(rest) {
                Ok(0) => ErrorKind::WriteZero.into(),
                Ok(n) => {
                    done += n.min(rest.len());
                    continue;
                }
                Err(error) => error,
            };
            match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => {
                    outcome = Drain::Again;
                    break;
                }
                _ => {
                    if !std::mem::replace(&mut self.failed, true) {
                        tracing::warn!(%error, "serial output fails; it is dropped");
                    }
                    counters.lost.fetch_add(rest.len() as u64, Ordering::Relaxed);
                    counters.written.fetch_add(done as u64, Ordering::Relaxed);
                    self.buffer.clear();
                    return Drain::Empty;
                }
            }
        }
        counters.written.fetch_add(done as u64, Ordering::Relaxed);
        self.buffer.drain(..done);
        match self.out.flush() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Drain::Again,
            // Whatever the writer lost in its own buffer cannot be counted.
            _ => outcome,
        }
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sink")
            .field("buffer", &self.buffer.len())
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
