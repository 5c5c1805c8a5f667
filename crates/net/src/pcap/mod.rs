//! Captures of what goes through a port, in a file that tcpdump and tshark read.
//!
//! [`Pcap`] is a [`Port`] around another; [`Capture`] is the file. Frames are written as they are: large segments are not cut, and
//! checksums that are left undone are undone in the file.
//!
//! Traffic comes first: when the file cannot be written, frames are missing in it, and counted, but go on their way.

mod capture;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

pub use self::capture::{Capture, CaptureCounts, Direction};
use crate::{
    Endpoint, Frame, Offloads, Port, PortInfo, PortStats, Received, Result, Sent, Setup, Source, VnetHeader,
};

/// A port that captures all frames of another, in both directions and on all pairs of queues.
#[derive(Debug)]
pub struct Pcap<P> {
    port: P,
    capture: Capture,
}

impl<P: Port> Pcap<P> {
    /// Captures what goes through `port`.
    pub fn new(port: P, capture: Capture) -> Self {
        Self { port, capture }
    }

    /// The same to a new file, where the port is called `name`.
    ///
    /// # Errors
    /// As [`Capture::create`].
    pub fn create(port: P, path: impl AsRef<Path>, name: &str) -> Result<Self> {
        Ok(Self::new(port, Capture::create(path, name)?))
    }

    /// The file; a clone of it tells of the counts later.
    pub fn capture(&self) -> &Capture {
        &self.capture
    }

    /// The port without its capture.
    pub fn into_inner(self) -> P {
        self.port
    }
}

impl<P: Port> Port for Pcap<P> {
    fn info(&self) -> PortInfo {
        self.port.info()
    }

    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        let wrap = |inner| -> Box<dyn Endpoint> {
            Box::new(Captured { inner, capture: self.capture.clone(), dirty: false })
        };
        Ok(self.port.open(setup)?.into_iter().map(wrap).collect())
    }

    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        self.port.set_receive(receive)
    }

    fn set_active_pairs(&mut self, pairs: u16) -> Result<()> {
        self.port.set_active_pairs(pairs)
    }

    fn reset(&mut self) {
        self.port.reset();
    }

    fn stats(&self) -> Arc<PortStats> {
        self.port.stats()
    }
}

/// An endpoint whose frames are captured.
struct Captured {
    inner: Box<dyn Endpoint>,
    capture: Capture,
    /// Frames were captured since the last flush.
    dirty: bool,
}

impl Endpoint for Captured {
    fn sources(&self) -> Vec<Source> {
        self.inner.sources()
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        // An answer on another pair must not seem to come before.
        let time = capture::now();
        let sent = self.inner.transmit(header, frame);
        // One that has to wait comes again.
        if sent == Sent::Done {
            self.capture.add(Direction::Sent, time, &frame);
            self.dirty = true;
        }
        sent
    }

    fn flush(&mut self) {
        self.inner.flush();
        if std::mem::take(&mut self.dirty) {
            self.capture.flush();
        }
    }

    fn waiting(&mut self) -> Option<usize> {
        self.inner.waiting()
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let received = self.inner.receive(room);
        if let Received::Frame(len, _) = received {
            self.capture.add(Direction::Received, capture::now(), &room.truncate(len));
            self.dirty = true;
        }
        received
    }

    fn drop_next(&mut self) {
        self.inner.drop_next();
    }
}

#[cfg(feature = "switch")]
impl crate::switch::Mirror for Capture {
    fn frame(&mut self, _: crate::switch::PortId, _: &VnetHeader, parts: &[&[u8]]) {
        self.parts(parts);
    }

    fn flush(&mut self) {
        Capture::flush(self);
    }
}
