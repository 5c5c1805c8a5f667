//! Power-off and reset of a hardware-reduced ACPI machine: the sleep control, sleep status and reset registers
//! (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7).
//!
//! Where the registers are, the guest learns from the FADT, and the sleep type of S5 from the DSDT's `_S5` package.
//! [`PowerPlug`] announces them as fixed hardware; the constants are for those who write such tables themselves.

use freestone_bus::{Device, FixedHardware, GuestEvent, Notifier, Plug, Result, Wiring};

use crate::isa::{self, BytePorts, Saved, byte_device};
use crate::state::{PowerState, check};

/// Port of the sleep control register (FADT `SLEEP_CONTROL_REG`, one byte).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Port of the sleep status register (FADT `SLEEP_STATUS_REG`, one byte).
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Port of the reset register (FADT `RESET_REG`, one byte).
pub const RESET_PORT: u16 = 0x602;
/// Value that resets the machine when it is written to the reset register (FADT `RESET_VALUE`).
pub const RESET_VALUE: u8 = 0x42;
/// `SLP_TYP` of S5, soft off (first element of the DSDT's `_S5` package).
pub const S5_TYPE: u8 = 5;

const CONTROL: u8 = 0;
const RESET: u8 = 2;

/// `SLP_TYPx`, bits 2 to 4 of the sleep control register.
const SLP_TYP: u8 = 0b0001_1100;
const SLP_TYP_SHIFT: u32 = 2;
/// `SLP_EN`, bit 5: write-only, enters the sleep state.
const SLP_EN: u8 = 1 << 5;

/// The sleep and reset registers.
#[derive(Debug)]
pub struct Power {
    notifier: Notifier,
    control: u8,
}

impl Power {
    /// Registers that report power-off and reset to `notifier`.
    pub fn new(notifier: Notifier) -> Self {
        Self { notifier, control: 0 }
    }
}

impl BytePorts for Power {
    const PORTS: u8 = 3;

    fn inb(&mut self, port: u8) -> u8 {
        match port {
            CONTROL => self.control,
            // WAK_STS is never set: no state but S5 exists, and nobody wakes from that. The reset register reads as 0.
            _ => 0,
        }
    }

    fn outb(&mut self, port: u8, value: u8) {
        match port {
            CONTROL => {
                self.control = value & SLP_TYP;
                if value & SLP_EN != 0 && (value & SLP_TYP) >> SLP_TYP_SHIFT == S5_TYPE {
                    self.notifier.notify(GuestEvent::PowerOff);
                }
            }
            RESET if value == RESET_VALUE => self.notifier.notify(GuestEvent::Reset),
            _ => {}
        }
    }
}

byte_device!(Power);

impl Saved for Power {
    type State = PowerState;

    fn state(&self) -> PowerState {
        PowerState { control: self.control }
    }

    fn set_state(&mut self, state: &PowerState) -> crate::Result<()> {
        check("power", "sleep control register", state.control & !SLP_TYP == 0, state.control)?;
        self.control = state.control;
        Ok(())
    }
}

/// Plugs [`Power`] in at [`SLEEP_CONTROL_PORT`].
#[derive(Debug, Default)]
pub struct PowerPlug(());

impl PowerPlug {
    /// The registers at their usual ports.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Plug for PowerPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let device = Power::new(wiring.notifier());
        let device = isa::plug(wiring, "power", SLEEP_CONTROL_PORT, device)?;
        wiring.fixed_hardware(FixedHardware::Sleep {
            control: SLEEP_CONTROL_PORT,
            status: SLEEP_STATUS_PORT,
            s5_type: S5_TYPE,
        });
        wiring.fixed_hardware(FixedHardware::Reset { port: RESET_PORT, value: RESET_VALUE });
        Ok(device)
    }
}
