//! The walker on tables written by hand, entry by entry, from the figures of the Intel SDM; and the builder's refusals.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_memory::layout::RamRange;
use freestone_memory::paging::{
    CR0_PG, CR4_PAE, EFER_LME, EFER_NXE, Level, PageFlags, PageSize, PageTableBuilder, PagingMode,
    PagingState, Translation, WalkError, identity_map, identity_map_size, identity_map_with, read_virtual,
    translate,
};
use freestone_memory::{Bytes, Error, GuestAddress, GuestMem};

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;

/// 64 KiB of guest memory with these 8-byte entries.
fn memory(entries: &[(u64, u64)]) -> GuestMem {
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    for (address, entry) in entries {
        mem.view().write_obj(*entry, GuestAddress(*address)).unwrap();
    }
    mem
}

/// The same with 4-byte entries.
fn memory32(entries: &[(u64, u32)]) -> GuestMem {
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    for (address, entry) in entries {
        mem.view().write_obj(*entry, GuestAddress(*address)).unwrap();
    }
    mem
}

fn walk(mem: &GuestMem, mode: PagingMode, gva: u64) -> Result<Translation, WalkError> {
    translate(&*mem.view(), &PagingState::with_mode(mode, 0x1000), gva)
}

#[test]
fn without_paging_an_address_is_itself() {
    let mem = memory(&[]);
    let page = walk(&mem, PagingMode::Off, 0x1234_5678).unwrap();
    assert_eq!((page.gpa, page.page_size), (GuestAddress(0x1234_5678), None));
    assert_eq!(page.steps().count(), 0);
    assert_eq!(walk(&mem, PagingMode::Off, 1 << 32), Err(WalkError::TooWide { gva: 1 << 32 }));
}

#[test]
fn four_levels_with_4_kib_pages() {
    // gva = PML4 index 1, PDPT index 2, directory index 3, table index 4, offset 0x567.
    let gva = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x567;
    let mem = memory(&[
        (0x1008, 0x2000 | P | RW | US),
        (0x2010, 0x3000 | P | RW | US),
        (0x3018, 0x4000 | P | RW | US),
        (0x4020, 0xAB_CDEF_1000 | P | RW | US | D | G),
    ]);
    let page = walk(&mem, PagingMode::Level4, gva).unwrap();
    assert_eq!(page.gpa, GuestAddress(0xAB_CDEF_1567));
    assert_eq!(page.page_size, Some(PageSize::Size4K));
    assert!(page.writable && page.user && page.executable && page.global && page.dirty && !page.accessed);
    let steps: Vec<_> = page.steps().map(|step| (step.level, step.address.0)).collect();
    let levels = [Level::Pml4, Level::Pdpt, Level::PageDirectory, Level::PageTable];
    assert_eq!(steps, levels.into_iter().zip([0x1008, 0x2010, 0x3018, 0x4020]).collect::<Vec<_>>());
}

#[test]
fn four_levels_with_2_mib_and_1_gib_pages() {
    let mem = memory(&[
        (0x1000, 0x2000 | P | RW),
        (0x2000, 0x3000 | P | RW),
        (0x2008, 0x40_4000_0000 | P | PS | RW | A),
        (0x3008, 0x8060_0000 | P | PS),
    ]);
    let page = walk(&mem, PagingMode::Level4, 0x2F_FFFF).unwrap();
    assert_eq!((page.gpa.0, page.page_size), (0x806F_FFFF, Some(PageSize::Size2M)));
    assert!(!page.writable);
    let page = walk(&mem, PagingMode::Level4, 0x7FFF_FFFF).unwrap();
    assert_eq!((page.gpa.0, page.page_size), (0x40_7FFF_FFFF, Some(PageSize::Size1G)));
    assert!(page.writable && page.accessed && !page.user);
}

#[test]
fn bit_12_of_a_large_page_is_pat_and_no_address() {
    let mem = memory(&[(0x1000, 0x2000 | P), (0x2000, 0x3000 | P), (0x3000, 0x20_0000 | 0x1000 | P | PS)]);
    assert_eq!(walk(&mem, PagingMode::Level4, 0x10).unwrap().gpa.0, 0x20_0010);
}

#[test]
fn five_levels() {
    let gva = 5 << 48 | 0x123;
    let mem = memory(&[
        (0x1028, 0x2000 | P),
        (0x2000, 0x3000 | P),
        (0x3000, 0x4000 | P),
        (0x4000, 0x5000 | P),
        (0x5000, 0x6000 | P),
    ]);
    let page = walk(&mem, PagingMode::Level5, gva).unwrap();
    assert_eq!((page.gpa.0, page.steps().count()), (0x6123, 5));
}

#[test]
fn pae_with_4_kib_and_2_mib_pages() {
    // The PDPT has 32-byte alignment and its entries have no access bits.
    let mem = memory(&[
        (0x1028, 0x2000 | P),
        (0x2000, 0x3000 | P | RW | US),
        (0x3008, 0x9_8765_4000 | P | RW | XD),
        (0x2008, 0x8_0040_0000 | P | PS | RW | US),
    ]);
    let state = PagingState::with_mode(PagingMode::Pae, 0x1020);
    let page = translate(&*mem.view(), &state, 0x4000_1ABC).unwrap();
    assert_eq!((page.gpa.0, page.page_size), (0x9_8765_4ABC, Some(PageSize::Size4K)));
    assert!(page.writable && !page.user && !page.executable);
    let page = translate(&*mem.view(), &state, 0x4020_0001).unwrap();
    assert_eq!((page.gpa.0, page.page_size), (0x8_0040_0001, Some(PageSize::Size2M)));
    assert!(page.writable && page.user && page.executable);
    let too_wide = translate(&*mem.view(), &state, 1 << 32);
    assert_eq!(too_wide, Err(WalkError::TooWide { gva: 1 << 32 }));
}

#[test]
fn thirty_two_bit_with_4_kib_pages() {
    let mem = memory32(&[(0x1004, 0x2007), (0x2008, 0xFFFF_E065)]);
    let page = walk(&mem, PagingMode::Bits32, 0x40_2FFF).unwrap();
    assert_eq!((page.gpa.0, page.page_size), (0xFFFF_EFFF, Some(PageSize::Size4K)));
    assert!(!page.writable && page.user && page.executable && page.accessed && page.dirty);
}

#[test]
fn thirty_two_bit_with_4_mib_pages_of_36_bits_and_more() {
    // Bits 20:13 are address bits 39:32.
    let mem = memory32(&[(0x1FFC, 0x0040_0000 | 0xA5 << 13 | 0x83)]);
    let page = walk(&mem, PagingMode::Bits32, 0xFFFF_FFFF).unwrap();
    assert_eq!((page.gpa.0, page.page_size), (0xA5_007F_FFFF, Some(PageSize::Size4M)));
}

#[test]
fn four_mib_pages_respect_maxphyaddr() {
    let mem = memory32(&[(0x1000, 0x0040_0000 | 1 << 17 | 0x83)]);
    let state = PagingState::with_mode(PagingMode::Bits32, 0x1000);
    assert_eq!(translate(&*mem.view(), &state.phys_bits(37), 0).unwrap().gpa.0, 0x10_0040_0000);
    let error = translate(&*mem.view(), &state.phys_bits(36), 0).unwrap_err();
    assert!(matches!(error, WalkError::ReservedBits { bits: 0x2_0000, .. }), "{error:?}");
    let mem = memory32(&[(0x1000, 1 << 21 | 0x83)]);
    let error = translate(&*mem.view(), &state, 0).unwrap_err();
    assert!(matches!(error, WalkError::ReservedBits { bits: 0x20_0000, .. }), "{error:?}");
}

#[test]
fn without_pse_bit_7_of_a_directory_entry_means_nothing() {
    let mem = memory32(&[(0x1000, 0x2083), (0x2000, 0x5003)]);
    let state = PagingState::new(CR0_PG, 0x1000, 0, 0);
    assert_eq!(translate(&*mem.view(), &state, 0x1).unwrap().gpa.0, 0x5001);
}

#[test]
fn low_bits_of_cr3_are_not_part_of_the_address() {
    let mem = memory(&[(0x1000, 0x2000 | P), (0x2000, 0x4000_0000 | P | PS)]);
    let state = PagingState::with_mode(PagingMode::Level4, 0x1FFF);
    assert_eq!(translate(&*mem.view(), &state, 7).unwrap().gpa.0, 0x4000_0007);
}

#[test]
fn each_level_can_take_a_permission_away() {
    let entries = [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 0x5000)];
    let all = P | RW | US;
    for narrow in 0..entries.len() {
        let mem = memory(&entries.map(|(at, to)| (at, to | all)));
        mem.view().write_obj(entries[narrow].1 | P | XD, GuestAddress(entries[narrow].0)).unwrap();
        let page = walk(&mem, PagingMode::Level4, 0).unwrap();
        assert!(!page.writable && !page.user && !page.executable, "level {narrow}");
    }
    let mem = memory(&entries.map(|(at, to)| (at, to | all)));
    let page = walk(&mem, PagingMode::Level4, 0).unwrap();
    assert!(page.writable && page.user && page.executable);
}

#[test]
fn no_execute_is_reserved_unless_enabled() {
    let mem = memory(&[(0x1000, 0x2000 | P), (0x2000, P | PS | XD)]);
    let state = PagingState::new(CR0_PG, 0x1000, CR4_PAE, EFER_LME);
    let error = translate(&*mem.view(), &state, 0).unwrap_err();
    assert!(matches!(error, WalkError::ReservedBits { level: Level::Pdpt, bits: XD, .. }), "{error:?}");
    let state = PagingState { efer: EFER_LME | EFER_NXE, ..state };
    assert!(!translate(&*mem.view(), &state, 0).unwrap().executable);
}

#[test]
fn address_that_is_not_canonical_is_refused() {
    let mem = memory(&[]);
    for gva in [1 << 47, 0xFFFF_7FFF_FFFF_FFFF] {
        assert_eq!(walk(&mem, PagingMode::Level4, gva), Err(WalkError::NotCanonical { gva }));
    }
    // The same address is one with five levels, though nothing is mapped.
    assert!(matches!(walk(&mem, PagingMode::Level5, 1 << 47), Err(WalkError::NotPresent { .. })));
}

#[test]
fn missing_entry_is_named_with_its_level_and_address() {
    let chain = [(0x1000, 0x2000 | P), (0x2000, 0x3000 | P), (0x3000, 0x4000 | P), (0x4000, 0x5000)];
    let levels = [Level::Pml4, Level::Pdpt, Level::PageDirectory, Level::PageTable];
    for (broken, level) in levels.into_iter().enumerate() {
        let mem = memory(&chain);
        let (address, entry) = (chain[broken].0, chain[broken].1 & !P);
        mem.view().write_obj(entry, GuestAddress(address)).unwrap();
        let expected = WalkError::NotPresent { gva: 0x10, level, address, entry };
        assert_eq!(walk(&mem, PagingMode::Level4, 0x10), Err(expected));
    }
    let message = walk(&memory(&chain), PagingMode::Level4, 0x10).unwrap_err().to_string();
    assert_eq!(message, "guest-virtual 0x10: page table entry at 0x4000 is not present (0x5000)");
}

#[test]
fn reserved_bits_are_named() {
    let state = PagingState::with_mode(PagingMode::Level4, 0x1000).phys_bits(40);
    let cases = [
        (vec![(0x1000, 0x2000 | P | PS)], Level::Pml4, PS),
        (vec![(0x1000, 0x2000 | P | 1 << 40)], Level::Pml4, 1 << 40),
        (vec![(0x1000, 0x2000 | P), (0x2000, P | PS | 1 << 29 | 1 << 13)], Level::Pdpt, 1 << 29 | 1 << 13),
        (
            vec![(0x1000, 0x2000 | P), (0x2000, 0x3000 | P), (0x3000, P | PS | 1 << 20)],
            Level::PageDirectory,
            1 << 20,
        ),
    ];
    for (entries, expected_level, expected_bits) in cases {
        match translate(&*memory(&entries).view(), &state, 0) {
            Err(WalkError::ReservedBits { level, bits, .. }) => {
                assert_eq!((level, bits), (expected_level, expected_bits));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn ignored_bits_of_long_mode_are_reserved_in_pae() {
    let pae = memory(&[(0x1000, 0x2000 | P), (0x2000, P | PS | 1 << 62)]);
    let error = walk(&pae, PagingMode::Pae, 0).unwrap_err();
    assert!(matches!(error, WalkError::ReservedBits { level: Level::PageDirectory, .. }), "{error:?}");
    let pae = memory(&[(0x1000, 0x2000 | P | RW)]);
    let error = walk(&pae, PagingMode::Pae, 0).unwrap_err();
    assert!(matches!(error, WalkError::ReservedBits { level: Level::Pdpt, bits: RW, .. }), "{error:?}");
    let long = memory(&[(0x1000, 0x2000 | P | 1 << 62), (0x2000, P | PS | 1 << 52)]);
    walk(&long, PagingMode::Level4, 0).unwrap();
}

#[test]
fn table_outside_of_memory_is_named() {
    let mem = memory(&[(0x1000, 0x2000 | P), (0x2008, 0xF_FFFF_FFFF_F000 | P)]);
    let gva = 1 << 30 | 511 << 21;
    let error = walk(&mem, PagingMode::Level4, gva).unwrap_err();
    let expected =
        WalkError::TableOutsideMemory { gva, level: Level::PageDirectory, address: 0xF_FFFF_FFFF_FFF8 };
    assert_eq!(error, expected);
    let state = PagingState::with_mode(PagingMode::Level4, u64::MAX);
    let error = translate(&*mem.view(), &state, 0).unwrap_err();
    assert!(matches!(error, WalkError::TableOutsideMemory { level: Level::Pml4, .. }), "{error:?}");
}

#[test]
fn table_that_points_to_itself_ends_the_walk_after_four_levels() {
    let mem = memory(&[(0x1000, 0x1000 | P)]);
    let page = walk(&mem, PagingMode::Level4, 0x42).unwrap();
    assert_eq!((page.gpa.0, page.steps().count()), (0x1042, 4));
}

#[test]
fn page_need_not_be_in_memory() {
    let mem = memory(&[(0x1000, 0x2000 | P), (0x2000, 0xC000_0000 | P | PS)]);
    assert_eq!(walk(&mem, PagingMode::Level4, 0x3EC0_0000).unwrap().gpa.0, 0xFEC0_0000);
}

/// Two pages that are neighbours for the guest and apart in memory.
fn two_pages() -> (GuestMem, PagingState) {
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    let mut tables =
        PageTableBuilder::new(PagingMode::Level4, RamRange { start: 0x1000, len: 0x4000 }).unwrap();
    tables.map(0x40_0000, 0x9000, PageSize::Size4K, PageFlags::empty()).unwrap();
    tables.map(0x40_1000, 0x7000, PageSize::Size4K, PageFlags::empty()).unwrap();
    tables.map(0x40_2000, 0x10_0000, PageSize::Size4K, PageFlags::empty()).unwrap();
    let cr3 = tables.write(&*mem.view()).unwrap();
    mem.view().write_slice(b"left", GuestAddress(0x9FFC)).unwrap();
    mem.view().write_slice(b"right", GuestAddress(0x7000)).unwrap();
    mem.view().write_slice(b"end", GuestAddress(0x7FFD)).unwrap();
    (mem, PagingState::with_mode(PagingMode::Level4, cr3))
}

#[test]
fn virtual_read_crosses_pages() {
    let (mem, state) = two_pages();
    let mut buf = [0; 9];
    assert_eq!(read_virtual(&*mem.view(), &state, 0x40_0FFC, &mut buf), Ok(9));
    assert_eq!(&buf, b"leftright");
}

#[test]
fn virtual_read_is_short_where_memory_ends() {
    let (mem, state) = two_pages();
    let mut buf = [b'.'; 8];
    assert_eq!(read_virtual(&*mem.view(), &state, 0x40_1FFD, &mut buf), Ok(3));
    assert_eq!(&buf, b"end.....");
    assert_eq!(read_virtual(&*mem.view(), &state, 0x40_1FFF, &mut buf), Ok(1));
}

#[test]
fn virtual_read_that_gets_nothing_is_an_error() {
    let (mem, state) = two_pages();
    let outside = read_virtual(&*mem.view(), &state, 0x40_2008, &mut [0; 4]);
    assert_eq!(outside, Err(WalkError::PageOutsideMemory { gva: 0x40_2008, gpa: 0x10_0008 }));
    let unmapped = read_virtual(&*mem.view(), &state, 0x3F_FFFF, &mut [0; 4]);
    assert!(
        matches!(unmapped, Err(WalkError::NotPresent { level: Level::PageDirectory, .. })),
        "{unmapped:?}"
    );
    assert_eq!(read_virtual(&*mem.view(), &state, 0x3F_FFFF, &mut []), Ok(0));
}

#[test]
fn virtual_read_stops_at_the_top_of_the_address_space() {
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    let mut tables =
        PageTableBuilder::new(PagingMode::Level4, RamRange { start: 0x1000, len: 0x4000 }).unwrap();
    tables.map(!0xFFF, 0x8000, PageSize::Size4K, PageFlags::empty()).unwrap();
    let state = PagingState::with_mode(PagingMode::Level4, tables.write(&*mem.view()).unwrap());
    assert_eq!(read_virtual(&*mem.view(), &state, u64::MAX - 1, &mut [0; 8]), Ok(2));
}

#[test]
fn identity_map_maps_every_address_to_itself() {
    let mem = GuestMem::anonymous(0x10_0000).unwrap();
    for (size, len) in [(PageSize::Size2M, (3 << 30) + 1), (PageSize::Size1G, 5 << 30)] {
        let cr3 =
            identity_map_with(&*mem.view(), GuestAddress(0x9000), len, size, PageFlags::WRITABLE).unwrap();
        let state = PagingState::with_mode(PagingMode::Level4, cr3);
        for gva in [0, 0x1F_FFFF, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, len - 1] {
            let page = translate(&*mem.view(), &state, gva).unwrap();
            assert_eq!((page.gpa.0, page.page_size), (gva, Some(size)));
            assert!(page.writable && page.executable && page.accessed && page.dirty && !page.user);
        }
        let end = len.next_multiple_of(size.bytes());
        assert!(matches!(translate(&*mem.view(), &state, end), Err(WalkError::NotPresent { .. })));
    }
}

#[test]
fn identity_map_writes_its_own_tables_and_nothing_else() {
    let mem = GuestMem::anonymous(0x10_0000).unwrap();
    let view = mem.view();
    view.write_slice(&vec![0xEE; 0x10_0000], GuestAddress(0)).unwrap();
    identity_map(&*view, GuestAddress(0x9000), 4 << 30).unwrap();
    let size = identity_map_size(4 << 30, PageSize::Size2M);
    assert_eq!(size, 6 * 0x1000);
    assert_eq!(view.read_obj::<u8>(GuestAddress(0x8FFF)).unwrap(), 0xEE);
    assert_eq!(view.read_obj::<u8>(GuestAddress(0x9000 + size)).unwrap(), 0xEE);
    // What was there before cannot look like an entry.
    assert_eq!(view.read_obj::<u64>(GuestAddress(0x9008)).unwrap(), 0);
    assert_eq!(view.read_obj::<u64>(GuestAddress(0xA000 + 4 * 8)).unwrap(), 0);
}

#[test]
fn identity_map_can_be_for_user_mode() {
    let mem = GuestMem::anonymous(0x10_0000).unwrap();
    let flags = PageFlags::WRITABLE | PageFlags::USER;
    let cr3 = identity_map_with(&*mem.view(), GuestAddress(0), 1 << 20, PageSize::Size2M, flags).unwrap();
    let state = PagingState::with_mode(PagingMode::Level4, cr3);
    assert!(translate(&*mem.view(), &state, 0).unwrap().user);
}

#[test]
fn identity_map_refuses_what_it_cannot_do() {
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    let view = mem.view();
    for len in [0, (512 << 30) + 1, u64::MAX] {
        let error = identity_map(&*view, GuestAddress(0x1000), len).unwrap_err();
        assert!(matches!(error, Error::Mapping { .. }), "{len:#x}: {error:?}");
    }
    let error = identity_map(&*view, GuestAddress(0x1010), 1).unwrap_err();
    assert!(matches!(error, Error::TableFrames { start: 0x1010, .. }), "{error:?}");
    for at in [0xE000, !0xFFF] {
        let error = identity_map(&*view, GuestAddress(at), 1 << 30).unwrap_err();
        assert!(matches!(error, Error::TablesOutsideMemory { .. } | Error::TableFrames { .. }), "{error:?}");
    }
}

fn builder(mode: PagingMode) -> PageTableBuilder {
    PageTableBuilder::new(mode, RamRange { start: 0x1000, len: 0x1_0000 }).unwrap()
}

#[test]
fn builder_takes_only_the_frames_it_needs() {
    let mut tables = builder(PagingMode::Level4);
    assert_eq!(tables.size(), 0x1000);
    tables.map_range(0, 0, 0x20_0000, PageSize::Size4K, PageFlags::empty()).unwrap();
    assert_eq!(tables.size(), 0x4000);
    tables.map(0x20_0000, 0, PageSize::Size2M, PageFlags::empty()).unwrap();
    assert_eq!(tables.size(), 0x4000);
}

#[test]
fn builder_ends_when_its_frames_do() {
    let mut tables =
        PageTableBuilder::new(PagingMode::Level4, RamRange { start: 0x1000, len: 0x3FFF }).unwrap();
    let error = tables.map(0, 0, PageSize::Size4K, PageFlags::empty()).unwrap_err();
    assert!(matches!(error, Error::TableFrames { start: 0x1000, .. }), "{error:?}");
}

#[test]
fn builder_refuses_frames_that_do_not_do() {
    for (mode, start, len) in [
        (PagingMode::Off, 0, 0x1000),
        (PagingMode::Level4, 8, 0x1000),
        (PagingMode::Level4, 0, 0xFFF),
        (PagingMode::Level4, 1 << 52, 0x1000),
        (PagingMode::Pae, 0xFFFF_F000, 0x2000),
        (PagingMode::Bits32, 1 << 32, 0x1000),
        (PagingMode::Level5, !0xFFF, 0x1000),
    ] {
        let error = PageTableBuilder::new(mode, RamRange { start, len }).unwrap_err();
        assert!(matches!(error, Error::TableFrames { .. }), "{mode:?} {start:#x} {len:#x}: {error:?}");
    }
}

#[test]
fn builder_refuses_mappings_that_the_mode_does_not_have() {
    for (mode, gva, gpa, size, flags) in [
        (PagingMode::Level4, 0x800, 0, PageSize::Size4K, PageFlags::empty()),
        (PagingMode::Level4, 0, 0x1000, PageSize::Size2M, PageFlags::empty()),
        (PagingMode::Level4, 1 << 47, 0, PageSize::Size4K, PageFlags::empty()),
        (PagingMode::Level4, 0, 1 << 52, PageSize::Size4K, PageFlags::empty()),
        (PagingMode::Level4, 0, 0, PageSize::Size4M, PageFlags::empty()),
        (PagingMode::Pae, 0, 0, PageSize::Size1G, PageFlags::empty()),
        (PagingMode::Pae, 1 << 32, 0, PageSize::Size4K, PageFlags::empty()),
        (PagingMode::Bits32, 0, 0, PageSize::Size2M, PageFlags::empty()),
        (PagingMode::Bits32, 0, 1 << 32, PageSize::Size4K, PageFlags::empty()),
        (PagingMode::Bits32, 0, 1 << 40, PageSize::Size4M, PageFlags::empty()),
        (PagingMode::Bits32, 0, 0, PageSize::Size4K, PageFlags::NO_EXECUTE),
    ] {
        let error = builder(mode).map(gva, gpa, size, flags).unwrap_err();
        assert!(matches!(error, Error::Mapping { .. }), "{mode:?} {gva:#x} {gpa:#x} {size}: {error:?}");
    }
}

#[test]
fn builder_refuses_to_map_twice() {
    let mut tables = builder(PagingMode::Level4);
    tables.map(0x20_0000, 0, PageSize::Size2M, PageFlags::empty()).unwrap();
    tables.map(0x0, 0, PageSize::Size4K, PageFlags::empty()).unwrap();
    for (gva, size) in [
        (0x20_0000, PageSize::Size2M),
        (0x20_1000, PageSize::Size4K),
        (0, PageSize::Size4K),
        (0, PageSize::Size2M),
        (0, PageSize::Size1G),
    ] {
        let error = tables.map(gva, 0, size, PageFlags::empty()).unwrap_err();
        assert!(error.to_string().contains("already"), "{gva:#x} {size}: {error}");
    }
}

#[test]
fn builder_refuses_ranges_that_are_not_whole_pages_or_wrap() {
    let mut tables = builder(PagingMode::Level4);
    for (gva, gpa, len) in [(0, 0, 0x1001), (!0xFFF, 0, 0x2000), (0, !0xFFF, 0x2000)] {
        let error = tables.map_range(gva, gpa, len, PageSize::Size4K, PageFlags::empty()).unwrap_err();
        assert!(matches!(error, Error::Mapping { .. }), "{gva:#x} {gpa:#x} {len:#x}: {error:?}");
    }
}

#[test]
fn builder_refuses_to_write_outside_of_memory() {
    let mem = GuestMem::anonymous(0x1000).unwrap();
    let error = builder(PagingMode::Level4).write(&*mem.view()).unwrap_err();
    assert!(matches!(error, Error::TablesOutsideMemory { start: 0x1000, len: 0x1000 }), "{error:?}");
}

#[test]
fn unknown_flag_bits_do_not_change_the_address() {
    let mem = GuestMem::anonymous(0x2_0000).unwrap();
    let mut tables = builder(PagingMode::Level4);
    tables.map(0, 0x5000, PageSize::Size4K, PageFlags::from_bits_retain(0xFF000)).unwrap();
    let state = PagingState::with_mode(PagingMode::Level4, tables.write(&*mem.view()).unwrap());
    assert_eq!(translate(&*mem.view(), &state, 0).unwrap().gpa.0, 0x5000);
}
