//! Writing a snapshot of a paused machine.

use std::path::{Path, PathBuf};

use freestone_hypervisor::{Hypervisor, Vm};
use freestone_memory::image;
use freestone_snapshot::{Arch, AtomicFile, Header, SnapshotFile, State};

use super::memory::{MemorySection, layout_of};
use super::{HostSection, Id, Tracker};
use crate::{Error, Paused, Result};

/// How much of memory a snapshot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// All of it.
    #[default]
    Full,
    /// What was written since the snapshot before, or since the snapshot that the machine was restored from.
    Diff,
}

/// Names of the two files of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorePaths {
    state: PathBuf,
    /// `None`: beside the state, by a name of its own.
    memory: Option<PathBuf>,
}

impl StorePaths {
    /// Two files, both named. When both are written anew over an older snapshot and the host crashes between the one
    /// and the other, they no longer fit, which a restore notices; [`in_folder`](Self::in_folder) has no such moment.
    pub fn files(state: impl Into<PathBuf>, memory: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), memory: Some(memory.into()) }
    }

    /// A folder of its own, in which the state is `state`. There is always the former snapshot or the new one in it.
    pub fn in_folder(folder: impl AsRef<Path>) -> Self {
        Self { state: folder.as_ref().join("state"), memory: None }
    }

    /// The state file.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The memory file, if it was named.
    pub fn memory(&self) -> Option<&Path> {
        self.memory.as_deref()
    }

    /// The memory file of a snapshot that says `section`.
    pub(super) fn memory_of(&self, section: &MemorySection) -> Result<PathBuf> {
        match (&self.memory, section.file()) {
            (Some(named), _) => Ok(named.clone()),
            // A name and no path: a snapshot opens nothing outside of its folder.
            (None, Some(name)) if Path::new(name).file_name().is_some_and(|only| only == name) => {
                Ok(self.folder().join(name))
            }
            (None, name) => Err(Error::Stored {
                path: self.state.clone(),
                reason: format!("it does not name its memory file ({name:?}): say which it is"),
            }),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        self.state.parent().unwrap_or(Path::new("."))
    }
}

/// How a snapshot is written.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StoreOptions {
    /// How much of memory.
    pub kind: Kind,
    /// Whether checksums of memory are kept, by which [`Stored::verify`](super::Stored::verify) finds damage.
    pub checksums: bool,
    /// Who writes: program and version, for people.
    pub program: String,
}

impl StoreOptions {
    /// All of memory, with checksums.
    pub fn new(program: impl Into<String>) -> Self {
        Self { kind: Kind::Full, checksums: true, program: program.into() }
    }
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreReport {
    /// The snapshot.
    pub id: Id,
    /// Bytes of memory that were written.
    pub written: u64,
    /// Bytes of guest memory in all.
    pub memory: u64,
    /// Bytes of the state.
    pub state: u64,
}

impl<H: Hypervisor> Paused<'_, H> {
    /// Writes a snapshot. `extra` are sections of the caller's own, such as the configuration by which it makes the devices again.
    /// `progress` is told bytes of memory done and in all.
    ///
    /// The files are written aside, synced and renamed: after a crash or a failure there is what was there before. The
    /// machine can go on in any case, and a difference that failed is not lost: the next one has it.
    ///
    /// # Errors
    /// As [`save`](Paused::save); [`Error::NotTracked`] for a difference without [`track`](Paused::track), or without a snapshot to be
    /// the difference to; [`Error::Memory`] or [`Error::Snapshot`] if a file cannot be written.
    pub fn store(
        &mut self,
        paths: &StorePaths,
        options: &StoreOptions,
        extra: State,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<StoreReport> {
        let id = Id::random().map_err(|source| Error::Io { op: "make up a name for a snapshot", source })?;
        let mut state = self.save()?;
        state.put(HostSection::here())?;
        state.absorb(extra)?;
        let layout = layout_of(self.memory())?;
        let base = match options.kind {
            Kind::Full => None,
            Kind::Diff => Some(self.tracker().and_then(|tracker| tracker.base).ok_or(Error::NotTracked)?),
        };
        let mut section = MemorySection::new(id, base, &layout);
        let memory_path = match paths.memory() {
            Some(path) => path.to_owned(),
            None => {
                let name = format!("memory-{}", id.short());
                let path = paths.folder().join(&name);
                section.file = Some(name);
                path
            }
        };
        // What was logged until now is in this snapshot, whatever its kind.
        self.collect()?;
        let aside = AtomicFile::create(&memory_path)?;
        let file = aside.file();
        let stats = match (options.kind, self.tracker()) {
            (Kind::Diff, Some(tracker)) => {
                let dirty = tracker.pages();
                let (stats, extents) =
                    image::write_diff(self.memory(), &layout, &dirty, file, options.checksums, progress)?;
                section.set_extents(&extents);
                stats
            }
            _ => image::write_full(self.memory(), &layout, file, options.checksums, progress)?,
        };
        let written = stats.bytes();
        section.checksums = stats.checksums;
        id.write_trailer(file, layout.size())?;
        state.put(&section)?;
        let mut stored = SnapshotFile::create(paths.state(), &Header::new(Arch::host(), &options.program)?)?;
        state.write_to(stored.writer())?;
        aside.commit()?;
        stored.finish()?;
        if let Some(tracker) = self.tracker_mut() {
            tracker.saved(id);
        }
        remove_former(paths, &memory_path);
        let state = u64::try_from(state.len()).unwrap_or(u64::MAX);
        Ok(StoreReport { id, written, memory: layout.size(), state })
    }

    /// Begins or ends the log of what guest and devices write, which differences need. What was logged before is forgotten. To
    /// log what devices write, the [memory](freestone_memory::GuestMemBuilder::dirty_log) must have been made so.
    ///
    /// # Errors
    /// [`Error::NotTracked`] if memory or hypervisor cannot log, or as the hypervisor fails.
    pub fn track(&mut self, on: bool) -> Result<()> {
        let machine = self.machine();
        let log = machine.vm.dirty_log().filter(|_| machine.memory.logs_dirty()).ok_or(Error::NotTracked)?;
        if on {
            let mut tracker = Tracker::default();
            tracker.start(log, &machine.memory)?;
            machine.tracker = Some(tracker);
        } else {
            Tracker::stop(log)?;
            machine.tracker = None;
        }
        Ok(())
    }

    /// Says that memory is now as snapshot `id` has it: the next difference is one to that.
    pub fn set_base(&mut self, id: Id) {
        if let Some(tracker) = self.tracker_mut() {
            tracker.saved(id);
        }
    }

    fn collect(&mut self) -> Result<()> {
        let machine = self.machine();
        match (&mut machine.tracker, machine.vm.dirty_log()) {
            (Some(tracker), Some(log)) => tracker.collect(log, &machine.memory),
            _ => Ok(()),
        }
    }

    fn tracker(&self) -> Option<&Tracker> {
        self.machine_ref().tracker.as_ref()
    }

    fn tracker_mut(&mut self) -> Option<&mut Tracker> {
        self.machine().tracker.as_mut()
    }
}

/// Removes the memory files of former snapshots of this folder. What cannot be removed does no harm.
pub(super) fn remove_former(paths: &StorePaths, keep: &Path) {
    if paths.memory().is_some() {
        return;
    }
    for entry in std::fs::read_dir(paths.folder()).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_str().is_some_and(|name| {
            name.strip_prefix("memory-")
                .is_some_and(|id| id.len() == 8 && id.bytes().all(|b| b.is_ascii_hexdigit()))
        });
        if ours && path != keep {
            // A restored machine may still have it mapped, and keeps it.
            drop(std::fs::remove_file(path));
        }
    }
}
