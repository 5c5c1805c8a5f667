//! Putting a kernel, its initrd and its boot data into guest memory.
//!
//! Everything is checked first: when an error is returned for what the files ask for, guest memory is as it was.

use std::fs::File;
use std::ops::Range;

use freestone_memory::layout::{self, HIGH_MEMORY};
use freestone_memory::{Bytes, GuestAddress, GuestMem, MemoryView};

use crate::error::hex_start;
use crate::image::Image;
use crate::linux::{self, BootData};
use crate::plan::{EntryPoint, Plan};
use crate::ram::{self, Ram};
use crate::{Error, Result, bzimage, elf, pvh};

/// How to enter a kernel that may be entered in more than one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// PVH when the file has a PVH note, the Linux protocol otherwise: the 64-bit one where the kernel has that entry point, else
    /// the 32-bit one.
    #[default]
    Auto,
    /// The PVH entry point of an ELF file.
    Pvh,
    /// The 64-bit Linux boot protocol.
    Linux64,
    /// The 32-bit Linux boot protocol. Kernels of 64 bits in a bzImage have this entry point as well.
    Linux32,
}

/// What to boot.
#[derive(Debug)]
pub struct BootSource<'a> {
    /// The kernel file.
    pub kernel: &'a mut File,
    /// Its name, for messages.
    pub kernel_name: &'a str,
    /// How to enter it.
    pub protocol: Protocol,
    /// Initial RAM disk and its name for messages.
    pub initrd: Option<(&'a mut File, &'a str)>,
    /// Kernel command line; empty for none.
    pub cmdline: &'a str,
    /// Guest-physical address of the ACPI RSDP (see [`crate::acpi::write_acpi`]).
    pub rsdp: Option<u64>,
}

/// The state in which the boot vCPU enters the guest. All addresses are guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, paging off, EBX = `start_info` (PVH).
    Pvh32 {
        /// Address of the first instruction.
        entry: u64,
        /// Address of `hvm_start_info`.
        start_info: u64,
    },
    /// 64-bit mode, memory mapped to itself, RSI = `boot_params` (64-bit Linux boot protocol).
    Linux64 {
        /// Address of the first instruction.
        entry: u64,
        /// Address of `struct boot_params`.
        boot_params: u64,
    },
    /// 32-bit protected mode, flat segments, paging off, ESI = `boot_params` (32-bit Linux boot protocol).
    Linux32 {
        /// Address of the first instruction.
        entry: u64,
        /// Address of `struct boot_params`.
        boot_params: u64,
    },
    /// Real mode at `segment`:`offset`.
    Real16 {
        /// CS.
        segment: u16,
        /// IP.
        offset: u16,
    },
    /// 32-bit protected mode, flat segments, paging off.
    Flat32 {
        /// Address of the first instruction.
        entry: u64,
    },
    /// 64-bit mode, memory mapped to itself.
    Flat64 {
        /// Address of the first instruction.
        entry: u64,
    },
}

/// Kind of file that was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// ELF executable.
    Elf,
    /// Linux bzImage.
    BzImage,
    /// Code without a header.
    Flat,
}

/// Where everything is. All ranges are guest-physical.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// How the boot vCPU enters.
    pub entry: Entry,
    /// What the file was.
    pub format: Format,
    /// The kernel's memory, with what it needs to unpack itself.
    pub kernel: Range<u64>,
    /// What was loaded from the file, with the cleared tails; sorted.
    pub segments: Vec<Range<u64>>,
    /// The initial RAM disk, without padding.
    pub initrd: Option<Range<u64>>,
    /// The command line with its NUL.
    pub cmdline: Option<Range<u64>>,
}

/// Enough of a file for the headers of either format, in one read.
const HEAD_LEN: usize = 0x1000;

/// Loads a kernel file (ELF or bzImage, told apart by its contents), the initrd and the boot data.
///
/// The initrd lies as high as the kernel and the 32-bit hole allow, on a page boundary. Boot data is written at the
/// addresses that [`freestone_memory::layout`] gives.
///
/// # Errors
/// One for every way in which a file or the amount of memory does not suit; see [`Error`].
pub fn load(mem: &GuestMem, source: &mut BootSource<'_>) -> Result<Loaded> {
    let kernel = Image::from_file("kernel", source.kernel_name, source.kernel)?;
    let initrd = match &mut source.initrd {
        Some((file, name)) => Some(Image::from_file("initrd", name, file)?),
        None => None,
    };
    load_images(mem, kernel, initrd, source.protocol, source.cmdline, source.rsdp)
}

/// As [`load`], for a kernel that is in the VMM's own memory, without an initrd and by [`Protocol::Auto`].
///
/// # Errors
/// As [`load`]. Messages call the kernel "built-in guest".
pub fn load_bytes(mem: &GuestMem, image: &[u8], cmdline: &str, rsdp: Option<u64>) -> Result<Loaded> {
    let kernel = Image::from_bytes("kernel", "built-in guest", image)?;
    load_images(mem, kernel, None, Protocol::Auto, cmdline, rsdp)
}

fn load_images(
    mem: &GuestMem,
    mut kernel: Image<'_>,
    initrd: Option<Image<'_>>,
    protocol: Protocol,
    cmdline: &str,
    rsdp: Option<u64>,
) -> Result<Loaded> {
    let ram = Ram::of(mem);
    let plan = make_plan(&kernel, protocol, &ram)?;
    check_cmdline(&kernel, &plan, cmdline)?;
    let mut initrd = match initrd {
        Some(image) => Some((place_initrd(&ram, &plan, &image)?, image)),
        None => None,
    };

    let view = mem.view();
    plan.load_segments(&mut kernel, &view)?;
    if let Some((range, image)) = &mut initrd {
        image.read_into(&view, 0, range.end.saturating_sub(range.start), range.start)?;
    }
    let initrd = initrd.map(|(range, _)| range);
    let cmdline = write_cmdline(&view, cmdline)?;
    let e820 = layout::e820(&ram::ranges(mem));
    let data = BootData { cmdline: cmdline.as_ref(), initrd: initrd.as_ref(), rsdp, e820: &e820 };
    let boot_params = || linux::write_boot_params(&view, plan.setup, plan.load_address(), &data);
    let entry = match plan.entry {
        EntryPoint::Pvh(entry) => Entry::Pvh32 { entry, start_info: pvh::write_start_info(&view, &data)? },
        EntryPoint::Linux64(entry) => Entry::Linux64 { entry, boot_params: boot_params()? },
        EntryPoint::Linux32(entry) => Entry::Linux32 { entry, boot_params: boot_params()? },
    };
    let segments = plan.segments.iter().map(|s| s.range()).collect();
    Ok(Loaded { entry, format: plan.format, kernel: plan.kernel, segments, initrd, cmdline })
}

fn make_plan(kernel: &Image<'_>, protocol: Protocol, ram: &Ram) -> Result<Plan> {
    let head = kernel.read(0, HEAD_LEN)?;
    if head.starts_with(elf::MAGIC) {
        elf::plan(kernel, &head, protocol, ram)
    } else if bzimage::is_bzimage(&head) {
        bzimage::plan(kernel, &head, protocol, ram)
    } else {
        Err(Error::UnknownFormat {
            name: kernel.name().to_owned(),
            start: hex_start(&head),
            hint: hint(&head),
        })
    }
}

/// What people most often give instead of a kernel.
fn hint(head: &[u8]) -> &'static str {
    match head {
        [0x1f, 0x8b, ..] => ": it is gzip-compressed, unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ": it is zstd-compressed, unpack it first",
        [0xfd, b'7', b'z', ..] => ": it is xz-compressed, unpack it first",
        [b'0', b'7', b'0', b'7', ..] => ": it is a cpio archive, probably an initrd",
        [b'!', b'<', b'a', b'r', ..] => ": it is an archive, probably a package",
        [b'M', b'Z', ..] => ": it is an EFI program, but has no Linux setup header",
        _ => "",
    }
}

fn check_cmdline(kernel: &Image<'_>, plan: &Plan, cmdline: &str) -> Result<()> {
    if let Some(offset) = cmdline.bytes().position(|b| b == 0) {
        return Err(Error::CmdlineNul { offset });
    }
    if cmdline.len() > plan.cmdline_max {
        let name = kernel.name().to_owned();
        return Err(Error::CmdlineTooLong { name, len: cmdline.len(), max: plan.cmdline_max });
    }
    Ok(())
}

fn place_initrd(ram: &Ram, plan: &Plan, initrd: &Image<'_>) -> Result<Range<u64>> {
    let len = initrd.len();
    let window = HIGH_MEMORY..plan.initrd_limit;
    match ram.highest_free(len, &window, &plan.kernel) {
        Some(start) => Ok(start..start + len),
        None => Err(Error::InitrdTooLarge {
            name: initrd.name().to_owned(),
            size: len,
            limit: plan.initrd_limit.min(ram.end()),
        }),
    }
}

/// Writes the command line and its NUL; an empty one is not written.
fn write_cmdline(view: &MemoryView, cmdline: &str) -> Result<Option<Range<u64>>> {
    if cmdline.is_empty() {
        return Ok(None);
    }
    let gpa = layout::CMDLINE;
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    let len = bytes.len();
    view.write_slice(&bytes, GuestAddress(gpa)).map_err(|source| Error::Write {
        what: "command line",
        gpa,
        len,
        source,
    })?;
    let end = u64::try_from(len).ok().and_then(|len| gpa.checked_add(len));
    Ok(end.map(|end| gpa..end))
}
