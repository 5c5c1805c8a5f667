//! What a snapshot says of the machine itself.

use freestone_memory::image::ImageLayout;
use freestone_memory::layout::RamRange;
use freestone_memory::{GuestMem, GuestMemoryRegion};
use freestone_snapshot::Section;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The most vCPUs and the most ranges of RAM that a snapshot is believed to have.
const MAX_CPUS: u32 = 4096;
const MAX_RANGES: usize = 64;

/// The shape of a machine: section `machine`. Read it to know what to build before [restoring](crate::MachineBuilder::restore).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSection {
    cpus: u32,
    /// Guest-physical address and length in bytes of each range of the RAM that the machine was started with.
    ram: Vec<(u64, u64)>,
    irq_chip: bool,
}

impl Section for MachineSection {
    const NAME: &'static str = "machine";
    const VERSION: u32 = 1;
}

impl MachineSection {
    pub(crate) fn new(cpus: usize, memory: &GuestMem, irq_chip: bool) -> Self {
        let ram = memory.regions().iter().map(|region| (region.start_addr().0, region.len())).collect();
        Self { cpus: u32::try_from(cpus).unwrap_or(u32::MAX), ram, irq_chip }
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// The RAM that the machine was started with. Its ranges are for [`freestone_memory::GuestMemBuilder`] to check.
    pub fn ram(&self) -> Vec<RamRange> {
        self.ram.iter().map(|&(start, len)| RamRange { start, len }).collect()
    }

    /// Whether the hypervisor has the interrupt controller.
    pub fn irq_chip(&self) -> bool {
        self.irq_chip
    }

    /// Fails unless an image of this layout begins with the RAM, so that it can be mapped.
    pub(crate) fn check_layout(&self, layout: &ImageLayout) -> Result<()> {
        let begins = self.ram.len() <= MAX_RANGES
            && layout.ranges().len() >= self.ram.len()
            && layout.ranges().zip(&self.ram).all(|(a, &(start, len))| (a.start, a.len) == (start, len));
        if begins && !self.ram.is_empty() {
            return Ok(());
        }
        let found: Vec<_> = layout.ranges().take(MAX_RANGES).map(|range| (range.start, range.len)).collect();
        Err(Error::Differs { what: "layout of RAM", saved: show(&self.ram), built: show(&found) })
    }

    /// Fails if there are more vCPUs than any machine has.
    pub(crate) fn check_cpus(&self) -> Result<()> {
        if (1..=MAX_CPUS).contains(&self.cpus) {
            return Ok(());
        }
        let (saved, built) = (self.cpus.to_string(), format!("1 to {MAX_CPUS}"));
        Err(Error::Differs { what: "number of vCPUs", saved, built })
    }

    /// Fails unless a machine of the shape `built` can become the one that was saved.
    pub(crate) fn check(&self, built: &Self) -> Result<()> {
        let differs = |what, saved: String, built: String| Err(Error::Differs { what, saved, built });
        if self.cpus != built.cpus || self.cpus > MAX_CPUS {
            return differs("number of vCPUs", self.cpus.to_string(), built.cpus.to_string());
        }
        if self.ram != built.ram || self.ram.len() > MAX_RANGES {
            return differs("layout of RAM", show(&self.ram), show(&built.ram));
        }
        if self.irq_chip != built.irq_chip {
            return differs("interrupt controller", has(self.irq_chip), has(built.irq_chip));
        }
        Ok(())
    }
}

fn has(chip: bool) -> String {
    if chip { "one in the hypervisor" } else { "none in the hypervisor" }.to_owned()
}

fn show(ram: &[(u64, u64)]) -> String {
    let ranges: Vec<_> =
        ram.iter().take(4).map(|(start, len)| format!("{len:#x} bytes at {start:#x}")).collect();
    if ram.len() > 4 {
        format!("{} and {} more", ranges.join(", "), ram.len() - 4)
    } else {
        ranges.join(", ")
    }
}
