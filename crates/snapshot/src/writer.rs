//! Writing a snapshot to a stream, without knowing any length before.

use std::collections::BTreeSet;
use std::io::{self, Write};

use crate::format::{self, Chain};
use crate::{Error, Header, Result, Section, section};

/// The bytes of a body that are gathered before they are written as a piece.
const CHUNK: usize = 256 << 10;

/// Writes a snapshot to a stream, section by section.
///
/// It is whole only when [`finish`](Self::finish) was called: without it, every reader says that it is cut off. For a file
/// that is whole or not there, see [`SnapshotFile`](crate::SnapshotFile).
#[derive(Debug)]
pub struct Writer<W> {
    stream: W,
    chain: Chain,
    names: BTreeSet<String>,
    buffer: Vec<u8>,
    broken: bool,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn new(mut stream: W, header: &Header) -> Result<Self> {
        let mut chain = Chain::default();
        let bytes = header.encode(&mut chain);
        stream.write_all(&bytes).map_err(io_error)?;
        Ok(Self { stream, chain, names: BTreeSet::new(), buffer: Vec::new(), broken: false })
    }

    /// Writes a state as the section of its kind.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`], and those of [`section`](Self::section).
    pub fn write<S: Section>(&mut self, state: &S) -> Result<()> {
        self.write_named(S::NAME.to_owned(), state)
    }

    /// Writes a state as one of several sections of its kind, such as one of the disks.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`], and those of [`section`](Self::section).
    pub fn write_instance<S: Section>(&mut self, instance: &str, state: &S) -> Result<()> {
        self.write_named(section::name_of::<S>(instance), state)
    }

    fn write_named<S: Section>(&mut self, name: String, state: &S) -> Result<()> {
        let body = section::encode(&name, state)?;
        let mut section = self.section(name, S::VERSION, S::OPTIONAL)?;
        section.write_all(&body).map_err(io_error)?;
        section.finish()
    }

    /// Begins a section whose body is streamed, such as memory. It must be [finished](SectionWriter::finish).
    ///
    /// # Errors
    ///
    /// [`Error::Name`], [`Error::Doubled`], [`Error::Io`]; [`Error::Broken`] after a failure or an unfinished section.
    pub fn section(
        &mut self,
        name: impl Into<String>,
        version: u32,
        optional: bool,
    ) -> Result<SectionWriter<'_, W>> {
        if self.broken {
            return Err(Error::Broken { what: "writer" });
        }
        let name = name.into();
        format::check_name(&name)?;
        if self.names.contains(&name) {
            return Err(Error::Doubled { name });
        }
        // Until the section is finished, nothing else may follow.
        self.broken = true;
        let flags = if optional { format::OPTIONAL } else { 0 };
        let mut frame = format::SECTION.to_vec();
        frame.extend(version.to_le_bytes());
        frame.extend(flags.to_le_bytes());
        // `check_name` bounds it.
        frame.extend(u16::try_from(name.len()).unwrap_or(0).to_le_bytes());
        frame.extend(name.bytes());
        self.frame(frame).map_err(io_error)?;
        self.names.insert(name);
        self.buffer.clear();
        Ok(SectionWriter { writer: self, length: 0, failed: false })
    }

    /// Writes the end, flushes and gives the stream back.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; [`Error::Broken`] after a failure or an unfinished section.
    pub fn finish(mut self) -> Result<W> {
        if self.broken {
            return Err(Error::Broken { what: "writer" });
        }
        let count = u32::try_from(self.names.len())
            .map_err(|_| Error::Limit { what: "the number of sections".into(), limit: u32::MAX.into() })?;
        let mut frame = format::END.to_vec();
        frame.extend(count.to_le_bytes());
        frame.extend([0; 4]);
        self.frame(frame).map_err(io_error)?;
        self.stream.flush().map_err(io_error)?;
        Ok(self.stream)
    }

    fn frame(&mut self, mut bytes: Vec<u8>) -> io::Result<()> {
        let checksum = self.chain.add(&bytes);
        bytes.extend(checksum.to_le_bytes());
        self.stream.write_all(&bytes)
    }

    /// Writes one piece of a body, of 1 to `CHUNK` bytes.
    fn piece(&mut self, piece: &[u8]) -> io::Result<()> {
        let mut frame = format::DATA.to_vec();
        frame.extend(u32::try_from(piece.len()).map_err(io::Error::other)?.to_le_bytes());
        frame.extend(crc32fast::hash(piece).to_le_bytes());
        self.frame(frame)?;
        self.stream.write_all(piece)
    }
}

pub(crate) fn io_error(source: io::Error) -> Error {
    Error::Io { op: "write", source }
}

/// The body of a section that is being written. Dropped without [`finish`](Self::finish), it leaves the snapshot unfinished
/// for good: its writer refuses to go on.
#[derive(Debug)]
#[must_use = "a section must be finished"]
pub struct SectionWriter<'a, W> {
    writer: &'a mut Writer<W>,
    length: u64,
    /// A piece was lost: the body is not whole any more, even if later pieces can be written.
    failed: bool,
}

impl<W: Write> SectionWriter<'_, W> {
    /// Ends the section.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; [`Error::Broken`] if an earlier write failed.
    pub fn finish(mut self) -> Result<()> {
        if self.failed {
            return Err(Error::Broken { what: "writer" });
        }
        self.write_out().map_err(io_error)?;
        let mut frame = format::DONE.to_vec();
        frame.extend(self.length.to_le_bytes());
        self.writer.frame(frame).map_err(io_error)?;
        self.writer.broken = false;
        Ok(())
    }

    fn piece(&mut self, piece: &[u8]) -> io::Result<()> {
        self.writer.piece(piece).inspect_err(|_| self.failed = true)
    }

    /// Writes what was gathered.
    fn write_out(&mut self) -> io::Result<()> {
        let buffer = std::mem::take(&mut self.writer.buffer);
        if !buffer.is_empty() {
            self.piece(&buffer)?;
        }
        self.writer.buffer = buffer;
        self.writer.buffer.clear();
        Ok(())
    }
}

impl<W: Write> Write for SectionWriter<'_, W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = data.len().min(CHUNK.saturating_sub(self.writer.buffer.len()));
        let data = data.get(..count).unwrap_or_default();
        if count == CHUNK {
            // A whole piece: it is written from where it is.
            self.piece(data)?;
        } else {
            self.writer.buffer.extend_from_slice(data);
            if self.writer.buffer.len() >= CHUNK {
                self.write_out()?;
            }
        }
        self.length = self.length.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        Ok(count)
    }

    /// Writes what was gathered, as a piece of its own, and flushes the stream.
    fn flush(&mut self) -> io::Result<()> {
        self.write_out()?;
        self.writer.stream.flush()
    }
}
