//! A port of a console: the host's ends, and what is known of the guest's.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use freestone_bus::Source;

/// Bytes that are read from the host at a time.
pub(super) const CHUNK: usize = 4096;
/// Most bytes of a port's name.
pub(super) const MAX_NAME: usize = 64;

/// Where a port's bytes for the guest come from.
pub trait PortInput: Send {
    /// Becomes readable when there are bytes; `None` if that cannot be watched.
    fn source(&self) -> Option<Source>;

    /// Reads bytes without waiting.
    ///
    /// # Errors
    /// `WouldBlock` if there are none now, `Interrupted` if there may be: it is then called again. `Ok(0)` and other errors end
    /// the input for good.
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize>;
}

/// Where a port's bytes from the guest go.
pub trait PortOutput: Send {
    /// Writes bytes.
    ///
    /// # Errors
    /// `WouldBlock` if none can be taken now: they are offered again soon. Other errors drop the bytes.
    fn write(&mut self, data: &[u8]) -> io::Result<usize>;
}

/// Anything that can be written to: a file, a pipe, a buffer. What blocks holds the device's worker up.
impl<W: Write + Send> PortOutput for W {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = Write::write(self, data)?;
        self.flush()?;
        Ok(written)
    }
}

/// A [`PortInput`] from a descriptor that does not block: a socket, a pipe.
#[derive(Debug)]
pub struct ReadInput<R>(Arc<R>);

impl<R> ReadInput<R>
where
    R: AsFd + AsRawFd + Send + Sync + 'static,
    for<'a> &'a R: Read,
{
    /// Input from `from`, which must not block.
    pub fn new(from: R) -> Self {
        Self(Arc::new(from))
    }
}

impl<R> PortInput for ReadInput<R>
where
    R: AsRawFd + Send + Sync + 'static,
    for<'a> &'a R: Read,
{
    fn source(&self) -> Option<Source> {
        Some(self.0.clone())
    }

    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(data)
    }
}

/// A port of a console.
pub struct Port {
    name: String,
    console: bool,
    input: Option<Box<dyn PortInput>>,
    output: Option<Box<dyn PortOutput>>,
}

impl Port {
    /// A port that is a console: the guest may run a terminal or its kernel's messages on it.
    pub fn console() -> Self {
        Self { name: String::new(), console: true, input: None, output: None }
    }

    /// A port with a name, by which Linux makes `/dev/virtio-ports/NAME`. Of the name, the first 64 bytes count.
    pub fn named(name: impl Into<String>) -> Self {
        let mut name = name.into();
        name.truncate(
            (0..=MAX_NAME.min(name.len())).rev().find(|&at| name.is_char_boundary(at)).unwrap_or(0),
        );
        Self { name, console: false, input: None, output: None }
    }

    /// Sets where bytes for the guest come from.
    #[must_use]
    pub fn input(mut self, input: impl PortInput + 'static) -> Self {
        self.input = Some(Box::new(input));
        self
    }

    /// Sets where bytes from the guest go. Without an output they are dropped.
    #[must_use]
    pub fn output(mut self, output: impl PortOutput + 'static) -> Self {
        self.output = Some(Box::new(output));
        self
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port")
            .field("name", &self.name)
            .field("console", &self.console)
            .finish_non_exhaustive()
    }
}

/// What went over a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PortCounts {
    /// Bytes from the host to the guest.
    pub to_guest: u64,
    /// Bytes from the guest to the host.
    pub from_guest: u64,
    /// Bytes from the guest that the host's end did not take.
    pub dropped: u64,
}

/// A port in use.
pub(super) struct PortState {
    pub(super) name: String,
    pub(super) console: bool,
    /// The driver knows the port.
    pub(super) ready: bool,
    pub(super) guest_open: bool,
    pub(super) host_open: bool,
    pub(super) counts: PortCounts,
    input: Option<Box<dyn PortInput>>,
    output: Option<Box<dyn PortOutput>>,
    /// Bytes that were read from the host and that the guest has no buffer for yet.
    pub(super) waiting: Vec<u8>,
    /// Bytes of the guest from a request that was given back when the device stopped, and that the host's end did not take yet.
    pub(super) unsent: Vec<u8>,
}

impl PortState {
    pub(super) fn new(port: Port) -> Self {
        let Port { name, console, input, output } = port;
        Self {
            name,
            console,
            ready: false,
            guest_open: false,
            host_open: true,
            counts: PortCounts::default(),
            input,
            output,
            waiting: Vec::new(),
            unsent: Vec::new(),
        }
    }

    /// The driver is gone. Input that it did not take waits for the next one.
    pub(super) fn reset(&mut self) {
        self.flush_unsent();
        let lost = std::mem::take(&mut self.unsent).len();
        self.drop_bytes(lost);
        self.ready = false;
        self.guest_open = false;
    }

    pub(super) fn source(&self) -> Option<Source> {
        self.input.as_ref()?.source()
    }

    /// Up to a chunk of bytes for the guest; call [`taken`](Self::taken) with how many it took.
    pub(super) fn input(&mut self) -> &[u8] {
        if self.waiting.is_empty()
            && let Some(input) = &mut self.input
        {
            self.waiting.resize(CHUNK, 0);
            let read = loop {
                match input.read(&mut self.waiting) {
                    // The source is watched for edges: what is not read now is not told of again.
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => break read,
                }
            };
            self.waiting.truncate(*read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => self.input = None,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(port = %self.name, %error, "the host's end of a console port ended");
                    self.input = None;
                }
            }
        }
        &self.waiting
    }

    /// The guest has the first `count` bytes.
    pub(super) fn taken(&mut self, count: usize) {
        self.counts.to_guest = self.counts.to_guest.saturating_add(count as u64);
        self.waiting.drain(..count.min(self.waiting.len()));
    }

    /// Gives the host what it did not take before; whether it has all now.
    pub(super) fn flush_unsent(&mut self) -> bool {
        let mut unsent = std::mem::take(&mut self.unsent);
        let done = self.output(&unsent);
        unsent.drain(..done.min(unsent.len()));
        self.unsent = unsent;
        self.unsent.is_empty()
    }

    /// Gives bytes of the guest to the host; returns how many are done with, which is less only if the host's end is full.
    pub(super) fn output(&mut self, data: &[u8]) -> usize {
        let Some(output) = &mut self.output else {
            self.counts.dropped = self.counts.dropped.saturating_add(data.len() as u64);
            return data.len();
        };
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            match output.write(rest) {
                Ok(0) => break,
                Ok(n) => {
                    done = done.saturating_add(n).min(data.len());
                    self.counts.from_guest = self.counts.from_guest.saturating_add(n as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return done,
                Err(error) => {
                    tracing::debug!(port = %self.name, %error, "the host's end of a console port takes nothing");
                    break;
                }
            }
        }
        self.counts.dropped = self.counts.dropped.saturating_add(data.len().saturating_sub(done) as u64);
        data.len()
    }

    /// Counts bytes that are lost.
    pub(super) fn drop_bytes(&mut self, count: usize) {
        self.counts.dropped = self.counts.dropped.saturating_add(count as u64);
    }

    /// A character of the emergency register.
    pub(super) fn emergency(&mut self, byte: u8) {
        self.output(&[byte]);
    }
}

impl fmt::Debug for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortState")
            .field("name", &self.name)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}
