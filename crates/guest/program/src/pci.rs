//! PCI devices on bus 0: configuration space by the table MCFG, and message-signalled interrupts.

use virtio_drivers::transport::pci::bus::{BarInfo, Command, ConfigurationAccess, DeviceFunction, PciRoot};

use crate::acpi::Acpi;
use crate::apic;
use crate::phys::{MAPPED, Register};

/// Capabilities (PCI 3.0, appendix H).
const VENDOR: u8 = 0x09;
const MSI_X: u8 = 0x11;
/// Type of the common configuration among virtio's capabilities (virtio 1.2, 4.1.4).
const COMMON: u8 = 1;
/// Registers of the common configuration (4.1.4.3): `config_msix_vector` is the word's other half below, `queue_select` the lower half
/// of its word, `queue_msix_vector` the upper half of its own.
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_MSIX_VECTOR: u64 = 0x1A;

/// Configuration space of one bus in memory.
#[derive(Debug, Clone, Copy)]
pub struct Ecam(u64);

impl Ecam {
    /// That of the first segment, from MCFG (PCI Firmware 3.3, 4.1.2).
    pub fn find(acpi: Option<&Acpi>) -> Option<Self> {
        let base = acpi?.table(b"MCFG")?.u64(44);
        (base != 0 && base + (1 << 20) <= MAPPED).then_some(Self(base))
    }

    fn register(self, function: DeviceFunction, offset: u8) -> Register {
        let (device, number) = (u64::from(function.device), u64::from(function.function));
        let at = self.0 + (device << 15 | number << 12 | u64::from(offset & !3));
        // SAFETY: MCFG says that configuration space is here, and `find` saw to it that all of bus 0 is mapped.
        unsafe { Register::new(at as u32) }
    }
}

impl ConfigurationAccess for Ecam {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        if function.bus == 0 { self.register(function, offset).read() } else { u32::MAX }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        if function.bus == 0 {
            self.register(function, offset).write(data);
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        *self
    }
}

/// The address of a memory BAR.
fn bar(root: &mut PciRoot<Ecam>, function: DeviceFunction, index: u8) -> Option<u64> {
    match root.bar_info(function, index) {
        Ok(Some(BarInfo::Memory { address, .. })) if address != 0 && address < MAPPED => Some(address),
        _ => None,
    }
}

/// Has the device's queues and configuration interrupt this processor at vector `32 + line` once [`Vectors::set`] was called.
#[derive(Debug)]
pub struct Vectors {
    common: u64,
}

impl Vectors {
    /// Fills entry 0 of the MSI-X table and enables MSI-X (PCI 3.0, 6.8.2).
    pub fn enable(ecam: Ecam, function: DeviceFunction, line: u32) -> Option<Self> {
        let mut root = PciRoot::new(ecam);
        root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
        let word = |offset| ecam.read_word(function, offset);
        let capability = |wanted: &dyn Fn(u8, u8) -> bool| {
            PciRoot::new(ecam)
                .capabilities(function)
                .find(|found| wanted(found.id, (found.private_header >> 8) as u8))
                .map(|found| found.offset)
        };
        let msix = capability(&|id, _| id == MSI_X)?;
        let table = word(msix + 4);
        let entry = bar(&mut root, function, (table & 7) as u8)? + u64::from(table & !7);
        // SAFETY: the capability says that the table is here, in a BAR that is mapped.
        let field = |at: u64| unsafe { Register::new((entry + at) as u32) };
        field(0).write(0xFEE0_0000 | apic::id() << 12);
        field(4).write(0);
        field(8).write(apic::VECTORS + line);
        field(12).write(0);
        let control = word(msix);
        let mut ecam = ecam;
        ecam.write_word(function, msix, control & !(1 << 30) | 1 << 31);
        let common = capability(&|id, kind| id == VENDOR && kind == COMMON)?;
        let at = bar(&mut root, function, word(common + 4) as u8)? + u64::from(word(common + 8));
        Some(Self { common: at })
    }

    /// Gives queue 0 vector 0; whether the device took it.
    pub fn set(&self) -> bool {
        // SAFETY: the capability says that the common configuration is here, in a BAR that is mapped.
        unsafe { write16(self.common + QUEUE_SELECT, 0) };
        // SAFETY: as above.
        unsafe { write16(self.common + QUEUE_MSIX_VECTOR, 0) };
        // SAFETY: as above.
        (unsafe { read16(self.common + QUEUE_MSIX_VECTOR) }) == 0
    }
}

/// # Safety
///
/// `at` is mapped and a device's register of 16 bits.
unsafe fn write16(at: u64, value: u16) {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance_mut::<u16>(at as usize).write_volatile(value) }
}

/// # Safety
///
/// `at` is mapped and a device's register of 16 bits.
unsafe fn read16(at: u64) -> u16 {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::with_exposed_provenance::<u16>(at as usize).read_volatile() }
}
