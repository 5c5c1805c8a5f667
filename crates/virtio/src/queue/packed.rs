//! The packed virtqueue (virtio 1.2, section 2.8).
//!
//! There is one ring of descriptors. Either side goes round it with a wrap counter of its own, and a descriptor's two flags
//! AVAIL and USED say, against that counter, whose it is. Requests come out in the order of the ring; a completion overwrites
//! the descriptor where the device's used position is and skips as many as the request had.

use std::sync::atomic::{Ordering, fence};

use freestone_memory::Bytes;
use virtio_bindings::bindings::virtio_ring::{
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_F_WRAP_CTR,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};
use virtio_queue::desc::packed;

use super::descriptor::{DESCRIPTOR_SIZE, Element, add_buffer, flag, indirect_table};
use super::memory::Memory;
use super::meter::Meter;
use super::{Areas, ChainBuffers, Limits, QueueConfig, RingPosition};
use crate::{Error, Result};

/// Most descriptors of a packed queue (2.8.10.1).
const MAX_SIZE: u16 = 1 << 15;
/// A descriptor's length, buffer id and flags are its second half, which is read and written as a whole.
const SECOND_HALF: usize = 8;
/// Bytes of either event suppression structure (2.8.14).
const EVENT_SIZE: usize = 4;
/// Bits of a descriptor's flags that say whose it is.
const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
/// Event suppression: the wrap counter's place above the position, and the flags' above both.
const EVENT_WRAP: u32 = 1 << VRING_PACKED_EVENT_F_WRAP_CTR;
const EVENT_FLAGS_SHIFT: u32 = 16;
const EVENT_FLAGS_MASK: u32 = 3;

impl RingPosition {
    /// `count` descriptors further, in a ring of `size`. `count` is at most `size`.
    fn advance(&mut self, count: u16, size: u16) {
        let slot = u32::from(self.slot) + u32::from(count);
        let (slot, wrap) = match slot.checked_sub(size.into()) {
            Some(slot) => (slot, !self.wrap),
            None => (slot, self.wrap),
        };
        *self = Self { slot: u16::try_from(slot).unwrap_or(0), wrap };
    }

    /// `count` descriptors back, in a ring of `size`. `count` is at most `size`.
    fn retreat(&mut self, count: u16, size: u16) {
        *self = match self.slot.checked_sub(count) {
            Some(slot) => Self { slot, wrap: self.wrap },
            None => Self { slot: self.slot.saturating_add(size.saturating_sub(count)), wrap: !self.wrap },
        };
    }

    /// Whether a descriptor at this position with these flags was made available by the driver.
    fn is_available(self, flags: u16) -> bool {
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        avail == self.wrap && used != self.wrap
    }

    /// As an event suppression structure has it.
    fn to_event(self) -> u32 {
        u32::from(self.slot) | if self.wrap { EVENT_WRAP } else { 0 }
    }

    /// Byte offset of the descriptor.
    fn offset(self) -> usize {
        usize::from(self.slot) * DESCRIPTOR_SIZE
    }
}

/// The device's position in a packed queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    /// Where the next request begins.
    pub next_avail: RingPosition,
    /// Where the next completion goes.
    pub next_used: RingPosition,
    /// Descriptors from `next_avail` on that are known to be available. For the measurement of time alone.
    seen: u16,
    /// Descriptors of requests that were taken and not given back.
    held: u16,
    /// The first completion that the driver cannot see, and so hides those behind it: its place and second half.
    hidden: Option<(RingPosition, u64)>,
    /// Descriptors that were used since the last publication.
    unpublished: u32,
    /// Where `next_used` was at the last publication.
    published: RingPosition,
    /// Descriptors that were published since the driver was last considered for an interrupt.
    unsignalled: u32,
    /// Whether the driver was asked to kick.
    kicks_wanted: bool,
}

impl Position {
    /// # Errors
    /// [`Error::QueuePosition`] if the positions are not in a ring of `size`, or further apart than it is long.
    pub(super) fn new(
        next_avail: RingPosition,
        next_used: RingPosition,
        size: u16,
        kicks_wanted: bool,
    ) -> Result<Self> {
        let refused = Error::QueuePosition { avail: next_avail.slot, used: next_used.slot, size };
        if next_avail.slot >= size || next_used.slot >= size {
            return Err(refused);
        }
        let lap = if next_avail.wrap == next_used.wrap { 0 } else { size };
        let held = (next_avail.slot + lap).checked_sub(next_used.slot).filter(|&held| held <= size);
        let Some(held) = held else { return Err(refused) };
        Ok(Self {
            next_avail,
            next_used,
            seen: 0,
            held,
            hidden: None,
            unpublished: 0,
            published: next_used,
            unsignalled: 0,
            kicks_wanted,
        })
    }
}

/// Checks what can be checked without memory: size and alignment.
pub(super) fn check(limits: &Limits) -> Result<()> {
    let Limits { config, max_size, .. } = *limits;
    if config.size == 0 || config.size > max_size.min(MAX_SIZE) {
        return Err(Error::QueueSize { size: config.size, max: max_size });
    }
    for ((part, addr, _), align) in layout(&config).into_iter().zip([DESCRIPTOR_SIZE, EVENT_SIZE, EVENT_SIZE])
    {
        if !addr.is_multiple_of(align as u64) {
            return Err(Error::QueueLayout { part, addr, size: config.size });
        }
    }
    Ok(())
}

/// A descriptor that was copied out of guest memory.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    element: Element,
    id: u16,
}

/// Where the ring and the event suppression structures are: names of the parts, guest-physical addresses and lengths in bytes.
pub(super) fn layout(config: &QueueConfig) -> [(&'static str, u64, usize); 3] {
    [
        ("descriptor ring", config.descriptors, DESCRIPTOR_SIZE * usize::from(config.size)),
        ("driver event suppression", config.driver, EVENT_SIZE),
        ("device event suppression", config.device, EVENT_SIZE),
    ]
}

/// A packed queue that is being worked on.
#[derive(Debug)]
pub(super) struct Packed<'a, 'm> {
    pub limits: &'a Limits,
    pub at: &'a mut Position,
    pub areas: &'a Areas<'m>,
    pub memory: &'a mut Memory<'m>,
}

impl<'m> Packed<'_, 'm> {
    fn size(&self) -> u16 {
        self.limits.config.size
    }

    /// Copies the descriptor at `position`; what is read afterwards is ordered after its flags.
    fn descriptor(&self, position: RingPosition) -> Result<Descriptor> {
        let second =
            u64::from_le(self.areas.descriptors.load(position.offset() + SECOND_HALF, Ordering::Acquire)?);
        let addr = u64::from_le(self.areas.descriptors.load(position.offset(), Ordering::Relaxed)?);
        let [l0, l1, l2, l3, i0, i1, f0, f1] = second.to_le_bytes();
        let (len, flags) = (u32::from_le_bytes([l0, l1, l2, l3]), u16::from_le_bytes([f0, f1]));
        Ok(Descriptor { element: Element { addr, len, flags }, id: u16::from_le_bytes([i0, i1]) })
    }

    /// Takes the next request; returns its buffer id and its number of descriptors.
    #[inline(always)]
    pub(super) fn pop(
        &mut self,
        buffers: &mut ChainBuffers<'m>,
        meter: &mut Meter,
    ) -> Result<Option<(u16, u16)>> {
        let first = self.descriptor(self.at.next_avail)?;
        if !self.at.next_avail.is_available(first.element.flags) {
            return Ok(None);
        }
        if self.at.seen == 0 {
            self.look_ahead(meter)?;
        }
        buffers.clear();
        let (id, count) = self.walk(first, buffers)?;
        self.at.next_avail.advance(count, self.limits.config.size);
        self.at.seen = self.at.seen.saturating_sub(count);
        self.at.held += count;
        Ok(Some((id, count)))
    }

    /// Puts the request that was taken last back, with its `count` descriptors.
    #[inline(always)]
    pub(super) fn undo(&mut self, count: u16) {
        self.at.next_avail.retreat(count, self.limits.config.size);
        self.at.held = self.at.held.saturating_sub(count);
        self.at.seen = 0;
    }

    #[inline(always)]
    pub(super) fn has_next(&mut self, meter: &mut Meter) -> Result<bool> {
        if !self.available_after(0)? {
            return Ok(false);
        }
        if self.at.seen == 0 {
            self.look_ahead(meter)?;
        }
        Ok(true)
    }

    /// Whether the descriptor `distance` after the next one is available. `distance` is less than the size.
    fn available_after(&self, distance: u16) -> Result<bool> {
        let mut position = self.at.next_avail;
        position.advance(distance, self.size());
        let second =
            u64::from_le(self.areas.descriptors.load(position.offset() + SECOND_HALF, Ordering::Acquire)?);
        let [.., f0, f1] = second.to_le_bytes();
        Ok(position.is_available(u16::from_le_bytes([f0, f1])))
    }

    /// The next descriptor was found available. If a request that will be timed is near, finds how many there are, so that the
    /// time from now until it is taken can be told: by doubling steps, then by halving them.
    fn look_ahead(&mut self, meter: &mut Meter) -> Result<()> {
        let size = self.size();
        if !meter.is_near(size) {
            return Ok(());
        }
        let (mut known, mut step) = (1u16, 1u16);
        while step < size - known && self.available_after(known + step - 1)? {
            known += step;
            step = step.saturating_mul(2).min(size);
        }
        // The first `known` are available, and what is `step` further is not, or beyond the ring.
        let mut unknown = known.saturating_add(step).min(size.saturating_add(1));
        while unknown - known > 1 {
            let middle = known + (unknown - known) / 2;
            if self.available_after(middle - 1)? { known = middle } else { unknown = middle }
        }
        self.at.seen = known;
        meter.saw(known);
        Ok(())
    }

    /// Collects the buffers of the chain that begins with `first`. Returns its id, which stands in its last descriptor (2.8.6),
    /// and its number of descriptors in the ring.
    #[inline(always)]
    fn walk(&mut self, first: Descriptor, buffers: &mut ChainBuffers<'m>) -> Result<(u16, u16)> {
        let size = self.size();
        let (mut position, mut descriptor) = (self.at.next_avail, first);
        // A driver that offers what the device still holds would make the completions overtake the requests.
        let free = size.saturating_sub(self.at.held);
        for count in 1..=free {
            let Descriptor { element, id } = descriptor;
            if element.flags & flag::INDIRECT != 0 {
                self.walk_indirect(element, count - 1, buffers)?;
                return Ok((id, count));
            }
            add_buffer(self.memory, element, buffers)?;
            if element.flags & flag::NEXT == 0 {
                return Ok((id, count));
            }
            position.advance(1, size);
            descriptor = self.descriptor(position)?;
        }
        if free == size {
            return Err(Error::ChainTooLong { max: size });
        }
        Err(Error::Overrun { held: self.at.held, size })
    }

    /// Collects the buffers of an indirect table, all of whose descriptors count, in their order: NEXT means nothing there
    /// (2.8.7). `before` descriptors of the chain came before it.
    fn walk_indirect(&mut self, element: Element, before: u16, buffers: &mut ChainBuffers<'m>) -> Result<()> {
        let (table, entries) = indirect_table(self.memory, element, false)?;
        let max = self.limits.max_size;
        if u32::from(entries) + u32::from(before) > u32::from(max) {
            return Err(Error::ChainTooLong { max });
        }
        for index in 0..usize::from(entries) {
            let descriptor: packed::Descriptor = table.read_obj(index * DESCRIPTOR_SIZE)?;
            let (addr, len, flags) = (descriptor.addr().0, descriptor.len(), descriptor.flags());
            let element = Element { addr, len, flags };
            if flags & flag::INDIRECT != 0 {
                indirect_table(self.memory, element, true)?;
            }
            add_buffer(self.memory, element, buffers)?;
        }
        Ok(())
    }

    #[inline(always)]
    pub(super) fn push_used(&mut self, id: u16, count: u16, len: u32) -> Result<()> {
        let position = self.at.next_used;
        let whose = if position.wrap { AVAIL | USED } else { 0 };
        // The length counts only with this flag (2.8.4).
        let written = if len != 0 { flag::WRITE } else { 0 };
        let second = u64::from(len) | u64::from(id) << 32 | u64::from(whose | written) << 48;
        if self.at.hidden.is_none() {
            self.at.hidden = Some((position, second));
        } else {
            self.write_used(position, second)?;
        }
        self.at.next_used.advance(count, self.size());
        self.at.held = self.at.held.saturating_sub(count);
        self.at.unpublished = self.at.unpublished.saturating_add(count.into());
        Ok(())
    }

    fn write_used(&self, position: RingPosition, second: u64) -> Result<()> {
        Ok(self.areas.descriptors.store(
            second.to_le(),
            position.offset() + SECOND_HALF,
            Ordering::Release,
        )?)
    }

    /// Shows the first hidden completion. The driver looks at the others only after it, so all appear at once.
    #[inline(always)]
    pub(super) fn publish(&mut self) -> Result<()> {
        if let Some((position, second)) = self.at.hidden {
            self.write_used(position, second)?;
            self.at.hidden = None;
            self.at.published = self.at.next_used;
            self.at.unsignalled = self.at.unsignalled.saturating_add(self.at.unpublished);
            self.at.unpublished = 0;
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt (2.8.14); `None` if there is nothing to interrupt for.
    #[inline(always)]
    pub(super) fn needs_interrupt(&mut self) -> Result<Option<bool>> {
        let used = std::mem::take(&mut self.at.unsignalled);
        if used == 0 {
            return Ok(None);
        }
        // The driver enables interrupts and then looks at the ring; we do the reverse.
        fence(Ordering::SeqCst);
        // Position and flags in one access: they belong together.
        let event = u32::from_le(self.areas.driver.load(0, Ordering::Relaxed)?);
        Ok(Some(match event >> EVENT_FLAGS_SHIFT & EVENT_FLAGS_MASK {
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.limits.event_idx => self.passed(event, used),
            // What means nothing does not silence the device.
            _ => true,
        }))
    }

    /// Whether the driver's event position is among the last `used` descriptors before the published position.
    fn passed(&self, event: u32, used: u32) -> bool {
        let (new, size) = (self.at.published, i64::from(self.size()));
        let lap = if (event & EVENT_WRAP != 0) == new.wrap { 0 } else { size };
        let event = i64::from(event & (EVENT_WRAP - 1)) - lap;
        let (new, used) = (i64::from(new.slot), i64::from(used));
        used >= size || (new - used..new).contains(&event)
    }

    #[inline(always)]
    pub(super) fn disable_kicks(&mut self) -> Result<()> {
        // Event positions come round with every lap, so even with them the flag is set.
        if self.at.kicks_wanted {
            self.set_event(0, VRING_PACKED_EVENT_FLAG_DISABLE)?;
        }
        self.at.kicks_wanted = false;
        Ok(())
    }

    #[inline(always)]
    pub(super) fn enable_kicks(&mut self, meter: &mut Meter) -> Result<bool> {
        if self.limits.event_idx {
            self.set_event(self.at.next_avail.to_event(), VRING_PACKED_EVENT_FLAG_DESC)?;
        } else if !self.at.kicks_wanted {
            self.set_event(0, VRING_PACKED_EVENT_FLAG_ENABLE)?;
        }
        self.at.kicks_wanted = true;
        // The driver adds a request and then looks whether to kick; we do the reverse.
        fence(Ordering::SeqCst);
        self.has_next(meter)
    }

    fn set_event(&self, position: u32, flags: u32) -> Result<()> {
        let event = position | flags << EVENT_FLAGS_SHIFT;
        Ok(self.areas.device.store(event.to_le(), 0, Ordering::Relaxed)?)
    }
}
