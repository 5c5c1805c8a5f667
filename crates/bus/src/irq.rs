//! Interrupts as a device sees them: something to push, with the wire behind it hidden.

use std::fmt;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// The far end of an [`Irq`].
pub trait IrqTarget: Send + Sync {
    /// Delivers one edge.
    ///
    /// # Errors
    /// Whatever the host says when the edge cannot be delivered.
    fn trigger(&self) -> io::Result<()>;

    /// The eventfd behind this interrupt, where there is one: a kernel or another process can then trigger it.
    fn eventfd(&self) -> Option<&EventFd> {
        None
    }
}

impl IrqTarget for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }

    fn eventfd(&self) -> Option<&EventFd> {
        Some(self)
    }
}

struct FnTarget<F>(F);

impl<F: Fn() + Send + Sync> IrqTarget for FnTarget<F> {
    fn trigger(&self) -> io::Result<()> {
        (self.0)();
        Ok(())
    }
}

/// An edge-triggered interrupt that a device may raise; cheap to clone.
#[derive(Clone)]
pub struct Irq(Arc<dyn IrqTarget>);

impl Irq {
    /// An interrupt with this far end: an irqfd, for example.
    pub fn new(target: impl IrqTarget + 'static) -> Self {
        Self(Arc::new(target))
    }

    /// An interrupt that calls `f`: for tests and for layering one interrupt on another.
    pub fn from_fn(f: impl Fn() + Send + Sync + 'static) -> Self {
        Self::new(FnTarget(f))
    }

    /// An interrupt nobody hears.
    pub fn null() -> Self {
        Self::from_fn(|| {})
    }

    /// Raises the interrupt.
    ///
    /// # Errors
    /// Whatever the host says when the edge cannot be delivered.
    #[inline]
    pub fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }

    /// As [`IrqTarget::eventfd`].
    pub fn eventfd(&self) -> Option<&EventFd> {
        self.0.eventfd()
    }
}

impl fmt::Debug for Irq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Irq").field("eventfd", &self.eventfd()).finish()
    }
}

/// vm-superio's devices take an [`Irq`] as their interrupt.
impl vm_superio::Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Self::trigger(self)
    }
}

/// The interrupt controller of a machine, as far as wiring devices to it goes.
pub trait IrqChip: Send + Sync {
    /// Number of interrupt lines (global system interrupts are `0..pins()`).
    fn pins(&self) -> u32;

    /// An edge-triggered interrupt on line `gsi`.
    ///
    /// # Errors
    /// If the line does not exist or cannot be claimed.
    fn edge(&self, gsi: u32) -> io::Result<Irq>;

    /// Message-signalled interrupts, where the controller takes them.
    fn msi(&self) -> Option<Arc<dyn MsiSource>> {
        None
    }
}

/// What a device writes to signal an interrupt without a line (PCI 3.0, section 6.8; on x86, Intel SDM Vol. 3A, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Guest-physical address of the write.
    pub address: u64,
    /// Value written.
    pub data: u32,
}

/// Makes routes for message-signalled interrupts.
pub trait MsiSource: Send + Sync {
    /// A route that leads nowhere yet.
    ///
    /// # Errors
    /// If the host has no more routes.
    fn route(&self) -> io::Result<Box<dyn MsiRoute>>;
}

/// The way of one interrupt vector of a device to the interrupt controller. Dropping it gives the route back.
pub trait MsiRoute: Send + Sync {
    /// Delivers the message that is set; while there is none, a trigger is lost, so a masked vector keeps its own pending bit.
    fn irq(&self) -> Irq;

    /// Sets or takes away the message. When this returns, a trigger delivers the new one.
    ///
    /// # Errors
    /// If the host refuses the message.
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn an_eventfd_irq_counts_its_edges() {
        let fd = EventFd::new(0).unwrap();
        let irq = Irq::new(fd.try_clone().unwrap());
        irq.trigger().unwrap();
        irq.clone().trigger().unwrap();
        assert_eq!(fd.read().unwrap(), 2);
        assert!(irq.eventfd().is_some());
    }

    #[test]
    fn a_function_irq_has_no_eventfd_and_calls_the_function() {
        let n = Arc::new(AtomicU32::new(0));
        let irq = Irq::from_fn({
            let n = n.clone();
            move || {
                n.fetch_add(1, Ordering::Relaxed);
            }
        });
        vm_superio::Trigger::trigger(&irq).unwrap();
        assert_eq!(n.load(Ordering::Relaxed), 1);
        assert!(irq.eventfd().is_none());
    }
}
