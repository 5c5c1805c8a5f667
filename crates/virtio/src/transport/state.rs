//! What a transport's status machine saves, and how it becomes that again.
//!
//! All that comes in is untrusted: registers must be such as a driver can bring about, and queues are checked as those that a driver
//! configures.

use std::sync::Arc;

use freestone_bus::{Error as BusError, Irq, Result as BusResult};
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::{Activity, DeviceCore, QueueRegisters, TransportOps, status};
use crate::device::ActiveQueue;
use crate::features;
use crate::plug::bus_error;
use crate::queue::{QueueConfig, QueueState, RingPosition, RingState, VirtQueue};

/// All bits that a driver can set.
const DRIVER_BITS: u8 =
    status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK | status::FEATURES_OK | status::FAILED;

/// A device as its driver knows it, whatever the transport: the section `virtio`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreState {
    /// The device type.
    pub device_type: u32,
    /// The features that were offered.
    pub offered: u64,
    /// The features that the driver wrote.
    pub driver_features: u64,
    /// The driver wrote features beyond bit 63.
    pub unknown_features: bool,
    /// Half of the offered features that is shown.
    pub device_features_select: u32,
    /// Half of the driver's features that is set.
    pub driver_features_select: u32,
    /// Queue that the queue registers show.
    pub queue_select: u16,
    /// The device status, without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
    /// The configuration generation.
    pub config_generation: u32,
    /// The device works, or would if it were not paused.
    pub active: bool,
    /// The queues, by their number.
    pub queues: Vec<SavedQueue>,
}

impl Section for CoreState {
    const NAME: &'static str = "virtio";
    const VERSION: u32 = 1;
}

/// Registers of a queue, and the device's position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// The device's largest size.
    pub max_size: u16,
    /// The size, as the driver chose it.
    pub size: u16,
    /// Guest-physical address of the descriptor area.
    pub descriptors: u64,
    /// Guest-physical address of the driver area.
    pub driver: u64,
    /// Guest-physical address of the device area.
    pub device: u64,
    /// The driver enabled it and did not disable it since.
    pub ready: bool,
    /// The position, of a queue in use.
    pub ring: Option<SavedRing>,
}

/// The device's position in a queue: see [`RingState`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedRing {
    /// In a split queue.
    Split {
        /// Index of the next request.
        next_avail: u16,
        /// Index of the next completion.
        next_used: u16,
    },
    /// In a packed queue: slot and wrap counter.
    Packed {
        /// Where the next request begins.
        next_avail: (u16, bool),
        /// Where the next completion goes.
        next_used: (u16, bool),
    },
}

impl From<RingState> for SavedRing {
    fn from(ring: RingState) -> Self {
        let pair = |at: RingPosition| (at.slot, at.wrap);
        match ring {
            RingState::Split { next_avail, next_used } => Self::Split { next_avail, next_used },
            RingState::Packed { next_avail, next_used } => {
                Self::Packed { next_avail: pair(next_avail), next_used: pair(next_used) }
            }
        }
    }
}

impl From<SavedRing> for RingState {
    fn from(ring: SavedRing) -> Self {
        let position = |(slot, wrap)| RingPosition { slot, wrap };
        match ring {
            SavedRing::Split { next_avail, next_used } => Self::Split { next_avail, next_used },
            SavedRing::Packed { next_avail, next_used } => {
                Self::Packed { next_avail: position(next_avail), next_used: position(next_used) }
            }
        }
    }
}

impl SavedQueue {
    fn config(&self) -> QueueConfig {
        let Self { size, descriptors, driver, device, .. } = *self;
        QueueConfig { size, descriptors, driver, device }
    }
}

/// What is wrong with a state: what, and its value.
type Wrong = (&'static str, u64);

/// `Ok` if `holds`.
fn rule(holds: bool, what: &'static str, value: impl Into<u64>) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err((what, value.into())) }
}

impl CoreState {
    /// The features that the device was told of.
    fn negotiated(&self) -> u64 {
        if self.status & status::FEATURES_OK != 0 { self.driver_features } else { 0 }
    }

    /// Whether a driver can have brought this about in a device of this type, which offers these features and has such queues.
    fn check(&self, device_type: u32, offered: u64, queues: &[QueueRegisters]) -> Result<(), Wrong> {
        rule(self.device_type == device_type, "device type", self.device_type)?;
        rule(self.offered & !offered == 0, "features that are not offered here", self.offered & !offered)?;
        self.check_status()?;
        let count = self.queues.len() as u64;
        rule(count == queues.len() as u64, "number of queues", count)?;
        for (saved, queue) in self.queues.iter().zip(queues) {
            rule(saved.max_size == queue.max_size, "largest size of a queue", saved.max_size)?;
            let used = saved.ring.is_some();
            rule(used == (self.active && saved.ready), "position in a queue that is not in use", used)?;
            saved.ring.map_or(Ok(()), |ring| self.check_ring(ring, saved.size))?;
        }
        Ok(())
    }

    /// The initialization has an order (3.1.1), and ends with features that the device accepted.
    fn check_status(&self) -> Result<(), Wrong> {
        let now = self.status;
        let order = [
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
        ];
        let in_order = order.iter().all(|(bit, before)| now & bit == 0 || now & before != 0);
        rule(now & !DRIVER_BITS == 0 && in_order, "device status", now)?;
        if now & status::FEATURES_OK != 0 {
            let more = self.driver_features & !self.offered;
            rule(more == 0, "driver features that were not offered", more)?;
            let version = self.driver_features & features::VERSION_1 != 0;
            rule(version && !self.unknown_features, "driver features", self.driver_features)?;
        }
        let works = now & status::DRIVER_OK != 0 && !self.needs_reset;
        rule(works || !self.active, "activity with device status", now)
    }

    /// The rest is checked with the queue itself.
    fn check_ring(&self, ring: SavedRing, size: u16) -> Result<(), Wrong> {
        let packed = self.driver_features & features::RING_PACKED != 0;
        match ring {
            SavedRing::Split { next_avail, next_used } => {
                rule(!packed, "split queue with driver features", self.driver_features)?;
                let taken = next_avail.wrapping_sub(next_used);
                rule(taken <= size, "requests taken from a queue that has fewer entries", taken)
            }
            SavedRing::Packed { .. } => {
                rule(packed, "packed queue with driver features", self.driver_features)
            }
        }
    }
}

impl<T: TransportOps> DeviceCore<T> {
    /// Writes the section `virtio` and what the device adds. The device must be paused.
    ///
    /// A device that waits for a reset is saved without its queues: a driver finds them again only after it has set them up anew.
    ///
    /// # Errors
    /// [`BusError::Busy`] while the device works, [`BusError::State`], and as
    /// [`VirtioDevice::save`](crate::VirtioDevice::save).
    pub fn save(&self, state: &mut Saving<'_>) -> BusResult<()> {
        let needs_reset = self.control.needs_reset();
        let paused: Option<&[ActiveQueue]> = match &self.activity {
            Activity::Running { .. } => return Err(busy("save", state.instance())),
            Activity::Paused { queues, .. } if !needs_reset => Some(queues),
            Activity::Paused { .. } | Activity::Stopped => None,
        };
        let queues = (0..).zip(&self.queues).map(|(index, registers)| {
            let active = paused.and_then(|queues| queues.iter().find(|queue| queue.index == index));
            let QueueRegisters { max_size, config, ready } = *registers;
            let QueueConfig { size, descriptors, driver, device } = config;
            let ring = active.map(|active| active.queue.state().ring.into());
            SavedQueue { max_size, size, descriptors, driver, device, ready, ring }
        });
        let saved = CoreState {
            device_type: self.device.info().device_type.0,
            offered: self.offered,
            driver_features: self.driver_features,
            unknown_features: self.unknown_features,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            status: self.status,
            needs_reset,
            config_generation: self.lasting.generation(),
            active: paused.is_some(),
            queues: queues.collect(),
        };
        state.put(&saved).map_err(BusError::state("save"))?;
        self.device.save(state)
    }

    /// Becomes what was saved. The device must be new, and is paused afterwards; its driver finds the features that it was offered
    /// before, even if the device now has more.
    ///
    /// # Errors
    /// [`BusError::Busy`] if a driver has touched the device, [`BusError::State`] if there is no section, [`BusError::BadState`] if
    /// it cannot be this device's, and as [`VirtioDevice::restore`](crate::VirtioDevice::restore). The device is then only to be
    /// dropped.
    pub fn restore(&mut self, state: &mut Restoring<'_>) -> BusResult<()> {
        let name = state.instance().to_owned();
        if self.status != 0 || !matches!(self.activity, Activity::Stopped) {
            return Err(busy("restore", &name));
        }
        let saved: CoreState = state.take().map_err(BusError::state("restore"))?;
        saved
            .check(self.device.info().device_type.0, self.offered, &self.queues)
            .map_err(|(what, value)| BusError::BadState { device: name, what, value })?;
        self.put_registers(&saved);
        self.device.restore(saved.negotiated(), state)?;
        if saved.active {
            let queues = self.restore_queues(&saved)?;
            self.activity = Activity::Paused { queues, doorbells: self.bind_doorbells() };
        }
        self.restored = Some(self.config_space());
        Ok(())
    }

    fn put_registers(&mut self, saved: &CoreState) {
        self.offered = saved.offered;
        self.driver_features = saved.driver_features;
        self.unknown_features = saved.unknown_features;
        self.device_features_select = saved.device_features_select;
        self.driver_features_select = saved.driver_features_select;
        self.queue_select = saved.queue_select;
        self.status = saved.status;
        self.lasting.restore(saved.config_generation);
        if saved.needs_reset {
            self.control.restore_needs_reset();
        }
        for (queue, saved) in self.queues.iter_mut().zip(&saved.queues) {
            queue.config = saved.config();
            queue.ready = saved.ready;
        }
    }

    fn restore_queues(&self, saved: &CoreState) -> BusResult<Vec<ActiveQueue>> {
        let view = self.mem.view();
        let event_idx = saved.driver_features & features::RING_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(saved.queues.len());
        for ((index, saved), kick) in (0..).zip(&saved.queues).zip(&*self.kicks.0) {
            let Some(ring) = saved.ring else { continue };
            let (config, max_size) = (saved.config(), saved.max_size);
            let state = QueueState { config, max_size, event_idx, ring: ring.into() };
            let queue = VirtQueue::restore(state, &view).map_err(bus_error("restore a virtio queue"))?;
            queues.push(self.wire(index, queue, Arc::clone(kick)));
        }
        Ok(queues)
    }

    /// Interrupts the driver for what it may have missed.
    ///
    /// An interrupt that was sent before the save may still have been on its way through the host (an eventfd is emptied later) when
    /// the state of the interrupt controller was taken, and a driver that waits for it would wait for ever. A driver must cope with
    /// one that is for nothing (2.7.7.1). The configuration is told of only if it ever changed, as drivers may do much about it:
    /// before the save, or since the restore (`changed`).
    pub(super) fn announce(&self, irqs: &[Irq], changed: bool) {
        for irq in irqs {
            if let Err(error) = irq.trigger() {
                tracing::warn!(%error, "cannot interrupt the guest");
            }
        }
        if changed {
            self.control.config_changed();
        } else if self.lasting.generation() != 0 || self.control.needs_reset() {
            self.control.interrupt();
        }
    }
}

fn busy(op: &'static str, device: &str) -> BusError {
    BusError::Busy { op, device: device.to_owned() }
}
