//! What the state file says of the memory file.

use freestone_memory::GuestMem;
use freestone_memory::image::{Extent, Extents, ImageLayout};
use freestone_memory::layout::RamRange;
use freestone_snapshot::Section;
use serde::{Deserialize, Serialize};

use super::Id;
use crate::Result;

/// The memory of a snapshot: section `memory`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySection {
    pub(super) id: Id,
    /// The snapshot that this one says only the differences to.
    pub(super) base: Option<Id>,
    /// Name of the memory file in the folder of the state file, if it was named there.
    pub(super) file: Option<String>,
    /// Guest-physical address and length of each range, in the order of the file.
    pub(super) ranges: Vec<(u64, u64)>,
    /// What of the file is there: offset and length. Of a full image all is.
    pub(super) extents: Vec<(u64, u64)>,
    pub(super) checksums: Option<Vec<u32>>,
}

impl Section for MemorySection {
    const NAME: &'static str = "memory";
    const VERSION: u32 = 1;
}

impl MemorySection {
    pub(super) fn new(id: Id, base: Option<Id>, layout: &ImageLayout) -> Self {
        let ranges = layout.ranges().map(|range| (range.start, range.len)).collect();
        Self { id, base, file: None, ranges, extents: vec![(0, layout.size())], checksums: None }
    }

    /// All memory of this layout.
    pub(crate) fn of(id: Id, layout: &ImageLayout) -> Self {
        Self::new(id, None, layout)
    }

    /// The snapshot.
    pub fn id(&self) -> Id {
        self.id
    }

    /// The snapshot that this one is the difference to; `None` if it has all memory.
    pub fn base(&self) -> Option<Id> {
        self.base
    }

    /// Name of the memory file beside the state file, if the snapshot says so.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// Checksums of the image, one for each [`CHUNK`](freestone_memory::image::CHUNK), if there are any.
    pub fn checksums(&self) -> Option<&[u32]> {
        self.checksums.as_deref()
    }

    /// What is where in the file, checked.
    ///
    /// # Errors
    /// If the ranges are impossible.
    pub fn layout(&self) -> Result<ImageLayout> {
        let ranges: Vec<_> = self.ranges.iter().map(|&(start, len)| RamRange { start, len }).collect();
        Ok(ImageLayout::new(&ranges)?)
    }

    /// What of the file is there, checked.
    ///
    /// # Errors
    /// If the extents are impossible.
    pub fn extents(&self, layout: &ImageLayout) -> Result<Extents> {
        let extents = self.extents.iter().map(|&(offset, len)| Extent { offset, len }).collect();
        Ok(Extents::new(extents, layout)?)
    }

    pub(super) fn set_extents(&mut self, extents: &Extents) {
        self.extents = extents.as_slice().iter().map(|extent| (extent.offset, extent.len)).collect();
    }
}

/// Where what of `memory` goes in an image: the RAM of the machine first, so that it can be mapped.
pub(super) fn layout_of(memory: &GuestMem) -> Result<ImageLayout> {
    Ok(ImageLayout::of_all(memory)?)
}
