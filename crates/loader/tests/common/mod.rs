//! Small kernels to load, and guest memory to look into.
#![expect(dead_code, reason = "each test file uses a part of it")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs::File;
use std::io::Write;
use std::ops::Range;

use freestone_loader::{BootSource, Loaded, Protocol, Result};
use freestone_memory::{Bytes, GuestAddress, GuestMem};

pub const MIB: u64 = 1 << 20;

/// Guest memory of `size` bytes.
pub fn memory(size: u64) -> GuestMem {
    GuestMem::anonymous(size).unwrap()
}

pub fn bytes_at(mem: &GuestMem, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    mem.view().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

pub fn fill(mem: &GuestMem, range: Range<u64>, byte: u8) {
    let bytes = vec![byte; usize::try_from(range.end - range.start).unwrap()];
    mem.view().write_slice(&bytes, GuestAddress(range.start)).unwrap();
}

pub fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

pub fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file
}

/// Loads a kernel named "k", with an initrd named "i" when there is one.
pub fn load(
    mem: &GuestMem,
    kernel: &[u8],
    protocol: Protocol,
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<Loaded> {
    let mut kernel = file(kernel);
    let mut initrd = initrd.map(file);
    freestone_loader::load(
        mem,
        &mut BootSource {
            kernel: &mut kernel,
            kernel_name: "k",
            protocol,
            initrd: initrd.as_mut().map(|f| (f, "i")),
            cmdline,
            rsdp: Some(0xe_0000),
        },
    )
}

/// The message of a refusal, which must be one line.
pub fn refusal(result: Result<Loaded>) -> String {
    let message = result.unwrap_err().to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

/// A program header of a 64-bit ELF file.
#[derive(Clone, Copy)]
pub struct Ph {
    pub kind: u32,
    pub offset: u64,
    pub paddr: u64,
    pub filesz: u64,
    pub memsz: u64,
}

pub const PT_LOAD: u32 = 1;
pub const PT_NOTE: u32 = 4;

/// A 64-bit ELF file of these program headers; `tail` follows at offset 0x1000.
pub fn elf64(entry: u64, headers: &[Ph], tail: &[u8]) -> Vec<u8> {
    let mut b = vec![0; 0x1000];
    put(&mut b, 0, b"\x7fELF\x02\x01\x01");
    put(&mut b, 16, &[2, 0, 62, 0, 1]);
    put(&mut b, 24, &entry.to_le_bytes());
    put(&mut b, 32, &64_u64.to_le_bytes());
    put(&mut b, 52, &[64, 0, 56, 0, u8::try_from(headers.len()).unwrap()]);
    for (i, ph) in headers.iter().enumerate() {
        let at = 64 + 56 * i;
        put(&mut b, at, &ph.kind.to_le_bytes());
        for (j, value) in [ph.offset, ph.paddr, ph.paddr, ph.filesz, ph.memsz, 4].into_iter().enumerate() {
            put(&mut b, at + 8 + 8 * j, &value.to_le_bytes());
        }
    }
    b.extend_from_slice(tail);
    b
}

/// An ELF note.
pub fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut b = Vec::new();
    for n in [u32::try_from(name.len()).unwrap(), u32::try_from(desc.len()).unwrap(), kind] {
        b.extend_from_slice(&n.to_le_bytes());
    }
    b.extend_from_slice(name);
    b.resize(b.len().next_multiple_of(4), 0);
    b.extend_from_slice(desc);
    b.resize(b.len().next_multiple_of(4), 0);
    b
}

/// Where [`vmlinux`] is loaded and how long it is in memory.
pub const VMLINUX: Range<u64> = 0x100_0000..0x100_5000;

/// A kernel of two segments, the second with a zeroed tail, and notes: 64-bit entry 0x100_0000, PVH entry 0x100_0010.
pub fn vmlinux() -> Vec<u8> {
    let mut tail = vec![0xaa; 0x2000];
    let notes = [note(b"GNU\0", 3, &[7; 20]), note(b"Xen\0", 18, &0x100_0010_u64.to_le_bytes())].concat();
    tail.extend_from_slice(&notes);
    let headers = [
        Ph { kind: PT_LOAD, offset: 0x1000, paddr: 0x100_0000, filesz: 0x1800, memsz: 0x1800 },
        Ph { kind: PT_LOAD, offset: 0x2800, paddr: 0x100_3000, filesz: 0x800, memsz: 0x2000 },
        Ph { kind: PT_NOTE, offset: 0x3000, paddr: 0, filesz: notes.len() as u64, memsz: 0 },
    ];
    elf64(0x100_0000, &headers, &tail)
}

/// [`vmlinux`] without its PVH note.
pub fn vmlinux_without_pvh() -> Vec<u8> {
    let mut image = vmlinux();
    put(&mut image, 64 + 2 * 56, &0_u32.to_le_bytes());
    image
}

/// A bzImage of boot protocol 2.15: one setup sector, 0x1000 bytes of 0xbb, preferred at 16 MiB, 8 MiB to unpack.
pub fn bzimage() -> Vec<u8> {
    let mut b = vec![0; 0x400];
    put(&mut b, 0x1f1, &[1]);
    put(&mut b, 0x1f4, &0x100_u32.to_le_bytes());
    put(&mut b, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut b, 0x202, b"HdrS\x0f\x02");
    put(&mut b, 0x211, &[1]);
    put(&mut b, 0x214, &0x10_0000_u32.to_le_bytes());
    put(&mut b, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut b, 0x230, &0x20_0000_u32.to_le_bytes());
    put(&mut b, 0x234, &[1, 0x15, 0x7f, 0]);
    put(&mut b, 0x238, &2047_u32.to_le_bytes());
    put(&mut b, 0x258, &0x100_0000_u64.to_le_bytes());
    put(&mut b, 0x260, &0x80_0000_u32.to_le_bytes());
    b.resize(0x400 + 0x1000, 0xbb);
    b
}
