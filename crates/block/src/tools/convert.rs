//! Copying an image to another format, without the parts that are zero.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};

use super::aside::Aside;
use super::create::{CreateOptions, create};
use crate::disk::{Backing, FormatChoice, ImageFormat, choose};
use crate::image::Image;
use crate::qcow2::{Qcow2Image, Qcow2Options, raw_extent};
use crate::raw::{RawImage, RawOptions};
use crate::{Error, Result};

/// Bytes that are copied at once.
const CHUNK: usize = 2 << 20;

/// How to convert an image.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ConvertOptions {
    /// The format of the source.
    pub source: FormatChoice,
    /// Whether the source may have backing files; what they have goes into the copy.
    pub backing: Backing,
    /// The copy: its size is that of the source, and it has no backing file.
    pub target: CreateOptions,
}

/// An image to copy from, which knows where it is empty.
enum Source {
    Raw(RawImage),
    Qcow2(Box<Qcow2Image>),
}

impl Source {
    fn image(&self) -> &dyn Image {
        match self {
            Self::Raw(image) => image,
            Self::Qcow2(image) => image.as_ref(),
        }
    }

    fn extent(&self, offset: u64, most: u64) -> io::Result<(bool, u64)> {
        match self {
            Self::Raw(image) => raw_extent(image.as_fd(), offset, most),
            Self::Qcow2(image) => image.extent(offset, most),
        }
    }
}

/// Copies the disk in `source` to a new image at `target`, which appears there when it is complete. `progress` is called with the
/// bytes done and those to do.
///
/// # Errors
/// Those of opening the source and of making the target, and what the host says on the way.
pub fn convert(
    source: &Path,
    target: &Path,
    options: &ConvertOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let from = match choose(source, options.source)? {
        ImageFormat::Raw => Source::Raw(RawOptions::new().read_only(true).open(source)?),
        ImageFormat::Qcow2 => {
            let open = Qcow2Options::new().read_only(true).backing(options.backing);
            Source::Qcow2(Box::new(open.open(source)?))
        }
    };
    if options.target.backing.is_some() {
        let reason = "a copy has no backing file".into();
        return Err(Error::Create { path: target.to_owned(), reason });
    }
    let aside = Aside::create(target, options.target.overwrite)?;
    let made = CreateOptions { size: Some(from.image().size()), overwrite: true, ..options.target.clone() };
    create(aside.path(), &made)?;
    let granule = usize::try_from(options.target.cluster_size).unwrap_or(CHUNK).min(CHUNK);
    let (to, granule): (Box<dyn Image>, usize) = match options.target.format {
        ImageFormat::Raw => (Box::new(RawOptions::new().open(aside.path())?), 4096),
        ImageFormat::Qcow2 => (Box::new(Qcow2Options::new().open(aside.path())?), granule),
    };
    copy(&from, to.as_ref(), granule, progress).map_err(|e| Error::Io {
        path: source.to_owned(),
        op: "copy it",
        source: e,
    })?;
    drop(to);
    aside.finish()
}

fn copy(from: &Source, to: &dyn Image, granule: usize, progress: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
    let size = from.image().size();
    let memory = GuestMem::anonymous(CHUNK as u64).map_err(io::Error::other)?;
    let view = memory.view();
    let mut bytes = vec![0; CHUNK];
    let mut offset = 0;
    while offset < size {
        let (zero, len) = from.extent(offset, size - offset)?;
        if zero {
            offset += len;
            progress(offset, size);
            continue;
        }
        // A data extent may end in the middle of a cluster of the target: it is read to the end of the chunk, so that each
        // cluster is written once.
        let chunk = CHUNK as u64 - offset % CHUNK as u64;
        let len = len.next_multiple_of(granule as u64).min(chunk).min(size - offset);
        let len = usize::try_from(len).unwrap_or(CHUNK).min(CHUNK);
        let slice = view.get_slice(GuestAddress(0), len).map_err(io::Error::other)?;
        from.image().read_vectored_at(&[slice], offset)?;
        let bytes = bytes.get_mut(..len).unwrap_or(&mut []);
        view.read_slice(bytes, GuestAddress(0)).map_err(io::Error::other)?;
        let mut at = 0;
        for run in bytes
            .chunks(granule)
            .map(|piece| (is_zero(piece), piece.len()))
            .collect::<Vec<_>>()
            .chunk_by(|a, b| a.0 == b.0)
        {
            let len = run.iter().map(|piece| piece.1).sum();
            if run.first().is_some_and(|piece| !piece.0) {
                let slice = view.get_slice(GuestAddress(at as u64), len).map_err(io::Error::other)?;
                to.write_vectored_at(&[slice], offset + at as u64)?;
            }
            at += len;
        }
        offset += len as u64;
        progress(offset, size);
    }
    to.flush()
}

fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<16>();
    chunks.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0) && rest.iter().all(|&byte| byte == 0)
}
