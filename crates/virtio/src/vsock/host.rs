//! [`HostSide`]: what a vsock device connects its guest to.

use std::fmt;
use std::io;
use std::net::Shutdown;

use freestone_bus::Source;

/// A stream of the host side. A value is never used again for another stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// What happened on the host side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostEvent {
    /// The stream may have become readable or writable. The end of the peer's data counts as readable.
    Ready {
        /// Which.
        stream: StreamId,
        /// May be read.
        readable: bool,
        /// May be written.
        writable: bool,
    },
    /// The peer is gone: it neither sends nor receives any more. What it sent before can still be read.
    HungUp(StreamId),
    /// A program of the host asks for a connection to `port` of the guest.
    Connect {
        /// The stream it will be; owned by the device from now on.
        stream: StreamId,
        /// The guest's port.
        port: u32,
    },
}

/// Streams of the host that a guest is connected to: Unix sockets ([`UnixHost`](super::UnixHost)), or something of your own in
/// another VMM or a fuzzer.
///
/// Nothing here may block. Errors of kind [`WouldBlock`](io::ErrorKind::WouldBlock) mean "later": an event says when. Every
/// other error ends the one stream.
pub trait HostSide: Send + fmt::Debug {
    /// Opens a stream to whoever listens for the guest on `port`.
    ///
    /// # Errors
    /// If nobody does: the guest's connection is then refused.
    fn connect(&mut self, port: u32) -> io::Result<StreamId>;

    /// The guest accepted what [`HostEvent::Connect`] asked for, at `host_port` of the host. Called before the first byte.
    ///
    /// # Errors
    /// If the peer cannot be told: the connection is then reset.
    fn accepted(&mut self, stream: StreamId, host_port: u32) -> io::Result<()>;

    /// Reads what is there, at most `to.len()` bytes; 0 when the peer sends no more.
    ///
    /// # Errors
    /// As said above.
    fn read(&mut self, stream: StreamId, to: &mut [u8]) -> io::Result<usize>;

    /// Writes as much of `from` as the stream takes.
    ///
    /// # Errors
    /// As said above.
    fn write(&mut self, stream: StreamId, from: &[u8]) -> io::Result<usize>;

    /// Ends one direction or both, seen from here: [`Shutdown::Write`] lets the peer read an end of file.
    fn shutdown(&mut self, stream: StreamId, how: Shutdown);

    /// Closes a stream: no event of it matters any more.
    fn close(&mut self, stream: StreamId);

    /// Adds what happened since the last call to `events`, up to a bound. Returns whether there may be more.
    ///
    /// Readiness is told once: after [`HostEvent::Ready`] the device reads and writes until that would block.
    fn poll(&mut self, events: &mut Vec<HostEvent>) -> bool;

    /// What becomes ready when [`poll`](Self::poll) has something to tell; watched for edges.
    fn sources(&self) -> Vec<Source>;
}
