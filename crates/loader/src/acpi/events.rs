//! Devices that only tell of events: the generation ID of a virtual machine and the power button, and the generic event device
//! through whose interrupts they do (ACPI 6.5, sections 5.6.9 and 4.8.2.2.1.2).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, If, Interrupt, Method, Name, Notify, Package, Path, ResourceTemplate,
};

use super::AcpiConfig;

/// The generic event device.
const EVENT_DEVICE: &str = "GED0";
/// The generation ID.
const GENERATION_ID: &str = "VGEN";
/// The power button.
const POWER_BUTTON: &str = "PWRB";
/// What is notified: the generation ID changed, or the button was pressed (ACPI 6.5, table 5.163).
const CHANGED: u8 = 0x80;

/// Where a virtual machine's generation ID is, and how a guest learns that it changed (Microsoft's "Virtual Machine Generation
/// ID" of 2012).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerationId {
    /// Guest-physical address of the 16 bytes, in memory that is reserved.
    pub address: u64,
    /// Global system interrupt, edge-triggered, that tells of a change. No other device has it.
    pub gsi: u32,
}

/// The devices of `config` that tell of events: name, and interrupt.
fn sources(config: &AcpiConfig) -> Vec<(&'static str, u32)> {
    let generation = config.generation_id.map(|id| (GENERATION_ID, id.gsi));
    let button = config.power_button.map(|gsi| (POWER_BUTTON, gsi));
    generation.into_iter().chain(button).collect()
}

/// The names that [`build`] uses.
pub(super) fn names(config: &AcpiConfig) -> Vec<&'static str> {
    let sources = sources(config);
    let event_device = (!sources.is_empty()).then_some(EVENT_DEVICE);
    sources.into_iter().map(|(name, _)| name).chain(event_device).collect()
}

/// Appends the devices.
pub(super) fn build(config: &AcpiConfig, sink: &mut Vec<u8>) {
    if let Some(id) = config.generation_id {
        generation_id(id, sink);
    }
    if config.power_button.is_some() {
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
        Device::new(POWER_BUTTON.into(), vec![&hid]).to_aml_bytes(sink);
    }
    let sources = sources(config);
    if !sources.is_empty() {
        event_device(&sources, sink);
    }
}

/// Drivers find the device by a compatible ID: Microsoft's, which is longer than such IDs may be, or the one that Linux knows
/// beside it.
fn generation_id(GenerationId { address, .. }: GenerationId, sink: &mut Vec<u8>) {
    let (low, high) = (address & u64::from(u32::MAX), address >> 32);
    let children = [
        Name::new("_HID".into(), &"FRST0001"),
        Name::new("_CID".into(), &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
        Name::new("_DDN".into(), &"VM_Gen_Counter"),
        Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
    ];
    let children = children.iter().map(|child| -> &dyn Aml { child }).collect();
    Device::new(GENERATION_ID.into(), children).to_aml_bytes(sink);
}

/// The device whose interrupts are the events: `_EVT (gsi)` notifies whom each is about.
fn event_device(sources: &[(&str, u32)], sink: &mut Vec<u8>) {
    let interrupts: Vec<Interrupt> =
        sources.iter().map(|(_, gsi)| Interrupt::new(true, true, false, false, *gsi)).collect();
    let resources = ResourceTemplate::new(interrupts.iter().map(|line| -> &dyn Aml { line }).collect());
    let targets: Vec<Path> = sources.iter().map(|(name, _)| Path::new(&format!("\\_SB_.{name}"))).collect();
    let notes: Vec<Notify<'_>> = targets.iter().map(|path| Notify::new(path, &CHANGED)).collect();
    let matches: Vec<Equal<'_>> = sources.iter().map(|(_, gsi)| Equal::new(&Arg(0), gsi)).collect();
    let cases: Vec<If<'_>> =
        matches.iter().zip(&notes).map(|(when, note)| If::new(when, vec![note])).collect();
    let method = Method::new("_EVT".into(), 1, true, cases.iter().map(|case| -> &dyn Aml { case }).collect());
    let (hid, crs) = (Name::new("_HID".into(), &"ACPI0013"), Name::new("_CRS".into(), &resources));
    Device::new(EVENT_DEVICE.into(), vec![&hid, &crs, &method]).to_aml_bytes(sink);
}
