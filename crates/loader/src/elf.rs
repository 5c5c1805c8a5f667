//! ELF kernels: an uncompressed `vmlinux`, or any guest program linked at physical addresses.
//!
//! Only program headers are read. Nothing in the file is believed: the number of headers and notes is bounded, every range is
//! checked against the file and against RAM, and no header is followed to another header.

use linux_loader::elf as abi;
use linux_loader::loader::bootparam::{self, setup_header};

use crate::boot::{Format, Protocol};
use crate::image::{Image, le16, le32, le64};
use crate::plan::{self, EntryPoint, LINUX_CMDLINE_MAX, Plan, Segment};
use crate::ram::Ram;
use crate::{Error, Result};

use freestone_memory::layout::{CMDLINE_MAX, RAM_ABOVE_HOLE};

/// First bytes of every ELF file.
pub(crate) const MAGIC: &[u8] = b"\x7fELF";
/// Kernels have about five program headers; this bounds the work for a file that claims 65535.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Note segments of kernels have some hundred bytes.
const MAX_NOTES_LEN: u64 = 0x1_0000;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
/// `XEN_ELFNOTE_GUEST_OS`: name of the operating system.
const NOTE_GUEST_OS: u32 = 6;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: physical address of the 32-bit PVH entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// The fields of an ELF header that matter here, of either class.
struct Header {
    wide: bool,
    entry: u64,
    phoff: u64,
    phentsize: u16,
    phnum: u16,
}

/// One program header of either class.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    gpa: u64,
    file_len: u64,
    mem_len: u64,
    align: u64,
}

/// What the notes say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Notes {
    pvh_entry: Option<u64>,
    linux: bool,
}

/// Reads the headers and makes the plan. `head` is the start of the file.
pub(crate) fn plan(image: &Image<'_>, head: &[u8], protocol: Protocol, ram: &Ram) -> Result<Plan> {
    let header = parse_header(image, head)?;
    let table = read_table(image, head, &header)?;
    let mut segments = Vec::new();
    let mut notes = Notes::default();
    for bytes in table.chunks_exact(usize::from(header.phentsize)) {
        let ph = parse_program_header(bytes, header.wide)
            .ok_or_else(|| image.bad_field("program header size", header.phentsize.into(), "is too small"))?;
        match ph.kind {
            abi::PT_LOAD if ph.mem_len > 0 || ph.file_len > 0 => segments.push(Segment {
                offset: ph.offset,
                file_len: ph.file_len,
                gpa: ph.gpa,
                mem_len: ph.mem_len,
            }),
            abi::PT_NOTE if matches!(protocol, Protocol::Auto | Protocol::Pvh) => {
                read_notes(image, &ph, &mut notes)?
            }
            _ => {}
        }
    }
    let kernel = plan::check_segments(image, ram, &mut segments)?;
    let entry = choose_entry(image, &header, &notes, protocol)?;
    let address = match entry {
        EntryPoint::Pvh(address) | EntryPoint::Linux64(address) | EntryPoint::Linux32(address) => address,
    };
    plan::check_entry(image, &segments, address)?;
    let linux = notes.linux || !matches!(entry, EntryPoint::Pvh(_));
    let room = usize::try_from(CMDLINE_MAX).unwrap_or(usize::MAX).saturating_sub(1);
    Ok(Plan {
        format: Format::Elf,
        segments,
        kernel,
        entry,
        setup: synthetic_setup_header(header.wide),
        initrd_limit: RAM_ABOVE_HOLE,
        cmdline_max: if linux { LINUX_CMDLINE_MAX } else { room },
    })
}

fn parse_header(image: &Image<'_>, head: &[u8]) -> Result<Header> {
    let cut = |needed| Error::Truncated {
        name: image.name().to_owned(),
        part: "ELF header",
        needed,
        len: image.len(),
    };
    let &[class, data, ..] = head.get(abi::EI_CLASS..).unwrap_or_default() else {
        return Err(cut(64));
    };
    let wide = match u32::from(class) {
        1 => false,
        2 => true,
        _ => return Err(image.bad_field("ELF class", class.into(), "is neither 32-bit nor 64-bit")),
    };
    if u32::from(data) != u32::from(abi::ELFDATA2LSB) {
        return Err(image.bad_field("ELF data encoding", data.into(), "is not little-endian"));
    }
    let fields = |offsets: [usize; 4]| {
        let [phoff, phentsize, phnum, _] = offsets;
        Some((
            le16(head, 16)?,
            le16(head, 18)?,
            Header {
                wide,
                entry: if wide { le64(head, 24)? } else { le32(head, 24)?.into() },
                phoff: if wide { le64(head, phoff)? } else { le32(head, phoff)?.into() },
                phentsize: le16(head, phentsize)?,
                phnum: le16(head, phnum)?,
            },
        ))
    };
    let (kind, machine, header) = match wide {
        true => fields([32, 54, 56, 0]).ok_or_else(|| cut(64))?,
        false => fields([28, 42, 44, 0]).ok_or_else(|| cut(52))?,
    };
    if !matches!(kind, ET_EXEC | ET_DYN) {
        return Err(image.bad_field("ELF type", kind.into(), "is not an executable"));
    }
    let (expected, size) = if wide { (EM_X86_64, 56) } else { (EM_386, 32) };
    if machine != expected {
        return Err(image.bad_field("ELF machine", machine.into(), "is not an x86 processor"));
    }
    if header.phentsize != size {
        return Err(image.bad_field(
            "program header size",
            header.phentsize.into(),
            "is wrong for the ELF class",
        ));
    }
    if header.phnum > MAX_PROGRAM_HEADERS {
        return Err(image.bad_field("program header count", header.phnum.into(), "is over the limit of 128"));
    }
    Ok(header)
}

/// The program header table: from `head` when it is in there, as in most files, or read.
fn read_table(image: &Image<'_>, head: &[u8], header: &Header) -> Result<Vec<u8>> {
    let len = usize::from(header.phentsize) * usize::from(header.phnum);
    image.check_inside("program header table", header.phoff, u64::try_from(len).unwrap_or(u64::MAX))?;
    let in_head = usize::try_from(header.phoff).ok().and_then(|at| head.get(at..at.checked_add(len)?));
    match in_head {
        Some(table) => Ok(table.to_vec()),
        None => image.read(header.phoff, len),
    }
}

fn parse_program_header(b: &[u8], wide: bool) -> Option<ProgramHeader> {
    Some(if wide {
        ProgramHeader {
            kind: le32(b, 0)?,
            offset: le64(b, 8)?,
            gpa: le64(b, 24)?,
            file_len: le64(b, 32)?,
            mem_len: le64(b, 40)?,
            align: le64(b, 48)?,
        }
    } else {
        ProgramHeader {
            kind: le32(b, 0)?,
            offset: le32(b, 4)?.into(),
            gpa: le32(b, 12)?.into(),
            file_len: le32(b, 16)?.into(),
            mem_len: le32(b, 20)?.into(),
            align: le32(b, 28)?.into(),
        }
    })
}

fn read_notes(image: &Image<'_>, ph: &ProgramHeader, notes: &mut Notes) -> Result<()> {
    image.check_inside("note segment", ph.offset, ph.file_len)?;
    if ph.file_len > MAX_NOTES_LEN {
        return Err(image.bad_field("note segment length", ph.file_len, "is over the limit of 65536 bytes"));
    }
    let len = usize::try_from(ph.file_len).unwrap_or(usize::MAX);
    parse_notes(image, &image.read(ph.offset, len)?, if ph.align == 8 { 8 } else { 4 }, notes)
}

/// Walks the notes. Each has at least its header of 12 bytes, so the walk ends; a note that is cut off ends it as well.
fn parse_notes(image: &Image<'_>, mut bytes: &[u8], align: usize, notes: &mut Notes) -> Result<()> {
    while let (Some(name_len), Some(desc_len), Some(kind)) = (le32(bytes, 0), le32(bytes, 4), le32(bytes, 8))
    {
        let (Ok(name_len), Ok(desc_len)) = (usize::try_from(name_len), usize::try_from(desc_len)) else {
            return Ok(());
        };
        let desc_start = 12_usize.checked_add(name_len).and_then(|n| n.checked_next_multiple_of(align));
        let Some(desc_end) = desc_start.and_then(|n| n.checked_add(desc_len)) else { return Ok(()) };
        let (Some(name), Some(desc)) = (
            bytes.get(12..12_usize.saturating_add(name_len)),
            desc_start.and_then(|start| bytes.get(start..desc_end)),
        ) else {
            return Ok(());
        };
        match kind {
            NOTE_PHYS32_ENTRY if name == b"Xen\0" => notes.pvh_entry = Some(pvh_entry(image, desc)?),
            NOTE_GUEST_OS if name == b"Xen\0" => notes.linux = desc.starts_with(b"linux"),
            _ => {}
        }
        bytes =
            desc_end.checked_next_multiple_of(align).and_then(|next| bytes.get(next..)).unwrap_or_default();
    }
    Ok(())
}

/// The entry is a 32-bit address; Linux stores it in 64 bits.
fn pvh_entry(image: &Image<'_>, desc: &[u8]) -> Result<u64> {
    let entry = match desc.len() {
        4 => le32(desc, 0).map(u64::from),
        _ => le64(desc, 0),
    };
    match entry {
        Some(entry) if u32::try_from(entry).is_ok() => Ok(entry),
        Some(entry) => Err(image.bad_field("PVH entry point", entry, "is not a 32-bit address")),
        None => Err(image.bad_field(
            "PVH note length",
            u64::try_from(desc.len()).unwrap_or(u64::MAX),
            "is neither 4 nor 8 bytes",
        )),
    }
}

fn choose_entry(image: &Image<'_>, header: &Header, notes: &Notes, protocol: Protocol) -> Result<EntryPoint> {
    let refused = |problem| Err(Error::Protocol { name: image.name().to_owned(), problem });
    match (protocol, notes.pvh_entry) {
        (Protocol::Auto | Protocol::Pvh, Some(entry)) => Ok(EntryPoint::Pvh(entry)),
        (Protocol::Pvh, None) => refused(
            "no PVH entry point (ELF note XEN_ELFNOTE_PHYS32_ENTRY): start it by the Linux boot protocol",
        ),
        (Protocol::Auto | Protocol::Linux64, _) if header.wide => Ok(EntryPoint::Linux64(header.entry)),
        (Protocol::Auto | Protocol::Linux32, _) if !header.wide => Ok(EntryPoint::Linux32(header.entry)),
        (Protocol::Auto | Protocol::Linux64, _) => refused(
            "a 32-bit ELF file has no 64-bit entry point: start it by the 32-bit Linux protocol or by PVH",
        ),
        (Protocol::Linux32, _) => refused("the entry point of a 64-bit ELF file is in 64-bit code"),
    }
}

/// An ELF file has no setup header, but the kernel looks at some fields of it (Documentation/x86/boot.rst).
fn synthetic_setup_header(wide: bool) -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: crate::bzimage::HDRS,
        version: 0x020f,
        loadflags: bootparam::LOADED_HIGH,
        kernel_alignment: 0x100_0000,
        xloadflags: if wide { bootparam::XLF_KERNEL_64 } else { 0 },
        ..setup_header::default()
    }
}
