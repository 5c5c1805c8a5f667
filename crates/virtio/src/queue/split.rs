//! The split virtqueue (virtio 1.2, section 2.7).

use std::sync::atomic::{Ordering, fence};

use freestone_memory::Bytes;
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};

use super::descriptor::{DESCRIPTOR_SIZE, Element, add_buffer, flag, indirect_table};
use super::memory::Memory;
use super::meter::Meter;
use super::{Areas, ChainBuffers, Limits, QueueConfig};
use crate::{Error, Result};

/// Both rings begin with 16 bits of flags and a 16-bit index.
const RING_INDEX: usize = 2;
const RING_ENTRIES: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;
/// Each ring ends with the other side's 16-bit event index.
const EVENT_SIZE: usize = 2;

#[expect(clippy::cast_possible_truncation, reason = "all flags are 16 bits wide")]
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
#[expect(clippy::cast_possible_truncation, reason = "all flags are 16 bits wide")]
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// The device's position in a split queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// The driver's available index as last read: entries before it can be taken without looking again.
    seen_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
    /// The used index that the driver can see.
    published: u16,
    /// The used index when the driver was last considered for an interrupt.
    signalled: u16,
    /// Whether the driver was asked to kick.
    kicks_wanted: bool,
}

impl Position {
    pub(super) fn new(next_avail: u16, next_used: u16, kicks_wanted: bool) -> Self {
        Self {
            next_avail,
            seen_avail: next_avail,
            next_used,
            published: next_used,
            signalled: next_used,
            kicks_wanted,
        }
    }
}

/// Checks what can be checked without memory: size and alignment.
pub(super) fn check(limits: &Limits) -> Result<()> {
    let Limits { config, max_size, .. } = *limits;
    let refused = || Error::QueueSize { size: config.size, max: max_size };
    let mut queue = Queue::new(max_size).map_err(|_| refused())?;
    queue.try_set_size(config.size).map_err(|_| refused())?;
    let layout = |part, addr| Error::QueueLayout { part, addr, size: config.size };
    queue
        .try_set_desc_table_address(freestone_memory::GuestAddress(config.descriptors))
        .map_err(|_| layout("descriptor table", config.descriptors))?;
    queue
        .try_set_avail_ring_address(freestone_memory::GuestAddress(config.driver))
        .map_err(|_| layout("available ring", config.driver))?;
    queue
        .try_set_used_ring_address(freestone_memory::GuestAddress(config.device))
        .map_err(|_| layout("used ring", config.device))
}

/// Where the rings are: names of the parts, guest-physical addresses and lengths in bytes.
pub(super) fn layout(config: &QueueConfig) -> [(&'static str, u64, usize); 3] {
    let size = usize::from(config.size);
    [
        ("descriptor table", config.descriptors, DESCRIPTOR_SIZE * size),
        ("available ring", config.driver, RING_ENTRIES + AVAIL_ENTRY * size + EVENT_SIZE),
        ("used ring", config.device, RING_ENTRIES + USED_ENTRY * size + EVENT_SIZE),
    ]
}

/// A split queue that is being worked on.
#[derive(Debug)]
pub(super) struct Split<'a, 'm> {
    pub limits: &'a Limits,
    pub at: &'a mut Position,
    pub areas: &'a Areas<'m>,
    pub memory: &'a mut Memory<'m>,
}

impl<'m> Split<'_, 'm> {
    fn size(&self) -> u16 {
        self.limits.config.size
    }

    /// Takes the next request; returns its head and its number of descriptors in the table of the queue.
    #[inline(always)]
    pub(super) fn pop(
        &mut self,
        buffers: &mut ChainBuffers<'m>,
        meter: &mut Meter,
    ) -> Result<Option<(u16, u16)>> {
        if self.at.next_avail == self.at.seen_avail && !self.look(meter)? {
            return Ok(None);
        }
        let slot = usize::from(self.at.next_avail & (self.size() - 1));
        let head =
            u16::from_le(self.areas.driver.load(RING_ENTRIES + AVAIL_ENTRY * slot, Ordering::Relaxed)?);
        buffers.clear();
        let count = self.walk(head, buffers)?;
        self.at.next_avail = self.at.next_avail.wrapping_add(1);
        Ok(Some((head, count)))
    }

    /// Puts the request that was taken last back.
    #[inline(always)]
    pub(super) fn undo(&mut self) {
        self.at.next_avail = self.at.next_avail.wrapping_sub(1);
    }

    #[inline(always)]
    pub(super) fn has_next(&mut self, meter: &mut Meter) -> Result<bool> {
        Ok(self.at.next_avail != self.at.seen_avail || self.look(meter)?)
    }

    /// Reads the driver's index; whether it is ahead of ours. Orders what follows after it.
    #[inline(always)]
    fn look(&mut self, meter: &mut Meter) -> Result<bool> {
        let index = u16::from_le(self.areas.driver.load(RING_INDEX, Ordering::Acquire)?);
        let ahead = index.wrapping_sub(self.at.next_avail);
        if ahead > self.size() {
            return Err(Error::AvailIndex { ahead, size: self.size() });
        }
        self.at.seen_avail = index;
        meter.saw(ahead);
        Ok(ahead != 0)
    }

    /// Collects the buffers of the chain that begins at `head`; returns its number of descriptors in the table of the queue.
    #[inline(always)]
    fn walk(&mut self, head: u16, buffers: &mut ChainBuffers<'m>) -> Result<u16> {
        let mut table = self.areas.descriptors;
        let mut entries = self.size();
        let mut indirect = false;
        let mut direct = 0u16;
        let mut index = head;
        // "A driver MUST NOT create a descriptor chain longer than the Queue Size of the device" (2.7.5.3.1), which may be
        // more than the size that the driver chose.
        let max = self.limits.max_size;
        for _ in 0..=max {
            if index >= entries {
                return Err(Error::DescriptorIndex { index, size: entries });
            }
            let descriptor: Descriptor = table.read_obj(usize::from(index) * DESCRIPTOR_SIZE)?;
            let (addr, len, flags) = (descriptor.addr().0, descriptor.len(), descriptor.flags());
            let element = Element { addr, len, flags };
            direct = direct.saturating_add(u16::from(!indirect));
            if flags & flag::INDIRECT != 0 {
                (table, entries) = indirect_table(self.memory, element, indirect)?;
                indirect = true;
                index = 0;
                continue;
            }
            add_buffer(self.memory, element, buffers)?;
            if flags & flag::NEXT == 0 {
                return Ok(direct);
            }
            index = descriptor.next();
        }
        Err(Error::ChainTooLong { max })
    }

    #[inline(always)]
    pub(super) fn push_used(&mut self, head: u16, len: u32) -> Result<()> {
        let slot = usize::from(self.at.next_used & (self.size() - 1));
        let entry = u64::from(len) << 32 | u64::from(head);
        self.areas.device.write_slice(&entry.to_le_bytes(), RING_ENTRIES + USED_ENTRY * slot)?;
        self.at.next_used = self.at.next_used.wrapping_add(1);
        Ok(())
    }

    #[inline(always)]
    pub(super) fn publish(&mut self) -> Result<()> {
        if self.at.published != self.at.next_used {
            self.areas.device.store(self.at.next_used.to_le(), RING_INDEX, Ordering::Release)?;
            self.at.published = self.at.next_used;
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt (2.7.7, 2.7.10); `None` if there is nothing to interrupt for.
    #[inline(always)]
    pub(super) fn needs_interrupt(&mut self) -> Result<Option<bool>> {
        let (old, new) = (self.at.signalled, self.at.published);
        if old == new {
            return Ok(None);
        }
        self.at.signalled = new;
        // The driver enables interrupts and then looks at the used index; we do the reverse.
        fence(Ordering::SeqCst);
        if self.limits.event_idx {
            let at = RING_ENTRIES + AVAIL_ENTRY * usize::from(self.size());
            let event = u16::from_le(self.areas.driver.load(at, Ordering::Relaxed)?);
            return Ok(Some(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)));
        }
        Ok(Some(u16::from_le(self.areas.driver.load(0, Ordering::Relaxed)?) & NO_INTERRUPT == 0))
    }

    #[inline(always)]
    pub(super) fn disable_kicks(&mut self) -> Result<()> {
        // With event indices, a driver kicks once when it passes the index, and that is already behind it.
        if self.at.kicks_wanted && !self.limits.event_idx {
            self.areas.device.store(NO_NOTIFY.to_le(), 0, Ordering::Relaxed)?;
        }
        self.at.kicks_wanted = false;
        Ok(())
    }

    #[inline(always)]
    pub(super) fn enable_kicks(&mut self, meter: &mut Meter) -> Result<bool> {
        if self.limits.event_idx {
            let at = RING_ENTRIES + USED_ENTRY * usize::from(self.size());
            self.areas.device.store(self.at.next_avail.to_le(), at, Ordering::Relaxed)?;
        } else if !self.at.kicks_wanted {
            self.areas.device.store(0u16, 0, Ordering::Relaxed)?;
        }
        self.at.kicks_wanted = true;
        // The driver adds a request and then looks whether to kick; we do the reverse.
        fence(Ordering::SeqCst);
        self.has_next(meter)
    }
}
