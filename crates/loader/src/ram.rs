//! The guest's RAM below 4 GiB as this crate sees it: where a kernel may be and where an initrd fits.
//!
//! Nothing is ever placed above 4 GiB: every entry protocol has 32-bit fields somewhere.

use std::ops::Range;

use freestone_memory::layout::{PAGE_SIZE, RAM_ABOVE_HOLE, RamRange};
use freestone_memory::{Address, GuestMem, GuestMemoryRegion};

/// RAM ranges as `layout::e820` takes them.
pub(crate) fn ranges(mem: &GuestMem) -> Vec<RamRange> {
    mem.regions().iter().map(|r| RamRange { start: r.start_addr().raw_value(), len: r.len() }).collect()
}

/// RAM below 4 GiB: sorted, adjacent regions joined.
#[derive(Debug)]
pub(crate) struct Ram(Vec<Range<u64>>);

impl Ram {
    pub(crate) fn of(mem: &GuestMem) -> Self {
        Self::from_ranges(&ranges(mem))
    }

    fn from_ranges(ranges: &[RamRange]) -> Self {
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            let (start, end) = (range.start, range.start.saturating_add(range.len).min(RAM_ABOVE_HOLE));
            match joined.last_mut() {
                _ if start >= end => {}
                Some(last) if last.end == start => last.end = end,
                _ => joined.push(start..end),
            }
        }
        Self(joined)
    }

    /// First address beyond the last RAM below 4 GiB.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, |r| r.end)
    }

    pub(crate) fn contains(&self, range: &Range<u64>) -> bool {
        self.0.iter().any(|r| r.start <= range.start && range.end <= r.end)
    }

    /// The highest page-aligned address of `len` free bytes within `window`, not touching `taken`.
    pub(crate) fn highest_free(&self, len: u64, window: &Range<u64>, taken: &Range<u64>) -> Option<u64> {
        self.0.iter().rev().find_map(|ram| {
            let start = ram.start.max(window.start);
            let end = ram.end.min(window.end);
            let above = fit(start.max(taken.end)..end, len);
            above.or_else(|| fit(start..end.min(taken.start), len))
        })
    }
}

/// Highest page-aligned start of `len` bytes in `free`.
fn fit(free: Range<u64>, len: u64) -> Option<u64> {
    let start = free.end.checked_sub(len)? & !(PAGE_SIZE - 1);
    (start >= free.start && free.start < free.end).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(ranges: &[(u64, u64)]) -> Ram {
        Ram::from_ranges(&ranges.iter().map(|&(start, len)| RamRange { start, len }).collect::<Vec<_>>())
    }

    #[test]
    fn adjacent_regions_are_one() {
        assert!(ram(&[(0, 0x10_0000), (0x10_0000, 0x10_0000)]).contains(&(0xf_0000..0x11_0000)));
    }

    #[test]
    fn range_across_a_hole_is_not_contained() {
        assert!(!ram(&[(0, 0x10_0000), (0x20_0000, 0x10_0000)]).contains(&(0xf_0000..0x21_0000)));
    }

    #[test]
    fn ram_above_4_gib_is_not_seen() {
        assert_eq!(ram(&[(0, 0xc000_0000), (1 << 32, 1 << 30)]).end(), 0xc000_0000);
    }

    #[test]
    fn free_place_is_the_highest_page_below_the_limit() {
        let r = ram(&[(0, 64 << 20)]);
        let taken = 0x100_0000..0x200_0000;
        assert_eq!(r.highest_free(0x1001, &(0x10_0000..u64::MAX), &taken), Some((64 << 20) - 0x2000));
        assert_eq!(r.highest_free(0x1001, &(0x10_0000..0x300_0000), &taken), Some(0x2ff_e000));
    }

    #[test]
    fn free_place_goes_below_a_kernel_at_the_top() {
        let r = ram(&[(0, 64 << 20)]);
        assert_eq!(
            r.highest_free(0x2000, &(0x10_0000..u64::MAX), &(0x100_0000..0x3ff_f000)),
            Some(0xff_e000)
        );
    }

    #[test]
    fn no_free_place_is_none() {
        let r = ram(&[(0, 64 << 20)]);
        assert_eq!(r.highest_free(63 << 20, &(0x10_0000..u64::MAX), &(0x100_0000..0x200_0000)), None);
        assert_eq!(r.highest_free(u64::MAX, &(0x10_0000..u64::MAX), &(0..0)), None);
        assert_eq!(r.highest_free(0x1000, &(0x10_0000..0x10_0000), &(0..0)), None);
    }
}
