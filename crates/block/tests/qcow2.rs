//! What a qcow2 image does that a raw one does not: space, sharing, options of making, formats.
#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "this test takes what it needs")]
mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use common::{Random, Window, folder, path};
use freestone_block::tools::{CreateOptions, Preallocation, check_qcow2, create};
use freestone_block::{
    DiskOptions, Engine, Error, FormatChoice, Image, ImageFormat, Qcow2Options, probe, recorded_format,
};

fn make(path: &Path, change: impl FnOnce(&mut CreateOptions)) {
    let mut options = CreateOptions::new(ImageFormat::Qcow2, 16 << 20);
    change(&mut options);
    create(path, &options).unwrap();
}

fn on_disk(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn discarded_clusters_are_given_back_to_the_host_and_used_again() {
    let dir = folder();
    let path = path(&dir, "a.qcow2");
    make(&path, |_| {});
    let disk = Qcow2Options::new().open(&path).unwrap();
    let window = Window::new();
    window.write(&disk, 0, &Random(1).bytes(8 << 20)).unwrap();
    disk.flush().unwrap();
    let (full, length) = (on_disk(&path), std::fs::metadata(&path).unwrap().len());
    disk.discard(0, 8 << 20).unwrap();
    disk.flush().unwrap();
    assert!(on_disk(&path) + (7 << 20) < full);
    assert_eq!(window.read(&disk, 0, 4096).unwrap(), [0; 4096]);
    window.write(&disk, 0, &Random(2).bytes(8 << 20)).unwrap();
    disk.flush().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), length);
    drop(disk);
    assert_eq!(check_qcow2(&path).unwrap().leaks, 0);
}

#[test]
fn zeroes_keep_their_space_unless_told_otherwise() {
    let dir = folder();
    let path = path(&dir, "a.qcow2");
    make(&path, |_| {});
    let disk = Qcow2Options::new().open(&path).unwrap();
    let window = Window::new();
    window.write(&disk, 0, &[1; 2 << 20]).unwrap();
    disk.flush().unwrap();
    let full = on_disk(&path);
    disk.write_zeroes(0, 2 << 20, false).unwrap();
    disk.flush().unwrap();
    assert!(on_disk(&path) >= full);
    assert_eq!(window.read(&disk, 65536, 512).unwrap(), [0; 512]);
    window.write(&disk, 65536 + 512, &[2; 512]).unwrap();
    assert_eq!(window.read(&disk, 65536, 1536).unwrap(), [vec![0; 512], vec![2; 512], vec![0; 512]].concat());
    disk.write_zeroes(0, 2 << 20, true).unwrap();
    disk.flush().unwrap();
    assert!(on_disk(&path) + (1 << 20) < full);
}

#[test]
fn a_small_write_takes_one_cluster_and_reads_zeroes_around_it() {
    let dir = folder();
    let path = path(&dir, "a.qcow2");
    make(&path, |_| {});
    let disk = Qcow2Options::new().open(&path).unwrap();
    let window = Window::new();
    window.write(&disk, 3 * 65536 + 1024, &[6; 512]).unwrap();
    let found = window.read(&disk, 3 * 65536, 65536).unwrap();
    assert_eq!(found.iter().filter(|&&byte| byte == 6).count(), 512);
    assert_eq!(found.iter().filter(|&&byte| byte == 0).count(), 65536 - 512);
    drop(disk);
    assert_eq!(check_qcow2(&path).unwrap().allocated_clusters, 1);
}

#[test]
fn preallocation_takes_what_it_says() {
    for (preallocation, clusters, least) in [
        (Preallocation::Off, 0, 0),
        (Preallocation::Metadata, 256, 0),
        (Preallocation::Falloc, 256, 16 << 20),
        (Preallocation::Full, 256, 16 << 20),
    ] {
        let dir = folder();
        let path = path(&dir, "a.qcow2");
        make(&path, |options| options.preallocation = preallocation);
        let report = check_qcow2(&path).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.problems);
        assert_eq!(report.allocated_clusters, clusters, "{preallocation:?}");
        assert!(on_disk(&path) >= least, "{preallocation:?}");
        let disk = Qcow2Options::new().open(&path).unwrap();
        assert!(Window::new().read_all(&disk).iter().all(|&byte| byte == 0));
    }
}

#[test]
fn an_image_in_use_is_locked() {
    let dir = folder();
    let path = path(&dir, "a.qcow2");
    make(&path, |_| {});
    let disk = Qcow2Options::new().open(&path).unwrap();
    assert!(matches!(Qcow2Options::new().read_only(true).open(&path), Err(Error::Locked { .. })));
    assert!(matches!(check_qcow2(&path), Err(Error::Locked { .. })));
    drop(disk);
    check_qcow2(&path).unwrap();
}

#[test]
fn a_queue_carries_requests_out_on_the_spot() {
    let dir = folder();
    let path = path(&dir, "a.qcow2");
    make(&path, |_| {});
    let disk = Arc::new(Qcow2Options::new().open(&path).unwrap());
    assert_eq!(disk.clone().open_queue(Engine::Auto, 32).unwrap().in_flight(), 0);
    assert!(disk.open_queue(Engine::Uring, 32).is_err());
}

#[test]
fn the_format_is_what_the_user_says() {
    let dir = folder();
    let path = path(&dir, "a.qcow2");
    make(&path, |_| {});
    let size = |choice| DiskOptions::new().read_only(true).format(choice).open(&path).unwrap().size();
    assert_eq!(size(FormatChoice::Given(ImageFormat::Qcow2)), 16 << 20);
    assert_eq!(size(FormatChoice::Probe), 16 << 20);
    assert!(size(FormatChoice::Given(ImageFormat::Raw)) < 1 << 20);
    assert_eq!(probe(&path).unwrap(), ImageFormat::Qcow2);
    // A copy of the bytes is not what was made here.
    let copy = path.with_extension("copy");
    std::fs::write(&copy, std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(recorded_format(&copy), ImageFormat::Raw);
}
