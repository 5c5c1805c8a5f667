//! Saving a machine to files, and what is read from them.

use std::path::PathBuf;

use crate::failure::Failure;
use crate::machine::Vm;

/// What of memory a snapshot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Kind {
    /// All of it.
    #[default]
    Full,
    /// What was written since the last snapshot, or since the restore.
    Diff,
}

/// A snapshot that is to be made.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotRequest {
    /// File for the state.
    pub(crate) state: PathBuf,
    /// File for the memory.
    pub(crate) memory: PathBuf,
    /// How much of the memory.
    pub(crate) kind: Kind,
}

/// A snapshot that was made.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SnapshotReport {
    /// Bytes of memory that were written.
    pub(crate) written: u64,
    /// Bytes of guest memory in all.
    pub(crate) memory: u64,
}

impl Vm {
    /// Saves the machine, which must be paused. `progress` is told bytes done and bytes in all.
    pub(crate) fn snapshot(
        &mut self,
        request: &SnapshotRequest,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<SnapshotReport, Failure> {
        let _ = (request, progress);
        Err(Failure::new("not yet"))
    }
}
