//! A snapshot whose sections are in memory, to be taken in any order.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use crate::{Error, Header, Reader, Restoring, Result, Section, SectionReader, State, section};

#[derive(Debug, Clone)]
pub(crate) struct Body {
    pub(crate) version: u32,
    pub(crate) optional: bool,
    /// Shared by all clones: there may be a thousand forks of one template.
    pub(crate) bytes: Arc<[u8]>,
}

/// The sections of a snapshot, read and checked but not yet decoded. They are taken by their owners, in whatever order the
/// snapshot has them.
#[derive(Debug, Clone)]
pub struct Sections {
    header: Header,
    bodies: BTreeMap<String, Body>,
}

impl Sections {
    /// Reads all sections to the end of the snapshot. Together they must be within [`Limits::in_memory`](crate::Limits).
    ///
    /// # Errors
    ///
    /// Those of [`Reader::next_section`] and [`SectionReader::read_body`].
    pub fn load<R: Read>(reader: Reader<R>) -> Result<Self> {
        Self::load_with(reader, |section| Ok::<_, Error>(Some(section)))
    }

    /// The same, except that `each` sees every section first: it reads those that are streamed and gives back those that are
    /// to be held in memory (what it did not read of them).
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load), and what `each` gives.
    pub fn load_with<R: Read, E: From<Error>>(
        mut reader: Reader<R>,
        mut each: impl for<'a> FnMut(SectionReader<'a, R>) -> std::result::Result<Option<SectionReader<'a, R>>, E>,
    ) -> std::result::Result<Self, E> {
        let header = reader.header().clone();
        let mut left = reader.limits().in_memory;
        let mut bodies = BTreeMap::new();
        while let Some(section) = reader.next_section()? {
            let Some(mut section) = each(section)? else { continue };
            let bytes = section.body_within(left)?;
            left = left.saturating_sub(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            let body =
                Body { version: section.version(), optional: section.is_optional(), bytes: bytes.into() };
            bodies.insert(section.name().to_owned(), body);
        }
        Ok(Self { header, bodies })
    }

    pub(crate) fn from_bodies(header: Header, bodies: BTreeMap<String, Body>) -> Self {
        Self { header, bodies }
    }

    /// What `instance`, such as a device by its name, takes its states by.
    pub fn of<'a>(&'a mut self, instance: &'a str) -> Restoring<'a> {
        Restoring::new(self, instance)
    }

    /// What the snapshot is of, and who wrote it.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The names of the sections that nobody took yet.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.bodies.keys().map(String::as_str)
    }

    /// Takes the section of `S`.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], and those of [`SectionReader::decode`].
    pub fn take<S: Section>(&mut self) -> Result<S> {
        self.take_if_present()?.ok_or_else(|| Error::Missing { name: S::NAME.to_owned() })
    }

    /// Decodes the section of `S` and leaves it where it is.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take).
    pub fn peek<S: Section>(&self) -> Result<S> {
        let body = self.bodies.get(S::NAME).ok_or_else(|| Error::Missing { name: S::NAME.to_owned() })?;
        section::check::<S>(S::NAME, body.version)?;
        section::decode(S::NAME, body.version, &body.bytes)
    }

    /// The sections that nobody took, to be written again as they are.
    #[must_use]
    pub fn into_state(self) -> State {
        State::from_bodies(self.bodies)
    }

    /// Takes the section of `S`, if there is one.
    ///
    /// # Errors
    ///
    /// Those of [`SectionReader::decode`].
    pub fn take_if_present<S: Section>(&mut self) -> Result<Option<S>> {
        self.take_named(S::NAME)
    }

    /// Takes one of several sections of `S`.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], and those of [`SectionReader::decode`].
    pub fn take_instance<S: Section>(&mut self, instance: &str) -> Result<S> {
        let name = section::name_of::<S>(instance);
        self.take_named(&name)?.ok_or(Error::Missing { name })
    }

    /// Takes one of several sections of `S`, if there is one.
    ///
    /// # Errors
    ///
    /// Those of [`SectionReader::decode`].
    pub fn take_instance_if_present<S: Section>(&mut self, instance: &str) -> Result<Option<S>> {
        self.take_named(&section::name_of::<S>(instance))
    }

    fn take_named<S: Section>(&mut self, name: &str) -> Result<Option<S>> {
        // A section that cannot be taken stays, so that a caller may try another type.
        let Some(body) = self.bodies.get(name) else { return Ok(None) };
        section::check::<S>(name, body.version)?;
        let Some(body) = self.bodies.remove(name) else { return Ok(None) };
        section::decode(name, body.version, &body.bytes).map(Some)
    }

    /// Ends the restore: gives the names of the optional sections that nobody took.
    ///
    /// # Errors
    ///
    /// [`Error::Unclaimed`] for a section that is not optional and that nobody took: a part of the guest would be lost.
    pub fn finish(self) -> Result<Vec<String>> {
        let skip = |(name, body): (String, Body)| {
            if body.optional { Ok(name) } else { Err(Error::Unclaimed { name }) }
        };
        self.bodies.into_iter().map(skip).collect()
    }
}
