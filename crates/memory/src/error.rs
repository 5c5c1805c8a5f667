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
    /// Pages could not be fetched in advance.
    #[error("cannot fetch {len:#x} bytes of guest memory at {gpa:#x} in advance")]
    Prefetch {
        /// Guest-physical address of the pages.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The layout of a memory image makes no sense.
    #[error("memory image with a range of {len:#x} bytes at {gpa:#x}: {reason}")]
    ImageLayout {
        /// Guest-physical address of the offending range.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// Why it is refused.
        reason: &'static str,
    },
    /// A list of pages of a memory image makes no sense.
    #[error("pages of a memory image, {len:#x} bytes at offset {offset:#x}: {reason}")]
    Extent {
        /// Offset in the image.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Why it is refused.
        reason: &'static str,
    },
    /// What belongs into a memory image is no guest memory, or is no part of the image.
    #[error("guest memory of {len:#x} bytes at {gpa:#x} {reason}")]
    ImageMemory {
        /// Guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A memory image is too short.
    #[error("memory image of {found} bytes, and {expected} are needed")]
    ImageSize {
        /// Bytes needed.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// A memory image cannot be used.
    #[error("memory image: {reason}")]
    ImageRefused {
        /// Why it is refused.
        reason: &'static str,
    },
    /// The operating system refused an operation on a memory image.
    #[error("cannot {doing} the memory image at offset {offset:#x}")]
    Image {
        /// What was being done.
        doing: &'static str,
        /// Offset in the image.
        offset: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A memory image does not hold what was written to it.
    #[error("memory image is damaged within {len:#x} bytes at offset {offset:#x}: the checksum differs")]
    Damaged {
        /// Offset of the first damaged chunk.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Page faults cannot be served from outside.
    #[error("userfaultfd: cannot {doing}")]
    #[cfg(feature = "uffd")]
    Uffd {
        /// What was being done.
        doing: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// What a page server was told about the memory makes no sense.
    #[error("page server handshake: {reason}")]
    #[cfg(feature = "uffd")]
    Handshake {
        /// Why it is refused.
        reason: String,
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
