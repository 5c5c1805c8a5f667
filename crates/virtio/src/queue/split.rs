//! The split virtqueue (virtio 1.2, section 2.7).

use std::sync::atomic::{Ordering, fence};

use freestone_memory::{Bytes, GuestAddress, GuestMemoryBackend, MemorySlice, MemoryView};
use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;

use super::{Chain, ChainBuffers, VirtQueue, contiguous};
use crate::{Error, Result};

/// Bytes of one descriptor.
const DESCRIPTOR_SIZE: usize = 16;
/// Both rings begin with 16 bits of flags and a 16-bit index.
const RING_INDEX: usize = 2;
const RING_ENTRIES: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
/// Each ring ends with the other side's 16-bit event index.
const EVENT_SIZE: usize = 2;

#[expect(clippy::cast_possible_truncation, reason = "all flags are 16 bits wide")]
mod flag {
    use super::*;
    pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
    pub const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
    pub const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;
}

/// The three parts of a split queue in guest memory.
#[derive(Debug)]
pub(super) struct Rings<'m> {
    descriptors: MemorySlice<'m>,
    avail: MemorySlice<'m>,
    used: MemorySlice<'m>,
}

impl<'m> Rings<'m> {
    /// Looks up the rings of `queue`.
    ///
    /// Each must lie in one region of guest memory. Regions are much larger and more strictly aligned than rings, so an
    /// allocator that hands out naturally aligned blocks never makes one that does not.
    pub(super) fn find(queue: &VirtQueue, view: &'m MemoryView) -> Result<Self> {
        let config = queue.config;
        let size = usize::from(config.size);
        let part = |part, addr, len| {
            contiguous(view, addr, len).ok_or(Error::QueueLayout { part, addr, size: config.size })
        };
        Ok(Self {
            descriptors: part("descriptor table", config.descriptors, DESCRIPTOR_SIZE * size)?,
            avail: part("available ring", config.driver, RING_ENTRIES + AVAIL_ENTRY * size + EVENT_SIZE)?,
            used: part("used ring", config.device, RING_ENTRIES + USED_ENTRY * size + EVENT_SIZE)?,
        })
    }
}

/// A queue that is being worked on. See [`VirtQueue::attach`].
#[derive(Debug)]
pub struct AttachedQueue<'q, 'm> {
    queue: &'q mut VirtQueue,
    rings: Rings<'m>,
    view: &'m MemoryView,
}

impl<'q, 'm> AttachedQueue<'q, 'm> {
    pub(super) fn new(queue: &'q mut VirtQueue, rings: Rings<'m>, view: &'m MemoryView) -> Self {
        Self { queue, rings, view }
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.queue.config.size
    }

    /// Takes the next request, if there is one, and puts its buffers into `buffers`.
    ///
    /// Descriptors of length 0 have no part in the buffers, whatever their address.
    ///
    /// # Errors
    /// Any of the errors that say that the driver broke the ring. The queue must then not be used until a reset.
    pub fn pop(&mut self, buffers: &mut ChainBuffers<'m>) -> Result<Option<Chain>> {
        if self.queue.next_avail == self.queue.seen_avail && !self.look()? {
            return Ok(None);
        }
        let slot = usize::from(self.queue.next_avail & (self.size() - 1));
        let head = u16::from_le(self.rings.avail.load(RING_ENTRIES + AVAIL_ENTRY * slot, Ordering::Relaxed)?);
        buffers.clear();
        self.walk(head, buffers)?;
        self.queue.next_avail = self.queue.next_avail.wrapping_add(1);
        Ok(Some(Chain { head }))
    }

    /// Whether a request waits.
    ///
    /// # Errors
    /// [`Error::AvailIndex`] if the driver's index is impossible.
    pub fn has_next(&mut self) -> Result<bool> {
        Ok(self.queue.next_avail != self.queue.seen_avail || self.look()?)
    }

    /// Reads the driver's index; whether it is ahead of ours. Orders what follows after it.
    fn look(&mut self) -> Result<bool> {
        let index = u16::from_le(self.rings.avail.load(RING_INDEX, Ordering::Acquire)?);
        let ahead = index.wrapping_sub(self.queue.next_avail);
        if ahead > self.size() {
            return Err(Error::AvailIndex { ahead, size: self.size() });
        }
        self.queue.seen_avail = index;
        Ok(ahead != 0)
    }

    /// Collects the buffers of the chain that begins at `head`.
    fn walk(&self, head: u16, buffers: &mut ChainBuffers<'m>) -> Result<()> {
        let mut table = self.rings.descriptors;
        let mut entries = self.size();
        let mut indirect = false;
        let mut index = head;
        // "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device" (2.7.5.3.1), which may be
        // more than the size that the driver chose.
        let max = self.queue.max_size;
        for _ in 0..=max {
            if index >= entries {
                return Err(Error::DescriptorIndex { index, size: entries });
            }
            let descriptor: Descriptor = table.read_obj(usize::from(index) * DESCRIPTOR_SIZE)?;
            let flags = descriptor.flags();
            if flags & flag::INDIRECT != 0 {
                (table, entries) = self.indirect(&descriptor, indirect)?;
                indirect = true;
                index = 0;
                continue;
            }
            self.add_buffer(&descriptor, buffers)?;
            if flags & flag::NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(Error::ChainTooLong { max })
    }

    /// The table that an indirect descriptor refers to (2.7.5.3).
    fn indirect(&self, descriptor: &Descriptor, nested: bool) -> Result<(MemorySlice<'m>, u16)> {
        let (addr, len) = (descriptor.addr().0, descriptor.len());
        let refuse = |reason| Err(Error::Indirect { addr, len, reason });
        if nested {
            return refuse("it is inside another");
        }
        if descriptor.flags() & flag::NEXT != 0 {
            return refuse("its descriptor has a next one");
        }
        let bytes = len as usize;
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_SIZE) {
            return refuse("its length is not that of one or more descriptors");
        }
        let Ok(entries) = u16::try_from(bytes / DESCRIPTOR_SIZE) else {
            return refuse("it has more than 65535 descriptors");
        };
        match contiguous(self.view, addr, bytes) {
            Some(table) => Ok((table, entries)),
            None => refuse("it is not in one range of guest memory"),
        }
    }

    fn add_buffer(&self, descriptor: &Descriptor, buffers: &mut ChainBuffers<'m>) -> Result<()> {
        let writable = descriptor.flags() & flag::WRITE != 0;
        let (addr, len) = (descriptor.addr(), descriptor.len());
        buffers.account(len, writable)?;
        if len == 0 {
            return Ok(());
        }
        if let Some(slice) = contiguous(self.view, addr.0, len as usize) {
            buffers.push(slice, writable);
            return Ok(());
        }
        self.add_scattered(addr, len, writable, buffers)
    }

    /// A buffer that spans adjacent regions, or is not in memory at all.
    #[cold]
    fn add_scattered(
        &self,
        addr: GuestAddress,
        len: u32,
        writable: bool,
        buffers: &mut ChainBuffers<'m>,
    ) -> Result<()> {
        for slice in GuestMemoryBackend::get_slices(&**self.view, addr, len as usize) {
            buffers.push(slice.map_err(|_| Error::Buffer { addr: addr.0, len })?, writable);
        }
        Ok(())
    }

    /// Gives a request back, of whose device-writable bytes the first `len` were written.
    ///
    /// The driver sees it after [`publish`](Self::publish). `chain` must be of this queue and of this side of its last reset.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the entry.
    pub fn push_used(&mut self, chain: Chain, len: u32) -> Result<()> {
        let slot = usize::from(self.queue.next_used & (self.size() - 1));
        let entry = u64::from(len) << 32 | u64::from(chain.head);
        self.rings.used.write_slice(&entry.to_le_bytes(), RING_ENTRIES + USED_ENTRY * slot)?;
        self.queue.next_used = self.queue.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver all requests that were given back, in one update.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the index.
    pub fn publish(&mut self) -> Result<()> {
        if self.queue.published != self.queue.next_used {
            self.rings.used.store(self.queue.next_used.to_le(), RING_INDEX, Ordering::Release)?;
            self.queue.published = self.queue.next_used;
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was published since the last time this was asked (2.7.7, 2.7.10).
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool> {
        let (old, new) = (self.queue.signalled, self.queue.published);
        if old == new {
            return Ok(false);
        }
        self.queue.signalled = new;
        // The driver enables interrupts and then looks at the used index; we do the reverse.
        fence(Ordering::SeqCst);
        if self.queue.event_idx {
            let at = RING_ENTRIES + AVAIL_ENTRY * usize::from(self.size());
            let event = u16::from_le(self.rings.avail.load(at, Ordering::Relaxed)?);
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(u16::from_le(self.rings.avail.load(0, Ordering::Relaxed)?) & flag::NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick: the device looks by itself. The driver may kick all the same.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the flag.
    pub fn disable_kicks(&mut self) -> Result<()> {
        // With event indices, a driver kicks once when it passes the index, and that is already behind it.
        if self.queue.kicks_wanted && !self.queue.event_idx {
            self.rings.used.store(flag::NO_NOTIFY.to_le(), 0, Ordering::Relaxed)?;
        }
        self.queue.kicks_wanted = false;
        Ok(())
    }

    /// Asks the driver to kick for the next request. Returns whether one came before the driver could know: then it may not
    /// kick, and the device must go on by itself.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the flag, [`Error::AvailIndex`] if the driver's index is impossible.
    pub fn enable_kicks(&mut self) -> Result<bool> {
        if self.queue.event_idx {
            let at = RING_ENTRIES + USED_ENTRY * usize::from(self.size());
            self.rings.used.store(self.queue.next_avail.to_le(), at, Ordering::Relaxed)?;
        } else if !self.queue.kicks_wanted {
            self.rings.used.store(0u16, 0, Ordering::Relaxed)?;
        }
        self.queue.kicks_wanted = true;
        // The driver adds a request and then looks whether to kick; we do the reverse.
        fence(Ordering::SeqCst);
        self.has_next()
    }
}
