//! Memory slots: which host memory the guest sees where, and who keeps it alive.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use freestone_bus::{MemorySlots, SlotGuard};
use freestone_hypervisor::{DEVICE_SLOTS, Error, MapFlags, Result};
use freestone_memory::{GuestMemoryRegion, Region, layout};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};

use crate::error::call;
use crate::vm::VmInner;

/// The slots of one VM. Whoever can run a vCPU must keep this alive.
pub(crate) struct Slots {
    fd: Arc<VmFd>,
    used: Mutex<BTreeMap<u32, Slot>>,
}

struct Slot {
    region: Arc<Region>,
    flags: MapFlags,
}

impl Slot {
    /// Whether this slot and `region` share an address. Both have been checked not to wrap.
    fn overlaps(&self, region: &Region) -> bool {
        self.region.start_addr() <= region.last_addr() && region.start_addr() <= self.region.last_addr()
    }
}

impl Slots {
    pub(crate) fn new(fd: Arc<VmFd>) -> Self {
        Self { fd, used: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn map(&self, slot: u32, region: Arc<Region>, flags: MapFlags) -> Result<()> {
        let mut used = self.lock();
        if used.contains_key(&slot) {
            return Err(Error::InUse { what: "memory slot", value: slot.into() });
        }
        self.map_free(&mut used, slot, region, flags)
    }

    /// Maps `region` in the first free slot of those for devices, and answers which that is.
    fn map_anywhere(&self, region: Arc<Region>, flags: MapFlags) -> Result<u32> {
        let slots = u32::try_from(self.fd.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        let mut used = self.lock();
        let free = (DEVICE_SLOTS..slots).find(|slot| !used.contains_key(slot));
        let slot = free.ok_or(Error::OutOfRange {
            what: "memory slot",
            value: slots.into(),
            reason: "the host has no more slots for a VM",
        })?;
        self.map_free(&mut used, slot, region, flags)?;
        Ok(slot)
    }

    fn map_free(
        &self,
        used: &mut BTreeMap<u32, Slot>,
        slot: u32,
        region: Arc<Region>,
        flags: MapFlags,
    ) -> Result<()> {
        check_region(&region)?;
        if used.values().any(|other| other.overlaps(&region)) {
            return Err(Error::OutOfRange {
                what: "guest-physical address",
                value: region.start_addr().0,
                reason: "the memory would overlap that of another slot",
            });
        }
        if flags.contains(MapFlags::READ_ONLY) && !self.fd.check_extension(Cap::ReadonlyMem) {
            return Err(Error::Unsupported("memory that the guest may not write (KVM_CAP_READONLY_MEM)"));
        }
        self.set(slot, &region, region.len(), flags)?;
        used.insert(slot, Slot { region, flags });
        Ok(())
    }

    /// When this returns, no vCPU uses the memory any more, not even one that runs.
    pub(crate) fn unmap(&self, slot: u32) -> Result<Arc<Region>> {
        let mut used = self.lock();
        let Some(old) = used.get(&slot) else { return Err(no_slot(slot)) };
        self.set(slot, &old.region, 0, MapFlags::empty())?;
        used.remove(&slot).map(|old| old.region).ok_or_else(|| no_slot(slot))
    }

    pub(crate) fn take_dirty(&self, slot: u32) -> Result<Vec<u64>> {
        let used = self.lock();
        let entry = used.get(&slot).ok_or_else(|| no_slot(slot))?;
        if !entry.flags.contains(MapFlags::LOG_DIRTY) {
            return Err(Error::OutOfRange {
                what: "memory slot",
                value: slot.into(),
                reason: "it was mapped without a log of writes",
            });
        }
        let len = usize::try_from(entry.region.len()).unwrap_or(usize::MAX);
        self.fd.get_dirty_log(slot, len).map_err(call("KVM_GET_DIRTY_LOG"))
    }

    /// Number, address and length of the slots that the guest may write to.
    pub(crate) fn writable(&self) -> Vec<(u32, u64, u64)> {
        let used = self.lock();
        let writable = used.iter().filter(|(_, slot)| !slot.flags.contains(MapFlags::READ_ONLY));
        writable.map(|(&slot, at)| (slot, at.region.start_addr().0, at.region.len())).collect()
    }

    /// Begins or ends the log of the guest's writes to a slot that may be in use.
    pub(crate) fn set_logging(&self, slot: u32, on: bool) -> Result<()> {
        let mut used = self.lock();
        let entry = used.get_mut(&slot).ok_or_else(|| no_slot(slot))?;
        let mut flags = entry.flags;
        flags.set(MapFlags::LOG_DIRTY, on);
        if flags != entry.flags {
            self.set(slot, &entry.region, entry.region.len(), flags)?;
            entry.flags = flags;
        }
        Ok(())
    }

    /// Tells KVM of `slot`; with `size` 0 it forgets it.
    fn set(&self, slot: u32, region: &Region, size: u64, flags: MapFlags) -> Result<()> {
        let mut kvm_flags = 0;
        if flags.contains(MapFlags::READ_ONLY) {
            kvm_flags |= KVM_MEM_READONLY;
        }
        if flags.contains(MapFlags::LOG_DIRTY) {
            kvm_flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let description = kvm_userspace_memory_region {
            slot,
            flags: kvm_flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: size,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is the whole mapping of `region`. The table of slots keeps the region mapped until KVM has
        // forgotten the slot, or the last vCPU, which alone could touch it, is gone.
        unsafe { self.fd.set_user_memory_region(description) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }
}

/// Checks what KVM would refuse without saying why.
fn check_region(region: &Region) -> Result<()> {
    let (start, len) = (region.start_addr().0, region.len());
    let refuse = |what, value, reason| Err(Error::OutOfRange { what, value, reason });
    if len == 0 || !len.is_multiple_of(layout::PAGE_SIZE) {
        return refuse("length of guest memory", len, "it must be one or more pages of 4 KiB");
    }
    if !start.is_multiple_of(layout::PAGE_SIZE) {
        return refuse("guest-physical address", start, "it must be a multiple of 4 KiB");
    }
    match start.checked_add(len) {
        Some(end) if end <= 1 << layout::MAX_PHYS_BITS => Ok(()),
        _ => refuse("guest-physical address", start, "the memory would not end within 52 bits"),
    }
}

fn no_slot(slot: u32) -> Error {
    Error::OutOfRange { what: "memory slot", value: slot.into(), reason: "nothing is mapped in it" }
}

/// The slots that devices map memory in. It does not keep the VM: a device that outlives it has nothing to take away.
pub(crate) struct KvmMemorySlots(pub(crate) Weak<VmInner>);

impl MemorySlots for KvmMemorySlots {
    fn map(&self, region: &Arc<Region>, read_only: bool) -> io::Result<SlotGuard> {
        let Some(vm) = self.0.upgrade() else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the VM is gone"));
        };
        let flags = if read_only { MapFlags::READ_ONLY } else { MapFlags::empty() };
        let slot = vm.slots.map_anywhere(Arc::clone(region), flags).map_err(into_io)?;
        let vm = self.0.clone();
        Ok(SlotGuard::new(move || {
            if let Some(vm) = vm.upgrade() {
                // If the host refuses, the table keeps the region, and the guest the memory: nothing dangles.
                let _ = vm.slots.unmap(slot);
            }
        }))
    }
}

/// A refusal as an error of I/O, which devices know.
fn into_io(error: Error) -> io::Error {
    let kind = match &error {
        Error::Call { source, .. } => source.kind(),
        Error::Unsupported(_) => io::ErrorKind::Unsupported,
        _ => io::ErrorKind::InvalidInput,
    };
    io::Error::new(kind, error)
}
