//! The traits a backend implements. They are small: what not every backend has is a handle that a VM may return.

use std::sync::Arc;

use bitflags::bitflags;
use freestone_bus::{Doorbells, IrqChip, MemorySlots};
use freestone_memory::Region;

use crate::x86::{
    ClockPolicy, ClockState, CpuidLeaf, HostCpu, MpState, Msr, Regs, SpecialRegs, VcpuState, VmState,
};
use crate::{Error, Exit, Result};

/// A hypervisor: makes VMs.
pub trait Hypervisor: Send + Sync {
    /// Its kind of VM.
    type Vm: Vm;

    /// A short name for messages: `kvm`.
    fn name(&self) -> &'static str;

    /// Makes an empty VM: no memory, no vCPU, no interrupt controller.
    ///
    /// # Errors
    /// If the host gives none.
    fn create_vm(&self) -> Result<Self::Vm>;

    /// The most vCPUs a VM may have.
    fn max_vcpus(&self) -> u32;

    /// The CPUID leaves the host and the hypervisor can give a guest, unfiltered.
    ///
    /// # Errors
    /// If the hypervisor cannot tell.
    fn supported_cpuid(&self) -> Result<Vec<CpuidLeaf>>;

    /// What a saved vCPU is compared with before it is restored.
    ///
    /// # Errors
    /// If the hypervisor cannot tell.
    fn host_cpu(&self) -> Result<HostCpu> {
        Ok(HostCpu { cpuid: self.supported_cpuid()?, ..HostCpu::default() })
    }
}

bitflags! {
    /// How a region is mapped into a VM.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct MapFlags: u32 {
        /// The guest may not write; its writes are MMIO exits.
        const READ_ONLY = 1;
        /// The guest's writes are logged for [`DirtyLog`].
        const LOG_DIRTY = 2;
    }
}

/// First slot number that [`Vm::memory_slots`] takes; those below are for [`Vm::map`].
pub const DEVICE_SLOTS: u32 = 64;

/// A VM: guest-physical memory, vCPUs, and handles for what else the backend can do.
///
/// Order matters on some hypervisors, and one order is good for all: map memory, then ask for [`irq_chip`](Self::irq_chip),
/// then create vCPUs.
pub trait Vm: Send + Sync {
    /// Its kind of vCPU.
    type Vcpu: Vcpu + 'static;

    /// Maps `region` at its guest-physical address as `slot`. The VM keeps it alive until [`unmap`](Self::unmap) or drop.
    ///
    /// # Errors
    /// If the slot is taken, or the range overlaps another slot, or the host refuses.
    fn map(&self, slot: u32, region: Arc<Region>, flags: MapFlags) -> Result<()>;

    /// Takes the memory of `slot` away from the guest.
    ///
    /// # Errors
    /// If there is no such slot or the host refuses.
    fn unmap(&self, slot: u32) -> Result<Arc<Region>>;

    /// Makes vCPU `index` (on x86 also its APIC ID), in the state after reset; all but vCPU 0 wait for INIT and SIPI if
    /// there is an interrupt controller.
    ///
    /// # Errors
    /// If the index is taken or too large, or the host refuses.
    fn create_vcpu(&self, index: u32) -> Result<Self::Vcpu>;

    /// The interrupt controller inside the hypervisor, created by the first call; `None` if this backend has none.
    ///
    /// # Errors
    /// If vCPUs exist already or the host refuses.
    fn irq_chip(&self) -> Result<Option<Arc<dyn IrqChip>>> {
        Ok(None)
    }

    /// Doorbells, if this backend has them.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }

    /// Memory slots for devices, if memory can be added to a VM that runs. They are beside those of [`map`](Self::map), of which
    /// the first [`DEVICE_SLOTS`] only may be used then.
    fn memory_slots(&self) -> Option<Arc<dyn MemorySlots>> {
        None
    }

    /// The state that the hypervisor keeps beside memory and vCPUs, if it can be saved.
    fn state(&self) -> Option<&dyn SaveVm> {
        None
    }

    /// The log of pages the guest wrote, if this backend keeps one.
    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        None
    }
}

/// Which pages the guest wrote, for slots mapped with [`MapFlags::LOG_DIRTY`].
pub trait DirtyLog {
    /// Takes the bitmap of `slot` and clears it: one bit for each 4 KiB page, bit 0 of word 0 first.
    ///
    /// # Errors
    /// If the slot does not exist or is not logged.
    fn take(&self, slot: u32) -> Result<Vec<u64>>;

    /// The slots that the guest may write to, those of devices as well: slot, guest-physical address and length of each.
    fn slots(&self) -> Vec<(u32, u64, u64)>;

    /// Begins or ends the log of `slot`, which may be in use: as if it had been mapped with or without
    /// [`MapFlags::LOG_DIRTY`].
    ///
    /// # Errors
    /// If the slot does not exist or the host refuses.
    fn set_logging(&self, slot: u32, on: bool) -> Result<()>;
}

/// Saves and restores what a hypervisor keeps of a VM: interrupt controller, timer, clock. No vCPU may run meanwhile.
pub trait SaveVm {
    /// Reads the state.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn save(&self) -> Result<VmState>;

    /// Sets the state of the chips. Call it when the VM has its [`irq_chip`](Vm::irq_chip) and its vCPUs have their states.
    /// The state may come from anywhere.
    ///
    /// # Errors
    /// If the hypervisor refuses it, or the state has chips that this VM has not.
    fn restore(&self, state: &VmState) -> Result<()>;

    /// Sets the clock. Call it last, right before the vCPUs run again, and also when a VM that was paused for long goes on.
    ///
    /// # Errors
    /// If the hypervisor refuses it.
    fn set_clock(&self, clock: &ClockState, policy: ClockPolicy) -> Result<()>;
}

/// A virtual CPU. It belongs to whoever calls [`run`](Self::run), on any thread, one at a time.
pub trait Vcpu: CpuState + Send {
    /// Number of this vCPU in its VM.
    fn index(&self) -> u32;

    /// Enters the guest until something must be handled. What the returned [`Exit`] asks for is completed by the next call.
    ///
    /// # Errors
    /// If the hypervisor fails; the guest's own faults are exits.
    fn run(&mut self) -> Result<Exit<'_>>;

    /// Finishes the instruction of the last exit without going on in the guest, so that the state can be read or saved.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn complete_exit(&mut self) -> Result<()>;

    /// A handle by which other threads interrupt [`run`](Self::run).
    fn kicker(&self) -> Kicker;
}

/// Interrupts a vCPU.
pub trait Kick: Send + Sync {
    /// Makes the current or, if there is none, the next [`Vcpu::run`] return [`Exit::Interrupted`] soon.
    ///
    /// Never lost: set what the vCPU's owner should look at first, then kick.
    fn kick(&self);
}

/// A shared [`Kick`].
pub type Kicker = Arc<dyn Kick>;

/// The registers of a vCPU. Only to be used between two calls of [`Vcpu::run`].
pub trait CpuState {
    /// General registers.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn regs(&self) -> Result<Regs>;

    /// Sets the general registers.
    ///
    /// # Errors
    /// If the hypervisor fails or refuses the values.
    fn set_regs(&mut self, regs: &Regs) -> Result<()>;

    /// Segments, control registers, descriptor tables.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn special_regs(&self) -> Result<SpecialRegs>;

    /// Sets segments, control registers and descriptor tables.
    ///
    /// # Errors
    /// If the hypervisor fails or refuses the values.
    fn set_special_regs(&mut self, regs: &SpecialRegs) -> Result<()>;

    /// Sets what CPUID tells the guest; before the first `run`.
    ///
    /// # Errors
    /// If the hypervisor fails or refuses the leaves.
    fn set_cpuid(&mut self, leaves: &[CpuidLeaf]) -> Result<()>;

    /// Reads model-specific registers; `msrs` gives the indices and takes the values.
    ///
    /// # Errors
    /// If one of them cannot be read; the error names it.
    fn msrs(&self, msrs: &mut [Msr]) -> Result<()>;

    /// Writes model-specific registers, in order.
    ///
    /// # Errors
    /// If one of them cannot be written; the error names it.
    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()>;

    /// Everything of the vCPU that its guest can tell, to be restored into another. An exit that was not yet completed
    /// ([`Vcpu::complete_exit`]) would be lost.
    ///
    /// # Errors
    /// If the hypervisor fails, or cannot save a vCPU.
    fn save(&mut self) -> Result<VcpuState> {
        Err(Error::Unsupported("saving a vCPU"))
    }

    /// Becomes what was saved. Call it on a vCPU that did not run yet, when the VM has its interrupt controller and the
    /// guest's memory is mapped and filled. The state may come from anywhere.
    ///
    /// The time-stamp counter goes on from its saved value. vCPUs whose counters agreed when they were saved agree again if
    /// all are restored within a second.
    ///
    /// # Errors
    /// If the hypervisor refuses a part of it, which the error names. The vCPU is then of no use.
    fn restore(&mut self, state: &VcpuState) -> Result<()> {
        let _ = state;
        Err(Error::Unsupported("restoring a vCPU"))
    }

    /// Tells the guest, if it has a way to listen, that it was paused, so that its watchdogs do not take the time for a
    /// hang. Call it before a vCPU goes on that was paused; [`restore`](Self::restore) does it by itself.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn tell_paused(&mut self) -> Result<()> {
        Ok(())
    }

    /// Whether the vCPU runs or waits.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn mp_state(&self) -> Result<MpState>;

    /// Makes the vCPU run or wait.
    ///
    /// # Errors
    /// If the hypervisor fails.
    fn set_mp_state(&mut self, state: MpState) -> Result<()>;

    /// The local APIC's registers (1 KiB, as at `LAPIC_ADDR`), if there is one.
    ///
    /// # Errors
    /// If the hypervisor fails or there is none.
    fn lapic(&self) -> Result<[u8; 1024]>;

    /// Sets the local APIC's registers.
    ///
    /// # Errors
    /// As [`lapic`](Self::lapic).
    fn set_lapic(&mut self, lapic: &[u8; 1024]) -> Result<()>;
}
