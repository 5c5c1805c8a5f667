//! The packed format of a [`DriverQueue`] (virtio 1.2, section 2.8).

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use super::queue::{Buffer, DESC_SIZE, Desc, DriverQueue, Used, desc_flags, descriptor};
use crate::{Error, Result};

/// Bits of a packed descriptor's flags, besides [`desc_flags`] (2.8.1).
pub mod packed_flags {
    /// Equal to the driver's wrap counter in a descriptor that is available.
    pub const AVAIL: u16 = 1 << 7;
    /// Not equal to it in one that is available; both are equal to the device's in one that is used.
    pub const USED: u16 = 1 << 15;
}

/// Values of an event suppression structure, as 32 bits: position, wrap counter in bit 15, flags in bits 16 and 17 (2.8.14).
pub mod packed_event {
    /// Notifications are wanted.
    pub const ENABLE: u32 = 0;
    /// Notifications are not wanted.
    pub const DISABLE: u32 = 1 << 16;
    /// One is wanted for the descriptor at the position.
    pub const DESC: u32 = 2 << 16;
    /// The wrap counter that belongs to the position.
    pub const WRAP: u32 = 1 << 15;
}

/// A place in the ring, with the wrap counter there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    fn after(self, count: u16, size: u16) -> Self {
        let slot = u32::from(self.slot) + u32::from(count);
        let laps = slot / u32::from(size.max(1));
        let slot = u16::try_from(slot % u32::from(size.max(1))).unwrap_or(0);
        Self { slot, wrap: self.wrap ^ (laps % 2 == 1) }
    }

    fn event(self) -> u32 {
        u32::from(self.slot) | if self.wrap { packed_event::WRAP } else { 0 }
    }
}

/// The driver's position in a packed ring.
#[derive(Debug)]
pub(super) struct PackedRing {
    next: Place,
    last_used: Place,
    free: u16,
    free_ids: Vec<u16>,
    /// Descriptors of each chain that is in flight, by its id.
    in_flight: BTreeMap<u16, u16>,
    /// First descriptors of chains that were added and not published, with their flags, in order.
    hidden: Vec<(Place, u16)>,
    /// Descriptors added since the last publication.
    added: u32,
}

impl PackedRing {
    pub(super) fn new(size: u16) -> Self {
        let start = Place { slot: 0, wrap: true };
        Self {
            next: start,
            last_used: start,
            free: size,
            free_ids: (0..size).rev().collect(),
            in_flight: BTreeMap::new(),
            hidden: Vec::new(),
            added: 0,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

/// Flags that make a descriptor available.
fn available(wrap: bool) -> u16 {
    if wrap { packed_flags::AVAIL } else { packed_flags::USED }
}

impl DriverQueue {
    pub(super) fn packed_add(&mut self, buffers: &[Buffer]) -> Result<u16> {
        let last = buffers.len().saturating_sub(1);
        let descriptors = buffers.iter().enumerate();
        let descriptors = descriptors.map(|(i, buffer)| descriptor(buffer, (i < last).then_some(0)));
        self.packed_offer(&descriptors.collect::<Vec<_>>())
    }

    /// Writes an indirect table, whose descriptors have no NEXT, and offers it.
    pub(super) fn packed_add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Result<u16> {
        let bytes: Vec<u8> =
            buffers.iter().flat_map(|buffer| descriptor(buffer, None).to_packed_bytes()).collect();
        self.write(table, &bytes)?;
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.packed_offer(&[Desc { addr: table, len, flags: desc_flags::INDIRECT, next: 0 }])
    }

    /// Puts a chain into the ring, all but the flags of its first descriptor; returns its id.
    fn packed_offer(&mut self, descriptors: &[Desc]) -> Result<u16> {
        let size = self.size;
        let Some(ring) = &mut self.packed else { return Ok(0) };
        let count = u16::try_from(descriptors.len()).unwrap_or(u16::MAX);
        let full = Error::Full { what: "descriptors", wanted: count.into(), left: ring.free.into() };
        if count == 0 || count > ring.free {
            return Err(full);
        }
        let Some(id) = ring.free_ids.pop() else { return Err(full) };
        let first = ring.next;
        ring.next = first.after(count, size);
        ring.free -= count;
        ring.added += u32::from(count);
        ring.in_flight.insert(id, count);
        for (n, desc) in (0..).zip(descriptors) {
            let place = first.after(n, size);
            let flags = desc.flags | available(place.wrap);
            if n == 0 {
                // As it was, so that the device does not see it yet.
                let old = self.desc(place.slot)?.flags;
                self.set_desc(place.slot, Desc { next: id, flags: old, ..*desc })?;
                if let Some(ring) = &mut self.packed {
                    ring.hidden.push((place, flags));
                }
            } else {
                self.set_desc(place.slot, Desc { next: id, flags, ..*desc })?;
            }
        }
        Ok(id)
    }

    pub(super) fn packed_publish(&mut self) -> Result<bool> {
        let Some(ring) = &mut self.packed else { return Ok(false) };
        let (hidden, added, new) =
            (std::mem::take(&mut ring.hidden), std::mem::take(&mut ring.added), ring.next);
        // The first at last: then the device sees all at once.
        for (place, flags) in hidden.into_iter().rev() {
            self.set_packed_flags(place.slot, flags)?;
        }
        // The device must see the descriptors before we look whether it wants to be told.
        fence(Ordering::SeqCst);
        let event = self.device_event()?;
        Ok(match event & (3 << 16) {
            packed_event::DISABLE => false,
            packed_event::DESC if self.event_idx => {
                let size = i64::from(self.size);
                let lap = if (event & packed_event::WRAP != 0) == new.wrap { 0 } else { size };
                let (at, new) = (i64::from(event & 0x7fff) - lap, i64::from(new.slot));
                (new - i64::from(added)..new).contains(&at)
            }
            _ => added > 0,
        })
    }

    pub(super) fn packed_used(&mut self) -> Result<Option<Used>> {
        let size = self.size;
        let Some(ring) = &self.packed else { return Ok(None) };
        let at = ring.last_used;
        let flags: u16 = self.load(self.desc + u64::from(at.slot) * DESC_SIZE + 14)?;
        let whose = (flags & packed_flags::AVAIL != 0, flags & packed_flags::USED != 0);
        if whose != (at.wrap, at.wrap) {
            return Ok(None);
        }
        let Desc { len, next: id, .. } = self.desc(at.slot)?;
        let Some(ring) = &mut self.packed else { return Ok(None) };
        let Some(count) = ring.in_flight.remove(&id) else {
            let detail = format!("used descriptor {} names chain {id}, which is not in flight", at.slot);
            return Err(Error::protocol("packed ring", "2.8.6", detail));
        };
        ring.free += count;
        ring.free_ids.push(id);
        ring.last_used = at.after(count, size);
        // Without the flag nothing was written, whatever the length says (2.8.4).
        Ok(Some(Used { head: id, len: if flags & desc_flags::WRITE != 0 { len } else { 0 } }))
    }

    pub(super) fn packed_want_interrupt(&self, ring: &PackedRing, ahead: u16) -> Result<()> {
        if self.event_idx {
            self.set_driver_event(packed_event::DESC | ring.last_used.after(ahead, self.size).event())
        } else {
            self.set_driver_event(packed_event::ENABLE)
        }
    }

    /// Writes the flags of a descriptor of a packed queue, after all that was written before.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn set_packed_flags(&self, slot: u16, flags: u16) -> Result<()> {
        self.store(self.desc + u64::from(slot) * DESC_SIZE + 14, flags)
    }

    /// Writes the driver's event suppression structure of a packed queue; see [`packed_event`].
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn set_driver_event(&self, event: u32) -> Result<()> {
        self.store(self.avail, event)
    }

    /// Reads the device's event suppression structure of a packed queue; see [`packed_event`].
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn device_event(&self) -> Result<u32> {
        self.load(self.used)
    }
}

#[cfg(test)]
mod tests {
    use freestone_memory::GuestMem;

    use super::*;
    use crate::driver::Arena;

    fn queue(size: u16) -> (DriverQueue, Arena) {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        let mut arena = Arena::new(0x1000, 0x10_0000);
        (DriverQueue::new_packed(&mem, &mut arena, size).unwrap(), arena)
    }

    const ONE: Buffer = Buffer::writable(0x100, 1);

    #[test]
    fn a_chain_is_available_when_it_is_published() {
        let (mut q, _) = queue(8);
        let id = q.add_chain(&[Buffer::readable(0x100, 16), ONE]).unwrap();
        assert_eq!(q.desc(0).unwrap().flags, 0);
        assert!(q.publish().unwrap());
        let (first, second) = (q.desc(0).unwrap(), q.desc(1).unwrap());
        assert_eq!((first.addr, first.len, first.flags), (0x100, 16, desc_flags::NEXT | packed_flags::AVAIL));
        assert_eq!((second.next, second.flags), (id, desc_flags::WRITE | packed_flags::AVAIL));
    }

    #[test]
    fn the_wrap_counter_turns_with_every_lap_of_any_size() {
        let (mut q, _) = queue(3);
        for round in 0..10u16 {
            let (slot, wrap) = (round % 3, round / 3 % 2 == 0);
            let id = q.add_chain(&[ONE]).unwrap();
            q.publish().unwrap();
            assert_eq!(q.desc(slot).unwrap().flags, desc_flags::WRITE | available(wrap));
            assert_eq!(q.used().unwrap(), None);
            let used = if wrap { packed_flags::AVAIL | packed_flags::USED } else { 0 };
            q.set_packed_flags(slot, used | desc_flags::WRITE).unwrap();
            assert_eq!(q.used().unwrap(), Some(Used { head: id, len: 1 }));
        }
    }

    #[test]
    fn an_indirect_chain_takes_one_descriptor_and_its_table_has_no_next() {
        let (mut q, mut arena) = queue(1);
        q.add_indirect(&mut arena, &[Buffer::readable(0x100, 16), ONE]).unwrap();
        q.publish().unwrap();
        let desc = q.desc(0).unwrap();
        assert_eq!((desc.len, desc.flags), (32, desc_flags::INDIRECT | packed_flags::AVAIL));
        assert_eq!(q.load::<u16>(desc.addr + 14).unwrap(), 0);
        assert_eq!(q.load::<u16>(desc.addr + 30).unwrap(), desc_flags::WRITE);
        assert!(matches!(q.add_chain(&[ONE]), Err(Error::Full { left: 0, .. })));
    }

    #[test]
    fn a_kick_is_wanted_as_the_device_says() {
        let (q, _) = queue(4);
        let mut q = q.with_event_idx(true);
        let mut add = |event| {
            q.store(q.used, event).unwrap();
            let id = q.add_chain(&[ONE]).unwrap();
            let kick = q.publish().unwrap();
            let Place { slot, wrap } = q.packed.as_ref().unwrap().last_used;
            let whose = if wrap { packed_flags::AVAIL | packed_flags::USED } else { 0 };
            q.set_packed_flags(slot, whose).unwrap();
            assert_eq!(q.used().unwrap(), Some(Used { head: id, len: 0 }));
            kick
        };
        assert!(add(packed_event::ENABLE));
        assert!(!add(packed_event::DISABLE));
        assert!(!add(packed_event::DESC | packed_event::WRAP | 3), "2 is not 3");
        assert!(add(packed_event::DESC | packed_event::WRAP | 3));
        assert!(!add(packed_event::DESC | packed_event::WRAP), "0 of the lap before");
        assert!(add(packed_event::DESC | 1));
    }

    #[test]
    fn a_used_descriptor_that_names_no_chain_is_an_error() {
        let (mut q, _) = queue(2);
        q.set_desc(0, Desc { flags: packed_flags::AVAIL | packed_flags::USED, next: 1, ..Desc::default() })
            .unwrap();
        assert!(matches!(q.used(), Err(Error::Protocol { .. })));
    }
}
