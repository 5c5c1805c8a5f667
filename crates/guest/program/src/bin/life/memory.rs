//! Memory that is verified as a whole in every round, and written in parts.
//!
//! In round `r` the pages `p` with `(r + p) % 8 == 0` are written anew. So what every page has to hold after any round is known without
//! writing it down.

use freestone_guest_program::phys;
use freestone_guest_program::pvh::StartInfo;

pub const PAGE: u64 = 4096;
const WORDS: u64 = PAGE / 8;
/// One page of so many is written in a round.
const PART: u64 = 8;
const ODD: u64 = 0x9E37_79B9_7F4A_7C15;

/// Mixes a number (the finalizer of SplitMix64).
pub fn mix(n: u64) -> u64 {
    let n = (n ^ n >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ n >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ n >> 31
}

/// The working set.
pub struct Memory {
    start: u64,
    pages: u64,
}

/// A word that is not what it has to be.
pub struct Wrong {
    pub at: u64,
    pub is: u64,
    pub expected: u64,
}

/// The round in which page `page` was last written, when `round` was the last.
fn stamp(round: u64, page: u64) -> u64 {
    round.saturating_sub((round + page) % PART)
}

fn base(stamp: u64, page: u64) -> u64 {
    mix(stamp.wrapping_mul(ODD) ^ page << 48)
}

impl Memory {
    /// At most `kib` KiB of RAM above this image, filled for round 0.
    pub fn new(info: Option<StartInfo>, kib: u64) -> Self {
        let start = phys::image().end;
        let ranges = info.into_iter().flat_map(StartInfo::memory).filter(|range| range.kind == 1);
        let mut room = ranges.filter_map(|range| {
            let end = range.start.checked_add(range.len)?.min(phys::MAPPED);
            (range.start <= start && start < end).then_some(end - start)
        });
        let pages = room.next().unwrap_or(0).min(kib << 10) / PAGE;
        let this = Self { start, pages };
        (0..pages).for_each(|page| this.write(page, 0));
        this
    }

    /// KiB of it.
    pub fn kib(&self) -> u64 {
        (self.pages * PAGE) >> 10
    }

    fn write(&self, page: u64, stamp: u64) {
        let base = base(stamp, page);
        for word in 0..WORDS {
            // SAFETY: RAM by the loader's map, above this image.
            unsafe {
                phys::write(self.start + PAGE * page + 8 * word, base.wrapping_add(word.wrapping_mul(ODD)))
            };
        }
    }

    /// Verifies all that was written up to the round before, writes this round's pages, and hashes what was read.
    pub fn round(&self, round: u64) -> Result<u64, Wrong> {
        let mut hash = round;
        for page in 0..self.pages {
            let base = base(stamp(round - 1, page), page);
            for word in 0..WORDS {
                let at = self.start + PAGE * page + 8 * word;
                let is = phys::read::<u64>(at).unwrap_or(0);
                let expected = base.wrapping_add(word.wrapping_mul(ODD));
                if is != expected {
                    return Err(Wrong { at, is, expected });
                }
                hash = hash.rotate_left(1) ^ is;
            }
            if (round + page).is_multiple_of(PART) {
                self.write(page, round);
            }
        }
        Ok(mix(hash))
    }
}
