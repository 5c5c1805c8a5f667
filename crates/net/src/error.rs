//! The error type of this crate.

use std::io;

/// What can go wrong when a port is made, opened or changed. What goes wrong with a frame is counted, not returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused something.
    #[error("cannot {op}")]
    Io {
        /// What was being done, with what.
        op: String,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A value that makes no sense.
    #[error("{what} {value:?}: {reason}")]
    Invalid {
        /// What was given.
        what: &'static str,
        /// As it was given.
        value: String,
        /// What is wrong with it, or what it must be.
        reason: String,
    },
    /// Metadata larger than the store's limit.
    #[cfg(feature = "mmds")]
    #[error("metadata of {size} bytes: at most {limit} are stored")]
    MetadataTooLarge {
        /// Bytes as JSON without spaces.
        size: usize,
        /// Most bytes.
        limit: usize,
    },
    /// Metadata that is to be changed and that nobody has put yet.
    #[cfg(feature = "mmds")]
    #[error("cannot change the metadata: there is none yet")]
    NoMetadata,
}

impl Error {
    pub(crate) fn io(op: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let op = op.into();
        move |source| Self::Io { op, source }
    }

    pub(crate) fn invalid(what: &'static str, value: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what, value: value.into(), reason: reason.into() }
    }
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
