//! [`DeviceControl`]: how a worker tells the driver that the device changed or gave up. Lock-free, so that it can be used from
//! inside a step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use freestone_bus::Irq;

use crate::Error;

/// Faults that are logged as warnings; a guest that goes on breaking its device is logged at a lower level.
const LOUD_FAULTS: u64 = 8;

/// What outlives a reset.
#[derive(Debug, Default)]
pub(crate) struct Lasting {
    name: String,
    generation: AtomicU32,
    faults: AtomicU64,
}

impl Lasting {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn restore(&self, generation: u32) {
        self.generation.store(generation, Ordering::Release);
    }

    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }
}

/// Reports to the driver of one activation of a device; cheap to clone. After a reset it is without effect on the status.
#[derive(Debug, Clone)]
pub struct DeviceControl {
    needs_reset: Arc<AtomicBool>,
    irq: Irq,
    lasting: Arc<Lasting>,
}

impl DeviceControl {
    pub(crate) fn new(irq: Irq, lasting: Arc<Lasting>) -> Self {
        Self { needs_reset: Arc::default(), irq, lasting }
    }

    /// A control that is connected to nothing: for workers that run without a transport.
    pub fn detached(name: &str) -> Self {
        Self::new(Irq::null(), Arc::new(Lasting::new(name)))
    }

    /// The device met nonsense: sets DEVICE_NEEDS_RESET, sends a configuration change notification (virtio 1.2, section
    /// 2.1.2), counts, and logs `error`. The caller must leave the queues alone afterwards.
    pub fn fault(&self, error: &Error) {
        let before = self.lasting.faults.fetch_add(1, Ordering::Relaxed);
        let device = &self.lasting.name;
        if before < LOUD_FAULTS {
            tracing::warn!(%device, %error, "the driver broke the device: it waits for a reset");
        } else {
            tracing::debug!(%device, %error, "the driver broke the device again");
        }
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.interrupt();
        }
    }

    /// Whether [`fault`](Self::fault) was called.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The configuration space changed: raises the generation and notifies the driver.
    pub fn config_changed(&self) {
        self.lasting.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt();
    }

    /// The device gave up before it was saved, which was counted and told then.
    pub(crate) fn restore_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
    }

    /// Sends a configuration change notification.
    pub(crate) fn interrupt(&self) {
        if let Err(error) = self.irq.trigger() {
            tracing::warn!(device = %self.lasting.name, %error, "cannot interrupt the guest");
        }
    }
}
