//! The header: what any version can read of any snapshot.

use std::fmt;
use std::io::Read;

use crate::format::{self, Chain, take};
use crate::reader::Input;
use crate::{Error, Result};

/// The bytes before the name of the program, and those with the checksum.
const FIXED: usize = 18;
const AROUND: usize = FIXED + 4;

/// The architecture of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Arch {
    /// x86-64.
    X86_64,
    /// AArch64.
    Aarch64,
    /// RISC-V, 64 bits.
    Riscv64,
    /// One that this version does not know, by its number in the header.
    Other(u16),
}

impl Arch {
    /// The architecture that this program was built for.
    #[must_use]
    pub const fn host() -> Self {
        if cfg!(target_arch = "x86_64") {
            Self::X86_64
        } else if cfg!(target_arch = "aarch64") {
            Self::Aarch64
        } else if cfg!(target_arch = "riscv64") {
            Self::Riscv64
        } else {
            Self::Other(0)
        }
    }

    const fn number(self) -> u16 {
        match self {
            Self::X86_64 => 1,
            Self::Aarch64 => 2,
            Self::Riscv64 => 3,
            Self::Other(number) => number,
        }
    }

    const fn from_number(number: u16) -> Self {
        match number {
            1 => Self::X86_64,
            2 => Self::Aarch64,
            3 => Self::Riscv64,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::X86_64 => f.write_str("x86-64"),
            Self::Aarch64 => f.write_str("aarch64"),
            Self::Riscv64 => f.write_str("riscv64"),
            Self::Other(number) => write!(f, "number {number}"),
        }
    }
}

/// What a snapshot is of, and who wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    format: u16,
    arch: Arch,
    flags: u16,
    program: String,
}

impl Header {
    /// A header of this version of the format. `program` is the name and version of the writing program, for humans.
    ///
    /// # Errors
    ///
    /// [`Error::Name`] if `program` is longer than 255 bytes or has control characters.
    pub fn new(arch: Arch, program: impl Into<String>) -> Result<Self> {
        let program = program.into();
        if !format::is_plain(&program, format::PROGRAM_MAX) {
            let reason = "a program has up to 255 bytes and no control characters";
            return Err(Error::Name { name: program.chars().take(format::PROGRAM_MAX).collect(), reason });
        }
        // One number, one value: what is read back is equal to what was written.
        Ok(Self { format: format::VERSION, arch: Arch::from_number(arch.number()), flags: 0, program })
    }

    /// Reads only the header, of this or of any other version of the format: it tells what a file is that
    /// [`Reader`](crate::Reader) refuses.
    ///
    /// # Errors
    ///
    /// [`Error::NotASnapshot`], [`Error::Truncated`], [`Error::Damaged`] or [`Error::Io`].
    pub fn peek(from: impl Read) -> Result<Self> {
        Self::read(&mut Input::new(from, u64::MAX))
    }

    /// The version of the format.
    #[must_use]
    pub fn format(&self) -> u16 {
        self.format
    }

    /// The architecture of the guest.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// The program that wrote the snapshot, with its version.
    #[must_use]
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Refuses a snapshot of another architecture than `expected`.
    ///
    /// # Errors
    ///
    /// [`Error::Arch`].
    pub fn check_arch(&self, expected: Arch) -> Result<()> {
        if self.arch == expected { Ok(()) } else { Err(Error::Arch { found: self.arch, expected }) }
    }

    /// Refuses what this version of the crate cannot read on from.
    pub(crate) fn check(&self) -> Result<()> {
        if self.format > format::VERSION {
            let program = self.program.clone();
            return Err(Error::Format { found: self.format, newest: format::VERSION, program });
        }
        if self.flags != 0 {
            return Err(Error::Flags { flags: self.flags });
        }
        Ok(())
    }

    /// The header's bytes, with their checksum; `chain` goes on from them.
    pub(crate) fn encode(&self, chain: &mut Chain) -> Vec<u8> {
        // `new` bounds the name of the program.
        let program = u16::try_from(self.program.len()).unwrap_or(0);
        let length = u16::try_from(AROUND).unwrap_or(0).saturating_add(program);
        let mut bytes = format::MAGIC.to_vec();
        for field in [self.format, length, self.arch.number(), self.flags, program] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(self.program.bytes());
        let checksum = chain.add(&bytes);
        bytes.extend(checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn read<R: Read>(input: &mut Input<R>) -> Result<Self> {
        let mut magic = [0; 8];
        input.fill(&mut magic)?;
        if magic != format::MAGIC {
            return Err(Error::NotASnapshot);
        }
        let damaged = |what| Error::Damaged { what, offset: 0 };
        let mut start = [0; 4];
        input.fill(&mut start)?;
        let length = usize::from(u16::from_le_bytes([start[2], start[3]]));
        if !(AROUND..=usize::from(format::HEADER_MAX)).contains(&length) {
            return Err(damaged("the header's length makes no sense"));
        }
        let mut bytes = magic.to_vec();
        bytes.extend(start);
        let begun = bytes.len();
        bytes.resize(length - 4, 0);
        input.fill(bytes.get_mut(begun..).unwrap_or_default())?;
        input.check(&bytes, 0)?;

        let mut rest = bytes.get(8..).unwrap_or_default();
        let mut field = || take(&mut rest).map_or(0, u16::from_le_bytes);
        let [format, _, arch, flags, program] = [field(), field(), field(), field(), field()];
        let program = usize::from(program);
        let text =
            rest.get(..program).ok_or_else(|| damaged("the program's name is longer than the header"))?;
        if format == 0 || (format == 1 && text.len() != rest.len()) {
            return Err(damaged("the header's length makes no sense"));
        }
        let text = str::from_utf8(text).ok().filter(|text| format::is_plain(text, format::PROGRAM_MAX));
        let program = text.ok_or_else(|| damaged("the program's name is not plain text"))?.to_owned();
        Ok(Self { format, arch: Arch::from_number(arch), flags, program })
    }
}
