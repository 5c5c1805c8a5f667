//! Reading a snapshot: frames are checked before anything of them is used, and nothing is larger than the limits.

use std::collections::BTreeSet;
use std::io::{self, Read, Seek, SeekFrom};

use crate::format::{self, Chain, take};
use crate::{Error, Header, Result, Section, section};

/// How much a snapshot may be and may cost. What is over a limit is refused when it is met, after one piece of 1 MiB at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sections in a snapshot. Each costs its name's memory. 1024 unless told.
    pub sections: u32,
    /// Bytes of bodies that are held in memory: of one section that is decoded or read as a whole, and of all of
    /// [`Sections`](crate::Sections) together. 64 MiB unless told.
    pub in_memory: u64,
    /// Bytes of one body, also of one that is streamed. Unlimited unless told.
    pub section: u64,
    /// Bytes of the whole snapshot. Unlimited unless told.
    pub total: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sections: 1024, in_memory: 64 << 20, section: u64::MAX, total: u64::MAX }
    }
}

/// A stream, how far it was read, and the checksum of the framing so far.
#[derive(Debug)]
pub(crate) struct Input<R> {
    stream: R,
    offset: u64,
    total: u64,
    chain: Chain,
}

impl<R> Input<R> {
    pub(crate) fn new(stream: R, total: u64) -> Self {
        Self { stream, offset: 0, total, chain: Chain::default() }
    }

    /// Counts `length` bytes that are about to be read.
    fn advance(&mut self, length: u64) -> Result<()> {
        match self.offset.checked_add(length).filter(|end| *end <= self.total) {
            Some(end) => self.offset = end,
            None => return Err(Error::Limit { what: "the snapshot's length".into(), limit: self.total }),
        }
        Ok(())
    }
}

impl<R: Read> Input<R> {
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        let offset = self.offset;
        self.advance(u64::try_from(buffer.len()).unwrap_or(u64::MAX))?;
        self.stream.read_exact(buffer).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated { offset },
            _ => Error::Io { op: "read", source },
        })
    }

    /// Reads the chain checksum behind `framing`, which began at `offset`, and compares.
    pub(crate) fn check(&mut self, framing: &[u8], offset: u64) -> Result<()> {
        let mut checksum = [0; 4];
        self.fill(&mut checksum)?;
        if self.chain.add(framing) == u32::from_le_bytes(checksum) {
            Ok(())
        } else {
            Err(Error::Damaged { what: "the checksum of the framing is wrong", offset })
        }
    }
}

#[derive(Debug)]
enum Frame {
    Section(SectionInfo),
    Data { length: u32, checksum: u32 },
    Done { length: u64 },
    End { sections: u32 },
}

/// What is known of a section without its body.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SectionInfo {
    /// Its name, unique in the snapshot.
    pub name: String,
    /// The version of its body.
    pub version: u32,
    /// Whether a reader that does not know it may leave it out.
    pub optional: bool,
    /// The length of its body in bytes, as far as it was read; all of it in an [`Info`].
    pub length: u64,
}

/// What a snapshot contains.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// Its header.
    pub header: Header,
    /// Its sections, as they follow each other.
    pub sections: Vec<SectionInfo>,
    /// The bytes of the whole snapshot.
    pub length: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Between,
    Inside,
    Ended,
    Broken,
}

/// Reads a snapshot from a stream, section by section, in the order of the stream. It reads no byte beyond the end.
///
/// A name that occurs twice is an error when it is met. After an error the reader gives nothing more.
#[derive(Debug)]
pub struct Reader<R> {
    input: Input<R>,
    header: Header,
    limits: Limits,
    names: BTreeSet<String>,
    current: SectionInfo,
    chunk: Vec<u8>,
    used: usize,
    state: State,
    whole_file: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// Those of [`Header::peek`]; [`Error::Format`] or [`Error::Flags`] for a snapshot that is newer than this crate.
    pub fn new(stream: R, limits: Limits) -> Result<Self> {
        let mut input = Input::new(stream, limits.total);
        let header = Header::read(&mut input)?;
        header.check()?;
        let current = SectionInfo { name: String::new(), version: 0, optional: false, length: 0 };
        let names = BTreeSet::new();
        let (chunk, used, state, whole_file) = (Vec::new(), 0, State::Between, false);
        Ok(Self { input, header, limits, names, current, chunk, used, state, whole_file })
    }

    /// The same for a file, which must end where the snapshot ends.
    pub(crate) fn whole_file(stream: R, limits: Limits) -> Result<Self> {
        Ok(Self { whole_file: true, ..Self::new(stream, limits)? })
    }

    /// What the snapshot is of, and who wrote it.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The limits that were given.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The next section, or `None` at the end of the snapshot. What was not read of the one before is read and checked.
    ///
    /// # Errors
    ///
    /// [`Error::Truncated`], [`Error::Damaged`], [`Error::Doubled`], [`Error::Limit`], [`Error::Trailing`] or [`Error::Io`].
    pub fn next_section(&mut self) -> Result<Option<SectionReader<'_, R>>> {
        while self.state == State::Inside {
            self.next_chunk(Self::load)?;
        }
        let found = self.guard(Self::begin)?;
        Ok(found.then_some(SectionReader { reader: self }))
    }

    /// Reads and checks everything that is left, and says what the snapshot contains.
    ///
    /// # Errors
    ///
    /// Those of [`next_section`](Self::next_section).
    pub fn verify(self) -> Result<Info> {
        self.survey(Self::load)
    }

    /// Reads to the end of the snapshot, checking everything, and gives the stream back.
    ///
    /// # Errors
    ///
    /// Those of [`next_section`](Self::next_section).
    pub fn finish(mut self) -> Result<R> {
        while self.next_section()?.is_some() {}
        Ok(self.input.stream)
    }

    fn survey(mut self, pass: fn(&mut Self, u32, u32) -> Result<()>) -> Result<Info> {
        let mut sections = Vec::new();
        while self.state == State::Inside {
            self.next_chunk(pass)?;
        }
        while self.guard(Self::begin)? {
            while self.state == State::Inside {
                self.next_chunk(pass)?;
            }
            sections.push(self.current.clone());
        }
        Ok(Info { header: self.header, sections, length: self.input.offset })
    }

    /// Runs one step; nothing follows one that failed.
    fn guard<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.state == State::Broken {
            return Err(Error::Broken { what: "reader" });
        }
        step(self).inspect_err(|_| self.state = State::Broken)
    }

    fn begin(&mut self) -> Result<bool> {
        if self.state == State::Ended {
            return Ok(false);
        }
        let offset = self.input.offset;
        match self.frame()? {
            Frame::Section(section) => {
                let limit = u64::from(self.limits.sections);
                if u64::try_from(self.names.len()).is_ok_and(|count| count >= limit) {
                    return Err(Error::Limit { what: "the number of sections".into(), limit });
                }
                if !self.names.insert(section.name.clone()) {
                    return Err(Error::Doubled { name: section.name });
                }
                self.current = section;
                self.state = State::Inside;
                self.chunk.clear();
                self.used = 0;
                Ok(true)
            }
            Frame::End { sections } if usize::try_from(sections) == Ok(self.names.len()) => {
                self.state = State::Ended;
                if self.whole_file {
                    self.nothing_follows()?;
                }
                Ok(false)
            }
            Frame::End { .. } => Err(Error::Damaged { what: "the number of sections is wrong", offset }),
            _ => Err(Error::Damaged { what: "a frame is where no section is", offset }),
        }
    }

    fn nothing_follows(&mut self) -> Result<()> {
        let follows = loop {
            match self.input.stream.read(&mut [0]) {
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                other => break other.map_err(|source| Error::Io { op: "read", source })? > 0,
            }
        };
        if follows { Err(Error::Trailing { offset: self.input.offset }) } else { Ok(()) }
    }

    /// Goes to the next piece of the current section by `pass`, or to its end: then `false`.
    fn next_chunk(&mut self, pass: fn(&mut Self, u32, u32) -> Result<()>) -> Result<bool> {
        self.guard(|reader| {
            reader.chunk.clear();
            reader.used = 0;
            if reader.state != State::Inside {
                return Ok(false);
            }
            let offset = reader.input.offset;
            match reader.frame()? {
                Frame::Data { length, checksum } => {
                    let limit = reader.limits.section;
                    let end = reader.current.length.checked_add(length.into());
                    reader.current.length = end.filter(|end| *end <= limit).ok_or_else(|| Error::Limit {
                        what: format!("the body of section {:?}", reader.current.name),
                        limit,
                    })?;
                    pass(reader, length, checksum)?;
                    Ok(true)
                }
                Frame::Done { length } if length == reader.current.length => {
                    reader.state = State::Between;
                    Ok(false)
                }
                Frame::Done { .. } => {
                    Err(Error::Damaged { what: "the length of a section is wrong", offset })
                }
                _ => Err(Error::Damaged { what: "a frame is inside of a section", offset }),
            }
        })
    }

    /// Reads a piece into memory and checks it.
    fn load(&mut self, length: u32, checksum: u32) -> Result<()> {
        let offset = self.input.offset;
        // A frame's length is at most `CHUNK_MAX`.
        self.chunk.resize(usize::try_from(length).unwrap_or(0), 0);
        self.input.fill(&mut self.chunk)?;
        if crc32fast::hash(&self.chunk) == checksum {
            Ok(())
        } else {
            self.chunk.clear();
            Err(Error::Damaged { what: "the checksum of a body is wrong", offset })
        }
    }

    fn frame(&mut self) -> Result<Frame> {
        let offset = self.input.offset;
        let damaged = |what| Error::Damaged { what, offset };
        let mut bytes = vec![0; format::FRAME];
        self.input.fill(&mut bytes)?;
        let mut rest = bytes.as_slice();
        let tag: [u8; 4] = take(&mut rest).unwrap_or_default();
        let first = take(&mut rest).map_or(0, u32::from_le_bytes);
        let second: [u8; 4] = take(&mut rest).unwrap_or_default();
        let [flags, name_length] = [[second[0], second[1]], [second[2], second[3]]].map(u16::from_le_bytes);
        let second = u32::from_le_bytes(second);
        if tag == format::SECTION {
            let length = usize::from(name_length);
            if length > format::NAME_MAX {
                return Err(damaged("the name of a section is too long"));
            }
            bytes.resize(format::FRAME + length, 0);
            self.input.fill(bytes.get_mut(format::FRAME..).unwrap_or_default())?;
        }
        self.input.check(&bytes, offset)?;
        match tag {
            format::SECTION => {
                let name = str::from_utf8(bytes.get(format::FRAME..).unwrap_or_default()).ok();
                let name = name.filter(|name| format::check_name(name).is_ok());
                let name = name.ok_or_else(|| damaged("the name of a section is not plain text"))?.to_owned();
                if flags & !format::OPTIONAL != 0 {
                    return Err(damaged("a section has unknown flags"));
                }
                let optional = flags & format::OPTIONAL != 0;
                Ok(Frame::Section(SectionInfo { name, version: first, optional, length: 0 }))
            }
            format::DATA if (1..=format::CHUNK_MAX).contains(&first) => {
                Ok(Frame::Data { length: first, checksum: second })
            }
            format::DATA => Err(damaged("the length of a piece makes no sense")),
            format::DONE => Ok(Frame::Done { length: u64::from(first) | (u64::from(second) << 32) }),
            format::END if second == 0 => Ok(Frame::End { sections: first }),
            _ => Err(damaged("there is no such frame")),
        }
    }
}

impl<R: Read + Seek> Reader<R> {
    /// Says what the rest of the snapshot contains. Bodies are passed over and not checked; the framing is.
    ///
    /// # Errors
    ///
    /// Those of [`next_section`](Self::next_section).
    pub fn info(self) -> Result<Info> {
        self.survey(|reader, length, _checksum| {
            reader.input.advance(length.into())?;
            let seek = reader.input.stream.seek(SeekFrom::Current(length.into()));
            seek.map(drop).map_err(|source| Error::Io { op: "seek in", source })
        })
    }
}

/// One section of a [`Reader`]: its name and version, and its body as a stream.
///
/// No byte of a body comes out before the checksum of its piece (up to 1 MiB) was compared. That the body is whole is known
/// when its end was reached: `Ok(0)` of [`Read`], `None` of [`chunk`](Self::chunk).
#[derive(Debug)]
pub struct SectionReader<'a, R> {
    reader: &'a mut Reader<R>,
}

impl<R: Read> SectionReader<'_, R> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.reader.current.name
    }

    /// The version of its body.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.reader.current.version
    }

    /// Whether a reader that does not know it may leave it out.
    #[must_use]
    pub fn is_optional(&self) -> bool {
        self.reader.current.optional
    }

    /// The next piece of the body, of 1 byte to 1 MiB, without a copy; `None` at its end.
    ///
    /// # Errors
    ///
    /// [`Error::Truncated`], [`Error::Damaged`], [`Error::Limit`] or [`Error::Io`].
    pub fn chunk(&mut self) -> Result<Option<&[u8]>> {
        if self.reader.used >= self.reader.chunk.len() && !self.reader.next_chunk(Reader::load)? {
            return Ok(None);
        }
        let chunk = self.reader.chunk.get(self.reader.used..).unwrap_or_default();
        self.reader.used = self.reader.chunk.len();
        Ok(Some(chunk))
    }

    /// What is left of the body, if that is within [`Limits::in_memory`].
    ///
    /// # Errors
    ///
    /// [`Error::Limit`], and those of [`chunk`](Self::chunk).
    pub fn read_body(mut self) -> Result<Vec<u8>> {
        let limit = self.reader.limits.in_memory;
        self.body_within(limit)
    }

    /// What is left of the body, if `left` bytes of what may be held in memory are enough for it.
    pub(crate) fn body_within(&mut self, left: u64) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk()? {
            body.extend_from_slice(chunk);
            if u64::try_from(body.len()).is_ok_and(|length| length > left) {
                let what = format!("what is held in memory, with section {:?},", self.name());
                return Err(Error::Limit { what, limit: self.reader.limits.in_memory });
            }
        }
        Ok(body)
    }

    /// Decodes the section, upgraded to the version of `S` if it is older.
    ///
    /// # Errors
    ///
    /// [`Error::Kind`] if it is no section of `S`, [`Error::TooNew`], [`Error::TooOld`], [`Error::Upgrade`],
    /// [`Error::Decode`], and those of [`read_body`](Self::read_body).
    pub fn decode<S: Section>(self) -> Result<S> {
        let (name, version) = (self.name().to_owned(), self.version());
        section::check::<S>(&name, version)?;
        section::decode(&name, version, &self.read_body()?)
    }
}

impl<R: Read> Read for SectionReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.reader.used >= self.reader.chunk.len()
            && !self.reader.next_chunk(Reader::load).map_err(Error::into_io)?
        {
            return Ok(0);
        }
        let mut left = self.reader.chunk.get(self.reader.used..).unwrap_or_default();
        let count = left.read(buffer)?;
        self.reader.used = self.reader.used.saturating_add(count);
        Ok(count)
    }
}
