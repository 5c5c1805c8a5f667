//! Making, describing, checking and converting images: what `freestone image` does, as functions.
//!
//! These are for people's tools, not for a running machine: they may take long and use memory in proportion to the image.

mod aside;
mod convert;
mod create;
mod info;

use std::path::Path;

pub use self::convert::{ConvertOptions, convert};
pub use self::create::{CreateOptions, Preallocation, create};
pub use self::info::{ImageInfo, Qcow2Info, info, info_chain};
use crate::Result;
pub use crate::qcow2::CheckReport;
use crate::qcow2::check;
use crate::qcow2::file::HostFile;
use crate::qcow2::header::Header;

/// Checks the qcow2 image at `path`: refcounts against references, places against the file, overlaps, flags.
///
/// # Errors
/// The image cannot be opened (it is locked while a machine uses it), or is so damaged that it is no image.
pub fn check_qcow2(path: &Path) -> Result<CheckReport> {
    let file = HostFile::open(path, true, true)?;
    let header = Header::read(&file)?;
    check::check(&file, &header).map_err(|e| file.error("check it", e))
}

/// As [`check_qcow2`], and repairs what can be: leaks, refcounts, flags, and entries that lead nowhere, whose data is lost already
/// and which read as zeroes afterwards.
///
/// # Errors
/// As [`check_qcow2`]; the image cannot be written; it has persistent bitmaps, which this crate does not know how to keep.
pub fn repair_qcow2(path: &Path) -> Result<CheckReport> {
    let file = HostFile::open(path, false, true)?;
    let mut header = Header::read(&file)?;
    check::repair(&file, &mut header)
}
