//! What becomes of requests when the host has trouble: the request fails, and the next one works.
#![expect(clippy::unwrap_used, reason = "tests")]

mod queues;

use std::fs::File;
use std::io::ErrorKind;
use std::sync::Arc;

use freestone_block::{Engine, Image, Op, RawImage, RawOptions};
use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use queues::{disk, folder, queue, run};

const ENGINES: [Engine; 3] = [Engine::Sync, Engine::Uring, Engine::Auto];

#[test]
fn file_that_shrank_gives_an_error_beyond_its_end() {
    for engine in ENGINES {
        let dir = folder();
        let image = disk(&dir, 64 << 10);
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        File::options().write(true).open(image.path()).unwrap().set_len(8192).unwrap();
        let view = GuestMem::anonymous(0x1_0000).unwrap().view();
        let bufs = [view.get_slice(GuestAddress(0), 4096).unwrap()];
        run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 4096 }).unwrap();
        for offset in [4096 + 512, 8192, 60 << 10] {
            let error = run(&mut *queue, &view, Op::Read { bufs: &bufs, offset }).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{engine:?} {offset}");
        }
    }
}

/// A file in memory, to which the host refuses to write.
fn sealed() -> RawImage {
    use rustix::fs::{MemfdFlags, SealFlags};
    let fd = rustix::fs::memfd_create("disk", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
    rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE).unwrap();
    RawImage::from_file(File::from(fd), "sealed", RawOptions::new()).unwrap()
}

#[test]
fn error_of_the_host_is_the_outcome_of_the_request() {
    for engine in ENGINES {
        let image = Arc::new(sealed());
        assert!(!image.limits().discard);
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        let view = GuestMem::anonymous(0x1000).unwrap().view();
        let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
        let error = run(&mut *queue, &view, Op::Write { bufs: &bufs, offset: 0 }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{engine:?}");
        let error = run(&mut *queue, &view, Op::Discard { offset: 0, len: 512 }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{engine:?}");
        let error =
            run(&mut *queue, &view, Op::WriteZeroes { offset: 0, len: 512, unmap: true }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{engine:?}");
        run(&mut *queue, &view, Op::Read { bufs: &bufs, offset: 0 }).unwrap();
    }
}

#[test]
fn full_file_system_is_an_error_of_the_request_and_what_fits_still_works() {
    let Some(mount) = queues::SmallTmpfs::mount("256k") else { return };
    for engine in ENGINES {
        let path = mount.path().join("disk.raw");
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let image = Arc::new(RawOptions::new().open(&path).unwrap());
        let Some(mut queue) = queue(&image, engine, 4) else { continue };
        let view = GuestMem::anonymous(1 << 20).unwrap().view();
        let large = [view.get_slice(GuestAddress(0), 1 << 20).unwrap()];
        let small = [view.get_slice(GuestAddress(0), 4096).unwrap()];
        run(&mut *queue, &view, Op::Write { bufs: &small, offset: 8 << 20 }).unwrap();
        let error = run(&mut *queue, &view, Op::Write { bufs: &large, offset: 0 }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{engine:?}");
        let error =
            run(&mut *queue, &view, Op::WriteZeroes { offset: 0, len: 4 << 20, unmap: false }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{engine:?}");
        run(&mut *queue, &view, Op::Write { bufs: &small, offset: 8 << 20 }).unwrap();
        run(&mut *queue, &view, Op::Discard { offset: 0, len: 16 << 20 }).unwrap();
        run(&mut *queue, &view, Op::Write { bufs: &small, offset: 0 }).unwrap();
        drop((queue, image));
        std::fs::remove_file(&path).unwrap();
    }
}
