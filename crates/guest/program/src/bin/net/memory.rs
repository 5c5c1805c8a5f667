//! Memory that the card reads and writes: rings, room for frames, and the bytes that are sent.

use core::cell::UnsafeCell;

use freestone_guest_program::ring::RingMemory;

/// Frames that the card can leave before it has to wait.
pub const RX_SLOTS: usize = 64;
/// Frames that can be under way.
pub const TX_SLOTS: usize = 64;
/// Room for the largest frame and the card's header.
pub const ROOM: usize = 17 * 4096;
/// Room for headers, or for a small frame as a whole.
pub const HEAD: usize = 1536;
/// The bytes of every connection repeat after so many.
pub const PERIOD: usize = 65521;

#[repr(C, align(4096))]
struct Area {
    heads: [[u8; HEAD]; TX_SLOTS],
    rooms: [[u8; ROOM]; RX_SLOTS],
    pattern: [u8; 2 * PERIOD],
}

struct Shared(UnsafeCell<Area>);

// SAFETY: there is one processor; who uses which part when is said at each access.
unsafe impl Sync for Shared {}

static AREA: Shared = Shared(UnsafeCell::new(Area {
    heads: [[0; HEAD]; TX_SLOTS],
    rooms: [[0; ROOM]; RX_SLOTS],
    pattern: [0; 2 * PERIOD],
}));

/// Memory of the receive queue and of the transmit queue.
pub static RINGS: [RingMemory; 2] = [RingMemory::new(), RingMemory::new()];

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
