//! The error type of this crate. Every message is one line and names the file and the value it is about.

use std::fmt;
use std::io;

use freestone_memory::vm_memory::GuestMemoryError;

/// What can go wrong while a guest is being put into memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file is a directory, a pipe or another thing without a length.
    #[error("{role} {name:?}: not a regular file or block device")]
    NotAFile {
        /// "kernel" or "initrd".
        role: &'static str,
        /// Name of the file.
        name: String,
    },
    /// The file has no bytes.
    #[error("{role} {name:?}: the file is empty")]
    Empty {
        /// "kernel" or "initrd".
        role: &'static str,
        /// Name of the file.
        name: String,
    },
    /// Reading the file failed.
    #[error("{role} {name:?}: cannot read {len:#x} bytes at offset {offset:#x}")]
    Read {
        /// "kernel" or "initrd".
        role: &'static str,
        /// Name of the file.
        name: String,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Number of bytes wanted.
        len: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Reading the file into guest memory failed.
    #[error(
        "{role} {name:?}: cannot read {len:#x} bytes at offset {offset:#x} into guest memory at {gpa:#x}"
    )]
    ReadIntoGuest {
        /// "kernel" or "initrd".
        role: &'static str,
        /// Name of the file.
        name: String,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Number of bytes wanted.
        len: u64,
        /// Guest-physical address they were meant for.
        gpa: u64,
        /// vm-memory's reason.
        #[source]
        source: GuestMemoryError,
    },
    /// The kernel file is of no kind that this crate can start.
    #[error("kernel {name:?}: not an ELF or bzImage file (starts with {start}){hint}")]
    UnknownFormat {
        /// Name of the file.
        name: String,
        /// The first bytes of the file, in hexadecimal.
        start: String,
        /// What the file seems to be, with a leading colon; empty when nothing is known.
        hint: &'static str,
    },
    /// The file ends before something its headers announce.
    #[error("kernel {name:?}: truncated: the {part} ends at offset {needed:#x}, the file at {len:#x}")]
    Truncated {
        /// Name of the file.
        name: String,
        /// What is cut off.
        part: &'static str,
        /// Offset at which that part would end.
        needed: u64,
        /// Length of the file.
        len: u64,
    },
    /// A header field has a value that makes no sense or is not supported.
    #[error("kernel {name:?}: {field} {value:#x} {problem}")]
    Field {
        /// Name of the file.
        name: String,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An ELF file has no segment to load.
    #[error("kernel {name:?}: the ELF file has no segment to load")]
    NothingToLoad {
        /// Name of the file.
        name: String,
    },
    /// A part of the kernel cannot be where it wants to be.
    #[error("kernel {name:?}: {part} of {len:#x} bytes at {start:#x} {problem}")]
    Placement {
        /// Name of the file.
        name: String,
        /// Which part.
        part: &'static str,
        /// Guest-physical address it asks for.
        start: u64,
        /// Its length in memory, in bytes.
        len: u64,
        /// What is wrong with that.
        problem: &'static str,
    },
    /// The kernel asks for memory that the guest does not have.
    #[error(
        "kernel {name:?}: {part} needs memory at {start:#x}..{end:#x}, but guest RAM below 4 GiB ends at \
         {ram_end:#x}: give the guest more memory"
    )]
    OutsideRam {
        /// Name of the file.
        name: String,
        /// Which part.
        part: &'static str,
        /// Guest-physical address it asks for.
        start: u64,
        /// First address beyond it.
        end: u64,
        /// End of the guest's RAM below 4 GiB.
        ram_end: u64,
    },
    /// The kernel cannot be started by the protocol that was asked for.
    #[error("kernel {name:?}: {problem}")]
    Protocol {
        /// Name of the file.
        name: String,
        /// What it lacks.
        problem: &'static str,
    },
    /// The entry point is not inside of what was loaded.
    #[error("kernel {name:?}: entry point {entry:#x} is outside of the loaded segments")]
    EntryOutside {
        /// Name of the file.
        name: String,
        /// The entry point.
        entry: u64,
    },
    /// There is no room for the initial RAM disk.
    #[error(
        "initrd {name:?} of {size} does not fit below {limit:#x} beside the kernel: give the guest more memory",
        size = Size(*size)
    )]
    InitrdTooLarge {
        /// Name of the file.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// First address it may not reach: the end of RAM, the 32-bit hole or the kernel's own limit.
        limit: u64,
    },
    /// The kernel takes no command line of this length.
    #[error("kernel command line of {len} bytes is too long: kernel {name:?} takes at most {max}")]
    CmdlineTooLong {
        /// Name of the kernel file.
        name: String,
        /// Length of the command line in bytes, without its NUL.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The command line has a NUL byte in it, where the guest would stop reading.
    #[error("kernel command line has a NUL byte at offset {offset}")]
    CmdlineNul {
        /// Offset of the first NUL.
        offset: usize,
    },
    /// A flat binary cannot be placed as asked.
    #[error("flat binary of {len:#x} bytes at {at:#x} {problem}")]
    Flat {
        /// Length of the binary in bytes.
        len: usize,
        /// Guest-physical address asked for.
        at: u64,
        /// What is wrong with that.
        problem: &'static str,
    },
    /// Writing to guest memory failed, for instance because there is no RAM at that address.
    #[error("cannot write {what} of {len:#x} bytes to guest memory at {gpa:#x}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
        /// vm-memory's reason.
        #[source]
        source: GuestMemoryError,
    },
    /// Boot data is larger than the room kept for it.
    #[error("{what} of {len:#x} bytes does not fit in the {max:#x} bytes kept for it")]
    BootDataTooLarge {
        /// What it is.
        what: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The room, in bytes.
        max: usize,
    },
    /// The ACPI tables cannot describe this.
    #[error("ACPI: {what} {value:?} {problem}")]
    Acpi {
        /// What is described.
        what: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// The first bytes of a file in hexadecimal, with dots when there are more.
pub(crate) fn hex_start(data: &[u8]) -> String {
    const SHOWN: usize = 4;
    let mut words: Vec<String> = data.iter().take(SHOWN).map(|byte| format!("{byte:02x}")).collect();
    if data.len() > SHOWN {
        words.push("..".to_owned());
    }
    words.join(" ")
}

/// A number of bytes as people read it: whole MiB or KiB, rounded up, or bytes.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 10 << 20 => write!(f, "{} MiB", n.div_ceil(1 << 20)),
            n if n >= 10 << 10 => write!(f, "{} KiB", n.div_ceil(1 << 10)),
            n => write!(f, "{n} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_of_a_file_is_shown_in_hex() {
        assert_eq!(hex_start(b"\x7fELG1"), "7f 45 4c 47 ..");
        assert_eq!(hex_start(b"\x01"), "01");
        assert_eq!(hex_start(b""), "");
    }

    #[test]
    fn initrd_message_names_file_size_and_limit() {
        let e = Error::InitrdTooLarge { name: "x".into(), size: 300 << 20, limit: 0xc000_0000 };
        assert_eq!(
            e.to_string(),
            "initrd \"x\" of 300 MiB does not fit below 0xc0000000 beside the kernel: give the guest more memory"
        );
    }
}
