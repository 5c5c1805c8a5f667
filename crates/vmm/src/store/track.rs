//! Which pages were written since the last snapshot: the hypervisor's log and that of the devices, together.

use std::collections::BTreeMap;

use freestone_hypervisor::DirtyLog;
use freestone_memory::image::ImageLayout;
use freestone_memory::layout::PAGE_SIZE;
use freestone_memory::{DirtyPages, GuestAddress, GuestMem};

use super::Id;
use crate::Result;

/// Keeps what was logged and is in no snapshot yet.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    /// The snapshot since which is logged, and where what is in its image; nothing yet: a difference has no base.
    pub(crate) base: Option<(Id, ImageLayout)>,
    /// Slots that are logged, with their address and length.
    slots: BTreeMap<u32, (u64, u64)>,
    /// Bitmaps by guest-physical address of their region.
    pending: BTreeMap<u64, Vec<u64>>,
}

impl Tracker {
    /// Begins to log. What the hypervisor logged before is forgotten; what devices wrote is kept if `keep` says so.
    pub(crate) fn start(&mut self, log: &dyn DirtyLog, memory: &GuestMem, keep: bool) -> Result<()> {
        *self = Self::default();
        for (slot, gpa, len) in log.slots() {
            // A slot that is logged already begins anew.
            log.set_logging(slot, true)?;
            drop(log.take(slot)?);
            self.slots.insert(slot, (gpa, len));
        }
        for pages in memory.take_dirty().into_iter().flatten().filter(|_| keep) {
            self.add(pages.start().0, pages.bitmap());
        }
        Ok(())
    }

    /// Ends the hypervisor's log.
    pub(crate) fn stop(log: &dyn DirtyLog) -> Result<()> {
        log.slots().into_iter().try_for_each(|(slot, ..)| Ok(log.set_logging(slot, false)?))
    }

    /// Adds what was written since the last call.
    pub(crate) fn collect(&mut self, log: &dyn DirtyLog, memory: &GuestMem) -> Result<()> {
        let slots = log.slots();
        for &(slot, gpa, len) in &slots {
            let known = self.slots.get(&slot) == Some(&(gpa, len));
            // A slot that was given back and used again for the same place begins without a log: what it has is new as well.
            if let Some(Ok(bitmap)) = known.then(|| log.take(slot)) {
                self.add(gpa, &bitmap);
            } else {
                // Its pages are in the snapshot before anything of it is forgotten.
                self.add(gpa, &all(len));
                self.slots.remove(&slot);
                log.set_logging(slot, true)?;
                self.slots.insert(slot, (gpa, len));
            }
        }
        self.slots.retain(|slot, place| slots.contains(&(*slot, place.0, place.1)));
        for pages in memory.take_dirty().into_iter().flatten() {
            self.add(pages.start().0, pages.bitmap());
        }
        Ok(())
    }

    fn add(&mut self, gpa: u64, bitmap: &[u64]) {
        let pending = self.pending.entry(gpa).or_default();
        if pending.len() < bitmap.len() {
            pending.resize(bitmap.len(), 0);
        }
        pending.iter_mut().zip(bitmap).for_each(|(mine, other)| *mine |= other);
    }

    /// What was collected and not [saved](Self::saved), as far as an image of this layout has it. The rest is memory that was
    /// taken away meanwhile, or that keeps its bytes by itself.
    pub(crate) fn pages(&self, layout: &ImageLayout) -> Vec<DirtyPages> {
        let pages = |(&gpa, bitmap): (&u64, &Vec<u64>)| {
            let mut bitmap = bitmap.clone();
            for (word, index) in bitmap.iter_mut().zip(0u64..) {
                let first = gpa.saturating_add(index.saturating_mul(64 * PAGE_SIZE));
                if *word != 0 {
                    let there = (0..64).filter(|bit| layout.offset_of(first + bit * PAGE_SIZE).is_some());
                    *word &= there.fold(0, |mask, bit| mask | 1 << bit);
                }
            }
            DirtyPages::new(GuestAddress(gpa), bitmap)
        };
        self.pending.iter().map(pages).collect()
    }

    /// Forgets what was collected: somebody else has it.
    pub(crate) fn forget(&mut self) {
        self.pending.clear();
    }

    /// What was collected is not in snapshot `id`, all else is.
    pub(crate) fn since(&mut self, id: Id, layout: ImageLayout) {
        self.base = Some((id, layout));
    }

    /// All that was collected is in snapshot `id`, whose image has this layout.
    pub(crate) fn saved(&mut self, id: Id, layout: ImageLayout) {
        self.pending.clear();
        self.base = Some((id, layout));
    }
}

/// A bitmap of `len` bytes of which every page is dirty.
fn all(len: u64) -> Vec<u64> {
    let pages = len / PAGE_SIZE;
    let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
    let mut bitmap = vec![u64::MAX; words];
    let rest = pages % 64;
    if rest != 0
        && let Some(last) = bitmap.last_mut()
    {
        *last = (1 << rest) - 1;
    }
    bitmap
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use freestone_hypervisor::{Error, Result};
    use freestone_memory::layout::RamRange;

    use super::*;

    /// Slots with address, length, whether they are logged, and what was written.
    #[derive(Default)]
    struct Log(Mutex<BTreeMap<u32, (u64, u64, bool, u64)>>);

    impl Log {
        fn map(&self, slot: u32, gpa: u64, pages: u64) {
            self.0.lock().unwrap().insert(slot, (gpa, pages * PAGE_SIZE, false, 0));
        }

        fn write(&self, slot: u32, page: u64) {
            let mut slots = self.0.lock().unwrap();
            let (_, _, logged, written) = slots.get_mut(&slot).unwrap();
            *written |= u64::from(*logged) << page;
        }
    }

    impl DirtyLog for Log {
        fn take(&self, slot: u32) -> Result<Vec<u64>> {
            match self.0.lock().unwrap().get_mut(&slot) {
                Some((_, _, true, written)) => Ok(vec![std::mem::take(written)]),
                _ => Err(Error::Unsupported("a slot without a log")),
            }
        }

        fn slots(&self) -> Vec<(u32, u64, u64)> {
            self.0.lock().unwrap().iter().map(|(slot, &(gpa, len, ..))| (*slot, gpa, len)).collect()
        }

        fn set_logging(&self, slot: u32, on: bool) -> Result<()> {
            self.0.lock().unwrap().get_mut(&slot).unwrap().2 = on;
            Ok(())
        }
    }

    fn memory() -> GuestMem {
        freestone_memory::GuestMemBuilder::new(1 << 20).dirty_log(true).build().unwrap()
    }

    fn layout(ranges: &[(u64, u64)]) -> ImageLayout {
        let ranges: Vec<_> =
            ranges.iter().map(|&(start, pages)| RamRange { start, len: pages * PAGE_SIZE }).collect();
        ImageLayout::new(&ranges).unwrap()
    }

    fn dirty(tracker: &Tracker, layout: &ImageLayout) -> Vec<u64> {
        tracker.pages(layout).iter().flat_map(DirtyPages::pages).collect()
    }

    const HIGH: u64 = 1 << 32;

    #[test]
    fn memory_that_is_taken_away_and_plugged_in_again_in_the_same_slot_is_all_new() {
        let (log, memory, mut tracker) = (Log::default(), memory(), Tracker::default());
        log.map(0, 0, 4);
        log.map(7, HIGH, 3);
        tracker.start(&log, &memory, false).unwrap();
        for gpa in [HIGH, HIGH + 0x8000, HIGH] {
            log.map(7, gpa, 3);
            log.write(0, 2);
            tracker.collect(&log, &memory).unwrap();
            let layout = layout(&[(0, 4), (gpa, 3)]);
            assert_eq!(dirty(&tracker, &layout), [0x2000, gpa, gpa + 0x1000, gpa + 0x2000]);
            tracker.saved(Id::random().unwrap(), layout.clone());
            log.write(7, 1);
            tracker.collect(&log, &memory).unwrap();
            assert_eq!(dirty(&tracker, &layout), [gpa + 0x1000]);
            tracker.forget();
        }
    }

    #[test]
    fn what_a_snapshot_has_no_place_for_is_left_out() {
        let (log, memory, mut tracker) = (Log::default(), memory(), Tracker::default());
        log.map(0, 0, 4);
        // Such as persistent memory, whose file has it.
        log.map(7, HIGH, 3);
        tracker.start(&log, &memory, false).unwrap();
        log.write(0, 3);
        log.write(7, 1);
        tracker.collect(&log, &memory).unwrap();
        assert_eq!(dirty(&tracker, &layout(&[(0, 4)])), [0x3000]);
    }

    #[test]
    fn what_devices_wrote_before_is_kept_only_if_asked_for() {
        use freestone_memory::Bytes;
        let (log, memory) = (Log::default(), memory());
        for keep in [true, false] {
            memory.view().write_obj(1u8, GuestAddress(0x5000)).unwrap();
            let mut tracker = Tracker::default();
            tracker.start(&log, &memory, keep).unwrap();
            assert_eq!(dirty(&tracker, &layout(&[(0, 256)])).contains(&0x5000), keep);
        }
    }
}
