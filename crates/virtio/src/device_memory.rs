//! Memory that a device brings into a machine: the guest sees it, and other devices can read and write it.

use std::io;
use std::sync::Arc;

use freestone_bus::{MemorySlots, SlotGuard};
use freestone_memory::{GuestMem, GuestMemoryRegion, Region};

/// A region in the guest's address space and in [`GuestMem`]; dropping it takes it out of both.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    mem: GuestMem,
    region: Arc<Region>,
    /// Goes after the region has left `mem`: a device never reaches memory that the guest has no more.
    _slot: SlotGuard,
}

impl DeviceMemory {
    /// Puts `region` in. Where it is read-only, that holds for the guest's processors.
    pub(crate) fn insert(
        mem: &GuestMem,
        slots: &dyn MemorySlots,
        region: Arc<Region>,
        read_only: bool,
    ) -> io::Result<Self> {
        let slot = slots.map(&region, read_only)?;
        mem.insert_region(Arc::clone(&region)).map_err(io::Error::other)?;
        Ok(Self { mem: mem.clone(), region, _slot: slot })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Err(error) = self.mem.remove_region(self.region.start_addr().0) {
            tracing::warn!(%error, "memory of a device was taken out of the guest's already");
        }
    }
}
