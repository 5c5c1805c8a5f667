//! Saving a machine of the reference VMM to files.

use freestone_vmm::snapshot::State;
use freestone_vmm::store::{StoreOptions, StorePaths, StoreReport, Template};

pub(crate) use freestone_vmm::store::Kind;

use super::config::ConfigSection;
use crate::failure::Failure;
use crate::machine::Vm;

/// What is said of who wrote a snapshot.
pub(crate) const PROGRAM: &str = concat!("freestone ", env!("CARGO_PKG_VERSION"));

/// A snapshot that is to be made.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotRequest {
    /// Where to.
    pub(crate) paths: StorePaths,
    /// How much of the memory.
    pub(crate) kind: Kind,
}

impl Vm {
    /// Saves the machine, which must be paused. `progress` is told bytes of memory done and in all.
    pub(crate) fn snapshot(
        &mut self,
        request: &SnapshotRequest,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<StoreReport, Failure> {
        let extra = self.own_sections()?;
        let track = self.tracks && !self.machine.is_tracked();
        let mut paused = self.machine.paused()?;
        if track {
            paused.track(true)?;
        }
        let mut options = StoreOptions::new(PROGRAM);
        options.kind = request.kind;
        Ok(paused.store(&request.paths, &options, extra, progress)?)
    }

    /// What children are forked from: the machine, which must be paused, as it is now.
    pub(crate) fn template(&mut self) -> Result<Template, Failure> {
        let extra = self.own_sections()?;
        Ok(self.machine.paused()?.template(PROGRAM, extra, false)?)
    }

    /// What a snapshot keeps beside the machine: by what it can be made again.
    pub(super) fn own_sections(&self) -> Result<State, Failure> {
        let mut state = State::new();
        state.put(&ConfigSection::from(self.config()))?;
        Ok(state)
    }
}
