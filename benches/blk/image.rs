//! The images that are measured. A format joins by a line in [`FORMATS`].

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freestone_benches::Fallible;
use freestone_block::tools::{ConvertOptions, convert};
use freestone_block::{Engine, FormatChoice, Image, ImageFormat, Qcow2Options, RawOptions};
use freestone_guest::blk::{BLOCK, pattern};

/// A format of images.
pub struct Format {
    pub name: &'static str,
    /// Makes an image of so many blocks, each with what the guest expects there.
    pub create: fn(&Path, u64) -> Fallible<()>,
    /// Opens it.
    pub open: fn(&Path) -> Fallible<Arc<dyn Image>>,
    /// Engines that it has, with their names.
    pub engines: &'static [(&'static str, Engine)],
}

/// All of them; the first is the one that guests drive.
pub const FORMATS: [Format; 2] = [
    Format {
        name: "raw",
        create: create_raw,
        open: open_raw,
        engines: &[("sync", Engine::Sync), ("uring", Engine::Uring)],
    },
    Format { name: "qcow2", create: create_qcow2, open: open_qcow2, engines: &[("sync", Engine::Sync)] },
];

fn create_raw(path: &Path, blocks: u64) -> Fallible<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    (0..blocks).try_for_each(|number| file.write_all(&pattern(number)))?;
    Ok(file.into_inner().map_err(io::Error::from)?.sync_all()?)
}

fn open_raw(path: &Path) -> Fallible<Arc<dyn Image>> {
    Ok(Arc::new(RawOptions::new().lock(false).open(path)?))
}

/// Every cluster is allocated: what is measured is the way to the data, not how an image grows.
fn create_qcow2(path: &Path, blocks: u64) -> Fallible<()> {
    let raw = path.with_extension("qcow2.raw");
    create_raw(&raw, blocks)?;
    let mut options = ConvertOptions::default();
    options.source = FormatChoice::Given(ImageFormat::Raw);
    let converted = convert(&raw, path, &options, &mut |_, _| {});
    std::fs::remove_file(&raw)?;
    Ok(converted?)
}

fn open_qcow2(path: &Path) -> Fallible<Arc<dyn Image>> {
    Ok(Arc::new(Qcow2Options::new().open(path)?))
}

/// An image in `folder`, made if it is not there.
pub fn provide(format: &Format, folder: &Path, mib: u32) -> Fallible<PathBuf> {
    let path = folder.join(format!("disk.{}", format.name));
    if !path.exists() {
        (format.create)(&path, (u64::from(mib) << 20) / BLOCK as u64)?;
    }
    Ok(path)
}
