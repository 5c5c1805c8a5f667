//! Page tables of the guest: built before it starts, and walked when a debugger or an error message needs to know what
//! a guest-virtual address means.
//!
//! - [`identity_map`] makes the tables of the boot state, in one write.
//! - [`PageTableBuilder`] makes tables with any mappings.
//! - [`translate`] walks tables as a processor would, and [`read_virtual`] reads memory through them.
//!
//! All x86 modes are known: 32-bit paging with 4 MiB pages (PSE-36), PAE, 4-level and 5-level. The rules are those of the
//! Intel SDM Vol. 3A chapter 4 and of the AMD APM Vol. 2 chapter 5.
//!
//! This is not a memory-management unit: nothing is cached, nothing is written back to accessed and dirty bits, and no
//! access is judged (CR0.WP, SMEP, SMAP and protection keys are not looked at). What the tables allow is reported.

mod builder;
mod walker;

use std::fmt;

pub use builder::{PageTableBuilder, identity_map, identity_map_size, identity_map_with};
pub use walker::{Translation, WalkError, WalkStep, read_virtual, translate};

use crate::layout::MAX_PHYS_BITS;

/// CR0.PG: paging is on.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: 8-byte entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.LA57: five levels instead of four.
pub const CR4_LA57: u64 = 1 << 12;
/// EFER.LME: IA-32e mode is enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: IA-32e mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: the no-execute bit means something.
pub const EFER_NXE: u64 = 1 << 11;

/// Bit 0 of an entry: present.
const PRESENT: u64 = 1;
/// Bit 7 of an entry above the last level: it maps a page (PS).
const LARGE: u64 = 1 << 7;
/// Bits of an 8-byte entry that hold a physical address, whatever MAXPHYADDR is.
const ADDRESS: u64 = phys_mask(MAX_PHYS_BITS) & !0xFFF;

bitflags::bitflags! {
    /// What an entry allows, beside being present (Intel SDM Vol. 3A, tables 4-5 to 4-20).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct PageFlags: u64 {
        /// R/W: writes are allowed.
        const WRITABLE = 1 << 1;
        /// U/S: accesses at CPL3 are allowed.
        const USER = 1 << 2;
        /// PWT.
        const WRITE_THROUGH = 1 << 3;
        /// PCD.
        const CACHE_DISABLE = 1 << 4;
        /// A: has been used.
        const ACCESSED = 1 << 5;
        /// D: has been written.
        const DIRTY = 1 << 6;
        /// G: survives a load of CR3.
        const GLOBAL = 1 << 8;
        /// XD or NX: no instruction fetches. Needs EFER.NXE; not in 32-bit paging.
        const NO_EXECUTE = 1 << 63;
    }
}

/// Size of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB, every mode.
    Size4K,
    /// 2 MiB, every mode but 32-bit paging.
    Size2M,
    /// 4 MiB, 32-bit paging only.
    Size4M,
    /// 1 GiB, 4-level and 5-level paging only.
    Size1G,
}

impl PageSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4K => 4 << 10,
            Self::Size2M => 2 << 20,
            Self::Size4M => 4 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Size4K => "4 KiB",
            Self::Size2M => "2 MiB",
            Self::Size4M => "4 MiB",
            Self::Size1G => "1 GiB",
        })
    }
}

/// A level of page tables, named as in the Intel SDM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Level {
    /// Level 5.
    Pml5,
    /// Level 4.
    Pml4,
    /// Level 3, the page-directory-pointer table.
    Pdpt,
    /// Level 2.
    PageDirectory,
    /// Level 1.
    PageTable,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pml5 => "PML5",
            Self::Pml4 => "PML4",
            Self::Pdpt => "PDPT",
            Self::PageDirectory => "page directory",
            Self::PageTable => "page table",
        })
    }
}

/// How linear addresses are translated (Intel SDM Vol. 3A, 4.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// Paging is off: linear addresses are physical.
    Off,
    /// 32-bit paging: two levels of 4-byte entries.
    Bits32,
    /// PAE paging: three levels of 8-byte entries, 32-bit linear addresses.
    Pae,
    /// 4-level paging: 48-bit linear addresses.
    Level4,
    /// 5-level paging: 57-bit linear addresses.
    Level5,
}

/// One level of a mode: which bits of a linear address index it, and what an entry may map.
#[derive(Debug)]
struct LevelSpec {
    level: Level,
    /// Lowest bit of the index.
    shift: u32,
    /// Number of index bits.
    bits: u32,
    /// The page an entry maps: always at the last level, with PS set above it.
    leaf: Option<PageSize>,
}

impl LevelSpec {
    const fn new(level: Level, shift: u32, bits: u32, leaf: Option<PageSize>) -> Self {
        Self { level, shift, bits, leaf }
    }

    /// Index of the entry for `gva`.
    const fn index(&self, gva: u64) -> u64 {
        (gva >> self.shift) & ((1 << self.bits) - 1)
    }
}

static LEVEL5: [LevelSpec; 5] = [
    LevelSpec::new(Level::Pml5, 48, 9, None),
    LevelSpec::new(Level::Pml4, 39, 9, None),
    LevelSpec::new(Level::Pdpt, 30, 9, Some(PageSize::Size1G)),
    LevelSpec::new(Level::PageDirectory, 21, 9, Some(PageSize::Size2M)),
    LevelSpec::new(Level::PageTable, 12, 9, Some(PageSize::Size4K)),
];

static PAE: [LevelSpec; 3] = [
    LevelSpec::new(Level::Pdpt, 30, 2, None),
    LevelSpec::new(Level::PageDirectory, 21, 9, Some(PageSize::Size2M)),
    LevelSpec::new(Level::PageTable, 12, 9, Some(PageSize::Size4K)),
];

static BITS32: [LevelSpec; 2] = [
    LevelSpec::new(Level::PageDirectory, 22, 10, Some(PageSize::Size4M)),
    LevelSpec::new(Level::PageTable, 12, 10, Some(PageSize::Size4K)),
];

impl PagingMode {
    /// The levels from the root down; none when paging is off.
    fn levels(self) -> &'static [LevelSpec] {
        let [_, level4 @ ..] = &LEVEL5;
        match self {
            Self::Off => &[],
            Self::Bits32 => &BITS32,
            Self::Pae => &PAE,
            Self::Level4 => level4,
            Self::Level5 => &LEVEL5,
        }
    }

    /// Bytes of an entry.
    const fn entry_size(self) -> u64 {
        match self {
            Self::Bits32 => 4,
            _ => 8,
        }
    }

    /// Whether `gva` is an address of this mode: 32 bits wide, or canonical (Intel SDM Vol. 1, 3.3.7.1).
    const fn contains(self, gva: u64) -> bool {
        match self {
            Self::Off | Self::Bits32 | Self::Pae => gva >> 32 == 0,
            Self::Level4 => matches!(gva >> 47, 0 | 0x1_FFFF),
            Self::Level5 => matches!(gva >> 56, 0 | 0xFF),
        }
    }
}

/// The registers that say how linear addresses are translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagingState {
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3. In PAE mode the entries of the PDPT are read from memory, although a processor keeps the
    /// ones it loaded with CR3.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// The EFER MSR.
    pub efer: u64,
    /// MAXPHYADDR, CPUID leaf 0x8000_0008 EAX bits 7:0. Address bits above it are reserved in entries. Taken as 32 or
    /// as 52 when it is below or above these.
    pub phys_bits: u8,
}

impl PagingState {
    /// State with a MAXPHYADDR of 52, the largest there is: no address bit is reserved.
    pub const fn new(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Self {
        Self { cr0, cr3, cr4, efer, phys_bits: MAX_PHYS_BITS }
    }

    /// State of a processor that uses tables of `mode` with their root at `cr3`, with no-execute and 4 MiB pages enabled.
    pub const fn with_mode(mode: PagingMode, cr3: u64) -> Self {
        match mode {
            PagingMode::Off => Self::new(0, cr3, 0, 0),
            PagingMode::Bits32 => Self::new(CR0_PG, cr3, CR4_PSE, 0),
            PagingMode::Pae => Self::new(CR0_PG, cr3, CR4_PAE, EFER_NXE),
            PagingMode::Level4 => Self::new(CR0_PG, cr3, CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE),
            PagingMode::Level5 => Self::new(CR0_PG, cr3, CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA | EFER_NXE),
        }
    }

    /// The same with the processor's MAXPHYADDR.
    #[must_use]
    pub const fn phys_bits(mut self, bits: u8) -> Self {
        self.phys_bits = bits;
        self
    }

    /// Which mode the registers select.
    pub const fn mode(&self) -> PagingMode {
        if self.cr0 & CR0_PG == 0 {
            PagingMode::Off
        } else if self.cr4 & CR4_PAE == 0 {
            PagingMode::Bits32
        } else if self.efer & (EFER_LME | EFER_LMA) == 0 {
            PagingMode::Pae
        } else if self.cr4 & CR4_LA57 == 0 {
            PagingMode::Level4
        } else {
            PagingMode::Level5
        }
    }

    /// MAXPHYADDR within the bounds that the architecture gives it.
    fn max_phys_bits(&self) -> u8 {
        self.phys_bits.clamp(32, MAX_PHYS_BITS)
    }
}

/// Bits below `bits`, which is less than 64.
const fn phys_mask(bits: u8) -> u64 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_select_the_mode() {
        for mode in
            [PagingMode::Off, PagingMode::Bits32, PagingMode::Pae, PagingMode::Level4, PagingMode::Level5]
        {
            assert_eq!(PagingState::with_mode(mode, 0).mode(), mode);
        }
        // LA57 outside of long mode and PAE without paging mean nothing.
        assert_eq!(PagingState::new(CR0_PG, 0, CR4_PAE | CR4_LA57, 0).mode(), PagingMode::Pae);
        assert_eq!(PagingState::new(0, 0, CR4_PAE, EFER_LME).mode(), PagingMode::Off);
    }

    #[test]
    fn levels_cover_the_linear_address_without_gaps() {
        for (mode, width) in [
            (PagingMode::Bits32, 32),
            (PagingMode::Pae, 32),
            (PagingMode::Level4, 48),
            (PagingMode::Level5, 57),
        ] {
            let mut top = width;
            for spec in mode.levels() {
                assert_eq!(spec.shift + spec.bits, top, "{mode:?} {:?}", spec.level);
                if let Some(size) = spec.leaf {
                    assert_eq!(size.bytes(), 1 << spec.shift);
                }
                top = spec.shift;
            }
            assert_eq!(top, 12);
        }
    }

    #[test]
    fn canonical_addresses_are_told_from_others() {
        assert!(PagingMode::Level4.contains(0x7FFF_FFFF_FFFF));
        assert!(!PagingMode::Level4.contains(0x8000_0000_0000));
        assert!(PagingMode::Level4.contains(0xFFFF_8000_0000_0000));
        assert!(!PagingMode::Level4.contains(0xFFFF_7FFF_FFFF_FFFF));
        assert!(PagingMode::Level5.contains(0x8000_0000_0000));
        assert!(!PagingMode::Level5.contains(1 << 56));
        assert!(PagingMode::Level5.contains(0xFF00_0000_0000_0000));
        assert!(!PagingMode::Pae.contains(1 << 32));
    }
}
