//! Builds page tables with pages of every size at addresses that the host knows, loads them, and waits for the host to walk
//! them.
#![no_std]
#![no_main]

use core::cell::UnsafeCell;

use freestone_guest_program::{cpu, entry, machine, params, phys, port};

entry!(main);
params!(0, 0);

const DONE: u16 = 0xF4;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 0x80;

const KIB4: u64 = 1 << 12;
const MIB2: u64 = 1 << 21;
const GIB1: u64 = 1 << 30;

/// Virtual and physical address, size, and rights of a page.
struct Page(u64, u64, u64, u64);

/// The same list is in the crate that embeds this program.
const PAGES: [Page; 6] = [
    Page(0x0000_1234_5678_9000, 0x20_0000, KIB4, WRITE | USER),
    Page(0x0000_1234_5678_A000, 0x20_3000, KIB4, USER),
    Page(0x0000_1234_567F_F000, 0x20_7000, KIB4, WRITE | USER),
    Page(0xFFFF_8000_0000_1000, 0x20_5000, KIB4, WRITE),
    Page(0xFFFF_FF80_4020_0000, 0x40_0000, MIB2, WRITE | USER),
    Page(0x0000_7000_4000_0000, 0, GIB1, WRITE | USER),
];

/// Offset of the marker in a page: the first free one, for the large page that begins at address 0.
fn marker(page: &Page) -> u64 {
    if page.2 == GIB1 { 0x60_0008 } else { 8 }
}

#[repr(C, align(4096))]
struct Tables(UnsafeCell<[[u64; 512]; 16]>);

// SAFETY: only `map` and `Builder` touch it, before the processor uses it.
unsafe impl Sync for Tables {}

static TABLES: Tables = Tables(UnsafeCell::new([[0; 512]; 16]));

struct Builder {
    tables: &'static mut [[u64; 512]; 16],
    used: usize,
}

impl Builder {
    fn address(&self, table: usize) -> u64 {
        TABLES.0.get().addr() as u64 + (table as u64) * KIB4
    }

    fn map(&mut self, page: &Page) -> Option<()> {
        let Page(virt, phys, size, rights) = *page;
        let leaf_shift = size.trailing_zeros();
        let (mut table, mut shift) = (0, 39);
        loop {
            let index = (virt >> shift & 511) as usize;
            let entry = *self.tables.get(table)?.get(index)?;
            if shift == leaf_shift {
                let large = if size == KIB4 { 0 } else { LARGE };
                *self.tables.get_mut(table)?.get_mut(index)? = phys | rights | large | PRESENT;
                return Some(());
            }
            let next = if entry & PRESENT == 0 {
                let next = self.used;
                self.used += 1;
                // Rights are the leaf's: the tables above allow all.
                let value = self.address(next) | PRESENT | WRITE | USER;
                *self.tables.get_mut(table)?.get_mut(index)? = value;
                next
            } else {
                ((entry & !0xFFF).checked_sub(self.address(0))? / KIB4) as usize
            };
            (table, shift) = (next, shift - 9);
        }
    }
}

core::arch::global_asm!(
    ".globl level0_load_tables",
    "level0_load_tables:",
    "mov cr3, rdi",
    "xor eax, eax",
    "ret",
);

unsafe extern "C" {
    safe fn level0_load_tables(root: u64, b: u64, c: u64) -> u64;
    static boot_pml4: [u64; 512];
}

fn has_gib_pages() -> bool {
    cpu::cpuid(0x8000_0000).eax >= 0x8000_0001 && cpu::cpuid(0x8000_0001).edx & 1 << 26 != 0
}

fn build(with_gib: bool) -> Option<u64> {
    // SAFETY: called once; nothing else refers to the tables.
    let mut builder = Builder { tables: unsafe { &mut *TABLES.0.get() }, used: 1 };
    for page in PAGES.iter().filter(|page| page.2 != GIB1 || with_gib) {
        builder.map(page)?;
        // SAFETY: the physical pages lie beyond the image, by the linker script's and this list's numbers.
        unsafe { phys::write(page.1 + marker(page), page.0) };
    }
    // The identity map stays, so that the program goes on where it is.
    // SAFETY: the table exists in `boot.s`; the processor may set accessed bits in it, which are set already.
    let identity = unsafe { (&raw const boot_pml4).cast::<u64>().read_volatile() };
    *builder.tables.get_mut(0)?.get_mut(0)? |= identity;
    Some(builder.address(0))
}

extern "C" fn main(_: u64) -> ! {
    let with_gib = has_gib_pages();
    let Some(root) = build(with_gib) else { machine::fail() };
    // SAFETY: the new tables map the first 4 GiB like the old ones.
    unsafe { cpu::at_level_0(level0_load_tables, root, 0, 0) };
    let mut right = true;
    for page in PAGES.iter().filter(|page| (page.2 != GIB1 || with_gib) && page.3 & USER != 0) {
        let at = core::ptr::with_exposed_provenance::<u64>((page.0 + marker(page)) as usize);
        // SAFETY: the address has just been mapped, for this level, to RAM.
        right &= unsafe { at.read_volatile() } == page.0;
    }
    params::set(0, root);
    params::set(1, u64::from(with_gib));
    port::out8(DONE, if right { 1 } else { 2 });
    machine::reset()
}
