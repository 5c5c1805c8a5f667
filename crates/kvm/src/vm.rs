//! A VM: its memory slots, and the way to all its other parts.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{Doorbells, IrqChip};
use freestone_hypervisor::{DirtyLog, Error, MapFlags, Result, Vm};
use freestone_memory::{GuestMemoryRegion, Region, layout};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};

use crate::doorbell::KvmDoorbells;
use crate::error::{call, io_error};
use crate::irq::KvmIrqChip;
use crate::vcpu::KvmVcpu;

/// A VM of KVM.
///
/// [`AsFd`] gives the descriptor for calls that this crate has not. The types of kvm-ioctls are not part of this API:
/// with them, safe code could make a vCPU that outlives the memory of its VM.
#[derive(Debug)]
pub struct KvmVm(Arc<VmInner>);

/// What a VM and its vCPUs hold together: guest memory must be there for as long as any vCPU can run.
pub(crate) struct VmInner {
    fd: Arc<VmFd>,
    slots: Mutex<BTreeMap<u32, Slot>>,
    irq_chip: Mutex<Option<Arc<KvmIrqChip>>>,
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

impl KvmVm {
    pub(crate) fn new(fd: VmFd) -> Result<Self> {
        if wants_private_pages() {
            let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
            fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
                .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
            fd.set_tss_address(tss).map_err(call("KVM_SET_TSS_ADDR"))?;
        }
        Ok(Self(Arc::new(VmInner {
            fd: Arc::new(fd),
            slots: Mutex::new(BTreeMap::new()),
            irq_chip: Mutex::new(None),
        })))
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        self.0.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells KVM of `slot`; with `size` 0 it forgets it.
    fn set_slot(&self, slot: u32, region: &Region, size: u64, flags: MapFlags) -> Result<()> {
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
        unsafe { self.0.fd.set_user_memory_region(description) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }
}

/// Whether KVM needs guest-physical pages for itself: on Intel processors that cannot run real mode otherwise. Where it
/// turns out not to, KVM ignores the addresses. They are given first of all, while that is cheap and allowed.
fn wants_private_pages() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    !matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
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

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn map(&self, slot: u32, region: Arc<Region>, flags: MapFlags) -> Result<()> {
        check_region(&region)?;
        let mut slots = self.slots();
        if slots.contains_key(&slot) {
            return Err(Error::InUse { what: "memory slot", value: slot.into() });
        }
        if slots.values().any(|other| other.overlaps(&region)) {
            return Err(Error::OutOfRange {
                what: "guest-physical address",
                value: region.start_addr().0,
                reason: "the memory would overlap that of another slot",
            });
        }
        if flags.contains(MapFlags::READ_ONLY) && !self.0.fd.check_extension(Cap::ReadonlyMem) {
            return Err(Error::Unsupported("memory that the guest may not write (KVM_CAP_READONLY_MEM)"));
        }
        self.set_slot(slot, &region, region.len(), flags)?;
        slots.insert(slot, Slot { region, flags });
        Ok(())
    }

    fn unmap(&self, slot: u32) -> Result<Arc<Region>> {
        let mut slots = self.slots();
        let Some(old) = slots.get(&slot) else { return Err(no_slot(slot)) };
        self.set_slot(slot, &old.region, 0, MapFlags::empty())?;
        slots.remove(&slot).map(|old| old.region).ok_or_else(|| no_slot(slot))
    }

    /// KVM keeps a vCPU until the VM is gone: the index of one that was dropped stays in use.
    fn create_vcpu(&self, index: u32) -> Result<KvmVcpu> {
        let refuse = |reason| Error::OutOfRange { what: "index of vCPU", value: index.into(), reason };
        let fd = self.0.fd.create_vcpu(index.into()).map_err(|error| match error.errno() {
            libc::EEXIST => Error::InUse { what: "vCPU", value: index.into() },
            libc::EINVAL | libc::E2BIG => refuse("the host allows no more vCPUs, or no such index"),
            _ => Error::Call { op: "KVM_CREATE_VCPU", source: io_error(error) },
        })?;
        KvmVcpu::new(index, fd, self.0.fd.run_size(), self.0.clone())
    }

    fn irq_chip(&self) -> Result<Option<Arc<dyn IrqChip>>> {
        let mut chip = self.0.irq_chip.lock().unwrap_or_else(PoisonError::into_inner);
        let chip = match &*chip {
            Some(chip) => chip.clone(),
            None => chip.insert(Arc::new(KvmIrqChip::create(&self.0.fd)?)).clone(),
        };
        Ok(Some(chip))
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(Arc::new(KvmDoorbells::new(self.0.fd.clone())))
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        Some(self)
    }
}

fn no_slot(slot: u32) -> Error {
    Error::OutOfRange { what: "memory slot", value: slot.into(), reason: "nothing is mapped in it" }
}

impl DirtyLog for KvmVm {
    fn take(&self, slot: u32) -> Result<Vec<u64>> {
        let slots = self.slots();
        let entry = slots.get(&slot).ok_or_else(|| no_slot(slot))?;
        if !entry.flags.contains(MapFlags::LOG_DIRTY) {
            return Err(Error::OutOfRange {
                what: "memory slot",
                value: slot.into(),
                reason: "it was mapped without a log of writes",
            });
        }
        let len = usize::try_from(entry.region.len()).unwrap_or(usize::MAX);
        self.0.fd.get_dirty_log(slot, len).map_err(call("KVM_GET_DIRTY_LOG"))
    }
}

impl AsFd for KvmVm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.0.fd.as_raw_fd()) }
    }
}

impl fmt::Debug for VmInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmInner").field("fd", &self.fd.as_raw_fd()).finish_non_exhaustive()
    }
}
