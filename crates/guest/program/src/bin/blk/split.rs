//! The driver's side of a split virtqueue (virtio 1.2, section 2.7).

use core::sync::atomic::{Ordering, fence};

use freestone_guest_program::registers::{Device, Notify};

use crate::memory::{INDIRECT, MAX_SIZE, Place, Slots, put_descriptor};
use crate::{Queue, feature};

/// Both rings: flags, index, entries.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
/// "Do not interrupt", "do not kick".
const SUPPRESSED: u16 = 1;
/// The driver's event index is kept this far behind, so that the device never passes it.
const NEVER: u16 = 0x4000;

pub struct Split<'d> {
    device: &'d Device,
    notify: Option<Notify>,
    slots: Slots,
    table: Place,
    avail: Place,
    used: Place,
    size: u16,
    /// Each request is one indirect descriptor, not a chain of three.
    indirect: bool,
    event_idx: bool,
    next_avail: u16,
    /// What the device was shown.
    published: u16,
    next_used: u16,
    /// The device's index as last read.
    seen_used: u16,
    kicks: u64,
}

impl<'d> Split<'d> {
    pub fn new(slots: Slots, device: &'d Device, features: u64) -> Self {
        let [table, avail, used] = slots.rings();
        Self {
            device,
            notify: None,
            slots,
            table,
            avail,
            used,
            size: 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx: features & feature::EVENT_IDX != 0,
            next_avail: 0,
            published: 0,
            next_used: 0,
            seen_used: 0,
            kicks: 0,
        }
    }

    /// The device interrupts when it passes this index.
    fn put_used_event(&self) {
        let at = ENTRIES + 2 * usize::from(self.size);
        self.avail.put(at, self.next_used.wrapping_sub(NEVER));
    }

    fn wants_kick(&self) -> bool {
        if !self.event_idx {
            return self.used.get::<u16>(FLAGS) & SUPPRESSED == 0;
        }
        let event: u16 = self.used.get(ENTRIES + 8 * usize::from(self.size));
        let (new, old) = (self.next_avail, self.published);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}

impl Queue for Split<'_> {
    fn slots(&mut self) -> &mut Slots {
        &mut self.slots
    }

    fn enable(&mut self) -> Option<()> {
        let queue = self.slots.queue();
        self.size = self.device.queue_size(queue).min(MAX_SIZE as u16);
        let depth = self.slots.depth();
        // Chains of three where there is room for them.
        if 3 * depth <= usize::from(self.size) {
            self.indirect = false;
        } else if !self.indirect || depth > usize::from(self.size) {
            return None;
        }
        for slot in 0..depth {
            let source = self.slots.table(slot);
            if self.indirect {
                put_descriptor(self.table, slot, source.address(), 48, INDIRECT, 0);
                continue;
            }
            for i in 0..3 {
                let (address, len, flags) =
                    (source.get(16 * i), source.get(16 * i + 8), source.get(16 * i + 12));
                let index = 3 * slot + i;
                put_descriptor(self.table, index, address, len, flags, (index + 1) as u16);
            }
        }
        self.avail.put(FLAGS, SUPPRESSED);
        self.put_used_event();
        let rings = [self.table, self.avail, self.used].map(Place::address);
        self.notify = Some(self.device.enable_queue(queue, self.size, rings)?);
        Some(())
    }

    #[inline(always)]
    fn submit(&mut self, slot: usize) {
        let head = if self.indirect { slot } else { 3 * slot };
        let entry = usize::from(self.next_avail & (self.size - 1));
        self.avail.put(ENTRIES + 2 * entry, head as u16);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    #[inline(always)]
    fn publish(&mut self) {
        if self.published == self.next_avail {
            return;
        }
        self.avail.put(INDEX, self.next_avail);
        // The device asks for kicks and then looks at the index; we do the reverse.
        fence(Ordering::SeqCst);
        if self.wants_kick()
            && let Some(notify) = self.notify
        {
            self.kicks += 1;
            notify.kick();
        }
        self.published = self.next_avail;
    }

    #[inline(always)]
    fn take(&mut self) -> Option<usize> {
        if self.next_used == self.seen_used {
            self.seen_used = self.used.get(INDEX);
            if self.next_used == self.seen_used {
                return None;
            }
        }
        let entry = usize::from(self.next_used & (self.size - 1));
        let head = self.used.get::<u32>(ENTRIES + 8 * entry) as usize;
        self.next_used = self.next_used.wrapping_add(1);
        if self.event_idx && self.next_used.is_multiple_of(NEVER / 2) {
            self.put_used_event();
        }
        Some(if self.indirect { head } else { head / 3 })
    }

    fn kicks(&self) -> u64 {
        self.kicks
    }
}
