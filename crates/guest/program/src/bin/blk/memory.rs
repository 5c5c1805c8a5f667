//! Memory that the device reads and writes: rings, and one slot with header, status and data for each request.
//!
//! Each slot's table of descriptors never changes, so both processors keep it in their caches. Its header, which the driver
//! writes, and its status, which the device writes, share a cache line, as they do in the drivers of operating systems.

use core::cell::UnsafeCell;
use core::sync::atomic::{Ordering, compiler_fence};

/// Bytes of a request's data.
pub const BLOCK: usize = 4096;
/// Most requests of a queue at once.
pub const MAX_DEPTH: usize = 128;
/// Most queues.
pub const MAX_QUEUES: usize = 2;
/// Most descriptors of a queue.
pub const MAX_SIZE: usize = 256;

/// Flags of descriptors.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Request types and the size of the header (virtio 1.2, 5.2.6).
const READ_REQUEST: u32 = 0;
const WRITE_REQUEST: u32 = 1;
const HEADER: u32 = 16;
/// Where the sector and the status are in a slot's line; the status is a byte after the header.
const SECTOR: usize = 8;
const STATUS: usize = 16;
/// Not a status of the device.
const PENDING: u8 = 0xFF;
/// What is written.
const FILL: u64 = 0x5757_5757_5757_5757;

#[repr(C, align(4096))]
struct Area {
    /// Descriptor table or packed ring, driver area, device area.
    rings: [[u8; 4096]; 3],
    tables: [[u8; 64]; MAX_DEPTH],
    lines: [[u8; 64]; MAX_DEPTH],
    data: [[u8; BLOCK]; MAX_DEPTH],
}

struct Areas(UnsafeCell<[Area; MAX_QUEUES]>);

// SAFETY: there is one processor, and all accesses are volatile and by address.
unsafe impl Sync for Areas {}

static AREAS: Areas = Areas(UnsafeCell::new(
    [const {
        Area {
            rings: [[0; 4096]; 3],
            tables: [[0; 64]; MAX_DEPTH],
            lines: [[0; 64]; MAX_DEPTH],
            data: [[0; BLOCK]; MAX_DEPTH],
        }
    }; MAX_QUEUES],
));

/// A place in the areas.
#[derive(Clone, Copy)]
pub struct Place(*mut u8);

/// What is read and written in one access.
pub trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

impl Place {
    fn ring(queue: usize, part: usize) -> Self {
        let area = AREAS.0.get().cast::<Area>().wrapping_add(queue % MAX_QUEUES);
        Self(area.cast::<u8>().wrapping_add(4096 * (part % 3)))
    }

    /// Its guest-physical address.
    pub fn address(self) -> u64 {
        self.0.expose_provenance() as u64
    }

    /// The value `offset` bytes further. What is read later in the program is read later.
    pub fn get<T: Word>(self, offset: usize) -> T {
        // SAFETY: private callers stay inside one part of an area, at aligned offsets; every bit pattern is a value.
        let value = unsafe { self.0.wrapping_add(offset).cast::<T>().read_volatile() };
        compiler_fence(Ordering::SeqCst);
        value
    }

    /// Writes the value `offset` bytes further. What is written before in the program is written before.
    pub fn put<T: Word>(self, offset: usize, value: T) {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as above; no reference to the areas exists.
        unsafe { self.0.wrapping_add(offset).cast::<T>().write_volatile(value) }
    }

    fn fill(self, words: usize, value: u64) {
        (0..words).for_each(|word| self.put(8 * word, value));
    }
}

/// The requests of a queue.
pub struct Slots {
    queue: usize,
    depth: usize,
    area: Place,
}

impl Slots {
    /// Clears the rings, and makes `depth` requests.
    pub fn new(queue: usize, depth: usize, write: bool) -> Self {
        let slots = Self { queue, depth, area: Place::ring(queue, 0) };
        Place::ring(queue, 0).fill(3 * 4096 / 8, 0);
        for slot in 0..depth {
            let (table, line, data) = (slots.table(slot), slots.line(slot), slots.data(slot));
            let data_flags = if write { NEXT } else { NEXT | WRITE };
            let status = line.address() + STATUS as u64;
            put_descriptor(table, 0, line.address(), HEADER, NEXT, 1);
            put_descriptor(table, 1, data.address(), BLOCK as u32, data_flags, 2);
            put_descriptor(table, 2, status, 1, WRITE, 0);
            line.put(0, if write { WRITE_REQUEST } else { READ_REQUEST });
            line.put(4, 0u32);
            data.fill(BLOCK / 8, FILL);
        }
        slots
    }

    /// How many there are.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Whose they are.
    pub fn queue(&self) -> usize {
        self.queue
    }

    /// Descriptor area, driver area and device area of the queue.
    pub fn rings(&self) -> [Place; 3] {
        [0, 1, 2].map(|part| Place::ring(self.queue, part))
    }

    /// Descriptors of a request: header, data, status.
    pub fn table(&self, slot: usize) -> Place {
        Place(self.area.0.wrapping_add(core::mem::offset_of!(Area, tables) + 64 * (slot % MAX_DEPTH)))
    }

    fn line(&self, slot: usize) -> Place {
        Place(self.area.0.wrapping_add(core::mem::offset_of!(Area, lines) + 64 * (slot % MAX_DEPTH)))
    }

    fn data(&self, slot: usize) -> Place {
        Place(self.area.0.wrapping_add(core::mem::offset_of!(Area, data) + BLOCK * (slot % MAX_DEPTH)))
    }

    /// Makes the request one for `block`.
    pub fn prepare(&mut self, slot: usize, block: u64) {
        let line = self.line(slot);
        line.put(SECTOR, block * (BLOCK as u64 / 512));
        line.put(STATUS, PENDING);
    }

    /// Whether the device says so.
    pub fn succeeded(&self, slot: usize) -> bool {
        self.line(slot).get::<u8>(STATUS) == 0
    }

    /// Whether the data are what the host put into this block, and then forgets them.
    pub fn is_as_expected(&mut self, slot: usize) -> bool {
        let block = self.line(slot).get::<u64>(SECTOR) / (BLOCK as u64 / 512);
        let data = self.data(slot);
        let right = (0..BLOCK / 8).all(|word| data.get::<u64>(8 * word) == expected(block, word as u64));
        data.fill(BLOCK / 8, FILL);
        right
    }
}

/// The word of a block on the image: `freestone_guest::blk::pattern` has the same.
fn expected(block: u64, word: u64) -> u64 {
    (block * 512 + word + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Writes descriptor `index` of a split ring or an indirect table of one.
pub fn put_descriptor(table: Place, index: usize, address: u64, len: u32, flags: u16, next: u16) {
    table.put(16 * index, address);
    table.put(16 * index + 8, len);
    table.put(16 * index + 12, flags);
    table.put(16 * index + 14, next);
}
