//! The fixed tables and their arrangement: RSDP, XSDT, DSDT, FADT, MADT and MCFG, one after the other.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, fadt};

use super::{AcpiConfig, MAX_CPUS, Power, dsdt, pci, refuse};
use crate::{Error, Result};

pub(super) const OEM_ID: [u8; 6] = *b"FRESTN";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"FREESTON";
pub(super) const OEM_REVISION: u32 = 1;

/// Alignment of each table; the RSDP needs 16 bytes (ACPI 6.5, 5.2.5.1), the rest is for tidiness.
const ALIGN: usize = 16;

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11). Bit 3, "MSI not supported", stays clear: PCI devices interrupt by messages.
const LEGACY_DEVICES: u16 = 1 << 0;
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// All tables for `base`, as one piece that begins with the RSDP.
pub(super) fn build(config: &AcpiConfig, base: u64) -> Result<Vec<u8>> {
    pci::check(&config.pci_roots)?;
    let mut tables = Vec::with_capacity(0x1000);
    // Their addresses point onwards, so leave room for the RSDP and the XSDT and fill them in last.
    let xsdt_at = Rsdp::len().next_multiple_of(ALIGN);
    let xsdt_len = 36 + 8 * if config.pci_roots.is_empty() { 2 } else { 3 };
    tables.resize(xsdt_at + xsdt_len, 0);

    let dsdt = append(&mut tables, base, |sink| dsdt::build(config, sink))?;
    let fadt = append(&mut tables, base, |sink| {
        fadt(config, dsdt).to_aml_bytes(sink);
        Ok(())
    })?;
    let madt = append(&mut tables, base, |sink| {
        madt(config)?.to_aml_bytes(sink);
        Ok(())
    })?;

    let mcfg = if config.pci_roots.is_empty() {
        None
    } else {
        Some(append(&mut tables, base, |sink| {
            pci::mcfg(&config.pci_roots).to_aml_bytes(sink);
            Ok(())
        })?)
    };

    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(mcfg) = mcfg {
        xsdt.add_entry(mcfg);
    }
    let mut front = Vec::with_capacity(xsdt_at + xsdt_len);
    Rsdp::new(OEM_ID, address(base, xsdt_at)?).to_aml_bytes(&mut front);
    front.resize(xsdt_at, 0);
    xsdt.to_aml_bytes(&mut front);
    for (to, from) in tables.iter_mut().zip(&front) {
        *to = *from;
    }
    Ok(tables)
}

/// Appends a table and answers its guest-physical address.
fn append(tables: &mut Vec<u8>, base: u64, build: impl FnOnce(&mut Vec<u8>) -> Result<()>) -> Result<u64> {
    let at = tables.len().next_multiple_of(ALIGN);
    tables.resize(at, 0);
    build(tables)?;
    address(base, at)
}

fn address(base: u64, offset: usize) -> Result<u64> {
    let too_large = || Error::BootDataTooLarge { what: "ACPI tables", len: offset, max: usize::MAX };
    u64::try_from(offset).ok().and_then(|offset| base.checked_add(offset)).ok_or_else(too_large)
}

/// Fixed ACPI description table (ACPI 6.5, 5.2.9).
fn fadt(config: &AcpiConfig, dsdt: u64) -> fadt::FADT {
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // There are no fixed power and sleep buttons, and the clock wakes nobody.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc);
    let mut boot_arch = LEGACY_DEVICES | NO_VGA;
    if config.has_i8042 {
        boot_arch |= HAS_8042;
    }
    if config.has_cmos {
        table.century = config.cmos_century.unwrap_or(0);
    } else {
        boot_arch |= NO_CMOS_RTC;
    }
    table.iapc_boot_arch = boot_arch.into();

    let Power { sleep_control, sleep_status, reset, .. } = config.power;
    if sleep_control != 0 {
        table.sleep_control_reg = port(sleep_control);
        table.sleep_status_reg = port(sleep_status);
    }
    if let Some((reset_port, value)) = reset {
        table = table.flag(Flags::ResetRegSup);
        table.reset_reg = port(reset_port);
        table.reset_value = value;
    }
    table.finalize()
}

/// An 8-bit register in I/O space.
fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// Multiple APIC description table (ACPI 6.5, 5.2.12).
fn madt(config: &AcpiConfig) -> Result<MADT> {
    let cpus = u8::try_from(config.cpus)
        .ok()
        .filter(|n| (1..=MAX_CPUS).contains(&u32::from(*n)))
        .ok_or_else(|| refuse("number of processors", config.cpus, "is not 1 to 255"))?;
    let lapic = low("local APIC address", config.lapic)?;
    let ioapic = low("I/O APIC address", config.ioapic)?;
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(lapic));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, ioapic, 0));
    Ok(madt)
}

fn low(what: &'static str, address: u64) -> Result<u32> {
    u32::try_from(address).map_err(|_| refuse(what, format!("{address:#x}"), "is not below 4 GiB"))
}
