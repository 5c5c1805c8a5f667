//! Properties of builder and walker: what is mapped is found and nothing else is; the walker agrees with a second, naive
//! one on tables of any content; and no table makes it panic.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;

use freestone_memory::layout::RamRange;
use freestone_memory::paging::{
    CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, EFER_LMA, EFER_LME, EFER_NXE, PageFlags, PageSize, PageTableBuilder,
    PagingMode, PagingState, WalkError, read_virtual, translate,
};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
struct Mapping {
    gva: u64,
    gpa: u64,
    size: PageSize,
    flags: PageFlags,
}

fn sizes(mode: PagingMode) -> &'static [PageSize] {
    match mode {
        PagingMode::Off => &[],
        PagingMode::Bits32 => &[PageSize::Size4K, PageSize::Size4M],
        PagingMode::Pae => &[PageSize::Size4K, PageSize::Size2M],
        PagingMode::Level4 | PagingMode::Level5 => &[PageSize::Size4K, PageSize::Size2M, PageSize::Size1G],
    }
}

/// Sign-extends from the mode's highest address bit.
fn canonical(mode: PagingMode, gva: u64) -> u64 {
    let width = match mode {
        PagingMode::Level4 => 48,
        PagingMode::Level5 => 57,
        _ => return gva & 0xFFFF_FFFF,
    };
    let low = gva & ((1 << width) - 1);
    if low >> (width - 1) == 0 { low } else { low | (u64::MAX << width) }
}

fn mapping(mode: PagingMode) -> impl Strategy<Value = Mapping> {
    let gpa_bits = match mode {
        PagingMode::Bits32 => 32,
        _ => 52,
    };
    // Few high bits, so that mappings meet in the same tables and collide now and then.
    let gva = (any::<u64>(), 0..3u64, any::<bool>()).prop_map(|(low, high, top)| {
        (low & 0x1_FFFF_FFFF) | (high << 37) | if top { u64::MAX << 40 } else { 0 }
    });
    (gva, any::<u64>(), proptest::sample::select(sizes(mode)), any::<u64>()).prop_map(
        move |(gva, gpa, size, bits)| {
            let align = !(size.bytes() - 1);
            let mut flags = PageFlags::from_bits_truncate(bits);
            if mode == PagingMode::Bits32 {
                flags.remove(PageFlags::NO_EXECUTE);
            }
            let gpa_bits = if size == PageSize::Size4M { 40 } else { gpa_bits };
            Mapping {
                gva: canonical(mode, gva) & align,
                gpa: gpa & ((1 << gpa_bits) - 1) & align,
                size,
                flags,
            }
        },
    )
}

fn modes() -> impl Strategy<Value = PagingMode> {
    proptest::sample::select(&[PagingMode::Bits32, PagingMode::Pae, PagingMode::Level4, PagingMode::Level5])
}

fn mode_and_mappings() -> impl Strategy<Value = (PagingMode, Vec<Mapping>, Vec<u64>)> {
    modes().prop_flat_map(|mode| {
        let probes = proptest::collection::vec(any::<u64>().prop_map(move |gva| canonical(mode, gva)), 8);
        (Just(mode), proptest::collection::vec(mapping(mode), 1..24), probes)
    })
}

/// The mapping that covers `gva`, by the list alone.
fn find(model: &BTreeMap<u64, Mapping>, gva: u64) -> Option<&Mapping> {
    model.range(..=gva).next_back().map(|(_, mapping)| mapping).filter(|m| gva - m.gva < m.size.bytes())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn what_is_mapped_is_found_and_nothing_else((mode, mappings, probes) in mode_and_mappings()) {
        let mem = GuestMem::anonymous(2 << 20).unwrap();
        let mut tables = PageTableBuilder::new(mode, RamRange { start: 0x1_0000, len: 1 << 20 }).unwrap();
        let mut model = BTreeMap::new();
        for m in &mappings {
            let last = m.gva + (m.size.bytes() - 1);
            let free = find(&model, m.gva).is_none() && model.range(m.gva..=last).next().is_none();
            let mapped = tables.map(m.gva, m.gpa, m.size, m.flags);
            prop_assert_eq!(mapped.is_ok(), free, "{:?} {:?}", m, mapped);
            if free {
                model.insert(m.gva, *m);
            }
        }
        let view = mem.view();
        let state = PagingState::with_mode(mode, tables.write(&*view).unwrap());
        for m in model.values() {
            for offset in [0, m.size.bytes() / 2 + 3, m.size.bytes() - 1] {
                let page = translate(&*view, &state, m.gva + offset).unwrap();
                prop_assert_eq!(page.gpa.0, m.gpa + offset);
                prop_assert_eq!(page.page_size, Some(m.size));
                let found = [page.writable, page.user, !page.executable, page.global, page.accessed, page.dirty];
                let wanted = [
                    PageFlags::WRITABLE,
                    PageFlags::USER,
                    PageFlags::NO_EXECUTE,
                    PageFlags::GLOBAL,
                    PageFlags::ACCESSED,
                    PageFlags::DIRTY,
                ]
                .map(|flag| m.flags.contains(flag));
                prop_assert_eq!(found, wanted);
            }
        }
        let neighbours = mappings.iter().flat_map(|m| {
            [m.gva.wrapping_sub(1), m.gva.wrapping_add(m.size.bytes())].map(|gva| canonical(mode, gva))
        });
        for gva in probes.into_iter().chain(neighbours) {
            match find(&model, gva) {
                Some(m) => prop_assert_eq!(translate(&*view, &state, gva).unwrap().gpa.0, m.gpa + (gva - m.gva)),
                None => {
                    let missing = matches!(translate(&*view, &state, gva), Err(WalkError::NotPresent { .. }));
                    prop_assert!(missing, "{gva:#x} is not mapped");
                }
            }
        }
    }
}

/// A small generator: filling 64 KiB through proptest would be slow, a seed is enough to reproduce a case.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

const MEMORY: u64 = 0x1_0000;

/// Memory full of entries that often lead on to another table, and sometimes nowhere.
fn hostile_memory(seed: u64, wild: bool) -> (GuestMem, Vec<u8>) {
    let mut rng = Rng(seed | 1);
    let mut bytes = Vec::new();
    while bytes.len() < 0x1_0000 {
        let mut entry = rng.next();
        if !wild {
            // Address within the memory, mostly; present, mostly; reserved bits, now and then.
            let chance = rng.next();
            if chance & 7 != 0 {
                entry &= 0x8000_0000_0000_FFFF;
            }
            if chance & 0x18 != 0 {
                entry &= !(0x1E << 4);
            }
            if chance & 0xE0 != 0 {
                entry |= 1;
            }
            if chance & 0x300 != 0 {
                entry &= !(1 << 63);
            }
            if chance & 0xC00 != 0 {
                entry &= !(0x7FF << 52);
            }
            // Access bits are reserved in the PDPT of PAE paging.
            if chance & 0x1000 != 0 {
                entry &= !6;
            }
        }
        bytes.extend_from_slice(&entry.to_le_bytes());
    }
    let mem = GuestMem::anonymous(MEMORY).unwrap();
    mem.view().write_slice(&bytes, GuestAddress(0)).unwrap();
    (mem, bytes)
}

/// A walk as the manual describes it, mode by mode and with no code shared with the walker: address and size of the page,
/// writable, user, executable; or which kind of error.
mod naive {
    use super::{CR4_PSE, EFER_NXE, PagingMode, PagingState};

    #[derive(Debug, PartialEq, Eq, Clone, Copy)]
    pub enum Fault {
        Address,
        Missing(u64),
        Reserved(u64),
        Outside(u64),
    }

    pub type Page = (u64, u64, bool, bool, bool);

    fn read(bytes: &[u8], at: u64, len: usize) -> Result<u64, Fault> {
        let start = usize::try_from(at).map_err(|_| Fault::Outside(at))?;
        let slice = bytes.get(start..start + len).ok_or(Fault::Outside(at))?;
        Ok(slice.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn bit(value: u64, n: u32) -> bool {
        value >> n & 1 == 1
    }

    fn field(value: u64, high: u32, low: u32) -> u64 {
        (low..=high).filter(|n| bit(value, *n)).fold(0, |sum, n| sum | 1 << (n - low))
    }

    pub fn walk(bytes: &[u8], s: &PagingState, gva: u64) -> Result<Page, Fault> {
        match s.mode() {
            PagingMode::Off if gva > 0xFFFF_FFFF => Err(Fault::Address),
            PagingMode::Off => Ok((gva, 0, true, true, true)),
            PagingMode::Bits32 => walk32(bytes, s, gva),
            PagingMode::Pae => walk_pae(bytes, s, gva),
            PagingMode::Level4 => walk_long(bytes, s, gva, 48),
            PagingMode::Level5 => walk_long(bytes, s, gva, 57),
        }
    }

    fn walk32(bytes: &[u8], s: &PagingState, gva: u64) -> Result<Page, Fault> {
        if gva > 0xFFFF_FFFF {
            return Err(Fault::Address);
        }
        let m = u32::from(s.phys_bits).clamp(32, 40);
        let at = field(s.cr3, 31, 12) * 4096 + field(gva, 31, 22) * 4;
        let pde = read(bytes, at, 4)?;
        if !bit(pde, 0) {
            return Err(Fault::Missing(at));
        }
        if bit(pde, 7) && s.cr4 & CR4_PSE != 0 {
            if (13..=21).any(|n| n >= m - 19 && bit(pde, n)) {
                return Err(Fault::Reserved(at));
            }
            let gpa = field(pde, 20, 13) << 32 | field(pde, 31, 22) << 22 | field(gva, 21, 0);
            return Ok((gpa, 4 << 20, bit(pde, 1), bit(pde, 2), true));
        }
        let at = field(pde, 31, 12) * 4096 + field(gva, 21, 12) * 4;
        let pte = read(bytes, at, 4)?;
        if !bit(pte, 0) {
            return Err(Fault::Missing(at));
        }
        let gpa = field(pte, 31, 12) << 12 | field(gva, 11, 0);
        Ok((gpa, 4096, bit(pde, 1) && bit(pte, 1), bit(pde, 2) && bit(pte, 2), true))
    }

    fn walk_pae(bytes: &[u8], s: &PagingState, gva: u64) -> Result<Page, Fault> {
        if gva > 0xFFFF_FFFF {
            return Err(Fault::Address);
        }
        let m = u32::from(s.phys_bits).clamp(32, 52);
        let at = field(s.cr3, 31, 5) * 32 + field(gva, 31, 30) * 8;
        let pdpte = read(bytes, at, 8)?;
        if !bit(pdpte, 0) {
            return Err(Fault::Missing(at));
        }
        if [1, 2, 5, 6, 7, 8].into_iter().chain(m..=63).any(|n| bit(pdpte, n)) {
            return Err(Fault::Reserved(at));
        }
        let nxe = s.efer & EFER_NXE != 0;
        let bad = |e: u64| (m..=62).any(|n| bit(e, n)) || (!nxe && bit(e, 63));
        let at = field(pdpte, 51, 12) * 4096 + field(gva, 29, 21) * 8;
        let pde = read(bytes, at, 8)?;
        if !bit(pde, 0) {
            return Err(Fault::Missing(at));
        }
        if bad(pde) || (bit(pde, 7) && field(pde, 20, 13) != 0) {
            return Err(Fault::Reserved(at));
        }
        if bit(pde, 7) {
            let gpa = field(pde, 51, 21) << 21 | field(gva, 20, 0);
            return Ok((gpa, 2 << 20, bit(pde, 1), bit(pde, 2), !bit(pde, 63)));
        }
        let at = field(pde, 51, 12) * 4096 + field(gva, 20, 12) * 8;
        let pte = read(bytes, at, 8)?;
        if !bit(pte, 0) {
            return Err(Fault::Missing(at));
        }
        if bad(pte) {
            return Err(Fault::Reserved(at));
        }
        let gpa = field(pte, 51, 12) << 12 | field(gva, 11, 0);
        Ok((
            gpa,
            4096,
            bit(pde, 1) && bit(pte, 1),
            bit(pde, 2) && bit(pte, 2),
            !bit(pde, 63) && !bit(pte, 63),
        ))
    }

    fn walk_long(bytes: &[u8], s: &PagingState, gva: u64, width: u32) -> Result<Page, Fault> {
        if (width..=63).any(|n| bit(gva, n) != bit(gva, width - 1)) {
            return Err(Fault::Address);
        }
        let m = u32::from(s.phys_bits).clamp(32, 52);
        let mut table = field(s.cr3, m - 1, 12);
        let (mut w, mut u, mut x) = (true, true, true);
        let mut low = width - 9;
        loop {
            let at = table * 4096 + field(gva, low + 8, low) * 8;
            let e = read(bytes, at, 8)?;
            if !bit(e, 0) {
                return Err(Fault::Missing(at));
            }
            let high = (m..=51).any(|n| bit(e, n)) || (bit(e, 63) && s.efer & EFER_NXE == 0);
            let ps = bit(e, 7) && low > 12;
            let large = match low {
                21 => ps && field(e, 20, 13) != 0,
                30 => ps && field(e, 29, 13) != 0,
                _ => ps,
            };
            if high || large {
                return Err(Fault::Reserved(at));
            }
            w &= bit(e, 1);
            u &= bit(e, 2);
            x &= !bit(e, 63);
            if ps || low == 12 {
                return Ok((field(e, 51, low) << low | field(gva, low - 1, 0), 1 << low, w, u, x));
            }
            table = field(e, 51, 12);
            low -= 9;
        }
    }
}

fn any_state() -> impl Strategy<Value = PagingState> {
    (any::<u64>(), any::<bool>(), 30..=60u8, 0..32u32).prop_map(|(cr3, wild, phys_bits, bits)| {
        let on = |bit: u32, flag| if bits & bit == 0 { flag } else { 0 };
        PagingState {
            // Paging is nearly always on; 31 of 32 states have it.
            cr0: if bits == 31 { 0 } else { CR0_PG },
            cr3: if wild { cr3 } else { cr3 % MEMORY },
            cr4: on(1, CR4_PAE) | on(2, CR4_PSE | CR4_LA57),
            efer: on(4, EFER_LME | EFER_LMA) | on(8, EFER_NXE),
            phys_bits,
        }
    })
}

fn as_naive(state: &PagingState, mem: &GuestMem, gva: u64) -> Result<naive::Page, naive::Fault> {
    match translate(&*mem.view(), state, gva) {
        Ok(page) => Ok((
            page.gpa.0,
            page.page_size.map_or(0, PageSize::bytes),
            page.writable,
            page.user,
            page.executable,
        )),
        Err(WalkError::NotCanonical { .. } | WalkError::TooWide { .. }) => Err(naive::Fault::Address),
        Err(WalkError::NotPresent { address, .. }) => Err(naive::Fault::Missing(address)),
        Err(WalkError::ReservedBits { address, .. }) => Err(naive::Fault::Reserved(address)),
        Err(WalkError::TableOutsideMemory { address, .. }) => Err(naive::Fault::Outside(address)),
        Err(other) => panic!("a walk ends in {other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn walker_agrees_with_a_naive_one(state in any_state(), seed: u64, gvas in proptest::array::uniform16(any::<u64>())) {
        let (mem, bytes) = hostile_memory(seed, false);
        for gva in gvas {
            let gva = canonical(state.mode(), gva);
            prop_assert_eq!(as_naive(&state, &mem, gva), naive::walk(&bytes, &state, gva), "{:#x} {:x?}", gva, state);
        }
    }

    #[test]
    fn no_table_makes_the_walker_panic(
        state in (any::<[u64; 4]>(), any::<u8>()).prop_map(|([cr0, cr3, cr4, efer], phys_bits)| {
            PagingState { cr0, cr3: cr3 & 0xFFFF, cr4, efer, phys_bits }
        }),
        seed: u64,
        gvas in proptest::array::uniform16(any::<u64>()),
        len in 0..20_000usize,
    ) {
        let (mem, bytes) = hostile_memory(seed, true);
        let mut buf = vec![0; len];
        for gva in gvas {
            prop_assert_eq!(as_naive(&state, &mem, gva), naive::walk(&bytes, &state, gva), "{:#x} {:x?}", gva, state);
            if let Ok(read) = read_virtual(&*mem.view(), &state, canonical(state.mode(), gva), &mut buf) {
                prop_assert!(read <= len);
            }
        }
    }
}

#[test]
fn hostile_memory_reaches_every_outcome() {
    // Otherwise the comparison above would compare little.
    let mut seen = BTreeMap::new();
    for seed in 1..400u64 {
        let (mem, _) = hostile_memory(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15), false);
        for mode in [PagingMode::Bits32, PagingMode::Pae, PagingMode::Level4, PagingMode::Level5] {
            let state = PagingState::with_mode(mode, (seed << 12) % MEMORY);
            for n in 0..16 {
                let gva = canonical(mode, Rng(seed + n * 77).next());
                let outcome = match as_naive(&state, &mem, gva) {
                    Ok((_, size, ..)) => format!("{size:#x}"),
                    Err(naive::Fault::Address) => continue,
                    Err(naive::Fault::Missing(_)) => "missing".to_owned(),
                    Err(naive::Fault::Reserved(_)) => "reserved".to_owned(),
                    Err(naive::Fault::Outside(_)) => "outside".to_owned(),
                };
                *seen.entry((format!("{mode:?}"), outcome)).or_insert(0) += 1;
            }
        }
    }
    let outcomes = |mode: &str| seen.keys().filter(|(m, _)| m == mode).count();
    assert_eq!(
        ["Bits32", "Pae", "Level4", "Level5"].map(outcomes),
        [2 + 3, 2 + 3, 3 + 3, 3 + 3],
        "{seen:#?}"
    );
}
