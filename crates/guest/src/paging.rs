//! The contract of [`PAGING`](crate::PAGING).
//!
//! The program builds 4-level page tables with the pages of [`PAGES`], loads them, reads a marker through each page that level 3 may
//! use, and writes to [`DONE_PORT`](crate::DONE_PORT): 1 when all markers were right, 2 when not. While the host handles that exit,
//! CR3 holds the new root (also in word [`ROOT`] of the parameter block). After it the program resets.
//!
//! The first 4 GiB stay mapped to themselves by 2 MiB pages, writable and open to level 3. Memory of 8 MiB is enough.

/// A page that the program maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Guest-virtual address.
    pub virt: u64,
    /// Guest-physical address.
    pub phys: u64,
    /// Bytes: 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
    /// May be written.
    pub write: bool,
    /// Level 3 may use it.
    pub user: bool,
    /// Offset in the page of a 64-bit marker, which is the page's guest-virtual address.
    pub marker: u64,
}

const fn page(virt: u64, phys: u64, size: u64, write: bool, user: bool) -> Page {
    let marker = if size == 1 << 30 { 0x60_0008 } else { 8 };
    Page { virt, phys, size, write, user, marker }
}

/// The pages. The last one, of 1 GiB, only if the virtual processor has such pages: see [`HAS_GIB`].
pub const PAGES: [Page; 6] = [
    page(0x0000_1234_5678_9000, 0x20_0000, 1 << 12, true, true),
    page(0x0000_1234_5678_A000, 0x20_3000, 1 << 12, false, true),
    page(0x0000_1234_567F_F000, 0x20_7000, 1 << 12, true, true),
    page(0xFFFF_8000_0000_1000, 0x20_5000, 1 << 12, true, false),
    page(0xFFFF_FF80_4020_0000, 0x40_0000, 1 << 21, true, true),
    page(0x0000_7000_4000_0000, 0, 1 << 30, true, true),
];

/// Guest-virtual addresses at which nothing is mapped: no last-level entry, no last-level table, no table at all.
pub const UNMAPPED: [u64; 3] = [0x0000_1234_5678_B000, 0x0000_1234_5000_0000, 0x0000_4000_0000_0000];

/// Word of the parameter block: the value of CR3.
pub const ROOT: usize = 0;
/// Word of the parameter block: 1 if the page of 1 GiB is there.
pub const HAS_GIB: usize = 1;
