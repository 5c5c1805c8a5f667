//! The error type of this crate.

use std::io;

/// What can go wrong when a platform device is set up or restored. Nothing a guest does is an error here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of the host failed.
    #[error("cannot {op}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A saved state cannot be that of this device.
    #[error("the saved state of device {device} does not fit: {what} {value:#x}")]
    BadState {
        /// The device.
        device: &'static str,
        /// What of it, and why.
        what: &'static str,
        /// The value in the saved state.
        value: u64,
    },
}

impl Error {
    pub(crate) fn io<E: Into<io::Error>>(op: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { op, source: source.into() }
    }
}

impl From<Error> for freestone_bus::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io { op, source } => Self::Io { op, source },
            Error::BadState { device, what, value } => {
                Self::BadState { device: device.to_owned(), what, value }
            }
        }
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
