//! The images behind an image: opened for reading, by the rules that keep a disk from naming any file of the host.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use freestone_memory::MemorySlice;
use freestone_memory::io::read_vectored_at;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::file::{HostFile, part, total};
use super::header::Header;
use super::{Qcow2Image, Qcow2Options, fill_zero};
use crate::disk::Backing;
use crate::image::{Hold, Image, SECTOR_SIZE};
use crate::raw::{RawImage, RawOptions};
use crate::{Error, Result};

/// Images in a chain, the top one included.
pub(crate) const MAX_CHAIN: usize = 32;

/// What an image is laid over.
#[derive(Debug)]
pub(crate) enum Base {
    Raw(RawImage),
    Qcow2(Box<Qcow2Image>),
}

impl Base {
    /// Opens what `header` of `file` names. `seen` are the files of the chain so far.
    pub(super) fn open(
        file: &HostFile,
        header: &Header,
        options: Qcow2Options,
        seen: &mut Vec<(u64, u64)>,
    ) -> Result<Option<Self>> {
        let Some(name) = &header.backing else { return Ok(None) };
        let top = file.path();
        if options.backing == Backing::Deny {
            return Err(Error::BackingDenied { path: top.to_owned(), backing: name.clone() });
        }
        let path = resolve(top, name)?;
        if seen.len() >= MAX_CHAIN {
            return Err(Error::Chain { path: top.to_owned(), what: "is longer than 32 images" });
        }
        let options = options.read_only(true);
        // Without a format the backing file is raw. It is never looked into: a guest may have written a header there.
        match header.backing_format.as_deref() {
            None | Some("raw" | "file" | "host_device") => {
                let raw = RawOptions::new().read_only(true).lock(options.lock).open(&path)?;
                Ok(Some(Self::Raw(raw)))
            }
            Some("qcow2") => {
                let below = HostFile::open(&path, true, options.lock)?;
                Ok(Some(Self::Qcow2(Box::new(Qcow2Image::open_file(below, options, seen)?))))
            }
            Some(format) => Err(Error::Unsupported {
                path: top.to_owned(),
                feature: format!("a backing file of the format {format:?}"),
            }),
        }
    }

    /// Fills `bufs` from `offset` on, with zeroes beyond the end.
    pub(super) fn read(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        let wanted = total(bufs);
        let inside = self.size().saturating_sub(offset).min(wanted as u64);
        let inside = usize::try_from(inside).unwrap_or(wanted);
        if inside == 0 {
            return fill_zero(bufs);
        }
        let head = part(bufs, 0, inside);
        match self {
            Self::Qcow2(image) => image.read_vectored_at(&head, offset)?,
            Self::Raw(raw) => {
                let mut done = 0;
                while done < inside {
                    let rest = part(&head, done, inside - done);
                    match read_vectored_at(raw.as_fd(), &rest, offset.saturating_add(done as u64))? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        n => done = done.saturating_add(n),
                    }
                }
            }
        }
        fill_zero(&part(bufs, inside, wanted - inside))
    }

    /// As [`Image::set_hold`].
    pub(super) fn set_hold(&self, hold: Hold) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.set_hold(hold),
            Self::Qcow2(image) => image.set_hold(hold),
        }
    }

    /// Whether the bytes from `offset` on, and how many of at most `most`, are known to be zero.
    pub(super) fn extent(&self, offset: u64, most: u64) -> io::Result<(bool, u64)> {
        let left = self.size().saturating_sub(offset);
        match self {
            _ if left == 0 => Ok((true, most)),
            Self::Raw(raw) => raw_extent(raw.as_fd(), offset, most.min(left)),
            Self::Qcow2(image) => image.extent(offset, most.min(left)),
        }
    }

    /// Bytes in the base.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size().saturating_add(raw.unused_bytes()),
            Self::Qcow2(image) => image.header.size,
        }
    }
}

/// Whether a file has a hole at `offset`, and how long it is, or else the data, within `most` bytes.
pub(crate) fn raw_extent(file: BorrowedFd<'_>, offset: u64, most: u64) -> io::Result<(bool, u64)> {
    let end = offset.saturating_add(most);
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => Ok((true, data.min(end) - offset)),
        Ok(_) => {
            let hole = rustix::fs::seek(file, SeekFrom::Hole(offset)).unwrap_or(end);
            Ok((false, hole.min(end).max(offset + 1) - offset))
        }
        Err(Errno::NXIO) => Ok((true, most)),
        // A device or file system that does not know holes.
        Err(_) => Ok((false, most)),
    }
}

/// The path that a backing name means: relative to the folder of the image that names it.
pub(crate) fn resolve(image: &Path, name: &str) -> Result<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let scheme = name.split_once(':').map_or("", |(scheme, _)| scheme);
    if !scheme.is_empty() && !scheme.contains('/') {
        return Err(Error::Unsupported {
            path: image.to_owned(),
            feature: format!("a backing file that is not a plain path ({name:?})"),
        });
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(name))
}

/// Refuses a file that the chain has already.
pub(super) fn note(file: &HostFile, seen: &mut Vec<(u64, u64)>) -> Result<()> {
    let identity = file.identity().map_err(|e| file.error("examine it", e))?;
    if seen.contains(&identity) {
        return Err(Error::Chain { path: file.path().to_owned(), what: "is a loop" });
    }
    seen.push(identity);
    Ok(())
}

/// The virtual size as a disk has it: whole sectors.
pub(super) fn whole_sectors(size: u64) -> u64 {
    size - size % SECTOR_SIZE
}
