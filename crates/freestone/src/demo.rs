//! The disk of the built-in guest: made in memory, so that `freestone run` needs no file.

use std::fs::File;
use std::io::Write;

use freestone_vmm::block::{RawImage, RawOptions};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::failure::Failure;

/// A disk with the pattern that the built-in guest expects.
pub(crate) fn disk() -> Result<RawImage, Failure> {
    let failed = |e: std::io::Error| Failure::new(format!("cannot make the disk of the built-in guest: {e}"));
    let fd = memfd_create("freestone-demo-disk", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    let mut file = File::from(fd);
    file.write_all(&freestone_guest::demo_disk(freestone_guest::DEMO_DISK_SECTORS)).map_err(failed)?;
    Ok(RawImage::from_file(file, "built-in disk", RawOptions::new())?)
}
