//! The differentiated system description table: `_S5_`, processors, PCI roots and devices in AML.
//!
//! acpi_tables panics on names it cannot encode, so every name is checked here first.

use std::collections::HashSet;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use super::{AcpiConfig, AmlDevice, Resource, Trigger, events, pci, refuse};
use crate::Result;

/// Length of the header that all tables but the RSDP have.
const HEADER_LEN: u32 = 36;
/// 2: integers are 64 bits wide.
const REVISION: u8 = 2;

/// Appends the whole table.
pub(super) fn build(config: &AcpiConfig, sink: &mut Vec<u8>) -> Result<()> {
    let mut aml = Vec::new();
    if config.power.sleep_control != 0 {
        s5(config.power.s5_type)?.to_aml_bytes(&mut aml);
    }
    let mut names = HashSet::new();
    let mut devices: Vec<u8> = Vec::new();
    for id in 0..config.cpus.min(super::MAX_CPUS) {
        // The namespace has a device for each processor of the MADT, with the same UID (ACPI 6.5, 5.2.12.2).
        let cpu = AmlDevice::new(format!("C{id:03X}"), "ACPI0007").uid(id);
        add_device(&cpu, &mut names, &mut devices)?;
    }
    for (number, root) in (0..).zip(&config.pci_roots) {
        claim_name(&pci::bridge_name(number), &mut names)?;
        pci::bridge(number, root, &mut devices)?;
        add_device(&pci::ecam_device(number, root), &mut names, &mut devices)?;
    }
    for name in events::names(config) {
        claim_name(name, &mut names)?;
    }
    events::build(config, &mut devices);
    for device in &config.devices {
        add_device(device, &mut names, &mut devices)?;
    }
    aml.append(&mut Scope::raw("\\_SB_".into(), devices));

    let mut table = Sdt::new(*b"DSDT", HEADER_LEN, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    sink.extend_from_slice(table.as_slice());
    Ok(())
}

/// `Name (_S5_, Package () {SLP_TYPa, SLP_TYPb, 0, 0})` (ACPI 6.5, 7.4.2).
fn s5(kind: u8) -> Result<Name> {
    if kind > 7 {
        return Err(refuse("sleep type of S5", kind, "is not 0 to 7"));
    }
    Ok(Name::new("_S5_".into(), &Package::new(vec![&kind, &kind, &ZERO, &ZERO])))
}

fn add_device(device: &AmlDevice, names: &mut HashSet<String>, sink: &mut Vec<u8>) -> Result<()> {
    check_name(&device.name)?;
    claim_name(&device.name, names)?;
    let mut children = vec![Name::new("_HID".into(), &*id(&device.hid)?)];
    if let Some(uid) = device.uid {
        children.push(Name::new("_UID".into(), &uid));
    }
    if let Some(cid) = &device.cid {
        children.push(Name::new("_CID".into(), &*id(cid)?));
    }
    if !device.resources.is_empty() {
        let descriptors = device.resources.iter().map(descriptor).collect::<Result<Vec<_>>>()?;
        let template = ResourceTemplate::new(descriptors.iter().map(|d| &**d).collect());
        children.push(Name::new("_CRS".into(), &template));
    }
    let children = children.iter().map(|child| -> &dyn Aml { child }).collect();
    Device::new(device.name.as_str().into(), children).to_aml_bytes(sink);
    Ok(())
}

fn claim_name(name: &str, names: &mut HashSet<String>) -> Result<()> {
    if names.insert(name.to_owned()) { Ok(()) } else { Err(refuse("device name", name, "is used twice")) }
}

/// A name segment (ACPI 6.5, 20.2.2). A leading underscore is left to the specification's own names.
fn check_name(name: &str) -> Result<()> {
    let ok = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
    match name.as_bytes() {
        bytes @ [b'A'..=b'Z', _, _, _] if bytes.iter().all(|&b| ok(b)) => Ok(()),
        _ => Err(refuse("device name", name, "is not four of A to Z, 0 to 9 and _, beginning with a letter")),
    }
}

/// A hardware ID: the packed form for EISA IDs, a string for ACPI IDs (ACPI 6.5, 6.1.5).
fn id(id: &str) -> Result<Box<dyn Aml>> {
    let bytes = id.as_bytes();
    let upper_hex = |b: &u8| b.is_ascii_digit() || matches!(b, b'A'..=b'F');
    let (vendor, number) = bytes.split_at_checked(bytes.len().saturating_sub(4)).unwrap_or_default();
    if !number.iter().all(upper_hex) {
        return Err(refuse("hardware ID", id, "does not end in four upper-case hexadecimal digits"));
    }
    if vendor.len() == 3 && vendor.iter().all(u8::is_ascii_uppercase) {
        return Ok(Box::new(EISAName::new(id)));
    }
    if vendor.len() == 4 && vendor.iter().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()) {
        return Ok(Box::new(id.to_owned()));
    }
    Err(refuse("hardware ID", id, "is neither an EISA ID (PNP0501) nor an ACPI ID (LNRO0005)"))
}

/// A resource descriptor (ACPI 6.5, 6.4.2 and 6.4.3).
fn descriptor(resource: &Resource) -> Result<Box<dyn Aml>> {
    match *resource {
        Resource::Mmio { base, len } => {
            let last = len.checked_sub(1).and_then(|n| base.checked_add(n));
            let Some(last) = last else {
                let value = format!("{base:#x}+{len:#x}");
                return Err(refuse("memory range", value, "is empty or wraps around the address space"));
            };
            Ok(match (u32::try_from(base), u32::try_from(len), u32::try_from(last)) {
                (Ok(base), Ok(len), Ok(_)) => Box::new(Memory32Fixed::new(true, base, len)),
                _ => Box::new(Consumed(AddressSpace::<u64>::new_memory(
                    AddressSpaceCacheable::NotCacheable,
                    true,
                    base,
                    last,
                    None,
                ))),
            })
        }
        Resource::Io { base, len } => {
            let Some(last) = len.checked_sub(1).and_then(|n| base.checked_add(n)) else {
                let value = format!("{base:#x}+{len:#x}");
                return Err(refuse("I/O port range", value, "is empty or goes beyond port 0xffff"));
            };
            Ok(match u8::try_from(len) {
                Ok(len) => Box::new(IO::new(base, base, 1, len)),
                Err(_) => Box::new(Consumed(AddressSpace::<u16>::new_io(base, last, None))),
            })
        }
        Resource::Irq { gsi, trigger, shared } => {
            Ok(Box::new(Interrupt::new(true, trigger == Trigger::Edge, false, shared, gsi)))
        }
    }
}

/// An address space descriptor of a device. acpi_tables makes them as bridges have them: ranges to hand on.
struct Consumed<T>(T);

impl<T: Aml> Aml for Consumed<T> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut bytes = Vec::new();
        self.0.to_aml_bytes(&mut bytes);
        // Bit 0 of the general flags: this device consumes the resource (ACPI 6.5, 6.4.3.5).
        if let Some(flags) = bytes.get_mut(4) {
            *flags |= 1;
        }
        sink.vec(&bytes);
    }
}
