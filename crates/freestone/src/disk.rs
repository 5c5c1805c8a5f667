//! What `--disk` says.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

/// A disk on the command line: `PATH[,ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    /// Image file or block device.
    pub(crate) path: PathBuf,
    /// Whether the guest may not write.
    pub(crate) read_only: bool,
}

impl FromStr for DiskSpec {
    type Err = Infallible;

    /// A path may hold commas: only a trailing `,ro` or `,rw` is an option.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        let (path, read_only) = match text.rsplit_once(',') {
            Some((path, "ro")) => (path, true),
            Some((path, "rw")) => (path, false),
            _ => (text, false),
        };
        Ok(Self { path: path.into(), read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_with_an_optional_mode() {
        for (text, path, read_only) in [
            ("a.img", "a.img", false),
            ("a.img,ro", "a.img", true),
            ("a,b.img,rw", "a,b.img", false),
            ("a,b", "a,b", false),
        ] {
            let spec: DiskSpec = text.parse().unwrap();
            assert_eq!(spec, DiskSpec { path: path.into(), read_only }, "{text}");
        }
    }
}
