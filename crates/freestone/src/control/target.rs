//! Which machine is meant: by its name, or by its control socket.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::failure::Failure;
use crate::names::{Name, Runtime};

/// A machine on the command line: its name, or the path of its control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target(String);

impl Target {
    /// The control socket. A file of that name here comes before a machine of that name.
    pub(crate) fn socket(&self) -> Result<PathBuf, Failure> {
        let path = PathBuf::from(&self.0);
        if path.exists() || self.0.parse::<Name>().is_err() {
            return Ok(path);
        }
        let entry = Runtime::find().entry(&self.0)?;
        entry.pid()?;
        Ok(entry.control())
    }
}

impl FromStr for Target {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
