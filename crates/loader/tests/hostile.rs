//! Files that are broken, or made to break the loader.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::fs::File;

use common::{
    MIB, PT_LOAD, PT_NOTE, Ph, bytes_at, bzimage, elf64, fill, load, memory, note, put, refusal, vmlinux,
    vmlinux_without_pvh,
};
use freestone_loader::{BootSource, Loaded, Protocol, Result, load_bytes};
use freestone_memory::GuestMem;
use proptest::prelude::*;

fn try_load(image: &[u8]) -> Result<Loaded> {
    load(&memory(64 * MIB), image, Protocol::Auto, None, "")
}

fn one_segment(ph: Ph) -> String {
    refusal(try_load(&elf64(ph.paddr, &[ph], &[0xaa; 0x1000])))
}

const SEGMENT: Ph = Ph { kind: PT_LOAD, offset: 0x1000, paddr: 0x100_0000, filesz: 0x1000, memsz: 0x1000 };

#[test]
fn file_that_is_no_kernel_is_refused_with_its_first_bytes() {
    assert_eq!(
        refusal(try_load(b"\x7fELG....")),
        "kernel \"k\": not an ELF or bzImage file (starts with 7f 45 4c 47 ..)"
    );
    assert_eq!(refusal(try_load(b"#")), "kernel \"k\": not an ELF or bzImage file (starts with 23)");
}

#[test]
fn compressed_kernel_is_refused_with_advice() {
    assert_eq!(
        refusal(try_load(b"\x1f\x8b\x08\x00\x00")),
        "kernel \"k\": not an ELF or bzImage file (starts with 1f 8b 08 00 ..): it is gzip-compressed, unpack it first"
    );
}

#[test]
fn empty_kernel_and_empty_initrd_are_refused() {
    assert_eq!(refusal(try_load(b"")), "kernel \"k\": the file is empty");
    let result = load(&memory(64 * MIB), &vmlinux(), Protocol::Auto, Some(b""), "");
    assert_eq!(refusal(result), "initrd \"i\": the file is empty");
}

#[test]
fn directory_or_device_in_place_of_a_kernel_is_refused() {
    for path in ["/", "/dev/zero"] {
        let mut kernel = File::open(path).unwrap();
        let mut source = BootSource {
            kernel: &mut kernel,
            kernel_name: path,
            protocol: Protocol::Auto,
            initrd: None,
            cmdline: "",
            rsdp: None,
        };
        let message = refusal(freestone_loader::load(&memory(MIB), &mut source));
        assert_eq!(message, format!("kernel {path:?}: not a regular file or block device"));
    }
}

#[test]
fn elf_cut_off_at_any_byte_is_refused() {
    let image = vmlinux();
    for len in (0..0x400).chain(0x2f00..image.len()) {
        let message = refusal(load_bytes(&memory(64 * MIB), &image[..len], "", None));
        let expected = ["truncated", "not an ELF", "empty"];
        assert!(expected.iter().any(|e| message.contains(e)), "{len:#x}: {message}");
    }
}

#[test]
fn bzimage_cut_off_at_any_byte_is_refused() {
    let image = bzimage();
    for len in 0..image.len() {
        let message = refusal(load_bytes(&memory(64 * MIB), &image[..len], "", None));
        let expected = ["truncated", "not an ELF", "empty"];
        assert!(expected.iter().any(|e| message.contains(e)), "{len:#x}: {message}");
    }
}

#[test]
fn segment_below_1_mib_is_refused() {
    assert_eq!(
        one_segment(Ph { paddr: 0x7000, ..SEGMENT }),
        "kernel \"k\": segment of 0x1000 bytes at 0x7000 lies below 1 MiB, where the boot data is"
    );
    assert!(one_segment(Ph { paddr: MIB - 1, ..SEGMENT }).contains("below 1 MiB"));
}

#[test]
fn segment_outside_of_ram_is_refused() {
    assert_eq!(
        one_segment(Ph { paddr: 64 * MIB - 0xfff, ..SEGMENT }),
        "kernel \"k\": segment needs memory at 0x3fff001..0x4000001, but guest RAM below 4 GiB ends at 0x4000000: \
         give the guest more memory"
    );
    assert!(one_segment(Ph { paddr: 1 << 40, ..SEGMENT }).contains("give the guest more memory"));
}

#[test]
fn segment_that_wraps_is_refused() {
    assert!(
        one_segment(Ph { paddr: u64::MAX - 0xff, ..SEGMENT }).ends_with("wraps around the address space")
    );
    assert!(one_segment(Ph { memsz: u64::MAX, ..SEGMENT }).ends_with("wraps around the address space"));
}

#[test]
fn segment_of_huge_length_is_refused() {
    assert!(one_segment(Ph { memsz: 1 << 50, ..SEGMENT }).ends_with("give the guest more memory"));
    assert!(one_segment(Ph { filesz: u64::MAX, memsz: u64::MAX, ..SEGMENT }).contains("truncated"));
    assert!(one_segment(Ph { filesz: 1 << 50, memsz: 1 << 50, ..SEGMENT }).contains("truncated"));
    assert!(one_segment(Ph { offset: u64::MAX, ..SEGMENT }).contains("truncated"));
}

#[test]
fn segment_larger_in_the_file_than_in_memory_is_refused() {
    assert!(one_segment(Ph { memsz: 0xfff, ..SEGMENT }).ends_with("is larger in the file than in memory"));
}

#[test]
fn overlapping_segments_are_refused_in_either_order() {
    let low = Ph { memsz: 0x1001, ..SEGMENT };
    let high = Ph { paddr: SEGMENT.paddr + 0x1000, ..SEGMENT };
    for headers in [[low, high], [high, low]] {
        let message = refusal(try_load(&elf64(SEGMENT.paddr, &headers, &[0xaa; 0x1000])));
        assert!(message.ends_with("at 0x1001000 overlaps another segment"), "{message}");
    }
    try_load(&elf64(SEGMENT.paddr, &[high, SEGMENT], &[0xaa; 0x1000])).unwrap();
}

#[test]
fn entry_outside_of_the_file_contents_is_refused() {
    let ph = Ph { memsz: 0x2000, ..SEGMENT };
    for entry in [0, 0xff_ffff, 0x100_1000, u64::MAX] {
        let message = refusal(try_load(&elf64(entry, &[ph], &[0xaa; 0x1000])));
        assert_eq!(
            message,
            format!("kernel \"k\": entry point {entry:#x} is outside of the loaded segments")
        );
    }
}

#[test]
fn elf_with_nothing_to_load_is_refused() {
    assert_eq!(
        refusal(try_load(&elf64(0x100_0000, &[], &[]))),
        "kernel \"k\": the ELF file has no segment to load"
    );
}

#[test]
fn too_many_program_headers_are_refused() {
    let mut image = vmlinux();
    put(&mut image, 56, &0xffff_u16.to_le_bytes());
    assert_eq!(
        refusal(try_load(&image)),
        "kernel \"k\": program header count 0xffff is over the limit of 128"
    );
}

#[test]
fn elf_of_another_kind_is_refused() {
    for (at, value, expected) in [
        (4, 3_u16, "ELF class 0x3 is neither 32-bit nor 64-bit"),
        (5, 0x102, "ELF data encoding 0x2 is not little-endian"),
        (16, 1, "ELF type 0x1 is not an executable"),
        (18, 183, "ELF machine 0xb7 is not an x86 processor"),
        (54, 32, "program header size 0x20 is wrong for the ELF class"),
    ] {
        let mut image = vmlinux();
        put(&mut image, at, &value.to_le_bytes()[..if at == 4 { 1 } else { 2 }]);
        assert_eq!(refusal(try_load(&image)), format!("kernel \"k\": {expected}"));
    }
}

/// A kernel with these notes.
fn with_notes(notes: &[u8], len: u64) -> Vec<u8> {
    let note = Ph { kind: PT_NOTE, offset: 0x2000, paddr: 0, filesz: len, memsz: len };
    let mut tail = vec![0xaa; 0x1000];
    tail.extend_from_slice(notes);
    elf64(SEGMENT.paddr, &[SEGMENT, note], &tail)
}

#[test]
fn note_with_lengths_beyond_its_segment_ends_the_search() {
    let good = note(b"Xen\0", 18, &0x100_0000_u32.to_le_bytes());
    for (name_len, desc_len) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX), (1000, 0), (0, 1000)] {
        let mut bad = note(b"GNU\0", 1, &[]);
        put(&mut bad, 0, &name_len.to_le_bytes());
        put(&mut bad, 4, &desc_len.to_le_bytes());
        let notes = [bad, good.clone()].concat();
        let loaded = try_load(&with_notes(&notes, notes.len() as u64)).unwrap();
        assert!(matches!(loaded.entry, freestone_loader::Entry::Linux64 { .. }));
    }
}

#[test]
fn pvh_note_with_a_bad_entry_is_refused() {
    let refused = |desc: &[u8]| {
        let notes = note(b"Xen\0", 18, desc);
        refusal(try_load(&with_notes(&notes, notes.len() as u64)))
    };
    assert!(refused(&[0, 0]).ends_with("PVH note length 0x2 is neither 4 nor 8 bytes"));
    assert!(
        refused(&(1_u64 << 32).to_le_bytes())
            .ends_with("PVH entry point 0x100000000 is not a 32-bit address")
    );
    assert!(refused(&0xff_ffff_u32.to_le_bytes()).ends_with("is outside of the loaded segments"));
}

#[test]
fn huge_note_segment_is_refused() {
    let mut image = with_notes(&[], 0x1_0001);
    image.resize(0x2_0000, 0);
    assert!(
        refusal(try_load(&image)).ends_with("note segment length 0x10001 is over the limit of 65536 bytes")
    );
}

#[test]
fn pvh_without_a_note_is_refused_with_advice() {
    let result = load(&memory(64 * MIB), &vmlinux_without_pvh(), Protocol::Pvh, None, "");
    assert!(refusal(result).contains("start it by the Linux boot protocol"));
}

#[test]
fn bzimage_fields_out_of_range_are_refused() {
    for (at, value, expected) in [
        (0x1f4, u32::MAX, "truncated: the compressed kernel ends at offset"),
        (0x1fe, 0, "boot flag 0x0 is not 0xaa55"),
        (0x211, 0, "loadflags 0x0 are those of a zImage"),
        (0x258, 0x7000, "below 1 MiB"),
        (0x25c, 1, "give the guest more memory"),
        (0x25c, u32::MAX, "give the guest more memory"),
        (0x260, u32::MAX, "give the guest more memory"),
    ] {
        let mut image = bzimage();
        let width = if at == 0x1fe { 2 } else { 4 };
        put(&mut image, at, &value.to_le_bytes()[..width]);
        let message = refusal(try_load(&image));
        assert!(message.contains(expected), "{at:#x}: {message}");
    }
}

#[test]
fn bzimage_whose_header_ends_early_is_refused() {
    let mut image = bzimage();
    put(&mut image, 0x201, &[0x10]);
    assert!(refusal(try_load(&image)).ends_with("setup header end 0x212 cuts the header before init_size"));
}

#[test]
fn bzimage_with_nothing_behind_its_setup_is_refused() {
    let mut image = bzimage();
    put(&mut image, 0x1f4, &0_u32.to_le_bytes());
    image.truncate(0x400 + 0x200);
    assert!(refusal(try_load(&image)).ends_with("leaves no room for the entry point"));
}

#[test]
fn initrd_limit_of_0_leaves_no_place() {
    let mut image = bzimage();
    put(&mut image, 0x22c, &[0; 4]);
    let message = refusal(load(&memory(64 * MIB), &image, Protocol::Auto, Some(&[1]), ""));
    assert!(
        message.starts_with("initrd \"i\" of 1 bytes does not fit below 0x1 beside the kernel"),
        "{message}"
    );
}

#[test]
fn nul_in_the_command_line_is_refused() {
    let result = load(&memory(64 * MIB), &vmlinux(), Protocol::Auto, None, "ab\0c");
    assert_eq!(refusal(result), "kernel command line has a NUL byte at offset 2");
}

#[test]
fn memory_without_room_for_boot_data_is_refused() {
    for size in [0x1000, 0x5000, 0x10_0000] {
        assert!(load(&memory(size), &vmlinux(), Protocol::Auto, None, "").is_err());
    }
}

#[test]
fn refused_files_leave_guest_memory_as_it_was() {
    let mem = memory(20 * MIB);
    let mut image = bzimage();
    put(&mut image, 0x260, &0x40_0001_u32.to_le_bytes());
    load(&mem, &image, Protocol::Auto, Some(&[1; 0x1000]), "quiet").unwrap_err();
    let result = load(&mem, &vmlinux(), Protocol::Auto, Some(&vec![1; 20 << 20]), "quiet");
    assert!(refusal(result).starts_with("initrd"));
    assert!(bytes_at(&mem, 0, 20 << 20) == vec![0; 20 << 20]);
}

/// Loads an image and sees that whatever happens, only the loader's own ranges are written.
fn load_keeps_to_its_ranges(
    mem: &GuestMem,
    image: &[u8],
    protocol: Protocol,
) -> std::result::Result<(), TestCaseError> {
    // Boot data that is not the loader's: page tables and GDT, the BIOS area with the ACPI tables.
    let foreign = [0..0x5000, 0x6000..0x7000, 0x8000..0x2_0000, 0x3_0000..0x3_1000, 0xe_0000..0x10_0000];
    for range in &foreign {
        fill(mem, range.clone(), 0xe1);
    }
    let initrd = [0x77; 0x1800];
    let result = load(mem, image, protocol, Some(&initrd), "console=ttyS0");
    for range in &foreign {
        let bytes = bytes_at(mem, range.start, usize::try_from(range.end - range.start).unwrap());
        prop_assert!(bytes == vec![0xe1; bytes.len()], "boot data at {range:x?} was overwritten");
    }
    let Ok(loaded) = result else { return Ok(()) };
    let top = mem.size();
    let initrd_range = loaded.initrd.clone().unwrap();
    prop_assert!(loaded.kernel.start >= MIB && loaded.kernel.end <= top);
    prop_assert!(initrd_range.start >= MIB && initrd_range.end <= top);
    prop_assert!(initrd_range.end <= loaded.kernel.start || initrd_range.start >= loaded.kernel.end);
    prop_assert_eq!(bytes_at(mem, initrd_range.start, initrd.len()), initrd.to_vec());
    for segment in &loaded.segments {
        prop_assert!(segment.start >= loaded.kernel.start && segment.end <= loaded.kernel.end);
    }
    Ok(())
}

/// Changes to make to an image: offset within its headers and new bytes.
fn mutations(headers: std::ops::Range<usize>) -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let interesting = prop_oneof![
        any::<u8>().prop_map(|b| vec![b]),
        any::<[u8; 2]>().prop_map(|b| b.to_vec()),
        any::<u32>().prop_map(|n| n.to_le_bytes().to_vec()),
        prop_oneof![Just(0), Just(u64::MAX), Just(1 << 32), Just(0x7000), 0..(64 * MIB), any::<u64>()]
            .prop_map(|n| n.to_le_bytes().to_vec()),
    ];
    prop::collection::vec((headers, interesting), 1..4)
}

fn mutate(image: &mut Vec<u8>, changes: &[(usize, Vec<u8>)], cut: Option<usize>) {
    for (at, bytes) in changes {
        let end = (at + bytes.len()).min(image.len());
        image[*at..end].copy_from_slice(&bytes[..end - at]);
    }
    if let Some(len) = cut {
        image.truncate(len);
    }
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Auto), Just(Protocol::Pvh), Just(Protocol::Linux64), Just(Protocol::Linux32)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_elf_is_loaded_within_bounds_or_refused(
        changes in mutations(0..64 + 3 * 56),
        cut in prop::option::weighted(0.1, 0_usize..0x3040),
        protocol in protocol(),
    ) {
        let mut image = vmlinux();
        mutate(&mut image, &changes, cut);
        load_keeps_to_its_ranges(&memory(64 * MIB), &image, protocol)?;
    }

    #[test]
    fn changed_notes_are_read_within_bounds_or_refused(changes in mutations(0x3000..vmlinux().len()), protocol in protocol()) {
        let mut image = vmlinux();
        mutate(&mut image, &changes, None);
        load_keeps_to_its_ranges(&memory(64 * MIB), &image, protocol)?;
    }

    #[test]
    fn changed_bzimage_is_loaded_within_bounds_or_refused(
        changes in mutations(0x1f1..0x270),
        cut in prop::option::weighted(0.1, 0_usize..0x1400),
        protocol in protocol(),
    ) {
        let mut image = bzimage();
        mutate(&mut image, &changes, cut);
        load_keeps_to_its_ranges(&memory(64 * MIB), &image, protocol)?;
    }

    #[test]
    fn any_bytes_are_loaded_within_bounds_or_refused(
        head in prop_oneof![Just(&b""[..]), Just(&b"\x7fELF\x02\x01"[..]), Just(&b"\x7fELF\x01\x01"[..])],
        rest in prop::collection::vec(any::<u8>(), 0..512),
    ) {
        let image = [head, &rest].concat();
        load_keeps_to_its_ranges(&memory(64 * MIB), &image, Protocol::Auto)?;
    }
}
