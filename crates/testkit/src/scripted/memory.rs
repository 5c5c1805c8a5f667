//! Memory slots of a scripted VM, with a dirty log as KVM keeps it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{MemorySlots, SlotGuard};
use freestone_hypervisor::{DEVICE_SLOTS, Error, MapFlags, Result};
use freestone_memory::layout::PAGE_SIZE;
use freestone_memory::{Address, Bytes, GuestAddress, GuestMemoryRegion, MemoryMap, Region};

use super::probe::Slot;

struct Mapped {
    region: Arc<Region>,
    flags: MapFlags,
    dirty: Vec<u64>,
}

impl Mapped {
    fn start(&self) -> u64 {
        self.region.start_addr().raw_value()
    }

    fn end(&self) -> u64 {
        self.start().saturating_add(self.region.len())
    }
}

#[derive(Default)]
pub(crate) struct Slots {
    slots: Mutex<BTreeMap<u32, Mapped>>,
}

impl Slots {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Mapped>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, slot: u32, region: Arc<Region>, flags: MapFlags) -> Result<()> {
        let mut slots = self.lock();
        if slots.contains_key(&slot) {
            return Err(Error::OutOfRange { what: "slot", value: slot.into(), reason: "it is taken" });
        }
        Self::insert_free(&mut slots, slot, region, flags)
    }

    /// Maps `region` into the first free slot of devices.
    fn insert_device(&self, region: Arc<Region>, flags: MapFlags) -> Result<u32> {
        let mut slots = self.lock();
        let free = (DEVICE_SLOTS..).find(|slot| !slots.contains_key(slot));
        let slot = free.ok_or(Error::Unsupported("another memory slot"))?;
        Self::insert_free(&mut slots, slot, region, flags)?;
        Ok(slot)
    }

    fn insert_free(
        slots: &mut BTreeMap<u32, Mapped>,
        slot: u32,
        region: Arc<Region>,
        flags: MapFlags,
    ) -> Result<()> {
        let new = Mapped { dirty: bitmap(region.len()), region, flags };
        if slots.values().any(|m| m.start() < new.end() && new.start() < m.end()) {
            let reason = "it overlaps another slot";
            return Err(Error::OutOfRange { what: "guest-physical address", value: new.start(), reason });
        }
        slots.insert(slot, new);
        Ok(())
    }

    pub(crate) fn remove(&self, slot: u32) -> Result<Arc<Region>> {
        self.lock().remove(&slot).map(|m| m.region).ok_or(no_slot(slot))
    }

    pub(crate) fn list(&self) -> Vec<Slot> {
        let slots = self.lock();
        slots
            .iter()
            .map(|(&slot, m)| Slot { slot, gpa: m.start(), len: m.region.len(), flags: m.flags })
            .collect()
    }

    /// All slots as one memory.
    pub(crate) fn map(&self) -> Option<Arc<MemoryMap>> {
        let mut regions: Vec<_> = self.lock().values().map(|m| Arc::clone(&m.region)).collect();
        regions.sort_by_key(|r| r.start_addr());
        MemoryMap::from_arc_regions(regions).ok().map(Arc::new)
    }

    /// A store of the guest.
    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> Result<()> {
        let memory = self.map().ok_or_else(|| no_memory(gpa))?;
        memory.write_slice(data, GuestAddress(gpa)).map_err(|_| no_memory(gpa))?;
        let last = gpa.saturating_add((data.len() as u64).saturating_sub(1));
        for mapped in self.lock().values_mut().filter(|m| m.flags.contains(MapFlags::LOG_DIRTY)) {
            let (start, end) = (mapped.start(), mapped.end());
            let mut page = gpa.max(start) / PAGE_SIZE;
            while page * PAGE_SIZE < end && page <= last / PAGE_SIZE {
                mark(&mut mapped.dirty, page - start / PAGE_SIZE);
                page += 1;
            }
        }
        Ok(())
    }

    pub(crate) fn read(&self, gpa: u64, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        let memory = self.map().ok_or_else(|| no_memory(gpa))?;
        memory.read_slice(&mut data, GuestAddress(gpa)).map_err(|_| no_memory(gpa))?;
        Ok(data)
    }

    pub(crate) fn set_logging(&self, slot: u32, on: bool) -> Result<()> {
        let mut slots = self.lock();
        let mapped = slots.get_mut(&slot).ok_or(no_slot(slot))?;
        mapped.flags.set(MapFlags::LOG_DIRTY, on);
        mapped.dirty.fill(0);
        Ok(())
    }

    pub(crate) fn take_dirty(&self, slot: u32) -> Result<Vec<u64>> {
        let mut slots = self.lock();
        let mapped = slots.get_mut(&slot).ok_or(no_slot(slot))?;
        if !mapped.flags.contains(MapFlags::LOG_DIRTY) {
            return Err(Error::OutOfRange {
                what: "slot",
                value: slot.into(),
                reason: "its writes are not logged",
            });
        }
        let clean = bitmap(mapped.region.len());
        Ok(std::mem::replace(&mut mapped.dirty, clean))
    }
}

/// The handle that devices are given; it tells `log` what was mapped (`map 64 ...`) and taken away.
pub(crate) struct DeviceSlots {
    slots: Arc<Slots>,
    log: Arc<dyn Fn(String) + Send + Sync>,
}

impl DeviceSlots {
    pub(crate) fn new(slots: Arc<Slots>, log: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self { slots, log: Arc::new(log) }
    }
}

impl MemorySlots for DeviceSlots {
    fn map(&self, region: &Arc<Region>, read_only: bool) -> io::Result<SlotGuard> {
        let flags = if read_only { MapFlags::READ_ONLY } else { MapFlags::empty() };
        let slot = self.slots.insert_device(Arc::clone(region), flags).map_err(io::Error::other)?;
        (self.log)(format!("map {slot} {:#x}+{:#x}", region.start_addr().raw_value(), region.len()));
        let (slots, log) = (Arc::clone(&self.slots), Arc::clone(&self.log));
        Ok(SlotGuard::new(move || {
            if slots.remove(slot).is_ok() {
                log(format!("unmap {slot}"));
            }
        }))
    }
}

fn bitmap(len: u64) -> Vec<u64> {
    let words = len.div_ceil(PAGE_SIZE).div_ceil(64);
    vec![0; usize::try_from(words).unwrap_or(0)]
}

fn mark(bitmap: &mut [u64], page: u64) {
    if let Some(word) = usize::try_from(page / 64).ok().and_then(|w| bitmap.get_mut(w)) {
        *word |= 1 << (page % 64);
    }
}

fn no_slot(slot: u32) -> Error {
    Error::OutOfRange { what: "slot", value: slot.into(), reason: "nothing is mapped there" }
}

fn no_memory(gpa: u64) -> Error {
    Error::OutOfRange { what: "guest-physical address", value: gpa, reason: "the script expects RAM there" }
}
