//! `hvm_start_info`, version 1, what a guest entered by PVH is handed in EBX (Xen's `start_info.h` and `pvh.pandoc`).

use freestone_memory::layout;
use freestone_memory::{Bytes, GuestAddress, MemoryView};
use linux_loader::loader::elf::start_info::XEN_HVM_START_MAGIC_VALUE;

use crate::linux::BootData;
use crate::{Error, Result};

/// Distances from the start info of the module list (one entry of 32 bytes) and of the memory map.
const MODLIST_OFFSET: u64 = 0x40;
const MEMMAP_OFFSET: u64 = 0x60;

/// Writes the start info, the module list and the memory map in one go and answers the address of the start info.
pub(crate) fn write_start_info(view: &MemoryView, data: &BootData<'_>) -> Result<u64> {
    let gpa = layout::PVH_START_INFO;
    let entries = u32::try_from(data.e820.len()).unwrap_or(u32::MAX);
    let modlist = data.initrd.map_or(0, |_| gpa + MODLIST_OFFSET);
    let mut b = Writer(Vec::with_capacity(0x200));

    b.u32(XEN_HVM_START_MAGIC_VALUE).u32(1).u32(0).u32(data.initrd.map_or(0, |_| 1));
    b.u64(modlist).u64(data.cmdline.map_or(0, |r| r.start)).u64(data.rsdp.unwrap_or(0));
    b.u64(gpa + MEMMAP_OFFSET).u32(entries).u32(0);
    // struct hvm_modlist_entry: address, size, its own command line, reserved
    b.pad_to(MODLIST_OFFSET);
    if let Some(initrd) = data.initrd {
        b.u64(initrd.start).u64(initrd.end.saturating_sub(initrd.start)).u64(0).u64(0);
    }
    // struct hvm_memmap_table_entry
    b.pad_to(MEMMAP_OFFSET);
    for entry in data.e820 {
        b.u64(entry.start).u64(entry.len).u32(entry.kind.code()).u32(0);
    }

    let room = usize::try_from(layout::PVH_END - gpa).unwrap_or(usize::MAX);
    let len = b.0.len();
    if len > room {
        return Err(Error::BootDataTooLarge { what: "PVH start info", len, max: room });
    }
    view.write_slice(&b.0, GuestAddress(gpa)).map_err(|source| Error::Write {
        what: "PVH start info",
        gpa,
        len,
        source,
    })?;
    Ok(gpa)
}

/// Appends little-endian numbers.
struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn pad_to(&mut self, offset: u64) {
        self.0.resize(usize::try_from(offset).unwrap_or(0).max(self.0.len()), 0);
    }
}
