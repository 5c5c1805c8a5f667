//! A VM: the way to all its parts.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use freestone_bus::{Doorbells, IrqChip, MemorySlots};
use freestone_hypervisor::{DirtyLog, Error, MapFlags, Result, SaveVm, Vm};
use freestone_memory::{Region, layout};
use kvm_ioctls::VmFd;

use crate::doorbell::KvmDoorbells;
use crate::error::{call, io_error};
use crate::irq::KvmIrqChip;
use crate::saved_msrs::VmMsrs;
use crate::slots::{KvmMemorySlots, Slots};
use crate::system::Kvm;
use crate::vcpu::KvmVcpu;

/// A VM of KVM.
///
/// [`AsFd`] gives the descriptor for calls that this crate has not. The types of kvm-ioctls are not part of this API:
/// with them, safe code could make a vCPU that outlives the memory of its VM.
#[derive(Debug)]
pub struct KvmVm(pub(crate) Arc<VmInner>);

/// What a VM and its vCPUs hold together: guest memory must be there for as long as any vCPU can run.
pub(crate) struct VmInner {
    pub(crate) fd: Arc<VmFd>,
    pub(crate) kvm: Kvm,
    pub(crate) slots: Slots,
    irq_chip: Mutex<Option<Arc<KvmIrqChip>>>,
    pub(crate) msrs: VmMsrs,
}

impl VmInner {
    /// The interrupt controller, if it was created.
    pub(crate) fn created_irq_chip(&self) -> Option<Arc<KvmIrqChip>> {
        self.irq_chip.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl KvmVm {
    pub(crate) fn new(fd: VmFd, kvm: Kvm) -> Result<Self> {
        if wants_private_pages() {
            let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
            fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
                .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
            fd.set_tss_address(tss).map_err(call("KVM_SET_TSS_ADDR"))?;
        }
        let fd = Arc::new(fd);
        let slots = Slots::new(fd.clone());
        let msrs = VmMsrs::default();
        Ok(Self(Arc::new(VmInner { fd, kvm, slots, irq_chip: Mutex::new(None), msrs })))
    }
}

/// Whether KVM needs guest-physical pages for itself: on Intel processors that cannot run real mode otherwise. Where it
/// turns out not to, KVM ignores the addresses. They are given first of all, while that is cheap and allowed.
fn wants_private_pages() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    !matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn map(&self, slot: u32, region: Arc<Region>, flags: MapFlags) -> Result<()> {
        self.0.slots.map(slot, region, flags)
    }

    fn unmap(&self, slot: u32) -> Result<Arc<Region>> {
        self.0.slots.unmap(slot)
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
            None => chip.insert(Arc::new(KvmIrqChip::create(&self.0.fd, &self.0.kvm)?)).clone(),
        };
        Ok(Some(chip))
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(Arc::new(KvmDoorbells::new(self.0.fd.clone())))
    }

    fn memory_slots(&self) -> Option<Arc<dyn MemorySlots>> {
        Some(Arc::new(KvmMemorySlots(Arc::downgrade(&self.0))))
    }

    fn state(&self) -> Option<&dyn SaveVm> {
        Some(self)
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        Some(self)
    }
}

impl DirtyLog for KvmVm {
    fn take(&self, slot: u32) -> Result<Vec<u64>> {
        self.0.slots.take_dirty(slot)
    }

    fn slots(&self) -> Vec<(u32, u64, u64)> {
        self.0.slots.writable()
    }

    fn set_logging(&self, slot: u32, on: bool) -> Result<()> {
        self.0.slots.set_logging(slot, on)
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
