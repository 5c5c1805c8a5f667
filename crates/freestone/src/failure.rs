//! Failures of the command, as one line and an exit status.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

/// Something failed on the host.
pub(crate) const FAILURE: u8 = 1;
/// The command line is wrong.
pub(crate) const USAGE: u8 = 2;

/// Why the command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    status: u8,
}

impl Failure {
    /// Something failed on the host; `message` names it with its value.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: FAILURE }
    }

    /// The command line is wrong.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: USAGE }
    }

    /// What another process of this program failed with.
    pub(crate) fn with_status(message: impl Into<String>, status: u8) -> Self {
        Self { message: message.into(), status }
    }

    /// The exit status.
    pub(crate) fn status(&self) -> u8 {
        self.status
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.status)
    }
}

/// The error and what caused it, on one line.
impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            message.push_str(": ");
            message.push_str(&cause.to_string());
            source = cause.source();
        }
        Self::new(message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read {name}")]
    struct Outer {
        name: &'static str,
        #[source]
        source: std::io::Error,
    }

    #[test]
    fn a_chain_of_errors_is_one_line() {
        let error = Outer { name: "disk", source: std::io::Error::other("no luck") };
        let failure = Failure::from(error);
        assert_eq!(failure.to_string(), "cannot read disk: no luck");
        assert_eq!(failure.exit_code(), ExitCode::from(FAILURE));
    }
}
