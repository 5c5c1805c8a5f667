//! The file of a capture: pcapng (draft-ietf-opsawg-pcapng).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_memory::io::write_vectored;
use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, clock_gettime};

use crate::{Error, Frame, Result};

/// Bytes of a frame that are captured at most; more than any has.
const SNAPLEN: u32 = 262_144;
/// Frames up to this length are copied and written together; longer ones are written from where they are.
const COPIED: usize = 4096;
/// It is written when there are so many bytes.
const ENOUGH: usize = 64 << 10;
/// No more than this waits to be written.
const LIMIT: usize = 1 << 20;

/// Block types and codes of options (sections 4 and 3.5 of the draft).
const SECTION_HEADER: u32 = 0x0A0D_0D0A;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1A2B_3C4D;
const LINKTYPE_ETHERNET: u16 = 1;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;

/// Bytes of a packet block around the packet and its padding: 28 before; flags, the end of options and the length after.
const AROUND: usize = 28 + 8 + 4 + 4;

/// Which way a frame went, as the machine sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the machine: `inbound` in the file.
    Received = 1,
    /// From the machine: `outbound`.
    Sent = 2,
}

/// What became of the frames of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CaptureCounts {
    /// Frames that are in the file, or will be after a flush.
    pub captured: u64,
    /// Frames that are not: the file could not be written, or its reader was too slow.
    pub missed: u64,
}

/// A pcapng file of one interface, with timestamps of nanoseconds and directions. A clone is the same file: it may be written from
/// several threads.
///
/// A file that is a pipe is never waited for: when its reader is slow, frames are missed. When the file cannot be written, as on a
/// full disk, capturing ends with one warning.
#[derive(Clone)]
pub struct Capture(Arc<Shared>);

struct Shared {
    writer: Mutex<Writer>,
    failed: AtomicBool,
    captured: AtomicU64,
    missed: AtomicU64,
}

struct Writer {
    file: OwnedFd,
    name: String,
    /// What is to be written: whole blocks, but for the first, which may have been written in part.
    buffer: Vec<u8>,
}

/// Nanoseconds since 1970.
pub(super) fn now() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.wrapping_mul(1_000_000_000).wrapping_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

impl Capture {
    /// A capture to a new file, or to the pipe that `path` is, where the interface is called `name`. Only this user can read it.
    ///
    /// # Errors
    /// If the file cannot be made or written, or the pipe has no reader.
    pub fn create(path: impl AsRef<Path>, name: &str) -> Result<Self> {
        let path = path.as_ref();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| Error::io(format!("create the capture {}", path.display()))(e.into()))?;
        Self::new(file, name)
    }

    /// The same to a file that is open for writing, from where it is. It is made non-blocking.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(file: impl Into<OwnedFd>, name: &str) -> Result<Self> {
        let file = file.into();
        let failed = |e: io::Error| Error::io(format!("begin the capture of {name:?}"))(e);
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
        rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        let mut writer = Writer { file, name: name.to_owned(), buffer: Vec::new() };
        writer.begin(name);
        writer.push().map_err(failed)?;
        Ok(Self(Arc::new(Shared {
            writer: Mutex::new(writer),
            failed: AtomicBool::new(false),
            captured: AtomicU64::new(0),
            missed: AtomicU64::new(0),
        })))
    }

    /// Captures a frame that passes now.
    pub fn frame(&self, direction: Direction, frame: &Frame<'_, '_>) {
        self.add(direction, now(), frame);
    }

    /// Captures a frame of which nobody can say whether it comes or goes, and whose parts are one after the other.
    pub fn parts(&self, parts: &[&[u8]]) {
        let len = parts.iter().map(|part| part.len()).sum();
        self.write(|writer| {
            writer.packet(None, now(), len, |writer| {
                // The packet's length was said.
                let mut left = len.min(SNAPLEN as usize);
                for part in parts {
                    let part = part.get(..left.min(part.len())).unwrap_or_default();
                    writer.buffer.extend(part);
                    left -= part.len();
                }
                Ok(())
            })
        });
    }

    pub(super) fn add(&self, direction: Direction, time: u64, frame: &Frame<'_, '_>) {
        self.write(|writer| {
            let frame_in_file = frame.truncate(SNAPLEN as usize);
            writer.packet(Some(direction), time, frame.len(), |writer| writer.data(&frame_in_file))
        });
    }

    fn write(&self, packet: impl FnOnce(&mut Writer) -> io::Result<bool>) {
        let shared = &*self.0;
        let captured = !shared.failed.load(Ordering::Relaxed) && shared.attempt(packet).unwrap_or(false);
        let counter = if captured { &shared.captured } else { &shared.missed };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes what was kept to be written together.
    pub fn flush(&self) {
        if !self.0.failed.load(Ordering::Relaxed) {
            self.0.attempt(Writer::push);
        }
    }

    /// What became of the frames.
    pub fn counts(&self) -> CaptureCounts {
        CaptureCounts {
            captured: self.0.captured.load(Ordering::Relaxed),
            missed: self.0.missed.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the file; ends the capture if that fails.
    fn attempt<T>(&self, work: impl FnOnce(&mut Writer) -> io::Result<T>) -> Option<T> {
        let mut writer = self.lock();
        match work(&mut writer) {
            Ok(done) => Some(done),
            Err(error) => {
                writer.buffer = Vec::new();
                if !self.failed.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, interface = writer.name, "the capture ends: its file cannot be written");
                }
                None
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !*self.failed.get_mut() {
            self.attempt(Writer::push);
        }
    }
}

impl Writer {
    /// The section header and the description of the interface.
    fn begin(&mut self, name: &str) {
        let mut body = Vec::new();
        body.extend(BYTE_ORDER.to_le_bytes());
        // Version 1.0, and a length that is not known.
        body.extend([1, 0, 0, 0]);
        body.extend(u64::MAX.to_le_bytes());
        self.block(SECTION_HEADER, &body);
        body.clear();
        body.extend(LINKTYPE_ETHERNET.to_le_bytes());
        body.extend([0, 0]);
        body.extend(SNAPLEN.to_le_bytes());
        let len = name.len().min(1024);
        option(&mut body, IF_NAME, name.as_bytes().get(..len).unwrap_or_default());
        // Ten to the minus ninth.
        option(&mut body, IF_TSRESOL, &[9]);
        option(&mut body, 0, &[]);
        self.block(INTERFACE_DESCRIPTION, &body);
    }

    fn block(&mut self, kind: u32, body: &[u8]) {
        let len = u32::try_from(body.len() + 12).unwrap_or(0).to_le_bytes();
        for part in [&kind.to_le_bytes(), &len, body, &len] {
            self.buffer.extend(part);
        }
    }

    /// Adds a packet of `len` bytes, of which `data` adds the first SNAPLEN; `false` if there is no room for it now.
    fn packet(
        &mut self,
        direction: Option<Direction>,
        time: u64,
        len: usize,
        data: impl FnOnce(&mut Self) -> io::Result<()>,
    ) -> io::Result<bool> {
        let original = u32::try_from(len).unwrap_or(u32::MAX);
        let captured = original.min(SNAPLEN);
        let len = captured as usize;
        let padding = len.next_multiple_of(4) - len;
        let total = AROUND + len + padding;
        if self.buffer.len() + total > LIMIT {
            self.push()?;
            if self.buffer.len() + total > LIMIT {
                return Ok(false);
            }
        }
        let total = u32::try_from(total).unwrap_or(0).to_le_bytes();
        let (high, low) = ((time >> 32) as u32, (time & 0xFFFF_FFFF) as u32);
        for field in [ENHANCED_PACKET.to_le_bytes(), total, [0; 4]] {
            self.buffer.extend(field);
        }
        for field in [high, low, captured, original] {
            self.buffer.extend(field.to_le_bytes());
        }
        data(self)?;
        self.buffer.resize(self.buffer.len() + padding, 0);
        let flags = direction.map_or(0, |direction| direction as u32);
        option(&mut self.buffer, EPB_FLAGS, &flags.to_le_bytes());
        option(&mut self.buffer, 0, &[]);
        self.buffer.extend(total);
        if self.buffer.len() >= ENOUGH {
            self.push()?;
        }
        Ok(true)
    }

    /// Adds the bytes of a frame: a long one is written behind the buffer from where it is.
    fn data(&mut self, frame: &Frame<'_, '_>) -> io::Result<()> {
        let mut rest = *frame;
        if frame.len() > COPIED {
            let front = self.buffer.len();
            match write_vectored(self.file.as_fd(), &self.buffer, frame.slices(), frame.range()) {
                Ok(done) => {
                    self.buffer.drain(..done.min(front));
                    rest = frame.after(done.saturating_sub(front));
                }
                // Or it has too many pieces for one call.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::InvalidInput) => {}
                Err(error) => return Err(error),
            }
        }
        let start = self.buffer.len();
        self.buffer.resize(start + rest.len(), 0);
        rest.read_at(0, self.buffer.get_mut(start..).unwrap_or_default());
        Ok(())
    }

    /// Writes the buffer, as much as goes without waiting.
    fn push(&mut self) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = self.buffer.get(done..).filter(|rest| !rest.is_empty()) {
            match rustix::io::write(&self.file, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.buffer.drain(..done);
        Ok(())
    }
}

/// Adds an option; code 0 is their end.
fn option(to: &mut Vec<u8>, code: u16, value: &[u8]) {
    to.extend(code.to_le_bytes());
    to.extend(u16::try_from(value.len()).unwrap_or(0).to_le_bytes());
    to.extend(value);
    to.resize(to.len() + value.len().next_multiple_of(4) - value.len(), 0);
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("counts", &self.counts()).finish_non_exhaustive()
    }
}
