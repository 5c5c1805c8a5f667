//! The boot-progress port: a guest writes a byte to say how far it is, as firmware does with POST codes.
//!
//! Linux also writes to this port to pass time, whatever happens to be in a register: each such write is an event like any
//! other, and whoever listens takes the values it agreed on with its guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use freestone_bus::{Device, GuestEvent, Notifier, Plug, Result, Wiring};

use crate::isa::{self, BytePorts, Saved, byte_device};
use crate::state::ProgressState;

/// Port of the device.
pub const PROGRESS_PORT: u16 = 0x80;

/// The boot-progress port. A read gives the last value written.
#[derive(Debug)]
pub struct ProgressPort {
    notifier: Notifier,
    last: Arc<AtomicU8>,
}

impl ProgressPort {
    /// A port that reports to `notifier`.
    pub fn new(notifier: Notifier) -> Self {
        Self { notifier, last: Arc::default() }
    }
}

impl BytePorts for ProgressPort {
    const PORTS: u8 = 1;

    fn inb(&mut self, _port: u8) -> u8 {
        self.last.load(Ordering::Relaxed)
    }

    fn outb(&mut self, _port: u8, value: u8) {
        self.last.store(value, Ordering::Relaxed);
        self.notifier.notify(GuestEvent::Progress(value));
    }
}

byte_device!(ProgressPort);

impl Saved for ProgressPort {
    type State = ProgressState;

    fn state(&self) -> ProgressState {
        ProgressState { last: self.last.load(Ordering::Relaxed) }
    }

    fn set_state(&mut self, state: &ProgressState) -> crate::Result<()> {
        self.last.store(state.last, Ordering::Relaxed);
        Ok(())
    }
}

/// Plugs a [`ProgressPort`] in at [`PROGRESS_PORT`].
#[derive(Debug, Default)]
pub struct ProgressPlug {
    last: Arc<AtomicU8>,
}

impl ProgressPlug {
    /// The device at its usual port.
    pub fn new() -> Self {
        Self::default()
    }

    /// The last value written, also after the device is plugged in: 0 until there is one.
    pub fn last(&self) -> Arc<AtomicU8> {
        Arc::clone(&self.last)
    }
}

impl Plug for ProgressPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let device = ProgressPort { notifier: wiring.notifier(), last: self.last };
        isa::plug(wiring, "progress", PROGRESS_PORT, device)
    }
}
