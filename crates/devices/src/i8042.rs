//! The keyboard controller: its reset line, system control port B, and a keyboard if one is wanted.
//!
//! Without a keyboard the controller is not announced to the guest: firmware tables should leave the 8042 flag of the FADT's boot
//! architecture flags clear. What is here then is what guests use without asking: command 0xFE, which pulses the processor's
//! reset line, and port 0x61, whose bits some of them wait for.
//!
//! With a keyboard it is announced, and drivers find a controller with one keyboard and no mouse. Its keys are Ctrl, Alt and
//! Delete, by which a person asks an operating system to restart.

use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{Description, Device, FixedHardware, GuestEvent, Irq, Notifier, Plug, Resource, Wiring};
use freestone_snapshot::{Restoring, Saving};

use crate::isa::{self, BytePorts, Saved, byte_device};
use crate::keyboard::Keyboard;
use crate::state::{I8042State, PortState, bad, check};
use crate::{Error, Result};

/// First port of the controller; it claims five (data at +0, system control port B at +1, command and status at +4).
pub const I8042_PORT: u16 = 0x60;
/// Interrupt line of the keyboard.
pub const KEYBOARD_GSI: u32 = 1;

const NAME: &str = "i8042";

const DATA: u8 = 0;
const CONTROL_B: u8 = 1;
const COMMAND: u8 = 4;

/// Speaker gate and speaker data: the writable bits of port B.
const CONTROL_B_WRITABLE: u8 = 0b11;
/// Toggles with each memory refresh, on which old drivers time short delays.
const CONTROL_B_REFRESH: u8 = 1 << 4;
/// Output of timer 2. It reads as expired, because a guest that waits for it waits without a limit.
const CONTROL_B_TIMER2: u8 = 1 << 5;

/// Status: the output buffer has a byte for the guest.
const STATUS_OUTPUT: u8 = 1 << 0;
/// Status: the self test passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Status: the last write was a command.
const STATUS_COMMAND: u8 = 1 << 3;
/// Status: the keyboard is not locked.
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Command byte: the keyboard interrupts.
const CONFIG_INTERRUPT: u8 = 1 << 0;
const CONFIG_SYSTEM: u8 = 1 << 2;
/// Command byte: the keyboard's clock is held, so that it sends nothing.
const CONFIG_DISABLED: u8 = 1 << 4;
/// Command byte: the same for the mouse that is not there.
const CONFIG_NO_MOUSE: u8 = 1 << 5;
/// Command byte: scan codes are translated from set 2 to set 1.
const CONFIG_TRANSLATE: u8 = 1 << 6;

const READ_CONFIG: u8 = 0x20;
const WRITE_CONFIG: u8 = 0x60;
const DISABLE_MOUSE: u8 = 0xa7;
const ENABLE_MOUSE: u8 = 0xa8;
const TEST_MOUSE: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const ECHO_AS_KEYBOARD: u8 = 0xd2;
const ECHO_AS_MOUSE: u8 = 0xd3;
const TO_MOUSE: u8 = 0xd4;
const PULSE_RESET: u8 = 0xfe;

const SELF_TEST_PASSED: u8 = 0x55;
/// The mouse's clock line is stuck low: there is none.
const NO_MOUSE: u8 = 0x01;
/// Output port: not reset, A20 on.
const OUTPUT_PORT: u8 = 0b11;
const OUTPUT_PORT_NOT_RESET: u8 = 1 << 0;

/// The side of the controller to which the keyboard is connected.
#[derive(Debug)]
struct Port {
    keyboard: Keyboard,
    irq: Irq,
    /// The command byte.
    config: u8,
    /// The command whose argument comes next.
    command: Option<u8>,
    last_was_command: bool,
    /// The output buffer.
    output: Option<u8>,
}

impl Port {
    fn new(irq: Irq) -> Self {
        Self {
            keyboard: Keyboard::new(),
            irq,
            config: CONFIG_INTERRUPT | CONFIG_SYSTEM | CONFIG_NO_MOUSE | CONFIG_TRANSLATE,
            command: None,
            last_was_command: false,
            output: None,
        }
    }

    fn status(&self) -> u8 {
        let output = if self.output.is_some() { STATUS_OUTPUT } else { 0 };
        let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
        STATUS_SYSTEM | STATUS_UNLOCKED | output | command
    }

    /// Puts the keyboard's next byte into the output buffer, if that is empty and the keyboard may send.
    fn pump(&mut self) {
        if self.output.is_none() && self.config & CONFIG_DISABLED == 0 {
            self.output = self.keyboard.send();
            self.interrupt();
        }
    }

    /// Interrupts if there is output.
    fn interrupt(&self) {
        if self.output.is_some()
            && self.config & CONFIG_INTERRUPT != 0
            && let Err(error) = self.irq.trigger()
        {
            tracing::warn!(%error, "the keyboard cannot interrupt the guest");
        }
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.output.take().unwrap_or(0);
        self.pump();
        byte
    }

    /// Takes a command; the one that resets is not for here.
    fn begin(&mut self, command: u8) {
        self.last_was_command = true;
        self.command = None;
        match command {
            READ_CONFIG => self.output = Some(self.config),
            DISABLE_MOUSE => self.config |= CONFIG_NO_MOUSE,
            ENABLE_MOUSE => self.config &= !CONFIG_NO_MOUSE,
            TEST_MOUSE => self.output = Some(NO_MOUSE),
            SELF_TEST => self.output = Some(SELF_TEST_PASSED),
            TEST_KEYBOARD => self.output = Some(0),
            DISABLE_KEYBOARD => self.config |= CONFIG_DISABLED,
            ENABLE_KEYBOARD => self.config &= !CONFIG_DISABLED,
            READ_OUTPUT_PORT => self.output = Some(OUTPUT_PORT),
            WRITE_CONFIG | WRITE_OUTPUT_PORT | ECHO_AS_KEYBOARD | ECHO_AS_MOUSE | TO_MOUSE => {
                self.command = Some(command);
            }
            _ => {}
        }
        self.pump();
    }

    /// Takes data; returns whether it resets the machine.
    fn write_data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match self.command.take() {
            Some(WRITE_CONFIG) => self.config = value,
            Some(WRITE_OUTPUT_PORT) => return value & OUTPUT_PORT_NOT_RESET == 0,
            Some(ECHO_AS_KEYBOARD) => {
                self.output = Some(value);
                self.interrupt();
            }
            // By the missing flag of the mouse a driver sees that there is none, and need not wait.
            Some(ECHO_AS_MOUSE) => self.output = Some(value),
            Some(_) => {}
            None => {
                self.config &= !CONFIG_DISABLED;
                self.keyboard.receive(value);
            }
        }
        self.pump();
        false
    }

    fn state(&self) -> PortState {
        PortState {
            keyboard: self.keyboard.state(),
            config: self.config,
            command: self.command,
            last_was_command: self.last_was_command,
            output: self.output,
        }
    }

    fn set_state(&mut self, state: &PortState) -> Result<()> {
        let command = state.command.unwrap_or(TO_MOUSE);
        let has_argument =
            matches!(command, WRITE_CONFIG | WRITE_OUTPUT_PORT | ECHO_AS_KEYBOARD | ECHO_AS_MOUSE | TO_MOUSE);
        check(NAME, "command", has_argument, command)?;
        self.keyboard = Keyboard::from_state(&state.keyboard)?;
        (self.config, self.command) = (state.config, state.command);
        (self.last_was_command, self.output) = (state.last_was_command, state.output);
        Ok(())
    }
}

/// The controller: with [`new`](Self::new) what resets the machine, and with [`with_keyboard`](Self::with_keyboard) a keyboard too.
#[derive(Debug)]
pub struct I8042 {
    notifier: Notifier,
    control_b: u8,
    port: Option<Port>,
}

impl I8042 {
    /// A controller that reports resets to `notifier`.
    pub fn new(notifier: Notifier) -> Self {
        Self { notifier, control_b: 0, port: None }
    }

    /// A controller with a keyboard that interrupts by `irq`.
    pub fn with_keyboard(notifier: Notifier, irq: Irq) -> Self {
        Self { port: Some(Port::new(irq)), ..Self::new(notifier) }
    }

    /// Presses Ctrl, Alt and Delete, if there is a keyboard. Linux restarts the machine then, or does what its init says.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no keyboard, its driver turned it off, or does not read what it sends.
    pub fn ctrl_alt_del(&mut self) -> Result<()> {
        let failed = |kind: ErrorKind| Error::io("press Ctrl, Alt and Delete")(kind);
        let port = self.port.as_mut().ok_or_else(|| failed(ErrorKind::NotConnected))?;
        if !port.keyboard.ctrl_alt_del(port.config & CONFIG_TRANSLATE != 0) {
            return Err(failed(ErrorKind::WouldBlock));
        }
        port.pump();
        Ok(())
    }
}

impl BytePorts for I8042 {
    const PORTS: u8 = 5;

    fn inb(&mut self, port: u8) -> u8 {
        match (port, &mut self.port) {
            (DATA, Some(port)) => port.read_data(),
            (COMMAND, Some(port)) => port.status(),
            // Both buffers are always empty: nothing to read, and a command may be written.
            (DATA | COMMAND, None) => 0,
            (CONTROL_B, _) => {
                self.control_b ^= CONTROL_B_REFRESH;
                self.control_b | CONTROL_B_TIMER2
            }
            _ => 0xff,
        }
    }

    fn outb(&mut self, port: u8, value: u8) {
        match (port, &mut self.port) {
            (COMMAND, _) if value == PULSE_RESET => self.notifier.notify(GuestEvent::Reset),
            (COMMAND, Some(port)) => port.begin(value),
            (DATA, Some(port)) => {
                let resets = port.write_data(value);
                if resets {
                    self.notifier.notify(GuestEvent::Reset);
                }
            }
            (CONTROL_B, _) => {
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
        I8042State { control_b: self.control_b, port: self.port.as_ref().map(Port::state) }
    }

    fn set_state(&mut self, state: &I8042State) -> Result<()> {
        let control_b = state.control_b;
        let writable = CONTROL_B_WRITABLE | CONTROL_B_REFRESH;
        check(NAME, "system control port B", control_b & !writable == 0, control_b)?;
        match (&mut self.port, &state.port) {
            (Some(port), Some(state)) => port.set_state(state)?,
            (None, None) => {}
            (_, state) => return bad(NAME, "number of keyboards", state.is_some()),
        }
        self.control_b = control_b;
        Ok(())
    }
}

/// The keyboard of a machine, to be used from any thread.
#[derive(Debug, Clone)]
pub struct I8042Handle(Arc<Mutex<I8042>>);

impl I8042Handle {
    fn lock(&self) -> MutexGuard<'_, I8042> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`I8042::ctrl_alt_del`].
    ///
    /// # Errors
    /// As [`I8042::ctrl_alt_del`]; before the device is plugged in, and after its machine has ended, there is no keyboard.
    pub fn ctrl_alt_del(&self) -> Result<()> {
        self.lock().ctrl_alt_del()
    }
}

/// Plugs an [`I8042`] in at [`I8042_PORT`]: without a keyboard it is not announced, with one as `PNP0303`.
#[derive(Debug)]
pub struct I8042Plug {
    keyboard: bool,
    device: I8042Handle,
}

impl Default for I8042Plug {
    fn default() -> Self {
        Self::new()
    }
}

impl I8042Plug {
    /// The controller at its usual ports.
    pub fn new() -> Self {
        let nobody = I8042::new(Notifier::new(|_| {}));
        Self { keyboard: false, device: I8042Handle(Arc::new(Mutex::new(nobody))) }
    }

    /// Connects a keyboard, with interrupt line [`KEYBOARD_GSI`].
    #[must_use]
    pub fn keyboard(mut self) -> Self {
        self.keyboard = true;
        self
    }

    /// What presses keys, also after the device is plugged in.
    pub fn handle(&self) -> I8042Handle {
        self.device.clone()
    }
}

impl Plug for I8042Plug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let notifier = wiring.notifier();
        *self.device.lock() = if self.keyboard {
            let (gsi, irq) = wiring.irq(Some(KEYBOARD_GSI))?;
            let port = |offset: u8| Resource::Pio { base: I8042_PORT + u16::from(offset), len: 1 };
            wiring.describe(Description {
                hid: "PNP0303",
                resources: vec![port(DATA), port(COMMAND), Resource::Irq { gsi }],
            });
            wiring.fixed_hardware(FixedHardware::Keyboard8042);
            I8042::with_keyboard(notifier, irq)
        } else {
            I8042::new(notifier)
        };
        wiring.pio(I8042_PORT, I8042::PORTS.into(), Arc::clone(&self.device.0) as _)?;
        Ok(Box::new(Plugged { device: self.device, restored: false }))
    }
}

struct Plugged {
    device: I8042Handle,
    /// It was restored and not yet resumed.
    restored: bool,
}

impl Device for Plugged {
    fn name(&self) -> &str {
        NAME
    }

    fn resume(&mut self) -> freestone_bus::Result<()> {
        // The edge may have been on its way when the state was saved. One too many does no harm.
        if std::mem::take(&mut self.restored)
            && let Some(port) = &self.device.lock().port
        {
            port.interrupt();
        }
        Ok(())
    }

    fn save(&mut self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        isa::save(state, &self.device.lock().state())
    }

    fn restore(&mut self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restored = true;
        Ok(self.device.lock().set_state(&isa::take(state)?)?)
    }
}

impl Drop for Plugged {
    /// Handles may outlive the machine, whose interrupts they are not to hold.
    fn drop(&mut self) {
        self.device.lock().port = None;
    }
}
