//! ELF64 program headers and the PVH note.

use std::ops::Range;

/// A program header.
pub struct Segment {
    pub kind: u32,
    pub file: Range<usize>,
    pub phys: u64,
    pub memory_len: u64,
}

fn u64_at(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
}

fn u32_at(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
}

fn u16_at(image: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes(image[at..at + 2].try_into().unwrap()))
}

pub fn segments(image: &[u8]) -> Vec<Segment> {
    let start = usize::try_from(u64_at(image, 32)).unwrap();
    let (size, count) = (u16_at(image, 54), u16_at(image, 56));
    (0..count)
        .map(|i| {
            let header = &image[start + i * size..];
            let offset = usize::try_from(u64_at(header, 8)).unwrap();
            let file_len = usize::try_from(u64_at(header, 32)).unwrap();
            Segment {
                kind: u32_at(header, 0),
                file: offset..offset + file_len,
                phys: u64_at(header, 24),
                memory_len: u64_at(header, 40),
            }
        })
        .collect()
}

pub fn loads(image: &[u8]) -> Vec<Segment> {
    segments(image).into_iter().filter(|segment| segment.kind == 1).collect()
}

/// The entry of the note `Xen`, type 18.
pub fn pvh_entry(image: &[u8]) -> Option<u64> {
    segments(image).into_iter().filter(|segment| segment.kind == 4).find_map(|segment| {
        let note = &image[segment.file];
        let is_pvh = u32_at(note, 0) == 4 && u32_at(note, 8) == 18 && &note[12..16] == b"Xen\0";
        (is_pvh && u32_at(note, 4) == 8).then(|| u64_at(note, 16))
    })
}
