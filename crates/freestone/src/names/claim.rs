//! A name that is taken: the lock on its folder.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::name::Name;
use super::note::{self, EndNote, Note};
use crate::failure::Failure;

/// The file that is locked.
const LOCK: &str = "lock";
/// Sockets in the folder.
const SOCKETS: [&str; 2] = ["control", "console"];
/// How often the lock is tried: whoever lists machines holds it for a moment.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// A name and its folder, which no other process has while this lives. Dropping it removes the folder, if it was not
/// [left](Self::leave).
#[derive(Debug)]
pub(crate) struct Claim {
    name: Name,
    folder: PathBuf,
    lock: File,
    keep: bool,
}

impl Claim {
    /// Locks the folder, which is made if it is not there.
    pub(super) fn take(name: &Name, folder: PathBuf) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| Failure::new(format!("cannot use {}: {e}", folder.display()));
        for _ in 0..TRIES {
            match DirBuilder::new().mode(0o700).create(&folder) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed(e)),
                _ => {}
            }
            if !fs::symlink_metadata(&folder).map_err(failed)?.is_dir() {
                return Err(Failure::new(format!("cannot use {}: it is not a directory", folder.display())));
            }
            let lock = match open_lock(&folder) {
                // Somebody removes the folder just now.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                opened => opened.map_err(failed)?,
            };
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => sleep(PAUSE),
                Err(e) => return Err(failed(e.into())),
                // The file may have been removed by who had the lock before.
                Ok(()) if is_at(&lock, &folder) => {
                    let mut claim = Self { name: name.clone(), folder, lock, keep: true };
                    claim.sign()?;
                    return Ok(claim);
                }
                Ok(()) => {}
            }
        }
        let by = fs::read_to_string(folder.join(LOCK)).unwrap_or_default();
        Err(Failure::new(format!(
            "the name {:?} is taken by a machine (process {})",
            name.as_str(),
            by.trim()
        )))
    }

    /// Takes over the lock that the process which started this one has.
    pub(crate) fn inherit(name: &Name, folder: PathBuf, lock: OwnedFd) -> Result<Self, Failure> {
        let lock = File::from(lock);
        if !is_at(&lock, &folder) || flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Failure::usage("this is not how a machine is detached: see --detach"));
        }
        let mut claim = Self { name: name.clone(), folder, lock, keep: true };
        claim.sign()?;
        Ok(claim)
    }

    /// Notes who has the lock.
    fn sign(&mut self) -> Result<(), Failure> {
        let signed = (|| {
            self.lock.set_len(0)?;
            self.lock.rewind()?;
            self.lock.write_all(format!("{}\n", std::process::id()).as_bytes())
        })();
        signed.map_err(|e| Failure::new(format!("cannot write {}: {e}", self.file(LOCK).display())))
    }

    /// Removes what a machine of that name left, and has the folder go when this is dropped.
    pub(crate) fn begin(&mut self) -> Result<(), Failure> {
        self.remove_sockets();
        self.keep = false;
        self.empty().map_err(|e| Failure::new(format!("cannot empty {}: {e}", self.folder.display())))
    }

    /// Removes the sockets that a VMM which was killed left behind, here and elsewhere.
    pub(super) fn remove_sockets(&self) {
        let noted: Option<Note> = note::read(&self.file("config.json"));
        let outside = noted.map(|note| note.sockets).unwrap_or_default();
        let inside = SOCKETS.iter().map(|name| self.file(name));
        for path in outside.into_iter().map(PathBuf::from).chain(inside) {
            remove_socket(&path);
        }
    }

    /// The name.
    pub(crate) fn name(&self) -> &Name {
        &self.name
    }

    /// A file of the machine.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The lock, for the process that is to inherit it.
    pub(crate) fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Notes what the machine is made of.
    pub(crate) fn note(&self, note: Note) -> Result<(), Failure> {
        note::write(&self.file("config.json"), &Note { started: note::now(), ..note })
    }

    /// Notes how the machine ended.
    pub(crate) fn end(&self, reason: String, status: u8) -> Result<(), Failure> {
        note::write(&self.file("exit.json"), &EndNote { reason, status, at: note::now() })
    }

    /// Gives the name back and leaves the folder as it is.
    pub(crate) fn leave(mut self) {
        self.keep = true;
    }

    /// Removes all but the lock.
    fn empty(&self) -> std::io::Result<()> {
        for found in fs::read_dir(&self.folder)? {
            let found = found?;
            match found.file_type()?.is_dir() {
                true => fs::remove_dir_all(found.path())?,
                false if found.file_name() == LOCK => {}
                false => fs::remove_file(found.path())?,
            }
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // The lock goes while it is held, so that nobody gets one that leads nowhere; then who is quicker may have the folder.
        let removed = self.empty().and_then(|()| fs::remove_file(self.file(LOCK)));
        if let Err(error) = removed.and_then(|()| fs::remove_dir(&self.folder)) {
            tracing::debug!(%error, folder = ?self.folder, "the machine's folder stays behind");
        }
    }
}

fn open_lock(folder: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(folder.join(LOCK))
}

/// Whether the lock is the file of that folder.
fn is_at(lock: &File, folder: &Path) -> bool {
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((lock.metadata(), fs::symlink_metadata(folder.join(LOCK))), (Ok(a), Ok(b)) if same(&a, &b))
}

/// Removes a socket that nobody listens at.
fn remove_socket(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let refused = |e: std::io::Error| e.kind() == ErrorKind::ConnectionRefused;
    if is_socket
        && UnixStream::connect(path).is_err_and(refused)
        && let Err(error) = fs::remove_file(path)
    {
        tracing::debug!(%error, ?path, "a socket stays behind");
    }
}
