//! What is in a section: a saved state with a name, a version, an encoding and a way up from older versions.

use std::borrow::Cow;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Cause, Error, Result};

/// A saved state that is a section of its own. Such types are apart from those of the running machine: they change only with
/// their version.
///
/// The encoding is postcard's, which is specified and stable. It has no names of fields, so every change of the type is a new
/// version: the old type is kept, and [`upgrade`](Self::upgrade) leads from it to the next one. As for the type: no
/// attributes of serde that need a self-describing format (`flatten`, `untagged`, `skip_serializing_if`), and, since a
/// snapshot may be hostile, no type that contains itself and no sequence of empty elements, whose length nothing bounds.
pub trait Section: Serialize + DeserializeOwned {
    /// The kind of the section: the first part of its name, without `/`.
    const NAME: &'static str;
    /// The version that this type is. Begin with 1.
    const VERSION: u32;
    /// The oldest version that can be upgraded to this one.
    const OLDEST: u32 = Self::VERSION;
    /// Whether a reader that does not know the section may leave it out.
    const OPTIONAL: bool = false;

    /// Upgrades a body by one step: from version `from` to `from + 1`. It is called for every step from the version of the
    /// snapshot to [`VERSION`](Self::VERSION). [`step`] does most of it.
    ///
    /// # Errors
    ///
    /// Whatever hinders it; the caller adds the name of the section and `from`.
    fn upgrade(from: u32, body: &[u8]) -> std::result::Result<Vec<u8>, Cause> {
        let _ = (from, body);
        Err("there is no upgrade from this version".into())
    }
}

/// One step of an [upgrade](Section::upgrade), by types: decodes `Old`, converts and encodes `New`.
///
/// # Errors
///
/// Those of the encoding.
pub fn step<Old: DeserializeOwned, New: From<Old> + Serialize>(
    body: &[u8],
) -> std::result::Result<Vec<u8>, Cause> {
    Ok(postcard::to_allocvec(&New::from(from_bytes::<Old>(body)?))?)
}

/// The kind that a name says: what is before its first `/`.
pub(crate) fn kind(name: &str) -> &str {
    name.split_once('/').map_or(name, |(kind, _)| kind)
}

/// The name of the section of `S` of that instance.
pub(crate) fn name_of<S: Section>(instance: &str) -> String {
    format!("{}/{instance}", S::NAME)
}

pub(crate) fn encode<S: Section>(name: &str, state: &S) -> Result<Vec<u8>> {
    postcard::to_allocvec(state)
        .map_err(|source| Error::Encode { name: name.to_owned(), source: source.into() })
}

/// Whether a section can become an `S`, as far as its name and version say.
pub(crate) fn check<S: Section>(name: &str, version: u32) -> Result<()> {
    let found = version;
    if kind(name) != S::NAME {
        Err(Error::Kind { expected: S::NAME, found: name.to_owned() })
    } else if found > S::VERSION {
        Err(Error::TooNew { name: name.to_owned(), found, newest: S::VERSION })
    } else if found < S::OLDEST {
        Err(Error::TooOld { name: name.to_owned(), found, oldest: S::OLDEST })
    } else {
        Ok(())
    }
}

/// Decodes a body that [`check`] has found right.
pub(crate) fn decode<S: Section>(name: &str, version: u32, body: &[u8]) -> Result<S> {
    let mut body = Cow::Borrowed(body);
    for from in version..S::VERSION {
        let upgraded = S::upgrade(from, &body);
        body =
            Cow::Owned(upgraded.map_err(|source| Error::Upgrade { name: name.to_owned(), from, source })?);
    }
    from_bytes(&body).map_err(|source| Error::Decode { name: name.to_owned(), version, source })
}

fn from_bytes<T: DeserializeOwned>(body: &[u8]) -> std::result::Result<T, Cause> {
    match postcard::take_from_bytes(body)? {
        (state, []) => Ok(state),
        (_, rest) => Err(format!("{} bytes are left over", rest.len()).into()),
    }
}
