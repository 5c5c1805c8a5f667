//! A virtqueue from the driver's side (virtio 1.2, sections 2.7 and 2.8): what both formats have in common, and split rings.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use freestone_memory::{AtomicAccess, Bytes, GuestAddress, GuestMem};

use super::features;
use super::packed::{PackedRing, packed_event};
use crate::{Error, Result};

/// Bits of a descriptor's flags (2.7.5).
pub mod desc_flags {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes into the buffer; otherwise it reads.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// Avail ring flag: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;
/// Used ring flag: the device wants no kicks.
const NO_NOTIFY: u16 = 1;
pub(super) const DESC_SIZE: u64 = 16;

/// Hands out guest memory for queues and buffers, and never takes it back.
#[derive(Debug, Clone)]
pub struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// Memory from `start` to before `end`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { next: start, end }
    }

    /// Where the next piece comes from: all before it has been handed out, or is not of this arena.
    pub const fn next(&self) -> u64 {
        self.next
    }

    /// `len` bytes aligned to `align`.
    ///
    /// # Errors
    /// [`Error::Full`].
    pub fn alloc(&mut self, len: u64, align: u64) -> Result<u64> {
        let full =
            Error::Full { what: "guest memory", wanted: len, left: self.end.saturating_sub(self.next) };
        let start = self.next.checked_next_multiple_of(align.max(1));
        match start.and_then(|s| Some((s, s.checked_add(len)?))) {
            Some((start, end)) if end <= self.end => {
                self.next = end;
                Ok(start)
            }
            _ => Err(full),
        }
    }
}

/// A buffer to be put into a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes into it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    pub const fn readable(gpa: u64, len: u32) -> Self {
        Self { gpa, len, writable: false }
    }

    /// A buffer that the device writes.
    pub const fn writable(gpa: u64, len: u32) -> Self {
        Self { gpa, len, writable: true }
    }
}

/// A descriptor as it is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Desc {
    /// Guest-physical address of the buffer.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`desc_flags`].
    pub flags: u16,
    /// Next descriptor, if flagged; in a packed queue, the buffer id.
    pub next: u16,
}

impl Desc {
    /// As it is in memory.
    pub fn to_bytes(self) -> [u8; 16] {
        let value = u128::from(self.addr)
            | u128::from(self.len) << 64
            | u128::from(self.flags) << 96
            | u128::from(self.next) << 112;
        value.to_le_bytes()
    }

    /// As it is in the memory of a packed queue: `next` is the buffer id, and stands before the flags (2.8.13).
    pub fn to_packed_bytes(self) -> [u8; 16] {
        Self { flags: self.next, next: self.flags, ..self }.to_bytes()
    }

    /// From the memory of a packed queue.
    pub fn from_packed_bytes(bytes: [u8; 16]) -> Self {
        let swapped = Self::from_bytes(bytes);
        Self { flags: swapped.next, next: swapped.flags, ..swapped }
    }

    /// From memory.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Self {
            addr: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}

/// A chain that the device has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// First descriptor or buffer id of the chain, as [`DriverQueue::add_chain`] returned it.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// A virtqueue in guest memory, used as a driver would.
#[derive(Debug)]
pub struct DriverQueue {
    pub(super) mem: GuestMem,
    pub(super) size: u16,
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    pub(super) event_idx: bool,
    /// The driver's position, if the queue is packed; then what follows is not used.
    pub(super) packed: Option<PackedRing>,
    free: Vec<u16>,
    in_flight: BTreeMap<u16, Vec<u16>>,
    /// Avail index as the driver counts it, and as far as the device has been told.
    next_avail: u16,
    published: u16,
    last_used: u16,
}

impl DriverQueue {
    /// Lays a queue out in the format, and with the event indices, that were negotiated with `bits`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn negotiated(mem: &GuestMem, arena: &mut Arena, size: u16, bits: u64) -> Result<Self> {
        let make = if bits & features::RING_PACKED != 0 { Self::new_packed } else { Self::new };
        Ok(make(mem, arena, size)?.with_event_idx(bits & features::EVENT_IDX != 0))
    }

    /// Lays a packed queue of `size` descriptors out in memory of `arena` and zeroes it. `size` is from 1 to 32768 (2.8.10.1)
    /// unless the test means to break that.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn new_packed(mem: &GuestMem, arena: &mut Arena, size: u16) -> Result<Self> {
        let queue = Self::new(mem, arena, size)?;
        Ok(Self { packed: Some(PackedRing::new(size)), ..queue })
    }

    /// Whether the queue is packed.
    pub fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    /// Lays a split queue of `size` descriptors out in memory of `arena` and zeroes it.
    ///
    /// `size` is a power of two up to 32768 (2.7) unless the test means to break that.
    ///
    /// # Errors
    /// [`Error::Full`] if the arena is too small, [`Error::Memory`] if it is not RAM.
    pub fn new(mem: &GuestMem, arena: &mut Arena, size: u16) -> Result<Self> {
        let n = u64::from(size);
        // Both rings end with the event index of EVENT_IDX.
        let (desc_len, avail_len, used_len) = (DESC_SIZE * n, 6 + 2 * n, 6 + 8 * n);
        let desc = arena.alloc(desc_len, 16)?;
        // Aligned for the event suppression structure of a packed queue as well.
        let avail = arena.alloc(avail_len, 4)?;
        let used = arena.alloc(used_len, 4)?;
        let queue = Self {
            mem: mem.clone(),
            size,
            desc,
            avail,
            used,
            event_idx: false,
            packed: None,
            free: (0..size).rev().collect(),
            in_flight: BTreeMap::new(),
            next_avail: 0,
            published: 0,
            last_used: 0,
        };
        for (gpa, len) in [(desc, desc_len), (avail, avail_len), (used, used_len)] {
            queue.write(gpa, &vec![0; usize::try_from(len).unwrap_or(0)])?;
        }
        Ok(queue)
    }

    /// Uses event indices, as VIRTIO_F_EVENT_IDX allows when it was negotiated.
    #[must_use]
    pub fn with_event_idx(mut self, on: bool) -> Self {
        self.event_idx = on;
        self
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest-physical address of the descriptor area: the descriptor table or the packed ring.
    pub fn desc_addr(&self) -> u64 {
        self.desc
    }

    /// Guest-physical address of the driver area: the avail ring or the driver's event suppression structure.
    pub fn avail_addr(&self) -> u64 {
        self.avail
    }

    /// Guest-physical address of the device area: the used ring or the device's event suppression structure.
    pub fn used_addr(&self) -> u64 {
        self.used
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMem {
        &self.mem
    }

    /// Chains that the device has and has not used.
    pub fn in_flight(&self) -> usize {
        self.packed.as_ref().map_or(self.in_flight.len(), PackedRing::in_flight)
    }

    /// Adds a chain of direct descriptors; returns its head, or its buffer id in a packed queue. The device sees it after [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`Error::Full`] if there are too few free descriptors or `buffers` is empty.
    pub fn add_chain(&mut self, buffers: &[Buffer]) -> Result<u16> {
        if self.packed.is_some() {
            return self.packed_add(buffers);
        }
        let at = match self.free.len().checked_sub(buffers.len()) {
            Some(at) if !buffers.is_empty() => at,
            _ => {
                let (wanted, left) = (buffers.len() as u64, self.free.len() as u64);
                return Err(Error::Full { what: "descriptors", wanted, left });
            }
        };
        let mut taken = self.free.split_off(at);
        taken.reverse();
        for (i, (&index, buffer)) in taken.iter().zip(buffers).enumerate() {
            self.set_desc(index, descriptor(buffer, taken.get(i + 1).copied()))?;
        }
        self.offer(taken)
    }

    /// Adds a chain by one indirect descriptor (2.7.5.3), with its table in memory of `arena`; returns its head.
    ///
    /// # Errors
    /// [`Error::Full`] if no descriptor or no memory is free, [`Error::Memory`].
    pub fn add_indirect(&mut self, arena: &mut Arena, buffers: &[Buffer]) -> Result<u16> {
        let bytes = DESC_SIZE * buffers.len() as u64;
        let table = arena.alloc(bytes, 16)?;
        if self.packed.is_some() {
            return self.packed_add_indirect(table, buffers);
        }
        for ((i, buffer), next) in (0u64..).zip(buffers).zip(1u16..) {
            let more = usize::from(next) < buffers.len();
            let desc = descriptor(buffer, more.then_some(next));
            self.write(table + i * DESC_SIZE, &desc.to_bytes())?;
        }
        let index = self.free.pop().ok_or(Error::Full { what: "descriptors", wanted: 1, left: 0 })?;
        let len = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.set_desc(index, Desc { addr: table, len, flags: desc_flags::INDIRECT, next: 0 })?;
        self.offer(vec![index])
    }

    /// Puts `head` into the avail ring whatever it is: for chains written by hand. Not freed when used. Split queues only: in a
    /// packed one a descriptor offers itself by its flags.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn offer_raw(&mut self, head: u16) -> Result<()> {
        let slot = self.next_avail % self.size.max(1);
        self.set_avail_ring(slot, head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    fn offer(&mut self, descriptors: Vec<u16>) -> Result<u16> {
        let head = descriptors.first().copied().unwrap_or_default();
        self.offer_raw(head)?;
        self.in_flight.insert(head, descriptors);
        Ok(head)
    }

    /// Makes all chains added so far visible to the device. Returns whether the device wants a kick for them (2.7.13).
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn publish(&mut self) -> Result<bool> {
        if self.packed.is_some() {
            return self.packed_publish();
        }
        let old = self.published;
        self.store(self.avail + 2, self.next_avail)?;
        self.published = self.next_avail;
        // The device must see the index before we look whether it wants to be told.
        std::sync::atomic::fence(Ordering::SeqCst);
        let added = self.published.wrapping_sub(old);
        if !self.event_idx {
            return Ok(added > 0 && self.used_flags()? & NO_NOTIFY == 0);
        }
        let event = self.avail_event()?;
        Ok(self.published.wrapping_sub(event).wrapping_sub(1) < added)
    }

    /// The next chain that the device has used, if there is one; its descriptors are free again.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the device reports a chain that it does not have, [`Error::Memory`].
    pub fn used(&mut self) -> Result<Option<Used>> {
        if self.packed.is_some() {
            return self.packed_used();
        }
        if self.last_used == self.used_idx()? {
            return Ok(None);
        }
        let (id, len) = self.used_ring(self.last_used % self.size.max(1))?;
        let chain = u16::try_from(id).ok().and_then(|head| Some((head, self.in_flight.remove(&head)?)));
        let Some((head, descriptors)) = chain else {
            let detail = format!("used element {} names chain {id}, which is not in flight", self.last_used);
            return Err(Error::protocol("used ring", "2.7.8", detail));
        };
        self.free.extend(descriptors.into_iter().rev());
        self.last_used = self.last_used.wrapping_add(1);
        Ok(Some(Used { head, len }))
    }

    /// Asks for an interrupt once the device has used `ahead` more chains than the driver has seen; 0: the very next. In a packed
    /// queue `ahead` counts descriptors.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn want_interrupt(&self, ahead: u16) -> Result<()> {
        if let Some(ring) = &self.packed {
            return self.packed_want_interrupt(ring, ahead);
        }
        if self.event_idx {
            self.set_used_event(self.last_used.wrapping_add(ahead))
        } else {
            self.set_avail_flags(0)
        }
    }

    /// Asks for no interrupts, as far as the driver can.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn suppress_interrupts(&self) -> Result<()> {
        if self.packed.is_some() {
            return self.set_driver_event(packed_event::DISABLE);
        }
        if self.event_idx {
            // As far away as possible.
            self.set_used_event(self.last_used.wrapping_sub(1))
        } else {
            self.set_avail_flags(NO_INTERRUPT)
        }
    }

    // Every field, for tests that know what they break. Those that name a ring or an index are of split queues.

    /// Writes a descriptor, in the format of the queue; any index.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn set_desc(&self, index: u16, desc: Desc) -> Result<()> {
        let bytes = if self.is_packed() { desc.to_packed_bytes() } else { desc.to_bytes() };
        self.write(self.desc + u64::from(index) * DESC_SIZE, &bytes)
    }

    /// Reads a descriptor.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn desc(&self, index: u16) -> Result<Desc> {
        let gpa = self.desc + u64::from(index) * DESC_SIZE;
        let mut bytes = [0; 16];
        self.mem.view().read_slice(&mut bytes, GuestAddress(gpa)).map_err(|source| Error::Memory {
            gpa,
            len: bytes.len(),
            source,
        })?;
        Ok(if self.is_packed() { Desc::from_packed_bytes(bytes) } else { Desc::from_bytes(bytes) })
    }

    /// Writes an element of the avail ring.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn set_avail_ring(&self, slot: u16, head: u16) -> Result<()> {
        self.store(self.avail + 4 + 2 * u64::from(slot), head)
    }

    /// Writes the avail index, and counts from there.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn set_avail_idx(&mut self, idx: u16) -> Result<()> {
        (self.next_avail, self.published) = (idx, idx);
        self.store(self.avail + 2, idx)
    }

    /// The avail index as the device sees it.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn avail_idx(&self) -> Result<u16> {
        self.load(self.avail + 2)
    }

    /// Writes the avail ring's flags.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn set_avail_flags(&self, flags: u16) -> Result<()> {
        self.store(self.avail, flags)
    }

    /// Writes `used_event`, behind the avail ring.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn set_used_event(&self, idx: u16) -> Result<()> {
        self.store(self.avail + 4 + 2 * u64::from(self.size), idx)
    }

    /// Reads `avail_event`, behind the used ring.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn avail_event(&self) -> Result<u16> {
        self.load(self.used + 4 + 8 * u64::from(self.size))
    }

    /// The used ring's flags.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn used_flags(&self) -> Result<u16> {
        self.load(self.used)
    }

    /// The used index.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn used_idx(&self) -> Result<u16> {
        self.load(self.used + 2)
    }

    /// Chain and length of an element of the used ring.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn used_ring(&self, slot: u16) -> Result<(u32, u32)> {
        let at = self.used + 4 + 8 * u64::from(slot);
        Ok((self.load(at)?, self.load(at + 4)?))
    }

    pub(super) fn write(&self, gpa: u64, data: &[u8]) -> Result<()> {
        let written = self.mem.view().write_slice(data, GuestAddress(gpa));
        written.map_err(|source| Error::Memory { gpa, len: data.len(), source })
    }

    pub(super) fn load<T: AtomicAccess>(&self, gpa: u64) -> Result<T> {
        let loaded = self.mem.view().load(GuestAddress(gpa), Ordering::Acquire);
        loaded.map_err(|source| Error::Memory { gpa, len: size_of::<T>(), source })
    }

    pub(super) fn store<T: AtomicAccess>(&self, gpa: u64, value: T) -> Result<()> {
        let stored = self.mem.view().store(value, GuestAddress(gpa), Ordering::Release);
        stored.map_err(|source| Error::Memory { gpa, len: size_of::<T>(), source })
    }
}

pub(super) fn descriptor(buffer: &Buffer, next: Option<u16>) -> Desc {
    let write = if buffer.writable { desc_flags::WRITE } else { 0 };
    let more = if next.is_some() { desc_flags::NEXT } else { 0 };
    Desc { addr: buffer.gpa, len: buffer.len, flags: write | more, next: next.unwrap_or(0) }
}

#[cfg(test)]
mod tests;
