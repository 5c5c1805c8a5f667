//! ELF kernels: what is loaded, how it is entered and what the guest is told.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use common::{
    MIB, PT_LOAD, Ph, VMLINUX, bytes_at, elf64, fill, le32, le64, load, memory, put, vmlinux,
    vmlinux_without_pvh,
};
use freestone_loader::{Entry, Format, Protocol, load_bytes};
use freestone_memory::GuestMem;

const START_INFO: u64 = 0x5000;
const ZERO_PAGE: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;

/// The memory map of a PVH start info: (start, length, kind).
fn pvh_map(mem: &GuestMem) -> Vec<(u64, u64, u32)> {
    let info = bytes_at(mem, START_INFO, 56);
    let count = usize::try_from(le32(&info, 48)).unwrap();
    let map = bytes_at(mem, le64(&info, 40), 24 * count);
    map.chunks(24).map(|e| (le64(e, 0), le64(e, 8), le32(e, 16))).collect()
}

/// The memory map of the zero page.
fn e820(mem: &GuestMem) -> Vec<(u64, u64, u32)> {
    let page = bytes_at(mem, ZERO_PAGE, 4096);
    let count = usize::from(page[0x1e8]);
    page[0x2d0..].chunks(20).take(count).map(|e| (le64(e, 0), le64(e, 8), le32(e, 16))).collect()
}

#[test]
fn kernel_with_a_pvh_note_is_entered_by_pvh() {
    let mem = memory(64 * MIB);
    let loaded = load(&mem, &vmlinux(), Protocol::Auto, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Pvh32 { entry: 0x100_0010, start_info: START_INFO });
    assert_eq!(
        (loaded.format, loaded.kernel, loaded.initrd, loaded.cmdline),
        (Format::Elf, VMLINUX, None, None)
    );
    assert_eq!(loaded.segments, [0x100_0000..0x100_1800, 0x100_3000..0x100_5000]);
}

#[test]
fn kernel_without_a_pvh_note_is_entered_by_the_linux_protocol() {
    let mem = memory(64 * MIB);
    let loaded = load(&mem, &vmlinux_without_pvh(), Protocol::Auto, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { entry: 0x100_0000, boot_params: ZERO_PAGE });
}

#[test]
fn linux_protocol_can_be_asked_for_in_spite_of_a_pvh_note() {
    let mem = memory(64 * MIB);
    let loaded = load(&mem, &vmlinux(), Protocol::Linux64, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { entry: 0x100_0000, boot_params: ZERO_PAGE });
}

#[test]
fn segments_hold_the_file_and_then_zeroes() {
    let mem = memory(64 * MIB);
    fill(&mem, 0x100_0000..0x100_6000, 0xee);
    load(&mem, &vmlinux(), Protocol::Auto, None, "").unwrap();
    assert!(bytes_at(&mem, 0x100_0000, 0x1800).iter().all(|&b| b == 0xaa));
    assert!(bytes_at(&mem, 0x100_1800, 0x1800).iter().all(|&b| b == 0xee), "between segments");
    assert!(bytes_at(&mem, 0x100_3000, 0x800).iter().all(|&b| b == 0xaa));
    assert!(bytes_at(&mem, 0x100_3800, 0x1800).iter().all(|&b| b == 0));
    assert!(bytes_at(&mem, 0x100_5000, 0x1000).iter().all(|&b| b == 0xee), "after the kernel");
}

#[test]
fn large_zeroed_tail_is_cleared_to_its_end() {
    let mem = memory(64 * MIB);
    fill(&mem, 0x20_0000..0x60_0000, 0xee);
    let ph = Ph { kind: PT_LOAD, offset: 0x1000, paddr: 0x20_0000, filesz: 16, memsz: 0x30_0001 };
    load(&mem, &elf64(0x20_0000, &[ph], &[0xaa; 16]), Protocol::Auto, None, "").unwrap();
    assert!(bytes_at(&mem, 0x20_0010, 0x2f_fff1).iter().all(|&b| b == 0));
    assert_eq!(bytes_at(&mem, 0x50_0000, 3), [0, 0xee, 0xee]);
}

#[test]
fn image_in_memory_loads_like_a_file() {
    let (one, other) = (memory(64 * MIB), memory(64 * MIB));
    let from_bytes = load_bytes(&one, &vmlinux(), "a=b", Some(0xe_0000)).unwrap();
    let from_file = load(&other, &vmlinux(), Protocol::Auto, None, "a=b").unwrap();
    assert_eq!(from_bytes, from_file);
    assert_eq!(bytes_at(&one, 0, 0x3_0000), bytes_at(&other, 0, 0x3_0000));
    assert_eq!(bytes_at(&one, VMLINUX.start, 0x5000), bytes_at(&other, VMLINUX.start, 0x5000));
}

#[test]
fn elf_of_32_bits_starts_by_pvh() {
    let mem = memory(64 * MIB);
    let loaded = load(&mem, &elf32(), Protocol::Auto, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Pvh32 { entry: 0x20_0004, start_info: START_INFO });
    assert_eq!(bytes_at(&mem, 0x20_0000, 16), [0xcc; 16]);
}

#[test]
fn elf_of_32_bits_without_a_pvh_note_starts_by_the_32_bit_linux_protocol() {
    let mut image = elf32();
    put(&mut image, 52 + 32, &0_u32.to_le_bytes());
    let mem = memory(64 * MIB);
    for protocol in [Protocol::Auto, Protocol::Linux32] {
        let loaded = load(&mem, &image, protocol, None, "quiet").unwrap();
        assert_eq!(loaded.entry, Entry::Linux32 { entry: 0x20_0000, boot_params: ZERO_PAGE });
    }
    let page = bytes_at(&mem, ZERO_PAGE, 4096);
    assert_eq!(page[0x236..0x238], [0, 0], "xloadflags");
    let message = common::refusal(load(&mem, &image, Protocol::Linux64, None, ""));
    assert!(message.contains("has no 64-bit entry point"), "{message}");
}

#[test]
fn elf_of_64_bits_is_not_entered_in_32_bit_mode() {
    let message = common::refusal(load(&memory(64 * MIB), &vmlinux(), Protocol::Linux32, None, ""));
    assert!(message.ends_with("the entry point of a 64-bit ELF file is in 64-bit code"), "{message}");
}

/// A 32-bit ELF file with one segment of 16 bytes at 2 MiB and a PVH note for 0x20_0004.
fn elf32() -> Vec<u8> {
    let mut b = vec![0; 0x200];
    put(&mut b, 0, b"\x7fELF\x01\x01\x01");
    put(&mut b, 16, &[2, 0, 3, 0, 1]);
    put(&mut b, 24, &0x20_0000_u32.to_le_bytes());
    put(&mut b, 28, &52_u32.to_le_bytes());
    put(&mut b, 40, &[52, 0, 32, 0, 2]);
    let note = common::note(b"Xen\0", 18, &0x20_0004_u32.to_le_bytes());
    let headers = [[1, 0x100, 0, 0x20_0000, 16, 16, 5, 4], [4, 0x110, 0, 0, 20, 20, 4, 4]];
    for (i, value) in headers.concat().into_iter().enumerate() {
        put(&mut b, 52 + 4 * i, &u32::to_le_bytes(value));
    }
    put(&mut b, 0x100, &[0xcc; 16]);
    put(&mut b, 0x110, &note);
    b
}

#[test]
fn pvh_start_info_names_everything() {
    let mem = memory(64 * MIB);
    let initrd = vec![0x77; 0x1234];
    let loaded = load(&mem, &vmlinux(), Protocol::Pvh, Some(&initrd), "console=ttyS0").unwrap();
    let info = bytes_at(&mem, START_INFO, 56);
    assert_eq!((le32(&info, 0), le32(&info, 4), le32(&info, 8)), (0x336e_c578, 1, 0));
    assert_eq!(le64(&info, 24), CMDLINE);
    assert_eq!(le64(&info, 32), 0xe_0000);
    assert_eq!(bytes_at(&mem, CMDLINE, 14), b"console=ttyS0\0");
    assert_eq!(loaded.cmdline, Some(CMDLINE..CMDLINE + 14));

    let range = loaded.initrd.unwrap();
    assert_eq!(le32(&info, 12), 1);
    let module = bytes_at(&mem, le64(&info, 16), 32);
    assert_eq!((le64(&module, 0), le64(&module, 8)), (range.start, 0x1234));
    assert_eq!((le64(&module, 16), le64(&module, 24)), (0, 0));
    assert_eq!(bytes_at(&mem, range.start, 0x1234), initrd);
}

#[test]
fn pvh_start_info_without_initrd_and_cmdline_has_zeroes() {
    let mem = memory(64 * MIB);
    load_bytes(&mem, &vmlinux(), "", None).unwrap();
    let info = bytes_at(&mem, START_INFO, 56);
    assert_eq!((le32(&info, 12), le64(&info, 16), le64(&info, 24), le64(&info, 32)), (0, 0, 0, 0));
}

#[test]
fn boot_params_name_everything() {
    let mem = memory(64 * MIB);
    let loaded = load(&mem, &vmlinux(), Protocol::Linux64, Some(&[1, 2, 3]), "quiet").unwrap();
    let page = bytes_at(&mem, ZERO_PAGE, 4096);
    assert_eq!(page[0x1fe..0x200], [0x55, 0xaa]);
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(page[0x210], 0xff, "type_of_loader");
    assert_eq!(page[0x1ef], 0, "sentinel");
    assert_eq!(u64::from(le32(&page, 0x228)), CMDLINE);
    let range = loaded.initrd.unwrap();
    assert_eq!((u64::from(le32(&page, 0x218)), le32(&page, 0x21c)), (range.start, 3));
    assert_eq!(le64(&page, 0x70), 0xe_0000, "acpi_rsdp_addr");
}

#[test]
fn memory_map_of_64_mib() {
    let mem = memory(64 * MIB);
    load(&mem, &vmlinux(), Protocol::Pvh, None, "").unwrap();
    load(&mem, &vmlinux(), Protocol::Linux64, None, "").unwrap();
    let expected = [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (MIB, 63 * MIB, 1), (0xfeff_c000, 0x4000, 2)];
    assert_eq!(pvh_map(&mem), expected);
    assert_eq!(e820(&mem), expected);
}

#[test]
fn memory_map_of_3_gib_ends_at_the_hole() {
    let mem = memory(3 << 30);
    load(&mem, &vmlinux(), Protocol::Pvh, None, "").unwrap();
    load(&mem, &vmlinux(), Protocol::Linux64, None, "").unwrap();
    let ram: Vec<_> = e820(&mem).into_iter().filter(|e| e.2 == 1).collect();
    assert_eq!(ram, [(0, 0x9_fc00, 1), (MIB, (3 << 30) - MIB, 1)]);
    assert_eq!(pvh_map(&mem), e820(&mem));
}

#[test]
fn memory_map_of_5_gib_goes_on_at_4_gib() {
    let mem = memory(5 << 30);
    load(&mem, &vmlinux(), Protocol::Pvh, None, "").unwrap();
    load(&mem, &vmlinux(), Protocol::Linux64, None, "").unwrap();
    let ram: Vec<_> = e820(&mem).into_iter().filter(|e| e.2 == 1).collect();
    assert_eq!(ram, [(0, 0x9_fc00, 1), (MIB, (3 << 30) - MIB, 1), (4 << 30, 2 << 30, 1)]);
    assert_eq!(pvh_map(&mem), e820(&mem));
}

#[test]
fn initrd_is_at_the_top_of_small_memory() {
    let mem = memory(64 * MIB);
    let loaded = load(&mem, &vmlinux(), Protocol::Pvh, Some(&[1; 0x1001]), "").unwrap();
    assert_eq!(loaded.initrd, Some(64 * MIB - 0x2000..64 * MIB - 0x2000 + 0x1001));
}

#[test]
fn initrd_is_below_the_32_bit_hole_of_large_memory() {
    let mem = memory(5 << 30);
    let loaded = load(&mem, &vmlinux(), Protocol::Pvh, Some(&[1; 0x1000]), "").unwrap();
    assert_eq!(loaded.initrd, Some(0xbfff_f000..0xc000_0000));
}

#[test]
fn initrd_goes_below_a_kernel_that_reaches_the_end_of_memory() {
    let mem = memory(32 * MIB);
    let ph = Ph { kind: PT_LOAD, offset: 0x1000, paddr: 16 * MIB, filesz: 16, memsz: 16 * MIB };
    let image = elf64(16 * MIB, &[ph], &[0xaa; 16]);
    let loaded = load(&mem, &image, Protocol::Auto, Some(&[1; 0x1000]), "").unwrap();
    assert_eq!(loaded.initrd, Some(16 * MIB - 0x1000..16 * MIB));
}

#[test]
fn linux_takes_2047_bytes_of_command_line_and_other_pvh_guests_more() {
    let mem = memory(64 * MIB);
    let long = "x".repeat(2048);
    let message = common::refusal(load(&mem, &vmlinux(), Protocol::Linux64, None, &long));
    assert_eq!(message, "kernel command line of 2048 bytes is too long: kernel \"k\" takes at most 2047");
    load(&mem, &vmlinux(), Protocol::Linux64, None, &long[1..]).unwrap();
    load(&mem, &vmlinux(), Protocol::Pvh, None, &long).unwrap();
}

#[test]
fn linux_is_recognised_by_its_pvh_notes() {
    let mut image = vmlinux();
    let notes =
        [common::note(b"Xen\0", 6, b"linux\0"), common::note(b"Xen\0", 18, &0x100_0010_u64.to_le_bytes())]
            .concat();
    image.truncate(0x3000);
    image.extend_from_slice(&notes);
    put(&mut image, 64 + 2 * 56 + 32, &(notes.len() as u64).to_le_bytes());
    let message = common::refusal(load(&memory(64 * MIB), &image, Protocol::Pvh, None, &"x".repeat(2048)));
    assert!(message.ends_with("takes at most 2047"), "{message}");
}
