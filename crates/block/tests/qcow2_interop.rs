//! Images of `qemu-img` are read and written here, and ours are clean and the same there.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::path::Path;

use common::{Random, Window, assert_clean, folder, no_qemu, path, qemu_contents, qemu_img, qemu_io, text};
use freestone_block::tools::{CreateOptions, check_qcow2, create};
use freestone_block::{Backing, Image, ImageFormat, Qcow2Image, Qcow2Options};
use tempfile::TempDir;

fn open(path: &Path) -> Qcow2Image {
    Qcow2Options::new().backing(Backing::Allow).open(path).unwrap()
}

fn open_read_only(path: &Path) -> Qcow2Image {
    Qcow2Options::new().backing(Backing::Allow).read_only(true).open(path).unwrap()
}

/// Writes of all kinds, in the words of qemu-io: data, zeroes, discards.
fn script(random: &mut Random, size: u64, steps: usize) -> Vec<String> {
    (0..steps)
        .map(|i| {
            let at = random.below(size / 512) * 512;
            let len = (random.below(256) + 1) * 512;
            let len = len.min(size - at);
            match random.below(6) {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -zu {at} {len}"),
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", i % 255 + 1),
            }
        })
        .collect()
}

/// An image made by qemu-img with `options`, filled by qemu-io.
fn theirs(dir: &TempDir, name: &str, options: &str, size: u64, seed: u64) -> std::path::PathBuf {
    let path = path(dir, name);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), &size.to_string()]);
    qemu_io(&path, &script(&mut Random(seed), size, 40));
    path
}

/// A random script of ours, with a model of what must be there. Checks the model as it goes.
fn exercise(disk: &Qcow2Image, model: &mut [u8], random: &mut Random, steps: usize) {
    let window = Window::new();
    let size = model.len() as u64;
    for _ in 0..steps {
        let at = random.below(size / 512) * 512;
        let len = ((random.below(300) + 1) * 512).min(size - at);
        let (from, to) = (usize::try_from(at).unwrap(), usize::try_from(at + len).unwrap());
        match random.below(10) {
            0 => {
                disk.write_zeroes(at, len, true).unwrap();
                model[from..to].fill(0);
            }
            1 => {
                disk.write_zeroes(at, len, false).unwrap();
                model[from..to].fill(0);
            }
            2 => {
                disk.discard(at, len).unwrap();
                // Unspecified: whatever it is now is what it stays.
                model[from..to].copy_from_slice(&window.read(disk, at, to - from).unwrap());
            }
            3 => disk.flush().unwrap(),
            4..=5 => {
                assert!(window.read(disk, at, to - from).unwrap() == model[from..to], "at {at} for {len}")
            }
            _ => {
                let data = random.bytes(to - from);
                window.write(disk, at, &data).unwrap();
                model[from..to].copy_from_slice(&data);
            }
        }
    }
}

const KINDS: [&str; 12] = [
    "compat=0.10",
    "compat=1.1",
    "compat=1.1,lazy_refcounts=on",
    "cluster_size=512",
    "compat=0.10,cluster_size=512",
    "cluster_size=4096",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=64,cluster_size=1024",
    "refcount_bits=8,cluster_size=512",
    "preallocation=metadata",
    "preallocation=falloc,cluster_size=8192",
];

#[test]
fn images_of_every_kind_read_back_bit_for_bit() {
    if no_qemu("images_of_every_kind_read_back_bit_for_bit") {
        return;
    }
    for (i, options) in (1..).zip(KINDS) {
        let dir = folder();
        let path = theirs(&dir, "a.qcow2", options, 9 << 20, i);
        let expected = qemu_contents(&dir, &path);
        assert!(Window::new().read_all(&open_read_only(&path)) == expected, "{options}");
        let report = check_qcow2(&path).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{options}: {:?}", report.problems);
    }
}

#[test]
fn images_of_every_kind_are_clean_and_right_after_random_changes() {
    if no_qemu("images_of_every_kind_are_clean_and_right_after_random_changes") {
        return;
    }
    for (i, options) in (100..).zip(KINDS) {
        let dir = folder();
        let path = theirs(&dir, "a.qcow2", options, 9 << 20, i);
        let mut model = qemu_contents(&dir, &path);
        let mut random = Random(i);
        for _ in 0..3 {
            let disk = open(&path);
            exercise(&disk, &mut model, &mut random, 150);
            drop(disk);
            assert_clean(&path);
        }
        assert!(qemu_contents(&dir, &path) == model, "{options}");
        let report = check_qcow2(&path).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{options}: {:?}", report.problems);
        qemu_io(&path, &script(&mut random, 9 << 20, 40));
        assert_clean(&path);
    }
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    if no_qemu("compressed_clusters_are_read_and_replaced") {
        return;
    }
    for cluster in ["512", "4096", "64k", "2M"] {
        let dir = folder();
        let raw = path(&dir, "plain.raw");
        let mut random = Random(7);
        // Text that shrinks, noise that does not, and nothing.
        let mut data: Vec<u8> = (0..3_u32 << 20).map(|i| (i / 700).to_le_bytes()[0]).collect();
        data.extend(random.bytes(1 << 20));
        data.extend(vec![0; 1 << 20]);
        std::fs::write(&raw, &data).unwrap();
        let image = path(&dir, "packed.qcow2");
        let size = format!("cluster_size={cluster}");
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &size, text(&raw), text(&image)]);
        assert!(Window::new().read_all(&open_read_only(&image)) == data, "{cluster}");
        let report = check_qcow2(&image).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{cluster}: {:?}", report.problems);
        assert!(report.compressed_clusters > 0);
        let disk = open(&image);
        exercise(&disk, &mut data, &mut random, 200);
        drop(disk);
        assert_clean(&image);
        assert!(qemu_contents(&dir, &image) == data, "{cluster}");
    }
}

#[test]
fn a_chain_of_three_reads_through_and_is_written_at_the_top_only() {
    if no_qemu("a_chain_of_three_reads_through_and_is_written_at_the_top_only") {
        return;
    }
    for top_options in ["compat=1.1", "compat=0.10", "cluster_size=2M", "cluster_size=512"] {
        let dir = folder();
        let base = path(&dir, "base.raw");
        // Not a whole number of sectors, and smaller than what lies over it.
        std::fs::write(&base, Random(3).bytes((5 << 20) + 700)).unwrap();
        let middle = path(&dir, "middle.qcow2");
        let top = path(&dir, "top.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&middle), "6M"]);
        qemu_io(&middle, &script(&mut Random(4), 6 << 20, 20));
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            top_options,
            "-b",
            "middle.qcow2",
            "-F",
            "qcow2",
            text(&top),
            "8M",
        ]);
        qemu_io(&top, &script(&mut Random(5), 8 << 20, 20));
        let mut model = qemu_contents(&dir, &top);
        let before = [std::fs::read(&base).unwrap(), std::fs::read(&middle).unwrap()];
        let disk = open(&top);
        assert!(Window::new().read_all(&disk) == model, "{top_options}");
        exercise(&disk, &mut model, &mut Random(6), 200);
        drop(disk);
        assert_clean(&top);
        assert!(qemu_contents(&dir, &top) == model, "{top_options}");
        assert!(before == [std::fs::read(&base).unwrap(), std::fs::read(&middle).unwrap()]);
    }
}

#[test]
fn writing_leaves_internal_snapshots_as_they_were() {
    if no_qemu("writing_leaves_internal_snapshots_as_they_were") {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=512", "compat=0.10"] {
        let dir = folder();
        let image = theirs(&dir, "a.qcow2", options, 9 << 20, 11);
        let first = qemu_contents(&dir, &image);
        qemu_img(&["snapshot", "-c", "first", text(&image)]);
        qemu_io(&image, &script(&mut Random(12), 9 << 20, 20));
        qemu_img(&["snapshot", "-c", "second", text(&image)]);
        let mut model = qemu_contents(&dir, &image);
        let disk = open(&image);
        exercise(&disk, &mut model, &mut Random(13), 200);
        drop(disk);
        assert_clean(&image);
        let report = check_qcow2(&image).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{options}: {:?}", report.problems);
        assert!(qemu_contents(&dir, &image) == model, "{options}");
        qemu_img(&["snapshot", "-a", "first", text(&image)]);
        assert!(qemu_contents(&dir, &image) == first, "{options}");
    }
}

#[test]
fn an_image_that_was_left_dirty_is_counted_anew() {
    if no_qemu("an_image_that_was_left_dirty_is_counted_anew") {
        return;
    }
    let dir = folder();
    let image = path(&dir, "a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", text(&image), "9M"]);
    // The process ends itself with the refcounts unwritten.
    let _ = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 7 0 3M", "-c", "flush", "-c", "abort", text(&image)])
        .output()
        .unwrap();
    assert_eq!(std::fs::read(&image).unwrap()[79] & 1, 1, "the image is dirty");
    assert_eq!(Window::new().read(&open_read_only(&image), 1 << 20, 512).unwrap(), [7; 512]);
    let disk = open(&image);
    Window::new().write(&disk, 4 << 20, &[8; 4096]).unwrap();
    drop(disk);
    assert_eq!(std::fs::read(&image).unwrap()[79] & 1, 0, "the image is not dirty");
    assert_clean(&image);
    assert_eq!(qemu_contents(&dir, &image)[..3 << 20], vec![7; 3 << 20]);
}

#[test]
fn images_made_here_are_images_there() {
    if no_qemu("images_made_here_are_images_there") {
        return;
    }
    for cluster_bits in [9, 12, 16, 21] {
        for version in [2, 3] {
            let dir = folder();
            let image = path(&dir, "a.qcow2");
            let mut options = CreateOptions::new(ImageFormat::Qcow2, 40 << 20);
            options.cluster_size = 1 << cluster_bits;
            options.version = version;
            create(&image, &options).unwrap();
            assert_clean(&image);
            let mut model = vec![0; 40 << 20];
            let disk = open(&image);
            exercise(&disk, &mut model, &mut Random(21), 250);
            drop(disk);
            assert_clean(&image);
            assert!(qemu_contents(&dir, &image) == model, "{options:?}");
        }
    }
}

#[test]
fn the_refcount_table_grows() {
    if no_qemu("the_refcount_table_grows") {
        return;
    }
    // 64 refcounts of 64 bits in a block, 64 blocks in a table: it grows every 2 MiB and then less often.
    let dir = folder();
    let image = path(&dir, "a.qcow2");
    let mut options = CreateOptions::new(ImageFormat::Qcow2, 24 << 20);
    options.cluster_size = 512;
    options.refcount_bits = 64;
    create(&image, &options).unwrap();
    let disk = open(&image);
    let window = Window::new();
    let data = Random(31).bytes(1 << 20);
    for i in 0..20_u64 {
        window.write(&disk, i << 20, &data).unwrap();
        disk.flush().unwrap();
    }
    assert!(window.read(&disk, 19 << 20, 1 << 20).unwrap() == data);
    drop(disk);
    assert_clean(&image);
    let report = check_qcow2(&image).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.problems);
}
