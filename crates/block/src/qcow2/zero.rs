//! Discard and write-zeroes of a qcow2 image: whole clusters by their mappings, the rest by bytes.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};

use super::header::{ZERO, to_usize};
use super::io::At;
use super::maps::{Mapping, Place, decode};
use super::{Qcow2Image, Writer};

impl Qcow2Image {
    /// Lets go of the whole clusters in a range, which then read as zeroes. Where the format has no way to say so (version 2
    /// with a backing file) they stay.
    pub(super) fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
        let whole = self.whole_clusters(offset, len);
        self.zero_clusters(whole, true).map(|_| ())
    }

    /// The whole clusters in a range, as offsets. The last one counts as whole if the disk ends in it.
    fn whole_clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let size = self.header.cluster_size();
        let end = offset + len;
        let end = if end == self.size { end.next_multiple_of(size) } else { end - end % size };
        offset.next_multiple_of(size)..end
    }

    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = offset + len;
        let whole = self.whole_clusters(offset, len);
        if whole.start >= whole.end {
            return self.write_zero_bytes(offset..end);
        }
        self.write_zero_bytes(offset..whole.start)?;
        if !self.zero_clusters(whole.clone(), unmap)? {
            self.write_zero_bytes(whole.start..whole.end.min(end))?;
        }
        self.write_zero_bytes(whole.end.min(end)..end)
    }

    /// Writes zeroes as data, except where there are some.
    fn write_zero_bytes(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let zeroes =
            GuestMem::anonymous(range.end.saturating_sub(range.start).min(1 << 20).next_multiple_of(4096))
                .map_err(io::Error::other)?;
        let view = zeroes.view();
        let mut offset = range.start;
        while offset < range.end {
            let at = self.at(offset);
            let maps = self.maps_with(at.index)?;
            let (mapping, len) = self.run(&maps, at, (range.end - offset).min(1 << 20))?;
            drop(maps);
            let is_zero = matches!(mapping, Mapping::Zero(_))
                || (mapping == Mapping::Unallocated && self.base.is_none());
            if !is_zero {
                let slice = view.get_slice(GuestAddress(0), to_usize(len)).map_err(io::Error::other)?;
                self.write(&[slice], slice.len(), offset)?;
            }
            offset += len;
        }
        Ok(())
    }

    /// Makes whole clusters zero by their entries; false if the format cannot.
    fn zero_clusters(&self, range: Range<u64>, unmap: bool) -> io::Result<bool> {
        let v3 = self.header.version >= 3;
        if !v3 && self.base.is_some() {
            return Ok(false);
        }
        let entries = 1_u64 << self.header.l2_bits();
        let bits = self.header.cluster_bits;
        let mut cluster = range.start >> bits;
        let end = range.end >> bits;
        while cluster < end {
            let at = self.at(cluster << bits);
            let next = ((cluster / entries + 1) * entries).min(end);
            let mut writer = self.writer();
            self.check_writable()?;
            let nothing = self.maps_now().l1.get(at.index).is_none_or(|&entry| entry == 0);
            if !nothing || self.base.is_some() {
                self.zero_in_table(&mut writer, at, to_usize(next - cluster), unmap)?;
            }
            cluster = next;
        }
        Ok(true)
    }

    fn zero_in_table(&self, writer: &mut Writer, at: At, count: usize, unmap: bool) -> io::Result<()> {
        self.own_table(writer, at.index)?;
        let v3 = self.header.version >= 3;
        let mut gone = Vec::new();
        self.dirty.store(true, Ordering::Release);
        let mut maps = self.maps_mut();
        for slot in (at.slot..1 << self.header.l2_bits()).take(count) {
            let entry = maps.entry(at.index, slot);
            let old = decode(entry, &self.header)?;
            let keep = !unmap && v3;
            match old {
                Mapping::Unallocated if self.base.is_none() => {}
                Mapping::Zero(None) => {}
                Mapping::Zero(Some(_)) if keep => {}
                Mapping::Data(Place { copied: true, .. }) if keep => maps.set(at.index, slot, entry | ZERO),
                _ => {
                    maps.set(at.index, slot, if v3 { ZERO } else { 0 });
                    gone.push(old);
                }
            }
        }
        drop(maps);
        gone.into_iter().try_for_each(|old| self.free_mapping(writer, old))
    }
}
