//! The driver's side of a split virtqueue (virtio 1.2, section 2.7), polled, and the memory that it shares with the device.

use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{Ordering, compiler_fence, fence};

use crate::registers::{Device, Notify};

/// Flag of a descriptor: there is a next one.
pub const NEXT: u16 = 1;
/// Flag of a descriptor: the device writes.
pub const WRITE: u16 = 2;

const PAGE: usize = 4096;
/// Most descriptors of a queue.
pub const MAX_SIZE: usize = 256;

/// Pages that the program and a device share. All accesses are volatile and by [`Place`]; no reference to them is made.
#[repr(C, align(4096))]
pub struct Pages<const N: usize>(UnsafeCell<[[u8; PAGE]; N]>);

// SAFETY: only volatile accesses of plain integers through `Place`.
unsafe impl<const N: usize> Sync for Pages<N> {}

impl<const N: usize> Pages<N> {
    /// Zeroes.
    pub const fn new() -> Self {
        Self(UnsafeCell::new([[0; PAGE]; N]))
    }

    /// One of the pages; numbers past the last begin anew.
    pub fn page(&'static self, number: usize) -> Place {
        Place(self.0.get().cast::<u8>().wrapping_add(PAGE * (number % N)))
    }
}

impl<const N: usize> Default for Pages<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> fmt::Debug for Pages<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pages").field(&N).finish()
    }
}

/// A page that is shared with a device.
#[derive(Debug, Clone, Copy)]
pub struct Place(*mut u8);

/// What is read and written in one access.
pub trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

impl Place {
    /// Its guest-physical address.
    pub fn address(self) -> u64 {
        self.0.expose_provenance() as u64
    }

    /// The value `offset` bytes further, which wraps inside the page. What is read later in the program is read later.
    pub fn get<T: Word>(self, offset: usize) -> T {
        let at = self.0.wrapping_add(offset & (PAGE - size_of::<T>())).cast::<T>();
        // SAFETY: inside the page and aligned by the mask; every bit pattern is a value.
        let value = unsafe { at.read_volatile() };
        compiler_fence(Ordering::SeqCst);
        value
    }

    /// Writes the value `offset` bytes further, which wraps inside the page. What is written before in the program is written before.
    pub fn put<T: Word>(self, offset: usize, value: T) {
        compiler_fence(Ordering::SeqCst);
        let at = self.0.wrapping_add(offset & (PAGE - size_of::<T>())).cast::<T>();
        // SAFETY: as above; no reference to the page exists.
        unsafe { at.write_volatile(value) }
    }

    /// Copies bytes out.
    pub fn read(self, offset: usize, to: &mut [u8]) {
        to.iter_mut().enumerate().for_each(|(i, byte)| *byte = self.get(offset + i));
    }

    /// Copies bytes in.
    pub fn write(self, offset: usize, from: &[u8]) {
        from.iter().enumerate().for_each(|(i, byte)| self.put(offset + i, *byte));
    }
}

/// Memory of one queue: descriptors, driver area, device area.
pub type RingMemory = Pages<3>;

/// Both rings: flags, index, entries.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
/// "Do not interrupt", "do not kick".
const SUPPRESSED: u16 = 1;
/// The driver's event index is kept this far behind, so that the device never passes it.
const NEVER: u16 = 0x4000;

/// A queue.
#[derive(Debug)]
pub struct Ring {
    table: Place,
    avail: Place,
    used: Place,
    notify: Notify,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    /// What the device was shown.
    published: u16,
    next_used: u16,
    /// The device's index as last read.
    seen_used: u16,
    /// How often the device wanted a kick and got one.
    pub kicks: u64,
}

impl Ring {
    /// Gives the device the queue `number`, empty, in memory that no other queue has.
    pub fn enable(
        device: &Device,
        number: usize,
        memory: &'static RingMemory,
        event_idx: bool,
    ) -> Option<Self> {
        let [table, avail, used] = [0, 1, 2].map(|part| memory.page(part));
        for part in [table, avail, used] {
            (0..4096 / 8).for_each(|word| part.put(8 * word, 0u64));
        }
        let size = device.queue_size(number).min(MAX_SIZE as u16);
        if !size.is_power_of_two() {
            return None;
        }
        avail.put(FLAGS, SUPPRESSED);
        let notify = device.enable_queue(number, size, [table, avail, used].map(Place::address))?;
        let (next_avail, published, next_used, seen_used) = (0, 0, 0, 0);
        let ring = Self {
            table,
            avail,
            used,
            notify,
            size,
            event_idx,
            next_avail,
            published,
            next_used,
            seen_used,
            kicks: 0,
        };
        ring.put_used_event();
        Some(ring)
    }

    /// Has the device interrupt when it is done with something. Not with event indices.
    pub fn allow_interrupts(&self) {
        self.avail.put(FLAGS, 0u16);
    }

    /// Descriptors.
    pub fn size(&self) -> usize {
        usize::from(self.size)
    }

    /// Writes descriptor `index`.
    pub fn describe(&self, index: usize, address: u64, len: u32, flags: u16, next: u16) {
        let at = 16 * (index & (self.size() - 1));
        self.table.put(at, address);
        self.table.put(at + 8, len);
        self.table.put(at + 12, flags);
        self.table.put(at + 14, next);
    }

    /// The device interrupts when it passes this index: never.
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

    /// Puts a chain into the ring.
    pub fn submit(&mut self, head: usize) {
        let entry = usize::from(self.next_avail & (self.size - 1));
        self.avail.put(ENTRIES + 2 * entry, head as u16);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Shows what was submitted to the device, and kicks it if it asks for that.
    pub fn publish(&mut self) {
        if self.published == self.next_avail {
            return;
        }
        self.avail.put(INDEX, self.next_avail);
        // The device asks for kicks and then looks at the index; we do the reverse.
        fence(Ordering::SeqCst);
        if self.wants_kick() {
            self.kicks += 1;
            self.notify.kick();
        }
        self.published = self.next_avail;
    }

    /// A chain that the device is done with, and how many bytes it wrote.
    pub fn take(&mut self) -> Option<(usize, usize)> {
        if self.next_used == self.seen_used {
            self.seen_used = self.used.get(INDEX);
            if self.next_used == self.seen_used {
                return None;
            }
        }
        let at = ENTRIES + 8 * usize::from(self.next_used & (self.size - 1));
        let (head, len) = (self.used.get::<u32>(at), self.used.get::<u32>(at + 4));
        self.next_used = self.next_used.wrapping_add(1);
        if self.event_idx && self.next_used.is_multiple_of(NEVER / 2) {
            self.put_used_event();
        }
        Some((head as usize, len as usize))
    }
}
