//! Linux bzImage files, entered at their 64-bit or 32-bit entry point (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"
//! and "32-bit Boot Protocol").
//!
//! The compressed kernel is loaded where it will run and unpacks itself there. Its real-mode code is not used. Kernels before
//! boot protocol 2.10 (Linux 2.6.31) are refused: they do not say how much memory they need to unpack themselves.

use freestone_memory::ByteValued;
use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};

use crate::boot::{Format, Protocol};
use crate::image::{Image, le32};
use crate::plan::{self, EntryPoint, Plan, Segment};
use crate::ram::Ram;
use crate::{Error, Result};

use freestone_memory::layout::{CMDLINE_MAX, RAM_ABOVE_HOLE};

/// "HdrS", little-endian, at offset 0x202.
pub(crate) const HDRS: u32 = 0x5372_6448;
const HDRS_OFFSET: usize = 0x202;
/// Offset of the setup header in the file and in `boot_params`.
const SETUP_OFFSET: usize = 0x1f1;
/// The byte that says where the setup header ends, counted from [`HDRS_OFFSET`].
const JUMP_LENGTH_OFFSET: usize = 0x201;
/// First protocol with `pref_address` and `init_size`.
const VERSION_INIT_SIZE: u16 = 0x020a;
/// First protocol with `xloadflags`, hence with a 64-bit entry point that one can rely on.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// End of `init_size`, the last field used here.
const NEEDED_END: usize = 0x264;
/// Distance of the 64-bit entry point from the load address.
const ENTRY_64: u64 = 0x200;

/// Whether the start of a file has the magic number of a setup header.
pub(crate) fn is_bzimage(head: &[u8]) -> bool {
    le32(head, HDRS_OFFSET) == Some(HDRS)
}

/// Reads the setup header and makes the plan. `head` is the start of the file.
pub(crate) fn plan(image: &Image<'_>, head: &[u8], protocol: Protocol, ram: &Ram) -> Result<Plan> {
    if protocol == Protocol::Pvh {
        return Err(Error::Protocol {
            name: image.name().to_owned(),
            problem: "a bzImage has no PVH entry point: use the uncompressed kernel or a Linux protocol",
        });
    }
    let setup = read_setup_header(image, head)?;
    let wide = check_setup_header(image, &setup, protocol)?;
    let entry_offset = if wide { ENTRY_64 } else { 0 };

    // 0 means 4 for old boot loaders' sake. The boot sector itself is not counted.
    let sectors = if setup.setup_sects == 0 { 4 } else { u64::from(setup.setup_sects) };
    let offset = (sectors + 1) * 512;
    let paragraphs = u64::from(setup.syssize);
    // What follows the announced size (a signature, padding) is harmless; what is missing is not.
    image.check_inside("compressed kernel", offset, paragraphs * 16)?;
    let len = image.len().saturating_sub(offset);
    if len <= entry_offset {
        return Err(image.bad_field("compressed kernel size", len, "leaves no room for the entry point"));
    }

    let gpa = if setup.relocatable_kernel != 0 { setup.pref_address } else { setup.code32_start.into() };
    let segment = Segment { offset, file_len: len, gpa, mem_len: len };
    plan::check_segments(image, ram, &mut [segment])?;
    // The kernel unpacks itself at its preferred address even when it was loaded below.
    let run = setup.pref_address..setup.pref_address.saturating_add(setup.init_size.into());
    plan::check_range(image, ram, "unpacked kernel", run.clone())?;

    let room = usize::try_from(CMDLINE_MAX).unwrap_or(usize::MAX).saturating_sub(1);
    Ok(Plan {
        format: Format::BzImage,
        segments: vec![segment],
        kernel: gpa.min(run.start)..segment.range().end.max(run.end),
        entry: if wide { EntryPoint::Linux64(gpa + ENTRY_64) } else { EntryPoint::Linux32(gpa) },
        setup,
        initrd_limit: u64::from(setup.initrd_addr_max).saturating_add(1).min(RAM_ABOVE_HOLE),
        cmdline_max: usize::try_from(setup.cmdline_size).unwrap_or(usize::MAX).min(room),
    })
}

/// Copies as much of the setup header as the file says it has.
fn read_setup_header(image: &Image<'_>, head: &[u8]) -> Result<setup_header> {
    let end = head.get(JUMP_LENGTH_OFFSET).map_or(0, |&length| HDRS_OFFSET + usize::from(length));
    if end < NEEDED_END {
        // Older headers are shorter: say that, and not that bytes are missing.
        let version = crate::image::le16(head, 0x206).unwrap_or_default();
        if version < VERSION_INIT_SIZE {
            return Err(too_old(image, version));
        }
        return Err(image.bad_field(
            "setup header end",
            u64::try_from(end).unwrap_or(u64::MAX),
            "cuts the header before init_size",
        ));
    }
    let mut setup = setup_header::default();
    let known = SETUP_OFFSET + size_of::<setup_header>();
    let bytes = head.get(SETUP_OFFSET..end.min(known)).ok_or_else(|| Error::Truncated {
        name: image.name().to_owned(),
        part: "setup header",
        needed: u64::try_from(end).unwrap_or(u64::MAX),
        len: image.len(),
    })?;
    for (to, from) in setup.as_mut_slice().iter_mut().zip(bytes) {
        *to = *from;
    }
    Ok(setup)
}

/// Refuses a header that does not suit `protocol`, and answers whether the kernel is entered in 64-bit mode.
fn check_setup_header(image: &Image<'_>, setup: &setup_header, protocol: Protocol) -> Result<bool> {
    let boot_flag = setup.boot_flag;
    if boot_flag != 0xaa55 {
        return Err(image.bad_field("boot flag", boot_flag.into(), "is not 0xaa55"));
    }
    if setup.version < VERSION_INIT_SIZE {
        return Err(too_old(image, setup.version));
    }
    if setup.loadflags & LOADED_HIGH == 0 {
        return Err(image.bad_field(
            "loadflags",
            setup.loadflags.into(),
            "are those of a zImage, not a bzImage",
        ));
    }
    let has_64 = setup.version >= VERSION_XLOADFLAGS && setup.xloadflags & XLF_KERNEL_64 != 0;
    match protocol {
        Protocol::Linux32 => Ok(false),
        Protocol::Linux64 if setup.version < VERSION_XLOADFLAGS => Err(image.bad_field(
            "boot protocol version",
            setup.version.into(),
            "is before 0x20c and has no 64-bit entry point: use the 32-bit Linux protocol",
        )),
        Protocol::Linux64 if !has_64 => Err(image.bad_field(
            "xloadflags",
            setup.xloadflags.into(),
            "offer no 64-bit entry point: use the 32-bit Linux protocol",
        )),
        Protocol::Auto | Protocol::Pvh | Protocol::Linux64 => Ok(has_64),
    }
}

fn too_old(image: &Image<'_>, version: u16) -> Error {
    image.bad_field(
        "boot protocol version",
        version.into(),
        "is before 0x20a and does not say how much memory the kernel needs",
    )
}
