//! The images are what a PVH loader expects.

mod common;

use common::elf;
use freestone_guest::{ALL, PARAMS};

#[test]
fn images_are_elf64_executables_for_x86_64() {
    for (name, image) in ALL {
        assert_eq!(&image[..6], b"\x7FELF\x02\x01", "{name}");
        assert_eq!(&image[16..20], &[2, 0, 0x3E, 0], "{name}: type EXEC, machine x86-64");
    }
}

#[test]
fn images_load_between_one_and_sixteen_mib() {
    for (name, image) in ALL {
        let loads = elf::loads(image);
        assert!(!loads.is_empty(), "{name}");
        for segment in loads {
            assert!(segment.phys >= 1 << 20, "{name}");
            assert!(segment.phys + segment.memory_len <= 16 << 20, "{name}");
            assert!(segment.file.end <= image.len(), "{name}");
        }
    }
}

#[test]
fn the_pvh_note_points_into_the_loaded_image() {
    for (name, image) in ALL {
        let entry = elf::pvh_entry(image).unwrap_or_else(|| panic!("{name} has no PVH note"));
        let inside = elf::loads(image)
            .iter()
            .any(|segment| (segment.phys..segment.phys + segment.file.len() as u64).contains(&entry));
        assert!(inside, "{name}: entry {entry:#x}");
    }
}

#[test]
fn images_with_parameters_begin_with_their_block() {
    for (name, image) in
        ALL.into_iter().filter(|(name, _)| ["start", "exits", "paging", "probe", "life"].contains(name))
    {
        let first = &elf::loads(image)[0];
        assert_eq!(first.phys, PARAMS, "{name}");
        assert!(elf::pvh_entry(image).unwrap() >= PARAMS + 128, "{name}");
    }
}

#[test]
fn images_are_small() {
    for (name, image) in ALL {
        assert!(image.len() < 128 << 10, "{name} has {} bytes", image.len());
    }
}
