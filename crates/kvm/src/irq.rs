//! The interrupt controllers inside KVM (two 8259 PICs, I/O APIC, local APICs), and irqfds as interrupts of devices.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use freestone_bus::{Irq, IrqChip, IrqTarget, MsiSource};
use freestone_hypervisor::{Error, Result};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::{call, io_error};
use crate::msi::{KvmMsi, KvmMsiSource};
use crate::system::Kvm;

/// Pins of KVM's I/O APIC.
pub(crate) const PINS: u32 = 24;

/// The in-kernel interrupt controller of one VM.
///
/// It holds the VM's descriptor, not the VM: nothing here touches guest memory.
pub(crate) struct KvmIrqChip {
    vm: Arc<VmFd>,
    kvm: Kvm,
    lines: Arc<Lines>,
    /// Whether there is a timer (PIT) with it.
    pub(crate) pit: bool,
    /// KVM is asked for it when a device wants it first.
    msi: OnceLock<Option<Arc<KvmMsi>>>,
}

/// Which lines have an irqfd, one bit each.
#[derive(Default)]
struct Lines(Mutex<u32>);

impl Lines {
    /// Whether `gsi` was free; it is taken now.
    fn take(&self, gsi: u32) -> bool {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = *taken & 1 << gsi == 0;
        *taken |= 1 << gsi;
        free
    }

    fn give_back(&self, gsi: u32) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) &= !(1 << gsi);
    }
}

impl KvmIrqChip {
    /// Creates the controllers, and the timer (PIT) where the host has one.
    pub(crate) fn create(vm: &Arc<VmFd>, kvm: &Kvm) -> Result<Self> {
        vm.create_irq_chip().map_err(|error| match error.errno() {
            libc::EEXIST => Error::InUse { what: "interrupt controller number", value: 0 },
            libc::EINVAL => Error::Unsupported(
                "an interrupt controller made after the first vCPU, or on this host at all,",
            ),
            _ => Error::Call { op: "KVM_CREATE_IRQCHIP", source: io_error(error) },
        })?;
        let pit = kvm.has_pit();
        if pit {
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(config).map_err(call("KVM_CREATE_PIT2"))?;
        }
        Ok(Self { vm: vm.clone(), kvm: kvm.clone(), lines: Arc::default(), pit, msi: OnceLock::new() })
    }
}

impl IrqChip for KvmIrqChip {
    fn pins(&self) -> u32 {
        PINS
    }

    fn edge(&self, gsi: u32) -> io::Result<Irq> {
        if gsi >= PINS {
            let text = format!("there is no interrupt line {gsi}: the I/O APIC has {PINS}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let fd = EventFd::new(EFD_NONBLOCK)?;
        if !self.lines.take(gsi) {
            let text = format!("interrupt line {gsi} has a device already");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        // From here on, dropping the claim frees the line.
        let mut irqfd = IrqFd { fd, gsi, bound: false, vm: self.vm.clone(), lines: self.lines.clone() };
        self.vm.register_irqfd(&irqfd.fd, gsi).map_err(io_error)?;
        irqfd.bound = true;
        Ok(Irq::new(irqfd))
    }

    fn msi(&self) -> Option<Arc<dyn MsiSource>> {
        let msi = self.msi.get_or_init(|| KvmMsi::new(&self.vm, self.kvm.irq_routes())).clone()?;
        Some(Arc::new(KvmMsiSource(msi)))
    }
}

/// A line that an eventfd raises, until this is dropped.
struct IrqFd {
    fd: EventFd,
    gsi: u32,
    bound: bool,
    vm: Arc<VmFd>,
    lines: Arc<Lines>,
}

impl IrqTarget for IrqFd {
    fn trigger(&self) -> io::Result<()> {
        self.fd.trigger()
    }

    fn eventfd(&self) -> Option<&EventFd> {
        Some(&self.fd)
    }
}

impl Drop for IrqFd {
    fn drop(&mut self) {
        if self.bound {
            // It can only fail if it is not bound; there would be nobody to tell.
            let _ = self.vm.unregister_irqfd(&self.fd, self.gsi);
        }
        self.lines.give_back(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_taken_once_until_given_back() {
        let lines = Lines::default();
        assert!(lines.take(23));
        assert!(!lines.take(23));
        assert!(lines.take(0));
        lines.give_back(23);
        assert!(lines.take(23));
        assert!(!lines.take(0));
    }
}
