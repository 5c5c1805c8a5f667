//! [`Extents`]: which pages of an image there are.

use super::ImageLayout;
use crate::layout::PAGE_SIZE;
use crate::pages::{Span, push};
use crate::{DirtyPages, Error, Result};

/// Neighbouring pages of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the image.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Pages of an image: sorted, apart from each other, whole pages, within the image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extents(Vec<Extent>);

impl Extents {
    /// Checks extents, which may come from anywhere.
    ///
    /// # Errors
    /// [`Error::Extent`]: not whole pages, not sorted or overlapping, or not in an image of this layout.
    pub fn new(extents: Vec<Extent>, layout: &ImageLayout) -> Result<Self> {
        let mut free = 0;
        for &Extent { offset, len } in &extents {
            let refuse = |reason| Err(Error::Extent { offset, len, reason });
            if len == 0 || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
                return refuse("offset and length must be non-zero multiples of the page size");
            }
            if offset < free {
                return refuse("they must be sorted and must not overlap");
            }
            free = match offset.checked_add(len) {
                Some(end) if end <= layout.size() => end,
                _ => return refuse("they are beyond the end of the image"),
            };
        }
        Ok(Self(extents))
    }

    /// The whole image.
    pub fn all(layout: &ImageLayout) -> Self {
        Self(vec![Extent { offset: 0, len: layout.size() }])
    }

    /// Where in an image these dirty pages are.
    ///
    /// # Errors
    /// [`Error::ImageMemory`] if a page is not in the image: it would be lost.
    pub fn of_dirty(dirty: &[DirtyPages], layout: &ImageLayout) -> Result<Self> {
        let mut spans = Vec::new();
        for gpa in dirty.iter().flat_map(DirtyPages::pages) {
            let Some(start) = layout.offset_of(gpa) else {
                let reason = "is dirty and has no place in the image";
                return Err(Error::ImageMemory { gpa, len: PAGE_SIZE, reason });
            };
            push(&mut spans, Span { start, end: start + PAGE_SIZE });
        }
        let in_order = |pair: &[Span]| matches!(pair, [a, b] if a.end <= b.start);
        if !spans.windows(2).all(in_order) {
            // Logs that were not in the order of the regions.
            spans.sort_by_key(|span| span.start);
            let mut joined = Vec::with_capacity(spans.len());
            spans.into_iter().for_each(|span| push(&mut joined, span));
            spans = joined;
        }
        Ok(Self::from_spans(&spans))
    }

    pub(super) fn from_spans(spans: &[Span]) -> Self {
        Self(spans.iter().map(|span| Extent { offset: span.start, len: span.end - span.start }).collect())
    }

    /// The extents, by rising offset.
    pub fn as_slice(&self) -> &[Extent] {
        &self.0
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        // They do not overlap and are within an image.
        self.0.iter().map(|extent| extent.len).sum()
    }

    /// The extents as they are.
    pub fn into_inner(self) -> Vec<Extent> {
        self.0
    }

    pub(super) fn spans(&self) -> impl Iterator<Item = Span> {
        self.0.iter().map(|extent| Span { start: extent.offset, end: extent.offset + extent.len })
    }

    /// The parts of the extents within `span`.
    pub(super) fn within(&self, span: Span) -> impl Iterator<Item = Span> {
        let first = self.0.partition_point(|extent| extent.offset + extent.len <= span.start);
        let rest = self.0.get(first..).unwrap_or_default().iter();
        rest.map_while(move |extent| {
            Span { start: extent.offset, end: extent.offset + extent.len }.clip(span)
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::layout::RamRange;

    fn layout() -> ImageLayout {
        let ranges = [RamRange { start: 0, len: 0x4000 }, RamRange { start: 0x10_0000, len: 0x4000 }];
        ImageLayout::new(&ranges).unwrap()
    }

    fn extents(list: &[(u64, u64)]) -> Result<Extents> {
        Extents::new(list.iter().map(|&(offset, len)| Extent { offset, len }).collect(), &layout())
    }

    #[test]
    fn extents_within_the_image_are_taken() {
        let extents = extents(&[(0, 0x1000), (0x1000, 0x2000), (0x7000, 0x1000)]).unwrap();
        assert_eq!(extents.bytes(), 0x4000);
    }

    #[test]
    fn what_are_no_pages_of_the_image_is_refused() {
        for list in [
            &[(0, 0)][..],
            &[(0, 0x1001)],
            &[(8, 0x1000)],
            &[(0x8000, 0x1000)],
            &[(0x7000, 0x2000)],
            &[(!0xFFF, 0x1000)],
            &[(0x1000, !0xFFF)],
            &[(0, 0x2000), (0x1000, 0x1000)],
            &[(0x2000, 0x1000), (0, 0x1000)],
        ] {
            assert!(matches!(extents(list), Err(Error::Extent { .. })), "{list:x?}");
        }
    }

    #[test]
    fn dirty_pages_have_their_places_in_whatever_order_the_regions_come() {
        let high = DirtyPages::new(GuestAddress(0x10_0000), vec![0b1001]);
        let low = DirtyPages::new(GuestAddress(0), vec![0b1100]);
        for dirty in [[low.clone(), high.clone()], [high, low]] {
            let found = Extents::of_dirty(&dirty, &layout()).unwrap();
            assert_eq!(found, extents(&[(0x2000, 0x3000), (0x7000, 0x1000)]).unwrap());
        }
    }

    #[test]
    fn a_dirty_page_without_a_place_is_refused() {
        for (start, bits) in [(0x4000, 1), (0, 0b1_0000), (u64::MAX - 0xFFF, 0b10_0000_0000_0000_0000)] {
            let dirty = [DirtyPages::new(GuestAddress(start), vec![bits])];
            let found = Extents::of_dirty(&dirty, &layout());
            assert!(matches!(found, Err(Error::ImageMemory { .. })), "{start:#x} {found:?}");
        }
    }
}
