//! Images that were made to do harm: refused or contained, never a panic, a hang, or memory without end.
#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "this test takes what it needs")]
mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Random, Window, folder, path};
use freestone_block::tools::{CreateOptions, check_qcow2, create, info_chain, repair_qcow2};
use freestone_block::{Backing, Error, FormatChoice, Image, ImageFormat, Qcow2Image, Qcow2Options};
use tempfile::TempDir;

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;

/// A small image with data, of 4 KiB clusters: header in cluster 0, L1 in 1, refcount block in 2, table in 3, then L2 and data.
fn image(dir: &TempDir) -> PathBuf {
    let path = path(dir, "a.qcow2");
    let mut options = CreateOptions::new(ImageFormat::Qcow2, SIZE);
    options.cluster_size = CLUSTER;
    create(&path, &options).unwrap();
    let disk = Qcow2Options::new().open(&path).unwrap();
    Window::new().write(&disk, 0, &[5; 3 * 4096 + 512]).unwrap();
    drop(disk);
    path
}

fn put(path: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

fn get64(path: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

fn l2(path: &Path) -> u64 {
    get64(path, get64(path, 40)) & !COPIED
}

fn open(path: &Path) -> Result<Qcow2Image, Error> {
    Qcow2Options::new().open(path)
}

fn open_read_only(path: &Path) -> Result<Qcow2Image, Error> {
    Qcow2Options::new().read_only(true).open(path)
}

/// Asserts that a changed image is refused, with `part` in the reason.
fn refused(offset: u64, bytes: &[u8], part: &str) {
    let dir = folder();
    let path = image(&dir);
    put(&path, offset, bytes);
    let error = open_read_only(&path).unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
    assert!(open(&path).is_err());
}

#[test]
fn headers_that_make_no_sense_are_refused_by_what_is_wrong() {
    refused(0, b"QFI\xfa", "does not begin with a qcow2 header");
    refused(4, &4_u32.to_be_bytes(), "version 4");
    refused(20, &8_u32.to_be_bytes(), "clusters of 2^8");
    refused(20, &22_u32.to_be_bytes(), "clusters of 2^22");
    refused(20, &u32::MAX.to_be_bytes(), "clusters of 2^4294967295");
    refused(24, &u64::MAX.to_be_bytes(), "virtual size");
    refused(24, &(1_u64 << 50).to_be_bytes(), "an L1 table of");
    refused(24, &0_u64.to_be_bytes(), "smallest disk");
    refused(36, &0_u32.to_be_bytes(), "an L1 table of 0 entries");
    refused(36, &u32::MAX.to_be_bytes(), "an L1 table of 4294967295 entries");
    refused(36, &(1_u32 << 21).to_be_bytes(), "outside of the file");
    refused(40, &(1_u64 << 40).to_be_bytes(), "outside of the file");
    refused(40, &(u64::MAX - 4095).to_be_bytes(), "outside of the file");
    refused(40, &4097_u64.to_be_bytes(), "not the start of a cluster");
    refused(48, &(1_u64 << 40).to_be_bytes(), "outside of the file");
    refused(56, &u32::MAX.to_be_bytes(), "a refcount table of 4294967295 clusters");
    refused(56, &0_u32.to_be_bytes(), "a refcount table of 0 clusters");
    refused(60, &u32::MAX.to_be_bytes(), "4294967295 snapshots");
    refused(96, &7_u32.to_be_bytes(), "refcounts of 2^7");
    refused(100, &8_u32.to_be_bytes(), "a header of 8 bytes");
    refused(100, &u32::MAX.to_be_bytes(), "a header of 4294967295 bytes");
    refused(108, &u32::MAX.to_be_bytes(), "is too long");
    refused(8, &[(1_u64 << 62).to_be_bytes(), 5_u64.to_be_bytes()].concat(), "");
}

#[test]
fn features_that_are_not_there_are_refused_by_name() {
    refused(32, &1_u32.to_be_bytes(), "AES encryption");
    refused(32, &2_u32.to_be_bytes(), "LUKS encryption");
    refused(72, &4_u64.to_be_bytes(), "external data file");
    refused(72, &8_u64.to_be_bytes(), "compression type");
    refused(72, &16_u64.to_be_bytes(), "subclusters");
    refused(72, &(1_u64 << 40).to_be_bytes(), "0x10000000000");
}

#[test]
fn a_file_cut_short_anywhere_is_refused_or_fails_to_read() {
    let dir = folder();
    let whole = std::fs::read(image(&dir)).unwrap();
    let cut = path(&dir, "cut.qcow2");
    for len in (0..whole.len()).step_by(509) {
        std::fs::write(&cut, &whole[..len]).unwrap();
        if let Ok(disk) = open_read_only(&cut) {
            let _ = Window::new().read(&disk, 0, 4 * 4096);
        }
        let _ = check_qcow2(&cut);
        if let Ok(disk) = open(&cut) {
            let _ = Window::new().write(&disk, 8192, &[1; 512]);
            let _ = disk.flush();
        }
    }
}

#[test]
fn guest_data_is_not_written_over_metadata() {
    // Header, L1 table, refcount block, refcount table, and the L2 table itself.
    for cluster in [1, 2, 3, 4] {
        let dir = folder();
        let path = image(&dir);
        assert_eq!(l2(&path), 4 * CLUSTER);
        put(&path, l2(&path), &(COPIED | (cluster * CLUSTER)).to_be_bytes());
        let before = std::fs::read(&path).unwrap();
        let disk = open(&path).unwrap();
        let error = Window::new().write(&disk, 0, &[0x5a; 512]).unwrap_err();
        assert!(error.to_string().contains("over metadata"), "{error}");
        // Nor is it given back to the host.
        disk.discard(0, CLUSTER).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let after = std::fs::read(&path).unwrap();
        let (from, to) =
            (usize::try_from(cluster * CLUSTER).unwrap(), usize::try_from((cluster + 1) * CLUSTER).unwrap());
        if cluster != 4 {
            assert!(before[from..to] == after[from..to], "cluster {cluster}");
        }
        let report = check_qcow2(&path).unwrap();
        assert_eq!(report.corruptions, 0, "{:?}", report.problems);
    }
}

#[test]
fn tables_that_overlap_make_an_image_read_only() {
    for entry in [COPIED, 1, 2, 3] {
        let dir = folder();
        let path = image(&dir);
        let value = if entry == COPIED { COPIED } else { COPIED | (entry * CLUSTER) };
        put(&path, get64(&path, 40), &value.to_be_bytes());
        assert!(matches!(open(&path), Err(Error::Malformed { .. })), "{value:#x}");
        assert!(check_qcow2(&path).unwrap().corruptions > 0);
        let disk = open_read_only(&path).unwrap();
        let _ = Window::new().read(&disk, 0, 4096);
    }
    // A refcount block that is the L1 table, one that is nowhere, one that is crooked.
    for value in [CLUSTER, 1 << 40, 4097] {
        let dir = folder();
        let path = image(&dir);
        put(&path, get64(&path, 48), &value.to_be_bytes());
        assert!(matches!(open(&path), Err(Error::Malformed { .. })), "{value:#x}");
        assert!(check_qcow2(&path).unwrap().corruptions > 0);
        // New refcounts replace them.
        assert_eq!(repair_qcow2(&path).unwrap().corruptions, 0);
        let disk = open(&path).unwrap();
        assert_eq!(Window::new().read(&disk, 0, 512).unwrap(), [5; 512]);
    }
}

#[test]
fn refcounts_that_hide_what_is_used_do_not_lead_to_its_loss() {
    let dir = folder();
    let path = image(&dir);
    // All refcounts are zero: everything seems free.
    put(&path, 2 * CLUSTER, &[0; 4096]);
    let disk = open(&path).unwrap();
    let window = Window::new();
    window.write(&disk, 64 * 1024, &[9; 4 * 4096]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    // The tables are whole, and what was written is there.
    let disk = open(&path).unwrap();
    assert_eq!(window.read(&disk, 64 * 1024, 4096).unwrap(), [9; 4096]);
    drop(disk);
    let report = repair_qcow2(&path).unwrap();
    assert_eq!(report.leaks, 0);
}

#[test]
fn a_repaired_image_is_clean_and_has_what_can_be_saved() {
    let dir = folder();
    let path = image(&dir);
    let table = l2(&path);
    put(&path, table + 8, &(COPIED | 1 << 50).to_be_bytes());
    put(&path, table + 16, &0xff_u64.to_be_bytes());
    put(&path, 2 * CLUSTER + 12, &[0, 7]);
    let found = check_qcow2(&path).unwrap();
    assert!(found.corruptions > 1 && !found.problems.is_empty(), "{found:?}");
    let report = repair_qcow2(&path).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.problems);
    assert!(report.repaired > 1);
    let disk = open(&path).unwrap();
    let window = Window::new();
    assert_eq!(window.read(&disk, 0, 4096).unwrap(), [5; 4096]);
    assert_eq!(window.read(&disk, 4096, 8192).unwrap(), [0; 8192]);
    assert_eq!(window.read(&disk, 12288, 512).unwrap(), [5; 512]);
}

#[test]
fn a_corrupt_image_is_read_only_until_it_is_repaired() {
    let dir = folder();
    let path = image(&dir);
    put(&path, 72, &2_u64.to_be_bytes());
    assert!(open(&path).unwrap_err().to_string().contains("marked as corrupt"));
    assert_eq!(Window::new().read(&open_read_only(&path).unwrap(), 0, 512).unwrap(), [5; 512]);
    assert_eq!(repair_qcow2(&path).unwrap().corruptions, 0);
    open(&path).unwrap();
}

fn overlay(dir: &TempDir, name: &str, backing: &str, format: ImageFormat) -> PathBuf {
    let path = path(dir, name);
    let mut options = CreateOptions::new(ImageFormat::Qcow2, SIZE);
    options.backing = Some((backing.into(), format));
    options.overwrite = true;
    create(&path, &options).unwrap();
    path
}

#[test]
fn a_backing_file_is_opened_with_leave_only() {
    let dir = folder();
    image(&dir);
    let top = overlay(&dir, "top.qcow2", "a.qcow2", ImageFormat::Qcow2);
    let error = open(&top).unwrap_err();
    assert!(matches!(error, Error::BackingDenied { .. }));
    assert!(error.to_string().contains("backing=on"), "{error}");
    let disk = Qcow2Options::new().backing(Backing::Allow).open(&top).unwrap();
    assert_eq!(Window::new().read(&disk, 0, 512).unwrap(), [5; 512]);
    // The backing file is locked against writers now, and not against readers.
    assert!(matches!(open(&path(&dir, "a.qcow2")), Err(Error::Locked { .. })));
    open_read_only(&path(&dir, "a.qcow2")).unwrap();
}

#[test]
fn a_raw_backing_file_is_never_probed() {
    let dir = folder();
    let base = image(&dir);
    let top = overlay(&dir, "top.qcow2", "a.qcow2", ImageFormat::Raw);
    let allow = Qcow2Options::new().backing(Backing::Allow).read_only(true);
    let expected = &std::fs::read(&base).unwrap()[..512];
    assert_eq!(Window::new().read(&allow.open(&top).unwrap(), 0, 512).unwrap(), expected, "stated as raw");
    // The extension with the format becomes one that is unknown.
    put(&top, 104, &0x1234_5678_u32.to_be_bytes());
    assert_eq!(Window::new().read(&allow.open(&top).unwrap(), 0, 512).unwrap(), expected, "not stated");
}

#[test]
fn a_chain_that_loops_or_does_not_end_is_refused() {
    let dir = folder();
    image(&dir);
    let allow = Qcow2Options::new().backing(Backing::Allow);
    let one = overlay(&dir, "one.qcow2", "a.qcow2", ImageFormat::Qcow2);
    let two = overlay(&dir, "two.qcow2", "one.qcow2", ImageFormat::Qcow2);
    std::fs::remove_file(&one).unwrap();
    std::os::unix::fs::symlink(&two, &one).unwrap();
    for lock in [true, false] {
        let error = allow.lock(lock).open(&two).unwrap_err();
        assert!(matches!(error, Error::Chain { .. } | Error::Locked { .. }), "{error}");
    }
    assert!(matches!(allow.read_only(true).open(&two), Err(Error::Chain { .. })));
    assert!(matches!(info_chain(&two, FormatChoice::Given(ImageFormat::Qcow2)), Err(Error::Chain { .. })));
    let mut below = "a.qcow2".to_owned();
    for i in 0..31 {
        let name = format!("chain{i}.qcow2");
        let top = overlay(&dir, &name, &below, ImageFormat::Qcow2);
        assert!(allow.open(&top).is_ok(), "{i}");
        below = name;
    }
    let top = path(&dir, "last.qcow2");
    std::fs::copy(path(&dir, &below), &top).unwrap();
    put(&top, get64(&top, 8), b"chain30.qcow2");
    assert!(matches!(allow.open(&top), Err(Error::Chain { .. })));
}

#[test]
fn backing_names_that_are_no_plain_paths_are_refused() {
    let dir = folder();
    for name in ["json:{}", "nbd://host", "rbd:pool/x"] {
        let base = image(&dir);
        let top = overlay(&dir, "top.qcow2", "././././a.qcow2", ImageFormat::Qcow2);
        put(&top, get64(&top, 8), &[name.as_bytes(), &vec![b'x'; 15 - name.len()]].concat());
        let error = Qcow2Options::new().backing(Backing::Allow).open(&top).unwrap_err().to_string();
        assert!(error.contains("not a plain path"), "{error}");
        std::fs::remove_file(base).unwrap();
        std::fs::remove_file(top).unwrap();
    }
}

/// Memory that this process has touched at most, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn two_thousand_mutations_neither_panic_nor_hang_nor_eat_memory() {
    // In memory, where it can be: many thousand times the file is made durable.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| folder());
    let original = image(&dir);
    let whole = std::fs::read(&original).unwrap();
    let target = path(&dir, "m.qcow2");
    let mut random = Random(99);
    let window = Window::new();
    for round in 0..2000 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(4) {
            // The header, and the first entries of all tables.
            let table = random.below(5) * CLUSTER;
            let at = usize::try_from(table + random.below(if table == 0 { 180 } else { 64 })).unwrap();
            let values = [0, 0xff, 0x80, 1, 1 << random.below(8)];
            let value = values[usize::try_from(random.below(5)).unwrap()];
            if random.below(4) == 0 {
                let at = at / 8 * 8;
                bytes[at..at + 8].copy_from_slice(&(COPIED | (random.below(8) * CLUSTER)).to_be_bytes());
            } else {
                bytes[at] = u8::try_from(value).unwrap();
            }
        }
        std::fs::write(&target, &bytes).unwrap();
        let _ = check_qcow2(&target);
        if let Ok(disk) = open_read_only(&target) {
            let _ = window.read(&disk, 0, 32 * 1024);
            let _ = window.read(&disk, disk.size() - 512, 512);
        }
        if let Ok(disk) = open(&target) {
            let last = disk.size() - 512;
            let _ = window.write(&disk, 0, &[1; 6 * 4096 + 512]);
            let _ = disk.discard(4096, 16384);
            let _ = disk.flush();
            let _ = window.write(&disk, 512, &[2; 40_000]);
            let _ = disk.write_zeroes(300 * 512, 100 * 512, round % 2 == 0);
            let _ = window.write(&disk, last, &[2; 512]);
            let _ = disk.flush();
        }
        let _ = repair_qcow2(&target);
        let _ = check_qcow2(&target);
    }
    assert!(peak() < 600 << 20, "{} bytes", peak());
}

#[test]
fn requests_beyond_the_end_and_against_the_mode_are_refused() {
    let dir = folder();
    let path = image(&dir);
    let window = Window::new();
    let disk = open_read_only(&path).unwrap();
    assert!(!disk.limits().discard && disk.read_only());
    assert!(window.write(&disk, 0, &[1; 512]).is_err());
    assert!(disk.discard(0, 4096).is_err() && disk.write_zeroes(0, 4096, true).is_err());
    drop(disk);
    let disk = open(&path).unwrap();
    for (offset, len) in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 512), (u64::MAX, 1)] {
        assert!(window.read(&disk, offset, len).is_err());
        assert!(window.write(&disk, offset, &vec![0; len]).is_err());
        assert!(disk.discard(offset, len as u64).is_err());
        assert!(disk.write_zeroes(offset, len as u64, false).is_err());
    }
    assert!(disk.discard(0, u64::MAX).is_err());
}

#[test]
fn threads_that_write_and_discard_the_same_clusters_leave_a_clean_image() {
    let dir = folder();
    let path = image(&dir);
    let disk = Arc::new(open(&path).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let disk = Arc::clone(&disk);
            scope.spawn(move || {
                let mut random = Random(thread + 1);
                let window = Window::new();
                for _ in 0..400 {
                    let at = random.below(SIZE / 512 - 64) * 512;
                    match random.below(6) {
                        0 => disk.discard(at, 32 * 512).unwrap(),
                        1 => disk.flush().unwrap(),
                        2 => drop(window.read(disk.as_ref(), at, 32 * 512).unwrap()),
                        _ => window
                            .write(disk.as_ref(), at, &[u8::try_from(thread).unwrap(); 20 * 512])
                            .unwrap(),
                    }
                }
            });
        }
    });
    drop(disk);
    let report = check_qcow2(&path).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.problems);
}
