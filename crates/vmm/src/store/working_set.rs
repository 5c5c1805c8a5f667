//! [`WorkingSet`]: which pages of a snapshot a guest used, so that the next restore has them at hand before it asks.
//!
//! It is a text file of its own beside the snapshot. A wrong one costs time and nothing else: it says what to read, never what is
//! in it.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use freestone_memory::GuestMem;
use freestone_memory::image::{Extent, ImageLayout};
use freestone_memory::layout::{PAGE_SIZE, RamRange};
use freestone_snapshot::AtomicFile;

use crate::{Error, Result};

/// The first line; the number is the version.
const MAGIC: &str = "freestone working set 1";
/// A longer file is refused.
const MAX_BYTES: u64 = 32 << 20;
/// What is more is not written. So many lines fit a file.
const MAX_EXTENTS: usize = 1 << 20;

/// Pages of a memory image in the order in which they were first used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    size: u64,
    extents: Vec<Extent>,
}

impl WorkingSet {
    /// Pages of an image of `size` bytes: what a page server has recorded.
    pub fn new(size: u64, extents: impl IntoIterator<Item = Extent>) -> Self {
        Self { size, extents: extents.into_iter().take(MAX_EXTENTS).collect() }
    }

    /// The pages that `memory` has in this process at the moment, by rising address: see [`GuestMem::working_set`].
    ///
    /// # Errors
    /// [`Error::Memory`] if the host does not tell.
    pub fn of(memory: &GuestMem, layout: &ImageLayout) -> Result<Self> {
        let extents = memory.working_set()?.into_iter().filter_map(|range| {
            // What was plugged in later is in no image.
            let offset = layout.offset_of(range.start)?;
            Some(Extent { offset, len: range.len })
        });
        Ok(Self::new(layout.size(), extents))
    }

    /// Bytes of the image that it is of.
    pub fn image_size(&self) -> u64 {
        self.size
    }

    /// The pages, as parts of the image.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.len))
    }

    /// The pages as guest-physical ranges, for [`GuestMem::prefetch`].
    pub fn ranges(&self, layout: &ImageLayout) -> Vec<RamRange> {
        self.extents.iter().flat_map(|extent| layout.pieces(*extent)).collect()
    }

    /// Writes the file aside, and then in the place of what was there.
    ///
    /// # Errors
    /// [`Error::Snapshot`] or [`Error::Io`] if it cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut text = format!("{MAGIC}\nimage {:#x}\n", self.size);
        for Extent { offset, len } in &self.extents {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{offset:#x} {len:#x}");
        }
        let aside = AtomicFile::create(path)?;
        let written = aside.file().write_all(text.as_bytes());
        written.map_err(|source| Error::Io { op: "write a working set", source })?;
        Ok(aside.commit()?)
    }

    /// Reads and checks a file, which may come from anywhere: whole pages of an image of this size, and no more of them than it has.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Stored`] with the line that is wrong.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |reason: String| Error::Stored { path: PathBuf::from(path), reason };
        let opened = File::open(path).and_then(|file| {
            let mut text = String::new();
            file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
            Ok(text)
        });
        let text = opened.map_err(|error| wrong(format!("it cannot be read: {error}")))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(wrong(format!("it is longer than {MAX_BYTES} bytes: it is no working set")));
        }
        Self::parse(&text).map_err(wrong)
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut lines = (1..).zip(text.lines());
        match lines.next() {
            Some((_, MAGIC)) => {}
            _ => {
                return Err(format!(
                    "it is no working set of this version: it does not begin with {MAGIC:?}"
                ));
            }
        }
        let size = lines.next().and_then(|(_, line)| number(line.strip_prefix("image ")?));
        let size = size.ok_or("line 2 does not say the size of the image")?;
        let (mut extents, mut bytes) = (Vec::new(), 0u64);
        for (at, line) in lines {
            let extent = line
                .split_once(' ')
                .and_then(|(offset, len)| Some(Extent { offset: number(offset)?, len: number(len)? }));
            let extent = extent.filter(|Extent { offset, len }| {
                let whole = offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && *len > 0;
                whole && offset.checked_add(*len).is_some_and(|end| end <= size)
            });
            let extent = extent.ok_or_else(|| format!("line {at} has no whole pages of {size:#x} bytes"))?;
            // Each is within the image, so that the sum is small until it is refused.
            bytes += extent.len;
            if bytes > size {
                return Err(format!("up to line {at} it has more than the {size:#x} bytes of the image"));
            }
            extents.push(extent);
        }
        Ok(Self { size, extents })
    }
}

fn number(text: &str) -> Option<u64> {
    // `from_str_radix` takes a sign.
    let digits = text.strip_prefix("0x").filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, len: u64) -> Extent {
        Extent { offset, len }
    }

    #[test]
    fn what_is_written_is_read_in_the_same_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        let set = WorkingSet::new(0x10_0000, [extent(0x8000, 0x2000), extent(0, 0x1000)]);
        set.write(&path).unwrap();
        assert_eq!(WorkingSet::read(&path).unwrap(), set);
        assert_eq!((set.bytes(), set.image_size()), (0x3000, 0x10_0000));
    }

    #[test]
    fn pages_are_found_by_their_place_in_the_image() {
        let ranges = [RamRange { start: 0, len: 0x4000 }, RamRange { start: 1 << 32, len: 0x4000 }];
        let layout = ImageLayout::new(&ranges).unwrap();
        let set = WorkingSet::new(layout.size(), [extent(0x5000, 0x1000), extent(0x3000, 0x2000)]);
        let piece = |start, len| RamRange { start, len };
        let expected = [piece((1 << 32) + 0x1000, 0x1000), piece(0x3000, 0x1000), piece(1 << 32, 0x1000)];
        assert_eq!(set.ranges(&layout), expected);
    }

    #[test]
    fn memory_that_was_touched_is_the_working_set() {
        use freestone_memory::{Bytes, GuestAddress};
        let memory = GuestMem::anonymous(1 << 20).unwrap();
        memory.view().write_obj(1u8, GuestAddress(0x5000)).unwrap();
        let layout = ImageLayout::of(&memory).unwrap();
        assert_eq!(WorkingSet::of(&memory, &layout).unwrap().extents(), [extent(0x5000, 0x1000)]);
    }

    #[test]
    fn what_is_no_working_set_is_refused_with_its_line() {
        let head = "freestone working set 1\nimage 0x4000\n";
        for (text, told) in [
            (String::new(), "does not begin"),
            ("freestone working set 2\nimage 0x4000\n".into(), "does not begin"),
            ("freestone working set 1\n".into(), "line 2"),
            ("freestone working set 1\nimage 16384\n".into(), "line 2"),
            (format!("{head}0x1000\n"), "line 3"),
            (format!("{head}0x1001 0x1000\n"), "line 3"),
            (format!("{head}0x1000 0x1001\n"), "line 3"),
            (format!("{head}0x1000 0x0\n"), "line 3"),
            (format!("{head}0x4000 0x1000\n"), "line 3"),
            (format!("{head}0xfffffffffffff000 0x1000\n"), "line 3"),
            (format!("{head}0x+1000 0x1000\n"), "line 3"),
            (format!("{head}0x0 0x3000\n0x1000 0x2000\n"), "up to line 4"),
        ] {
            let error = WorkingSet::parse(&text).unwrap_err();
            assert!(error.contains(told), "{text:?}: {error}");
        }
    }
}
