//! Builds page tables in guest memory, walks them as a processor would, and prints what it found.

use std::error::Error;

use freestone_memory::layout::{self, RamRange};
use freestone_memory::paging::{
    PageFlags, PageSize, PageTableBuilder, PagingMode, PagingState, Translation, WalkError, read_virtual,
    translate,
};
use freestone_memory::{Bytes, GuestAddress, GuestMem};

/// Where the example's kernel believes to be.
const KERNEL: u64 = 0xFFFF_FFFF_8000_0000;

fn main() -> Result<(), Box<dyn Error>> {
    let mem = GuestMem::anonymous(64 << 20)?;
    let view = mem.view();

    let frames = layout::BOOT_PAGE_TABLES_END - layout::BOOT_PAGE_TABLES;
    let mut tables =
        PageTableBuilder::new(PagingMode::Level4, RamRange { start: layout::BOOT_PAGE_TABLES, len: frames })?;
    let data = PageFlags::WRITABLE | PageFlags::NO_EXECUTE;
    tables.map(0, 0, PageSize::Size1G, data)?;
    tables.map_range(KERNEL, 0x20_0000, 4 << 20, PageSize::Size2M, PageFlags::GLOBAL)?;
    tables.map(0x7FFF_FFFF_E000, 0x10_0000, PageSize::Size4K, data | PageFlags::USER)?;
    tables.map(0x7FFF_FFFF_F000, 0x1F_F000, PageSize::Size4K, data | PageFlags::USER)?;
    // A device register: mapped, but not in memory.
    tables.map(KERNEL - 0x1000, layout::LAPIC_ADDR, PageSize::Size4K, data | PageFlags::CACHE_DISABLE)?;
    let state = PagingState::with_mode(PagingMode::Level4, tables.write(&*view)?);
    println!("{} KiB of page tables, CR3 {:#x}\n", tables.size() >> 10, state.cr3);

    println!("{:>18}  {:>18}  {:>5}  {:<6}  entries", "guest-virtual", "guest-physical", "page", "access");
    for gva in [
        0x1234,
        0x3FFF_FFFF,
        KERNEL,
        KERNEL + 0x3F_FFFF,
        0x7FFF_FFFF_E010,
        0x7FFF_FFFF_FFFF,
        KERNEL - 0x1000 + 0x20,
        0x4000_0000,
        KERNEL + 0x40_0000,
        0x8000_0000_0000,
    ] {
        print_row(gva, translate(&*view, &state, gva));
    }

    // Two pages that are neighbours only for the guest.
    view.write_slice(b"one string ", GuestAddress(0x10_0FF5))?;
    view.write_slice(b"in two pages", GuestAddress(0x1F_F000))?;
    let mut text = [0; 23];
    let len = read_virtual(&*view, &state, 0x7FFF_FFFF_EFF5, &mut text)?;
    println!("\n{len} bytes at 0x7fffffffeff5: {:?}", String::from_utf8_lossy(&text));
    Ok(())
}

fn print_row(gva: u64, page: Result<Translation, WalkError>) {
    match page {
        Ok(page) => {
            let size = page.page_size.map(|size| size.to_string()).unwrap_or_default();
            let access: String =
                [(true, 'r'), (page.writable, 'w'), (page.executable, 'x'), (page.user, 'u')]
                    .into_iter()
                    .map(|(allowed, letter)| if allowed { letter } else { '-' })
                    .collect();
            let entries: Vec<_> = page.steps().map(|step| format!("{:#x}", step.entry)).collect();
            println!("{gva:#18x}  {:#18x}  {size:>5}  {access:<6}  {}", page.gpa.0, entries.join(" "));
        }
        Err(error) => println!("{gva:#18x}  {error}"),
    }
}
