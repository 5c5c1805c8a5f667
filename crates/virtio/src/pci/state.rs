//! What a function saves, and how it becomes that again: by the ways on which a guest's writes go.

use freestone_bus::pci::{ConfigState, MsixState, PciAddress};
use freestone_bus::{Error as BusError, Result as BusResult};
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::PciTransport;
use super::registers::{ISR_CONFIG, ISR_QUEUE, NO_VECTOR};

/// What the transport adds to [`CoreState`](crate::transport::state::CoreState): the section `virtio-pci`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// Bus, device and function, where the transport was plugged in.
    pub address: Option<(u8, u8, u8)>,
    /// The configuration space, with the window into the BAR.
    pub config: ConfigState,
    /// Where BAR 0 is on the bus: nowhere, or where its register says.
    pub bar: Option<u64>,
    /// The MSI-X table and pending bits.
    pub msix: MsixState,
    /// The interrupt status register.
    pub isr: u8,
    /// Vector of configuration changes.
    pub config_vector: u16,
    /// Vector of each queue.
    pub queue_vectors: Vec<u16>,
}

impl Section for PciState {
    const NAME: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
}

fn triple(address: PciAddress) -> (u8, u8, u8) {
    (address.bus, address.device, address.function)
}

/// As in configuration accesses: bus, device and function.
fn number(address: Option<(u8, u8, u8)>) -> u64 {
    let pack = |(bus, device, function)| u64::from(u32::from_be_bytes([0, bus, device, function]));
    address.map_or(u64::MAX, pack)
}

impl PciTransport {
    /// Writes the section `virtio-pci`, and as [`DeviceCore::save`](crate::DeviceCore::save).
    ///
    /// # Errors
    /// As [`DeviceCore::save`](crate::DeviceCore::save).
    pub fn save(&self, state: &mut Saving<'_>) -> BusResult<()> {
        self.save_at(None, state)
    }

    /// As [`DeviceCore::restore`](crate::DeviceCore::restore). The configuration space must be that of the same device.
    ///
    /// # Errors
    /// As [`DeviceCore::restore`](crate::DeviceCore::restore).
    pub fn restore(&self, state: &mut Restoring<'_>) -> BusResult<()> {
        self.restore_at(None, state)
    }

    pub(super) fn save_at(&self, address: Option<PciAddress>, state: &mut Saving<'_>) -> BusResult<()> {
        let function = self.lock();
        let core = self.registers.lock();
        let shared = &self.registers.shared;
        let (isr, config_vector, queue_vectors) = shared.interrupts();
        let saved = PciState {
            address: address.map(triple),
            config: function.space.save(),
            bar: function.bar.address(),
            msix: shared.msix.save(),
            isr,
            config_vector,
            queue_vectors,
        };
        state.put(&saved).map_err(BusError::state("save"))?;
        core.save(state)
    }

    pub(super) fn restore_at(&self, address: Option<PciAddress>, state: &mut Restoring<'_>) -> BusResult<()> {
        let device = state.instance().to_owned();
        let saved: PciState = state.take().map_err(BusError::state("restore"))?;
        let bad = |(what, value)| BusError::BadState { device: device.clone(), what, value };
        self.check(&saved, address).map_err(bad)?;
        let mut function = self.lock();
        let shared = &self.registers.shared;
        // The vectors are closed until the message control says otherwise.
        shared.msix.restore(&device, &saved.msix)?;
        shared.set_interrupts(saved.isr, saved.config_vector, &saved.queue_vectors);
        function.space.restore(&device, &saved.config)?;
        function.set_msix(&self.registers);
        if saved.bar.is_some() && saved.bar != function.decoded() {
            return Err(bad(("address of BAR 0, which its register does not say,", saved.bar.unwrap_or(0))));
        }
        // Doorbells are bound with the queues, which come last: the BAR must be in its place.
        function.map(saved.bar, &self.registers);
        if function.bar.address() != saved.bar {
            return Err(bad(("address of BAR 0, which is taken or out of reach,", saved.bar.unwrap_or(0))));
        }
        self.registers.lock().restore(state)
    }

    /// What can be checked without changing anything.
    fn check(&self, saved: &PciState, address: Option<PciAddress>) -> Result<(), (&'static str, u64)> {
        let shared = &self.registers.shared;
        let (_, _, queues) = shared.interrupts();
        let vectors = saved.queue_vectors.iter().chain([&saved.config_vector]);
        let unknown = vectors.copied().find(|&vector| vector != NO_VECTOR && vector >= shared.msix.count());
        let rules = [
            (saved.address == address.map(triple), "PCI address", number(saved.address)),
            (saved.isr & !(ISR_QUEUE | ISR_CONFIG) == 0, "interrupt status", saved.isr.into()),
            (
                saved.queue_vectors.len() == queues.len(),
                "number of queue vectors",
                saved.queue_vectors.len() as u64,
            ),
            (unknown.is_none(), "MSI-X vector of an event", unknown.unwrap_or(0).into()),
        ];
        rules.iter().find(|(kept, ..)| !kept).map_or(Ok(()), |&(_, what, value)| Err((what, value)))
    }
}
