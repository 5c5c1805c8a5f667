//! One request of a block device (virtio 1.2, section 5.2.6): decoded and checked. What it needs of the image comes out as
//! operations, one after the other.

use std::io;

use freestone_block::{Op, SECTOR_SIZE};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::config::RangeLimits;
use super::{ID_LEN, feature};
use crate::queue::ChainBuffers;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_LEN: usize = 16;
/// Bytes of a range of a discard or write-zeroes request: sector, sectors, flags.
const RANGE_LEN: usize = 16;
/// The flag of a range that lets its storage go back to the host.
const RANGE_UNMAP: u32 = 1;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The guest asked for something wrong.
    #[error("{0}")]
    Refused(&'static str),
    /// The device does not know this type of request, or a flag of it.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The host failed.
    #[error("{0}")]
    Host(#[from] io::Error),
}

impl Failure {
    pub(super) fn status(&self) -> u8 {
        match self {
            Self::Unsupported(_) => status(VIRTIO_BLK_S_UNSUPP),
            Self::Refused(_) | Self::Host(_) => status(VIRTIO_BLK_S_IOERR),
        }
    }
}

pub(super) const fn status(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// A request's header, copied once: what is checked is what is used.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub kind: u32,
    pub sector: u64,
}

impl Header {
    pub(super) fn take(buffers: &mut ChainBuffers<'_>) -> crate::Result<Self> {
        let mut header = [0; HEADER_LEN];
        buffers.read(&mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        Ok(Self { kind: u32::from_le_bytes([t0, t1, t2, t3]), sector: u64::from_le_bytes(sector) })
    }
}

/// What a request is judged by.
#[derive(Debug)]
pub(super) struct Rules {
    /// Negotiated features.
    pub features: u64,
    pub read_only: bool,
    pub id: [u8; ID_LEN],
    pub discard: RangeLimits,
    pub write_zeroes: RangeLimits,
}

/// What changes while the device works, as it is for one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    /// Sectors of the disk.
    pub capacity: u64,
    /// Every write must be durable when it completes (5.2.6.2).
    pub write_through: bool,
}

/// Types of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::GetId => "get id",
            Self::Discard => "discard",
            Self::WriteZeroes => "write zeroes",
        }
    }
}

/// A checked range of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    /// Byte.
    offset: u64,
    /// Bytes.
    len: u64,
    unmap: bool,
}

/// Behind a pointer, so that other requests are small.
#[derive(Debug)]
struct Ranges(Vec<Range>);

/// A checked request, and how far it is.
#[derive(Debug)]
pub(super) struct Request {
    pub kind: Kind,
    /// First byte of a read or write.
    pub offset: u64,
    /// Bytes of data.
    pub len: u32,
    /// Bytes of data that the device wrote, if it succeeds.
    pub written: u32,
    /// What is left to do of a discard or write-zeroes, last first. Other requests allocate nothing.
    ranges: Option<Box<Ranges>>,
    /// A flush comes at the end.
    flush: bool,
}

impl Request {
    fn new(kind: Kind, flush: bool) -> Self {
        Self { kind, offset: 0, len: 0, written: 0, ranges: None, flush }
    }

    /// Whether there is no further operation.
    pub(super) fn is_last(&self) -> bool {
        !self.flush && self.ranges.is_none()
    }

    /// The next operation without buffers, after the read or write.
    pub(super) fn next_op<'m>(&mut self) -> Option<Op<'m, 'm>> {
        let ranges = self.ranges.as_mut();
        if let Some(Range { offset, len, unmap }) = ranges.and_then(|ranges| ranges.0.pop()) {
            return Some(match self.kind {
                Kind::Discard => Op::Discard { offset, len },
                _ => Op::WriteZeroes { offset, len, unmap },
            });
        }
        std::mem::take(&mut self.flush).then_some(Op::Flush)
    }
}

impl Rules {
    /// Checks a request whose header and status are taken off `buffers`. Get-id is answered here.
    pub(super) fn check(
        &self,
        header: Header,
        buffers: &mut ChainBuffers<'_>,
        now: Now,
    ) -> Result<Request, Failure> {
        let (to_guest, from_guest) = (buffers.writable_len(), buffers.readable_len());
        match header.kind {
            VIRTIO_BLK_T_IN => {
                let offset = span(header.sector, to_guest, from_guest, now.capacity)?;
                let request = Request::new(Kind::Read, false);
                Ok(Request { offset, len: to_guest, written: to_guest, ..request })
            }
            VIRTIO_BLK_T_OUT if self.read_only => Err(Failure::Refused("the disk is read-only")),
            VIRTIO_BLK_T_OUT => {
                let offset = span(header.sector, from_guest, to_guest, now.capacity)?;
                Ok(Request { offset, len: from_guest, ..Request::new(Kind::Write, now.write_through) })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Request::new(Kind::Flush, !self.read_only)),
            VIRTIO_BLK_T_GET_ID => {
                buffers.write(&self.id).map_err(|_| Failure::Refused("the id needs 20 bytes"))?;
                let written = u32::try_from(ID_LEN).unwrap_or(0);
                Ok(Request { written, ..Request::new(Kind::GetId, false) })
            }
            VIRTIO_BLK_T_DISCARD if self.features & feature::DISCARD != 0 => {
                self.check_ranges(Kind::Discard, self.discard, buffers, now)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.features & feature::WRITE_ZEROES != 0 => {
                self.check_ranges(Kind::WriteZeroes, self.write_zeroes, buffers, now)
            }
            _ => Err(Failure::Unsupported("this type of request is not supported")),
        }
    }

    /// Copies and checks all ranges before the first is touched (5.2.6.1, 5.2.6.2).
    #[cold]
    fn check_ranges(
        &self,
        kind: Kind,
        limits: RangeLimits,
        buffers: &mut ChainBuffers<'_>,
        now: Now,
    ) -> Result<Request, Failure> {
        let len = buffers.readable_len() as usize;
        if buffers.writable_len() != 0 {
            return Err(Failure::Refused("data buffers of the wrong direction"));
        }
        if len == 0 || !len.is_multiple_of(RANGE_LEN) {
            return Err(Failure::Refused("the data is not one or more ranges"));
        }
        let count = len / RANGE_LEN;
        if count > limits.max_segments as usize {
            return Err(Failure::Refused("more ranges than the limit"));
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let range = check_range(kind, limits, buffers, now.capacity)?;
            if range.len > 0 {
                ranges.push(range);
            }
        }
        ranges.reverse();
        let ranges = Some(Box::new(Ranges(ranges)));
        Ok(Request { ranges, ..Request::new(kind, now.write_through) })
    }
}

fn check_range(
    kind: Kind,
    limits: RangeLimits,
    buffers: &mut ChainBuffers<'_>,
    capacity: u64,
) -> Result<Range, Failure> {
    let mut range = [0; RANGE_LEN];
    buffers.read(&mut range).map_err(|_| Failure::Refused("a range cannot be read"))?;
    let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = range;
    let sector = u64::from_le_bytes(sector);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let known = if kind == Kind::WriteZeroes { RANGE_UNMAP } else { 0 };
    if flags & !known != 0 {
        return Err(Failure::Unsupported("a flag of a range is not supported"));
    }
    if sectors > limits.max_sectors {
        return Err(Failure::Refused("a range has more sectors than the limit"));
    }
    let offset = inside(sector, sectors.into(), capacity)?;
    Ok(Range { offset, len: u64::from(sectors) * SECTOR_SIZE, unmap: flags & RANGE_UNMAP != 0 })
}

/// The byte offset of `len` bytes at `sector`, if the disk has them. `wrong` are bytes of the wrong direction.
fn span(sector: u64, len: u32, wrong: u32, capacity: u64) -> Result<u64, Failure> {
    let len = u64::from(len);
    if wrong != 0 {
        return Err(Failure::Refused("data buffers of the wrong direction"));
    }
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err(Failure::Refused("length is not a multiple of 512"));
    }
    inside(sector, len / SECTOR_SIZE, capacity)
}

/// The byte offset of `sectors` sectors at `sector`, if the disk has them.
fn inside(sector: u64, sectors: u64, capacity: u64) -> Result<u64, Failure> {
    let end = sector.checked_add(sectors).filter(|&end| end <= capacity);
    // The disk's size in bytes fits in 64 bits, so an offset inside does as well.
    let offset = end.and_then(|_| sector.checked_mul(SECTOR_SIZE));
    offset.ok_or(Failure::Refused("beyond the end of the disk"))
}
