//! The runtime directory, and what is found in it.

use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, geteuid};

use super::claim::Claim;
use super::name::{Name, suggestion};
use super::note::{self, EndNote, Note};
use crate::failure::Failure;

/// Write permission of anybody but the owner.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The folder of all named machines of a user.
#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    folder: PathBuf,
}

impl Runtime {
    /// Finds the directory without a look at it: `$FREESTONE_RUNTIME_DIR`, `$XDG_RUNTIME_DIR/freestone`, `/run/freestone` for
    /// root, `/tmp/freestone-UID` for others.
    pub(crate) fn find() -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = set("FREESTONE_RUNTIME_DIR")
            .or_else(|| set("XDG_RUNTIME_DIR").map(|folder| folder.join("freestone")))
            .unwrap_or_else(|| match geteuid() {
                user if user.is_root() => "/run/freestone".into(),
                user => format!("/tmp/freestone-{}", user.as_raw()).into(),
            });
        Self { folder }
    }

    /// The same, made if it is not there, and checked to be this user's own.
    pub(crate) fn open() -> Result<Self, Failure> {
        let runtime = Self::find();
        match DirBuilder::new().recursive(true).mode(0o700).create(&runtime.folder) {
            // A link, or a file: the check says so.
            Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(Failure::new(format!(
                "cannot make the runtime directory {}: {e}",
                runtime.folder.display()
            ))),
            _ => Ok(()),
        }?;
        runtime.check()?;
        Ok(runtime)
    }

    /// Refuses a folder that others could put something into.
    fn check(&self) -> Result<(), Failure> {
        let refused = |why: &str| {
            Failure::new(format!("the runtime directory {} is refused: {why}", self.folder.display()))
        };
        let found = match fs::symlink_metadata(&self.folder) {
            Ok(found) => found,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(refused(&e.to_string())),
        };
        if !found.is_dir() {
            return Err(refused("it is not a directory"));
        }
        if found.uid() != geteuid().as_raw() {
            return Err(refused(&format!("it belongs to user {}", found.uid())));
        }
        if found.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(refused("others may write to it; chmod 700 mends that"));
        }
        Ok(())
    }

    /// The directory.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// All machines, by name.
    pub(crate) fn entries(&self) -> Result<Vec<Entry>, Failure> {
        self.check()?;
        let failed = |e| Failure::new(format!("cannot read {}: {e}", self.folder.display()));
        let listing = match fs::read_dir(&self.folder) {
            Ok(listing) => listing,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut entries = Vec::new();
        for found in listing {
            let found = found.map_err(failed)?;
            let name = found.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(name) = name
                && found.file_type().is_ok_and(|kind| kind.is_dir())
            {
                entries.push(Entry { name, folder: found.path() });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// The machine called `name`.
    pub(crate) fn entry(&self, name: &str) -> Result<Entry, Failure> {
        let entries = self.entries()?;
        let known = || entries.iter().map(|entry| entry.name.as_str());
        let unknown = || match (suggestion(name, known()), entries.is_empty()) {
            (Some(other), _) => format!("there is no machine {name:?}; did you mean {other:?}?"),
            (None, true) => format!("there is no machine {name:?}: there are none"),
            (None, false) => {
                let names: Vec<_> = known().collect();
                format!("there is no machine {name:?}; there are: {}", names.join(", "))
            }
        };
        entries
            .iter()
            .find(|entry| entry.name.as_str() == name)
            .cloned()
            .ok_or_else(|| Failure::new(unknown()))
    }

    /// Takes `name` for this process.
    pub(crate) fn claim(&self, name: &Name) -> Result<Claim, Failure> {
        Claim::take(name, self.folder.join(name.as_str()))
    }
}

/// What became of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Life {
    /// Its VMM, a process of this number, lives.
    Alive(Pid),
    /// It ended in order.
    Ended(EndNote),
    /// Its VMM was killed.
    Dead,
}

/// A machine's folder.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Its name.
    pub(crate) name: Name,
    folder: PathBuf,
}

impl Entry {
    /// A file of the machine.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The control socket.
    pub(crate) fn control(&self) -> PathBuf {
        self.file("control")
    }

    /// What the machine is made of, if it came so far.
    pub(crate) fn note(&self) -> Option<Note> {
        note::read(&self.file("config.json"))
    }

    /// What became of it.
    pub(crate) fn life(&self) -> Life {
        self.alive()
            .map(Life::Alive)
            .or_else(|| note::read(&self.file("exit.json")).map(Life::Ended))
            .unwrap_or(Life::Dead)
    }

    /// The VMM's process, if the lock is held.
    fn alive(&self) -> Option<Pid> {
        let mut lock = File::open(self.file("lock")).ok()?;
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => {}
            _ => return None,
        }
        let mut text = String::new();
        (&mut lock).take(32).read_to_string(&mut text).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }

    /// The VMM's process, or an error that says what became of it.
    pub(crate) fn pid(&self) -> Result<Pid, Failure> {
        match self.life() {
            Life::Alive(pid) => Ok(pid),
            Life::Ended(end) => Err(Failure::new(format!("{} is not running: {}", self.name, end.reason))),
            Life::Dead => Err(Failure::new(format!("{} is not running: its VMM was killed", self.name))),
        }
    }

    /// Removes what a VMM that was killed leaves behind but for what it wrote, so that nobody waits at its sockets.
    pub(crate) fn clean(&self) -> Result<(), Failure> {
        let claim = Claim::take(&self.name, self.folder.clone())?;
        claim.remove_sockets();
        claim.end("killed".to_owned(), 128 + 9)?;
        claim.leave();
        Ok(())
    }

    /// Removes the machine's folder and sockets. It must not run.
    pub(crate) fn remove(&self) -> Result<(), Failure> {
        Claim::take(&self.name, self.folder.clone())?.begin()
    }
}
