//! The error type of this crate.

use std::io;

use crate::paging::WalkError;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The requested amount of memory cannot be laid out.
    #[error("guest memory of {size} bytes: {reason}")]
    Size {
        /// Requested size in bytes.
        size: u64,
        /// Why it is refused.
        reason: &'static str,
    },
    /// A range could not be mapped into this process.
    #[error("cannot map {len:#x} bytes of guest memory at {gpa:#x} ({backing})")]
    Map {
        /// Guest-physical address of the range.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// Kind of backing.
        backing: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The ranges given overlap or are not sorted.
    #[error("guest memory ranges overlap or are out of order at {gpa:#x}")]
    Overlap {
        /// Guest-physical address of the offending range.
        gpa: u64,
    },
    /// A region beside the boot memory is refused.
    #[error("region of {len:#x} bytes at {gpa:#x}: {reason}")]
    Region {
        /// Guest-physical address of the region.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// Why it is refused.
        reason: &'static str,
    },
    /// There is no region to take away.
    #[error("no region that was added begins at {gpa:#x}")]
    NoRegion {
        /// Guest-physical address given.
        gpa: u64,
    },
    /// Pages could not be given back to the host.
    #[error("cannot give back {len:#x} bytes of guest memory at {gpa:#x}")]
    Discard {
        /// Guest-physical address of the pages.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The file behind the memory could not be made.
    #[error("cannot create a memory file of {size} bytes for the guest ({backing})")]
    File {
        /// Size of the file in bytes.
        size: u64,
        /// Kind of backing.
        backing: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The host has too few free huge pages.
    #[error(
        "guest memory needs {pages} free huge pages of {page_size} on the host: {hint} to at least {pages}"
    )]
    HugePages {
        /// Huge pages needed for the whole guest.
        pages: u64,
        /// Size of one, as people write it.
        page_size: &'static str,
        /// Which setting to raise.
        hint: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The memory could not be touched in advance.
    #[error("cannot prefault {len:#x} bytes of guest memory at {gpa:#x}")]
    Prefault {
        /// Guest-physical address of the range.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A page table cannot hold a mapping.
    #[error("cannot map guest-virtual {gva:#x} to guest-physical {gpa:#x}: {reason}")]
    Mapping {
        /// Guest-virtual address of the mapping.
        gva: u64,
        /// Guest-physical address of the mapping.
        gpa: u64,
        /// Why it is refused.
        reason: &'static str,
    },
    /// The frames given for page tables do not do.
    #[error("page tables at {start:#x}: {reason}")]
    TableFrames {
        /// First frame given for tables.
        start: u64,
        /// Why they do not do.
        reason: &'static str,
    },
    /// Page tables were placed outside of guest memory.
    #[error("page tables of {len:#x} bytes at {start:#x} are not in guest memory")]
    TablesOutsideMemory {
        /// First guest-physical address of the tables.
        start: u64,
        /// Their length in bytes.
        len: usize,
    },
    /// A guest-virtual address means nothing.
    #[error(transparent)]
    Walk(#[from] WalkError),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
