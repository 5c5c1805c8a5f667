//! Memory slots: host memory that a device puts into the guest-physical address space while the machine runs.

use std::fmt;
use std::io;
use std::sync::Arc;

use freestone_memory::Region;

/// What a VM offers if memory can be added to it at run time.
///
/// This is the guest's side only. A device whose memory other devices may be asked to read and write (all of it that the
/// guest may use as RAM) also adds the region to [`GuestMem`](freestone_memory::GuestMem).
pub trait MemorySlots: Send + Sync {
    /// Makes `region` appear to the guest at its guest-physical address. What the guest writes to a read-only region is an
    /// access to a device that does not exist.
    ///
    /// The memory is there until the guard is dropped.
    ///
    /// # Errors
    /// If the range overlaps other memory, or the host refuses.
    fn map(&self, region: &Arc<Region>, read_only: bool) -> io::Result<SlotGuard>;
}

/// Keeps a region mapped; dropping it takes the memory away from the guest.
pub struct SlotGuard(Box<dyn FnMut() + Send + Sync>);

impl SlotGuard {
    /// A guard that calls `unmap` once, when it is dropped.
    pub fn new(unmap: impl FnMut() + Send + Sync + 'static) -> Self {
        Self(Box::new(unmap))
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl fmt::Debug for SlotGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SlotGuard")
    }
}
