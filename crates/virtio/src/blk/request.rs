//! One request of a block device (virtio 1.2, section 5.2.6): decoded, checked, carried out, answered.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use freestone_block::{Image, SECTOR_SIZE};
use freestone_memory::{Bytes, MemorySlice};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::{BlkStats, ID_LEN};
use crate::Result;
use crate::queue::ChainBuffers;
use crate::worker::RequestHandler;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_LEN: usize = 16;
/// Errors of the host that are logged as warnings; more are logged at a lower level.
const LOUD_ERRORS: u64 = 8;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The guest asked for something wrong.
    #[error("{0}")]
    Refused(&'static str),
    /// The device does not know this type of request.
    #[error("type of request {0} is not supported")]
    Unsupported(u32),
    /// The host failed.
    #[error("{0}")]
    Host(io::Error),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Unsupported(_) => status(VIRTIO_BLK_S_UNSUPP),
            Self::Refused(_) | Self::Host(_) => status(VIRTIO_BLK_S_IOERR),
        }
    }
}

const fn status(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// Serves the requests of one queue.
#[derive(Debug)]
pub(super) struct Requests {
    pub image: Arc<dyn Image>,
    pub sectors: u64,
    pub read_only: bool,
    /// The driver sends no flushes: every write must be durable when it completes (5.2.6.2).
    pub write_through: bool,
    pub id: [u8; ID_LEN],
    pub stats: Arc<BlkStats>,
}

impl RequestHandler for Requests {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        let mut header = [0; HEADER_LEN];
        // Copied once: what is checked below is what is used.
        buffers.read(&mut header)?;
        let answer = buffers.split_last()?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        // What is left of the device-writable part is all data; on success of a read, all of it is written.
        let room = buffers.writable_len();
        let (status, written) = match self.execute(kind, u64::from_le_bytes(sector), buffers) {
            Ok(written) => (status(VIRTIO_BLK_S_OK), written),
            Err(failure) => {
                self.report(kind, &failure);
                (failure.status(), 0)
            }
        };
        answer.write_obj(status, 0)?;
        // The length counts from the start of the writable part and must not claim bytes that were not written (2.7.8.2).
        Ok(if written == room { written.saturating_add(1) } else { written })
    }
}

impl Requests {
    /// Carries the request out and returns how many bytes of data it wrote to guest memory.
    fn execute(
        &self,
        kind: u32,
        sector: u64,
        buffers: &mut ChainBuffers<'_>,
    ) -> std::result::Result<u32, Failure> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.range(sector, buffers.writable_len(), buffers.readable_len())?;
                self.read(buffers.writable(), buffers.writable_len(), offset)
            }
            VIRTIO_BLK_T_OUT if self.read_only => Err(Failure::Refused("the disk is read-only")),
            VIRTIO_BLK_T_OUT => {
                let offset = self.range(sector, buffers.readable_len(), buffers.writable_len())?;
                self.write(buffers.readable(), buffers.readable_len(), offset)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.flush()?;
                count(&self.stats.flushes, 1);
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                buffers.write(&self.id).map_err(|_| Failure::Refused("the id needs 20 bytes"))?;
                Ok(u32::try_from(ID_LEN).unwrap_or(0))
            }
            other => Err(Failure::Unsupported(other)),
        }
    }

    /// The byte offset of `len` bytes at `sector`, if the disk has them. `wrong` are bytes of the wrong direction.
    fn range(&self, sector: u64, len: u32, wrong: u32) -> std::result::Result<u64, Failure> {
        let len = u64::from(len);
        if wrong != 0 {
            return Err(Failure::Refused("data buffers of the wrong direction"));
        }
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Failure::Refused("length is not a multiple of 512"));
        }
        let end = sector.checked_add(len / SECTOR_SIZE).filter(|&end| end <= self.sectors);
        // The disk's size in bytes fits in 64 bits, so an offset inside does as well.
        let offset = end.and_then(|_| sector.checked_mul(SECTOR_SIZE));
        offset.ok_or(Failure::Refused("beyond the end of the disk"))
    }

    fn read(&self, data: &[MemorySlice<'_>], len: u32, offset: u64) -> std::result::Result<u32, Failure> {
        self.image.read_vectored_at(data, offset).map_err(Failure::Host)?;
        count(&self.stats.reads, 1);
        count(&self.stats.read_bytes, len.into());
        Ok(len)
    }

    fn write(&self, data: &[MemorySlice<'_>], len: u32, offset: u64) -> std::result::Result<u32, Failure> {
        self.image.write_vectored_at(data, offset).map_err(Failure::Host)?;
        if self.write_through {
            self.flush()?;
        }
        count(&self.stats.writes, 1);
        count(&self.stats.written_bytes, len.into());
        Ok(0)
    }

    fn flush(&self) -> std::result::Result<(), Failure> {
        if self.read_only {
            return Ok(());
        }
        self.image.flush().map_err(Failure::Host)
    }

    #[cold]
    fn report(&self, kind: u32, failure: &Failure) {
        let before = self.stats.errors.fetch_add(1, Ordering::Relaxed);
        match failure {
            Failure::Host(error) if before < LOUD_ERRORS => {
                tracing::warn!(kind, %error, image = ?self.image, "disk request failed");
            }
            _ => tracing::debug!(kind, %failure, "disk request not done"),
        }
    }
}

/// Counters have one writer each and many readers, or are too rare to matter.
fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
