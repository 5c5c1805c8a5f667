//! Where the guest's clusters are: the L1 table, the cached L2 tables, and what an entry means.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::file::HostFile;
use super::header::{COMPRESSED, COPIED, Header, MAX_OFFSET, OFFSET_MASK, ZERO, be_table, to_usize};

/// What is corrupt; goes to the guest as an I/O error.
pub(super) fn corrupt(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the qcow2 image is corrupt: {what}"))
}

/// Host clusters that hold metadata: no guest data is written there, whatever the image says.
#[derive(Debug, Default)]
pub(super) struct Protected(HashSet<u64>);

impl Protected {
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.0.contains(&cluster)
    }

    /// Adds a cluster that must not be there yet.
    pub(super) fn add(&mut self, cluster: u64) -> io::Result<()> {
        if self.0.insert(cluster) {
            Ok(())
        } else {
            Err(corrupt(format_args!("two tables are at cluster {cluster}")))
        }
    }

    /// Adds a cluster that may be there.
    pub(super) fn share(&mut self, cluster: u64) {
        self.0.insert(cluster);
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        self.0.remove(&cluster);
    }
}

/// What an L2 entry says about a cluster. Offsets are those of the cluster in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Nothing here: the backing file's, or zeroes.
    Unallocated,
    /// Zeroes, whatever the backing file has; a cluster may be kept for it.
    Zero(Option<Place>),
    /// Data.
    Data(Place),
    /// `len` bytes of compressed data at `offset`, at most.
    Compressed { offset: u64, len: usize },
}

/// A cluster in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Where it begins.
    pub(super) offset: u64,
    /// Whether it may be written in place.
    pub(super) copied: bool,
}

/// Takes an L2 entry apart.
pub(super) fn decode(entry: u64, header: &Header) -> io::Result<Mapping> {
    if entry & COMPRESSED != 0 {
        let offset_bits = 62 - (header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
        return Ok(Mapping::Compressed { offset, len: to_usize(sectors * 512 - (offset & 511)) });
    }
    if entry & !(COPIED | OFFSET_MASK | ZERO) != 0 || (header.version < 3 && entry & ZERO != 0) {
        return Err(corrupt(format_args!("an L2 entry is {entry:#x}")));
    }
    let offset = entry & OFFSET_MASK;
    if !offset.is_multiple_of(header.cluster_size()) {
        return Err(corrupt(format_args!("an L2 entry is {entry:#x}, not the start of a cluster")));
    }
    let place = Place { offset, copied: entry & COPIED != 0 };
    Ok(match (entry & ZERO != 0, offset) {
        (true, 0) => Mapping::Zero(None),
        (true, _) => Mapping::Zero(Some(place)),
        (false, 0) => Mapping::Unallocated,
        (false, _) => Mapping::Data(place),
    })
}

/// The offset of an L2 table, if the L1 entry has one.
pub(super) fn decode_l1(entry: u64, header: &Header) -> io::Result<Option<Place>> {
    let offset = entry & OFFSET_MASK;
    let wrong = entry & !(COPIED | OFFSET_MASK) != 0 || !offset.is_multiple_of(header.cluster_size());
    if wrong || (offset == 0 && entry != 0) {
        return Err(corrupt(format_args!("an L1 entry is {entry:#x}")));
    }
    Ok((offset != 0).then_some(Place { offset, copied: entry & COPIED != 0 }))
}

/// Reads an L1 table.
pub(super) fn read_l1(file: &HostFile, offset: u64, entries: u32) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; to_usize(u64::from(entries) * 8)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(be_table(&bytes))
}

/// Reads an L2 table.
pub(super) fn read_l2(file: &HostFile, offset: u64, header: &Header) -> io::Result<Vec<u64>> {
    if offset.checked_add(header.cluster_size()).is_none_or(|end| end > MAX_OFFSET) {
        return Err(corrupt("an L2 table is out of bounds"));
    }
    let mut bytes = vec![0; to_usize(header.cluster_size())];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(be_table(&bytes))
}

/// An L2 table in memory.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) offset: u64,
    pub(super) entries: Vec<u64>,
    /// Entries that the file does not have yet.
    dirty: Range<usize>,
    /// The file's L1 table does not speak of it yet.
    new: bool,
    used: AtomicU64,
}

/// L1 table and cached L2 tables.
#[derive(Debug)]
pub(super) struct Maps {
    pub(super) l1: Vec<u64>,
    dirty_l1: BTreeSet<usize>,
    tables: HashMap<usize, Table>,
    most: usize,
    clock: AtomicU64,
    pub(super) protected: Protected,
}

impl Maps {
    /// `most` tables are kept in memory.
    pub(super) fn new(l1: Vec<u64>, most: usize) -> Self {
        Self {
            l1,
            dirty_l1: BTreeSet::new(),
            tables: HashMap::new(),
            most: most.max(2),
            clock: AtomicU64::new(0),
            protected: Protected::default(),
        }
    }

    /// Whether what `index` says is in memory: that there is no table, or the table.
    pub(super) fn present(&self, index: usize) -> bool {
        self.l1.get(index).is_none_or(|&entry| entry == 0) || self.tables.contains_key(&index)
    }

    /// The table of an L1 entry, if it is in memory.
    pub(super) fn table(&self, index: usize) -> Option<&Table> {
        let table = self.tables.get(&index)?;
        // Not exact, and need not be: who was used lately is kept.
        table.used.store(self.clock.load(Ordering::Relaxed), Ordering::Relaxed);
        Some(table)
    }

    /// The L2 entry; 0 if there is no table.
    pub(super) fn entry(&self, index: usize, slot: usize) -> u64 {
        self.table(index).and_then(|table| table.entries.get(slot)).copied().unwrap_or(0)
    }

    /// Whether the table must be made anew before it is changed: it is not there, or a snapshot shares it.
    pub(super) fn needs_table(&self, index: usize) -> bool {
        self.l1.get(index).is_none_or(|&entry| entry & COPIED == 0)
    }

    /// Whether a further table has no room although nothing can be dropped.
    pub(super) fn is_full(&self) -> bool {
        self.tables.len() >= self.most && !self.tables.values().any(|t| t.dirty.is_empty() && !t.new)
    }

    /// Adds a table that was read, in the place of the one that was not used for longest.
    pub(super) fn insert(&mut self, index: usize, offset: u64, entries: Vec<u64>) {
        self.add(index, Table { offset, entries, dirty: 0..0, new: false, used: AtomicU64::new(0) });
    }

    /// Adds a table that is not in the file, and the L1 entry for it.
    pub(super) fn insert_new(&mut self, index: usize, offset: u64, entries: Vec<u64>) {
        if let Some(entry) = self.l1.get_mut(index) {
            *entry = offset | COPIED;
            self.dirty_l1.insert(index);
        }
        let dirty = 0..entries.len();
        self.add(index, Table { offset, entries, dirty, new: true, used: AtomicU64::new(0) });
    }

    fn add(&mut self, index: usize, table: Table) {
        let now = self.clock.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        table.used.store(now, Ordering::Relaxed);
        if self.tables.len() >= self.most {
            let clean = self.tables.iter().filter(|(_, t)| t.dirty.is_empty() && !t.new);
            if let Some(oldest) = clean.min_by_key(|(_, t)| t.used.load(Ordering::Relaxed)).map(|(&i, _)| i) {
                self.tables.remove(&oldest);
            }
        }
        self.tables.insert(index, table);
    }

    /// Changes an L2 entry of a table that is in memory.
    pub(super) fn set(&mut self, index: usize, slot: usize, entry: u64) {
        if let Some(table) = self.tables.get_mut(&index)
            && let Some(old) = table.entries.get_mut(slot)
        {
            *old = entry;
            let dirty = &mut table.dirty;
            *dirty = if Range::is_empty(dirty) {
                slot..slot + 1
            } else {
                dirty.start.min(slot)..dirty.end.max(slot + 1)
            };
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty_l1.is_empty() || self.tables.values().any(|table| !table.dirty.is_empty())
    }

    /// Writes the tables that the file's L1 table does not speak of (`new`), or the others.
    pub(super) fn write_tables(&self, file: &HostFile, new: bool) -> io::Result<()> {
        for table in self.tables.values().filter(|t| t.new == new && !t.dirty.is_empty()) {
            // Whole sectors of 512 bytes.
            let range =
                table.dirty.start / 64 * 64..table.dirty.end.next_multiple_of(64).min(table.entries.len());
            let at = table.offset + range.start as u64 * 8;
            let entries = table.entries.get(range).unwrap_or(&[]);
            file.write_all_at(&entries.iter().flat_map(|entry| entry.to_be_bytes()).collect::<Vec<_>>(), at)?;
        }
        Ok(())
    }

    /// Writes the L1 entries that changed.
    pub(super) fn write_l1(&self, file: &HostFile, offset: u64) -> io::Result<()> {
        for &index in &self.dirty_l1 {
            let entry = self.l1.get(index).copied().unwrap_or(0);
            file.write_all_at(&entry.to_be_bytes(), offset + index as u64 * 8)?;
        }
        Ok(())
    }

    /// Everything is in the file.
    pub(super) fn clean(&mut self) {
        self.dirty_l1.clear();
        for table in self.tables.values_mut() {
            table.dirty = 0..0;
            table.new = false;
        }
    }
}
