//! Counting the references of an image: what is compared with the refcounts of the file, and what replaces them.

use std::collections::HashSet;
use std::io;

use super::file::HostFile;
use super::header::{
    BITMAPS, COMPRESSED, COPIED, CORRUPT, DIRTY, Header, MAX_REFTABLE, MAX_SNAPSHOT_TABLE, OFFSET_MASK, ZERO,
    be_table, be32, be64, to_usize,
};
use super::maps::{Mapping, corrupt, decode, decode_l1, read_l1, read_l2};
use super::refcounts::{get_refcount, set_refcount};
use crate::{Error, Result};

/// Most clusters of a file that is checked: two counters of four bytes for each.
const MAX_CLUSTERS: u64 = 1 << 27;
/// Problems that are kept as text; all are counted.
const MAX_PROBLEMS: usize = 100;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    pub(crate) name: String,
    end: u64,
}

/// The snapshots in the image's table.
pub(crate) fn snapshots(file: &HostFile, header: &Header) -> io::Result<Vec<Snapshot>> {
    let mut all = Vec::new();
    let mut at = header.snapshots_offset;
    for _ in 0..header.snapshots {
        let mut fixed = [0; 40];
        file.read_exact_at(&mut fixed, at)?;
        let [id, name] = [12, 14]
            .map(|at| fixed.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b)));
        let extra = u64::from(be32(&fixed, 36));
        let mut text = vec![0; usize::from(name)];
        let name_at = at.saturating_add(40 + extra + u64::from(id));
        file.read_exact_at(&mut text, name_at)?;
        let (l1_offset, l1_entries) = (be64(&fixed, 0), be32(&fixed, 8));
        let l1_end = l1_offset.checked_add(u64::from(l1_entries) * 8);
        if l1_offset % header.cluster_size() != 0
            || l1_end.is_none_or(|end| end > (1 << 56))
            || l1_entries > 4 << 20
        {
            return Err(corrupt(format_args!("a snapshot has {l1_entries} L1 entries at {l1_offset:#x}")));
        }
        at = name_at.saturating_add(u64::from(name)).next_multiple_of(8);
        if at - header.snapshots_offset > MAX_SNAPSHOT_TABLE {
            return Err(corrupt("the snapshot table is too large"));
        }
        let name = String::from_utf8_lossy(&text).into_owned();
        all.push(Snapshot { l1_offset, l1_entries, name, end: at });
    }
    Ok(all)
}

/// Where the snapshot table ends.
pub(super) fn snapshot_table_end(file: &HostFile, header: &Header) -> io::Result<u64> {
    Ok(snapshots(file, header)?.last().map_or(header.snapshots_offset, |last| last.end))
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Things that are wrong in a way that can lose data.
    pub corruptions: u64,
    /// Clusters that are counted as used and are not: lost space, no harm.
    pub leaks: u64,
    /// The first hundred problems, for people.
    pub problems: Vec<String>,
    /// Guest clusters that have data of their own.
    pub allocated_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Where the last used cluster of the file ends, in bytes.
    pub image_end: u64,
    /// Corruptions and leaks that were repaired. [`corruptions`](Self::corruptions) and [`leaks`](Self::leaks) are what is left.
    pub repaired: u64,
}

impl CheckReport {
    fn problem(&mut self, text: impl FnOnce() -> String) {
        self.corruptions += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(text());
        }
    }

    fn leak(&mut self, text: impl FnOnce() -> String) {
        self.leaks += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(text());
        }
    }
}

/// A walk over everything that refers to clusters.
struct Walk<'a> {
    file: &'a HostFile,
    header: &'a Header,
    length: u64,
    counts: Vec<u32>,
    metadata: HashSet<u64>,
    /// L2 entries that may still be looked at: an end for images in which everything refers to everything.
    budget: u64,
    report: CheckReport,
    /// Whether entries that lead nowhere are cleared.
    mend: bool,
}

impl<'a> Walk<'a> {
    fn new(file: &'a HostFile, header: &'a Header, mend: bool) -> io::Result<Self> {
        let length = file.len()?;
        let clusters = length.div_ceil(header.cluster_size());
        if clusters > MAX_CLUSTERS {
            return Err(io::Error::other(format!("{clusters} clusters are more than can be checked")));
        }
        Ok(Self {
            file,
            header,
            length,
            counts: vec![0; to_usize(clusters)],
            metadata: HashSet::new(),
            budget: (u64::from(header.snapshots.min(255)) + 1).saturating_mul(length / 8 + 4096),
            report: CheckReport {
                total_clusters: header.size.div_ceil(header.cluster_size()),
                ..CheckReport::default()
            },
            mend,
        })
    }

    /// Counts the clusters of a range; false, and a problem, if it is not in the file.
    fn count(&mut self, offset: u64, bytes: u64, what: &str) -> bool {
        let bits = self.header.cluster_bits;
        let last = offset.saturating_add(bytes.max(1) - 1) >> bits;
        if offset >= self.length || last >= self.counts.len() as u64 {
            let length = self.length;
            self.report
                .problem(|| format!("the {what} at {offset:#x} is outside of the file of {length} bytes"));
            return false;
        }
        for count in self.counts.iter_mut().take(to_usize(last) + 1).skip(to_usize(offset >> bits)) {
            *count = count.saturating_add(1);
        }
        true
    }

    /// Counts clusters of metadata, which may not be used by anything else.
    fn count_metadata(&mut self, offset: u64, bytes: u64, what: &str) -> bool {
        if !self.count(offset, bytes, what) {
            return false;
        }
        let bits = self.header.cluster_bits;
        for cluster in offset >> bits..(offset + bytes.max(1)).div_ceil(1 << bits) {
            if !self.metadata.insert(cluster) {
                self.report.problem(|| format!("the {what} at {offset:#x} overlaps other metadata"));
            }
        }
        true
    }

    /// Everything but the refcounts themselves. They are counted later, so that a broken refcount table does not hide the rest.
    fn references(&mut self) -> io::Result<()> {
        let header = self.header;
        self.count_metadata(0, 1, "header");
        let snapshots = match snapshots(self.file, header) {
            Ok(snapshots) => snapshots,
            Err(error) => {
                self.report.problem(|| format!("the snapshot table cannot be read: {error}"));
                Vec::new()
            }
        };
        if let Some(last) = snapshots.last() {
            self.count_metadata(
                header.snapshots_offset,
                last.end - header.snapshots_offset,
                "snapshot table",
            );
        }
        self.l1(header.l1_offset, header.l1_entries, true)?;
        for snapshot in snapshots {
            self.l1(snapshot.l1_offset, snapshot.l1_entries, false)?;
        }
        Ok(())
    }

    fn l1(&mut self, offset: u64, entries: u32, active: bool) -> io::Result<()> {
        if entries == 0 || !self.count_metadata(offset, u64::from(entries) * 8, "L1 table") {
            return Ok(());
        }
        let mut seen = HashSet::new();
        for (index, entry) in (0_u64..).zip(read_l1(self.file, offset, entries)?) {
            let place = match decode_l1(entry, self.header) {
                Ok(None) => continue,
                Ok(Some(place)) => place,
                Err(_) => {
                    self.bad_entry(offset + index * 8, entry, "L1 entry", 0)?;
                    continue;
                }
            };
            if place.offset.saturating_add(self.header.cluster_size()) > self.length {
                self.bad_entry(offset + index * 8, entry, "L1 entry", 0)?;
                continue;
            }
            if !seen.insert(place.offset) {
                self.report.problem(|| format!("two L1 entries have the L2 table at {:#x}", place.offset));
                continue;
            }
            self.count(place.offset, self.header.cluster_size(), "L2 table");
            let cluster = place.offset >> self.header.cluster_bits;
            if active && !self.metadata.insert(cluster) {
                self.report
                    .problem(|| format!("the L2 table at {:#x} overlaps other metadata", place.offset));
                continue;
            }
            self.l2(place.offset, active)?;
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64, active: bool) -> io::Result<()> {
        let entries = read_l2(self.file, offset, self.header)?;
        self.budget = self
            .budget
            .checked_sub(entries.len() as u64)
            .ok_or_else(|| io::Error::other("the tables are more than the file can hold"))?;
        for (index, entry) in (0_u64..).zip(entries).filter(|&(_, entry)| entry != 0) {
            let at = offset + index * 8;
            let clear = if self.header.version >= 3 { ZERO } else { 0 };
            let (start, bytes) = match decode(entry, self.header) {
                Err(_) => {
                    self.bad_entry(at, entry, "L2 entry", clear)?;
                    continue;
                }
                Ok(Mapping::Unallocated | Mapping::Zero(None)) => continue,
                Ok(Mapping::Compressed { offset, len }) => {
                    // The length is in sectors: it may reach over the end of the file, but the first byte may not.
                    let inside = (offset.saturating_add(len as u64))
                        .min(self.length.next_multiple_of(self.header.cluster_size()));
                    self.report.compressed_clusters += u64::from(active);
                    (offset, inside.saturating_sub(offset).max(1))
                }
                Ok(Mapping::Data(place) | Mapping::Zero(Some(place))) => (place.offset, 1),
            };
            if start >= self.length {
                self.bad_entry(at, entry, "L2 entry", clear)?;
                continue;
            }
            self.report.allocated_clusters += u64::from(active);
            self.count(start, bytes, "cluster");
        }
        Ok(())
    }

    /// An entry that leads nowhere; what it stood for is lost, and reads as zeroes when it is mended.
    fn bad_entry(&mut self, at: u64, entry: u64, what: &str, clear: u64) -> io::Result<()> {
        self.report.problem(|| format!("the {what} at {at:#x} is {entry:#x}, which is no place in the file"));
        if self.mend {
            self.file.write_all_at(&clear.to_be_bytes(), at)?;
            self.report.repaired += 1;
        }
        Ok(())
    }

    /// Guest data over metadata.
    fn overlaps(&mut self) {
        let mut over: Vec<u64> = self.metadata.iter().copied().collect();
        over.sort_unstable();
        for cluster in over {
            // The L2 tables that snapshots share are counted once by each.
            let shared = self.header.snapshots > 0;
            if !shared && self.counts.get(to_usize(cluster)).is_some_and(|&count| count > 1) {
                self.report.problem(|| format!("guest data lies over metadata in cluster {cluster}"));
            }
        }
    }
}

/// Checks an image without changing it.
pub(crate) fn check(file: &HostFile, header: &Header) -> io::Result<CheckReport> {
    let mut walk = Walk::new(file, header, false)?;
    walk.references()?;
    let stored = stored(&mut walk)?;
    walk.overlaps();
    compare(&mut walk, &stored)?;
    if header.incompatible & CORRUPT != 0 {
        walk.report.problem(|| "the image is marked as corrupt".into());
    }
    Ok(walk.report)
}

/// Counts the refcount table and its blocks, and reads the blocks: the refcount of every cluster of the file.
fn stored(walk: &mut Walk<'_>) -> io::Result<Vec<u32>> {
    let header = walk.header;
    let bytes = u64::from(header.reftable_clusters) << header.cluster_bits;
    walk.count_metadata(
        header.reftable_offset,
        bytes.min(walk.length.saturating_sub(header.reftable_offset)),
        "refcount table",
    );
    let mut table = vec![0; to_usize(bytes)];
    walk.file.read_at(&mut table, header.reftable_offset)?;
    // Zeroed by the host when it is touched: a sparse file costs nothing.
    let mut stored = vec![0_u32; walk.counts.len()];
    let mut block = vec![0; to_usize(header.cluster_size())];
    let per_block = 1_usize << header.block_bits();
    for (index, offset) in be_table(&table).into_iter().enumerate() {
        if offset == 0 {
            continue;
        }
        if offset % header.cluster_size() != 0 || offset.saturating_add(header.cluster_size()) > walk.length {
            walk.report.problem(|| {
                format!("the refcount block {index} is at {offset:#x}, which is no place in the file")
            });
            continue;
        }
        walk.count_metadata(offset, header.cluster_size(), "refcount block");
        walk.file.read_exact_at(&mut block, offset)?;
        let first = index.saturating_mul(per_block);
        for slot in 0..per_block {
            let value = get_refcount(&block, header.refcount_order, slot);
            let cluster = first.saturating_add(slot);
            if value == 0 {
                continue;
            }
            if let Some(to) = stored.get_mut(cluster) {
                *to = u32::try_from(value).unwrap_or(u32::MAX);
            } else {
                walk.report
                    .leak(|| format!("cluster {cluster} behind the end of the file has refcount {value}"));
            }
        }
    }
    Ok(stored)
}

/// Compares what was counted with what is stored, and the COPIED flags with both.
fn compare(walk: &mut Walk<'_>, stored: &[u32]) -> io::Result<()> {
    let mut end = 0;
    for (cluster, &count) in walk.counts.iter().enumerate() {
        let has = stored.get(cluster).copied().map_or(0, u64::from);
        let count = u64::from(count);
        if has > count {
            walk.report.leak(|| format!("cluster {cluster} has refcount {has}, and {count} references"));
        } else if has < count {
            walk.report.problem(|| format!("cluster {cluster} has refcount {has}, but {count} references"));
        }
        if has > 0 || count > 0 {
            end = cluster as u64 + 1;
        }
    }
    walk.report.image_end = end << walk.header.cluster_bits;
    let wrong = flags(walk, |cluster| stored.get(cluster).copied().map_or(0, u64::from), false)?;
    for (at, entry) in wrong {
        walk.report.problem(|| format!("the entry {entry:#x} at {at:#x} has the wrong COPIED flag"));
    }
    Ok(())
}

/// The entries of the active tables whose COPIED flag does not agree with `refcount`; with `mend` they are changed.
fn flags(walk: &Walk<'_>, refcount: impl Fn(usize) -> u64, mend: bool) -> io::Result<Vec<(u64, u64)>> {
    let header = walk.header;
    let mut wrong = Vec::new();
    let mut seen = HashSet::new();
    let mut judge = |at: u64, entry: u64| -> io::Result<()> {
        let once = refcount(to_usize((entry & OFFSET_MASK) >> header.cluster_bits)) == 1;
        if once != (entry & COPIED != 0) {
            if wrong.len() < MAX_PROBLEMS {
                wrong.push((at, entry));
            }
            if mend {
                walk.file.write_all_at(&(entry ^ COPIED).to_be_bytes(), at)?;
            }
        }
        Ok(())
    };
    if header.l1_entries == 0 {
        return Ok(wrong);
    }
    for (index, entry) in (0_u64..).zip(read_l1(walk.file, header.l1_offset, header.l1_entries)?) {
        let Ok(Some(place)) = decode_l1(entry, header) else { continue };
        if place.offset.saturating_add(header.cluster_size()) > walk.length || !seen.insert(place.offset) {
            continue;
        }
        judge(header.l1_offset + index * 8, entry)?;
        for (slot, entry) in (0_u64..).zip(read_l2(walk.file, place.offset, header)?) {
            if entry & COMPRESSED == 0
                && let Ok(Mapping::Data(data) | Mapping::Zero(Some(data))) = decode(entry, header)
                && data.offset < walk.length
            {
                judge(place.offset + slot * 8, entry)?;
            }
        }
    }
    Ok(wrong)
}

/// Repairs what can be repaired: entries that lead nowhere are cleared, the refcounts are counted anew, flags follow them.
///
/// Tables that overlap each other stay as they are: nobody knows whose the contents are.
pub(crate) fn repair(file: &HostFile, header: &mut Header) -> Result<CheckReport> {
    let fail = |e| file.error("check it", e);
    let before = check(file, header).map_err(fail)?;
    if before.corruptions == 0 && before.leaks == 0 && header.incompatible & DIRTY == 0 {
        return Ok(before);
    }
    if header.bitmaps && header.autoclear & BITMAPS != 0 {
        let feature = "repair of an image with persistent bitmaps".into();
        return Err(Error::Unsupported { path: file.path().to_owned(), feature });
    }
    let mut mend = Walk::new(file, header, true).map_err(fail)?;
    mend.references().map_err(fail)?;
    rebuild(file, header)?;
    if header.incompatible & CORRUPT != 0 {
        let bits = header.incompatible & !CORRUPT;
        let again = check(file, &Header { incompatible: bits, ..header.clone() }).map_err(fail)?;
        if again.corruptions == 0 {
            file.write_all_at(&bits.to_be_bytes(), 72).map_err(fail)?;
            file.sync().map_err(fail)?;
            header.incompatible = bits;
        }
    }
    let mut after = check(file, header).map_err(fail)?;
    let count = |report: &CheckReport| report.corruptions + report.leaks;
    after.repaired = count(&before).saturating_sub(count(&after));
    let mut problems = before.problems;
    problems.extend(after.problems.drain(..).map(|text| format!("not repaired: {text}")));
    after.problems = problems;
    Ok(after)
}

/// Counts all references and writes new refcounts behind the end of the file, then lets the header point there: at every moment
/// either the old or the new ones are whole. Clears the dirty bit.
pub(crate) fn rebuild(file: &HostFile, header: &mut Header) -> Result<()> {
    rebuild_refcounts(file, header).map_err(|e| file.error("count its clusters anew", e))
}

fn rebuild_refcounts(file: &HostFile, header: &mut Header) -> io::Result<()> {
    let mut walk = Walk::new(file, header, false)?;
    walk.references()?;
    let max = header.max_refcount();
    if walk.counts.iter().any(|&count| u64::from(count) > max) {
        return Err(corrupt("a cluster is referenced more often than its refcount can say"));
    }
    let base = walk.counts.len() as u64;
    let plan = Layout::plan(base, header.cluster_bits, header.block_bits());
    if plan.table_clusters << header.cluster_bits > MAX_REFTABLE.max(header.cluster_size()) {
        return Err(io::Error::new(io::ErrorKind::StorageFull, "the refcount table would be too large"));
    }
    let counts = &walk.counts;
    let count = |cluster: u64| match counts.get(to_usize(cluster)) {
        Some(&count) => u64::from(count),
        None => u64::from(cluster < plan.end()),
    };
    plan.write(file, header, count)?;
    file.sync()?;
    // The flags follow the new counts, which agree with the old ones wherever those were right.
    flags(&walk, |cluster| count(cluster as u64), true)?;
    file.sync()?;
    let mut fields = Vec::from((plan.table() << header.cluster_bits).to_be_bytes());
    let clusters = u32::try_from(plan.table_clusters).unwrap_or(0);
    fields.extend(clusters.to_be_bytes());
    file.write_all_at(&fields, 48)?;
    file.sync()?;
    header.reftable_offset = plan.table() << header.cluster_bits;
    header.reftable_clusters = clusters;
    if header.version >= 3 {
        let bits = header.incompatible & !DIRTY;
        file.write_all_at(&bits.to_be_bytes(), 72)?;
        file.sync()?;
        header.incompatible = bits;
    }
    Ok(())
}

/// Where refcount blocks and table go that count everything before them, and themselves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// The first cluster of the blocks; the table follows them.
    first: u64,
    blocks: u64,
    table_clusters: u64,
    block_bits: u32,
}

impl Layout {
    /// For a file of `used` clusters.
    pub(crate) fn plan(used: u64, cluster_bits: u32, block_bits: u32) -> Self {
        let (mut blocks, mut table_clusters) = (1, 1);
        loop {
            let total: u64 = used + blocks + table_clusters;
            let need = total.div_ceil(1 << block_bits);
            let need_table = (need * 8).div_ceil(1 << cluster_bits);
            if need <= blocks && need_table <= table_clusters {
                return Self { first: used, blocks, table_clusters, block_bits };
            }
            blocks = blocks.max(need);
            table_clusters = table_clusters.max(need_table);
        }
    }

    /// The first cluster of the table.
    pub(crate) fn table(&self) -> u64 {
        self.first + self.blocks
    }

    pub(crate) fn table_clusters(&self) -> u64 {
        self.table_clusters
    }

    /// The first cluster behind the table.
    pub(crate) fn end(&self) -> u64 {
        self.table() + self.table_clusters
    }

    /// Writes blocks and table, with the refcounts that `count` says.
    pub(crate) fn write(
        &self,
        file: &HostFile,
        header: &Header,
        count: impl Fn(u64) -> u64,
    ) -> io::Result<()> {
        let bits = header.cluster_bits;
        let mut table = vec![0_u8; to_usize(self.table_clusters << bits)];
        let mut bytes = vec![0; to_usize(header.cluster_size())];
        for block in 0..self.blocks {
            bytes.fill(0);
            for slot in 0..1 << self.block_bits {
                let cluster = (block << self.block_bits) + slot;
                if cluster >= self.end() {
                    break;
                }
                set_refcount(&mut bytes, header.refcount_order, to_usize(slot), count(cluster));
            }
            let offset = (self.first + block) << bits;
            file.write_all_at(&bytes, offset)?;
            if let Some(entry) = table.get_mut(to_usize(block * 8)..to_usize(block * 8 + 8)) {
                entry.copy_from_slice(&offset.to_be_bytes());
            }
        }
        file.write_all_at(&table, self.table() << bits)
    }
}
