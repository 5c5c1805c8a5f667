//! The header of a qcow2 file, versions 2 and 3, and its extensions. Everything is checked here, once.

use super::file::HostFile;
use crate::{Error, Result};

pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Largest L1 table, in bytes.
pub(crate) const MAX_L1: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub(crate) const MAX_REFTABLE: u64 = 8 << 20;
/// Largest snapshot table, in bytes, and the most snapshots.
pub(crate) const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// Offsets in the file are below this.
pub(crate) const MAX_OFFSET: u64 = 1 << 56;
/// Bits of an L1 or L2 entry that are an offset.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is referenced once and may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
pub(crate) const ZERO: u64 = 1;

pub(crate) const DIRTY: u64 = 1;
pub(crate) const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const COMPRESSION_TYPE: u64 = 8;
const EXTENDED_L2: u64 = 16;
pub(crate) const LAZY_REFCOUNTS: u64 = 1;
pub(crate) const BITMAPS: u64 = 1;

const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_CRYPTO: u32 = 0x0537_be77;
/// Our own: the identity that the file's extended attribute repeats. Other programs keep it.
const EXT_IDENTITY: u32 = 0x4653_5449;

/// What the header says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub(crate) size: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    /// log2 of the bits in a refcount.
    pub(crate) refcount_order: u32,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) bitmaps: bool,
    pub(crate) identity: Option<[u8; 16]>,
}

impl Header {
    /// Reads and checks the header of `file`.
    ///
    /// An image that needs what this crate does not have is refused by the name of the feature.
    pub(crate) fn read(file: &HostFile) -> Result<Self> {
        let bad = |reason: String| Error::Malformed { path: file.path().to_owned(), reason };
        let mut start = [0; 104];
        let got = file.read_at(&mut start, 0).map_err(|e| file.error("read its header", e))?;
        if start.get(..4) != Some(&MAGIC) {
            return Err(bad("it does not begin with a qcow2 header".into()));
        }
        if got < 72 {
            return Err(bad(format!("it ends inside the header, after {got} bytes")));
        }
        let mut header = Self::fields(&start);
        let fixed = match header.version {
            2 => 72,
            3 => be32(&start, 100),
            version => {
                return Err(Error::Unsupported {
                    path: file.path().to_owned(),
                    feature: format!("qcow2 version {version}"),
                });
            }
        };
        header.check(got, fixed, &start).map_err(bad)?;
        let mut cluster = vec![0; 1 << header.cluster_bits];
        let got = file.read_at(&mut cluster, 0).map_err(|e| file.error("read its header", e))?;
        cluster.truncate(got);
        header.check_features(&cluster, &start, fixed, file)?;
        header.extensions(&cluster, fixed, &start, file)?;
        let length = file.len().map_err(|e| file.error("find its size", e))?;
        header.check_tables(length).map_err(bad)?;
        Ok(header)
    }

    fn fields(b: &[u8]) -> Self {
        let version = be32(b, 4);
        let v3 = version >= 3;
        Self {
            version,
            cluster_bits: be32(b, 20),
            size: be64(b, 24),
            l1_entries: be32(b, 36),
            l1_offset: be64(b, 40),
            reftable_offset: be64(b, 48),
            reftable_clusters: be32(b, 56),
            snapshots: be32(b, 60),
            snapshots_offset: be64(b, 64),
            incompatible: if v3 { be64(b, 72) } else { 0 },
            compatible: if v3 { be64(b, 80) } else { 0 },
            autoclear: if v3 { be64(b, 88) } else { 0 },
            refcount_order: if v3 { be32(b, 96) } else { 4 },
            ..Self::default()
        }
    }

    fn check(&self, got: usize, fixed: u32, _start: &[u8]) -> std::result::Result<(), String> {
        if self.version == 3 && got < 104 {
            return Err(format!("it ends inside the header, after {got} bytes"));
        }
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(format!("clusters of 2^{} bytes (512 B to 2 MiB are possible)", self.cluster_bits));
        }
        if self.version == 3 && !(104..=self.cluster_size()).contains(&u64::from(fixed)) {
            return Err(format!("a header of {fixed} bytes"));
        }
        if self.refcount_order > 6 {
            return Err(format!("refcounts of 2^{} bits (1 to 64 are possible)", self.refcount_order));
        }
        Ok(())
    }

    fn check_features(&self, cluster: &[u8], start: &[u8], fixed: u32, file: &HostFile) -> Result<()> {
        let no = |feature: String| Err(Error::Unsupported { path: file.path().to_owned(), feature });
        match be32(start, 32) {
            0 => {}
            1 => return no("AES encryption".into()),
            2 => return no("LUKS encryption".into()),
            n => return no(format!("encryption method {n}")),
        }
        if self.incompatible & EXTERNAL_DATA != 0 {
            return no("an external data file".into());
        }
        if self.incompatible & EXTENDED_L2 != 0 {
            return no("extended L2 entries (subclusters)".into());
        }
        let compression = if fixed > 104 { cluster.get(104).copied().unwrap_or(0) } else { 0 };
        if self.incompatible & COMPRESSION_TYPE != 0 || compression != 0 {
            return match compression {
                1 => no("zstd compression".into()),
                n => no(format!("compression type {n}")),
            };
        }
        let unknown = self.incompatible & !(DIRTY | CORRUPT);
        if unknown != 0 {
            return no(format!("the incompatible features {unknown:#x}"));
        }
        Ok(())
    }

    fn extensions(&mut self, cluster: &[u8], fixed: u32, start: &[u8], file: &HostFile) -> Result<()> {
        let bad = |reason: String| Error::Malformed { path: file.path().to_owned(), reason };
        let (name_at, name_len) = (be64(start, 8), be32(start, 16));
        if name_at != 0 && name_len != 0 {
            let name = to_usize(name_at)
                .checked_add(name_len as usize)
                .filter(|_| name_len <= 1023)
                .and_then(|end| cluster.get(to_usize(name_at)..end))
                .ok_or_else(|| bad("the name of the backing file is not inside the header".into()))?;
            let name = std::str::from_utf8(name)
                .ok()
                .filter(|name| !name.contains('\0'))
                .ok_or_else(|| bad("the name of the backing file is not text".into()))?;
            self.backing = Some(name.to_owned());
        }
        let end = if name_at == 0 { cluster.len() } else { to_usize(name_at).min(cluster.len()) };
        let mut at = fixed as usize;
        while at.saturating_add(8) <= end {
            let (kind, len) = (be32(cluster, at), be32(cluster, at + 4) as usize);
            if kind == 0 {
                break;
            }
            let data = at
                .checked_add(8)
                .and_then(|from| cluster.get(from..from.checked_add(len)?))
                .ok_or_else(|| bad(format!("the header extension {kind:#x} of {len} bytes is too long")))?;
            match kind {
                EXT_BACKING_FORMAT => {
                    let text = std::str::from_utf8(data)
                        .map_err(|_| bad("the backing format is not text".into()))?;
                    self.backing_format = Some(text.to_owned());
                }
                EXT_BITMAPS => self.bitmaps = true,
                EXT_IDENTITY => self.identity = data.try_into().ok(),
                EXT_CRYPTO => {
                    return Err(Error::Unsupported {
                        path: file.path().to_owned(),
                        feature: "encryption".into(),
                    });
                }
                _ => {}
            }
            at = at.saturating_add(8).saturating_add(len.next_multiple_of(8));
        }
        Ok(())
    }

    fn check_tables(&self, file_length: u64) -> std::result::Result<(), String> {
        let inside = |what: &str, offset: u64, bytes: u64, whole: bool| {
            let end = offset.checked_add(if whole { bytes } else { 1 });
            if offset == 0 || !offset.is_multiple_of(self.cluster_size()) {
                Err(format!("the {what} begins at {offset:#x}, which is not the start of a cluster"))
            } else if end.is_none_or(|end| end > file_length) {
                Err(format!("the {what} at {offset:#x} lies outside of the file of {file_length} bytes"))
            } else {
                Ok(())
            }
        };
        if self.size > MAX_OFFSET {
            return Err(format!("a virtual size of {} bytes", self.size));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let needed = self.l1_needed();
        if l1_bytes > MAX_L1 || needed * 8 > MAX_L1 {
            return Err(format!("an L1 table of {} entries", needed.max(u64::from(self.l1_entries))));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(format!("an L1 table of {} entries where {needed} are needed", self.l1_entries));
        }
        if l1_bytes > 0 {
            inside("L1 table", self.l1_offset, l1_bytes, true)?;
        }
        let reftable = u64::from(self.reftable_clusters) << self.cluster_bits;
        if self.reftable_clusters == 0 || reftable > MAX_REFTABLE.max(self.cluster_size()) {
            return Err(format!("a refcount table of {} clusters", self.reftable_clusters));
        }
        inside("refcount table", self.reftable_offset, reftable, false)?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(format!("{} snapshots", self.snapshots));
        }
        if self.snapshots > 0 {
            inside("snapshot table", self.snapshots_offset, u64::from(self.snapshots) * 40, true)?;
        }
        Ok(())
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the entries in an L2 table.
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3
    }

    /// Entries that an L1 table for the virtual size must have.
    pub(crate) fn l1_needed(&self) -> u64 {
        self.size.div_ceil(1 << (self.cluster_bits + self.l2_bits()))
    }

    /// log2 of the refcounts in a refcount block.
    pub(crate) fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The largest refcount that can be stored.
    pub(crate) fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - (1_u32 << self.refcount_order))
    }

    /// The header and its extensions as bytes: the start of the first cluster.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        let mut out = Vec::from(MAGIC);
        out.extend(self.version.to_be_bytes());
        out.extend([0; 12]);
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(0_u32.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.reftable_offset.to_be_bytes());
        out.extend(self.reftable_clusters.to_be_bytes());
        out.extend([0; 12]);
        if self.version >= 3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend(104_u32.to_be_bytes());
        }
        let mut extension = |kind: u32, data: &[u8]| -> Option<()> {
            out.extend(kind.to_be_bytes());
            out.extend(u32::try_from(data.len()).ok()?.to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
            Some(())
        };
        if let Some(format) = &self.backing_format {
            extension(EXT_BACKING_FORMAT, format.as_bytes())?;
        }
        if let Some(identity) = &self.identity {
            extension(EXT_IDENTITY, identity)?;
        }
        extension(0, &[])?;
        if let Some(name) = &self.backing {
            let (at, len) = (out.len() as u64, u32::try_from(name.len()).ok().filter(|&n| n <= 1023)?);
            out.extend(name.as_bytes());
            out.get_mut(8..16)?.copy_from_slice(&at.to_be_bytes());
            out.get_mut(16..20)?.copy_from_slice(&len.to_be_bytes());
        }
        (out.len() as u64 <= self.cluster_size()).then_some(out)
    }
}

/// A big-endian number at `at`; zero beyond the end.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b))
}

/// A big-endian number at `at`; zero beyond the end.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b))
}

/// A table of big-endian numbers.
pub(crate) fn be_table(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)).collect()
}

/// A length or index on this host. What does not fit becomes so large that every bounds check refuses it.
pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
