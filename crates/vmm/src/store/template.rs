//! Forks: many machines from one that stands still, without a file between.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use freestone_hypervisor::Hypervisor;
use freestone_memory::GuestMem;
use freestone_memory::image::{self, ImageLayout};
use freestone_snapshot::{Arch, Header, Sections, State, Writer};
use rustix::fs::{MemfdFlags, SealFlags};

use super::memory::{MemorySection, layout_of};
use super::{HostSection, Id, read};
use crate::saved::MachineSection;
use crate::{Error, Machine, Paused, Result};

/// What children are forked from: the state of a machine, and its memory in a sealed file in memory that all of them map
/// copy-on-write. It holds what the machine was when the template was made; the machine itself is not needed any more, and may go on.
#[derive(Debug)]
pub struct Template {
    sections: Sections,
    machine: MachineSection,
    layout: ImageLayout,
    memory: Arc<File>,
}

impl<H: Hypervisor> Paused<'_, H> {
    /// Makes a template of the machine as it is. `extra` are sections of the caller's own.
    ///
    /// Memory is copied as far as the guest has used it. With `frozen`, memory that is a memfd already is not copied: the
    /// machine must never go on then.
    ///
    /// # Errors
    /// As [`save`](Paused::save); [`Error::Memory`] if there is no memory for the copy.
    pub fn template(&mut self, program: &str, extra: State, frozen: bool) -> Result<Template> {
        let id = Id::random().map_err(|source| Error::Io { op: "make up a name for a template", source })?;
        let mut state = self.save()?;
        state.put(HostSection::here())?;
        state.absorb(extra)?;
        let layout = layout_of(self.memory())?;
        state.put(&MemorySection::new(id, None, &layout))?;
        let there = if frozen { image::frozen_memfd(self.memory(), &layout)? } else { None };
        let memory = match there {
            Some(file) => file,
            None => image::to_memfd(self.memory(), &layout)?.0,
        };
        let sections = state.into_sections(Header::new(Arch::host(), program)?);
        let machine = sections.peek()?;
        Ok(Template { sections, machine, layout, memory: Arc::new(memory) })
    }
}

impl Template {
    /// What the template's machine is.
    pub fn machine(&self) -> &MachineSection {
        &self.machine
    }

    /// All sections, to restore a child from.
    ///
    /// # Errors
    /// [`Error::Snapshot`], which does not happen to a template that was made here.
    pub fn sections(&self) -> Result<Sections> {
        let mut sections = self.sections.clone();
        drop(sections.take::<MemorySection>()?);
        Ok(sections)
    }

    /// Memory for a child: its own, shared with all others until one of them writes.
    ///
    /// # Errors
    /// [`Error::Memory`] if it cannot be mapped.
    pub fn map(&self, log: bool) -> Result<GuestMem> {
        read::map(&self.memory, self.machine.ram(), log)
    }

    /// As [`Stored::fill`](super::Stored::fill).
    ///
    /// # Errors
    /// As [`Stored::fill`](super::Stored::fill).
    pub fn fill<H: Hypervisor>(&self, machine: &Machine<H>) -> Result<()> {
        read::fill(&self.memory, &self.layout, &self.machine, machine.memory())
    }

    /// The memory, for other processes to map.
    pub fn memory_file(&self) -> &Arc<File> {
        &self.memory
    }

    /// The state as a sealed file in memory, for other processes: with [`memory_file`](Self::memory_file) it is a snapshot, which
    /// [`Stored::open`](super::Stored::open) opens by the paths of descriptors.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Snapshot`] if there is no memory for it.
    pub fn state_file(&self) -> Result<File> {
        let failed = |source| Error::Io { op: "make a file in memory for a state", source };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("freestone-state", flags).map_err(|errno| failed(errno.into()))?;
        let mut writer = Writer::new(Vec::new(), self.sections.header())?;
        self.sections.clone().into_state().write_to(&mut writer)?;
        let bytes = writer.finish()?;
        let mut file = File::from(fd);
        file.write_all(&bytes).map_err(failed)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(|errno| failed(errno.into()))?;
        Ok(file)
    }
}
