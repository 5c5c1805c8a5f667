//! The checks of PCI functions find the defects they are for: a good device behind a function that spoils what passes.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::TestImage;
use freestone_bus::pci::PciFunction;
use freestone_bus::{Device, Plug, Wiring};
use freestone_testkit::conformance::{self, PCI_CHECKS};
use freestone_virtio::{Block, BlockConfig, Transport, VirtioPlug};

/// What a function may do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Defect {
    None,
    Revision0,
    InterruptPin,
    EndlessCapabilities,
    OverlappingParts,
    PartBeyondBar,
    IdCanBeWritten,
    BarStays,
    AlwaysDecoded,
    DeadWindow,
    NeverMasked,
}

/// The window is the fifth capability of virtio, 16 + 20 + 16 + 16 bytes behind the first; the data are at its end.
const WINDOW_DATA: u16 = 0x40 + 68 + 16;
/// The message control of MSI-X, which is the last capability.
const MSIX_CONTROL: u16 = WINDOW_DATA + 4 + 2;
/// The offset in the capability of the interrupt status.
const ISR_OFFSET: u16 = 0x40 + 36 + 8;

struct Spoiled {
    function: Arc<dyn PciFunction>,
    defect: Defect,
}

impl PciFunction for Spoiled {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.function.read_config(offset, data);
        match (self.defect, offset, data) {
            (Defect::Revision0, 0x08, data) => data[0] = 0,
            (Defect::InterruptPin, 0x3d, data) => data[0] = 1,
            (Defect::EndlessCapabilities, 0x41, data) => data[0] = 0x40,
            (Defect::OverlappingParts, ISR_OFFSET, data) => data.fill(0),
            (Defect::PartBeyondBar, ISR_OFFSET, data) => data.copy_from_slice(&[0, 0, 1, 0]),
            (Defect::DeadWindow, WINDOW_DATA, data) => data.fill(0),
            _ => {}
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        match (self.defect, offset) {
            (Defect::BarStays, 0x10) => {}
            (Defect::AlwaysDecoded, 0x04) => self.function.write_config(4, &[6, 0]),
            (Defect::NeverMasked, MSIX_CONTROL) => self.function.write_config(offset, &[0, 0x80]),
            _ => self.function.write_config(offset, data),
        }
    }
}

/// The ID of a function whose ID can be written: what was written last.
struct Forgetful(Arc<dyn PciFunction>, std::sync::Mutex<Option<Vec<u8>>>);

impl PciFunction for Forgetful {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.0.read_config(offset, data);
        if let (0, 4, Some(id)) = (offset, data.len(), &*self.1.lock().unwrap()) {
            data.copy_from_slice(id);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        if (offset, data.len()) == (0, 4) {
            *self.1.lock().unwrap() = Some(data.to_vec());
        }
        self.0.write_config(offset, data);
    }
}

struct SpoiledPlug(Defect);

impl Plug for SpoiledPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let disk = Block::new(TestImage::new(128), BlockConfig::new().poll(Duration::ZERO));
        let device = Box::new(VirtioPlug::new(Transport::Pci, disk, "disk")).plug(wiring)?;
        let segment = wiring.pci().unwrap();
        let function = segment.remove(segment.addresses().pop().unwrap()).unwrap();
        let spoiled: Arc<dyn PciFunction> = match self.0 {
            Defect::IdCanBeWritten => Arc::new(Forgetful(function, std::sync::Mutex::default())),
            defect => Arc::new(Spoiled { function, defect }),
        };
        segment.insert("spoiled", spoiled)?;
        Ok(device)
    }
}

#[test]
fn a_function_without_defect_passes_all_checks() {
    conformance::virtio_pci(|| Box::new(SpoiledPlug(Defect::None))).unwrap();
}

#[test]
fn each_defect_is_found_by_the_check_that_is_for_it() {
    let cases = [
        (Defect::Revision0, "describes_itself"),
        (Defect::InterruptPin, "describes_itself"),
        (Defect::EndlessCapabilities, "describes_itself"),
        (Defect::OverlappingParts, "describes_itself"),
        (Defect::PartBeyondBar, "describes_itself"),
        (Defect::IdCanBeWritten, "survives_function_accesses"),
        (Defect::BarStays, "follows_its_bar"),
        (Defect::AlwaysDecoded, "follows_its_bar"),
        (Defect::DeadWindow, "opens_a_window"),
        (Defect::NeverMasked, "delivers_what_waited_behind_a_mask"),
    ];
    for (defect, name) in cases {
        let (_, check) = PCI_CHECKS.iter().find(|(n, _)| *n == name).unwrap();
        check(&|| Box::new(SpoiledPlug(defect))).expect_err(&format!("{defect:?} is not found by {name}"));
    }
}
