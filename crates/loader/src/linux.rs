//! `struct boot_params`, the "zero page" that a Linux kernel is handed (Documentation/x86/zero-page.rst).

use std::ops::Range;

use freestone_memory::layout::{self, E820Entry};
use freestone_memory::{ByteValued, Bytes, GuestAddress, MemoryView};
use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};

use crate::{Error, Result};

/// What the kernel learns besides its own header.
pub(crate) struct BootData<'a> {
    pub cmdline: Option<&'a Range<u64>>,
    pub initrd: Option<&'a Range<u64>>,
    pub rsdp: Option<u64>,
    pub e820: &'a [E820Entry],
}

/// "Undefined boot loader".
const TYPE_OF_LOADER: u8 = 0xff;

/// Writes the zero page and answers its address.
pub(crate) fn write_boot_params(
    view: &MemoryView,
    setup: setup_header,
    kernel: u64,
    data: &BootData<'_>,
) -> Result<u64> {
    let mut params = boot_params { hdr: setup, ..boot_params::default() };
    params.hdr.type_of_loader = TYPE_OF_LOADER;
    params.hdr.loadflags |= LOADED_HIGH;
    // These are ours to say, whatever the file had in them.
    params.hdr.setup_data = 0;
    params.hdr.ramdisk_image = 0;
    params.hdr.ramdisk_size = 0;
    params.hdr.cmd_line_ptr = 0;
    params.hdr.code32_start = low(kernel, "kernel")?;
    if let Some(cmdline) = data.cmdline {
        params.hdr.cmd_line_ptr = low(cmdline.start, "command line")?;
    }
    if let Some(initrd) = data.initrd {
        params.hdr.ramdisk_image = low(initrd.start, "initrd")?;
        params.hdr.ramdisk_size = low(initrd.end.saturating_sub(initrd.start), "initrd")?;
    }
    params.acpi_rsdp_addr = data.rsdp.unwrap_or(0);

    // The structure is packed: work on a copy of the table.
    let mut table = params.e820_table;
    let max = table.len();
    params.e820_entries = match u8::try_from(data.e820.len()) {
        Ok(n) if usize::from(n) <= max => n,
        _ => {
            return Err(Error::BootDataTooLarge {
                what: "e820 map",
                len: data.e820.len() * 20,
                max: max * 20,
            });
        }
    };
    for (to, from) in table.iter_mut().zip(data.e820) {
        *to = boot_e820_entry { addr: from.start, size: from.len, r#type: from.kind.code() };
    }
    params.e820_table = table;

    let gpa = layout::ZERO_PAGE;
    let bytes = params.as_slice();
    view.write_slice(bytes, GuestAddress(gpa)).map_err(|source| Error::Write {
        what: "Linux boot parameters",
        gpa,
        len: bytes.len(),
        source,
    })?;
    Ok(gpa)
}

/// The fields are 32 bits wide; nothing is placed above 4 GiB, so this does not fail.
fn low(value: u64, what: &'static str) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::BootDataTooLarge {
        what,
        len: usize::try_from(value).unwrap_or(usize::MAX),
        max: usize::try_from(u32::MAX).unwrap_or(usize::MAX),
    })
}
