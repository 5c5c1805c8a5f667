//! Opening a disk of any format. The format is what the user says: it is never guessed from what the guest wrote.

#[cfg(feature = "tools")]
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::image::Image;
use crate::raw::RawOptions;
use crate::{Error, Result};

/// The formats that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The file's bytes are the disk's bytes.
    #[default]
    Raw,
    /// qcow2, version 2 or 3. Needs the feature `qcow2`.
    Qcow2,
}

impl ImageFormat {
    /// The name, as backing files and command lines have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where the format of an image is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum FormatChoice {
    /// Raw, unless this crate made the file and recorded its format in a way that no guest can imitate, see
    /// [`recorded_format`].
    #[default]
    Recorded,
    /// The user says it.
    Given(ImageFormat),
    /// The first bytes say it. Whoever could write to the disk while it was raw chooses what happens: only for files of known
    /// origin.
    Probe,
}

/// What becomes of an image that names a backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Backing {
    /// It is refused: an image of unknown origin could name any file of the host.
    #[default]
    Deny,
    /// The backing files are opened for reading, as plain paths relative to the folder of the image that names them. Each has the
    /// format that the image states; without one it is raw. Nothing is probed. A chain has at most 32 images.
    Allow,
}

/// How to open a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskOptions {
    /// Default: [`FormatChoice::Recorded`].
    pub format: FormatChoice,
    /// Refuse writes. Default: `false`.
    pub read_only: bool,
    /// Lock the files. Default: `true`.
    pub lock: bool,
    /// Default: [`Backing::Deny`].
    pub backing: Backing,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { format: FormatChoice::Recorded, read_only: false, lock: true, backing: Backing::Deny }
    }
}

impl DiskOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`format`](Self::format).
    #[must_use]
    pub fn format(mut self, format: FormatChoice) -> Self {
        self.format = format;
        self
    }

    /// Sets [`read_only`](Self::read_only).
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Sets [`lock`](Self::lock).
    #[must_use]
    pub fn lock(mut self, lock: bool) -> Self {
        self.lock = lock;
        self
    }

    /// Sets [`backing`](Self::backing).
    #[must_use]
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Opens the disk at `path`.
    ///
    /// # Errors
    /// Those of the format, and [`Error::Unsupported`] for a format that this crate was built without.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Arc<dyn Image>> {
        let path = path.as_ref();
        match choose(path, self.format)? {
            ImageFormat::Raw => {
                Ok(Arc::new(RawOptions::new().read_only(self.read_only).lock(self.lock).open(path)?))
            }
            #[cfg(feature = "qcow2")]
            ImageFormat::Qcow2 => {
                let options = crate::Qcow2Options::new().read_only(self.read_only).lock(self.lock);
                Ok(Arc::new(options.backing(self.backing).open(path)?))
            }
            #[cfg(not(feature = "qcow2"))]
            ImageFormat::Qcow2 => {
                Err(Error::Unsupported { path: path.to_owned(), feature: "the format qcow2".into() })
            }
        }
    }
}

/// The format of the image at `path` by `choice`.
///
/// # Errors
/// As [`probe`].
pub fn choose(path: &Path, choice: FormatChoice) -> Result<ImageFormat> {
    match choice {
        FormatChoice::Recorded => Ok(recorded_format(path)),
        FormatChoice::Given(format) => Ok(format),
        FormatChoice::Probe => probe(path),
    }
}

/// Looks at the first bytes of a file for its format. Only for files of known origin: see [`FormatChoice::Probe`].
///
/// # Errors
/// [`Error::Io`] and [`Error::Kind`] if it cannot be opened and read.
pub fn probe(path: &Path) -> Result<ImageFormat> {
    use std::os::fd::AsFd;

    let raw = match RawOptions::new().read_only(true).lock(false).open(path) {
        // Too small for any other.
        Err(Error::TooSmall { .. }) => return Ok(ImageFormat::Raw),
        other => other?,
    };
    let mut magic = [0; 4];
    rustix::io::pread(raw.as_fd(), &mut magic, 0).map_err(|e| Error::Io {
        path: path.to_owned(),
        op: "read its first bytes",
        source: e.into(),
    })?;
    Ok(if magic == *b"QFI\xfb" { ImageFormat::Qcow2 } else { ImageFormat::Raw })
}

/// The extended attribute in which the tools of this crate record the format.
const ATTRIBUTE: &str = "user.freestone.format";

/// The format that the tools of this crate recorded when they made the file; [`ImageFormat::Raw`] if there is no record.
///
/// The record is an extended attribute, which a guest cannot write, with a random number that stands in the image's header too.
/// So it does not hold for a file that was overwritten with something else, and whoever wrote that could not know the number.
pub fn recorded_format(path: &Path) -> ImageFormat {
    #[cfg(feature = "qcow2")]
    {
        let mut value = [0; 64];
        let recorded = rustix::fs::getxattr(path, ATTRIBUTE, &mut value)
            .ok()
            .and_then(|len| std::str::from_utf8(value.get(..len)?).ok()?.strip_prefix("qcow2:"));
        if let Some(recorded) = recorded
            && let Ok(file) = crate::qcow2::file::HostFile::open(path, true, false)
            && let Ok(header) = crate::qcow2::header::Header::read(&file)
            && header.identity.is_some_and(|identity| hex(&identity) == recorded)
        {
            return ImageFormat::Qcow2;
        }
    }
    let _ = (path, ATTRIBUTE);
    ImageFormat::Raw
}

/// Records that `path` is a qcow2 image with this identity. File systems without extended attributes keep no record.
#[cfg(feature = "tools")]
pub(crate) fn record(path: &Path, identity: &[u8; 16]) {
    let value = format!("qcow2:{}", hex(identity));
    let _ = rustix::fs::setxattr(path, ATTRIBUTE, value.as_bytes(), rustix::fs::XattrFlags::empty());
}

/// A random number for [`record`].
#[cfg(feature = "tools")]
pub(crate) fn identity() -> io::Result<[u8; 16]> {
    use std::io::Read;

    let mut identity = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut identity)?;
    Ok(identity)
}

#[cfg(feature = "qcow2")]
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
