//! Sections in memory on their way in or out of a snapshot: [`State`], and what one owner sees of it.

use std::collections::BTreeMap;
use std::io::Write;

use crate::sections::Body;
use crate::{Error, Header, Result, Section, Sections, Writer, format, section};

/// Saved states in memory, encoded: what a machine is, except its guest memory.
///
/// It can be written to a snapshot, and restored from as often as one likes.
#[derive(Debug, Clone, Default)]
pub struct State {
    bodies: BTreeMap<String, Body>,
}

impl State {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a state as the section of its kind.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`], [`Error::Doubled`].
    pub fn put<S: Section>(&mut self, state: &S) -> Result<()> {
        self.put_named(S::NAME.to_owned(), state)
    }

    /// Adds a state as one of several sections of its kind.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`], [`Error::Doubled`], [`Error::Name`].
    pub fn put_instance<S: Section>(&mut self, instance: &str, state: &S) -> Result<()> {
        self.put_named(section::name_of::<S>(instance), state)
    }

    fn put_named<S: Section>(&mut self, name: String, state: &S) -> Result<()> {
        format::check_name(&name)?;
        if self.bodies.contains_key(&name) {
            return Err(Error::Doubled { name });
        }
        let bytes = section::encode(&name, state)?.into();
        self.bodies.insert(name, Body { version: S::VERSION, optional: S::OPTIONAL, bytes });
        Ok(())
    }

    /// Adds all sections of `other`.
    ///
    /// # Errors
    ///
    /// [`Error::Doubled`]; nothing was added then.
    pub fn absorb(&mut self, other: Self) -> Result<()> {
        match other.bodies.keys().find(|name| self.bodies.contains_key(*name)) {
            Some(name) => Err(Error::Doubled { name: name.clone() }),
            None => {
                self.bodies.extend(other.bodies);
                Ok(())
            }
        }
    }

    pub(crate) fn from_bodies(bodies: BTreeMap<String, Body>) -> Self {
        Self { bodies }
    }

    /// What `instance`, such as a device by its name, adds its states by.
    pub fn of<'a>(&'a mut self, instance: &'a str) -> Saving<'a> {
        Saving { state: self, instance }
    }

    /// Names of the sections.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.bodies.keys().map(String::as_str)
    }

    /// Bytes of all bodies.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bodies.values().map(|body| body.bytes.len()).sum()
    }

    /// Whether there is no section.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bodies.is_empty()
    }

    /// Writes all sections to a snapshot.
    ///
    /// # Errors
    ///
    /// Those of [`Writer::section`].
    pub fn write_to<W: Write>(&self, writer: &mut Writer<W>) -> Result<()> {
        for (name, body) in &self.bodies {
            let mut section = writer.section(name.clone(), body.version, body.optional)?;
            section.write_all(&body.bytes).map_err(crate::writer::io_error)?;
            section.finish()?;
        }
        Ok(())
    }

    /// The sections, to restore from.
    #[must_use]
    pub fn into_sections(self, header: Header) -> Sections {
        Sections::from_bodies(header, self.bodies)
    }
}

/// Adds the states of one owner to a [`State`].
#[derive(Debug)]
pub struct Saving<'a> {
    state: &'a mut State,
    instance: &'a str,
}

impl Saving<'_> {
    /// Adds one state; of each kind an owner has at most one.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`], [`Error::Doubled`], [`Error::Name`].
    pub fn put<S: Section>(&mut self, state: &S) -> Result<()> {
        self.state.put_instance(self.instance, state)
    }

    /// The owner's name.
    #[must_use]
    pub fn instance(&self) -> &str {
        self.instance
    }
}

/// Takes the states of one owner out of [`Sections`].
#[derive(Debug)]
pub struct Restoring<'a> {
    sections: &'a mut Sections,
    instance: &'a str,
}

impl<'a> Restoring<'a> {
    pub(crate) fn new(sections: &'a mut Sections, instance: &'a str) -> Self {
        Self { sections, instance }
    }

    /// Takes the state of kind `S`.
    ///
    /// # Errors
    ///
    /// As [`Sections::take_instance`].
    pub fn take<S: Section>(&mut self) -> Result<S> {
        self.sections.take_instance(self.instance)
    }

    /// Takes the state of kind `S`, if there is one.
    ///
    /// # Errors
    ///
    /// As [`Sections::take_instance`], but for [`Error::Missing`].
    pub fn take_if_present<S: Section>(&mut self) -> Result<Option<S>> {
        self.sections.take_instance_if_present(self.instance)
    }

    /// The owner's name.
    #[must_use]
    pub fn instance(&self) -> &str {
        self.instance
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::{Arch, Limits, Reader};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Count(u32);

    impl Section for Count {
        const NAME: &'static str = "count";
        const VERSION: u32 = 1;
    }

    fn header() -> Header {
        Header::new(Arch::host(), "test").unwrap()
    }

    #[test]
    fn states_of_owners_come_back_by_owner() {
        let mut state = State::new();
        state.of("a").put(&Count(1)).unwrap();
        state.of("b").put(&Count(2)).unwrap();
        let mut sections = state.clone().into_sections(header());
        assert_eq!(sections.of("b").take::<Count>().unwrap(), Count(2));
        assert_eq!(sections.of("b").take_if_present::<Count>().unwrap(), None);
        assert!(matches!(sections.of("c").take::<Count>(), Err(Error::Missing { .. })));
        assert!(matches!(sections.finish(), Err(Error::Unclaimed { name }) if name == "count/a"));
    }

    #[test]
    fn one_owner_has_one_state_of_a_kind() {
        let mut state = State::new();
        state.of("a").put(&Count(1)).unwrap();
        assert!(matches!(state.of("a").put(&Count(2)), Err(Error::Doubled { .. })));
    }

    #[test]
    fn what_is_written_is_what_was_put() {
        let mut state = State::new();
        state.put(&Count(7)).unwrap();
        state.of("a").put(&Count(8)).unwrap();
        let mut writer = Writer::new(Vec::new(), &header()).unwrap();
        state.write_to(&mut writer).unwrap();
        let bytes = writer.finish().unwrap();
        let mut read = Sections::load(Reader::new(bytes.as_slice(), Limits::default()).unwrap()).unwrap();
        assert_eq!(read.take::<Count>().unwrap(), Count(7));
        assert_eq!(read.of("a").take::<Count>().unwrap(), Count(8));
        assert!(read.finish().unwrap().is_empty());
    }
}
