//! Raw images as a block device uses them, and what is refused.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use freestone_block::{Error, Image, RawImage, RawOptions};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn file(dir: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("disk.raw");
    File::create(&path).unwrap().write_all(bytes).unwrap();
    path
}

fn writable(path: &Path) -> Result<RawImage, Error> {
    RawOptions::new().open(path)
}

fn read_only(path: &Path) -> Result<RawImage, Error> {
    RawOptions::new().read_only(true).open(path)
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    let dir = folder();
    let path = file(&dir, &[0; 4096]);
    let disk = writable(&path).unwrap();
    assert!(!disk.read_only());
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    let view = mem.view();
    view.write_slice(&[3; 300], GuestAddress(0x1000)).unwrap();
    view.write_slice(&[4; 212], GuestAddress(0x3000)).unwrap();
    let slice = |at, len| view.get_slice(GuestAddress(at), len).unwrap();
    disk.write_vectored_at(&[slice(0x1000, 300), slice(0x3000, 212)], 3584).unwrap();
    disk.flush().unwrap();
    disk.read_vectored_at(&[slice(0x5000, 512)], 3584).unwrap();
    assert_eq!(view.read_obj::<[u8; 2]>(GuestAddress(0x5000 + 299)).unwrap(), [3, 4]);
    assert_eq!(std::fs::read(&path).unwrap(), [vec![0; 3584], vec![3; 300], vec![4; 212]].concat());
}

#[test]
fn the_size_is_rounded_down_to_whole_sectors() {
    let dir = folder();
    let disk = writable(&file(&dir, &[0; 1500])).unwrap();
    assert_eq!((disk.size(), disk.unused_bytes()), (1024, 476));
    let even = folder();
    let disk = writable(&file(&even, &[0; 1536])).unwrap();
    assert_eq!((disk.size(), disk.unused_bytes()), (1536, 0));
}

#[test]
fn less_than_a_sector_is_no_disk() {
    for len in [0, 1, 511] {
        let dir = folder();
        let error = writable(&file(&dir, &vec![0; len])).unwrap_err();
        assert!(matches!(error, Error::TooSmall { size, .. } if size == len as u64), "{error}");
        assert!(error.to_string().contains(&format!("has {len} bytes")), "{error}");
    }
}

#[test]
fn accesses_beyond_the_end_are_refused() {
    let dir = folder();
    let path = file(&dir, &[0; 1100]);
    let disk = writable(&path).unwrap();
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    let view = mem.view();
    let slice = view.get_slice(GuestAddress(0), 512).unwrap();
    for offset in [513, 1024, u64::MAX, u64::MAX - 511] {
        let error = disk.read_vectored_at(&[slice], offset).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        disk.write_vectored_at(&[slice], offset).unwrap_err();
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1100, "the file did not grow");
}

#[test]
fn a_file_that_shrank_gives_an_error_and_not_zeros() {
    let dir = folder();
    let path = file(&dir, &[1; 4096]);
    let disk = writable(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
    let mem = GuestMem::anonymous(0x1_0000).unwrap();
    let view = mem.view();
    for (offset, len) in [(512, 1024), (2048, 512)] {
        let slice = view.get_slice(GuestAddress(0), len).unwrap();
        let error = disk.read_vectored_at(&[slice], offset).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{offset}");
    }
}

#[test]
fn a_read_only_image_refuses_writes_and_needs_no_flush() {
    let dir = folder();
    let path = file(&dir, &[5; 512]);
    let disk = read_only(&path).unwrap();
    assert!(disk.read_only());
    let mem = GuestMem::anonymous(0x1000).unwrap();
    let view = mem.view();
    let slice = view.get_slice(GuestAddress(0), 512).unwrap();
    let error = disk.write_vectored_at(&[slice], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    disk.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [5; 512]);
}

#[test]
fn a_missing_file_is_named() {
    let dir = folder();
    let error = writable(&dir.path().join("none.raw")).unwrap_err();
    assert!(error.to_string().ends_with("none.raw\": cannot open it"), "{error}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("No such file"), "{source}");
}

#[test]
fn what_is_no_disk_is_refused_and_said_to_be_what_it_is() {
    let dir = folder();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for (path, what) in [
        (dir.path(), "is a directory"),
        (&*socket, "is a socket"),
        (&*fifo, "is a FIFO"),
        (Path::new("/dev/null"), "is a character device"),
    ] {
        for result in [writable(path), read_only(path)] {
            let error = result.unwrap_err().to_string();
            assert_eq!(error, format!("disk {path:?} {what}"));
        }
    }
}

#[test]
fn a_file_that_only_cannot_be_written_says_how_to_attach_it() {
    // A program that runs cannot be written, not even by root.
    let path = std::env::current_exe().unwrap();
    let error = writable(&path).unwrap_err();
    assert!(matches!(error, Error::NotWritable { .. }), "{error}");
    assert!(error.to_string().contains("cannot be opened for writing: "), "{error}");
    assert!(error.to_string().ends_with("; add ,ro to attach it read-only"), "{error}");
    read_only(&path).unwrap();
}

#[test]
fn a_writer_excludes_everybody() {
    let dir = folder();
    let path = file(&dir, &[0; 512]);
    let first = writable(&path).unwrap();
    for result in [writable(&path), read_only(&path)] {
        let error = result.unwrap_err();
        assert_eq!(error.to_string(), format!("disk {path:?} is locked by another process"));
    }
    drop(first);
    writable(&path).unwrap();
}

#[test]
fn readers_share_and_exclude_writers() {
    let dir = folder();
    let path = file(&dir, &[0; 512]);
    let _readers = [read_only(&path).unwrap(), read_only(&path).unwrap()];
    assert!(matches!(writable(&path).unwrap_err(), Error::Locked { .. }));
}

#[test]
fn a_lock_can_be_done_without() {
    let dir = folder();
    let path = file(&dir, &[0; 512]);
    let _writer = writable(&path).unwrap();
    RawOptions::new().lock(false).open(&path).unwrap();
}

#[test]
fn size_is_taken_again_when_asked_for() {
    let dir = folder();
    let path = file(&dir, &[1; 4096]);
    let disk = writable(&path).unwrap();
    let resize = |len| File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
    resize(8192 + 100);
    assert_eq!(disk.size(), 4096);
    assert_eq!(disk.refresh_size().unwrap(), 8192);
    assert_eq!((disk.size(), disk.unused_bytes()), (8192, 100));
    resize(1024);
    assert_eq!(disk.refresh_size().unwrap(), 1024);
    let mem = GuestMem::anonymous(0x1000).unwrap();
    let view = mem.view();
    let bufs = [view.get_slice(GuestAddress(0), 512).unwrap()];
    disk.read_vectored_at(&bufs, 512).unwrap();
    assert_eq!(disk.read_vectored_at(&bufs, 1024).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn size_stays_when_the_file_has_no_sector_left() {
    let dir = folder();
    let path = file(&dir, &[1; 4096]);
    let disk = writable(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(511).unwrap();
    let error = disk.refresh_size().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("511"), "{error}");
    assert_eq!(disk.size(), 4096);
}

#[test]
fn blocks_of_a_file_are_those_of_its_file_system() {
    let dir = folder();
    let limits = writable(&file(&dir, &[1; 4096])).unwrap().limits();
    assert!(limits.physical_block.is_power_of_two() && limits.physical_block >= 512, "{limits:?}");
    assert!(limits.optimal_io.is_multiple_of(limits.physical_block), "{limits:?}");
    assert!(limits.write_zeroes);
}

#[test]
fn around_the_page_cache_any_alignment_works() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let content: Vec<u8> = (0..1 << 20).map(|i| u8::try_from(i / 7 % 251).unwrap()).collect();
    let path = file(&dir, &content);
    let disk = match RawOptions::new().direct(true).open(&path) {
        Ok(disk) => disk,
        Err(Error::Direct { source, .. }) => return println!("SKIP: {source}"),
        Err(error) => panic!("{error}"),
    };
    assert!(disk.direct());
    let mem = GuestMem::anonymous(2 << 20).unwrap();
    let view = mem.view();
    // Buffers at odd addresses; parts of sectors; more than is copied at once; and nothing.
    for (at, len, offset) in
        [(0, 512, 512), (3, 512, 1024), (0, 100, 700), (1, 900_001, 77), (4096, 4096, 8192), (9, 0, 5)]
    {
        let slice = view.get_slice(GuestAddress(at), len).unwrap();
        disk.read_vectored_at(&[slice], offset as u64).unwrap();
        let mut bytes = vec![0; len];
        view.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        assert_eq!(bytes, content[offset..offset + len], "{at} {len} {offset}");
    }
    let mut expected = content;
    for (at, len, offset) in [(3, 512, 1024), (0, 100, 700), (1, 600_001, 77), (4096, 4096, 8192)] {
        view.write_slice(&vec![u8::try_from(len % 255).unwrap(); len], GuestAddress(at)).unwrap();
        let (head, tail) = (len / 3, len - len / 3);
        let bufs = [(at, head), (at + head as u64, tail)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        disk.write_vectored_at(&bufs, offset as u64).unwrap();
        expected[offset..offset + len].fill(u8::try_from(len % 255).unwrap());
    }
    disk.flush().unwrap();
    assert!(std::fs::read(&path).unwrap() == expected);
}
