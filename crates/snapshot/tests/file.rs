//! Files: whole or not there, whatever happens on the way.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Note, header, machine, read, write};
use freestone_snapshot::{AtomicFile, Error, Limits, Sections, SnapshotFile, Writer};

/// Set for the tests' own child processes: where they write.
const CHILD: &str = "FREESTONE_SNAPSHOT_TEST_PATH";

fn save(path: &Path, text: &str) -> freestone_snapshot::Result<()> {
    let mut file = SnapshotFile::create(path, &header())?;
    file.writer().write(&Note(text.into()))?;
    file.finish()
}

fn text(path: &Path) -> String {
    let reader = SnapshotFile::open(path, Limits::default()).unwrap();
    Sections::load(reader).unwrap().take::<Note>().unwrap().0
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_finished_snapshot_takes_the_place_of_the_former_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    save(&path, "first").unwrap();
    save(&path, "second").unwrap();
    assert_eq!(text(&path), "second");
    assert_eq!(names(folder.path()), ["vm"]);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn a_file_has_the_bytes_of_a_stream() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(&write(&machine())).unwrap();
    file.commit().unwrap();
    assert_eq!(read(&fs::read(&path).unwrap()).unwrap(), machine());
    let info = SnapshotFile::open(&path, Limits::default()).unwrap().info().unwrap();
    assert_eq!(info.length, fs::metadata(&path).unwrap().len());
}

#[test]
fn an_unfinished_snapshot_leaves_nothing_and_the_former_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    save(&path, "first").unwrap();
    let mut file = SnapshotFile::create(&path, &header()).unwrap();
    file.writer().write(&Note("second".into())).unwrap();
    assert_eq!(names(folder.path()).len(), 2);
    assert_eq!(text(&path), "first");
    drop(file);
    assert_eq!(names(folder.path()), ["vm"]);
    assert_eq!(text(&path), "first");
}

#[test]
fn a_section_that_was_not_finished_never_becomes_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    let mut file = SnapshotFile::create(&path, &header()).unwrap();
    drop(file.writer().section("memory", 1, false).unwrap());
    assert!(matches!(file.finish(), Err(Error::Broken { .. })));
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn two_writers_do_not_disturb_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    let mut first = SnapshotFile::create(&path, &header()).unwrap();
    let mut second = SnapshotFile::create(&path, &header()).unwrap();
    first.writer().write(&Note("first".into())).unwrap();
    second.writer().write(&Note("second".into())).unwrap();
    second.finish().unwrap();
    assert_eq!(text(&path), "second");
    first.finish().unwrap();
    assert_eq!(text(&path), "first");
}

#[test]
fn a_link_is_replaced_and_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let (target, path) = (folder.path().join("target"), folder.path().join("vm"));
    fs::write(&target, "precious").unwrap();
    symlink(&target, &path).unwrap();
    save(&path, "new").unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    assert!(fs::symlink_metadata(&path).unwrap().is_file());
}

#[test]
fn a_folder_or_a_device_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path(), Path::new("/dev/null"), Path::new("/")] {
        assert!(matches!(AtomicFile::create(path), Err(Error::File { op: "create", .. })));
    }
    let missing = folder.path().join("no/such");
    assert!(matches!(AtomicFile::create(missing), Err(Error::File { .. })));
}

#[test]
fn a_file_that_goes_on_behind_the_end_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    let mut bytes = write(&machine());
    let offset = u64::try_from(bytes.len()).unwrap();
    bytes.push(0);
    fs::write(&path, bytes).unwrap();
    let open = || SnapshotFile::open(&path, Limits::default()).unwrap();
    for error in
        [open().verify().unwrap_err(), open().info().unwrap_err(), Sections::load(open()).unwrap_err()]
    {
        assert!(matches!(error, Error::Trailing { offset: at } if at == offset), "{error:?}");
    }
}

#[test]
fn a_full_device_is_an_error_of_a_stream() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = Writer::new(full, &header()).unwrap_err();
    assert!(is_full(&error), "{error:?}");
}

/// Runs a test again as a child, in a process of its own, through `wrap`. There it plays the other part.
fn child(test: &str, path: &Path, wrap: &[&str]) -> Command {
    let own = std::env::current_exe().unwrap();
    let mut words: Vec<PathBuf> = wrap.iter().map(PathBuf::from).collect();
    words.push(own);
    let mut command = Command::new(words.remove(0));
    command.args(words).args(["--exact", test, "--nocapture"]).env(CHILD, path);
    command
}

/// Where to write, in a child.
fn child_path() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

fn write_and_wait(path: &Path) {
    let mut file = SnapshotFile::create(path, &header()).unwrap();
    let mut section = file.writer().section("memory", 1, false).unwrap();
    section.write_all(&vec![1; 1 << 20]).unwrap();
    section.flush().unwrap();
    println!("\nwritten");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn killed_writers_leave_the_former_snapshot_and_are_swept() {
    if let Some(path) = child_path() {
        return write_and_wait(&path);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    save(&path, "first").unwrap();
    let mut writer = child("killed_writers_leave_the_former_snapshot_and_are_swept", &path, &[])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(writer.stdout.take().unwrap()).lines();
    assert!(lines.map(Result::unwrap).any(|line| line == "written"));
    // While it lives, its file stays, whoever else writes.
    save(&path, "second").unwrap();
    assert_eq!(names(folder.path()).len(), 2);
    writer.kill().unwrap();
    writer.wait().unwrap();
    assert_eq!(text(&path), "second");
    assert_eq!(names(folder.path()).len(), 2);
    save(&path, "third").unwrap();
    assert_eq!(text(&path), "third");
    assert_eq!(names(folder.path()), ["vm"]);
}

fn is_full(error: &Error) -> bool {
    let (Error::File { source, .. } | Error::Io { source, .. }) = error else { return false };
    source.kind() == std::io::ErrorKind::StorageFull
}

fn fill_the_disk(path: &Path) {
    save(path, "first").unwrap();
    let fill = || {
        let mut file = SnapshotFile::create(path, &header())?;
        let mut section = file.writer().section("memory", 1, false)?;
        let written = section.write_all(&vec![1; 4 << 20]);
        written.map_err(|source| Error::File { op: "fill", path: path.into(), source })?;
        section.finish()?;
        file.finish()
    };
    let error = fill().unwrap_err();
    assert!(is_full(&error), "{error:?}");
    // What only the last flush writes does not fit either.
    fs::write(path.with_file_name("rest"), vec![0; 4 << 20]).unwrap_err();
    let error = save(path, "second").unwrap_err();
    assert!(is_full(&error), "{error:?}");
    assert_eq!(text(path), "first");
    assert_eq!(names(path.parent().unwrap()), ["rest", "vm"]);
    println!("\nfull disk seen");
}

#[test]
fn a_full_disk_leaves_the_former_snapshot() {
    if let Some(path) = child_path() {
        return fill_the_disk(&path);
    }
    let folder = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=1m none \"$(dirname \"$FREESTONE_SNAPSHOT_TEST_PATH\")\" && exec \"$0\" \"$@\"";
    let wrap = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"];
    let probe = Command::new(wrap[0]).args(&wrap[1..]).arg("mount -t tmpfs none /tmp").output();
    if !probe.is_ok_and(|output| output.status.success()) {
        println!("SKIP: no user namespaces with mounts here");
        return;
    }
    let wrap = [wrap.as_slice(), &[mount]].concat();
    let output =
        child("a_full_disk_leaves_the_former_snapshot", &folder.path().join("vm"), &wrap).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && stdout.contains("full disk seen"), "{output:?}");
}
