//! [`Qcow2Image`]: the qcow2 format, versions 2 and 3, read and written.
//!
//! An image file is not trusted: every offset and count in it is checked before it is used, no size in it makes this module
//! allocate more than about 100 MiB, and guest data is never written over metadata. It is also never left inconsistent: see
//! `commit` in `io.rs` for the order of writes. It knows no virtio and probes nothing.
//!
//! Locks, in this order: `alloc` (everything that changes the mapping), then `maps` (shared while guest data is moved, so that
//! whoever holds it exclusively knows that nobody moves data by an old mapping).

mod backing;
pub(crate) mod check;
pub(crate) mod file;
pub(crate) mod header;
mod io;
mod maps;
mod refcounts;
mod zero;

use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use freestone_memory::{Bytes, GuestMem, MemorySlice};

use self::backing::Base;
#[cfg(feature = "tools")]
pub(crate) use self::backing::{MAX_CHAIN, raw_extent, resolve};
pub use self::check::CheckReport;
use self::file::{HostFile, total};
use self::header::{CORRUPT, DIRTY, Header};
use self::maps::{Maps, Protected, decode_l1, read_l1};
use self::refcounts::Allocator;
use crate::disk::Backing;
use crate::image::{Hold, Image, Limits};
use crate::queue::{Engine, IoQueue, SyncQueue};
use crate::{Error, Result};

/// Memory for L2 tables, in bytes, and the most tables.
const L2_CACHE: usize = 16 << 20;
const L2_TABLES: usize = 4096;

/// How to open a [`Qcow2Image`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Options {
    /// Refuse writes. The file is then opened for reading only. Default: `false`.
    pub read_only: bool,
    /// Lock the files against double use (`flock(2)`): the image as [`RawOptions`](crate::RawOptions) does, backing files
    /// shared. Default: `true`.
    pub lock: bool,
    /// Whether the image may have backing files. Default: [`Backing::Deny`].
    pub backing: Backing,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self { read_only: false, lock: true, backing: Backing::Deny }
    }
}

impl Qcow2Options {
    /// The default options: writable, locked, no backing files.
    pub fn new() -> Self {
        Self::default()
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

    /// Opens the image at `path`.
    ///
    /// # Errors
    /// As [`Qcow2Image::open`].
    pub fn open(self, path: impl AsRef<Path>) -> Result<Qcow2Image> {
        Qcow2Image::open(path, self)
    }
}

/// A qcow2 disk image.
#[derive(Debug)]
pub struct Qcow2Image {
    file: HostFile,
    header: Header,
    base: Option<Base>,
    read_only: bool,
    size: u64,
    maps: RwLock<Maps>,
    /// `None` if the image is read-only.
    alloc: Mutex<Writer>,
    /// The compressed cluster that was read last.
    unpacked: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
    /// Clusters from here on are not in the file: an entry that speaks of one is wrong.
    end: AtomicU64,
    /// Metadata has changed since the last commit.
    dirty: AtomicBool,
    /// Metadata may be lost: nothing is written any more.
    failed: AtomicBool,
}

/// What is needed to change the mapping.
#[derive(Debug, Default)]
struct Writer {
    refcounts: Option<Allocator>,
    /// Two clusters for the parts of clusters that a request does not write.
    scratch: Option<GuestMem>,
}

impl Qcow2Image {
    /// Opens and locks the image at `path`, and its backing files if the options allow them.
    ///
    /// An image that was not closed properly by a program that postpones refcounts (the dirty bit) has them counted anew, unless
    /// it is opened read-only.
    ///
    /// # Errors
    /// - Those of [`RawImage::open`](crate::RawImage::open), for every file of the chain.
    /// - [`Error::Malformed`]: this is no qcow2 image, or a damaged one.
    /// - [`Error::Unsupported`]: it needs a feature that this crate does not have: encryption, external data files, subclusters,
    ///   zstd, or one unknown.
    /// - [`Error::BackingDenied`], [`Error::Chain`]: its backing files.
    pub fn open(path: impl AsRef<Path>, options: Qcow2Options) -> Result<Self> {
        let file = HostFile::open(path.as_ref(), options.read_only, options.lock)?;
        Self::open_file(file, options, &mut Vec::new())
    }

    fn open_file(file: HostFile, options: Qcow2Options, seen: &mut Vec<(u64, u64)>) -> Result<Self> {
        backing::note(&file, seen)?;
        let mut header = Header::read(&file)?;
        let size = backing::whole_sectors(header.size);
        if size == 0 {
            return Err(Error::TooSmall { path: file.path().to_owned(), size: header.size });
        }
        let base = Base::open(&file, &header, options, seen)?;
        if !options.read_only {
            if header.incompatible & CORRUPT != 0 {
                let reason = "it is marked as corrupt; check and repair it first".into();
                return Err(Error::Malformed { path: file.path().to_owned(), reason });
            }
            if header.incompatible & DIRTY != 0 {
                check::rebuild(&file, &mut header)?;
            }
        }
        let l1 = read_l1(&file, header.l1_offset, header.l1_entries)
            .map_err(|e| file.error("read its L1 table", e))?;
        let most = (L2_CACHE >> header.cluster_bits).min(L2_TABLES);
        let mut maps = Maps::new(l1, most);
        let mut refcounts = None;
        if !options.read_only {
            let allocator =
                Allocator::read(&file, &header).map_err(|e| file.error("read its refcount table", e))?;
            protect(&file, &header, &allocator, &mut maps)
                .map_err(|e| Error::Malformed { path: file.path().to_owned(), reason: e.to_string() })?;
            if header.autoclear != 0 {
                // What we do not know we do not keep true.
                file.write_all_at(&[0; 8], 88).map_err(|e| file.error("write its header", e))?;
                header.autoclear = 0;
            }
            refcounts = Some(allocator);
        }
        let end = file.len().map_err(|e| file.error("find its size", e))?.div_ceil(header.cluster_size());
        Ok(Self {
            end: AtomicU64::new(end),
            file,
            header,
            base,
            read_only: options.read_only,
            size,
            maps: RwLock::new(maps),
            alloc: Mutex::new(Writer { refcounts, scratch: None }),
            unpacked: Mutex::new(None),
            dirty: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Bytes in a cluster: the unit of allocation. 512 to 2 MiB.
    pub fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Checks bounds, and gives the number of bytes.
    fn check(&self, bufs: &[MemorySlice<'_>], offset: u64) -> IoResult<usize> {
        let wanted = total(bufs);
        self.check_range(offset, wanted as u64)?;
        Ok(wanted)
    }

    fn check_range(&self, offset: u64, len: u64) -> IoResult<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size) {
            Ok(())
        } else {
            Err(IoError::new(ErrorKind::InvalidInput, "beyond the end of the disk"))
        }
    }

    fn check_writable(&self) -> IoResult<()> {
        if self.read_only {
            return Err(ErrorKind::PermissionDenied.into());
        }
        if self.failed.load(Ordering::Relaxed) {
            return Err(IoError::other(
                "the image lost metadata in an earlier failure and is not written any more",
            ));
        }
        Ok(())
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.alloc.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> IoResult<()> {
        let wanted = self.check(bufs, offset)?;
        self.read(bufs, wanted, offset)
    }

    fn write_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> IoResult<()> {
        let wanted = self.check(bufs, offset)?;
        self.check_writable()?;
        self.write(bufs, wanted, offset)
    }

    fn flush(&self) -> IoResult<()> {
        if self.read_only {
            return Ok(());
        }
        self.check_writable()?;
        self.sync()
    }

    fn limits(&self) -> Limits {
        let cluster = u32::try_from(self.cluster_size()).unwrap_or(0);
        Limits {
            discard: !self.read_only,
            write_zeroes: !self.read_only,
            optimal_io: if cluster > 512 { cluster } else { 0 },
            ..Limits::default()
        }
    }

    fn discard(&self, offset: u64, len: u64) -> IoResult<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        self.unmap(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> IoResult<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        self.zero(offset, len, unmap)
    }

    fn set_hold(&self, hold: Hold) -> IoResult<()> {
        if hold != Hold::Own {
            self.flush()?;
        }
        // The files below are never written: sharing them is how they are held in any case.
        let below = if hold == Hold::None { Hold::None } else { Hold::Own };
        if let Some(base) = &self.base {
            base.set_hold(below)?;
        }
        self.file.lock_as(hold)
    }

    fn open_queue(self: Arc<Self>, engine: Engine, _depth: u16) -> IoResult<Box<dyn IoQueue>> {
        match engine {
            Engine::Auto | Engine::Sync => Ok(Box::new(SyncQueue::new(self))),
            Engine::Uring => Err(ErrorKind::Unsupported.into()),
        }
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if !self.read_only && self.dirty.load(Ordering::Relaxed) && !self.failed.load(Ordering::Relaxed) {
            // Who needs to know that it worked has called `flush`.
            let _ = self.sync();
        }
    }
}

/// Collects the clusters of all metadata. Tables that overlap or lie outside of the file make the image unfit for writing.
fn protect(file: &HostFile, header: &Header, refcounts: &Allocator, maps: &mut Maps) -> IoResult<()> {
    let bits = header.cluster_bits;
    let length = file.len()?;
    let l1 = std::mem::take(&mut maps.l1);
    let protected = &mut maps.protected;
    let outside = |what: &str, offset: u64| {
        maps::corrupt(format_args!("the {what} at {offset:#x} is not inside the file"))
    };
    let inside = |offset: u64| {
        offset.is_multiple_of(header.cluster_size())
            && offset.checked_add(header.cluster_size()).is_some_and(|end| end <= length)
    };
    let range = |protected: &mut Protected, offset: u64, bytes: u64| {
        let first = offset >> bits;
        (first..first + bytes.div_ceil(1 << bits)).try_for_each(|cluster| protected.add(cluster))
    };
    range(protected, 0, 1)?;
    let (first, count) = refcounts.table_clusters();
    range(protected, first << bits, count << bits)?;
    range(protected, header.l1_offset, u64::from(header.l1_entries) * 8)?;
    for offset in refcounts.block_offsets() {
        if !inside(offset) {
            return Err(outside("refcount block", offset));
        }
        protected.add(offset >> bits)?;
    }
    let mut tables = std::collections::HashSet::new();
    for &entry in &l1 {
        let Some(place) = decode_l1(entry, header)? else { continue };
        if !inside(place.offset) {
            return Err(outside("L2 table", place.offset));
        }
        protected.add(place.offset >> bits)?;
        if header.snapshots > 0 {
            tables.insert(place.offset);
        }
    }
    let mut budget = 4_u64 << 20;
    for snapshot in check::snapshots(file, header)? {
        range(protected, snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8)?;
        budget = budget
            .checked_sub(u64::from(snapshot.l1_entries))
            .ok_or_else(|| maps::corrupt("the snapshots have too many L1 entries"))?;
        for entry in read_l1(file, snapshot.l1_offset, snapshot.l1_entries)? {
            let Some(place) = decode_l1(entry, header)? else { continue };
            if tables.insert(place.offset) {
                protected.add(place.offset >> bits)?;
            }
        }
    }
    if header.snapshots > 0 {
        // The table is of variable length and ends where the last snapshot does.
        let end = check::snapshot_table_end(file, header)?;
        for cluster in header.snapshots_offset >> bits..end.div_ceil(1 << bits) {
            protected.share(cluster);
        }
    }
    maps.l1 = l1;
    Ok(())
}

/// Makes guest memory zero.
fn fill_zero(bufs: &[MemorySlice<'_>]) -> IoResult<()> {
    const ZEROES: [u8; 4096] = [0; 4096];
    for buf in bufs {
        let mut at = 0;
        while at < buf.len() {
            let n = ZEROES.len().min(buf.len() - at);
            buf.write_slice(ZEROES.get(..n).unwrap_or(&[]), at).map_err(IoError::other)?;
            at += n;
        }
    }
    Ok(())
}

/// Copies bytes to guest memory.
fn copy_to(bufs: &[MemorySlice<'_>], mut bytes: &[u8]) -> IoResult<()> {
    for buf in bufs {
        let Some((head, tail)) = bytes.split_at_checked(buf.len()) else {
            return Err(ErrorKind::UnexpectedEof.into());
        };
        buf.write_slice(head, 0).map_err(IoError::other)?;
        bytes = tail;
    }
    Ok(())
}

#[cfg(all(test, feature = "tools"))]
mod tests {
    use freestone_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::ImageFormat;
    use crate::tools::{CreateOptions, create};

    #[test]
    fn after_a_failure_of_the_host_not_even_making_room_for_a_table_writes_metadata() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.qcow2");
        create(&path, &CreateOptions::new(ImageFormat::Qcow2, 1 << 20)).unwrap();
        let image = Qcow2Options::new().open(&path).unwrap();
        let memory = GuestMem::anonymous(4096).unwrap();
        let view = memory.view();
        let sector = view.get_slice(GuestAddress(0), 512).unwrap();
        image.write_vectored_at(&[sector], 0).unwrap();
        image.failed.store(true, Ordering::Relaxed);
        let before = std::fs::read(&path).unwrap();
        image.sync().unwrap_err();
        image.read_vectored_at(&[sector], 0).unwrap();
        assert!(before == std::fs::read(&path).unwrap(), "the file has changed");
    }
}
