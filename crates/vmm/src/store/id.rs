//! [`Id`]: by which the two files of a snapshot know each other, and the trailer of a memory file.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

/// Bytes behind the pages of a memory file.
pub(super) const TRAILER: usize = 4096;
const MAGIC: &[u8; 8] = b"FREEMEM1";

/// A number that no other snapshot has: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Id([u8; 16]);

impl Id {
    /// A new one.
    ///
    /// # Errors
    /// If the host has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    /// The first eight digits.
    pub fn short(&self) -> String {
        self.to_string().chars().take(8).collect()
    }

    /// What a memory file of this snapshot ends with, behind its pages.
    pub(super) fn trailer(&self) -> [u8; TRAILER] {
        let mut trailer = [0; TRAILER];
        let [a, b, ..] = trailer.as_chunks_mut::<16>().0 else { return trailer };
        a[..8].copy_from_slice(MAGIC);
        *b = self.0;
        trailer
    }

    pub(super) fn write_trailer(&self, file: &File, len: u64) -> crate::Result<()> {
        file.write_all_at(&self.trailer(), len)
            .map_err(|source| crate::Error::Io { op: "write the end of a memory file", source })
    }

    /// Reads the trailer behind `len` bytes of pages. `None` if there is none.
    pub(super) fn of_memory(file: &File, len: u64) -> io::Result<Option<Self>> {
        let mut trailer = [0; TRAILER];
        match file.read_exact_at(&mut trailer, len) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let found = trailer.as_chunks::<16>().0.get(1).copied().map(Self);
        Ok(found.filter(|id| id.trailer() == trailer))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({self})")
    }
}
