//! Making images.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use super::aside::Aside;
use crate::disk::{self, Backing, DiskOptions, FormatChoice, ImageFormat};
use crate::image::SECTOR_SIZE;
use crate::qcow2::check::Layout;
use crate::qcow2::file::HostFile;
use crate::qcow2::header::{Header, LAZY_REFCOUNTS, MAX_L1};
use crate::qcow2::{Qcow2Options, resolve};
use crate::{Error, Result};

/// What an image gets on the host when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Preallocation {
    /// Nothing: space is taken when the guest writes.
    #[default]
    Off,
    /// The tables of a qcow2 image, but no space for data.
    Metadata,
    /// Space that is reserved, not written (`fallocate(2)`).
    Falloc,
    /// Space that is written with zeroes.
    Full,
}

/// How to make an image.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Default: [`ImageFormat::Qcow2`].
    pub format: ImageFormat,
    /// Bytes of the disk: a multiple of 512, at least 512. `None`: as large as the backing file.
    pub size: Option<u64>,
    /// The image that this one is laid over, as it is written into the image: relative to the image's folder; and its format.
    pub backing: Option<(String, ImageFormat)>,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB. Default: 64 KiB.
    pub cluster_size: u64,
    /// Version of the format, 2 or 3. Default: 3.
    pub version: u32,
    /// Let programs that can postpone the writing of refcounts. This crate does not.
    pub lazy_refcounts: bool,
    /// Bits in a refcount: 1, 2, 4, up to 64. Default: 16.
    pub refcount_bits: u32,
    /// Default: [`Preallocation::Off`].
    pub preallocation: Preallocation,
    /// Whether a file that exists is replaced. Default: `false`.
    pub overwrite: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            format: ImageFormat::Qcow2,
            size: None,
            backing: None,
            cluster_size: 65536,
            version: 3,
            lazy_refcounts: false,
            refcount_bits: 16,
            preallocation: Preallocation::Off,
            overwrite: false,
        }
    }
}

impl CreateOptions {
    /// The default options for a disk of `size` bytes.
    pub fn new(format: ImageFormat, size: u64) -> Self {
        Self { format, size: Some(size), ..Self::default() }
    }
}

/// Makes the image at `path`. It appears there when it is complete.
///
/// A qcow2 image is marked as ours, so that [`recorded_format`](crate::recorded_format) knows it again.
///
/// # Errors
/// [`Error::Create`] for what cannot be, and what the host says.
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let fail = |reason: String| Error::Create { path: path.to_owned(), reason };
    let size = match (options.size, &options.backing) {
        (Some(size), _) => size,
        (None, Some(_)) => backing_size(path, options)?,
        (None, None) => return Err(fail("a size is needed, or a backing file to take it from".into())),
    };
    if size == 0 || size % SECTOR_SIZE != 0 {
        return Err(fail(format!("{size} bytes is not a whole number of sectors of 512 bytes")));
    }
    if options.backing.is_some() && options.preallocation != Preallocation::Off {
        return Err(fail("preallocation would hide the backing file".into()));
    }
    if options.size.is_some() && options.backing.is_some() {
        // It must be there and be what it is said to be.
        backing_size(path, options)?;
    }
    let aside = Aside::create(path, options.overwrite)?;
    match options.format {
        ImageFormat::Raw => raw(&aside, size, options).map_err(|e| match e {
            Error::Create { reason, .. } => fail(reason),
            other => other,
        })?,
        ImageFormat::Qcow2 => {
            let header = plan(size, options).map_err(fail)?;
            qcow2(&aside, header, options)?;
        }
    }
    aside.finish()
}

fn backing_size(path: &Path, options: &CreateOptions) -> Result<u64> {
    let Some((name, format)) = &options.backing else { return Ok(0) };
    let open =
        DiskOptions::new().format(FormatChoice::Given(*format)).backing(Backing::Allow).read_only(true);
    Ok(open.open(resolve(path, name)?)?.size())
}

fn raw(aside: &Aside, size: u64, options: &CreateOptions) -> Result<()> {
    if options.backing.is_some() {
        let reason = "a raw image has no backing file".into();
        return Err(Error::Create { path: aside.path().to_owned(), reason });
    }
    let make = || -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(aside.path())?;
        file.set_len(size)?;
        if matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full) {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)?;
        }
        if options.preallocation == Preallocation::Full {
            zeroes(0, size, |zeroes, at| std::os::unix::fs::FileExt::write_all_at(&file, zeroes, at))?;
        }
        Ok(())
    };
    make().map_err(|source| Error::Io { path: aside.path().to_owned(), op: "fill it", source })
}

fn zeroes(offset: u64, len: u64, mut write: impl FnMut(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
    let chunk = vec![0; 1 << 20];
    let mut done = 0;
    while done < len {
        let here = usize::try_from(len - done).unwrap_or(usize::MAX).min(chunk.len());
        write(chunk.get(..here).unwrap_or(&[]), offset + done)?;
        done += here as u64;
    }
    Ok(())
}

/// The header for what is asked.
fn plan(size: u64, options: &CreateOptions) -> std::result::Result<Header, String> {
    let cluster = options.cluster_size;
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(format!("clusters of {cluster} bytes: a power of two from 512 to 2 MiB is possible"));
    }
    if !matches!(options.version, 2 | 3) {
        return Err(format!("version {}: 2 and 3 are possible", options.version));
    }
    let bits = options.refcount_bits;
    if !bits.is_power_of_two() || bits > 64 {
        return Err(format!("refcounts of {bits} bits: 1, 2, 4, 8, 16, 32 and 64 are possible"));
    }
    if options.version == 2 && (bits != 16 || options.lazy_refcounts) {
        return Err("version 2 has refcounts of 16 bits and no lazy refcounts".into());
    }
    let mut header = Header {
        version: options.version,
        cluster_bits: cluster.trailing_zeros(),
        size,
        compatible: if options.lazy_refcounts { LAZY_REFCOUNTS } else { 0 },
        refcount_order: bits.trailing_zeros(),
        backing: options.backing.as_ref().map(|(name, _)| name.clone()),
        backing_format: options.backing.as_ref().map(|(_, format)| format.name().to_owned()),
        ..Header::default()
    };
    let l1 = header.l1_needed();
    if l1 * 8 > MAX_L1 {
        return Err(format!(
            "{size} bytes are too much for clusters of {cluster} bytes; take larger clusters"
        ));
    }
    header.l1_entries = u32::try_from(l1).map_err(|_| "the image is too large".to_owned())?;
    header.l1_offset = cluster;
    Ok(header)
}

/// Header, L1 table, refcount blocks, refcount table: in this order, without a gap.
fn qcow2(aside: &Aside, mut header: Header, options: &CreateOptions) -> Result<()> {
    let file = HostFile::create(aside.path())?;
    let fail = |e| file.error("write it", e);
    let bits = header.cluster_bits;
    let used = 1 + (u64::from(header.l1_entries) * 8).div_ceil(header.cluster_size());
    let layout = Layout::plan(used, bits, header.block_bits());
    header.reftable_offset = layout.table() << bits;
    header.reftable_clusters = u32::try_from(layout.table_clusters()).unwrap_or(0);
    let identity = disk::identity().map_err(fail)?;
    header.identity = Some(identity);
    let mut bytes = header.encode();
    if bytes.is_none() {
        // The clusters may be too small for it; it is only a convenience.
        header.identity = None;
        bytes = header.encode();
    }
    let bytes = bytes.ok_or_else(|| Error::Create {
        path: aside.path().to_owned(),
        reason: "the name of the backing file does not fit into the first cluster".into(),
    })?;
    file.set_len(layout.end() << bits).map_err(fail)?;
    file.write_all_at(&bytes, 0).map_err(fail)?;
    layout.write(&file, &header, |cluster| u64::from(cluster < layout.end())).map_err(fail)?;
    if header.identity.is_some() {
        disk::record(aside.path(), &identity);
    }
    if options.preallocation == Preallocation::Off {
        return Ok(());
    }
    // The backing file is of no matter here, but the image names it.
    let open = Qcow2Options::new().lock(false).backing(Backing::Allow);
    let image = open.open(aside.path())?;
    image
        .allocate_all(|file, offset, len| match options.preallocation {
            Preallocation::Falloc => file.reserve(offset, len),
            Preallocation::Full => zeroes(offset, len, |zeroes, at| file.write_all_at(zeroes, at)),
            _ => file.set_len(offset + len),
        })
        .map_err(fail)?;
    crate::Image::flush(&image).map_err(fail)
}
