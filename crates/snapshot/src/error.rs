//! The error type of this crate.

use std::io;
use std::path::PathBuf;

/// What an owner of a section says about a body that it cannot encode, decode or upgrade.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong when a snapshot is written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The stream under the snapshot failed.
    #[error("cannot {op} the snapshot")]
    Io {
        /// What was being done.
        op: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The file system refused something.
    #[error("cannot {op} {path:?}")]
    File {
        /// What was being done.
        op: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The input does not begin as a snapshot does.
    #[error("not a snapshot: it does not begin with FREESNAP")]
    NotASnapshot,
    /// The input ends too early.
    #[error("the snapshot is cut off at byte {offset}")]
    Truncated {
        /// Where the read began that found the end, in bytes from the start of the snapshot.
        offset: u64,
    },
    /// A checksum is wrong, or what it covers makes no sense.
    #[error("the snapshot is damaged at byte {offset}: {what}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// Where the header, frame or piece begins, in bytes from the start of the snapshot.
        offset: u64,
    },
    /// There is something behind the end of a snapshot in a file.
    #[error("the file goes on behind the end of the snapshot at byte {offset}")]
    Trailing {
        /// Where the snapshot ends.
        offset: u64,
    },
    /// The format is newer than this crate.
    #[error(
        "the snapshot, written by {program:?}, has format version {found}: this build reads up to {newest}"
    )]
    Format {
        /// The version in the header.
        found: u16,
        /// The newest version that this crate reads.
        newest: u16,
        /// Who wrote it.
        program: String,
    },
    /// The header has flags that this crate does not know.
    #[error("the snapshot's header has unknown flags {flags:#06x}")]
    Flags {
        /// The flags in the header.
        flags: u16,
    },
    /// The snapshot is of another architecture.
    #[error("the snapshot is of architecture {found}: expected {expected}")]
    Arch {
        /// The architecture in the header.
        found: crate::Arch,
        /// The one that was asked for.
        expected: crate::Arch,
    },
    /// The snapshot is larger than the reader allows.
    #[error("{what} is over the limit of {limit}")]
    Limit {
        /// What is too large or too many.
        what: String,
        /// What was allowed, in bytes or in sections.
        limit: u64,
    },
    /// A name or the text of a program cannot be written.
    #[error("bad name {name:?}: {reason}")]
    Name {
        /// As it was given; cut off if it is very long.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Two sections have the same name.
    #[error("there are two sections {name:?}")]
    Doubled {
        /// Their name.
        name: String,
    },
    /// A section that is needed is not there.
    #[error("the snapshot has no section {name:?}")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A section is there that nobody took, and that is not optional.
    #[error("the snapshot has a section {name:?} that nothing here can restore")]
    Unclaimed {
        /// Its name.
        name: String,
    },
    /// A section is not of the kind that was asked for.
    #[error("expected a section of kind {expected:?}, found {found:?}")]
    Kind {
        /// What was asked for.
        expected: &'static str,
        /// The name of the section.
        found: String,
    },
    /// A section is newer than its type in this build.
    #[error("section {name:?} has version {found}: this build reads up to {newest}")]
    TooNew {
        /// Its name.
        name: String,
        /// Its version.
        found: u32,
        /// The newest that can be read.
        newest: u32,
    },
    /// A section is older than what its type can upgrade.
    #[error("section {name:?} has version {found}: this build reads from {oldest} on")]
    TooOld {
        /// Its name.
        name: String,
        /// Its version.
        found: u32,
        /// The oldest that can be read.
        oldest: u32,
    },
    /// A body cannot be upgraded.
    #[error("cannot upgrade section {name:?} from version {from}")]
    Upgrade {
        /// The name of the section.
        name: String,
        /// The version of the body that could not be upgraded.
        from: u32,
        /// What the type says.
        #[source]
        source: Cause,
    },
    /// A body is not what its type expects.
    #[error("cannot decode section {name:?} of version {version}")]
    Decode {
        /// The name of the section.
        name: String,
        /// Its version in the snapshot.
        version: u32,
        /// What the decoder says.
        #[source]
        source: Cause,
    },
    /// A state has no encoding.
    #[error("cannot encode section {name:?}")]
    Encode {
        /// The name of the section.
        name: String,
        /// What the encoder says.
        #[source]
        source: Cause,
    },
    /// A reader or writer is used after an error, or a writer after a section that was not finished.
    #[error("the {what} cannot go on: an earlier step failed or was left unfinished")]
    Broken {
        /// Reader or writer.
        what: &'static str,
    },
}

impl Error {
    pub(crate) fn file(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { op, path, source }
    }

    /// For the standard traits: the error of the stream itself, or this one inside of one.
    pub(crate) fn into_io(self) -> io::Error {
        match self {
            Self::Io { source, .. } => source,
            Self::Truncated { .. } => io::Error::new(io::ErrorKind::UnexpectedEof, self),
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        }
    }
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
