//! [`Memory`]: where things are in guest memory.

use freestone_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemorySlice, MemoryView};

/// Guest memory, with the region that was used last at hand: nearly always the next buffer is in it as well.
#[derive(Debug)]
pub(super) struct Memory<'m> {
    pub view: &'m MemoryView,
    /// That region: first address, length, and all of it.
    start: u64,
    len: u64,
    region: Option<MemorySlice<'m>>,
}

impl<'m> Memory<'m> {
    pub(super) fn new(view: &'m MemoryView) -> Self {
        Self { view, start: 0, len: 0, region: None }
    }

    /// `len` bytes at `addr`, if they lie in one region.
    ///
    /// The slice is made in one place, whichever way its region was found, so that it need not go through memory on its way: reading
    /// back there what was just written in other pieces costs more than all the rest.
    #[inline(always)]
    pub(super) fn contiguous(&mut self, addr: u64, len: usize) -> Option<MemorySlice<'m>> {
        if addr.wrapping_sub(self.start) >= self.len {
            self.find(addr);
        }
        let offset = usize::try_from(addr.checked_sub(self.start)?).ok()?;
        self.region.as_ref()?.subslice(offset, len).ok()
    }

    #[cold]
    fn find(&mut self, addr: u64) {
        let Some(region) = GuestMemoryBackend::find_region(&**self.view, GuestAddress(addr)) else { return };
        self.region = region.as_volatile_slice().ok();
        (self.start, self.len) = (region.start_addr().0, region.len());
    }
}
