//! Walks page tables as a processor would.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::{
    ADDRESS, EFER_NXE, LARGE, Level, LevelSpec, PRESENT, PageFlags, PageSize, PagingMode, PagingState,
    phys_mask,
};

/// Bits 31:12, the address in a 4-byte entry.
const ADDRESS_32: u64 = 0xFFFF_F000;

/// One entry that was read on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalkStep {
    /// Level of the table.
    pub level: Level,
    /// Where the entry is.
    pub address: GuestAddress,
    /// What was there.
    pub entry: u64,
}

/// What a guest-virtual address means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Translation {
    /// The guest-physical address.
    pub gpa: GuestAddress,
    /// Size of the page; `None` when paging is off.
    pub page_size: Option<PageSize>,
    /// Every level allows writes (R/W). At CPL0 without CR0.WP a processor writes even if this is `false`.
    pub writable: bool,
    /// Every level allows accesses at CPL3 (U/S).
    pub user: bool,
    /// No level forbids instruction fetches (XD, where EFER.NXE enables it).
    pub executable: bool,
    /// G of the page.
    pub global: bool,
    /// A of the page.
    pub accessed: bool,
    /// D of the page.
    pub dirty: bool,
    steps: [Option<WalkStep>; 5],
}

impl Translation {
    /// The entries that were read, from the root to the page: at most five, none when paging is off.
    pub fn steps(&self) -> impl Iterator<Item = &WalkStep> {
        self.steps.iter().flatten()
    }
}

/// Why a guest-virtual address means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// The address is not canonical in 4-level or 5-level paging.
    #[error("guest-virtual address {gva:#x} is not canonical")]
    NotCanonical {
        /// The guest-virtual address.
        gva: u64,
    },
    /// The address has more than 32 bits, which the mode does not have.
    #[error("guest-virtual address {gva:#x} has more than 32 bits")]
    TooWide {
        /// The guest-virtual address.
        gva: u64,
    },
    /// An entry has P clear.
    #[error("guest-virtual {gva:#x}: {level} entry at {address:#x} is not present ({entry:#x})")]
    NotPresent {
        /// The guest-virtual address.
        gva: u64,
        /// Level of the entry.
        level: Level,
        /// Guest-physical address of the entry.
        address: u64,
        /// The entry.
        entry: u64,
    },
    /// An entry has a bit set that must be zero.
    #[error(
        "guest-virtual {gva:#x}: {level} entry at {address:#x} has reserved bits {bits:#x} set ({entry:#x})"
    )]
    ReservedBits {
        /// The guest-virtual address.
        gva: u64,
        /// Level of the entry.
        level: Level,
        /// Guest-physical address of the entry.
        address: u64,
        /// The entry.
        entry: u64,
        /// Those of its bits that are reserved.
        bits: u64,
    },
    /// A table is not in guest memory.
    #[error("guest-virtual {gva:#x}: {level} entry at {address:#x} is not in guest memory")]
    TableOutsideMemory {
        /// The guest-virtual address.
        gva: u64,
        /// Level of the table.
        level: Level,
        /// Guest-physical address of the entry that would be read.
        address: u64,
    },
    /// The page is not in guest memory: a device, or nothing at all.
    #[error("guest-virtual {gva:#x} is at guest-physical {gpa:#x}, which is not in guest memory")]
    PageOutsideMemory {
        /// The guest-virtual address.
        gva: u64,
        /// The guest-physical address.
        gpa: u64,
    },
}

/// Translates a guest-virtual address by the tables in `mem` (Intel SDM Vol. 3A, 4.3 to 4.5; AMD APM Vol. 2, 5.2 and 5.3).
///
/// The tables may hold anything. At most five entries are read, each once, and each atomically. Each level is checked as a
/// processor does it: presence first, then reserved bits. The page itself need not be in `mem`.
///
/// # Errors
/// [`WalkError`], which names the level and the address of the entry that ends the walk.
pub fn translate<M>(mem: &M, state: &PagingState, gva: u64) -> Result<Translation, WalkError>
where
    M: Bytes<GuestAddress> + ?Sized,
{
    let mode = state.mode();
    if !mode.contains(gva) {
        return Err(match mode {
            PagingMode::Level4 | PagingMode::Level5 => WalkError::NotCanonical { gva },
            _ => WalkError::TooWide { gva },
        });
    }
    let mut walk = Translation {
        gpa: GuestAddress(gva),
        page_size: None,
        writable: true,
        user: true,
        executable: true,
        global: false,
        accessed: false,
        dirty: false,
        steps: [None; 5],
    };
    let mut table = root(state, mode);
    for (spec, step) in mode.levels().iter().zip(&mut walk.steps) {
        let level = spec.level;
        let address = table + spec.index(gva) * mode.entry_size();
        let entry = load(mem, mode, address).ok_or(WalkError::TableOutsideMemory { gva, level, address })?;
        *step = Some(WalkStep { level, address: GuestAddress(address), entry });
        if entry & PRESENT == 0 {
            return Err(WalkError::NotPresent { gva, level, address, entry });
        }
        let leaf = leaf(state, mode, spec, entry);
        let bits = entry & reserved(state, mode, level, leaf);
        if bits != 0 {
            return Err(WalkError::ReservedBits { gva, level, address, entry, bits });
        }
        let flags = PageFlags::from_bits_truncate(entry);
        // The PDPT entries of PAE paging say nothing about access.
        if !(mode == PagingMode::Pae && level == Level::Pdpt) {
            walk.writable &= flags.contains(PageFlags::WRITABLE);
            walk.user &= flags.contains(PageFlags::USER);
            walk.executable &= !(flags.contains(PageFlags::NO_EXECUTE) && state.efer & EFER_NXE != 0);
        }
        if let Some(size) = leaf {
            walk.gpa = GuestAddress(page_base(mode, entry, size) | (gva & (size.bytes() - 1)));
            walk.page_size = Some(size);
            walk.global = flags.contains(PageFlags::GLOBAL);
            walk.accessed = flags.contains(PageFlags::ACCESSED);
            walk.dirty = flags.contains(PageFlags::DIRTY);
            break;
        }
        table = entry & if mode == PagingMode::Bits32 { ADDRESS_32 } else { ADDRESS };
    }
    Ok(walk)
}

/// Reads guest memory by guest-virtual address, across pages. A debugging aid: the tables may change between two pages.
///
/// Returns how many bytes of `buf` were read. That is less than its length when a later page cannot be read: what is
/// before it is still useful, for instance to show the instruction at the end of a page.
///
/// # Errors
/// [`WalkError`] when not even the first byte can be read.
pub fn read_virtual<M>(mem: &M, state: &PagingState, gva: u64, buf: &mut [u8]) -> Result<usize, WalkError>
where
    M: Bytes<GuestAddress> + ?Sized,
{
    let total = buf.len();
    let mut rest = buf;
    let mut at = gva;
    while !rest.is_empty() {
        let done = total - rest.len();
        let read = translate(mem, state, at).and_then(|page| {
            // Large pages are read in steps of 4 KiB too: a part of one may be missing in guest memory.
            let left_in_page = usize::try_from(0x1000 - (at & 0xFFF)).unwrap_or(1);
            let (part, _) = rest.split_at_mut(left_in_page.min(rest.len()));
            mem.read_slice(part, page.gpa)
                .map(|()| part.len())
                .map_err(|_| WalkError::PageOutsideMemory { gva: at, gpa: page.gpa.0 })
        });
        match read {
            Ok(len) => {
                rest = rest.split_at_mut(len).1;
                // Nothing follows the last address there is.
                match at.checked_add(u64::try_from(len).unwrap_or(0)) {
                    Some(next) => at = next,
                    None => return Ok(done + len),
                }
            }
            Err(_) if done > 0 => return Ok(done),
            Err(error) => return Err(error),
        }
    }
    Ok(total)
}

/// Address of the root table in CR3.
fn root(state: &PagingState, mode: PagingMode) -> u64 {
    state.cr3
        & match mode {
            PagingMode::Off | PagingMode::Bits32 => ADDRESS_32,
            PagingMode::Pae => 0xFFFF_FFE0,
            PagingMode::Level4 | PagingMode::Level5 => ADDRESS & phys_mask(state.max_phys_bits()),
        }
}

/// Reads an entry in one piece; `None` when it is not in memory.
fn load<M: Bytes<GuestAddress> + ?Sized>(mem: &M, mode: PagingMode, address: u64) -> Option<u64> {
    let at = GuestAddress(address);
    if mode == PagingMode::Bits32 {
        mem.load::<u32>(at, Ordering::Relaxed).ok().map(|entry| u64::from(u32::from_le(entry)))
    } else {
        mem.load::<u64>(at, Ordering::Relaxed).ok().map(u64::from_le)
    }
}

/// Size of the page that the entry maps, or `None` if it points to a table.
fn leaf(state: &PagingState, mode: PagingMode, spec: &LevelSpec, entry: u64) -> Option<PageSize> {
    let large = entry & LARGE != 0 && (mode != PagingMode::Bits32 || state.cr4 & super::CR4_PSE != 0);
    spec.leaf.filter(|_| large || spec.level == Level::PageTable)
}

/// Bits that must be zero in a present entry.
fn reserved(state: &PagingState, mode: PagingMode, level: Level, leaf: Option<PageSize>) -> u64 {
    let max = state.max_phys_bits();
    if mode == PagingMode::Bits32 {
        // SDM table 4-4: bits 20:13 hold address bits 39:32, of which there are M-32 with M at most 40.
        return match leaf {
            Some(PageSize::Size4M) => phys_mask(22) & !phys_mask(max.min(40) - 19),
            _ => 0,
        };
    }
    let above_max = ADDRESS & !phys_mask(max);
    let no_execute = if state.efer & EFER_NXE == 0 { PageFlags::NO_EXECUTE.bits() } else { 0 };
    match (mode, level) {
        // SDM table 4-8. Bits 63:52 are ignored in long mode but reserved here.
        (PagingMode::Pae, Level::Pdpt) => above_max | !phys_mask(52) | 0x1E6,
        (PagingMode::Pae, _) => {
            above_max | (phys_mask(63) & !phys_mask(52)) | no_execute | within_large(leaf)
        }
        // No page of 512 GiB or more exists.
        (_, Level::Pml5 | Level::Pml4) => above_max | no_execute | LARGE,
        _ => above_max | no_execute | within_large(leaf),
    }
}

/// Address bits below the size of a large page, except bit 12, which is PAT.
fn within_large(leaf: Option<PageSize>) -> u64 {
    leaf.map_or(0, |size| (size.bytes() - 1) & !0x1FFF)
}

/// Guest-physical address of the page an entry maps.
fn page_base(mode: PagingMode, entry: u64, size: PageSize) -> u64 {
    match (mode, size) {
        // PSE-36: address bits 39:32 are in bits 20:13.
        (PagingMode::Bits32, PageSize::Size4M) => (entry & 0xFFC0_0000) | ((entry >> 13 & 0xFF) << 32),
        (PagingMode::Bits32, _) => entry & ADDRESS_32,
        _ => entry & ADDRESS & !(size.bytes() - 1),
    }
}
