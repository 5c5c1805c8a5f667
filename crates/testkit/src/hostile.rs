//! What a hostile driver puts into a queue: generators for broken chains and rings.
//!
//! Every case is deterministic: it depends on its [`Source`] alone, which is a seed or the bytes of a fuzzer. No case is
//! meant to be answered in a certain way; a device must survive it, stay bounded, and work again after a reset.
//!
//! In a packed queue, where there are no heads and no `next`, each case is what comes nearest to it.

use freestone_memory::layout::{HOLE_START, MMIO_START};
use freestone_memory::{Bytes, GuestAddress};

use crate::driver::{Arena, Desc, DriverQueue, desc_flags, packed_flags};
use crate::{Error, Result};

/// Numbers that look arbitrary and are not: from a seed, or from bytes.
#[derive(Debug, Clone)]
pub struct Source<'a> {
    bytes: &'a [u8],
    state: u64,
}

impl Source<'_> {
    /// Numbers by `seed`.
    pub const fn seed(seed: u64) -> Self {
        Self { bytes: &[], state: seed }
    }
}

impl<'a> Source<'a> {
    /// Numbers that are `bytes`, and after their end depend on nothing but their length.
    pub const fn bytes(bytes: &'a [u8]) -> Self {
        Self { bytes, state: bytes.len() as u64 }
    }

    /// Whether the bytes are used up, or there were none.
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        if let Some((bytes, rest)) = self.bytes.split_first_chunk::<8>() {
            self.bytes = rest;
            return u64::from_le_bytes(*bytes);
        }
        if !self.bytes.is_empty() {
            let value = self.bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            self.bytes = &[];
            return value;
        }
        // SplitMix64.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A 32-bit number.
    pub fn next_u32(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.next_u64().to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    /// A 16-bit number.
    pub fn next_u16(&mut self) -> u16 {
        let [a, b, ..] = self.next_u64().to_le_bytes();
        u16::from_le_bytes([a, b])
    }

    /// A number below `n`; 0 if that is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64().checked_rem(n).unwrap_or(0)
    }

    /// A 64-bit number such as breaks arithmetic: often near a limit.
    pub fn edge(&mut self) -> u64 {
        let near = self.below(17).wrapping_sub(8);
        match self.below(8) {
            0 => near,
            1 => (1u64 << 32).wrapping_add(near),
            2 => (1u64 << 63).wrapping_add(near),
            3 => HOLE_START.wrapping_add(near),
            4 => MMIO_START.wrapping_add(near),
            5 => self.below(1 << 20),
            _ => self.next_u64(),
        }
    }
}

/// A way to be hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hostile {
    /// A descriptor whose `next` is itself; packed: a chain that goes on in descriptors that were not offered.
    SelfLoop,
    /// All descriptors in a ring.
    Loop,
    /// `next` beyond the table; packed: buffer ids beyond it.
    NextOutOfRange,
    /// An indirect table with an indirect descriptor in it.
    IndirectInIndirect,
    /// An indirect descriptor that also has a `next`.
    IndirectWithNext,
    /// An indirect table of no bytes.
    IndirectEmpty,
    /// An indirect table whose length is not a multiple of a descriptor.
    IndirectOddLength,
    /// An indirect table of 4 GiB.
    IndirectHuge,
    /// An indirect table in no memory.
    IndirectNowhere,
    /// An indirect table whose last descriptor goes on at the first.
    IndirectLoop,
    /// Buffers of no bytes.
    ZeroLength,
    /// Buffers of more than 2^32 bytes together.
    TotalOver4G,
    /// An avail index further ahead than the queue has descriptors; packed: descriptors available on two laps at once.
    AvailJump,
    /// Heads beyond the table; packed: flags that belong to no side.
    HeadOutOfRange,
    /// A buffer whose end wraps round the address space.
    AddressWraps,
    /// Buffers in no memory.
    AddressInHole,
    /// Buffers over the registers of devices.
    AddressOfDevice,
    /// A buffer that begins in memory and ends outside.
    StraddlesEnd,
    /// Nothing but buffers the device must not write.
    AllReadable,
    /// Nothing but buffers the device must not read.
    AllWritable,
    /// Writable before readable.
    WrongOrder,
    /// Too short for any header.
    TooShort,
    /// The same chain many times.
    SameChainTwice,
    /// Buffers over the rings themselves.
    BuffersOverRings,
    /// Arbitrary bytes in the table and the avail ring.
    Garbage,
    /// Good requests, and nonsense where the driver says of what it wants to hear.
    EventGarbage,
}

impl Hostile {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::SelfLoop,
        Self::Loop,
        Self::NextOutOfRange,
        Self::IndirectInIndirect,
        Self::IndirectWithNext,
        Self::IndirectEmpty,
        Self::IndirectOddLength,
        Self::IndirectHuge,
        Self::IndirectNowhere,
        Self::IndirectLoop,
        Self::ZeroLength,
        Self::TotalOver4G,
        Self::AvailJump,
        Self::HeadOutOfRange,
        Self::AddressWraps,
        Self::AddressInHole,
        Self::AddressOfDevice,
        Self::StraddlesEnd,
        Self::AllReadable,
        Self::AllWritable,
        Self::WrongOrder,
        Self::TooShort,
        Self::SameChainTwice,
        Self::BuffersOverRings,
        Self::Garbage,
        Self::EventGarbage,
    ];

    /// Writes this case into `queue`, which should be fresh, and makes it visible to the device. The queue's own bookkeeping
    /// means nothing afterwards.
    ///
    /// # Errors
    /// [`Error::Full`] if `arena` has less than 64 KiB left, [`Error::Memory`] if it is not RAM.
    pub fn apply(self, queue: &mut DriverQueue, arena: &mut Arena, source: &mut Source<'_>) -> Result<()> {
        let scene = Scene::new(queue, arena, source)?;
        if queue.is_packed() {
            return self.apply_packed(queue, &scene, source);
        }
        match self {
            Self::AvailJump => {
                scene.chain(queue, &scene.request(0x200))?;
                let jump = queue.size().wrapping_add(1).wrapping_add(source.next_u16() & 0x7fff);
                return queue.set_avail_idx(jump);
            }
            Self::HeadOutOfRange => {
                for head in [queue.size(), queue.size().wrapping_add(source.next_u16() & 0xff), u16::MAX] {
                    queue.offer_raw(head)?;
                }
            }
            Self::SameChainTwice => {
                scene.chain(queue, &scene.request(0x200))?;
                for _ in 1..queue.size() {
                    queue.offer_raw(0)?;
                }
            }
            Self::Garbage => scene.garbage(queue, source)?,
            Self::EventGarbage => {
                scene.chain(queue, &scene.request(0x200))?;
                queue.set_avail_flags(source.next_u16())?;
                queue.set_used_event(source.next_u16())?;
            }
            _ => {
                let descriptors = self.descriptors(queue, &scene, source)?;
                scene.chain(queue, &descriptors)?;
            }
        }
        queue.publish().map(drop)
    }

    /// Writes this case into a packed queue: everything but the first descriptor, and then that.
    fn apply_packed(self, queue: &DriverQueue, scene: &Scene, source: &mut Source<'_>) -> Result<()> {
        use desc_flags::{NEXT, WRITE};
        use packed_flags::{AVAIL, USED};
        let size = queue.size();
        let mut descriptors = match self {
            Self::SelfLoop => vec![Desc { next: 0, ..scene.header() }],
            Self::Loop | Self::AvailJump => vec![scene.header(); size.into()],
            Self::SameChainTwice => {
                vec![Desc { flags: WRITE, ..scene.status() }; size.into()]
            }
            Self::Garbage => scene.descriptors(size, source),
            _ => self.descriptors(queue, scene, source)?,
        };
        for (n, desc) in descriptors.iter_mut().enumerate() {
            let whose = match self {
                Self::AvailJump if n % 2 == 1 => USED,
                Self::HeadOutOfRange if n % 2 == 1 => AVAIL | USED,
                Self::Garbage => source.next_u16() & (AVAIL | USED),
                _ => AVAIL,
            };
            desc.flags |= whose;
            desc.next = match self {
                Self::NextOutOfRange => size.wrapping_add(source.next_u16()),
                Self::Garbage => source.next_u16(),
                Self::AvailJump => u16::try_from(n).unwrap_or(0),
                _ => 0,
            };
            if self == Self::AvailJump {
                desc.flags &= !NEXT;
            }
        }
        if self == Self::Garbage
            && let Some(first) = descriptors.first_mut()
        {
            first.flags = first.flags & !USED | AVAIL;
        }
        if matches!(self, Self::EventGarbage | Self::Garbage) {
            queue.set_driver_event(source.next_u32())?;
        }
        for (slot, desc) in (0..size).zip(descriptors).rev() {
            queue.set_desc(slot, desc)?;
        }
        Ok(())
    }

    /// The chain of this case, as it stands in the table from descriptor 0.
    fn descriptors(self, queue: &DriverQueue, scene: &Scene, source: &mut Source<'_>) -> Result<Vec<Desc>> {
        use desc_flags::{INDIRECT, NEXT, WRITE};
        let request = scene.request(0x200);
        let desc = |addr, len, flags, next| Desc { addr, len, flags, next };
        let table = |len, flags| Desc { addr: scene.table, len, flags: INDIRECT | flags, next: 1 };
        let status = scene.status();
        let around = |addr, len| vec![scene.header(), desc(addr, len, NEXT | WRITE, 2), status];
        Ok(match self {
            Self::SelfLoop => vec![Desc { next: 0, ..scene.header() }],
            Self::Loop => {
                let n = queue.size();
                (0..n).map(|i| Desc { next: (i + 1) % n.max(1), ..scene.header() }).collect()
            }
            Self::NextOutOfRange => {
                let next = queue.size().wrapping_add(source.next_u16() & 0xff);
                vec![Desc { next, ..scene.header() }]
            }
            Self::IndirectInIndirect => {
                scene.indirect(queue, &[scene.header(), table(48, 0)])?;
                vec![table(32, 0)]
            }
            Self::IndirectWithNext => {
                scene.indirect(queue, &request)?;
                vec![table(48, NEXT), status]
            }
            Self::IndirectEmpty => vec![table(0, 0)],
            Self::IndirectOddLength => {
                scene.indirect(queue, &request)?;
                vec![table(48 + 1 + source.next_u32() % 15, 0)]
            }
            Self::IndirectHuge => {
                scene.indirect(queue, &request)?;
                vec![table(0xffff_fff0, 0)]
            }
            Self::IndirectNowhere => vec![Desc { addr: HOLE_START + source.below(1 << 20), ..table(48, 0) }],
            Self::IndirectLoop => {
                scene.indirect(queue, &[scene.header(), Desc { next: 0, ..scene.header() }])?;
                vec![table(32, 0)]
            }
            Self::ZeroLength => request.into_iter().map(|d| Desc { len: 0, ..d }).collect(),
            Self::TotalOver4G => vec![
                scene.header(),
                desc(scene.data, u32::MAX, NEXT | WRITE, 2),
                desc(scene.data, u32::MAX, NEXT | WRITE, 3),
                status,
            ],
            Self::AddressWraps => around(u64::MAX - source.below(0x200), 0x400),
            Self::AddressInHole => around(HOLE_START + source.below(1 << 20), 0x200),
            Self::AddressOfDevice => around(MMIO_START + source.below(0x1000), 0x200),
            Self::StraddlesEnd => around(scene.end_of_memory.saturating_sub(source.below(0x100)), 0x200),
            Self::AllReadable => request.into_iter().map(|d| Desc { flags: d.flags & !WRITE, ..d }).collect(),
            Self::AllWritable => request.into_iter().map(|d| Desc { flags: d.flags | WRITE, ..d }).collect(),
            Self::WrongOrder => {
                vec![desc(scene.data, 0x200, NEXT | WRITE, 1), Desc { next: 2, ..scene.header() }, status]
            }
            Self::TooShort => {
                let len = 1 + source.next_u32() % 8;
                vec![desc(scene.header, len, NEXT, 1), desc(scene.data, 1, WRITE, 0)]
            }
            Self::BuffersOverRings => {
                let at = [queue.desc_addr(), queue.avail_addr(), queue.used_addr()];
                let over = |gpa, next| desc(gpa, 0x200, NEXT | WRITE, next);
                let [a, b, c] = at;
                vec![scene.header(), over(a, 2), over(b, 3), over(c, 4), status]
            }
            // Written without a chain.
            Self::AvailJump
            | Self::HeadOutOfRange
            | Self::SameChainTwice
            | Self::Garbage
            | Self::EventGarbage => request,
        })
    }
}

/// Memory for one case: a header with arbitrary bytes, data, a status byte and an indirect table.
struct Scene {
    header: u64,
    data: u64,
    status: u64,
    table: u64,
    end_of_memory: u64,
}

const HEADER_LEN: u32 = 16;

impl Scene {
    fn new(queue: &DriverQueue, arena: &mut Arena, source: &mut Source<'_>) -> Result<Self> {
        let header = arena.alloc(HEADER_LEN.into(), 16)?;
        let scene = Self {
            header,
            data: arena.alloc(0x1000, 16)?,
            status: arena.alloc(16, 16)?,
            table: arena.alloc(0x1000, 16)?,
            end_of_memory: queue.memory().regions().first().map_or(0, |r| {
                use freestone_memory::GuestMemoryRegion;
                r.len()
            }),
        };
        let mut bytes = [source.next_u64().to_le_bytes(), source.next_u64().to_le_bytes()];
        // Headers of most devices begin with a small number: a request of some kind.
        if source.below(2) == 0 {
            bytes[0] = (source.below(16)).to_le_bytes();
        }
        write(queue, header, bytes.as_flattened())?;
        Ok(scene)
    }

    fn header(&self) -> Desc {
        Desc { addr: self.header, len: HEADER_LEN, flags: desc_flags::NEXT, next: 1 }
    }

    fn status(&self) -> Desc {
        Desc { addr: self.status, len: 1, flags: desc_flags::WRITE, next: 0 }
    }

    /// A request as a good driver would make it.
    fn request(&self, len: u32) -> Vec<Desc> {
        let data = Desc { addr: self.data, len, flags: desc_flags::NEXT | desc_flags::WRITE, next: 2 };
        vec![self.header(), data, self.status()]
    }

    /// Writes descriptors from 0 on, as far as the table goes, and offers the first.
    fn chain(&self, queue: &mut DriverQueue, descriptors: &[Desc]) -> Result<()> {
        for (i, desc) in (0..queue.size()).zip(descriptors) {
            queue.set_desc(i, *desc)?;
        }
        queue.offer_raw(0)
    }

    fn indirect(&self, queue: &DriverQueue, descriptors: &[Desc]) -> Result<()> {
        let format = if queue.is_packed() { Desc::to_packed_bytes } else { Desc::to_bytes };
        let bytes: Vec<u8> = descriptors.iter().flat_map(|d| format(*d)).collect();
        write(queue, self.table, &bytes)
    }

    fn garbage(&self, queue: &mut DriverQueue, source: &mut Source<'_>) -> Result<()> {
        for (i, desc) in (0..).zip(self.descriptors(queue.size(), source)) {
            queue.set_desc(i, desc)?;
            queue.set_avail_ring(i, source.next_u16() % queue.size().max(1).saturating_mul(2))?;
        }
        queue.set_avail_idx(1 + source.next_u16() % queue.size().max(1))
    }

    /// Arbitrary descriptors for a queue of `size`.
    fn descriptors(&self, size: u16, source: &mut Source<'_>) -> Vec<Desc> {
        let mut descriptor = || {
            // Addresses near the edges of memory and mostly sensible indices get further than pure noise.
            let addr = if source.below(2) == 0 { self.data + source.below(0x1000) } else { source.edge() };
            let len = if source.below(4) == 0 { source.next_u32() } else { source.next_u32() & 0xfff };
            let next = if source.below(8) == 0 { source.next_u16() } else { source.next_u16() % size.max(1) };
            Desc { addr, len, flags: source.next_u16() & 7, next }
        };
        (0..size).map(|_| descriptor()).collect()
    }
}

fn write(queue: &DriverQueue, gpa: u64, data: &[u8]) -> Result<()> {
    let written = queue.memory().view().write_slice(data, GuestAddress(gpa));
    written.map_err(|source| Error::Memory { gpa, len: data.len(), source })
}

#[cfg(test)]
mod tests {
    use freestone_memory::GuestMem;

    use super::*;

    /// The table that a case makes, and whether the device is offered something.
    fn table_of(case: Hostile, packed: bool, mut source: Source<'_>) -> (Vec<Desc>, bool) {
        let mem = GuestMem::anonymous(1 << 20).unwrap();
        let mut arena = Arena::new(0x1000, 0x10_0000);
        let make = if packed { DriverQueue::new_packed } else { DriverQueue::new };
        let mut queue = make(&mem, &mut arena, 16).unwrap();
        case.apply(&mut queue, &mut arena, &mut source).unwrap();
        let table: Vec<_> = (0..16).map(|i| queue.desc(i).unwrap()).collect();
        let available = table[0].flags & (packed_flags::AVAIL | packed_flags::USED) == packed_flags::AVAIL;
        let offered = if packed { available } else { queue.avail_idx().unwrap() != 0 };
        (table, offered)
    }

    const BOTH: [bool; 2] = [false, true];

    #[test]
    fn every_case_offers_something_to_the_device() {
        for (case, packed) in Hostile::ALL.iter().flat_map(|case| BOTH.map(|packed| (case, packed))) {
            assert!(table_of(*case, packed, Source::seed(1)).1, "{case:?} {packed}");
        }
    }

    #[test]
    fn a_case_depends_on_its_seed_alone() {
        for (case, packed) in Hostile::ALL.iter().flat_map(|case| BOTH.map(|packed| (case, packed))) {
            let table = || table_of(*case, packed, Source::seed(7));
            assert_eq!(table(), table(), "{case:?}");
        }
        for packed in BOTH {
            let garbage = |seed| table_of(Hostile::Garbage, packed, Source::seed(seed));
            assert_ne!(garbage(1), garbage(2));
        }
    }

    #[test]
    fn a_short_input_still_makes_a_case() {
        for (case, packed) in Hostile::ALL.iter().flat_map(|case| BOTH.map(|packed| (case, packed))) {
            assert!(table_of(*case, packed, Source::bytes(&[1, 2, 3])).1, "{case:?}");
        }
    }

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let mut source = Source::bytes(&[1, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!((source.next_u64(), source.next_u64(), source.is_empty()), (1, 2, true));
        assert_eq!(Source::seed(3).below(0), 0);
    }

    #[test]
    fn a_loop_comes_back_to_its_start() {
        let (table, _) = table_of(Hostile::Loop, false, Source::seed(0));
        let mut at = 0;
        for _ in 0..16 {
            assert_ne!(table[at].flags & desc_flags::NEXT, 0);
            at = table[at].next.into();
        }
        assert_eq!(at, 0);
    }
}
