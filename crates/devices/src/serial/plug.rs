//! How a serial port joins a machine.

use std::fmt;
use std::io::Write;
use std::sync::Arc;

use freestone_bus::{Description, Device, Error, Plug, Resource, Result, Spawn, Task, Wiring, spawn};

use freestone_snapshot::{Restoring, Saving};

use super::uart::PORTS;
use super::{Serial, SerialCounters, SerialInput, SerialWork};
use crate::isa;

/// First port of the first serial port, `ttyS0` to Linux.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of the first serial port.
pub const COM1_GSI: u32 = 4;
/// First port of the second serial port, `ttyS1` to Linux.
pub const COM2_PORT: u16 = 0x2f8;
/// Interrupt line of the second serial port.
pub const COM2_GSI: u32 = 3;

/// Plugs a [`Serial`] in, announced as `PNP0501`.
///
/// Its work reads the input and writes output that did not end in a newline. Output is written on the vCPU's thread as
/// lines come, and whatever is left at the latest by [`Device::pause`], [`Device::shutdown`] or drop.
pub struct SerialPlug {
    base: u16,
    gsi: u32,
    output: Box<dyn Write + Send>,
    input: Option<SerialInput>,
    counters: Arc<SerialCounters>,
}

impl SerialPlug {
    /// A serial port at I/O port `base` with interrupt line `gsi`.
    pub fn new(base: u16, gsi: u32, output: impl Write + Send + 'static, input: Option<SerialInput>) -> Self {
        Self { base, gsi, output: Box::new(output), input, counters: Arc::default() }
    }

    /// The first serial port.
    pub fn com1(output: impl Write + Send + 'static, input: Option<SerialInput>) -> Self {
        Self::new(COM1_PORT, COM1_GSI, output, input)
    }

    /// The second serial port.
    pub fn com2(output: impl Write + Send + 'static, input: Option<SerialInput>) -> Self {
        Self::new(COM2_PORT, COM2_GSI, output, input)
    }

    /// What will have gone through the port, also after it is plugged in.
    pub fn counters(&self) -> Arc<SerialCounters> {
        Arc::clone(&self.counters)
    }
}

impl fmt::Debug for SerialPlug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPlug")
            .field("base", &self.base)
            .field("gsi", &self.gsi)
            .field("input", &self.input)
            .finish_non_exhaustive()
    }
}

impl Plug for SerialPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let (gsi, irq) = wiring.irq(Some(self.gsi))?;
        let serial = Arc::new(Serial::with_counters(irq, self.output, self.counters));
        let work = SerialWork::new(Arc::clone(&serial), self.input)?;
        wiring.pio(self.base, PORTS.into(), Arc::clone(&serial) as _)?;
        let mut device =
            SerialDevice { serial, spawner: wiring.spawner(), state: State::Stopped(work), restored: false };
        device.start()?;
        wiring.describe(Description {
            hid: "PNP0501",
            resources: vec![Resource::Pio { base: self.base, len: PORTS.into() }, Resource::Irq { gsi }],
        });
        Ok(Box::new(device))
    }
}

enum State {
    Running(Task<SerialWork>),
    Stopped(SerialWork),
    /// The work is lost: it could not be started again, or was ended for good.
    Ended,
}

/// A serial port that is plugged in.
struct SerialDevice {
    serial: Arc<Serial>,
    spawner: Arc<dyn Spawn>,
    state: State,
    /// It was restored and not yet resumed.
    restored: bool,
}

impl SerialDevice {
    fn start(&mut self) -> Result<()> {
        self.state = match std::mem::replace(&mut self.state, State::Ended) {
            State::Stopped(work) => {
                work.attach();
                match spawn(&*self.spawner, work) {
                    Ok(task) => State::Running(task),
                    Err(source) => {
                        self.detach();
                        return Err(Error::Io { op: "start the work of the serial port", source });
                    }
                }
            }
            other => other,
        };
        Ok(())
    }

    fn stop(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Ended) {
            State::Running(task) => task.stop().map_or(State::Ended, State::Stopped),
            other => other,
        };
        self.detach();
    }

    /// Nobody drives the work any more: output must not wait for it.
    fn detach(&self) {
        self.serial.registers().driver = None;
        self.serial.flush();
    }
}

impl Device for SerialDevice {
    fn name(&self) -> &str {
        "serial"
    }

    fn pause(&mut self) -> Result<()> {
        self.stop();
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.start()?;
        if std::mem::take(&mut self.restored) {
            self.serial.registers().uart.raise_pending();
            self.serial.flush();
        }
        Ok(())
    }

    fn save(&mut self, state: &mut Saving<'_>) -> Result<()> {
        isa::save(state, &self.serial.state())
    }

    fn restore(&mut self, state: &mut Restoring<'_>) -> Result<()> {
        // A device that was just plugged in has its work running: it could read input into registers that are about to go.
        self.stop();
        self.restored = true;
        Ok(self.serial.set_state(&isa::take(state)?)?)
    }

    fn shutdown(&mut self) -> Result<()> {
        self.stop();
        self.state = State::Ended;
        self.serial.flush_for_good();
        Ok(())
    }
}

impl Drop for SerialDevice {
    fn drop(&mut self) {
        self.stop();
    }
}
