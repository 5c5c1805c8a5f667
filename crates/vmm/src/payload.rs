//! What a machine boots.

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

use freestone_loader::{BootSource, Entry, FlatMode, Loaded, Protocol, load, load_bytes, load_flat};
use freestone_memory::GuestMem;

use crate::{Error, Result};

/// An open file and the name by which messages speak of it.
#[derive(Debug)]
pub struct FileSource {
    /// The file, open for reading.
    pub file: File,
    /// Its name.
    pub name: String,
}

impl FileSource {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// The operating system's; it does not hold the path.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self { file: File::open(path)?, name: path.display().to_string() })
    }
}

/// What a machine boots.
#[derive(Debug)]
#[non_exhaustive]
pub enum Payload {
    /// A kernel file: ELF or bzImage.
    Kernel {
        /// The kernel.
        kernel: FileSource,
        /// Initial RAM disk.
        initrd: Option<FileSource>,
        /// Command line.
        cmdline: String,
        /// How to enter it.
        protocol: Protocol,
    },
    /// A kernel in memory: an embedded ELF with a PVH note. Devices are announced on its command line as well, so that it
    /// needs no ACPI interpreter to find them.
    Image {
        /// The ELF file.
        bytes: Cow<'static, [u8]>,
        /// Command line.
        cmdline: String,
    },
    /// Bare code at an address.
    Flat {
        /// The code.
        bytes: Cow<'static, [u8]>,
        /// Guest-physical address to put it at, and to enter.
        at: u64,
        /// Processor mode to enter it in.
        mode: FlatMode,
    },
}

impl Payload {
    /// Whether the payload can find ACPI tables.
    pub(crate) fn wants_firmware(&self) -> bool {
        !matches!(self, Self::Flat { .. })
    }

    /// Puts the payload into guest memory. `parameters` are appended to the command line of an [`Image`](Self::Image).
    pub(crate) fn load(self, mem: &GuestMem, rsdp: Option<u64>, parameters: &[String]) -> Result<Entry> {
        let loaded: Loaded = match self {
            Self::Kernel { mut kernel, mut initrd, cmdline, protocol } => load(
                mem,
                &mut BootSource {
                    kernel: &mut kernel.file,
                    kernel_name: &kernel.name,
                    protocol,
                    initrd: initrd.as_mut().map(|i| (&mut i.file, i.name.as_str())),
                    cmdline: &cmdline,
                    rsdp,
                },
            ),
            Self::Image { bytes, cmdline } => {
                let mut line = cmdline;
                for parameter in parameters {
                    if !line.is_empty() {
                        line.push(' ');
                    }
                    line.push_str(parameter);
                }
                load_bytes(mem, &bytes, &line, rsdp)
            }
            Self::Flat { bytes, at, mode } => load_flat(mem, &bytes, at, mode),
        }
        .map_err(Error::Loader)?;
        Ok(loaded.entry)
    }
}
