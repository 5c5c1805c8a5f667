//! Checksums of an image: a CRC-32 for each [`CHUNK`] of it.
//!
//! The checksum of a chunk is that of its pages that are there, one after the other. A full image has all of them, zeros and
//! holes too, so it is that of the chunk's bytes; a difference has those of its extents. A chunk with no page has checksum 0,
//! which is the CRC-32 of nothing.

use std::sync::OnceLock;

use crc32fast::Hasher;

use super::{CHUNK, ImageLayout};
use crate::layout::PAGE_SIZE;
use crate::pages::PAGE;

const ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// The checksum of `len` zeros, a multiple of the page size.
pub(super) fn of_zeros(len: u64) -> u32 {
    static WHOLE: OnceLock<u32> = OnceLock::new();
    let count = |len| {
        let mut hasher = Hasher::new();
        zeros(&mut hasher, len);
        hasher.finalize()
    };
    // Most of an image can be such chunks.
    if len == CHUNK { *WHOLE.get_or_init(|| count(CHUNK)) } else { count(len) }
}

pub(super) fn zeros(hasher: &mut Hasher, len: u64) {
    (0..len / PAGE_SIZE).for_each(|_| hasher.update(&ZERO_PAGE));
}

/// Counts the checksums of an image of which the pages come by rising offset.
#[derive(Debug)]
pub(super) struct Sums {
    /// Pages that do not come are zeros, and count.
    full: bool,
    size: u64,
    done: Vec<u32>,
    hasher: Hasher,
    /// Offset up to which everything is counted.
    at: u64,
}

impl Sums {
    pub(super) fn new(layout: &ImageLayout, full: bool) -> Self {
        let done = Vec::with_capacity(layout.chunks());
        Self { full, size: layout.size(), done, hasher: Hasher::new(), at: 0 }
    }

    /// Counts a page at `offset`, a multiple of the page size that is not below any before it.
    pub(super) fn page(&mut self, offset: u64, bytes: &[u8]) {
        self.skip_to(offset);
        self.hasher.update(bytes);
        self.step(PAGE_SIZE);
    }

    /// Goes on to `offset`: what is before it did not come.
    pub(super) fn skip_to(&mut self, offset: u64) {
        while self.at < offset {
            let chunk = self.at - self.at % CHUNK;
            let len = offset.min(chunk + CHUNK) - self.at;
            if self.full {
                if self.at == chunk && len == CHUNK {
                    self.done.push(of_zeros(CHUNK));
                    self.at += CHUNK;
                    continue;
                }
                zeros(&mut self.hasher, len);
            }
            self.step(len);
        }
    }

    /// Counts `len` zeros at `offset` that are there.
    pub(super) fn zeros(&mut self, offset: u64, len: u64) {
        self.skip_to(offset);
        let full = std::mem::replace(&mut self.full, true);
        self.skip_to(offset + len);
        self.full = full;
    }

    fn step(&mut self, len: u64) {
        self.at += len;
        if self.at.is_multiple_of(CHUNK) || self.at == self.size {
            self.done.push(std::mem::take(&mut self.hasher).finalize());
        }
    }

    pub(super) fn finish(mut self) -> Vec<u32> {
        self.skip_to(self.size);
        self.done
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "lengths in tests are small")]
mod tests {
    use super::*;
    use crate::layout::RamRange;

    fn layout(size: u64) -> ImageLayout {
        ImageLayout::new(&[RamRange { start: 0, len: size }]).unwrap()
    }

    fn crc(bytes: &[u8]) -> u32 {
        crc32fast::hash(bytes)
    }

    #[test]
    fn a_full_image_has_the_checksums_of_its_bytes() {
        let layout = layout(3 * CHUNK + 0x2000);
        let mut content = vec![0; layout.size() as usize];
        let mut sums = Sums::new(&layout, true);
        for offset in [0x3000, CHUNK - 0x1000, CHUNK, 3 * CHUNK + 0x1000] {
            let page = [offset as u8 | 1; 4096];
            content[offset as usize..][..4096].copy_from_slice(&page);
            sums.page(offset, &page);
        }
        let expected: Vec<u32> = content.chunks(CHUNK as usize).map(crc).collect();
        assert_eq!(sums.finish(), expected);
    }

    #[test]
    fn a_difference_has_the_checksums_of_its_pages() {
        let layout = layout(4 * CHUNK);
        let mut sums = Sums::new(&layout, false);
        sums.page(0x3000, &[1; 4096]);
        sums.zeros(0x9000, 0x1000);
        sums.page(2 * CHUNK - 0x1000, &[2; 4096]);
        sums.zeros(2 * CHUNK, 0x1000);
        let first = [[1; 4096], [0; 4096]].concat();
        assert_eq!(sums.finish(), [crc(&first), crc(&[2; 4096]), crc(&[0; 4096]), 0]);
    }

    #[test]
    fn nothing_at_all_is_zeros_in_a_full_image() {
        let zeros = vec![0; CHUNK as usize];
        assert_eq!(Sums::new(&layout(CHUNK + 0x1000), true).finish(), [crc(&zeros), crc(&[0; 4096])]);
        assert_eq!(Sums::new(&layout(CHUNK + 0x1000), false).finish(), [0, 0]);
    }
}
