//! Flat binaries.

mod common;

use common::{MIB, bytes_at, memory, refusal};
use freestone_loader::{Entry, FlatMode, Format, load_flat};

#[test]
fn real_mode_code_in_the_first_64_kib_has_segment_0() {
    let mem = memory(MIB);
    let loaded = load_flat(&mem, &[0xf4; 512], 0x7c00, FlatMode::Real16).unwrap();
    assert_eq!(loaded.entry, Entry::Real16 { segment: 0, offset: 0x7c00 });
    assert_eq!((loaded.format, loaded.kernel), (Format::Flat, 0x7c00..0x7e00));
    assert_eq!(bytes_at(&mem, 0x7c00, 512), [0xf4; 512]);
}

#[test]
fn real_mode_code_above_64_kib_has_its_own_segment() {
    let entry = |at| load_flat(&memory(MIB), &[0xf4; 16], at, FlatMode::Real16).unwrap().entry;
    assert_eq!(entry(0x1_0000), Entry::Real16 { segment: 0x1000, offset: 0 });
    assert_eq!(entry(0xffff), Entry::Real16 { segment: 0xfff, offset: 0xf });
}

#[test]
fn real_mode_code_must_be_below_1_mib() {
    let message = refusal(load_flat(&memory(2 * MIB), &[0xf4; 17], MIB - 16, FlatMode::Real16));
    assert_eq!(message, "flat binary of 0x11 bytes at 0xffff0 does not lie below 1 MiB, as real mode needs");
}

#[test]
fn protected_and_long_mode_code_starts_at_its_first_byte() {
    let mem = memory(2 * MIB);
    let entry = |mode| load_flat(&mem, &[0xf4], MIB, mode).unwrap().entry;
    assert_eq!(entry(FlatMode::Protected32), Entry::Flat32 { entry: MIB });
    assert_eq!(entry(FlatMode::Long64), Entry::Flat64 { entry: MIB });
}

#[test]
fn protected_and_long_mode_code_may_not_touch_the_boot_data() {
    let mem = memory(2 * MIB);
    for (at, len) in [(0x500, 1), (0x400, 0x101), (0x1_ffff, 2), (0, 0x10_0000)] {
        for mode in [FlatMode::Protected32, FlatMode::Long64] {
            let message = refusal(load_flat(&mem, &vec![0xf4; len], at, mode));
            assert!(message.ends_with("overlaps the boot data at 0x500..0x20000"), "{message}");
        }
    }
    load_flat(&mem, &[0xf4; 0x100], 0x400, FlatMode::Long64).unwrap();
    load_flat(&mem, &[0xf4; 0x100], 0x2_0000, FlatMode::Long64).unwrap();
}

#[test]
fn binary_outside_of_memory_is_refused() {
    let mem = memory(2 * MIB);
    for at in [2 * MIB - 1, 2 * MIB, u64::MAX] {
        let message = refusal(load_flat(&mem, &[0xf4; 2], at, FlatMode::Long64));
        assert!(message.ends_with("lies outside of guest RAM below 4 GiB"), "{message}");
    }
}

#[test]
fn empty_binary_is_refused() {
    let message = refusal(load_flat(&memory(2 * MIB), &[], MIB, FlatMode::Long64));
    assert_eq!(message, "flat binary of 0x0 bytes at 0x100000 is empty");
}
