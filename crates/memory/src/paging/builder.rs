//! Builds page tables in host memory and writes them to the guest in one piece.

use vm_memory::{Bytes, GuestAddress};

use super::{ADDRESS, LARGE, Level, PRESENT, PageFlags, PageSize, PagingMode};
use crate::layout::RamRange;
use crate::{Error, Result};

/// Bytes of a table. The PDPT of PAE paging is smaller, but gets a frame of its own too.
const TABLE: u64 = 0x1000;
/// Entries of a table in 4-level paging.
const ENTRIES: u64 = 512;
/// What one page-directory-pointer table covers.
const PDPT_SPAN: u64 = ENTRIES << 30;

/// Writes 4-level tables that map the first `len` bytes, rounded up to 2 MiB, to themselves, for CPL0 and writable.
///
/// The tables are at `at`, the root first, and take [`identity_map_size`] bytes. Returns the value for CR3.
///
/// # Errors
/// As [`identity_map_with`].
pub fn identity_map<M>(mem: &M, at: GuestAddress, len: u64) -> Result<u64>
where
    M: Bytes<GuestAddress> + ?Sized,
{
    identity_map_with(mem, at, len, PageSize::Size2M, PageFlags::WRITABLE)
}

/// Like [`identity_map`], with pages of 2 MiB or 1 GiB and with `flags`.
///
/// Accessed and dirty are set as well, so that the processor need not write to the tables. 1 GiB pages need less writing,
/// but a processor that has them (CPUID leaf 0x8000_0001 EDX bit 26).
///
/// # Errors
/// - [`Error::Mapping`]: no bytes or more than 512 GiB, or another page size.
/// - [`Error::TableFrames`]: `at` is not page-aligned, or beyond what an entry can hold.
/// - [`Error::TablesOutsideMemory`].
pub fn identity_map_with<M>(
    mem: &M,
    at: GuestAddress,
    len: u64,
    page_size: PageSize,
    flags: PageFlags,
) -> Result<u64>
where
    M: Bytes<GuestAddress> + ?Sized,
{
    let refuse = |reason| Err(Error::Mapping { gva: 0, gpa: 0, reason });
    if !matches!(page_size, PageSize::Size2M | PageSize::Size1G) {
        return refuse("identity maps have pages of 2 MiB or 1 GiB");
    }
    if len == 0 || len > PDPT_SPAN {
        return refuse("identity maps have at least one byte and at most 512 GiB");
    }
    let size = identity_map_size(len, page_size);
    check_frames(PagingMode::Level4, at.0, size)?;

    // Little-endian bytes of whole tables: a single write, however many entries.
    let mut tables = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    let mut table = |entries: &mut dyn Iterator<Item = u64>| {
        let end = tables.len() + 0x1000;
        entries.for_each(|entry| tables.extend_from_slice(&entry.to_le_bytes()));
        tables.resize(end, 0);
    };
    let pages = len.div_ceil(page_size.bytes());
    let page =
        |n: u64| (n * page_size.bytes()) | leaf_bits(flags | PageFlags::ACCESSED | PageFlags::DIRTY) | LARGE;
    let pdpt = at.0 + TABLE;
    table(&mut std::iter::once(pdpt | table_bits()));
    if page_size == PageSize::Size1G {
        table(&mut (0..pages).map(page));
    } else {
        let directories = pages.div_ceil(ENTRIES);
        table(&mut (1..=directories).map(|n| (pdpt + n * TABLE) | table_bits()));
        for n in 0..directories {
            table(&mut (n * ENTRIES..pages.min((n + 1) * ENTRIES)).map(page));
        }
    }
    write_tables(mem, at.0, &tables)?;
    Ok(at.0)
}

/// Bytes of tables that [`identity_map_with`] writes for `len` bytes.
pub const fn identity_map_size(len: u64, page_size: PageSize) -> u64 {
    let directories = match page_size {
        PageSize::Size1G => 0,
        _ => len.div_ceil(ENTRIES * PageSize::Size2M.bytes()),
    };
    (2 + directories) * TABLE
}

/// Collects mappings and makes tables of them.
///
/// The tables grow in host memory; the guest's memory is written once, by [`write`](Self::write). Frames are taken from the
/// given range one after the other, the root first.
///
/// ```
/// use freestone_memory::layout::RamRange;
/// use freestone_memory::paging::{PageFlags, PageSize, PageTableBuilder, PagingMode};
/// use freestone_memory::GuestMem;
///
/// # fn main() -> freestone_memory::Result<()> {
/// let mem = GuestMem::anonymous(1 << 20)?;
/// let mut tables = PageTableBuilder::new(PagingMode::Level4, RamRange { start: 0x9000, len: 0x8000 })?;
/// tables.map(0x40_0000, 0x1_0000, PageSize::Size4K, PageFlags::USER)?;
/// let cr3 = tables.write(&*mem.view())?;
/// assert_eq!(cr3, 0x9000);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PageTableBuilder {
    mode: PagingMode,
    frames: RamRange,
    tables: Vec<u8>,
}

impl PageTableBuilder {
    /// Tables of `mode`, in whole frames of 4 KiB of `frames`.
    ///
    /// # Errors
    /// [`Error::TableFrames`]: paging is off, the range is not page-aligned or has no frame, or the mode's entries cannot
    /// hold its addresses (below 4 GiB in the 32-bit modes, 52 bits otherwise).
    pub fn new(mode: PagingMode, frames: RamRange) -> Result<Self> {
        check_frames(mode, frames.start, frames.len)?;
        let mut builder = Self { mode, frames, tables: Vec::new() };
        builder.allocate()?;
        Ok(builder)
    }

    /// Value for CR3: the address of the root table.
    pub fn cr3(&self) -> u64 {
        self.frames.start
    }

    /// Bytes of tables so far.
    pub fn size(&self) -> usize {
        self.tables.len()
    }

    /// Maps one page. Levels above it allow everything, so `flags` decide alone.
    ///
    /// # Errors
    /// - [`Error::Mapping`]: an address that is not aligned, not canonical or too high, a page size or a flag that the mode
    ///   does not have, or something is mapped there already.
    /// - [`Error::TableFrames`]: no frame is left.
    pub fn map(&mut self, gva: u64, gpa: u64, size: PageSize, flags: PageFlags) -> Result<()> {
        let refuse = |reason| Err(Error::Mapping { gva, gpa, reason });
        self.check(gva, gpa, size, flags)?;
        let mut table = 0;
        for spec in self.mode.levels() {
            let at = table + usize::try_from(spec.index(gva) * self.mode.entry_size()).unwrap_or(0);
            let entry = self.entry(at);
            if spec.leaf == Some(size) {
                if entry & PRESENT != 0 {
                    return refuse("something is mapped there already");
                }
                let large = if spec.level == Level::PageTable { 0 } else { LARGE };
                self.set_entry(at, page_address(self.mode, gpa, size) | leaf_bits(flags) | large);
                return Ok(());
            }
            if entry & PRESENT == 0 {
                table = self.allocate()?;
                let address = self.frames.start + table as u64;
                // Access bits are reserved in the PDPT entries of PAE paging.
                let pointer = self.mode == PagingMode::Pae && spec.level == Level::Pdpt;
                self.set_entry(at, address | if pointer { PRESENT } else { table_bits() });
            } else if entry & LARGE != 0 {
                return refuse("a larger page is mapped there already");
            } else {
                table = usize::try_from((entry & ADDRESS) - self.frames.start).unwrap_or(0);
            }
        }
        refuse("the mode has no pages of this size")
    }

    /// Maps `len` bytes with pages of one size.
    ///
    /// # Errors
    /// As [`map`](Self::map), and if `len` is not a multiple of `size`. Pages before the one at fault are mapped.
    pub fn map_range(
        &mut self,
        gva: u64,
        gpa: u64,
        len: u64,
        size: PageSize,
        flags: PageFlags,
    ) -> Result<()> {
        let refuse = |reason| Error::Mapping { gva, gpa, reason };
        if !len.is_multiple_of(size.bytes()) {
            return Err(refuse("the length is not a multiple of the page size"));
        }
        if gva.checked_add(len.saturating_sub(1)).is_none()
            || gpa.checked_add(len.saturating_sub(1)).is_none()
        {
            return Err(refuse("the range wraps the address space"));
        }
        (0..len / size.bytes()).try_for_each(|n| {
            let offset = n * size.bytes();
            self.map(gva + offset, gpa + offset, size, flags)
        })
    }

    /// Writes the tables to guest memory, in one piece, and returns the value for CR3.
    ///
    /// # Errors
    /// [`Error::TablesOutsideMemory`].
    pub fn write<M>(&self, mem: &M) -> Result<u64>
    where
        M: Bytes<GuestAddress> + ?Sized,
    {
        write_tables(mem, self.frames.start, &self.tables)?;
        Ok(self.cr3())
    }

    fn check(&self, gva: u64, gpa: u64, size: PageSize, flags: PageFlags) -> Result<()> {
        let highest = match (self.mode, size) {
            (PagingMode::Bits32, PageSize::Size4M) => 1 << 40,
            (PagingMode::Bits32, _) => 1 << 32,
            _ => 1 << 52,
        };
        let reason = if !gva.is_multiple_of(size.bytes()) || !gpa.is_multiple_of(size.bytes()) {
            "the addresses are not multiples of the page size"
        } else if !self.mode.contains(gva) {
            "the mode has no such guest-virtual address"
        } else if gpa >= highest {
            "an entry cannot hold so high a guest-physical address"
        } else if self.mode == PagingMode::Bits32 && flags.contains(PageFlags::NO_EXECUTE) {
            "32-bit paging has no no-execute bit"
        } else {
            return Ok(());
        };
        Err(Error::Mapping { gva, gpa, reason })
    }

    /// Takes the next frame and returns its offset in `tables`.
    fn allocate(&mut self) -> Result<usize> {
        let offset = self.tables.len();
        let end = offset + 0x1000;
        if end as u64 > self.frames.len {
            return Err(Error::TableFrames {
                start: self.frames.start,
                reason: "no frame is left for one more table",
            });
        }
        self.tables.resize(end, 0);
        Ok(offset)
    }

    /// The entry at byte offset `at`; all offsets come from `allocate` and an index within a table.
    fn entry(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        let len = self.entry_len();
        if let (Some(from), Some(to)) = (self.tables.get(at..at + len), bytes.get_mut(..len)) {
            to.copy_from_slice(from);
        }
        u64::from_le_bytes(bytes)
    }

    fn set_entry(&mut self, at: usize, entry: u64) {
        let len = self.entry_len();
        if let (Some(to), Some(from)) = (self.tables.get_mut(at..at + len), entry.to_le_bytes().get(..len)) {
            to.copy_from_slice(from);
        }
    }

    fn entry_len(&self) -> usize {
        if self.mode == PagingMode::Bits32 { 4 } else { 8 }
    }
}

/// An entry that points to a table and leaves it to the page what is allowed.
fn table_bits() -> u64 {
    PRESENT | (PageFlags::WRITABLE | PageFlags::USER | PageFlags::ACCESSED).bits()
}

fn leaf_bits(flags: PageFlags) -> u64 {
    // Bits that are no flags would change the address.
    PRESENT | (flags & PageFlags::all()).bits()
}

/// The address as an entry holds it.
fn page_address(mode: PagingMode, gpa: u64, size: PageSize) -> u64 {
    match (mode, size) {
        // PSE-36: address bits 39:32 go to bits 20:13.
        (PagingMode::Bits32, PageSize::Size4M) => (gpa & 0xFFC0_0000) | ((gpa >> 32) << 13),
        _ => gpa,
    }
}

fn check_frames(mode: PagingMode, start: u64, len: u64) -> Result<()> {
    let highest = match mode {
        PagingMode::Off => {
            return Err(Error::TableFrames { start, reason: "there are none when paging is off" });
        }
        PagingMode::Bits32 | PagingMode::Pae => 1 << 32,
        PagingMode::Level4 | PagingMode::Level5 => 1 << 52,
    };
    let reason = if !start.is_multiple_of(TABLE) {
        "they must start at a multiple of 4096"
    } else if len < TABLE {
        "there must be at least one frame of 4096 bytes"
    } else if start.checked_add(len).is_none_or(|end| end > highest) {
        "an entry cannot hold so high an address"
    } else {
        return Ok(());
    };
    Err(Error::TableFrames { start, reason })
}

fn write_tables<M>(mem: &M, start: u64, tables: &[u8]) -> Result<()>
where
    M: Bytes<GuestAddress> + ?Sized,
{
    mem.write_slice(tables, GuestAddress(start))
        .map_err(|_| Error::TablesOutsideMemory { start, len: tables.len() })
}
