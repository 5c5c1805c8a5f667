//! Describing images.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::disk::{FormatChoice, ImageFormat, choose};
use crate::qcow2::check::snapshots;
use crate::qcow2::file::HostFile;
use crate::qcow2::header::{CORRUPT, DIRTY, Header, LAZY_REFCOUNTS};
use crate::qcow2::{MAX_CHAIN, resolve};
use crate::{Error, Result};

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageInfo {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Bytes of the disk that the guest sees.
    pub virtual_size: u64,
    /// Bytes in the file.
    pub file_size: u64,
    /// Bytes that the file takes on the host's disk.
    pub disk_size: u64,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
}

/// What a qcow2 image is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bits in a refcount.
    pub refcount_bits: u32,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Refcounts are behind: they are counted anew when the image is opened for writing.
    pub dirty: bool,
    /// Somebody found the image damaged.
    pub corrupt: bool,
    /// It has persistent dirty bitmaps, which are dropped when it is opened for writing.
    pub bitmaps: bool,
    /// The backing file, as the image names it.
    pub backing: Option<String>,
    /// Its format, as the image names it. `None`: it is taken as raw.
    pub backing_format: Option<String>,
    /// The names of the internal snapshots.
    pub snapshots: Vec<String>,
}

/// Describes the image at `path`, without locking it: a machine may be using it.
///
/// # Errors
/// It cannot be opened, or is no image of its format, or one that this crate could not open.
pub fn info(path: &Path, format: FormatChoice) -> Result<ImageInfo> {
    let format = choose(path, format)?;
    let file = HostFile::open(path, true, false)?;
    let fail = |e| file.error("examine it", e);
    let metadata = std::fs::metadata(path).map_err(fail)?;
    let file_size = file.len().map_err(fail)?;
    let (virtual_size, qcow2) = match format {
        ImageFormat::Raw => (file_size - file_size % crate::SECTOR_SIZE, None),
        ImageFormat::Qcow2 => {
            let header = Header::read(&file)?;
            let snapshots = snapshots(&file, &header).map_err(|e| file.error("read its snapshots", e))?;
            (header.size, Some(describe(header, snapshots.into_iter().map(|s| s.name).collect())))
        }
    };
    let disk_size = metadata.blocks().saturating_mul(512);
    Ok(ImageInfo { path: path.to_owned(), format, virtual_size, file_size, disk_size, qcow2 })
}

fn describe(header: Header, snapshots: Vec<String>) -> Qcow2Info {
    Qcow2Info {
        version: header.version,
        cluster_size: header.cluster_size(),
        refcount_bits: 1 << header.refcount_order,
        lazy_refcounts: header.compatible & LAZY_REFCOUNTS != 0,
        dirty: header.incompatible & DIRTY != 0,
        corrupt: header.incompatible & CORRUPT != 0,
        bitmaps: header.bitmaps,
        backing: header.backing,
        backing_format: header.backing_format,
        snapshots,
    }
}

/// Describes the image at `path` and those below it, top first. No format but the first is chosen: each image states that of the
/// one below it, or it is raw.
///
/// # Errors
/// As [`info`] for each, and [`Error::Chain`] for more than 32.
pub fn info_chain(path: &Path, format: FormatChoice) -> Result<Vec<ImageInfo>> {
    let mut all = vec![info(path, format)?];
    while let Some(ImageInfo {
        path,
        qcow2: Some(Qcow2Info { backing: Some(name), backing_format, .. }),
        ..
    }) = all.last()
    {
        if all.len() >= MAX_CHAIN {
            return Err(Error::Chain { path: path.clone(), what: "is a loop, or longer than 32 images" });
        }
        let format = match backing_format.as_deref() {
            Some("qcow2") => ImageFormat::Qcow2,
            None | Some("raw" | "file" | "host_device") => ImageFormat::Raw,
            Some(other) => {
                let feature = format!("a backing file of the format {other:?}");
                return Err(Error::Unsupported { path: path.clone(), feature });
            }
        };
        let next = info(&resolve(path, name)?, FormatChoice::Given(format))?;
        all.push(next);
    }
    Ok(all)
}
