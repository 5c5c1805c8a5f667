//! Virtqueues as a device sees them (virtio 1.2, section 2.6): requests come out, completions go in, and the format of the
//! ring is hidden.
//!
//! [`VirtQueue`] owns the device's position in a queue and moves between a transport and a worker. To work on it,
//! [`attach`](VirtQueue::attach) it to a view of guest memory: that looks the rings up once, not once per request.
//!
//! The layout is checked by the virtio-queue crate, whose descriptors and queue state are used here. The rings are walked by
//! code of our own, because a malformed chain must be an error and not a short chain, the driver's wish for no interrupt
//! must count without EVENT_IDX too, and completions are published in batches.

mod buffers;
mod split;

use freestone_memory::{GuestMemoryBackend, MemoryView};
use virtio_queue::{Queue, QueueState, QueueT};

pub use buffers::{ChainBuffers, SpareBuffers};
pub use split::AttachedQueue;

use crate::{Error, Result, features};

/// How a driver configured a queue: what the transport's registers hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueConfig {
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver area (the available ring).
    pub driver: u64,
    /// Guest-physical address of the device area (the used ring).
    pub device: u64,
}

/// A request taken from a queue; give it back with [`AttachedQueue::push_used`].
///
/// It is no more than the driver's name for the request, so it may outlive the attachment: a device with asynchronous I/O keeps
/// it until the I/O completes. After a reset it means nothing.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a chain that is not given back is lost to the driver until it resets the device"]
pub struct Chain {
    head: u16,
}

impl Chain {
    /// Index of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// A configured queue and the device's position in it.
#[derive(Debug, PartialEq, Eq)]
pub struct VirtQueue {
    config: QueueConfig,
    max_size: u16,
    event_idx: bool,
    /// Next entry of the available ring to take.
    next_avail: u16,
    /// The driver's available index as last read: entries before it can be taken without looking again.
    seen_avail: u16,
    /// Next entry of the used ring to fill.
    next_used: u16,
    /// The used index that the driver can see.
    published: u16,
    /// The used index when the driver was last considered for an interrupt.
    signalled: u16,
    /// Whether the driver was asked to kick.
    kicks_wanted: bool,
}

impl VirtQueue {
    /// Checks what the driver configured against the device's `max_size` and guest memory, for the negotiated `features`.
    ///
    /// # Errors
    /// [`Error::QueueSize`] or [`Error::QueueLayout`].
    pub fn new(config: QueueConfig, max_size: u16, features: u64, view: &MemoryView) -> Result<Self> {
        let refused = Error::QueueSize { size: config.size, max: max_size };
        let Ok(mut queue) = Queue::new(max_size) else { return Err(refused) };
        queue.try_set_size(config.size).map_err(|_| refused)?;
        let layout = |part, addr| Error::QueueLayout { part, addr, size: config.size };
        queue
            .try_set_desc_table_address(freestone_memory::GuestAddress(config.descriptors))
            .map_err(|_| layout("descriptor table", config.descriptors))?;
        queue
            .try_set_avail_ring_address(freestone_memory::GuestAddress(config.driver))
            .map_err(|_| layout("available ring", config.driver))?;
        queue
            .try_set_used_ring_address(freestone_memory::GuestAddress(config.device))
            .map_err(|_| layout("used ring", config.device))?;
        let queue = Self {
            config,
            max_size,
            event_idx: features & features::RING_EVENT_IDX != 0,
            next_avail: 0,
            seen_avail: 0,
            next_used: 0,
            published: 0,
            signalled: 0,
            kicks_wanted: true,
        };
        split::Rings::find(&queue, view)?;
        Ok(queue)
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// How the driver configured the queue.
    pub fn config(&self) -> QueueConfig {
        self.config
    }

    /// Everything that is needed to go on with this queue elsewhere, in virtio-queue's form.
    pub fn state(&self) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.config.size,
            ready: true,
            desc_table: self.config.descriptors,
            avail_ring: self.config.driver,
            used_ring: self.config.device,
        }
    }

    /// Makes the queue workable on `view` of guest memory.
    ///
    /// # Errors
    /// [`Error::QueueLayout`] if the memory changed so that the queue is no longer in it.
    pub fn attach<'q, 'm>(&'q mut self, view: &'m MemoryView) -> Result<AttachedQueue<'q, 'm>> {
        let rings = split::Rings::find(self, view)?;
        Ok(AttachedQueue::new(self, rings, view))
    }
}

/// `len` bytes of guest memory at `addr` that lie in one region.
fn contiguous(view: &MemoryView, addr: u64, len: usize) -> Option<freestone_memory::MemorySlice<'_>> {
    GuestMemoryBackend::get_slice(&**view, freestone_memory::GuestAddress(addr), len).ok()
}
