//! Reading, writing, and the order in which things become durable.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend, MemorySlice, MemoryView};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::file::part;
use super::header::{COPIED, to_usize};
use super::maps::{Mapping, Maps, Place, corrupt, decode, decode_l1, read_l2};
use super::refcounts::Allocator;
use super::{Qcow2Image, Writer, copy_to, fill_zero};

/// Most bytes that are allocated in one go.
const MAX_RUN: u64 = 16 << 20;
/// Freed clusters that may wait for a commit, as runs.
const MAX_FREED: usize = 1 << 16;

/// Where a piece of a request is, in terms of tables.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    pub(super) index: usize,
    pub(super) slot: usize,
    within: u64,
}

impl Qcow2Image {
    pub(super) fn at(&self, offset: u64) -> At {
        let bits = self.header.cluster_bits;
        let cluster = offset >> bits;
        let l2_bits = self.header.l2_bits();
        At {
            index: to_usize(cluster >> l2_bits),
            slot: to_usize(cluster & ((1 << l2_bits) - 1)),
            within: offset & (self.header.cluster_size() - 1),
        }
    }

    /// The maps, with the table of `index` in memory.
    pub(super) fn maps_with(&self, index: usize) -> io::Result<RwLockReadGuard<'_, Maps>> {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        if maps.present(index) {
            return Ok(maps);
        }
        drop(maps);
        let mut writer = self.writer();
        self.load(&mut writer, index)?;
        // Tables are dropped by who holds the writer only: it is still there.
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        drop(writer);
        Ok(maps)
    }

    pub(super) fn maps_mut(&self) -> RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn maps_now(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the table of `index`, if there is one and it is not in memory.
    fn load(&self, writer: &mut Writer, index: usize) -> io::Result<()> {
        let (entry, full) = {
            let maps = self.maps_now();
            if maps.present(index) {
                return Ok(());
            }
            (maps.l1.get(index).copied().unwrap_or(0), maps.is_full())
        };
        if full {
            self.commit(writer)?;
        }
        if let Some(place) = decode_l1(entry, &self.header)? {
            let entries = read_l2(&self.file, place.offset, &self.header)?;
            self.maps_mut().insert(index, place.offset, entries);
        }
        Ok(())
    }

    /// How many bytes from `at` on, at most `left`, are mapped as its own cluster is: data without a gap, or all of the same kind.
    pub(super) fn run(&self, maps: &Maps, at: At, left: u64) -> io::Result<(Mapping, u64)> {
        let size = self.header.cluster_size();
        let first = decode(maps.entry(at.index, at.slot), &self.header)?;
        let mut len = size - at.within;
        let entries = 1_usize << self.header.l2_bits();
        for slot in at.slot + 1..entries {
            if len >= left {
                break;
            }
            let Ok(next) = decode(maps.entry(at.index, slot), &self.header) else { break };
            let follows = match (first, next) {
                (Mapping::Unallocated, Mapping::Unallocated) | (Mapping::Zero(_), Mapping::Zero(_)) => true,
                (Mapping::Data(a), Mapping::Data(b)) => {
                    a.copied == b.copied && a.offset.checked_add(at.within + len) == Some(b.offset)
                }
                _ => false,
            };
            if !follows {
                break;
            }
            len += size;
        }
        Ok((first, len.min(left)))
    }

    pub(super) fn read(&self, bufs: &[MemorySlice<'_>], wanted: usize, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < wanted {
            let offset = offset + done as u64;
            let at = self.at(offset);
            let maps = self.maps_with(at.index)?;
            let (mapping, len) = self.run(&maps, at, (wanted - done) as u64)?;
            let len = to_usize(len);
            let some;
            let here = if len == wanted {
                bufs
            } else {
                some = part(bufs, done, len);
                &some
            };
            match mapping {
                Mapping::Data(place) => self.read_data(here, len, place.offset + at.within)?,
                Mapping::Zero(_) => fill_zero(here)?,
                Mapping::Unallocated => {
                    drop(maps);
                    match &self.base {
                        Some(base) => base.read(here, offset)?,
                        None => fill_zero(here)?,
                    }
                }
                Mapping::Compressed { offset, len: packed } => {
                    let cluster = self.unpack(offset, packed)?;
                    let from = to_usize(at.within);
                    copy_to(here, cluster.get(from..from + len).unwrap_or(&[]))?;
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Reads data. The last cluster of a file may be cut short, and then ends in zeroes; a cluster that begins beyond the end of
    /// the file is missing.
    fn read_data(&self, bufs: &[MemorySlice<'_>], len: usize, host: u64) -> io::Result<()> {
        let got = self.file.read_slices(bufs, host)?;
        if got >= len {
            return Ok(());
        }
        let last = (host + len as u64 - 1) & !(self.header.cluster_size() - 1);
        if last >= self.file.len()? {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the image file is truncated"));
        }
        fill_zero(&part(bufs, got, len - got))
    }

    /// The contents of a compressed cluster.
    fn unpack(&self, offset: u64, len: usize) -> io::Result<Arc<Vec<u8>>> {
        let mut cache = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, cluster)) = &*cache
            && *at == offset
        {
            return Ok(Arc::clone(cluster));
        }
        let size = to_usize(self.header.cluster_size());
        // A cluster that does not shrink is not compressed: this much is enough for any.
        let mut packed = vec![0; len.min(size.saturating_mul(2))];
        let got = self.file.read_at(&mut packed, offset)?;
        packed.truncate(got);
        let mut cluster = vec![0; size];
        let (status, _, out) = decompress(
            &mut DecompressorOxide::new(),
            &packed,
            &mut cluster,
            0,
            TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
        );
        if out != size || !matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput) {
            return Err(corrupt(format_args!("the compressed cluster at {offset:#x} cannot be read")));
        }
        let cluster = Arc::new(cluster);
        *cache = Some((offset, Arc::clone(&cluster)));
        Ok(cluster)
    }

    /// Whether the bytes from `offset` on, and how many of at most `most`, are known to be zero.
    pub(crate) fn extent(&self, offset: u64, most: u64) -> io::Result<(bool, u64)> {
        let at = self.at(offset);
        let maps = self.maps_with(at.index)?;
        let (mapping, len) = if maps.l1.get(at.index).is_none_or(|&entry| entry == 0) {
            // No table: what it would map is all the same.
            let span = self.header.cluster_size() << self.header.l2_bits();
            (Mapping::Unallocated, most.min(span - offset % span))
        } else {
            self.run(&maps, at, most)?
        };
        drop(maps);
        match (mapping, &self.base) {
            (Mapping::Unallocated, Some(base)) => base.extent(offset, len),
            (Mapping::Unallocated | Mapping::Zero(_), _) => Ok((true, len)),
            _ => Ok((false, len)),
        }
    }

    /// Gives every cluster of a new image its place in the file. `fill` is called with each run of clusters.
    #[cfg(feature = "tools")]
    pub(crate) fn allocate_all(
        &self,
        mut fill: impl FnMut(&super::HostFile, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        let mut offset = 0;
        while offset < self.header.size {
            let at = self.at(offset);
            let mut writer = self.writer();
            self.own_table(&mut writer, at.index)?;
            let left = (self.header.size - offset).min(MAX_RUN).div_ceil(1 << bits).max(1);
            let want = left.min((1 << self.header.l2_bits()) - at.slot as u64);
            let (first, count, _) = self.allocate(&mut writer, want)?;
            fill(&self.file, first << bits, count << bits)?;
            let mut maps = self.maps_mut();
            for (i, slot) in (0..count).zip(at.slot..) {
                maps.set(at.index, slot, (first + i) << bits | COPIED);
            }
            offset += count << bits;
        }
        let end = self.file.len()?.next_multiple_of(self.header.cluster_size());
        self.file.set_len(end)
    }

    pub(super) fn write(&self, bufs: &[MemorySlice<'_>], wanted: usize, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < wanted {
            let at = self.at(offset + done as u64);
            let left = (wanted - done) as u64;
            let written = match self.write_in_place(bufs, wanted, done, at)? {
                0 => {
                    let mut writer = self.writer();
                    self.check_writable()?;
                    self.write_new(
                        &mut writer,
                        &part(bufs, done, to_usize(left)),
                        left,
                        at,
                        offset + done as u64,
                    )?
                }
                n => n,
            };
            done += to_usize(written);
        }
        Ok(())
    }

    /// Writes to clusters that the guest has already; returns the bytes written, 0 if the first has to be made first.
    fn write_in_place(
        &self,
        bufs: &[MemorySlice<'_>],
        wanted: usize,
        done: usize,
        at: At,
    ) -> io::Result<u64> {
        let maps = self.maps_with(at.index)?;
        if maps.needs_table(at.index) {
            return Ok(0);
        }
        let (Mapping::Data(Place { offset, copied: true }), len) =
            self.run(&maps, at, (wanted - done) as u64)?
        else {
            return Ok(0);
        };
        let host = offset + at.within;
        self.check_place(&maps, host, len)?;
        if to_usize(len) == wanted {
            self.file.write_slices(bufs, host)?;
        } else {
            self.file.write_slices(&part(bufs, done, to_usize(len)), host)?;
        }
        Ok(len)
    }

    /// Guest data does not go where metadata is, nor far behind the end of the file.
    fn check_place(&self, maps: &Maps, host: u64, len: u64) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        let clusters = host >> bits..(host + len).div_ceil(1 << bits);
        if clusters.end > self.end.load(Ordering::Relaxed) {
            return Err(corrupt(format_args!("guest data at {host:#x} is outside of the file")));
        }
        match clusters.into_iter().find(|&cluster| maps.protected.contains(cluster)) {
            Some(cluster) => Err(corrupt(format_args!("guest data lies over metadata in cluster {cluster}"))),
            None => Ok(()),
        }
    }

    /// Makes the table of `index` one that may be changed.
    pub(super) fn own_table(&self, writer: &mut Writer, index: usize) -> io::Result<()> {
        if writer.refcounts.as_ref().is_some_and(|r| r.freed.len() >= MAX_FREED) {
            self.commit(writer)?;
        }
        self.load(writer, index)?;
        let (old, entries, full) = {
            let maps = self.maps_now();
            if !maps.needs_table(index) {
                return Ok(());
            }
            let old = decode_l1(maps.l1.get(index).copied().unwrap_or(0), &self.header)?;
            let empty = || vec![0; 1 << self.header.l2_bits()];
            (old, maps.table(index).map_or_else(empty, |table| table.entries.clone()), maps.is_full())
        };
        if full && old.is_none() {
            self.commit(writer)?;
        }
        let (first, _, _) = self.allocate(writer, 1)?;
        let mut maps = self.maps_mut();
        maps.protected.add(first)?;
        maps.insert_new(index, first << self.header.cluster_bits, entries);
        drop(maps);
        self.dirty.store(true, Ordering::Release);
        if let Some(old) = old {
            self.free(writer, old.offset >> self.header.cluster_bits, 1)?;
        }
        Ok(())
    }

    fn refcounts<'w>(&self, writer: &'w mut Writer) -> io::Result<&'w mut Allocator> {
        writer.refcounts.as_mut().ok_or_else(|| ErrorKind::PermissionDenied.into())
    }

    fn allocate(&self, writer: &mut Writer, want: u64) -> io::Result<(u64, u64, bool)> {
        let refcounts = self.refcounts(writer)?;
        // Before anything is in the allocator that a flush would have to write.
        self.dirty.store(true, Ordering::Release);
        let mut maps = self.maps_mut();
        let got = refcounts.allocate(&self.file, &mut maps.protected, want);
        if refcounts.is_lost() {
            self.failed.store(true, Ordering::Relaxed);
        }
        let got = got?;
        self.end.fetch_max(got.0 + got.1, Ordering::Relaxed);
        Ok(got)
    }

    fn free(&self, writer: &mut Writer, first: u64, count: u64) -> io::Result<()> {
        self.refcounts(writer)?.freed.push((first, count));
        Ok(())
    }

    /// The reference of `mapping` goes away with the next commit.
    pub(super) fn free_mapping(&self, writer: &mut Writer, mapping: Mapping) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        let (first, count) = match mapping {
            Mapping::Data(place) | Mapping::Zero(Some(place)) => (place.offset >> bits, 1),
            Mapping::Compressed { offset, len } => {
                (offset >> bits, ((offset + len as u64 - 1) >> bits) - (offset >> bits) + 1)
            }
            Mapping::Unallocated | Mapping::Zero(None) => return Ok(()),
        };
        let maps = self.maps_now();
        if (first..first + count).any(|cluster| maps.protected.contains(cluster)) {
            return Ok(());
        }
        drop(maps);
        self.free(writer, first, count)
    }

    /// Writes the head of `bufs`, `left` bytes, to clusters that are made for it; returns the bytes written. 0 if meanwhile
    /// somebody else made the cluster.
    fn write_new(
        &self,
        writer: &mut Writer,
        bufs: &[MemorySlice<'_>],
        left: u64,
        at: At,
        offset: u64,
    ) -> io::Result<u64> {
        self.own_table(writer, at.index)?;
        let size = self.header.cluster_size();
        let bits = self.header.cluster_bits;
        let (old, kept) = {
            let maps = self.maps_now();
            let old = self.old_mappings(&maps, at, left)?;
            let kept = match old.first() {
                Some(Mapping::Data(Place { copied: true, .. })) | None => return Ok(0),
                Some(&Mapping::Zero(Some(Place { offset, copied: true }))) => {
                    self.check_place(&maps, offset, size)?;
                    Some(offset)
                }
                _ => None,
            };
            (old, kept)
        };
        let (first, count, fresh) = match kept {
            Some(offset) => (offset >> bits, 1, false),
            None => self.allocate(writer, old.len() as u64)?,
        };
        let len = left.min(count * size - at.within);
        let old = old.get(..to_usize(count)).unwrap_or(&old);
        let written = self.write_clusters(writer, bufs, offset, len, first << bits, fresh, old);
        if let Err(error) = written {
            if kept.is_none() {
                self.refcounts(writer)?.give_back(&self.file, first, count);
            }
            return Err(error);
        }
        self.dirty.store(true, Ordering::Release);
        let mut maps = self.maps_mut();
        for (i, slot) in (0..count).zip(at.slot..) {
            maps.set(at.index, slot, (first + i) << bits | COPIED);
        }
        drop(maps);
        if kept.is_none() {
            old.iter().try_for_each(|&mapping| self.free_mapping(writer, mapping))?;
        }
        Ok(len)
    }

    /// What the clusters of the next `left` bytes are, as far as they all have to be made; no more than one table's.
    fn old_mappings(&self, maps: &Maps, at: At, left: u64) -> io::Result<Vec<Mapping>> {
        let size = self.header.cluster_size();
        let want = (at.within + left.min(MAX_RUN)).div_ceil(size);
        let mut old = Vec::new();
        for slot in (at.slot..1 << self.header.l2_bits()).take(to_usize(want)) {
            let mapping = decode(maps.entry(at.index, slot), &self.header)?;
            let own = matches!(
                mapping,
                Mapping::Data(Place { copied: true, .. }) | Mapping::Zero(Some(Place { copied: true, .. }))
            );
            if own && !old.is_empty() {
                break;
            }
            old.push(mapping);
            if own {
                break;
            }
        }
        Ok(old)
    }

    /// Writes `len` bytes of `bufs` to whole new clusters at `host`, with what stood before and after them in the old ones.
    #[expect(clippy::too_many_arguments, reason = "one caller, and a struct for it would say no more")]
    fn write_clusters(
        &self,
        writer: &mut Writer,
        bufs: &[MemorySlice<'_>],
        offset: u64,
        len: u64,
        host: u64,
        fresh: bool,
        old: &[Mapping],
    ) -> io::Result<()> {
        let size = self.header.cluster_size();
        let head = offset & (size - 1);
        let tail = (size - ((offset + len) & (size - 1))) & (size - 1);
        let zero = |mapping: Option<&Mapping>| match mapping {
            Some(Mapping::Unallocated) => self.base.is_none(),
            Some(Mapping::Zero(_)) => true,
            _ => false,
        };
        let body = part(bufs, 0, to_usize(len));
        // What was never used reads as zeroes, so nothing needs to be written around the data.
        if fresh && (head == 0 || zero(old.first())) && (tail == 0 || zero(old.last())) {
            return self.file.write_slices(&body, host + head);
        }
        let view = scratch(writer, size)?.view();
        let mut all = Vec::with_capacity(body.len() + 2);
        if head > 0 {
            all.push(self.old_bytes(&view, 0, offset - head..offset)?);
        }
        all.extend(body);
        if tail > 0 {
            all.push(self.old_bytes(&view, size, offset + len..offset + len + tail)?);
        }
        self.file.write_slices(&all, host)
    }

    /// The bytes of a range of the disk, read to `at` in the scratch memory. The table is in memory: this takes no lock that the
    /// caller holds.
    fn old_bytes<'v>(&self, view: &'v MemoryView, at: u64, range: Range<u64>) -> io::Result<MemorySlice<'v>> {
        let slice =
            view.get_slice(GuestAddress(at), to_usize(range.end - range.start)).map_err(io::Error::other)?;
        self.read(&[slice], slice.len(), range.start)?;
        Ok(slice)
    }

    /// Makes all writes durable that completed before.
    pub(super) fn sync(&self) -> io::Result<()> {
        if !self.dirty.load(Ordering::Acquire) {
            return self.file.sync();
        }
        let mut writer = self.writer();
        self.commit(&mut writer)
    }

    /// Writes all metadata, in an order in which every state in between is a consistent image:
    ///
    /// 1. refcounts (they only grew so far), and L2 tables that nothing speaks of yet; then the host makes this and all guest
    ///    data durable;
    /// 2. the refcount table's new entries, likewise;
    /// 3. L2 and L1 entries, likewise: what they speak of is there;
    /// 4. refcounts of what nothing speaks of any more. Only now may it be used again.
    ///
    /// Whatever is lost in a crash, what is left is at worst a cluster that is counted and not used.
    fn commit(&self, writer: &mut Writer) -> io::Result<()> {
        let Some(refcounts) = writer.refcounts.as_mut() else { return Ok(()) };
        // Reads come here as well, to make room for tables.
        self.check_writable()?;
        let changed = {
            let maps = self.maps_now();
            if !maps.is_dirty() && !refcounts.is_dirty() {
                false
            } else {
                refcounts.write_blocks(&self.file)?;
                maps.write_tables(&self.file, true)?;
                true
            }
        };
        self.barrier()?;
        if !changed {
            self.dirty.store(false, Ordering::Release);
            return Ok(());
        }
        if refcounts.write_table(&self.file)? {
            self.barrier()?;
        }
        let maps = self.maps_now();
        maps.write_tables(&self.file, false)?;
        maps.write_l1(&self.file, self.header.l1_offset)?;
        drop(maps);
        self.barrier()?;
        let mut maps = self.maps_mut();
        maps.clean();
        // Holding the maps alone: nobody still reads or writes what goes away now.
        *self.unpacked.lock().unwrap_or_else(PoisonError::into_inner) = None;
        refcounts.release(&self.file, &maps.protected)?;
        self.dirty.store(false, Ordering::Release);
        Ok(())
    }

    /// Makes durable what was written so far. If that fails, nobody knows what the file has: it is not written any more.
    fn barrier(&self) -> io::Result<()> {
        self.file.sync().inspect_err(|_| self.failed.store(true, Ordering::Relaxed))
    }
}

/// Memory for two clusters.
fn scratch(writer: &mut Writer, size: u64) -> io::Result<&GuestMem> {
    if writer.scratch.is_none() {
        let bytes = (size * 2).next_multiple_of(4096);
        writer.scratch = Some(GuestMem::anonymous(bytes).map_err(io::Error::other)?);
    }
    writer.scratch.as_ref().ok_or_else(|| ErrorKind::OutOfMemory.into())
}
