//! The disk: in every round a record is written and another one is read back, both while the program does something else.

use freestone_guest_program::cpu;
use freestone_guest_program::registers::Device;
use freestone_guest_program::ring::{NEXT, Pages, Place, Ring, RingMemory, WRITE};

use crate::clock::Patience;
use crate::memory::mix;

const FLUSH: u64 = 1 << 9;
const SECTOR: usize = 512;
/// Sectors that are used, one after the other.
const MAX_SECTORS: usize = 256;
const MAGIC: u64 = u64::from_le_bytes(*b"LIFEDISK");
/// Each of the three requests has a page: header, status, data.
const STATUS: usize = 64;
const DATA: usize = 512;
const PENDING: u8 = 0xFF;
/// Requests, which are the numbers of their slots: read, write, flush.
const READ: usize = 0;
const WRITE_REQUEST: usize = 1;
const FLUSH_REQUEST: usize = 2;
const TYPES: [u32; 3] = [0, 1, 4];
/// Index of the interrupt vector.
const INTERRUPT: u32 = 4;
/// A flush in every so many rounds.
const FLUSH_EVERY: u64 = 8;

static RING: RingMemory = RingMemory::new();
static SLOTS: Pages<3> = Pages::new();

pub struct Disk {
    ring: Ring,
    sectors: u64,
    can_flush: bool,
    /// By round, modulo the sectors.
    hashes: [u64; MAX_SECTORS],
    /// The round that is read back.
    back: u64,
    pending: usize,
    /// The last round whose record is on the disk.
    pub written: u64,
    /// The last round up to which all records were flushed.
    pub flushed: u64,
    /// This round's flush was asked for.
    flushing: bool,
    patience: Patience,
    /// Interrupts before this round, if it has them.
    interrupts: Option<u64>,
}

impl Disk {
    /// Uses at most `sectors` sectors.
    pub fn new(device: &Device, sectors: u64, interrupts: bool) -> Option<Self> {
        let features = device.begin(FLUSH)?;
        let capacity = u64::from(device.config::<u32>(0)) | u64::from(device.config::<u32>(4)) << 32;
        let interrupts = (interrupts && device.interrupt(0, INTERRUPT)).then_some(0);
        let ring = Ring::enable(device, 0, &RING, false)?;
        if interrupts.is_some() {
            ring.allow_interrupts();
        }
        device.go();
        let sectors = sectors.min(capacity).min(MAX_SECTORS as u64);
        (sectors >= 2 && ring.size() >= 16).then_some(Self {
            ring,
            sectors,
            can_flush: features & FLUSH != 0,
            hashes: [0; MAX_SECTORS],
            back: 0,
            pending: 0,
            written: 0,
            flushed: 0,
            flushing: false,
            patience: Patience::new(),
            interrupts,
        })
    }

    /// Begins this round's requests.
    pub fn begin(&mut self, round: u64, hash: u64) {
        let place = round % self.sectors;
        if let Some(slot) = self.hashes.get_mut(place as usize) {
            *slot = hash;
        }
        let page = SLOTS.page(WRITE_REQUEST);
        (0..64).for_each(|word| page.put(DATA + 8 * word, record(round, hash, word as u64)));
        self.submit(WRITE_REQUEST, place);
        // Now young, now old.
        self.back = round.saturating_sub(1 + mix(round) % (self.sectors - 1));
        if self.back > 0 {
            let page = SLOTS.page(READ);
            (0..64).for_each(|word| page.put(DATA + 8 * word, !0u64));
            self.submit(READ, self.back % self.sectors);
        }
        self.interrupts = self.interrupts.map(|_| cpu::interrupts(INTERRUPT as usize));
        self.ring.publish();
        self.patience = Patience::new();
    }

    /// Interrupts so far, if it has them.
    pub fn interrupts(&self) -> Option<u64> {
        self.interrupts.map(|_| cpu::interrupts(INTERRUPT as usize))
    }

    fn submit(&mut self, slot: usize, sector: u64) {
        let page: Place = SLOTS.page(slot);
        let kind = TYPES.get(slot).copied().unwrap_or(0);
        page.put(0, kind);
        page.put(4, 0u32);
        page.put(8, sector);
        page.put(STATUS, PENDING);
        let (first, at) = (4 * slot, page.address());
        self.ring.describe(first, at, 16, NEXT, first as u16 + if slot == FLUSH_REQUEST { 2 } else { 1 });
        let flags = if slot == READ { NEXT | WRITE } else { NEXT };
        self.ring.describe(first + 1, at + DATA as u64, SECTOR as u32, flags, first as u16 + 2);
        self.ring.describe(first + 2, at + STATUS as u64, 1, WRITE, 0);
        self.ring.submit(first);
        self.pending += 1;
    }

    /// Whether this round's requests are done; what is wrong with them.
    pub fn poll(&mut self, round: u64) -> Result<bool, &'static str> {
        while let Some((head, _)) = self.ring.take() {
            let slot = head / 4;
            if slot > FLUSH_REQUEST || !head.is_multiple_of(4) || self.pending == 0 {
                return Err("disk: completion of what was not asked");
            }
            self.pending -= 1;
            match SLOTS.page(slot).get::<u8>(STATUS) {
                0 => {}
                PENDING => return Err("disk: completion without a status"),
                _ => return Err("disk: request failed"),
            }
            match slot {
                READ => self.verify()?,
                WRITE_REQUEST => self.written = round,
                _ => self.flushed = round,
            }
        }
        if self.pending > 0 {
            return if self.patience.is_over() { Err("disk: silent") } else { Ok(false) };
        }
        if self.can_flush && round.is_multiple_of(FLUSH_EVERY) && !self.flushing {
            self.flushing = true;
            self.submit(FLUSH_REQUEST, 0);
            self.ring.publish();
            return Ok(false);
        }
        if self.interrupts.is_some_and(|before| cpu::interrupts(INTERRUPT as usize) == before) {
            return if self.patience.is_over() { Err("disk: no interrupt") } else { Ok(false) };
        }
        self.flushing = false;
        Ok(true)
    }

    fn verify(&self) -> Result<(), &'static str> {
        let hash = self.hashes.get((self.back % self.sectors) as usize).copied().unwrap_or(0);
        let page = SLOTS.page(READ);
        let right =
            (0..64).all(|word| page.get::<u64>(DATA + 8 * word) == record(self.back, hash, word as u64));
        if right { Ok(()) } else { Err("disk: record") }
    }
}

/// Word `word` of the record of a round: `freestone_guest::life` has the same.
fn record(round: u64, hash: u64, word: u64) -> u64 {
    match word {
        0 => MAGIC,
        1 => round,
        2 => hash,
        word => mix(round ^ hash.rotate_left(7) ^ word << 56),
    }
}
