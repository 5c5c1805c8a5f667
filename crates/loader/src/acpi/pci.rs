//! PCI Express roots: the MCFG, and for each root two devices of the namespace.
//!
//! The host bridge says which buses and addresses it hands on. Another device holds the configuration space, because an
//! operating system believes the MCFG only if that memory is reserved as well (PCI Firmware 3.3, section 4.1.2). There is no
//! `_PRT`: devices interrupt by messages.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Name, ResourceTemplate, ZERO,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::{Aml, AmlSink};

use super::tables::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use super::{AmlDevice, PciRoot, Resource, refuse};
use crate::Result;

/// Configuration space of one bus: 32 devices of 8 functions with 4 KiB each.
const BUS_LEN: u64 = 1 << 20;
/// All roots are in this segment.
const SEGMENT: u16 = 0;
/// The ports of the other way to configuration space.
const CONFIG_PORTS: (u16, u8) = (0xcf8, 8);
/// Roots that have a name: `PCI0` to `PCIF`.
const MAX_ROOTS: usize = 16;

/// Refuses what cannot be described.
pub(super) fn check(roots: &[PciRoot]) -> Result<()> {
    if roots.len() > MAX_ROOTS {
        return Err(refuse("number of PCI roots", roots.len(), "is more than 16"));
    }
    for (number, root) in roots.iter().enumerate() {
        let ecam = format!("{:#x}", root.ecam);
        if !root.ecam.is_multiple_of(BUS_LEN) {
            return Err(refuse("PCI configuration space", ecam, "is not a multiple of 1 MiB"));
        }
        let buses = format!("{:#x} to {:#x}", root.first_bus, root.last_bus);
        if root.first_bus > root.last_bus {
            return Err(refuse("PCI bus range", buses, "is empty"));
        }
        if bus_0(root).is_none() || root.ecam.checked_add(ecam_len(root)).is_none() {
            return Err(refuse(
                "PCI configuration space",
                ecam,
                "has buses below address 0 or beyond 64 bits",
            ));
        }
        window(root)?;
        let overlaps = |other: &PciRoot| other.first_bus <= root.last_bus && root.first_bus <= other.last_bus;
        if roots.iter().take(number).any(overlaps) {
            return Err(refuse("PCI bus range", buses, "is in part that of another root"));
        }
    }
    Ok(())
}

/// Where bus 0 would have its configuration space: that is what the MCFG gives.
fn bus_0(root: &PciRoot) -> Option<u64> {
    root.ecam.checked_sub(u64::from(root.first_bus) * BUS_LEN)
}

fn ecam_len(root: &PciRoot) -> u64 {
    (u64::from(root.last_bus.saturating_sub(root.first_bus)) + 1) * BUS_LEN
}

/// First and last address of the memory window.
fn window(root: &PciRoot) -> Result<(u64, u64)> {
    let last = root.mmio_len.checked_sub(1).and_then(|n| root.mmio_base.checked_add(n));
    last.map(|last| (root.mmio_base, last)).ok_or_else(|| {
        let value = format!("{:#x}+{:#x}", root.mmio_base, root.mmio_len);
        refuse("PCI memory window", value, "is empty or wraps around the address space")
    })
}

/// The memory-mapped configuration table (PCI Firmware 3.3, table 4-2). The roots have been checked.
pub(super) fn mcfg(roots: &[PciRoot]) -> MCFG {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for root in roots {
        table.add_ecam(bus_0(root).unwrap_or_default(), SEGMENT, root.first_bus, root.last_bus);
    }
    table
}

/// The device that holds the configuration space of root `number` (`PNP0C02`: motherboard resources).
pub(super) fn ecam_device(number: u8, root: &PciRoot) -> AmlDevice {
    AmlDevice::new(format!("ECM{number:X}"), "PNP0C02")
        .uid(number.into())
        .resource(Resource::Mmio { base: root.ecam, len: ecam_len(root) })
}

/// Name of the host bridge of root `number`.
pub(super) fn bridge_name(number: u8) -> String {
    format!("PCI{number:X}")
}

/// Appends the host bridge of root `number` (ACPI 6.5, 6.5.5 `_BBN`, 6.5.6 `_SEG`, 6.4.3.5 for its `_CRS`).
pub(super) fn bridge(number: u8, root: &PciRoot, sink: &mut dyn AmlSink) -> Result<()> {
    let buses = AddressSpace::<u16>::new_bus_number(root.first_bus.into(), root.last_bus.into());
    let (port, ports) = CONFIG_PORTS;
    let config = IO::new(port, port, 1, ports);
    let (first, last) = window(root)?;
    let uncached = AddressSpaceCacheable::NotCacheable;
    let window: Box<dyn Aml> = match (u32::try_from(first), u32::try_from(last)) {
        // The descriptor holds the length in 32 bits as well.
        (Ok(first), Ok(last)) if root.mmio_len <= u32::MAX.into() => {
            Box::new(AddressSpace::new_memory(uncached, true, first, last, None))
        }
        _ => Box::new(AddressSpace::new_memory(uncached, true, first, last, None)),
    };
    let mut resources: Vec<&dyn Aml> = vec![&buses];
    // The first root answers at the ports; there is one pair of them.
    if number == 0 {
        resources.push(&config);
    }
    resources.push(&*window);
    let fields = [
        Name::new("_HID".into(), &EISAName::new("PNP0A08")),
        Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        Name::new("_SEG".into(), &ZERO),
        Name::new("_BBN".into(), &root.first_bus),
        Name::new("_UID".into(), &number),
        Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
    ];
    let fields = fields.iter().map(|field| -> &dyn Aml { field }).collect();
    Device::new(bridge_name(number).as_str().into(), fields).to_aml_bytes(sink);
    Ok(())
}
