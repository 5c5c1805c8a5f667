//! Snapshots as files, and forks: guest memory and state together.
//!
//! A snapshot is two files: the state, in the container of [`freestone_snapshot`], and the memory, raw pages that a restore maps
//! as they are. They know each other by an [`Id`] that both end with or contain, so that files of two snapshots are never taken for one.
//!
//! [`Paused::store`](crate::Paused::store) writes one, [`Stored`] is one that is there, [`Template`] is one that forks are made from without any file.

mod host;
mod id;
mod memory;
mod read;
mod rebase;
#[cfg(feature = "uffd")]
mod serve;
mod template;
mod track;
mod working_set;
mod write;

pub use host::{CpuModel, HostSection};
pub use id::Id;
pub use memory::MemorySection;
pub use read::Stored;
pub(crate) use read::fill;
#[cfg(feature = "uffd")]
pub use serve::{Served, Watch, Watcher};
pub use template::Template;
pub(crate) use track::Tracker;
pub use working_set::WorkingSet;
pub use write::{Kind, StoreOptions, StorePaths, StoreReport};
