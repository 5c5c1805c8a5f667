//! ACPI tables for a hardware-reduced platform (ACPI 6.5): RSDP, XSDT, FADT, MADT, DSDT, and an MCFG if there is PCI.
//!
//! Data in, tables out. This module knows no device: the caller says which devices there are, by name, hardware ID and
//! resources, and they appear under `\_SB`. There is no SCI, no PM1 block and no FACS: power-off goes through the sleep
//! control register, reboot through the reset register. Linux uses neither the 8259 nor the PIT then, and takes the TSC
//! frequency from kvm-clock or CPUID.

mod dsdt;
mod events;
mod pci;
mod reset;
mod tables;

use freestone_memory::layout::{self, ACPI_TABLES};
use freestone_memory::{Bytes, GuestAddress, GuestMem};

use crate::{Error, Result};
pub use events::GenerationId;

/// Most processors that local APIC entries of the MADT can describe: APIC ID 255 means all.
pub const MAX_CPUS: u32 = 255;

/// When a device's interrupt line is active.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// Rising edge.
    Edge,
    /// High level.
    Level,
}

/// What a device occupies, for its `_CRS` (ACPI 6.5, 6.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Registers in memory.
    Mmio {
        /// Guest-physical address.
        base: u64,
        /// Length in bytes, not 0.
        len: u64,
    },
    /// I/O ports.
    Io {
        /// First port.
        base: u16,
        /// Number of ports, not 0.
        len: u16,
    },
    /// An interrupt.
    Irq {
        /// Global system interrupt number.
        gsi: u32,
        /// Trigger mode. The polarity is always active high.
        trigger: Trigger,
        /// Whether other devices use the same interrupt.
        shared: bool,
    },
}

/// A device of the namespace, `\_SB.NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AmlDevice {
    /// Name segment: four characters of A to Z, 0 to 9 and `_`, the first not a digit. Names must differ.
    pub name: String,
    /// Hardware ID: an EISA ID such as `PNP0501` or an ACPI ID such as `LNRO0005`.
    pub hid: String,
    /// `_UID`: tells devices with the same hardware ID apart.
    pub uid: Option<u32>,
    /// Compatible ID.
    pub cid: Option<String>,
    /// Current resources; with none there is no `_CRS`.
    pub resources: Vec<Resource>,
}

impl AmlDevice {
    /// A device with nothing but a name and a hardware ID.
    pub fn new(name: impl Into<String>, hid: impl Into<String>) -> Self {
        Self { name: name.into(), hid: hid.into(), uid: None, cid: None, resources: Vec::new() }
    }

    /// Sets the `_UID`.
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// Adds a resource.
    #[must_use]
    pub fn resource(mut self, resource: Resource) -> Self {
        self.resources.push(resource);
        self
    }
}

/// A PCI Express root in segment 0: a host bridge (`PNP0A08`) named `PCI0`, `PCI1` and so on, whose devices interrupt by
/// messages alone. Its configuration space is in the MCFG and reserved by another device, `ECM0` and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciRoot {
    /// Guest-physical address of the configuration space of `first_bus`, a multiple of 1 MiB; each bus has 1 MiB. Linux
    /// wants it below 4 GiB.
    pub ecam: u64,
    /// First bus: the one right behind the root.
    pub first_bus: u8,
    /// Last bus, not below the first.
    pub last_bus: u8,
    /// First guest-physical address of the window for base address registers.
    pub mmio_base: u64,
    /// Length of that window in bytes, not 0.
    pub mmio_len: u64,
}

/// The registers for power-off and reset (ACPI 6.5, 4.8.3.6 and 4.8.3.7). All are 8 bits wide, in I/O space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Power {
    /// Port of SLEEP_CONTROL_REG. To power off, the guest writes `s5_type << 2 | 0x20` to it. 0: the guest is told of no
    /// way to power off.
    pub sleep_control: u16,
    /// Port of SLEEP_STATUS_REG. Bit 7, WAK_STS, is cleared by writing 1 to it.
    pub sleep_status: u16,
    /// SLP_TYP of S5: 0 to 7.
    pub s5_type: u8,
    /// Port of RESET_REG and the value that resets, if there is one.
    pub reset: Option<(u16, u8)>,
}

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of processors, 1 to [`MAX_CPUS`]; their APIC IDs and processor UIDs are 0, 1, 2 and so on.
    pub cpus: u32,
    /// Guest-physical address of the I/O APIC, below 4 GiB. Its first interrupt is GSI 0.
    pub ioapic: u64,
    /// Guest-physical address of the local APICs, below 4 GiB.
    pub lapic: u64,
    /// Devices under `\_SB`.
    pub devices: Vec<AmlDevice>,
    /// PCI Express roots, at most 16, no two with the same bus. The first also answers at ports 0xcf8 to 0xcff.
    pub pci_roots: Vec<PciRoot>,
    /// Power-off and reset.
    pub power: Power,
    /// The generation ID of the virtual machine, if it has one.
    pub generation_id: Option<GenerationId>,
    /// Global system interrupt of the power button, edge-triggered, if there is one.
    pub power_button: Option<u32>,
    /// Whether a guest should look for an i8042 keyboard controller.
    pub has_i8042: bool,
    /// Whether there is a CMOS real-time clock at ports 0x70 and 0x71.
    pub has_cmos: bool,
    /// CMOS register of the century, when the clock has one.
    pub cmos_century: Option<u8>,
}

impl Default for AcpiConfig {
    /// One processor, the APICs at their usual addresses, nothing else.
    fn default() -> Self {
        Self {
            cpus: 1,
            ioapic: layout::IOAPIC_ADDR,
            lapic: layout::LAPIC_ADDR,
            devices: Vec::new(),
            pci_roots: Vec::new(),
            power: Power::default(),
            generation_id: None,
            power_button: None,
            has_i8042: false,
            has_cmos: false,
            cmos_century: None,
        }
    }
}

/// Builds the tables and writes them at [`ACPI_TABLES`], in one write. Answers the address of the RSDP.
///
/// When there is a reset register, a few bytes of code that use it are put at the real-mode reset vector, F000:FFF0.
/// Linux on a hardware-reduced platform does not always use the register itself: built with EFI support but started
/// without EFI, it jumps to that address.
///
/// # Errors
/// [`Error::Acpi`] for what the tables cannot describe, [`Error::BootDataTooLarge`] when they do not fit below the reset
/// vector, [`Error::Write`] when there is no RAM there.
pub fn write_acpi(mem: &GuestMem, config: &AcpiConfig) -> Result<u64> {
    let blob = tables::build(config, ACPI_TABLES)?;
    let max = usize::try_from(reset::VECTOR - ACPI_TABLES).unwrap_or(usize::MAX);
    let len = blob.len();
    if len > max {
        return Err(Error::BootDataTooLarge { what: "ACPI tables", len, max });
    }
    write(mem, "ACPI tables", &blob, ACPI_TABLES)?;
    if let Some((port, value)) = config.power.reset {
        write(mem, "reset code", &reset::code(port, value), reset::VECTOR)?;
    }
    Ok(ACPI_TABLES)
}

fn write(mem: &GuestMem, what: &'static str, bytes: &[u8], gpa: u64) -> Result<()> {
    let len = bytes.len();
    mem.view().write_slice(bytes, GuestAddress(gpa)).map_err(|source| Error::Write { what, gpa, len, source })
}

/// The error for something that cannot be described.
fn refuse(what: &'static str, value: impl ToString, problem: &'static str) -> Error {
    Error::Acpi { what, value: value.to_string(), problem }
}
