//! Snapshots as files: there is always the former one or the new one, whole.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Header, Limits, Reader, Result, Writer};

const PREFIX: &str = ".freestone-snapshot-";
const SUFFIX: &str = ".partial";
/// How often another name is tried for a file aside.
const ATTEMPTS: u32 = 32;

/// A file that appears under its name only when it is whole.
///
/// It is written aside in the same folder, with mode 0600, and [`commit`](Self::commit) moves it to its place. Dropped before,
/// it is removed. A process that is killed leaves the file aside behind: it is unlocked, and the next
/// [`create`](Self::create) in this folder removes it.
#[derive(Debug)]
pub struct AtomicFile {
    stream: BufWriter<File>,
    aside: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl AtomicFile {
    /// Opens a file aside, to become `path`. The folder must exist. A link at `path` would be replaced, not followed.
    ///
    /// # Errors
    ///
    /// [`Error::File`], also if there is something at `path` that is neither a file nor a link.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = std::path::absolute(path).map_err(Error::file("find", path))?;
        let kind = fs::symlink_metadata(&path).map(|metadata| metadata.file_type());
        if path.file_name().is_none() || kind.is_ok_and(|kind| !kind.is_file() && !kind.is_symlink()) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file");
            return Err(Error::File { op: "create", path, source });
        }
        remove_leftovers(folder_of(&path));
        for _ in 0..ATTEMPTS {
            let aside = aside_in(folder_of(&path));
            match create_locked(&aside) {
                Ok(Some(file)) => {
                    let stream = BufWriter::new(file);
                    return Ok(Self { stream, aside, path, committed: false });
                }
                Ok(None) => {}
                Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {}
                Err(source) => return Err(Error::File { op: "create", path: aside, source }),
            }
        }
        let source = io::ErrorKind::AlreadyExists.into();
        Err(Error::File { op: "find a free name beside", path, source })
    }

    /// The file aside, to write to it at offsets. What was written through [`Write`] and not flushed is not in it yet.
    #[must_use]
    pub fn file(&self) -> &File {
        self.stream.get_ref()
    }

    /// Writes everything to the disk, moves the file to its name, and writes the folder to the disk.
    ///
    /// # Errors
    ///
    /// [`Error::File`]. What was at the path before is still there, except if it is the last step that failed: then the new
    /// file is there, and only a crash of the host could bring the former one back.
    pub fn commit(mut self) -> Result<()> {
        self.stream.flush().map_err(Error::file("write", &self.aside))?;
        self.stream.get_ref().sync_all().map_err(Error::file("sync", &self.aside))?;
        fs::rename(&self.aside, &self.path).map_err(Error::file("move a file to", &self.path))?;
        self.committed = true;
        let folder = folder_of(&self.path);
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::file("sync", folder))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.stream.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nobody is left to hear of a failure, and the next `create` tries again.
            let _ = fs::remove_file(&self.aside);
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

fn aside_in(folder: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    folder.join(format!("{PREFIX}{}-{number}{SUFFIX}", process::id()))
}

/// Creates a file with a lock that says that somebody is writing it. `None` if a sweep was quicker.
fn create_locked(path: &Path) -> io::Result<Option<File>> {
    // Read as well: who brings differences into a file computes checksums of what it has then.
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(None),
        // Without locks nothing is swept either.
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    let own = file.metadata()?;
    let same =
        fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (own.dev(), own.ino()));
    Ok(same.then_some(file))
}

/// Removes the files of writers that are no more. What cannot be removed does no harm.
fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if is_aside(&entry.file_name()) && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let options = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = OpenOptions::new().write(true).custom_flags(options).open(&path);
            // The lock is held until the file is gone: its writer, if one comes, sees that it was swept.
            if file.as_ref().is_ok_and(|file| file.try_lock().is_ok()) {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

fn is_aside(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX))
}

/// A snapshot that is being written to a file, which is there under its name only when it is whole.
#[derive(Debug)]
pub struct SnapshotFile {
    writer: Writer<AtomicFile>,
}

impl SnapshotFile {
    /// Begins a snapshot that [`finish`](Self::finish) puts at `path`. Dropped before, it leaves nothing behind, and what is at
    /// `path` stays.
    ///
    /// # Errors
    ///
    /// [`Error::File`] or [`Error::Io`].
    pub fn create(path: impl AsRef<Path>, header: &Header) -> Result<Self> {
        Ok(Self { writer: Writer::new(AtomicFile::create(path)?, header)? })
    }

    /// To write sections with.
    pub fn writer(&mut self) -> &mut Writer<AtomicFile> {
        &mut self.writer
    }

    /// Ends the snapshot and puts it in its place.
    ///
    /// # Errors
    ///
    /// Those of [`Writer::finish`] and [`AtomicFile::commit`]. The snapshot that was there before is still there.
    pub fn finish(self) -> Result<()> {
        self.writer.finish()?.commit()
    }

    /// Opens a snapshot to read. The file must end where the snapshot does.
    ///
    /// # Errors
    ///
    /// [`Error::File`], and those of [`Reader::new`].
    pub fn open(path: impl AsRef<Path>, limits: Limits) -> Result<Reader<BufReader<File>>> {
        let path = path.as_ref();
        let file = File::open(path).map_err(Error::file("open", path))?;
        Reader::whole_file(BufReader::with_capacity(64 << 10, file), limits)
    }
}
