//! The driver's side of a packed virtqueue (virtio 1.2, section 2.8).

use core::sync::atomic::{Ordering, fence};

use freestone_guest_program::registers::{Device, Notify};

use crate::memory::{INDIRECT, MAX_SIZE, Place, Slots};
use crate::{Queue, feature};

/// Flags of a descriptor: the marks of the driver and of the device.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Event suppression structures: offset and wrap counter, then flags.
const EVENT_POSITION: usize = 0;
const EVENT_FLAGS: usize = 2;
const EVENT_DISABLE: u16 = 1;
const EVENT_AT_POSITION: u16 = 2;

pub struct Packed<'d> {
    device: &'d Device,
    notify: Option<Notify>,
    slots: Slots,
    ring: Place,
    driver_event: Place,
    device_event: Place,
    size: u16,
    /// Descriptors of a request: one that is indirect, or a chain of three.
    count: u16,
    indirect: bool,
    next_avail: u16,
    avail_wrap: bool,
    /// Descriptors since the device was last considered for a kick.
    added: u16,
    next_used: u16,
    used_wrap: bool,
    kicks: u64,
}

impl<'d> Packed<'d> {
    pub fn new(slots: Slots, device: &'d Device, features: u64) -> Self {
        let [ring, driver_event, device_event] = slots.rings();
        Self {
            device,
            notify: None,
            slots,
            ring,
            driver_event,
            device_event,
            size: 0,
            count: 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            next_avail: 0,
            avail_wrap: true,
            added: 0,
            next_used: 0,
            used_wrap: true,
            kicks: 0,
        }
    }

    /// Flags that make a descriptor available at the driver's place in the ring.
    fn marks(&self) -> u16 {
        if self.avail_wrap { AVAIL } else { USED }
    }

    fn wants_kick(&self) -> bool {
        match self.device_event.get::<u16>(EVENT_FLAGS) {
            EVENT_DISABLE => false,
            EVENT_AT_POSITION => {
                let position: u16 = self.device_event.get(EVENT_POSITION);
                let mut event = position & 0x7FFF;
                if (position >> 15 != 0) != self.avail_wrap {
                    event = event.wrapping_sub(self.size);
                }
                let new = self.next_avail;
                new.wrapping_sub(event).wrapping_sub(1) < self.added
            }
            _ => true,
        }
    }

    /// Where the next descriptor goes, and its flags; goes one further.
    #[inline(always)]
    fn step(&mut self) -> (usize, u16) {
        let here = (16 * usize::from(self.next_avail), self.marks());
        self.next_avail += 1;
        if self.next_avail == self.size {
            self.next_avail = 0;
            self.avail_wrap = !self.avail_wrap;
        }
        here
    }
}

impl Queue for Packed<'_> {
    fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }

    fn enable(&mut self) -> Option<()> {
        let queue = self.slots.queue();
        self.size = self.device.queue_size(queue).min(MAX_SIZE as u16);
        let depth = self.slots.depth();
        if 3 * depth <= usize::from(self.size) {
            (self.indirect, self.count) = (false, 3);
        } else if self.indirect && depth <= usize::from(self.size) {
            self.count = 1;
            for slot in 0..depth {
                // Descriptors of a packed ring's table have an id where a split ring's have the next one, and no flag for
                // that there is one: "indirect descriptors are in order" (2.8.7).
                let table = self.slots.table(slot);
                for i in 0..3 {
                    let flags: u16 = table.get(16 * i + 12);
                    table.put(16 * i + 12, 0u16);
                    table.put(16 * i + 14, flags & crate::memory::WRITE);
                }
            }
        } else {
            return None;
        }
        self.driver_event.put(EVENT_FLAGS, EVENT_DISABLE);
        let rings = [self.ring, self.driver_event, self.device_event].map(Place::address);
        self.notify = Some(self.device.enable_queue(queue, self.size, rings)?);
        Some(())
    }

    #[inline(always)]
    fn submit(&mut self, slot: usize) {
        let table = self.slots.table(slot);
        let (first, marks) = self.step();
        let first_flags = if self.indirect {
            self.ring.put(first, table.address());
            self.ring.put(first + 8, 48u32);
            INDIRECT
        } else {
            self.ring.put(first, table.get::<u64>(0));
            self.ring.put(first + 8, table.get::<u32>(8));
            for i in 1..3 {
                let (at, marks) = self.step();
                self.ring.put(at, table.get::<u64>(16 * i));
                self.ring.put(at + 8, table.get::<u32>(16 * i + 8));
                self.ring.put(at + 12, slot as u16);
                self.ring.put(at + 14, table.get::<u16>(16 * i + 12) | marks);
            }
            table.get(12)
        };
        self.ring.put(first + 12, slot as u16);
        // The last write makes all of them available.
        self.ring.put(first + 14, first_flags | marks);
        self.added += self.count;
    }

    #[inline(always)]
    fn publish(&mut self) {
        if self.added == 0 {
            return;
        }
        // The device asks for kicks and then looks at the ring; we do the reverse.
        fence(Ordering::SeqCst);
        if self.wants_kick()
            && let Some(notify) = self.notify
        {
            self.kicks += 1;
            notify.kick();
        }
        self.added = 0;
    }

    #[inline(always)]
    fn take(&mut self) -> Option<usize> {
        let at = 16 * usize::from(self.next_used);
        let flags: u16 = self.ring.get(at + 14);
        if (flags & AVAIL != 0) != self.used_wrap || (flags & USED != 0) != self.used_wrap {
            return None;
        }
        let slot: u16 = self.ring.get(at + 12);
        self.next_used += self.count;
        if self.next_used >= self.size {
            self.next_used -= self.size;
            self.used_wrap = !self.used_wrap;
        }
        Some(slot.into())
    }

    fn kicks(&self) -> u64 {
        self.kicks
    }
}
