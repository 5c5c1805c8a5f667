//! The registers of the UART with its receive FIFO, over vm-superio's.
//!
//! vm-superio has the 16550's registers and interrupts; added here are what it leaves out: the FIFO control register, the order
//! of priority in the interrupt identification register, received-data interrupts that stay pending while there is data,
//! and a backlog of input, so that nothing is lost for want of room. This part does no I/O: output is gathered in a buffer.
//!
//! A driver that sets the port up clears the FIFO and reads away what it finds, several times. On a real line that loses what
//! comes too early, such as a script piped into a machine that still boots. Here, input that is cleared away goes back to the
//! backlog and waits until the driver listens: until it enables the received-data interrupt, or polls for data.

use std::collections::VecDeque;
use std::io::{self, Write};

use freestone_bus::Irq;
use vm_superio::serial::NoEvents;

use crate::state::{SerialState, check};
use crate::{Error, Result};

pub(super) const PORTS: u8 = 8;

/// Receive and transmit registers, and with DLAB the low byte of the divisor.
pub(super) const DATA: u8 = 0;
const IER: u8 = 1;
/// Interrupt identification when read, FIFO control when written.
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;

/// The bits of the interrupt enable register that exist.
const IER_VALID: u8 = 0b1111;
const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IIR_NONE: u8 = 0b001;
const IIR_TRANSMITTER_EMPTY: u8 = 0b010;
const IIR_RECEIVED: u8 = 0b100;
const IIR_FIFOS_ENABLED: u8 = 0b1100_0000;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const MCR_LOOPBACK: u8 = 1 << 4;
const LCR_DLAB: u8 = 1 << 7;
const LSR_DATA_READY: u8 = 1 << 0;

/// Input that may wait for room in the FIFO, in bytes. Past this the source is left alone.
pub(super) const BACKLOG: usize = 64 * 1024;

/// Most input, and most output, that a saved state may have: what a port keeps is bounded, but by its host's habits also, and a
/// state that was saved must be taken.
const SAVED_MAX: usize = 16 * BACKLOG;

/// Reads of the line status register, with nothing sent between them, after which the driver is taken to poll for input.
/// Drivers that set the port up or send read it a few times only.
const POLLS: u8 = 32;

/// Where vm-superio's transmitter puts its bytes: a buffer that the device empties.
#[derive(Debug, Default)]
pub(super) struct Pending(pub Vec<u8>);

impl Write for Pending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A 16550A.
#[derive(Debug)]
pub(super) struct Uart {
    core: vm_superio::Serial<Irq, NoEvents, Pending>,
    fifo_size: usize,
    fifos_enabled: bool,
    /// A transmitter-empty interrupt that a received-data one hid when the identification register was read.
    hidden_transmitter_empty: bool,
    /// Input for which the FIFO had no room yet.
    backlog: VecDeque<u8>,
    /// The driver cleared the FIFO and does not listen yet.
    deaf: bool,
    /// Reads of the line status register while deaf.
    polls: u8,
    /// Something in the FIFO came by loopback and not from the line.
    looped: bool,
    /// Interrupts that could not be delivered.
    pub lost_interrupts: u64,
}

impl Uart {
    pub(super) fn new(irq: Irq) -> Self {
        let core = vm_superio::Serial::new(irq, Pending::default());
        let fifo_size = core.fifo_capacity();
        Self {
            core,
            fifo_size,
            fifos_enabled: false,
            hidden_transmitter_empty: false,
            backlog: VecDeque::new(),
            deaf: false,
            polls: 0,
            looped: false,
            lost_interrupts: 0,
        }
    }

    /// What the port is; `unwritten` is output that left it before what is [`pending`](Self::pending).
    pub(super) fn state(&self, unwritten: &[u8]) -> SerialState {
        let core = self.core.state();
        SerialState {
            divisor: u16::from_le_bytes([core.baud_divisor_low, core.baud_divisor_high]),
            interrupt_enable: core.interrupt_enable,
            received_pending: core.interrupt_identification & IIR_RECEIVED != 0,
            transmitter_empty_pending: core.interrupt_identification & IIR_TRANSMITTER_EMPTY != 0,
            transmitter_empty_hidden: self.hidden_transmitter_empty,
            line_control: core.line_control,
            modem_control: core.modem_control,
            modem_status: core.modem_status,
            scratch: core.scratch,
            fifos_enabled: self.fifos_enabled,
            fifo: core.in_buffer,
            looped: self.looped,
            backlog: self.backlog.iter().copied().collect(),
            deaf: self.deaf,
            polls: self.polls,
            output: [unwritten, &self.core.writer().0].concat(),
        }
    }

    /// Becomes what was saved. The output that was on its way is then [`pending`](Self::pending), and input that came here before
    /// stands behind the saved one.
    pub(super) fn set_state(&mut self, state: &SerialState) -> Result<()> {
        const NAME: &str = "serial";
        let enabled = state.interrupt_enable;
        check(NAME, "interrupt enable register", enabled & !IER_VALID == 0, enabled)?;
        check(NAME, "count of polls", state.polls < POLLS, state.polls)?;
        check(NAME, "length of the FIFO", state.fifo.len() <= self.fifo_size, state.fifo.len() as u64)?;
        for (what, bytes) in
            [("length of the backlog", &state.backlog), ("length of the output", &state.output)]
        {
            check(NAME, what, bytes.len() <= SAVED_MAX, bytes.len() as u64)?;
        }
        let [baud_divisor_low, baud_divisor_high] = state.divisor.to_le_bytes();
        let received = if state.received_pending { IIR_RECEIVED } else { 0 };
        let transmitter_empty = if state.transmitter_empty_pending { IIR_TRANSMITTER_EMPTY } else { 0 };
        let ready = if state.fifo.is_empty() { 0 } else { LSR_DATA_READY };
        let idle = vm_superio::SerialState::default();
        let registers = vm_superio::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: enabled,
            interrupt_identification: match received | transmitter_empty {
                0 => IIR_NONE,
                pending => pending,
            },
            line_control: state.line_control,
            line_status: idle.line_status | ready,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let early_fifo = self.core.state().in_buffer;
        // This interrupts if something is pending. Whether that arrives is for the restored interrupt controller to say.
        let (irq, output) = (self.core.interrupt_evt().clone(), Pending(state.output.clone()));
        self.core = vm_superio::Serial::from_state(&registers, irq, NoEvents, output).map_err(|error| {
            Error::Io { op: "interrupt for the serial port", source: io::Error::other(error) }
        })?;
        self.fifos_enabled = state.fifos_enabled;
        self.hidden_transmitter_empty = state.transmitter_empty_hidden;
        let early = std::mem::take(&mut self.backlog);
        self.backlog = state.backlog.iter().copied().collect();
        (self.deaf, self.polls, self.looped) = (state.deaf, state.polls, state.looped);
        if !early_fifo.is_empty() || !early.is_empty() {
            self.backlog.extend(early_fifo.into_iter().chain(early));
            self.refill();
        }
        Ok(())
    }

    /// Interrupts if something is pending, as after a restore: the edge may have been on its way when the state was saved. One
    /// too many does no harm.
    pub(super) fn raise_pending(&mut self) {
        let core = self.core.state();
        let enabled = |bit| core.interrupt_enable & bit != 0;
        let transmitter_empty =
            self.hidden_transmitter_empty || core.interrupt_identification & IIR_TRANSMITTER_EMPTY != 0;
        if (enabled(IER_RECEIVED) && !core.in_buffer.is_empty()
            || enabled(IER_TRANSMITTER_EMPTY) && transmitter_empty)
            && let Err(error) = self.core.interrupt_evt().trigger()
        {
            self.lost_interrupt(&vm_superio::serial::Error::Trigger(error));
        }
    }

    /// Output that nobody took yet.
    pub(super) fn pending(&mut self) -> &mut Vec<u8> {
        &mut self.core.writer_mut().0
    }

    /// Bytes of input that wait for room in the FIFO.
    pub(super) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Adds input behind what is waiting; the caller keeps it within [`BACKLOG`].
    pub(super) fn receive(&mut self, input: &[u8]) {
        self.backlog.extend(input);
        self.refill();
    }

    pub(super) fn read(&mut self, port: u8) -> u8 {
        match port {
            DATA if !self.dlab() => {
                let byte = self.core.read(DATA);
                if !self.data_ready() {
                    self.looped = false;
                    self.refill();
                }
                byte
            }
            LSR => {
                if self.deaf {
                    self.polls += 1;
                    if self.polls >= POLLS {
                        self.listen();
                    }
                }
                self.core.read(LSR)
            }
            IIR_FCR => self.identify_interrupt(),
            _ => self.core.read(port),
        }
    }

    pub(super) fn write(&mut self, port: u8, value: u8) {
        match port {
            IIR_FCR => self.control_fifos(value),
            DATA if !self.dlab() => {
                self.hidden_transmitter_empty = false;
                self.polls = 0;
                self.looped |= self.loopback();
                self.write_core(DATA, value);
            }
            IER if !self.dlab() => {
                self.write_core(IER, value);
                if value & IER_TRANSMITTER_EMPTY == 0 {
                    self.hidden_transmitter_empty = false;
                }
                if value & IER_RECEIVED != 0 {
                    self.listen();
                }
            }
            MCR => {
                self.write_core(MCR, value);
                // In loopback mode the line is cut off; input goes on when it ends.
                self.refill();
            }
            _ => self.write_core(port, value),
        }
    }

    fn write_core(&mut self, port: u8, value: u8) {
        // The buffer takes everything, so all that can fail is the interrupt.
        if let Err(error) = self.core.write(port, value) {
            self.lost_interrupt(&error);
        }
    }

    fn lost_interrupt(&mut self, error: &vm_superio::serial::Error<io::Error>) {
        if self.lost_interrupts == 0 {
            tracing::warn!(%error, "the serial port cannot interrupt the guest");
        }
        self.lost_interrupts = self.lost_interrupts.saturating_add(1);
    }

    fn dlab(&mut self) -> bool {
        self.core.read(LCR) & LCR_DLAB != 0
    }

    fn loopback(&mut self) -> bool {
        self.core.read(MCR) & MCR_LOOPBACK != 0
    }

    fn data_ready(&mut self) -> bool {
        self.core.read(LSR) & LSR_DATA_READY != 0
    }

    /// The driver wants input.
    fn listen(&mut self) {
        self.deaf = false;
        self.polls = 0;
        self.refill();
    }

    /// Moves as much of the backlog into the FIFO as there is room for.
    fn refill(&mut self) {
        if self.deaf {
            return;
        }
        // The backlog is a ring: it comes as at most two slices.
        for _ in 0..2 {
            let room = self.core.fifo_capacity();
            if room == 0 || self.backlog.is_empty() {
                return;
            }
            // The bytes are in the FIFO even if the interrupt then fails, so it is the room that says how many went.
            if let Err(error) = self.core.enqueue_raw_bytes(self.backlog.as_slices().0) {
                self.lost_interrupt(&error);
            }
            self.backlog.drain(..room - self.core.fifo_capacity());
        }
    }

    fn control_fifos(&mut self, value: u8) {
        // Switching the FIFOs on or off clears them too.
        let enable = value & FCR_ENABLE != 0;
        if (enable && value & FCR_CLEAR_RECEIVER != 0) || enable != self.fifos_enabled {
            self.clear_receiver();
        }
        self.fifos_enabled = enable;
    }

    /// Empties the FIFO; what came from the line goes back to it.
    fn clear_receiver(&mut self) {
        let lcr = self.core.read(LCR);
        self.write_core(LCR, lcr & !LCR_DLAB);
        let mut cleared = Vec::with_capacity(self.fifo_size);
        while cleared.len() < self.fifo_size && self.data_ready() {
            cleared.push(self.core.read(DATA));
        }
        self.write_core(LCR, lcr);
        if !std::mem::take(&mut self.looped) {
            for byte in cleared.into_iter().rev() {
                self.backlog.push_front(byte);
            }
        }
        if self.interrupts_enabled() & IER_RECEIVED != 0 {
            self.listen();
        } else {
            (self.deaf, self.polls) = (true, 0);
        }
    }

    /// Reads the interrupt identification register: the pending interrupt of highest priority. Reading acknowledges a
    /// transmitter-empty interrupt if that is the one shown; a received-data one lasts until the data are read.
    fn identify_interrupt(&mut self) -> u8 {
        let fifos = if self.fifos_enabled { IIR_FIFOS_ENABLED } else { 0 };
        // vm-superio gives all that is pending at once and acknowledges all of it.
        let pending = self.core.read(IIR_FCR);
        let enabled = self.interrupts_enabled();
        let transmitter_empty = enabled & IER_TRANSMITTER_EMPTY != 0
            && (self.hidden_transmitter_empty || pending & IIR_TRANSMITTER_EMPTY != 0);
        if enabled & IER_RECEIVED != 0 && self.data_ready() {
            self.hidden_transmitter_empty = transmitter_empty;
            return fifos | IIR_RECEIVED;
        }
        self.hidden_transmitter_empty = false;
        fifos | if transmitter_empty { IIR_TRANSMITTER_EMPTY } else { IIR_NONE }
    }

    fn interrupts_enabled(&mut self) -> u8 {
        // The register shares its port with the divisor; the state gives it whatever DLAB says, but copies the FIFO.
        if self.dlab() { self.core.state().interrupt_enable } else { self.core.read(IER) }
    }
}
