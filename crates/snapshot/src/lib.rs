#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod file;
pub mod format;
mod header;
mod reader;
mod section;
mod sections;
mod state;
mod writer;

pub use error::{Cause, Error, Result};
pub use file::{AtomicFile, SnapshotFile};
pub use header::{Arch, Header};
pub use reader::{Info, Limits, Reader, SectionInfo, SectionReader};
pub use section::{Section, step};
pub use sections::Sections;
pub use state::{Restoring, Saving, State};
pub use writer::{SectionWriter, Writer};
