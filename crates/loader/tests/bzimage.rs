//! bzImage kernels.

mod common;

use common::{MIB, bytes_at, bzimage, le32, le64, load, memory, put, refusal};
use freestone_loader::{Entry, Format, Protocol};

const ZERO_PAGE: u64 = 0x7000;

#[test]
fn relocatable_kernel_is_loaded_at_its_preferred_address() {
    let mem = memory(64 * MIB);
    let loaded = load(&mem, &bzimage(), Protocol::Auto, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { entry: 0x100_0200, boot_params: ZERO_PAGE });
    assert_eq!(loaded.format, Format::BzImage);
    assert!(bytes_at(&mem, 16 * MIB, 0x1000).iter().all(|&b| b == 0xbb));
    assert_eq!(bytes_at(&mem, 16 * MIB + 0x1000, 16), [0; 16]);
    assert_eq!(u64::from(le32(&bytes_at(&mem, ZERO_PAGE, 4096), 0x214)), 16 * MIB, "code32_start");
}

#[test]
fn kernel_that_cannot_be_relocated_is_loaded_at_code32_start() {
    let mut image = bzimage();
    put(&mut image, 0x234, &[0]);
    let loaded = load(&memory(64 * MIB), &image, Protocol::Auto, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Linux64 { entry: MIB + 0x200, boot_params: ZERO_PAGE });
    assert_eq!(loaded.kernel, MIB..0x180_0000, "with the room it unpacks itself to");
}

#[test]
fn setup_header_is_handed_on_with_our_fields_set() {
    let mut image = bzimage();
    put(&mut image, 0x250, &0xdead_beef_u64.to_le_bytes());
    put(&mut image, 0x218, &[0xff; 8]);
    let mem = memory(64 * MIB);
    load(&mem, &image, Protocol::Auto, None, "quiet").unwrap();
    let page = bytes_at(&mem, ZERO_PAGE, 4096);
    assert_eq!(page[0x22c..0x250], image[0x22c..0x250]);
    assert_eq!(page[0x258..0x264], image[0x258..0x264]);
    assert_eq!(le64(&page, 0x250), 0, "setup_data is not the file's to say");
    assert_eq!(le64(&page, 0x218), 0, "there is no initrd");
    assert_eq!(page[0x210], 0xff, "type_of_loader");
    assert_eq!(page[0x211] & 1, 1, "LOADED_HIGH");
    assert_eq!(le32(&page, 0x228), 0x2_0000, "cmd_line_ptr");
    assert!(page[..0x70].iter().all(|&b| b == 0));
}

#[test]
fn setup_sects_of_0_means_4() {
    let mut image = bzimage();
    put(&mut image, 0x1f1, &[0]);
    image.splice(0x400..0x400, vec![0; 3 * 512]);
    let mem = memory(64 * MIB);
    load(&mem, &image, Protocol::Auto, None, "").unwrap();
    assert!(bytes_at(&mem, 16 * MIB, 0x1000).iter().all(|&b| b == 0xbb));
}

#[test]
fn kernel_memory_includes_the_room_to_unpack() {
    let loaded = load(&memory(64 * MIB), &bzimage(), Protocol::Auto, None, "").unwrap();
    assert_eq!(loaded.kernel, 0x100_0000..0x180_0000);
}

#[test]
fn memory_without_room_to_unpack_is_refused() {
    let message = refusal(load(&memory(20 * MIB), &bzimage(), Protocol::Auto, None, ""));
    assert_eq!(
        message,
        "kernel \"k\": unpacked kernel needs memory at 0x1000000..0x1800000, but guest RAM below 4 GiB ends at \
         0x1400000: give the guest more memory"
    );
}

#[test]
fn initrd_respects_the_kernels_limit() {
    let mut image = bzimage();
    put(&mut image, 0x22c, &0x37ff_ffff_u32.to_le_bytes());
    let loaded = load(&memory(2 << 30), &image, Protocol::Auto, Some(&[9; 0x2000]), "").unwrap();
    assert_eq!(loaded.initrd, Some(0x37ff_e000..0x3800_0000));
}

#[test]
fn initrd_goes_below_a_kernel_that_leaves_no_room_above() {
    let loaded = load(&memory(24 * MIB), &bzimage(), Protocol::Auto, Some(&[9; 0x2000]), "").unwrap();
    assert_eq!(loaded.initrd, Some(16 * MIB - 0x2000..16 * MIB));
}

#[test]
fn initrd_that_does_not_fit_is_refused_by_name_and_size() {
    let initrd = vec![1; 41 << 20];
    let message = refusal(load(&memory(64 * MIB), &bzimage(), Protocol::Auto, Some(&initrd), ""));
    assert_eq!(
        message,
        "initrd \"i\" of 41 MiB does not fit below 0x4000000 beside the kernel: give the guest more memory"
    );
}

#[test]
fn command_line_limit_is_the_kernels() {
    let mut image = bzimage();
    put(&mut image, 0x238, &7_u32.to_le_bytes());
    let mem = memory(64 * MIB);
    load(&mem, &image, Protocol::Auto, None, "1234567").unwrap();
    let message = refusal(load(&mem, &image, Protocol::Auto, None, "12345678"));
    assert_eq!(message, "kernel command line of 8 bytes is too long: kernel \"k\" takes at most 7");
}

#[test]
fn command_line_limit_of_the_kernel_does_not_exceed_our_room() {
    let mut image = bzimage();
    put(&mut image, 0x238, &u32::MAX.to_le_bytes());
    let message = refusal(load(&memory(64 * MIB), &image, Protocol::Auto, None, &"x".repeat(0x1_0000)));
    assert!(message.ends_with("takes at most 65535"), "{message}");
}

#[test]
fn pvh_of_a_bzimage_is_refused_with_advice() {
    let message = refusal(load(&memory(64 * MIB), &bzimage(), Protocol::Pvh, None, ""));
    assert!(message.contains("use the uncompressed kernel"), "{message}");
}

/// [`bzimage`] as a 32-bit kernel has it: `xloadflags` without `XLF_KERNEL_64`.
fn i386() -> Vec<u8> {
    let mut image = bzimage();
    put(&mut image, 0x236, &[0, 0]);
    image
}

/// [`bzimage`] as a kernel of boot protocol 2.11 has it, where the place of `xloadflags` has no meaning.
fn before_xloadflags() -> Vec<u8> {
    let mut image = bzimage();
    put(&mut image, 0x206, &[0x0b, 2]);
    image
}

#[test]
fn kernel_without_a_64_bit_entry_is_entered_in_32_bit_mode_at_its_first_byte() {
    for image in [i386(), before_xloadflags()] {
        let mem = memory(64 * MIB);
        let loaded = load(&mem, &image, Protocol::Auto, None, "quiet").unwrap();
        assert_eq!(loaded.entry, Entry::Linux32 { entry: 0x100_0000, boot_params: ZERO_PAGE });
        assert_eq!(loaded.kernel, 0x100_0000..0x180_0000);
        let page = bytes_at(&mem, ZERO_PAGE, 4096);
        assert_eq!(u64::from(le32(&page, 0x214)), 16 * MIB, "code32_start");
        assert_eq!(le32(&page, 0x228), 0x2_0000, "cmd_line_ptr");
        assert_eq!(le64(&page, 0x70), 0xe_0000, "acpi_rsdp_addr");
    }
}

#[test]
fn kernel_with_both_entries_is_entered_in_32_bit_mode_when_asked() {
    let loaded = load(&memory(64 * MIB), &bzimage(), Protocol::Linux32, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Linux32 { entry: 0x100_0000, boot_params: ZERO_PAGE });
}

#[test]
fn kernel_of_32_bits_that_cannot_be_relocated_is_entered_at_code32_start() {
    let mut image = i386();
    put(&mut image, 0x234, &[0]);
    let loaded = load(&memory(64 * MIB), &image, Protocol::Auto, None, "").unwrap();
    assert_eq!(loaded.entry, Entry::Linux32 { entry: MIB, boot_params: ZERO_PAGE });
}

#[test]
fn kernel_without_a_64_bit_entry_is_refused_in_64_bit_mode() {
    let message = refusal(load(&memory(64 * MIB), &before_xloadflags(), Protocol::Linux64, None, ""));
    assert_eq!(
        message,
        "kernel \"k\": boot protocol version 0x20b is before 0x20c and has no 64-bit entry point: \
         use the 32-bit Linux protocol"
    );
    let message = refusal(load(&memory(64 * MIB), &i386(), Protocol::Linux64, None, ""));
    assert_eq!(
        message,
        "kernel \"k\": xloadflags 0x0 offer no 64-bit entry point: use the 32-bit Linux protocol"
    );
}

#[test]
fn kernel_that_does_not_say_how_much_memory_it_needs_is_refused() {
    let mut old = bzimage();
    put(&mut old, 0x206, &[0x09, 2]);
    for protocol in [Protocol::Auto, Protocol::Linux32, Protocol::Linux64] {
        assert_eq!(
            refusal(load(&memory(64 * MIB), &old, protocol, None, "")),
            "kernel \"k\": boot protocol version 0x209 is before 0x20a and does not say how much memory the kernel needs"
        );
    }
}
