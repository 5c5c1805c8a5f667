//! Flat binaries: code without any header, for small guests and tests.

use freestone_memory::layout::{BOOT_GDT, BOOT_PAGE_TABLES_END, HIGH_MEMORY};
use freestone_memory::{Bytes, GuestAddress, GuestMem};

use crate::boot::{Entry, Format, Loaded};
use crate::ram::Ram;
use crate::{Error, Result};

/// The processor mode in which a flat binary starts, at its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlatMode {
    /// 16-bit real mode. The binary must lie below 1 MiB. One that lies in the first 64 KiB is entered with CS 0 (as a boot
    /// sector at 0x7C00 is), another one with CS = `at` / 16.
    Real16,
    /// 32-bit protected mode, flat segments, paging off.
    Protected32,
    /// 64-bit mode, memory mapped to itself.
    Long64,
}

/// Copies `image` to guest-physical address `at`.
///
/// In the 32-bit and 64-bit modes the binary may not touch `BOOT_GDT..BOOT_PAGE_TABLES_END` of
/// [`freestone_memory::layout`], where the boot state is. No command line and no memory map is written.
///
/// # Errors
/// [`Error::Flat`] when the binary is empty or cannot lie there, [`Error::Write`] when the write fails.
pub fn load_flat(mem: &GuestMem, image: &[u8], at: u64, mode: FlatMode) -> Result<Loaded> {
    let refused = |problem| Err(Error::Flat { len: image.len(), at, problem });
    if image.is_empty() {
        return refused("is empty");
    }
    let end = u64::try_from(image.len()).ok().and_then(|len| at.checked_add(len));
    let Some(end) = end.filter(|&end| Ram::of(mem).contains(&(at..end))) else {
        return refused("lies outside of guest RAM below 4 GiB");
    };
    let entry = match mode {
        FlatMode::Real16 => match real_mode_entry(at, end) {
            Some(entry) => entry,
            None => return refused("does not lie below 1 MiB, as real mode needs"),
        },
        FlatMode::Protected32 => Entry::Flat32 { entry: at },
        FlatMode::Long64 => Entry::Flat64 { entry: at },
    };
    if mode != FlatMode::Real16 && at < BOOT_PAGE_TABLES_END && end > BOOT_GDT {
        return refused("overlaps the boot data at 0x500..0x20000");
    }
    mem.view().write_slice(image, GuestAddress(at)).map_err(|source| Error::Write {
        what: "flat binary",
        gpa: at,
        len: image.len(),
        source,
    })?;
    Ok(Loaded {
        entry,
        format: Format::Flat,
        kernel: at..end,
        segments: std::iter::once(at..end).collect(),
        initrd: None,
        cmdline: None,
    })
}

fn real_mode_entry(at: u64, end: u64) -> Option<Entry> {
    if end > HIGH_MEMORY {
        return None;
    }
    match u16::try_from(at) {
        Ok(offset) if end <= 0x1_0000 => Some(Entry::Real16 { segment: 0, offset }),
        _ => Some(Entry::Real16 {
            segment: u16::try_from(at >> 4).ok()?,
            offset: u16::try_from(at & 0xf).ok()?,
        }),
    }
}
