//! Why a machine ends, and where that is decided: by the first of vCPUs, devices and handles that says so.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use freestone_bus::{GuestEvent, LoopHandle, Notifier};
use freestone_hypervisor::SystemEvent;
use freestone_vcpu::{Crash, StopReason};

/// Why a machine ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest turned its power off.
    PowerOff,
    /// The guest reset itself: a reboot.
    Reset,
    /// The guest's kernel reported a panic before it reset or turned its power off.
    Panicked,
    /// All vCPUs halted with nothing that could wake them.
    Halted,
    /// A vCPU cannot go on: a triple fault, an instruction the hypervisor cannot execute, a failed entry.
    Crashed(Box<Crash>),
    /// A call of the hypervisor failed.
    Failed {
        /// Number of the vCPU.
        vcpu: u32,
        /// The failure.
        error: String,
    },
    /// Somebody stopped the machine from outside.
    Stopped,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::Panicked => f.write_str("the guest's kernel panicked"),
            Self::Halted => f.write_str("the guest halted for good"),
            Self::Crashed(crash) => write!(f, "the guest crashed: {}", crash.summary()),
            Self::Failed { vcpu, error } => write!(f, "vCPU {vcpu} failed: {error}"),
            Self::Stopped => f.write_str("the machine was stopped"),
        }
    }
}

/// What vCPU threads, devices and handles share with the machine's owner.
pub(crate) struct Shared {
    end: Mutex<Option<ExitReason>>,
    panicked: AtomicBool,
    called: AtomicBool,
    wake: LoopHandle,
}

impl Shared {
    pub(crate) fn new(wake: LoopHandle) -> Arc<Self> {
        Arc::new(Self {
            end: Mutex::new(None),
            panicked: AtomicBool::new(false),
            called: AtomicBool::new(false),
            wake,
        })
    }

    /// The first reason counts: what follows is its consequence.
    pub(crate) fn end(&self, reason: ExitReason) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        if let Err(error) = self.wake.wake() {
            tracing::error!(%error, "cannot wake the event loop");
        }
    }

    /// Asks the machine's owner to look at what there is to do.
    pub(crate) fn call(&self) {
        self.called.store(true, Ordering::Release);
        if let Err(error) = self.wake.wake() {
            tracing::error!(%error, "cannot wake the event loop");
        }
    }

    pub(crate) fn called(&self) -> bool {
        self.called.load(Ordering::Acquire)
    }

    pub(crate) fn take_call(&self) -> bool {
        self.called.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn ended(&self) -> bool {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(crate) fn take_end(&self) -> ExitReason {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or(ExitReason::Stopped)
    }

    pub(crate) fn notifier(self: &Arc<Self>) -> Notifier {
        let shared = Arc::clone(self);
        Notifier::new(move |event| shared.guest_event(event))
    }

    fn guest_event(&self, event: GuestEvent) {
        tracing::debug!(?event, "guest event");
        let panicked = self.panicked.load(Ordering::Relaxed);
        match event {
            GuestEvent::PowerOff | GuestEvent::Reset if panicked => self.end(ExitReason::Panicked),
            GuestEvent::PowerOff => self.end(ExitReason::PowerOff),
            GuestEvent::Reset => self.end(ExitReason::Reset),
            // A panic alone ends nothing: the guest may still write a dump before it resets.
            GuestEvent::Panicked => self.panicked.store(true, Ordering::Relaxed),
            _ => {}
        }
    }

    /// The guest ended the run loop of a vCPU.
    pub(crate) fn guest_stopped(&self, reason: StopReason, crash: impl FnOnce() -> Crash) {
        match reason {
            StopReason::SystemEvent(SystemEvent::Shutdown) => self.guest_event(GuestEvent::PowerOff),
            StopReason::SystemEvent(SystemEvent::Reset) => self.guest_event(GuestEvent::Reset),
            _ => self.end(ExitReason::Crashed(Box::new(crash()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use freestone_bus::EventLoop;

    use super::*;

    fn shared() -> Arc<Shared> {
        Shared::new(EventLoop::new().unwrap().handle())
    }

    #[test]
    fn the_first_reason_to_end_counts() {
        let shared = shared();
        shared.notifier().notify(GuestEvent::Reset);
        shared.end(ExitReason::Stopped);
        assert!(shared.ended());
        assert!(matches!(shared.take_end(), ExitReason::Reset));
    }

    #[test]
    fn a_reset_after_a_panic_is_a_panic_but_a_panic_alone_does_not_end_the_machine() {
        let shared = shared();
        shared.notifier().notify(GuestEvent::Panicked);
        assert!(!shared.ended());
        shared.notifier().notify(GuestEvent::Reset);
        assert!(matches!(shared.take_end(), ExitReason::Panicked));
    }

    #[test]
    fn progress_does_not_end_the_machine() {
        let shared = shared();
        shared.notifier().notify(GuestEvent::Progress(7));
        assert!(!shared.ended());
    }
}
