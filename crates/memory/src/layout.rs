//! Where things are in the guest-physical address space of the x86-64 platform.
//!
//! RAM fills the space below the 32-bit hole first and goes on at 4 GiB. The hole holds device registers, the interrupt
//! controllers and KVM's private pages. The first MiB holds the data that a guest is started with; loader and vCPU
//! set-up take its addresses from here, so that they cannot collide.
//!
//! | address | what |
//! |---|---|
//! | `0x500` | [`BOOT_GDT`], [`BOOT_IDT`] |
//! | `0x5000` | [`PVH_START_INFO`], with its memory map and module list |
//! | `0x6000` | [`PARAM_PAGE`], free for the embedder |
//! | `0x7000` | [`ZERO_PAGE`] of the Linux boot protocol |
//! | `0x8000` | boot stack, down from [`BOOT_STACK`] |
//! | `0x9000` | [`BOOT_PAGE_TABLES`] |
//! | `0x2_0000` | [`CMDLINE`] |
//! | `0x9_FC00` | end of conventional RAM: [`EBDA_START`] |
//! | `0xD_F000` | [`GENERATION_ID`] of the virtual machine |
//! | `0xE_0000` | [`ACPI_TABLES`], the RSDP first |
//! | `0x10_0000` | [`HIGH_MEMORY`] |
//!
//! This module does not hand out addresses: a VMM allocates inside [`MMIO_START`]`..`[`MMIO_END`] by itself.

/// Start of the 32-bit hole: no RAM from here to [`RAM_ABOVE_HOLE`].
pub const HOLE_START: u64 = 0xC000_0000;
/// RAM beyond the hole starts here (4 GiB).
pub const RAM_ABOVE_HOLE: u64 = 0x1_0000_0000;
/// Window of virtio-mmio and other memory-mapped devices below 4 GiB.
pub const MMIO_START: u64 = 0xD000_0000;
/// End (exclusive) of the MMIO window.
pub const MMIO_END: u64 = 0xD800_0000;
/// Window of the base address registers of PCI devices.
pub const PCI_MMIO_START: u64 = MMIO_END;
/// End (exclusive) of the PCI window.
pub const PCI_MMIO_END: u64 = 0xE000_0000;
/// Configuration space of PCI bus 0 in memory (ECAM): 1 MiB for each bus.
pub const PCI_ECAM: u64 = PCI_MMIO_END;
/// Length of the configuration space of one bus.
pub const PCI_ECAM_BUS_LEN: u64 = 0x10_0000;
/// I/O APIC registers.
pub const IOAPIC_ADDR: u64 = 0xFEC0_0000;
/// Local APIC registers.
pub const LAPIC_ADDR: u64 = 0xFEE0_0000;
/// Page KVM uses for its identity map on processors without unrestricted guest.
pub const KVM_IDENTITY_MAP: u64 = 0xFEFF_C000;
/// Three pages KVM uses for its task-state segment.
pub const KVM_TSS: u64 = 0xFEFF_D000;
/// End (exclusive) of KVM's private pages.
pub const KVM_PRIVATE_END: u64 = 0xFF00_0000;

/// Boot GDT: room for four descriptors, up to [`BOOT_IDT`].
pub const BOOT_GDT: u64 = 0x500;
/// Boot IDT: one null entry is enough to start with.
pub const BOOT_IDT: u64 = 0x520;
/// PVH `hvm_start_info`. Its memory map and module list follow it, all below [`PVH_END`].
pub const PVH_START_INFO: u64 = 0x5000;
/// End (exclusive) of the PVH boot data.
pub const PVH_END: u64 = 0x6000;
/// One page that nothing here uses: free for the embedder, for instance to hand parameters to a guest program
/// before it starts.
pub const PARAM_PAGE: u64 = 0x6000;
/// The "zero page" of the Linux boot protocol: `struct boot_params`, 4 KiB.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer. The stack grows down from here to the end of the zero page.
pub const BOOT_STACK: u64 = 0x8FF0;
/// Boot page tables, the root first.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// End (exclusive) of the room for boot page tables: enough to identity-map 21 GiB in 2 MiB pages.
pub const BOOT_PAGE_TABLES_END: u64 = 0x2_0000;
/// Kernel command line, a NUL-terminated string.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line with its NUL, in bytes. Linux on x86 itself reads at most 2048 of them.
pub const CMDLINE_MAX: u64 = 0x1_0000;
/// End of conventional RAM; the extended BIOS data area would start here.
pub const EBDA_START: u64 = 0x9_FC00;
/// The generation ID of the virtual machine: 16 bytes, in a page of the BIOS area that nothing else uses.
pub const GENERATION_ID: u64 = 0xD_F000;
/// ACPI tables, the RSDP first: a guest scans `0xE_0000..0x10_0000` for it in steps of 16 bytes (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xE_0000;
/// End (exclusive) of the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Start of high memory (1 MiB), where kernels are loaded.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// No x86 processor has more physical address bits than this (Intel SDM Vol. 3A, 4.1.4), so no guest address is higher.
pub const MAX_PHYS_BITS: u8 = 52;
/// Granularity of guest RAM, in bytes.
pub const PAGE_SIZE: u64 = 0x1000;

// Boot data must not overlap: each lies below the next.
const _: () = {
    assert!(BOOT_GDT + 4 * 8 <= BOOT_IDT);
    assert!(BOOT_IDT < PVH_START_INFO);
    assert!(PVH_START_INFO < PVH_END && PVH_END <= PARAM_PAGE);
    assert!(PARAM_PAGE + PAGE_SIZE <= ZERO_PAGE);
    assert!(ZERO_PAGE + PAGE_SIZE < BOOT_STACK && BOOT_STACK <= BOOT_PAGE_TABLES);
    assert!(BOOT_PAGE_TABLES < BOOT_PAGE_TABLES_END && BOOT_PAGE_TABLES_END <= CMDLINE);
    assert!(CMDLINE + CMDLINE_MAX <= EBDA_START);
    assert!(EBDA_START < GENERATION_ID && GENERATION_ID + PAGE_SIZE <= ACPI_TABLES);
    assert!(EBDA_START < ACPI_TABLES && ACPI_TABLES_END <= HIGH_MEMORY);
    assert!(HOLE_START <= MMIO_START && MMIO_END <= IOAPIC_ADDR && KVM_PRIVATE_END <= RAM_ABOVE_HOLE);
};

/// A range of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl RamRange {
    /// First address beyond the range, or `None` when that is not a 64-bit number.
    pub fn end(&self) -> Option<u64> {
        self.start.checked_add(self.len)
    }
}

/// Splits `size` bytes of RAM around the 32-bit hole.
pub fn ram_ranges(size: u64) -> Vec<RamRange> {
    let low = size.min(HOLE_START);
    let mut ranges = vec![RamRange { start: 0, len: low }];
    if size > low {
        ranges.push(RamRange { start: RAM_ABOVE_HOLE, len: size - low });
    }
    ranges
}

/// What a range of the memory map is (ACPI 6.5, table 15.4; the numbers are those of the BIOS call E820h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum E820Kind {
    /// RAM that the guest may use (1).
    Ram,
    /// Not to be used (2).
    Reserved,
    /// ACPI tables; RAM once the guest has read them (3).
    Acpi,
}

impl E820Kind {
    /// The number in a Linux `boot_e820_entry` or a PVH `hvm_memmap_table_entry`.
    pub const fn code(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::Acpi => 3,
        }
    }
}

/// One entry of the memory map that a guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What is there.
    pub kind: E820Kind,
}

/// Ranges no guest may take for free memory: the BIOS area with our ACPI tables, and KVM's private pages.
const RESERVED: [(u64, u64); 2] = [(EBDA_START, HIGH_MEMORY), (KVM_IDENTITY_MAP, KVM_PRIVATE_END)];

/// The memory map of a machine with this RAM, sorted by address, without overlaps.
///
/// Reserved are the BIOS area, [`EBDA_START`]`..`[`HIGH_MEMORY`], where the ACPI tables are, and the pages that KVM
/// keeps for itself. The registers of the interrupt controllers and of devices are not listed: ACPI describes them,
/// and what is neither RAM nor listed is free for devices.
pub fn e820(ram: &[RamRange]) -> Vec<E820Entry> {
    let mut map: Vec<E820Entry> = RESERVED
        .iter()
        .map(|&(start, end)| E820Entry { start, len: end - start, kind: E820Kind::Reserved })
        .collect();
    for range in ram {
        let end = range.start.saturating_add(range.len);
        let mut start = range.start;
        for (reserved_start, reserved_end) in RESERVED {
            push_ram(&mut map, start, end.min(reserved_start));
            start = start.max(reserved_end.min(end));
        }
        push_ram(&mut map, start, end);
    }
    map.sort_by_key(|entry| entry.start);
    map
}

fn push_ram(map: &mut Vec<E820Entry>, start: u64, end: u64) {
    if start < end {
        map.push(E820Entry { start, len: end - start, kind: E820Kind::Ram });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(ram: &[RamRange]) -> u64 {
        ram.iter().map(|r| r.len).sum()
    }

    #[test]
    fn small_memory_is_one_range_from_zero() {
        assert_eq!(ram_ranges(64 << 20), [RamRange { start: 0, len: 64 << 20 }]);
    }

    #[test]
    fn memory_up_to_the_hole_stays_below_it() {
        assert_eq!(ram_ranges(HOLE_START), [RamRange { start: 0, len: HOLE_START }]);
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_at_4_gib() {
        let ram = ram_ranges(5 << 30);
        assert_eq!(ram.len(), 2);
        assert_eq!(ram[1], RamRange { start: RAM_ABOVE_HOLE, len: (5 << 30) - HOLE_START });
        assert_eq!(total(&ram), 5 << 30);
    }

    #[test]
    fn range_that_wraps_has_no_end() {
        assert_eq!(RamRange { start: u64::MAX, len: 2 }.end(), None);
        assert_eq!(RamRange { start: 0x1000, len: 0x1000 }.end(), Some(0x2000));
    }

    #[test]
    fn map_reserves_the_bios_area() {
        let map = e820(&ram_ranges(64 << 20));
        let expected = [
            E820Entry { start: 0, len: 0x9_FC00, kind: E820Kind::Ram },
            E820Entry { start: 0x9_FC00, len: 0x6_0400, kind: E820Kind::Reserved },
            E820Entry { start: 0x10_0000, len: (64 << 20) - 0x10_0000, kind: E820Kind::Ram },
            E820Entry { start: 0xFEFF_C000, len: 0x4000, kind: E820Kind::Reserved },
        ];
        assert_eq!(map, expected);
    }

    #[test]
    fn map_of_memory_within_the_first_mib_has_no_high_ram() {
        let map = e820(&ram_ranges(0x1_0000));
        let ram: Vec<_> = map.iter().filter(|e| e.kind == E820Kind::Ram).collect();
        assert_eq!(ram, [&E820Entry { start: 0, len: 0x1_0000, kind: E820Kind::Ram }]);
    }

    #[test]
    fn map_lists_ram_above_4_gib() {
        let map = e820(&ram_ranges(5 << 30));
        assert_eq!(map.last(), Some(&E820Entry { start: 1 << 32, len: 2 << 30, kind: E820Kind::Ram }));
    }

    #[test]
    fn map_never_overlaps_even_when_ram_covers_the_hole() {
        let map = e820(&[RamRange { start: 0, len: 6 << 30 }]);
        for pair in map.windows(2) {
            assert!(pair[0].start + pair[0].len <= pair[1].start, "{pair:x?}");
        }
        let ram: u64 = map.iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.len).sum();
        assert_eq!(ram, (6 << 30) - 0x6_0400 - 0x4000);
    }

    #[test]
    fn kinds_have_the_numbers_of_the_bios_call() {
        assert_eq!([E820Kind::Ram, E820Kind::Reserved, E820Kind::Acpi].map(E820Kind::code), [1, 2, 3]);
    }
}
