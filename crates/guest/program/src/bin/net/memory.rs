//! Memory that the card reads and writes: rings, room for frames, and the bytes that are sent.

use core::cell::UnsafeCell;
use core::sync::atomic::{Ordering, compiler_fence};

/// Frames that the card can leave before it has to wait.
pub const RX_SLOTS: usize = 64;
/// Frames that can be under way.
pub const TX_SLOTS: usize = 64;
/// Most descriptors of a queue.
pub const MAX_SIZE: usize = 256;
/// Room for the largest frame and the card's header.
pub const ROOM: usize = 17 * 4096;
/// Room for headers, or for a small frame as a whole.
pub const HEAD: usize = 1536;
/// The bytes of every connection repeat after so many.
pub const PERIOD: usize = 65521;

#[repr(C, align(4096))]
struct Area {
    rings: [[[u8; 4096]; 3]; 2],
    heads: [[u8; HEAD]; TX_SLOTS],
    rooms: [[u8; ROOM]; RX_SLOTS],
    pattern: [u8; 2 * PERIOD],
}

struct Shared(UnsafeCell<Area>);

// SAFETY: there is one processor; who uses which part when is said at each access.
unsafe impl Sync for Shared {}

static AREA: Shared = Shared(UnsafeCell::new(Area {
    rings: [[[0; 4096]; 3]; 2],
    heads: [[0; HEAD]; TX_SLOTS],
    rooms: [[0; ROOM]; RX_SLOTS],
    pattern: [0; 2 * PERIOD],
}));

/// A place in a ring.
#[derive(Clone, Copy)]
pub struct Place(*mut u8);

/// What is read and written in one access.
pub trait Word: Copy {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

impl Place {
    /// Part 0 to 2 of the rings of a queue: descriptors, driver area, device area.
    pub fn ring(queue: usize, part: usize) -> Self {
        Self(AREA.0.get().cast::<u8>().wrapping_add(4096 * (queue % 2 * 3 + part % 3)))
    }

    /// Its guest-physical address.
    pub fn address(self) -> u64 {
        self.0.expose_provenance() as u64
    }

    /// The value `offset` bytes further. What is read later in the program is read later.
    pub fn get<T: Word>(self, offset: usize) -> T {
        // SAFETY: callers stay inside their part of the rings, at aligned offsets; every bit pattern is a value.
        let value = unsafe { self.0.wrapping_add(offset).cast::<T>().read_volatile() };
        compiler_fence(Ordering::SeqCst);
        value
    }

    /// Writes the value `offset` bytes further. What is written before in the program is written before.
    pub fn put<T: Word>(self, offset: usize, value: T) {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as above; no reference to the rings exists.
        unsafe { self.0.wrapping_add(offset).cast::<T>().write_volatile(value) }
    }
}

/// Room for a frame from the card, which belongs to whoever holds this.
#[derive(Debug)]
pub struct Room(usize);

impl Room {
    /// The room of a slot.
    ///
    /// # Safety
    ///
    /// The card does not have it, and no other `Room` of the slot exists.
    pub unsafe fn new(slot: usize) -> Self {
        Self(slot % RX_SLOTS)
    }

    /// The slot.
    pub fn slot(&self) -> usize {
        self.0
    }

    fn start(&self) -> *const u8 {
        // SAFETY: a place in the static, of which no reference is made.
        unsafe { (&raw const (*AREA.0.get()).rooms).cast::<u8>().add(self.0 * ROOM) }
    }

    /// Its guest-physical address.
    pub fn address(&self) -> u64 {
        self.start().expose_provenance() as u64
    }

    /// The first `len` bytes.
    pub fn bytes(&self, len: usize) -> &[u8] {
        // SAFETY: inside the room, which is nobody else's while `self` is borrowed.
        unsafe { core::slice::from_raw_parts(self.start(), len.min(ROOM)) }
    }
}

/// Room for the beginning of a frame to the card.
#[derive(Debug)]
pub struct Head(usize);

impl Head {
    /// That of a slot.
    ///
    /// # Safety
    ///
    /// The card is done with it, and no other `Head` of the slot exists.
    pub unsafe fn new(slot: usize) -> Self {
        Self(slot % TX_SLOTS)
    }

    /// The slot.
    pub fn slot(&self) -> usize {
        self.0
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: a place in the static, of which no reference is made.
        unsafe { (&raw mut (*AREA.0.get()).heads).cast::<u8>().add(self.0 * HEAD) }
    }

    /// Its guest-physical address.
    pub fn address(&self) -> u64 {
        self.start().expose_provenance() as u64
    }

    /// Copies `bytes` to `offset`; whether there was room.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> bool {
        if offset + bytes.len() > HEAD {
            return false;
        }
        // SAFETY: inside the head, which is nobody else's.
        unsafe { self.start().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        true
    }
}

/// The bytes that connections carry.
#[derive(Debug, Clone, Copy)]
pub struct Pattern(());

impl Pattern {
    /// Makes them; once, at the beginning.
    pub fn make() -> Self {
        // SAFETY: no reference to the pattern exists before the first `Pattern` does.
        let bytes = unsafe { &mut (*AREA.0.get()).pattern };
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (((i % PERIOD) as u32).wrapping_mul(0x9E37_79B1) >> 24) as u8;
        }
        Self(())
    }

    /// `len` bytes from a connection's byte `position` on, of which there are at most a period.
    pub fn at(self, position: u64, len: usize) -> &'static [u8] {
        // SAFETY: since `make` nobody writes to it, and the card only reads.
        let bytes = unsafe { &(*AREA.0.get()).pattern };
        let start = (position % PERIOD as u64) as usize;
        bytes.get(start..start + len.min(PERIOD)).unwrap_or_default()
    }

    /// Whether `bytes` are those from `position` on.
    pub fn is_at(self, position: u64, bytes: &[u8]) -> bool {
        let expected = self.at(position, bytes.len());
        let (a, b) = (bytes.as_chunks::<32>(), expected.as_chunks::<32>());
        let words = |chunk: &[u8; 32]| {
            let (words, _) = chunk.as_chunks::<8>();
            [0, 1, 2, 3].map(|i| words.get(i).copied().map_or(0, u64::from_ne_bytes))
        };
        let differ = a.0.iter().zip(b.0).fold(0, |differ, (x, y)| {
            let ([x0, x1, x2, x3], [y0, y1, y2, y3]) = (words(x), words(y));
            differ | (x0 ^ y0) | (x1 ^ y1) | (x2 ^ y2) | (x3 ^ y3)
        });
        differ == 0 && expected.len() == bytes.len() && a.1.iter().zip(b.1).all(|(x, y)| x == y)
    }
}
