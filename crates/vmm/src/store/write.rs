//! Writing a snapshot of a paused machine.

use std::fs::File;
use std::path::{Path, PathBuf};

use freestone_hypervisor::{Hypervisor, Vm};
use freestone_memory::image::{self, ImageLayout};
use freestone_snapshot::{Arch, AtomicFile, Header, Limits, Sections, SnapshotFile, State};
use rustix::fs::FlockOperation;

use super::id::TRAILER;
use super::memory::{MemorySection, layout_of};
use super::{HostSection, Id, Tracker};
use crate::{Error, Paused, Result};

/// With what the names of memory files in folders begin.
const PREFIX: &str = "memory-";
/// The most that a state file may be. What would be more is not written.
pub(super) const LIMITS: Limits =
    Limits { sections: 1 << 14, in_memory: 64 << 20, section: u64::MAX, total: u64::MAX };

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
    /// Two files, both named. While both are written anew over an older snapshot, its memory is kept beside as `MEMORY.former`, which a
    /// restore takes if a crash came between the one and the other, and which the next snapshot removes. On file systems without hard
    /// links there is such a moment, which a restore notices; [`in_folder`](Self::in_folder) never has one.
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

    /// Where the memory of the snapshot that is in place is kept while it is replaced by another of the same name.
    pub(super) fn former(&self) -> Option<PathBuf> {
        let mut name = self.memory.clone()?.into_os_string();
        name.push(".former");
        Some(name.into())
    }

    /// Where the memory of a snapshot that is written goes; `section` is told if it is to say so.
    pub(super) fn memory_for(&self, section: &mut MemorySection) -> PathBuf {
        self.memory.clone().unwrap_or_else(|| {
            let name = format!("{PREFIX}{}", section.id.short());
            let path = self.folder().join(&name);
            section.file = Some(name);
            path
        })
    }

    pub(super) fn folder(&self) -> &Path {
        // The parent of a bare name is empty.
        self.state.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
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
        let _lock = lock(paths)?;
        sweep(paths);
        let id = Id::random().map_err(|source| Error::Io { op: "make up a name for a snapshot", source })?;
        let mut state = self.save()?;
        state.put(HostSection::here())?;
        state.absorb(extra)?;
        let layout = layout_of(self.memory())?;
        let base = match options.kind {
            Kind::Full => None,
            Kind::Diff => Some(self.base(&layout)?),
        };
        let mut section = MemorySection::new(id, base, &layout);
        let memory_path = paths.memory_for(&mut section);
        if let Some(base) = base {
            refuse_over(paths, base)?;
        }
        // What was logged until now is in this snapshot, whatever its kind.
        self.collect()?;
        let aside = AtomicFile::create(&memory_path)?;
        let file = aside.file();
        let stats = match (options.kind, self.tracker()) {
            (Kind::Diff, Some(tracker)) => {
                let dirty = tracker.pages(&layout);
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
        place(paths, &state, &Header::new(Arch::host(), &options.program)?, aside)?;
        let memory = layout.size();
        if let Some(tracker) = self.tracker_mut() {
            tracker.saved(id, layout);
        }
        let state = u64::try_from(state.len()).unwrap_or(u64::MAX);
        Ok(StoreReport { id, written, memory, state })
    }

    /// Begins or ends the log of what guest and devices write, which differences need. What was logged before is forgotten. To
    /// log what devices write, the [memory](freestone_memory::GuestMemBuilder::dirty_log) must have been made so.
    ///
    /// # Errors
    /// [`Error::NotTracked`] if memory or hypervisor cannot log, or as the hypervisor fails.
    pub fn track(&mut self, on: bool) -> Result<()> {
        if on {
            let tracker = self.start(false)?;
            self.machine().tracker = Some(tracker);
        } else {
            let machine = self.machine();
            machine.tracker = None;
            Tracker::stop(machine.vm.dirty_log().ok_or(Error::NotTracked)?)?;
        }
        Ok(())
    }

    /// Begins to log in a machine that was just restored from snapshot `id`: the next difference is one to that. What devices wrote as
    /// they were restored is in it. To be called before memory is [filled](super::Stored::fill), which is no difference.
    ///
    /// # Errors
    /// As [`track`](Self::track); [`Error::Memory`] if the memory is none that a snapshot can be of.
    pub fn track_since(&mut self, id: Id) -> Result<()> {
        let layout = layout_of(self.memory())?;
        let mut tracker = self.start(true)?;
        tracker.since(id, layout);
        self.machine().tracker = Some(tracker);
        Ok(())
    }

    fn start(&mut self, keep: bool) -> Result<Tracker> {
        let machine = self.machine();
        let log = machine.vm.dirty_log().filter(|_| machine.memory.logs_dirty()).ok_or(Error::NotTracked)?;
        let mut tracker = Tracker::default();
        tracker.start(log, &machine.memory, keep)?;
        Ok(tracker)
    }

    /// The snapshot that a difference of memory of this layout is one to.
    fn base(&self, layout: &ImageLayout) -> Result<Id> {
        let (id, known) =
            self.tracker().and_then(|tracker| tracker.base.as_ref()).ok_or(Error::NotTracked)?;
        // Nobody could bring it into its base.
        if known == layout { Ok(*id) } else { Err(differs(known, layout)) }
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

/// Both differ in which memory there is.
pub(super) fn differs(saved: &ImageLayout, built: &ImageLayout) -> Error {
    let show = |layout: &ImageLayout| format!("{} bytes in {} ranges", layout.size(), layout.ranges().len());
    Error::Differs { what: "layout of memory", saved: show(saved), built: show(built) }
}

/// Refuses to write a difference over the very snapshot that it is the difference to: neither would be of use then.
fn refuse_over(paths: &StorePaths, base: Id) -> Result<()> {
    let reason = || "it is what the difference is to, which is needed: write it to another place".to_owned();
    if present(paths.state()).is_some_and(|section| section.id == base) {
        return Err(Error::Stored { path: paths.state().to_owned(), reason: reason() });
    }
    match paths.memory() {
        Some(path) if id_of(path) == Some(base) => {
            Err(Error::Stored { path: path.to_owned(), reason: reason() })
        }
        _ => Ok(()),
    }
}

/// What the snapshot says of its memory whose state file this is, if it can be read.
fn present(state: &Path) -> Option<MemorySection> {
    Sections::load(SnapshotFile::open(state, LIMITS).ok()?).ok()?.take().ok()
}

/// Puts the files of a snapshot in their places: the memory, which is written, and then the state that names it.
pub(super) fn place(paths: &StorePaths, state: &State, header: &Header, memory: AtomicFile) -> Result<()> {
    let sections = state.names().count();
    if state.len() as u64 > LIMITS.in_memory || sections as u64 > u64::from(LIMITS.sections) {
        let reason = format!("a state of {} bytes in {sections} sections could not be restored", state.len());
        return Err(Error::Stored { path: paths.state().to_owned(), reason });
    }
    let mut stored = SnapshotFile::create(paths.state(), header)?;
    state.write_to(stored.writer())?;
    keep_former(paths);
    let placed = memory.commit().and_then(|()| stored.finish());
    // Of the former snapshot or, if it failed, of this one.
    sweep(paths);
    Ok(placed?)
}

/// The snapshot of a memory file.
fn id_of(path: &Path) -> Option<Id> {
    let file = image::open(path).ok()?;
    let len = file.metadata().ok()?.len().checked_sub(TRAILER as u64)?;
    Id::of_memory(&file, len).ok()?
}

/// Keeps the memory that belongs to the state in place, unless that is kept already since a crash. Where it cannot be kept, there is a
/// moment at which the files do not fit.
fn keep_former(paths: &StorePaths) {
    let (Some(memory), Some(former)) = (paths.memory(), paths.former()) else { return };
    let Some(section) = present(paths.state()) else { return };
    if id_of(memory) == Some(section.id) {
        drop(std::fs::remove_file(&former));
        if let Err(error) = std::fs::hard_link(memory, &former) {
            tracing::debug!(%error, path = %former.display(), "the former memory cannot be kept");
        }
    }
}

/// Keeps others from writing to the same folder as long as the file is there. File systems without locks do without.
pub(super) fn lock(paths: &StorePaths) -> Result<Option<File>> {
    if paths.memory().is_some() {
        return Ok(None);
    }
    let folder = match File::open(paths.folder()) {
        Ok(folder) => folder,
        Err(source) => return Err(Error::Io { op: "open the folder of a snapshot", source }),
    };
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Stored {
            path: paths.folder().to_owned(),
            reason: "another snapshot is just being written there".to_owned(),
        }),
        _ => Ok(Some(folder)),
    }
}

/// Removes the memory files of a folder that are not of its snapshot: of former ones, and of such as never became one because their
/// writer was killed. What cannot be removed does no harm.
pub(super) fn sweep(paths: &StorePaths) {
    if let (Some(memory), Some(former)) = (paths.memory(), paths.former()) {
        let needs = |path| present(paths.state()).is_some_and(|section| id_of(path) == Some(section.id));
        if id_of(&former).is_some() && needs(memory) {
            drop(std::fs::remove_file(former));
        }
        return;
    }
    let keep = match present(paths.state()) {
        Some(section) => section.file,
        None if std::fs::symlink_metadata(paths.state())
            .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) =>
        {
            None
        }
        // It cannot be told what belongs to it.
        None => return,
    };
    for entry in std::fs::read_dir(paths.folder()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| {
            let id = name.strip_prefix(PREFIX);
            id.is_some_and(|id| id.len() == 8 && id.bytes().all(|b| b.is_ascii_hexdigit()))
                && keep.as_deref() != Some(name)
        });
        if ours {
            // A restored machine may still have it mapped, and keeps it.
            drop(std::fs::remove_file(entry.path()));
        }
    }
}
