//! What a kernel file asks for, checked in full before a byte of guest memory is written.
//!
//! The parsers of the formats make a [`Plan`]; carrying it out is the same for all.

use std::ops::Range;

use freestone_memory::layout::HIGH_MEMORY;
use freestone_memory::{Bytes, GuestAddress, MemoryView};
use linux_loader::loader::bootparam::setup_header;

use crate::image::Image;
use crate::ram::Ram;
use crate::{Error, Format, Result};

/// Longest command line that Linux on x86 reads, without its NUL (`COMMAND_LINE_SIZE` - 1). It cuts longer ones silently.
pub(crate) const LINUX_CMDLINE_MAX: usize = 2047;

/// A part of the file and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub file_len: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes in memory: what the file has not is zero.
    pub mem_len: u64,
}

impl Segment {
    /// Guest-physical range in memory. Saturates: [`check_segments`] refuses what wraps.
    pub(crate) fn range(&self) -> Range<u64> {
        self.gpa..self.gpa.saturating_add(self.mem_len)
    }

    /// Guest-physical range that is filled from the file.
    fn file_range(&self) -> Range<u64> {
        self.gpa..self.gpa.saturating_add(self.file_len)
    }
}

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryPoint {
    /// 32-bit entry of the PVH note.
    Pvh(u64),
    /// 64-bit entry of the Linux boot protocol.
    Linux64(u64),
    /// 32-bit entry of the Linux boot protocol.
    Linux32(u64),
}

/// A kernel that may be loaded.
#[derive(Debug)]
pub(crate) struct Plan {
    pub format: Format,
    pub segments: Vec<Segment>,
    /// Memory that belongs to the kernel from the start; it may be more than the segments.
    pub kernel: Range<u64>,
    pub entry: EntryPoint,
    /// The setup header that `boot_params` starts from (used by the Linux boot protocols).
    pub setup: setup_header,
    /// First address an initrd may not reach.
    pub initrd_limit: u64,
    /// Longest command line, without its NUL.
    pub cmdline_max: usize,
}

/// Checks that the segments are sane, disjoint and in RAM above the boot data; answers the range that holds them all.
pub(crate) fn check_segments(image: &Image<'_>, ram: &Ram, segments: &mut [Segment]) -> Result<Range<u64>> {
    for segment in segments.iter() {
        image.check_inside("segment", segment.offset, segment.file_len)?;
        if segment.file_len > segment.mem_len {
            return Err(misplaced(image, segment, "is larger in the file than in memory"));
        }
        if segment.gpa.checked_add(segment.mem_len).is_none() {
            return Err(misplaced(image, segment, "wraps around the address space"));
        }
        check_range(image, ram, "segment", segment.range())?;
    }
    segments.sort_unstable_by_key(|s| s.gpa);
    for pair in segments.windows(2) {
        if let [low, high] = pair
            && low.range().end > high.gpa
        {
            return Err(misplaced(image, high, "overlaps another segment"));
        }
    }
    match (segments.first(), segments.last()) {
        (Some(first), Some(last)) => Ok(first.gpa..last.range().end),
        _ => Err(Error::NothingToLoad { name: image.name().to_owned() }),
    }
}

/// Checks that a range is in RAM at or above 1 MiB.
pub(crate) fn check_range(image: &Image<'_>, ram: &Ram, part: &'static str, range: Range<u64>) -> Result<()> {
    if range.start < HIGH_MEMORY {
        return Err(Error::Placement {
            name: image.name().to_owned(),
            part,
            start: range.start,
            len: range.end.saturating_sub(range.start),
            problem: "lies below 1 MiB, where the boot data is",
        });
    }
    if !ram.contains(&range) {
        return Err(Error::OutsideRam {
            name: image.name().to_owned(),
            part,
            start: range.start,
            end: range.end,
            ram_end: ram.end(),
        });
    }
    Ok(())
}

/// Checks that execution starts at a byte that came from the file.
pub(crate) fn check_entry(image: &Image<'_>, segments: &[Segment], entry: u64) -> Result<()> {
    if segments.iter().any(|s| s.file_range().contains(&entry)) {
        return Ok(());
    }
    Err(Error::EntryOutside { name: image.name().to_owned(), entry })
}

fn misplaced(image: &Image<'_>, segment: &Segment, problem: &'static str) -> Error {
    Error::Placement {
        name: image.name().to_owned(),
        part: "segment",
        start: segment.gpa,
        len: segment.mem_len,
        problem,
    }
}

impl Plan {
    /// Where the first byte from the file goes.
    pub(crate) fn load_address(&self) -> u64 {
        self.segments.first().map_or(self.kernel.start, |s| s.gpa)
    }

    /// Fills the segments from the file and clears their tails.
    pub(crate) fn load_segments(&self, image: &mut Image<'_>, view: &MemoryView) -> Result<()> {
        for segment in &self.segments {
            if segment.file_len > 0 {
                image.read_into(view, segment.offset, segment.file_len, segment.gpa)?;
            }
            clear(view, segment.file_range().end..segment.range().end)?;
        }
        Ok(())
    }
}

/// Writes zeroes, without a buffer as large as the range.
fn clear(view: &MemoryView, range: Range<u64>) -> Result<()> {
    static ZEROES: [u8; 0x1_0000] = [0; 0x1_0000];
    let mut gpa = range.start;
    while gpa < range.end {
        let len = usize::try_from(range.end - gpa).unwrap_or(usize::MAX).min(ZEROES.len());
        let zeroes = ZEROES.get(..len).unwrap_or(&ZEROES);
        view.write_slice(zeroes, GuestAddress(gpa)).map_err(|source| Error::Write {
            what: "zeroes of a segment",
            gpa,
            len,
            source,
        })?;
        gpa += u64::try_from(zeroes.len()).unwrap_or(u64::MAX);
    }
    Ok(())
}
