//! A snapshot that is there: looked at, verified, restored from.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freestone_hypervisor::Hypervisor;
use freestone_memory::image::{self, Extents, ImageLayout};
use freestone_memory::layout::RamRange;
use freestone_memory::{GuestMem, GuestMemBuilder};
use freestone_snapshot::{Arch, Limits, Sections, SnapshotFile};

use rustix::fs::SealFlags;

use super::Id;
use super::memory::MemorySection;
use super::write::StorePaths;
use crate::saved::MachineSection;
use crate::{Error, Machine, Result};

/// A snapshot whose state was read and checked, and whose memory file is open, unless it was opened by its
/// [state](Self::open_state) alone.
#[derive(Debug)]
pub struct Stored {
    pub(super) sections: Sections,
    pub(super) section: MemorySection,
    pub(super) layout: ImageLayout,
    pub(super) extents: Extents,
    pub(super) machine: MachineSection,
    memory: Option<Arc<File>>,
    path: PathBuf,
}

impl Stored {
    /// Opens a snapshot. The state is read whole; of the memory nothing is read but what says that it belongs to the state.
    ///
    /// # Errors
    /// [`Error::Snapshot`] if the state is damaged or not for this version or architecture; [`Error::Memory`] if the memory file
    /// cannot be opened; [`Error::Stored`] if it is of another snapshot.
    pub fn open(paths: &StorePaths) -> Result<Self> {
        let mut stored = Self::open_state(paths.state())?;
        let path = paths.memory_of(&stored.section)?;
        let memory = image::open(&path).map_err(|source| Error::File { path: path.clone(), source })?;
        stored.path = path;
        stored.check_memory(&memory)?;
        stored.memory = Some(Arc::new(memory));
        Ok(stored)
    }

    /// Opens the state of a snapshot whose memory is elsewhere: with a page server, for one.
    ///
    /// # Errors
    /// As [`open`](Self::open), of the state.
    pub fn open_state(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let reader = SnapshotFile::open(path, Limits::default())?;
        reader.header().check_arch(Arch::host())?;
        let mut sections = Sections::load(reader)?;
        let section: MemorySection = sections.take()?;
        let machine: MachineSection = sections.peek()?;
        let layout = section.layout()?;
        machine.check_layout(&layout)?;
        let extents = section.extents(&layout)?;
        Ok(Self { sections, section, layout, extents, machine, memory: None, path: path.to_owned() })
    }

    fn check_memory(&self, memory: &File) -> Result<()> {
        if is_sealed(memory) {
            // A file in memory that a template made together with its state, and that nobody can make shorter.
            return Ok(());
        }
        let found = Id::of_memory(memory, self.layout.size());
        let found = found.map_err(|source| Error::Io { op: "read the end of a memory file", source })?;
        let wrong = |reason| Err(Error::Stored { path: self.path.clone(), reason });
        match found {
            Some(id) if id == self.section.id => Ok(()),
            Some(id) => wrong(format!("it is the memory of snapshot {id}, not of {}", self.section.id)),
            None => wrong("it is cut off, or no memory of a snapshot".to_owned()),
        }
    }

    /// What the snapshot says of its memory.
    pub fn memory(&self) -> &MemorySection {
        &self.section
    }

    /// What the snapshot says of its machine.
    pub fn machine(&self) -> &MachineSection {
        &self.machine
    }

    /// Name of the memory file, or of the state if only that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The memory file.
    ///
    /// # Errors
    /// [`Error::Stored`] if only the [state](Self::open_state) was opened.
    pub fn memory_file(&self) -> Result<&Arc<File>> {
        self.memory.as_ref().ok_or_else(|| Error::Stored {
            path: self.path.clone(),
            reason: "only the state was opened, without the memory file".to_owned(),
        })
    }

    /// Where what is in the memory file.
    pub fn layout(&self) -> &ImageLayout {
        &self.layout
    }

    /// The sections that nobody took yet: those of the caller's own and those of the machine.
    pub fn sections(&mut self) -> &mut Sections {
        &mut self.sections
    }

    /// Compares all checksums of the memory.
    ///
    /// # Errors
    /// [`Error::Memory`] with the place of the damage; [`Error::Stored`] if the snapshot has no checksums.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let Some(checksums) = self.section.checksums() else {
            let reason = "it was written without checksums of memory".to_owned();
            return Err(Error::Stored { path: self.path.clone(), reason });
        };
        image::verify(self.memory_file()?, &self.layout, &self.extents, checksums, progress)
            .map_err(|source| Error::File { path: self.path.clone(), source })
    }

    /// The memory that a machine is to be restored with: mapped copy-on-write from the file, ready at once whatever its size.
    /// With `log`, what devices write to it is logged, which differences need.
    ///
    /// # Errors
    /// [`Error::Stored`] for a difference: it is to be [rebased](Self::rebase) onto its base before. [`Error::Memory`] if the file
    /// cannot be mapped.
    pub fn map(&self, log: bool) -> Result<GuestMem> {
        self.expect_full()?;
        map(self.memory_file()?, self.machine.ram(), log)
    }

    pub(super) fn expect_full(&self) -> Result<()> {
        match self.section.base {
            None => Ok(()),
            Some(base) => Err(Error::Stored {
                path: self.path.clone(),
                reason: format!("it has only what differs from snapshot {base}: rebase it onto that first"),
            }),
        }
    }

    /// Ends the restore: logs optional sections that nobody took.
    ///
    /// # Errors
    /// [`Error::Snapshot`] if a section remains that is not optional: a part of the guest would be lost.
    pub fn finish(self) -> Result<()> {
        let left = self.sections.finish()?;
        if !left.is_empty() {
            tracing::debug!(?left, "sections of the snapshot that are not used");
        }
        Ok(())
    }

    /// Fills the memory that devices have plugged in beside the RAM, which no mapping of the file is. To be called when the machine was
    /// [restored](crate::MachineBuilder::restore), and before it goes on.
    ///
    /// # Errors
    /// [`Error::Memory`] if the file cannot be read or the machine has no such memory.
    pub fn fill<H: Hypervisor>(&self, machine: &Machine<H>) -> Result<()> {
        if self.beyond_ram() == 0 {
            return Ok(());
        }
        fill(self.memory_file()?, &self.layout, &self.machine, machine.memory())
    }

    /// Bytes of memory that devices had plugged in beside the RAM.
    pub(super) fn beyond_ram(&self) -> u64 {
        self.layout.size().saturating_sub(self.ram_size())
    }

    pub(super) fn ram_size(&self) -> u64 {
        // The layout begins with these, so the sum is no larger than its size.
        self.machine.ram().iter().map(|range| range.len).sum()
    }
}

fn is_sealed(file: &File) -> bool {
    let wanted = SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(wanted))
}

/// `ram` mapped from the beginning of an image.
pub(super) fn map(file: &Arc<File>, ram: Vec<RamRange>, log: bool) -> Result<GuestMem> {
    Ok(GuestMemBuilder::with_ranges(ram).image(Arc::clone(file)).dirty_log(log).build()?)
}

/// Reads what of an image is behind the RAM.
pub(crate) fn fill(
    file: &File,
    layout: &ImageLayout,
    machine: &MachineSection,
    memory: &GuestMem,
) -> Result<()> {
    let ram: u64 = machine.ram().iter().map(|range| range.len).sum();
    let rest = layout.size().saturating_sub(ram);
    if rest > 0 {
        let extents = Extents::new(vec![image::Extent { offset: ram, len: rest }], layout)?;
        image::overlay(memory, layout, file, &extents, &mut |_, _| {})?;
    }
    Ok(())
}
