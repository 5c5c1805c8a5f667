//! What descriptors of both ring formats have in common: a buffer, or a table of further descriptors.

use freestone_memory::{GuestAddress, GuestMemoryBackend, MemorySlice, MemoryView};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::ChainBuffers;
use super::memory::Memory;
use crate::{Error, Result};

/// Bytes of one descriptor.
pub(super) const DESCRIPTOR_SIZE: usize = 16;

/// Bits of a descriptor's flags (virtio 1.2, sections 2.7.5 and 2.8.1).
#[expect(clippy::cast_possible_truncation, reason = "all flags are 16 bits wide")]
pub(super) mod flag {
    use super::*;
    pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
}

/// The part of a descriptor that means the same in both formats.
#[derive(Debug, Clone, Copy)]
pub(super) struct Element {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
}

/// Adds the buffer of `element` to `buffers`.
#[inline(always)]
pub(super) fn add_buffer<'m>(
    memory: &mut Memory<'m>,
    element: Element,
    buffers: &mut ChainBuffers<'m>,
) -> Result<()> {
    let Element { addr, len, flags } = element;
    let writable = flags & flag::WRITE != 0;
    buffers.account(len, writable)?;
    if len == 0 {
        return Ok(());
    }
    if let Some(slice) = memory.contiguous(addr, len as usize) {
        buffers.push(slice, writable);
        return Ok(());
    }
    add_scattered(memory.view, addr, len, writable, buffers)
}

/// A buffer that spans adjacent regions, or is not in memory at all.
#[cold]
fn add_scattered<'m>(
    view: &'m MemoryView,
    addr: u64,
    len: u32,
    writable: bool,
    buffers: &mut ChainBuffers<'m>,
) -> Result<()> {
    for slice in GuestMemoryBackend::get_slices(&**view, GuestAddress(addr), len as usize) {
        buffers.push(slice.map_err(|_| Error::Buffer { addr, len })?, writable);
    }
    Ok(())
}

/// The table that an indirect descriptor refers to, and its number of descriptors (2.7.5.3, 2.8.7). `nested` if the descriptor
/// is itself in such a table.
pub(super) fn indirect_table<'m>(
    memory: &mut Memory<'m>,
    element: Element,
    nested: bool,
) -> Result<(MemorySlice<'m>, u16)> {
    let Element { addr, len, flags } = element;
    let refuse = |reason| Err(Error::Indirect { addr, len, reason });
    if nested {
        return refuse("it is inside another");
    }
    if flags & flag::NEXT != 0 {
        return refuse("its descriptor has a next one");
    }
    let bytes = len as usize;
    if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_SIZE) {
        return refuse("its length is not that of one or more descriptors");
    }
    let Ok(entries) = u16::try_from(bytes / DESCRIPTOR_SIZE) else {
        return refuse("it has more than 65535 descriptors");
    };
    match memory.contiguous(addr, bytes) {
        Some(table) => Ok((table, entries)),
        None => refuse("it is not in one range of guest memory"),
    }
}
