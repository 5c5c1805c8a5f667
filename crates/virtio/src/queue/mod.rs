//! Virtqueues as a device sees them (virtio 1.2, section 2.6): requests come out, completions go in, and the format of the
//! ring is hidden.
//!
//! [`VirtQueue`] owns the device's position in a queue and moves between a transport and a worker. To work on it,
//! [`attach`](VirtQueue::attach) it to a view of guest memory: that looks the rings up once, not once per request. The driver
//! chooses the format when it negotiates features: split rings, or with `VIRTIO_F_RING_PACKED` packed ones.
//!
//! The layout of split queues is checked by the virtio-queue crate, whose descriptors are used here. The rings are walked by
//! code of our own, because a malformed chain must be an error and not a short chain, the driver's wish for no interrupt
//! must count without EVENT_IDX too, and completions are published in batches.

mod buffers;
mod descriptor;
mod memory;
mod meter;
mod packed;
mod split;

use std::sync::Arc;

use freestone_memory::{MemorySlice, MemoryView};

pub use buffers::{ChainBuffers, SpareBuffers};
use memory::Memory;
use meter::{Meter, Timed};
use packed::Packed;
use split::Split;

use crate::stats::QueueStats;
use crate::{Error, Result, features};

/// How a driver configured a queue: what the transport's registers hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueConfig {
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor area: the descriptor table, or the packed ring.
    pub descriptors: u64,
    /// Guest-physical address of the driver area: the available ring, or the driver's event suppression structure.
    pub driver: u64,
    /// Guest-physical address of the device area: the used ring, or the device's event suppression structure.
    pub device: u64,
}

/// A request taken from a queue; give it back with [`AttachedQueue::push_used`].
///
/// It is no more than the driver's name for the request, so it may outlive the attachment: a device with asynchronous I/O keeps
/// it until the I/O completes. After a reset it means nothing.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a chain that is not given back is lost to the driver until it resets the device"]
pub struct Chain {
    id: u16,
    /// Descriptors of the ring, or of the queue's own table, that it takes up.
    count: u16,
    /// Device-readable bytes.
    bytes: u32,
    timed: Option<Timed>,
}

impl Chain {
    /// The driver's name for the request: the index of its first descriptor in a split queue, its buffer id in a packed one.
    pub fn head(&self) -> u16 {
        self.id
    }

    /// How many of the queue's descriptors it takes up; those of an indirect table are not.
    pub fn descriptors(&self) -> u16 {
        self.count
    }
}

/// What of a queue does not change while it is in use.
#[derive(Debug, Clone, Copy)]
struct Limits {
    config: QueueConfig,
    max_size: u16,
    event_idx: bool,
}

/// A place in a packed ring, and how often the ring was gone round before (virtio 1.2, section 2.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingPosition {
    /// Index of the descriptor.
    pub slot: u16,
    /// The wrap counter: `true` on the first lap and every second after it.
    pub wrap: bool,
}

impl RingPosition {
    /// Where either side begins.
    pub const START: Self = Self { slot: 0, wrap: true };
}

/// The device's position in a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingState {
    /// In a split queue.
    Split {
        /// Index of the next request, counted on without end.
        next_avail: u16,
        /// Index of the next completion, counted on without end.
        next_used: u16,
    },
    /// In a packed queue.
    Packed {
        /// Where the next request begins.
        next_avail: RingPosition,
        /// Where the next completion goes.
        next_used: RingPosition,
    },
}

/// Everything that is needed to go on with a queue elsewhere, when all that was completed is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueState {
    /// How the driver configured it.
    pub config: QueueConfig,
    /// The device's largest size.
    pub max_size: u16,
    /// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Format and position.
    pub ring: RingState,
}

#[derive(Debug)]
enum Position {
    Split(split::Position),
    Packed(packed::Position),
}

/// A configured queue and the device's position in it.
#[derive(Debug)]
pub struct VirtQueue {
    limits: Limits,
    position: Position,
    meter: Meter,
}

impl VirtQueue {
    /// Checks what the driver configured against the device's `max_size` and guest memory, for the negotiated `features`.
    ///
    /// # Errors
    /// [`Error::QueueSize`] or [`Error::QueueLayout`].
    pub fn new(config: QueueConfig, max_size: u16, features: u64, view: &MemoryView) -> Result<Self> {
        let start = RingPosition::START;
        let ring = if features & features::RING_PACKED != 0 {
            RingState::Packed { next_avail: start, next_used: start }
        } else {
            RingState::Split { next_avail: 0, next_used: 0 }
        };
        let event_idx = features & features::RING_EVENT_IDX != 0;
        // A driver sets its rings up so that it kicks.
        Self::build(QueueState { config, max_size, event_idx, ring }, view, true)
    }

    /// A queue that goes on where `state` was taken. It is checked as in [`new`](Self::new), so it may come from anywhere.
    ///
    /// # Errors
    /// [`Error::QueueSize`], [`Error::QueueLayout`] or [`Error::QueuePosition`].
    pub fn restore(state: QueueState, view: &MemoryView) -> Result<Self> {
        // Whether the driver was asked to kick stands in memory, and is written anew.
        Self::build(state, view, false)
    }

    fn build(state: QueueState, view: &MemoryView, kicks_wanted: bool) -> Result<Self> {
        let QueueState { config, max_size, event_idx, ring } = state;
        let limits = Limits { config, max_size, event_idx };
        let position = match ring {
            RingState::Split { next_avail, next_used } => {
                split::check(&limits)?;
                Position::Split(split::Position::new(next_avail, next_used, kicks_wanted))
            }
            RingState::Packed { next_avail, next_used } => {
                packed::check(&limits)?;
                Position::Packed(packed::Position::new(next_avail, next_used, config.size, kicks_wanted)?)
            }
        };
        let mut queue = Self { limits, position, meter: Meter::new(Arc::default()) };
        queue.attach(view)?;
        Ok(queue)
    }

    /// Counts in `stats` from now on, and not in statistics of its own.
    #[must_use]
    pub fn with_stats(mut self, stats: Arc<QueueStats>) -> Self {
        self.meter = Meter::new(stats);
        self
    }

    /// What this queue counts.
    pub fn stats(&self) -> &Arc<QueueStats> {
        self.meter.stats()
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.limits.config.size
    }

    /// How the driver configured the queue.
    pub fn config(&self) -> QueueConfig {
        self.limits.config
    }

    /// Everything that is needed to go on with this queue elsewhere. Requests that were taken and not given back are lost there.
    pub fn state(&self) -> QueueState {
        let Limits { config, max_size, event_idx } = self.limits;
        let ring = match self.position {
            Position::Split(at) => RingState::Split { next_avail: at.next_avail, next_used: at.next_used },
            Position::Packed(at) => RingState::Packed { next_avail: at.next_avail, next_used: at.next_used },
        };
        QueueState { config, max_size, event_idx, ring }
    }

    /// Makes the queue workable on `view` of guest memory.
    ///
    /// # Errors
    /// [`Error::QueueLayout`] if the memory changed so that the queue is no longer in it.
    #[inline]
    pub fn attach<'q, 'm>(&'q mut self, view: &'m MemoryView) -> Result<AttachedQueue<'q, 'm>> {
        let mut memory = Memory::new(view);
        let areas = Areas::find(self, &mut memory)?;
        Ok(AttachedQueue { queue: self, areas, memory })
    }
}

/// The three parts of a queue in guest memory.
#[derive(Debug)]
struct Areas<'m> {
    descriptors: MemorySlice<'m>,
    driver: MemorySlice<'m>,
    device: MemorySlice<'m>,
}

impl<'m> Areas<'m> {
    /// Looks up the parts of `queue`.
    ///
    /// Each must lie in one region of guest memory. Regions are much larger and more strictly aligned than rings, so an
    /// allocator that hands out naturally aligned blocks never makes one that does not.
    #[inline]
    fn find(queue: &VirtQueue, memory: &mut Memory<'m>) -> Result<Self> {
        let config = &queue.limits.config;
        let [descriptors, driver, device] = match queue.position {
            Position::Split(_) => split::layout(config),
            Position::Packed(_) => packed::layout(config),
        };
        let mut find = |(part, addr, len)| {
            memory.contiguous(addr, len).ok_or(Error::QueueLayout { part, addr, size: config.size })
        };
        Ok(Self { descriptors: find(descriptors)?, driver: find(driver)?, device: find(device)? })
    }
}

/// A queue of either format.
#[derive(Debug)]
enum Ring<'a, 'm> {
    Split(Split<'a, 'm>),
    Packed(Packed<'a, 'm>),
}

/// A queue that is being worked on. See [`VirtQueue::attach`].
#[derive(Debug)]
pub struct AttachedQueue<'q, 'm> {
    queue: &'q mut VirtQueue,
    areas: Areas<'m>,
    memory: Memory<'m>,
}

impl<'m> AttachedQueue<'_, 'm> {
    /// Entries.
    pub fn size(&self) -> u16 {
        self.queue.limits.config.size
    }

    /// The ring, by its format, and what measures it.
    #[inline]
    fn ring(&mut self) -> (Ring<'_, 'm>, &mut Meter) {
        let VirtQueue { limits, position, meter } = &mut *self.queue;
        let (areas, memory) = (&self.areas, &mut self.memory);
        let ring = match position {
            Position::Split(at) => Ring::Split(Split { limits, at, areas, memory }),
            Position::Packed(at) => Ring::Packed(Packed { limits, at, areas, memory }),
        };
        (ring, meter)
    }

    /// Takes the next request, if there is one, and collects its buffers.
    ///
    /// # Errors
    /// If the driver's ring or chain is malformed. The request is then still in the queue; the device must stop using it.
    pub fn pop(&mut self, buffers: &mut ChainBuffers<'m>) -> Result<Option<Chain>> {
        let (ring, meter) = self.ring();
        let popped = match ring {
            Ring::Split(mut ring) => ring.pop(buffers, meter)?,
            Ring::Packed(mut ring) => ring.pop(buffers, meter)?,
        };
        let Some((id, count)) = popped else { return Ok(None) };
        let bytes = buffers.readable_len();
        let timed = meter.took(bytes);
        Ok(Some(Chain { id, count, bytes, timed }))
    }

    /// Puts a request back into the queue, as if it had not been taken: the next [`pop`](Self::pop) takes it again.
    ///
    /// `chain` must be the one that was taken last, of those that were neither given back nor put back since; several are put back
    /// in the reverse of the order in which they were taken, and none that was taken before one that was given back. Anything else
    /// confuses this queue and its driver, and nobody else.
    pub fn undo(&mut self, chain: Chain) {
        let (ring, meter) = self.ring();
        match ring {
            Ring::Split(mut ring) => ring.undo(),
            Ring::Packed(mut ring) => ring.undo(chain.count),
        }
        meter.put_back(chain.bytes, chain.timed);
    }

    /// Whether a request waits.
    ///
    /// # Errors
    /// [`Error::AvailIndex`] if the driver's index is impossible.
    pub fn has_next(&mut self) -> Result<bool> {
        let (ring, meter) = self.ring();
        match ring {
            Ring::Split(mut ring) => ring.has_next(meter),
            Ring::Packed(mut ring) => ring.has_next(meter),
        }
    }

    /// Gives a request back, of whose device-writable bytes the first `len` were written.
    ///
    /// The driver sees it after [`publish`](Self::publish). `chain` must be of this queue and of this side of its last reset.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the entry.
    pub fn push_used(&mut self, chain: Chain, len: u32) -> Result<()> {
        let (ring, meter) = self.ring();
        match ring {
            Ring::Split(mut ring) => ring.push_used(chain.id, len)?,
            Ring::Packed(mut ring) => ring.push_used(chain.id, chain.count, len)?,
        }
        meter.gave_back(len, chain.timed);
        Ok(())
    }

    /// Shows the driver all requests that were given back, in one update.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the update.
    pub fn publish(&mut self) -> Result<()> {
        match self.ring().0 {
            Ring::Split(mut ring) => ring.publish(),
            Ring::Packed(mut ring) => ring.publish(),
        }
    }

    /// Whether the driver wants an interrupt for what was published since the last time this was asked (2.7.7, 2.7.10,
    /// 2.8.14). The statistics take it that the interrupt is then sent.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory cannot be read.
    pub fn needs_interrupt(&mut self) -> Result<bool> {
        let (ring, meter) = self.ring();
        let wanted = match ring {
            Ring::Split(mut ring) => ring.needs_interrupt()?,
            Ring::Packed(mut ring) => ring.needs_interrupt()?,
        };
        if let Some(wanted) = wanted {
            meter.considered_interrupt(wanted);
        }
        Ok(wanted.unwrap_or(false))
    }

    /// Asks the driver not to kick: the device looks by itself. The driver may kick all the same.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the flag.
    pub fn disable_kicks(&mut self) -> Result<()> {
        match self.ring().0 {
            Ring::Split(mut ring) => ring.disable_kicks(),
            Ring::Packed(mut ring) => ring.disable_kicks(),
        }
    }

    /// Asks the driver to kick for the next request. Returns whether one came before the driver could know: then it may not
    /// kick, and the device must go on by itself.
    ///
    /// # Errors
    /// [`Error::Memory`] if guest memory does not take the flag, [`Error::AvailIndex`] if the driver's index is impossible.
    pub fn enable_kicks(&mut self) -> Result<bool> {
        let (ring, meter) = self.ring();
        match ring {
            Ring::Split(mut ring) => ring.enable_kicks(meter),
            Ring::Packed(mut ring) => ring.enable_kicks(meter),
        }
    }
}
