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
