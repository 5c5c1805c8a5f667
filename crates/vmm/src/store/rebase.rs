//! Bringing a difference into its base.

use std::fs::File;

use freestone_memory::image;
use freestone_snapshot::{AtomicFile, SnapshotFile};

use super::read::Stored;
use super::write::StorePaths;
use crate::{Error, Result};

impl Stored {
    /// Makes the full snapshot of a difference and its base, and writes it to `target`, which may be the place of either. The files are
    /// written aside, synced and renamed.
    ///
    /// # Errors
    /// [`Error::Stored`] if this is no difference, or not one to `base`; [`Error::Memory`] or [`Error::Snapshot`] if the files cannot
    /// be read or written.
    pub fn rebase(self, base: &Self, target: &StorePaths, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let wrong = |reason| Err(Error::Stored { path: self.path().to_owned(), reason });
        match self.section.base {
            None => return wrong("it is no difference: it has all of memory".to_owned()),
            Some(id) if id != base.section.id => {
                return wrong(format!("it is a difference to snapshot {id}, not to {}", base.section.id));
            }
            Some(_) => {}
        }
        base.expect_full()?;
        let header = self.sections.header().clone();
        let mut section = self.section.clone();
        let mut state = self.sections.clone().into_state();
        let memory_path = match target.memory() {
            Some(path) => path.to_owned(),
            None => {
                let name = format!("memory-{}", section.id.short());
                let path = target.folder().join(&name);
                section.file = Some(name);
                path
            }
        };
        let aside = AtomicFile::create(&memory_path)?;
        let file = aside.file();
        let mut sums = self.copy_base(base, file, progress)?;
        let (layout, extents) = (&self.layout, &self.extents);
        image::apply_diff(file, self.memory_file()?, layout, extents, sums.as_deref_mut(), progress)?;
        section.id.write_trailer(file, layout.size())?;
        section.base = None;
        section.extents = vec![(0, layout.size())];
        section.checksums = sums;
        state.put(&section)?;
        let mut stored = SnapshotFile::create(target.state(), &header)?;
        state.write_to(stored.writer())?;
        aside.commit()?;
        stored.finish()?;
        super::write::remove_former(target, &memory_path);
        Ok(())
    }

    /// Copies the memory of `base`; gives its checksums.
    fn copy_base(
        &self,
        base: &Self,
        file: &File,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Option<Vec<u32>>> {
        if self.layout != base.layout {
            return Err(Error::Differs {
                what: "layout of memory",
                saved: format!("{} bytes in {} ranges", self.layout.size(), self.layout.ranges().len()),
                built: format!("{} bytes in {} ranges", base.layout.size(), base.layout.ranges().len()),
            });
        }
        image::copy_sparse(base.memory_file()?, file, progress)?;
        Ok(base.section.checksums.clone())
    }
}
