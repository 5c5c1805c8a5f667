//! Which pages were written since the last snapshot: the hypervisor's log and that of the devices, together.

use std::collections::BTreeMap;

use freestone_hypervisor::DirtyLog;
use freestone_memory::layout::PAGE_SIZE;
use freestone_memory::{DirtyPages, GuestAddress, GuestMem};

use super::Id;
use crate::Result;

/// Keeps what was logged and is in no snapshot yet.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    /// The snapshot since which is logged; nothing yet: a difference has no base.
    pub(crate) base: Option<Id>,
    /// Slots that are logged, with their length.
    slots: BTreeMap<u32, u64>,
    /// Bitmaps by guest-physical address of their region.
    pending: BTreeMap<u64, Vec<u64>>,
}

impl Tracker {
    /// Begins to log. Everything written before is forgotten.
    pub(crate) fn start(&mut self, log: &dyn DirtyLog, memory: &GuestMem) -> Result<()> {
        *self = Self::default();
        for (slot, _, len) in log.slots() {
            // A slot that is logged already begins anew.
            log.set_logging(slot, true)?;
            drop(log.take(slot)?);
            self.slots.insert(slot, len);
        }
        if let Some(own) = memory.dirty_log() {
            own.clear();
        }
        Ok(())
    }

    /// Ends the hypervisor's log.
    pub(crate) fn stop(log: &dyn DirtyLog) -> Result<()> {
        log.slots().into_iter().try_for_each(|(slot, ..)| Ok(log.set_logging(slot, false)?))
    }

    /// Adds what was written since the last call.
    pub(crate) fn collect(&mut self, log: &dyn DirtyLog, memory: &GuestMem) -> Result<()> {
        for (slot, gpa, len) in log.slots() {
            if self.slots.get(&slot) == Some(&len) {
                self.add(gpa, &log.take(slot)?);
            } else {
                // Memory that came meanwhile: all of it is new.
                log.set_logging(slot, true)?;
                self.slots.insert(slot, len);
                self.add(gpa, &all(len));
            }
        }
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

    /// What was collected and not [saved](Self::saved).
    pub(crate) fn pages(&self) -> Vec<DirtyPages> {
        let pages = |(&gpa, bitmap): (&u64, &Vec<u64>)| DirtyPages::new(GuestAddress(gpa), bitmap.clone());
        self.pending.iter().map(pages).collect()
    }

    /// Takes what was collected.
    pub(crate) fn take_pages(&mut self) -> Vec<DirtyPages> {
        let pending = std::mem::take(&mut self.pending);
        pending.into_iter().map(|(gpa, bitmap)| DirtyPages::new(GuestAddress(gpa), bitmap)).collect()
    }

    /// All that was collected is in snapshot `id`.
    pub(crate) fn saved(&mut self, id: Id) {
        self.pending.clear();
        self.base = Some(id);
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
