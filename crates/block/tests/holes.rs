//! Discard and write-zeroes, by every engine: what reads as what, and what storage is left.
#![expect(clippy::unwrap_used, reason = "tests")]

mod queues;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use freestone_block::{Engine, Image, Op, RawImage, RawOptions};
use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use queues::{bytes, folder, queue, run};
use rustix::fs::SeekFrom;
use tempfile::TempDir;

const ENGINES: [Engine; 3] = [Engine::Sync, Engine::Uring, Engine::Auto];
const MIB: u64 = 1 << 20;

/// An image of 4 MiB of ones, all of which has storage.
fn full_disk(dir: &TempDir) -> Arc<RawImage> {
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1; 4 << 20]).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    Arc::new(RawOptions::new().open(&path).unwrap())
}

/// Bytes of storage that a file has.
fn storage(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

/// Where the first hole of a file is.
fn first_hole(path: &Path) -> u64 {
    rustix::fs::seek(File::open(path).unwrap(), SeekFrom::Hole(0)).unwrap()
}

#[test]
fn opening_an_image_changes_neither_its_size_nor_its_storage() {
    let dir = folder();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1; 1_000_000]).unwrap();
    let before = (storage(&path), std::fs::metadata(&path).unwrap().len());
    RawOptions::new().open(&path).unwrap();
    assert_eq!((storage(&path), std::fs::metadata(&path).unwrap().len()), before);
    assert_eq!(std::fs::read(&path).unwrap(), vec![1; 1_000_000]);
}

#[test]
fn discard_makes_a_hole() {
    for engine in ENGINES {
        let dir = folder();
        let image = full_disk(&dir);
        if !image.limits().discard {
            println!("SKIP: no holes on this file system");
            return;
        }
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        let view = GuestMem::anonymous(0x1000).unwrap().view();
        let before = storage(image.path());
        run(&mut *queue, &view, Op::Discard { offset: MIB, len: 2 * MIB }).unwrap();
        assert_eq!(before - storage(image.path()), 2 * MIB, "{engine:?}");
        assert_eq!(first_hole(image.path()), MIB);
        assert_eq!(std::fs::metadata(image.path()).unwrap().len(), 4 * MIB);
    }
}

#[test]
fn zeroes_with_leave_to_unmap_are_a_hole() {
    for engine in ENGINES {
        let dir = folder();
        let image = full_disk(&dir);
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        let view = GuestMem::anonymous(0x1000).unwrap().view();
        let before = storage(image.path());
        run(&mut *queue, &view, Op::WriteZeroes { offset: 0, len: MIB, unmap: true }).unwrap();
        assert!(!image.limits().discard || before - storage(image.path()) == MIB, "{engine:?}");
        assert!(std::fs::read(image.path()).unwrap()[..1 << 20].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn zeroes_without_leave_to_unmap_keep_their_storage() {
    for engine in ENGINES {
        // A disk may mark zeroes; a file system in memory cannot, and has them written.
        for dir in [folder(), tempfile::tempdir_in("/dev/shm").unwrap()] {
            let image = full_disk(&dir);
            let Some(mut queue) = queue(&image, engine, 4) else { continue };
            let view = GuestMem::anonymous(0x1000).unwrap().view();
            let before = storage(image.path());
            let (offset, len) = (512, 3 * MIB + 1536);
            run(&mut *queue, &view, Op::WriteZeroes { offset, len, unmap: false }).unwrap();
            assert!(storage(image.path()) >= before, "{engine:?}");
            let content = std::fs::read(image.path()).unwrap();
            let end = usize::try_from(offset + len).unwrap();
            assert!(content[512..end].iter().all(|byte| *byte == 0), "{engine:?}");
            assert!(content[..512].iter().chain(&content[end..]).all(|byte| *byte == 1), "{engine:?}");
        }
    }
}

#[test]
fn nothing_is_done_for_nothing() {
    for engine in ENGINES {
        let dir = folder();
        let image = full_disk(&dir);
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        let view = GuestMem::anonymous(0x1000).unwrap().view();
        for op in [
            Op::Discard { offset: 4 * MIB, len: 0 },
            Op::WriteZeroes { offset: 0, len: 0, unmap: true },
            Op::WriteZeroes { offset: 4 * MIB, len: 0, unmap: false },
        ] {
            run(&mut *queue, &view, op).unwrap();
        }
        assert!(std::fs::read(image.path()).unwrap().iter().all(|byte| *byte == 1));
    }
}

#[test]
fn read_only_image_offers_neither() {
    let dir = folder();
    let path = full_disk(&dir).path().to_owned();
    let limits = RawOptions::new().read_only(true).open(path).unwrap().limits();
    assert!(!limits.discard && !limits.write_zeroes);
}

/// A block device on a file.
struct Loop(String);

impl Loop {
    fn attach(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(Self(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_device_is_read_written_zeroed_and_discarded() {
    for engine in ENGINES {
        let dir = folder();
        let path = full_disk(&dir).path().to_owned();
        let Some(device) = Loop::attach(&path) else {
            println!("SKIP: no loop devices here");
            return;
        };
        let image = Arc::new(RawOptions::new().open(&device.0).unwrap());
        assert_eq!(image.size(), 4 * MIB);
        let limits = image.limits();
        assert!(limits.write_zeroes && limits.physical_block >= 512);
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        let view = GuestMem::anonymous(0x2000).unwrap().view();
        let bufs = [view.get_slice(GuestAddress(0), 0x1000).unwrap()];
        run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 3 * MIB }).unwrap();
        assert_eq!(bytes(&view, 0, 0x1000), [1; 0x1000]);
        for (unmap, offset) in [(false, 0), (true, MIB)] {
            run(&mut *queue, &view, Op::WriteZeroes { offset, len: MIB, unmap }).unwrap();
            run(&mut *queue, &view, Op::Read { bufs: &bufs, offset }).unwrap();
            assert_eq!(bytes(&view, 0, 0x1000), [0; 0x1000], "{engine:?} unmap={unmap}");
        }
        run(&mut *queue, &view, Op::Write { bufs: &bufs, offset: 4 * MIB - 0x1000 }).unwrap();
        run(&mut *queue, &view, Op::Flush).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[(4 << 20) - 1], 0);
        if limits.discard {
            let before = storage(&path);
            run(&mut *queue, &view, Op::Discard { offset: 2 * MIB, len: MIB }).unwrap();
            assert!(storage(&path) < before, "{engine:?}");
        }
    }
}
