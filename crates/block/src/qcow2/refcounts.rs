//! Which clusters of the file are in use: the refcount table and its blocks, and the allocator over them.
//!
//! What is freed is not handed out again before the metadata that spoke of it is durable: that is the caller's business,
//! see [`Allocator::release`].

use std::collections::{BTreeSet, HashMap};
use std::io;

use super::file::HostFile;
use super::header::{Header, MAX_OFFSET, MAX_REFTABLE, be_table, to_usize};
use super::maps::Protected;

/// Memory for refcount blocks, in bytes.
const CACHE: u64 = 8 << 20;

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    dirty: bool,
    used: u64,
}

/// The refcounts of a writable image.
#[derive(Debug)]
pub(super) struct Allocator {
    table_offset: u64,
    table: Vec<u64>,
    dirty_table: BTreeSet<usize>,
    blocks: HashMap<usize, Block>,
    cluster_bits: u32,
    order: u32,
    clock: u64,
    /// No cluster below this is free.
    hint: u64,
    /// Clusters from here on were never used: the file ends before them, and they read as zeroes.
    fresh: u64,
    /// References that go away with the next commit, as first cluster and count.
    pub(super) freed: Vec<(u64, u64)>,
    /// The host did not make durable what was written: nobody knows what the file has.
    lost: bool,
}

fn corrupt(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the qcow2 image is corrupt: {what}"))
}

impl Allocator {
    /// Reads the refcount table; the blocks are read when they are needed.
    pub(super) fn read(file: &HostFile, header: &Header) -> io::Result<Self> {
        let mut bytes = vec![0; to_usize(u64::from(header.reftable_clusters) << header.cluster_bits)];
        file.read_at(&mut bytes, header.reftable_offset)?;
        Ok(Self {
            table_offset: header.reftable_offset,
            table: be_table(&bytes),
            dirty_table: BTreeSet::new(),
            blocks: HashMap::new(),
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            clock: 0,
            hint: 0,
            fresh: file.len()?.div_ceil(header.cluster_size()),
            freed: Vec::new(),
            lost: false,
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    /// Where the refcount blocks are, as the table says it.
    pub(super) fn block_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.table.iter().copied().filter(|&entry| entry != 0)
    }

    /// The refcount table as first cluster and count.
    pub(super) fn table_clusters(&self) -> (u64, u64) {
        let bytes = self.table.len() as u64 * 8;
        (self.table_offset >> self.cluster_bits, bytes.div_ceil(self.cluster_size()))
    }

    /// Whether something waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.freed.is_empty() || !self.dirty_table.is_empty() || self.blocks.values().any(|b| b.dirty)
    }

    /// Whether metadata may be lost, so that the image must not be written any more.
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    fn sync(&mut self, file: &HostFile) -> io::Result<()> {
        file.sync().inspect_err(|_| self.lost = true)
    }

    fn place(&self, cluster: u64) -> (usize, usize) {
        let bits = self.block_bits();
        (to_usize(cluster >> bits), to_usize(cluster & ((1 << bits) - 1)))
    }

    /// The block `index`, if the table has one.
    fn block(&mut self, file: &HostFile, index: usize) -> io::Result<Option<&mut Block>> {
        let Some(&offset) = self.table.get(index).filter(|&&entry| entry != 0) else { return Ok(None) };
        self.clock = self.clock.wrapping_add(1);
        if !self.blocks.contains_key(&index) {
            self.make_room(file)?;
            let mut bytes = vec![0; to_usize(self.cluster_size())];
            file.read_exact_at(&mut bytes, offset)?;
            self.blocks.insert(index, Block { bytes, dirty: false, used: 0 });
        }
        let clock = self.clock;
        let mut block = self.blocks.get_mut(&index);
        if let Some(block) = &mut block {
            block.used = clock;
        }
        Ok(block)
    }

    /// Drops the block that was not used for longest. It may be written at any time: too high a refcount is harmless, and
    /// those that fall do so only when nothing speaks of the cluster any more.
    fn make_room(&mut self, file: &HostFile) -> io::Result<()> {
        let most = to_usize((CACHE >> self.cluster_bits).max(4));
        if self.blocks.len() < most {
            return Ok(());
        }
        if let Some((&oldest, block)) = self.blocks.iter().min_by_key(|(_, block)| block.used) {
            if block.dirty {
                let offset = self.table.get(oldest).copied().unwrap_or(0);
                file.write_all_at(&block.bytes, offset)?;
            }
            self.blocks.remove(&oldest);
        }
        Ok(())
    }

    /// The refcount of a cluster.
    pub(super) fn get(&mut self, file: &HostFile, cluster: u64) -> io::Result<u64> {
        let order = self.order;
        let (index, slot) = self.place(cluster);
        Ok(self.block(file, index)?.map_or(0, |block| get_refcount(&block.bytes, order, slot)))
    }

    fn set(&mut self, file: &HostFile, cluster: u64, value: u64) -> io::Result<()> {
        let order = self.order;
        let (index, slot) = self.place(cluster);
        let block = self.block(file, index)?.ok_or_else(|| corrupt("a refcount block is missing"))?;
        set_refcount(&mut block.bytes, order, slot, value);
        block.dirty = true;
        Ok(())
    }

    /// Takes up to `want` adjacent free clusters; returns the first and how many, and whether they read as zeroes.
    pub(super) fn allocate(
        &mut self,
        file: &HostFile,
        protected: &mut Protected,
        want: u64,
    ) -> io::Result<(u64, u64, bool)> {
        let mut first = self.hint;
        loop {
            self.cover(file, protected, first)?;
            if self.get(file, first)? == 0 && !protected.contains(first) {
                break;
            }
            first = first.checked_add(1).ok_or(io::ErrorKind::StorageFull)?;
        }
        let fresh = first >= self.fresh;
        let mut count = 0;
        while count < want {
            let next = first.saturating_add(count);
            // A block that is missing is made by a later call: it may take the place that this run would need.
            let covered = self.table.get(self.place(next).0).is_some_and(|&entry| entry != 0);
            if !covered
                || self.get(file, next)? != 0
                || protected.contains(next)
                || (next >= self.fresh) != fresh
            {
                break;
            }
            self.set(file, next, 1)?;
            count += 1;
        }
        self.hint = first.saturating_add(count);
        self.fresh = self.fresh.max(self.hint);
        Ok((first, count, fresh))
    }

    /// Gives clusters back that nothing on the disk speaks of.
    pub(super) fn give_back(&mut self, file: &HostFile, first: u64, count: u64) {
        for cluster in first..first.saturating_add(count) {
            // Should this fail, the cluster is lost until the image is repaired.
            if self.set(file, cluster, 0).is_ok() {
                self.hint = self.hint.min(cluster);
            }
        }
    }

    /// Makes sure that the refcount of `cluster` can be stored.
    fn cover(&mut self, file: &HostFile, protected: &mut Protected, cluster: u64) -> io::Result<()> {
        if cluster >= MAX_OFFSET >> self.cluster_bits {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (index, _) = self.place(cluster);
        if index >= self.table.len() {
            self.grow(file, protected)?;
        }
        if self.table.get(index).is_some_and(|&entry| entry != 0) {
            return Ok(());
        }
        // The block lives in the first cluster it counts, which is free: without a block all of them are.
        let home = (index as u64) << self.block_bits();
        if protected.contains(home) {
            return Err(corrupt("metadata lies in clusters that are not counted"));
        }
        self.make_room(file)?;
        let mut bytes = vec![0; to_usize(self.cluster_size())];
        set_refcount(&mut bytes, self.order, 0, 1);
        file.write_all_at(&bytes, home << self.cluster_bits)?;
        if let Some(entry) = self.table.get_mut(index) {
            *entry = home << self.cluster_bits;
        }
        self.dirty_table.insert(index);
        self.blocks.insert(index, Block { bytes, dirty: true, used: self.clock });
        self.fresh = self.fresh.max(home + 1);
        protected.add(home)
    }

    /// Moves the refcount table, with room for twice as many blocks, behind everything that is counted.
    fn grow(&mut self, file: &HostFile, protected: &mut Protected) -> io::Result<()> {
        // What is counted so far has to be on the disk before the header speaks of a new table.
        self.write_blocks(file)?;
        let per_block = 1 << self.block_bits();
        let old = self.table_clusters();
        let entries = (self.table.len() as u64 * 2).next_multiple_of(self.cluster_size() / 8);
        let bytes = entries * 8;
        if bytes > MAX_REFTABLE {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the qcow2 refcount table is full"));
        }
        let clusters = bytes >> self.cluster_bits;
        let first = (self.table.len() as u64) << self.block_bits();
        // Blocks first, then the table; both are counted by these very blocks.
        let mut blocks = 1;
        while blocks * per_block < blocks + clusters {
            blocks += 1;
        }
        for cluster in first..first + blocks + clusters {
            if protected.contains(cluster) {
                return Err(corrupt("metadata lies in clusters that are not counted"));
            }
        }
        let mut table = self.table.clone();
        table.resize(to_usize(entries), 0);
        for block in 0..blocks {
            let mut bytes = vec![0; to_usize(self.cluster_size())];
            for slot in 0..per_block.min((blocks + clusters).saturating_sub(block * per_block)) {
                set_refcount(&mut bytes, self.order, to_usize(slot), 1);
            }
            let offset = (first + block) << self.cluster_bits;
            file.write_all_at(&bytes, offset)?;
            if let Some(entry) = table.get_mut(self.table.len() + to_usize(block)) {
                *entry = offset;
            }
        }
        let offset = (first + blocks) << self.cluster_bits;
        file.write_all_at(&table.iter().flat_map(|entry| entry.to_be_bytes()).collect::<Vec<_>>(), offset)?;
        self.sync(file)?;
        let mut fields = Vec::from(offset.to_be_bytes());
        fields.extend(u32::try_from(clusters).unwrap_or(0).to_be_bytes());
        file.write_all_at(&fields, 48)?;
        self.sync(file)?;
        self.table = table;
        self.table_offset = offset;
        self.dirty_table.clear();
        self.fresh = self.fresh.max(first + blocks + clusters);
        for cluster in first..first + blocks + clusters {
            protected.add(cluster)?;
        }
        for cluster in old.0..old.0 + old.1 {
            protected.remove(cluster);
        }
        self.freed.push(old);
        Ok(())
    }

    /// Writes the refcount blocks that changed.
    pub(super) fn write_blocks(&mut self, file: &HostFile) -> io::Result<()> {
        for (index, block) in self.blocks.iter_mut().filter(|(_, block)| block.dirty) {
            let offset = self.table.get(*index).copied().unwrap_or(0);
            file.write_all_at(&block.bytes, offset)?;
            block.dirty = false;
        }
        Ok(())
    }

    /// Writes the entries of the refcount table that changed; says whether there were any.
    pub(super) fn write_table(&mut self, file: &HostFile) -> io::Result<bool> {
        let any = !self.dirty_table.is_empty();
        while let Some(&index) = self.dirty_table.first() {
            let entry = self.table.get(index).copied().unwrap_or(0);
            file.write_all_at(&entry.to_be_bytes(), self.table_offset + index as u64 * 8)?;
            self.dirty_table.remove(&index);
        }
        Ok(any)
    }

    /// Takes away the references in [`freed`](Self::freed): nothing on the disk holds them any more. Clusters that nobody
    /// uses then are given back to the host.
    pub(super) fn release(&mut self, file: &HostFile, protected: &Protected) -> io::Result<()> {
        let mut holes: Vec<u64> = Vec::new();
        for (first, count) in std::mem::take(&mut self.freed) {
            for cluster in first..first.saturating_add(count) {
                let refcount = self.get(file, cluster)?;
                // An image that says otherwise than is true here loses space, not data.
                if refcount == 0 || (refcount == 1 && protected.contains(cluster)) {
                    continue;
                }
                self.set(file, cluster, refcount - 1)?;
                if refcount == 1 {
                    self.hint = self.hint.min(cluster);
                    holes.push(cluster);
                }
            }
        }
        self.write_blocks(file)?;
        holes.sort_unstable();
        for run in holes.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            if let Some(&first) = run.first() {
                file.punch(first << self.cluster_bits, (run.len() as u64) << self.cluster_bits);
            }
        }
        Ok(())
    }
}

/// The refcount in `slot` of a block; 0 beyond its end.
pub(super) fn get_refcount(block: &[u8], order: u32, slot: usize) -> u64 {
    if order >= 3 {
        let width = 1_usize << (order - 3);
        let bytes = slot.checked_mul(width).and_then(|at| block.get(at..at.checked_add(width)?));
        return bytes.unwrap_or(&[]).iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    }
    let bits = 1_usize << order;
    let per_byte = 8 / bits;
    let byte = block.get(slot / per_byte).copied().unwrap_or(0);
    u64::from(byte >> (slot % per_byte * bits) & (0xff >> (8 - bits)))
}

/// Stores a refcount, which must fit.
pub(super) fn set_refcount(block: &mut [u8], order: u32, slot: usize, value: u64) {
    if order >= 3 {
        let width = 1_usize << (order - 3);
        let bytes = slot.checked_mul(width).and_then(|at| block.get_mut(at..at.checked_add(width)?));
        for (to, from) in bytes.unwrap_or(&mut []).iter_mut().rev().zip(value.to_le_bytes()) {
            *to = from;
        }
        return;
    }
    let bits = 1_usize << order;
    let per_byte = 8 / bits;
    if let Some(byte) = block.get_mut(slot / per_byte) {
        let shift = slot % per_byte * bits;
        let mask = 0xff_u8 >> (8 - bits);
        let [low, ..] = value.to_le_bytes();
        *byte = *byte & !(mask << shift) | (low & mask) << shift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_stored_apart() {
        for order in 0..=6 {
            let mut block = [0; 64];
            let max = u64::MAX >> (64 - (1_u32 << order));
            set_refcount(&mut block, order, 3, max);
            set_refcount(&mut block, order, 4, 1);
            set_refcount(&mut block, order, 3, max - 1);
            assert_eq!(
                [2, 3, 4, 5].map(|slot| get_refcount(&block, order, slot)),
                [0, max - 1, 1, 0],
                "2^{order} bits"
            );
            assert_eq!(get_refcount(&block, order, 1 << 20), 0);
        }
    }
}
