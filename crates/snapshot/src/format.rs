//! The bytes of a snapshot, and what both sides of it share. Not the bodies of sections: those are their owners'.
//!
//! All numbers are little-endian and unsigned. A snapshot is a header, any number of sections, and an end:
//!
//! ```text
//! header ( SECT DATA* DONE )* END!
//! ```
//!
//! # The header
//!
//! The layout of the header is the same in every version of the format, so that any version can say what a file is and
//! who wrote it.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic: `FREESNAP` |
//! | 8 | 2 | format version: 1 |
//! | 10 | 2 | length of the header with its checksum, at most 4096. Format 1: 22 + *n* |
//! | 12 | 2 | architecture: 1 x86-64, 2 AArch64, 3 RISC-V 64 |
//! | 14 | 2 | flags. None is defined: a reader refuses those that it does not know |
//! | 16 | 2 | *n*: length of the program's name, at most 255 |
//! | 18 | *n* | name and version of the program that wrote it, UTF-8, without control characters |
//! | length - 4 | 4 | chain checksum |
//!
//! # Frames
//!
//! After the header come frames. Each is 16 bytes, and `SECT` has a name of *n* bytes before its checksum.
//!
//! | offset | bytes | `SECT`: a section begins | `DATA`: a piece of its body | `DONE`: it ends | `END!`: the last frame |
//! |---|---|---|---|---|---|
//! | 0 | 4 | `SECT` | `DATA` | `DONE` | `END!` |
//! | 4 | 4 | version of the section | length, 1 to 1 MiB | length of the body, 8 bytes | number of sections |
//! | 8 | 2 | flags: bit 0 optional, others 0 | CRC-32 of the piece, 4 bytes | | zero, 4 bytes |
//! | 10 | 2 | *n*: length of the name, 1 to 255 | | | |
//! | 12 + *n* | 4 | chain checksum | chain checksum | chain checksum | chain checksum |
//! | 16 | | | the piece | | |
//!
//! A name is UTF-8 without control characters. `KIND/INSTANCE` names one of several sections of a kind. Names are unique.
//! The order of sections means nothing to the container.
//!
//! # Checksums
//!
//! All are CRC-32 (ISO-HDLC, as in gzip). The chain checksum is of every byte of the header and of all frames up to it,
//! except for the pieces of bodies and the chain checksums themselves. Each piece is vouched for by the CRC in its frame, and
//! the frame by the chain: what is dropped, doubled, moved or cut off is found at the next frame, before anything of it is
//! used. The chain leaves out its own values because the CRC of a message with its CRC behind it is a constant.
//!
//! Checksums find accidents. They do not stop somebody who means harm: what comes out of a snapshot is untrusted input.

use crate::{Error, Result};

/// The first bytes of every snapshot.
pub const MAGIC: [u8; 8] = *b"FREESNAP";
/// The version of the format that this crate writes, and the newest that it reads.
pub const VERSION: u16 = 1;
/// The longest piece of a body, in bytes.
pub const CHUNK_MAX: u32 = 1 << 20;
/// The longest name of a section, in bytes.
pub const NAME_MAX: usize = 255;
/// The longest name of a program, in bytes.
pub const PROGRAM_MAX: usize = 255;
/// The longest header of any version, in bytes.
pub const HEADER_MAX: u16 = 4096;

pub(crate) const SECTION: [u8; 4] = *b"SECT";
pub(crate) const DATA: [u8; 4] = *b"DATA";
pub(crate) const DONE: [u8; 4] = *b"DONE";
pub(crate) const END: [u8; 4] = *b"END!";
/// A frame without its name and its chain checksum.
pub(crate) const FRAME: usize = 12;
/// Flag of a section: who does not know it may leave it out.
pub(crate) const OPTIONAL: u16 = 1;

/// The running checksum of the framing.
#[derive(Clone, Default)]
pub(crate) struct Chain(crc32fast::Hasher);

impl Chain {
    /// Adds `bytes` and gives the checksum of all so far.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> u32 {
        self.0.update(bytes);
        self.0.clone().finalize()
    }
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Chain({:#010x})", self.0.clone().finalize())
    }
}

/// Takes the next `N` bytes of `bytes`.
pub(crate) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*first)
}

/// Whether `text` may stand in a header or frame: bounded, and harmless on a terminal.
pub(crate) fn is_plain(text: &str, max: usize) -> bool {
    text.len() <= max && !text.chars().any(char::is_control)
}

pub(crate) fn check_name(name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_MAX {
        "it is longer than 255 bytes"
    } else if !is_plain(name, NAME_MAX) {
        "it has control characters"
    } else {
        return Ok(());
    };
    Err(Error::Name { name: name.chars().take(NAME_MAX).collect(), reason })
}
