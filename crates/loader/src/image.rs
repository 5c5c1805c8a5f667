//! A file (or bytes in memory) that is read into the guest, and little-endian fields of its headers.
//!
//! File contents go straight into guest memory: no copy of the image is ever made in the VMM.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};

use freestone_memory::vm_memory::GuestMemoryError;
use freestone_memory::{Bytes, GuestAddress, MemoryView};

use crate::{Error, Result};

/// Where the bytes come from.
#[derive(Debug)]
enum Data<'a> {
    File(&'a mut File),
    Bytes(&'a [u8]),
}

/// An image with what its error messages need.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    role: &'static str,
    name: &'a str,
    len: u64,
    data: Data<'a>,
}

impl<'a> Image<'a> {
    /// A regular file or a block device, of at least one byte.
    pub(crate) fn from_file(role: &'static str, name: &'a str, file: &'a mut File) -> Result<Self> {
        let read_error = |source| Error::Read { role, name: name.to_owned(), offset: 0, len: 0, source };
        let metadata = file.metadata().map_err(read_error)?;
        let len = if metadata.is_file() {
            metadata.len()
        } else if metadata.file_type().is_block_device() {
            file.seek(SeekFrom::End(0)).map_err(read_error)?
        } else {
            return Err(Error::NotAFile { role, name: name.to_owned() });
        };
        Self { role, name, len, data: Data::File(file) }.not_empty()
    }

    /// Bytes in memory, at least one.
    pub(crate) fn from_bytes(role: &'static str, name: &'a str, bytes: &'a [u8]) -> Result<Self> {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Self { role, name, len, data: Data::Bytes(bytes) }.not_empty()
    }

    fn not_empty(self) -> Result<Self> {
        if self.len == 0 {
            return Err(Error::Empty { role: self.role, name: self.name.to_owned() });
        }
        Ok(self)
    }

    pub(crate) fn name(&self) -> &'a str {
        self.name
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Up to `max` bytes at `offset`; fewer only when the image ends there.
    pub(crate) fn read(&self, offset: u64, max: usize) -> Result<Vec<u8>> {
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut buffer = vec![0; max.min(left)];
        let done = match &self.data {
            Data::File(file) => file.read_exact_at(&mut buffer, offset),
            Data::Bytes(bytes) => match part(bytes, offset, buffer.len()) {
                Some(from) => {
                    buffer.copy_from_slice(from);
                    Ok(())
                }
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            },
        };
        done.map_err(|source| Error::Read {
            role: self.role,
            name: self.name.to_owned(),
            offset,
            len: u64::try_from(max).unwrap_or(u64::MAX),
            source,
        })?;
        Ok(buffer)
    }

    /// Copies `len` bytes at `offset` into guest memory at `gpa`.
    pub(crate) fn read_into(&mut self, view: &MemoryView, offset: u64, len: u64, gpa: u64) -> Result<()> {
        let at = GuestAddress(gpa);
        let eof = || GuestMemoryError::IOError(io::ErrorKind::UnexpectedEof.into());
        let done = match (&mut self.data, usize::try_from(len)) {
            (_, Err(_)) => Err(eof()),
            (Data::Bytes(bytes), Ok(count)) => match part(bytes, offset, count) {
                Some(from) => view.write_slice(from, at),
                None => Err(eof()),
            },
            (Data::File(file), Ok(count)) => match file.seek(SeekFrom::Start(offset)) {
                Ok(_) => view.read_exact_volatile_from(at, *file, count),
                Err(e) => Err(GuestMemoryError::IOError(e)),
            },
        };
        done.map_err(|source| Error::ReadIntoGuest {
            role: self.role,
            name: self.name.to_owned(),
            offset,
            len,
            gpa,
            source,
        })
    }

    /// Refuses a `part` of `len` bytes at `offset` that is not wholly inside the file.
    pub(crate) fn check_inside(&self, part: &'static str, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            end => Err(Error::Truncated {
                name: self.name.to_owned(),
                part,
                needed: end.unwrap_or(u64::MAX),
                len: self.len,
            }),
        }
    }

    /// The error for a bad header field of a kernel.
    pub(crate) fn bad_field(&self, field: &'static str, value: u64, problem: &'static str) -> Error {
        Error::Field { name: self.name.to_owned(), field, value, problem }
    }
}

fn part(bytes: &[u8], offset: u64, len: usize) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(len)?)
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// Little-endian number at `offset`, or `None` beyond the end.
pub(crate) fn le16(bytes: &[u8], offset: usize) -> Option<u16> {
    field(bytes, offset).map(u16::from_le_bytes)
}

/// As [`le16`], 32 bits.
pub(crate) fn le32(bytes: &[u8], offset: usize) -> Option<u32> {
    field(bytes, offset).map(u32::from_le_bytes)
}

/// As [`le16`], 64 bits.
pub(crate) fn le64(bytes: &[u8], offset: usize) -> Option<u64> {
    field(bytes, offset).map(u64::from_le_bytes)
}
