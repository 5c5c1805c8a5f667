//! The power button: what a person presses to have the operating system shut the machine down (ACPI 6.5, section 4.8.2.2.1.2).
//!
//! It only asks. Linux passes it on as a key (`CONFIG_ACPI_BUTTON`), and a program such as systemd-logind or acpid acts on it.

use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};

use freestone_bus::{Device, FixedHardware, Irq, Plug, Wiring};
use freestone_snapshot::{Restoring, Saving};

use crate::isa::{save, take};
use crate::state::{PowerButtonState, check};
use crate::{Error, Result};

const NAME: &str = "power button";

/// The button, to be pressed from any thread.
#[derive(Debug, Clone, Default)]
pub struct PowerButton(Arc<Mutex<Option<Irq>>>);

impl PowerButton {
    /// Presses it once.
    ///
    /// # Errors
    /// [`Error::Io`] if it is in no machine, or the guest cannot be told.
    pub fn press(&self) -> Result<()> {
        let irq = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pressed = irq.as_ref().map_or_else(|| Err(ErrorKind::NotConnected.into()), Irq::trigger);
        pressed.map_err(Error::io("press the power button"))
    }

    fn connect(&self, irq: Option<Irq>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = irq;
    }
}

/// Plugs a power button in, with an interrupt line of its own, announced as [`FixedHardware::PowerButton`].
#[derive(Debug, Default)]
pub struct PowerButtonPlug {
    handle: PowerButton,
}

impl PowerButtonPlug {
    /// A button.
    pub fn new() -> Self {
        Self::default()
    }

    /// What presses it, also after it is plugged in.
    pub fn handle(&self) -> PowerButton {
        self.handle.clone()
    }
}

impl Plug for PowerButtonPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let (gsi, irq) = wiring.irq(None)?;
        self.handle.connect(Some(irq));
        wiring.fixed_hardware(FixedHardware::PowerButton { gsi });
        Ok(Box::new(Plugged { handle: self.handle, gsi }))
    }
}

struct Plugged {
    handle: PowerButton,
    gsi: u32,
}

impl Device for Plugged {
    fn name(&self) -> &str {
        NAME
    }

    fn save(&mut self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        save(state, &PowerButtonState { gsi: self.gsi })
    }

    fn restore(&mut self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let PowerButtonState { gsi } = take(state)?;
        Ok(check(NAME, "interrupt line, which the guest knows,", gsi == self.gsi, gsi)?)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        self.handle.connect(None);
    }
}
