//! The keyboard controller's reset line, and system control port B.
//!
//! There is no keyboard and no mouse, and the controller is not announced to the guest: firmware tables should leave the
//! 8042 flag of the FADT's boot architecture flags clear. What is here is what guests use without asking: command 0xFE,
//! which pulses the processor's reset line, and port 0x61, whose bits some of them wait for.

use std::convert::Infallible;

use freestone_bus::{Device, GuestEvent, Notifier, Plug, Result, Wiring};
use vm_superio::{I8042Device, Trigger};

use crate::isa::{self, BytePorts, Saved, byte_device};
use crate::state::I8042State;

/// First port of the controller; it claims five (data at +0, system control port B at +1, command and status at +4).
pub const I8042_PORT: u16 = 0x60;

const DATA: u8 = 0;
const CONTROL_B: u8 = 1;
const COMMAND: u8 = 4;

/// Speaker gate and speaker data: the writable bits of port B.
const CONTROL_B_WRITABLE: u8 = 0b11;
/// Toggles with each memory refresh, on which old drivers time short delays.
const CONTROL_B_REFRESH: u8 = 1 << 4;
/// Output of timer 2. It reads as expired, because a guest that waits for it waits without a limit.
const CONTROL_B_TIMER2: u8 = 1 << 5;

#[derive(Debug)]
struct ResetLine(Notifier);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> std::result::Result<(), Infallible> {
        self.0.notify(GuestEvent::Reset);
        Ok(())
    }
}

/// The part of an i8042 that resets the machine.
#[derive(Debug)]
pub struct I8042 {
    controller: I8042Device<ResetLine>,
    control_b: u8,
}

impl I8042 {
    /// A controller that reports resets to `notifier`.
    pub fn new(notifier: Notifier) -> Self {
        Self { controller: I8042Device::new(ResetLine(notifier)), control_b: 0 }
    }
}

impl BytePorts for I8042 {
    const PORTS: u8 = 5;

    fn inb(&mut self, port: u8) -> u8 {
        match port {
            // Both buffers are always empty: nothing to read, and a command may be written.
            DATA | COMMAND => self.controller.read(port),
            CONTROL_B => {
                self.control_b ^= CONTROL_B_REFRESH;
                self.control_b | CONTROL_B_TIMER2
            }
            _ => 0xff,
        }
    }

    fn outb(&mut self, port: u8, value: u8) {
        match port {
            DATA | COMMAND => {
                let Ok(()) = self.controller.write(port, value);
            }
            CONTROL_B => {
                self.control_b = (self.control_b & !CONTROL_B_WRITABLE) | (value & CONTROL_B_WRITABLE);
            }
            _ => {}
        }
    }
}

byte_device!(I8042);

impl Saved for I8042 {
    type State = I8042State;

    fn state(&self) -> I8042State {
        I8042State { control_b: self.control_b }
    }

    fn set_state(&mut self, state: &I8042State) -> crate::Result<()> {
        self.control_b = state.control_b;
        Ok(())
    }
}

/// Plugs an [`I8042`] in at [`I8042_PORT`].
#[derive(Debug, Default)]
pub struct I8042Plug(());

impl I8042Plug {
    /// The controller at its usual ports.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Plug for I8042Plug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let device = I8042::new(wiring.notifier());
        isa::plug(wiring, "i8042", I8042_PORT, device)
    }
}
