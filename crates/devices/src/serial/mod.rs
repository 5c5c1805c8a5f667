//! The serial port: a 16550A with its input and output on the host.
//!
//! Three parts, each with a lock of its own at most: the registers (`uart`), which do no I/O; the sink of output, which may be
//! slow; and the work, which reads the input. A vCPU that waits for a slow sink holds only the sink, so input and its escape
//! sequences still work. Lock order: sink, then registers.
//!
//! A guest writes a byte per access. The first byte after a pause is written at once; what follows within [`FLUSH_DELAY`] is
//! gathered up to a line, or to the end of the delay so that a prompt without a newline shows at once to a person. A port whose work nobody drives writes each byte by itself.

mod escape;
mod file;
mod input;
mod plug;
mod sink;
mod uart;

use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use freestone_bus::{Access, EFD_NONBLOCK, EventFd, IoDevice, Irq, Progress, Source, Work};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use self::input::Fill;
use self::sink::{Drain, Sink};
use self::uart::{BACKLOG, PORTS, Uart};
use crate::state::SerialState;
use crate::{Error, Result, isa};

pub use self::escape::{ESCAPE_HELP, EscapeAction, EscapeFilter, Escaped};
pub use self::file::{OutputLimit, SerialFile};
pub use self::input::{InputFilter, SerialInput};
pub use self::plug::{COM1_GSI, COM1_PORT, COM2_GSI, COM2_PORT, SerialPlug};

/// How long output without a newline may wait.
const FLUSH_DELAY: Duration = Duration::from_millis(4);
/// How long to wait for a sink that would block.
const RETRY_DELAY: Duration = Duration::from_millis(10);
/// Times a sink that would block is tried before the port goes away.
const LAST_TRIES: u32 = 20;
/// Output that is written though no newline came, in bytes.
const LONG_LINE: usize = 1024;

/// What went through a serial port, in bytes.
#[derive(Debug, Default)]
pub struct SerialCounters {
    written: AtomicU64,
    lost: AtomicU64,
    received: AtomicU64,
}

impl SerialCounters {
    /// Output that the sink took.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Output that was lost because the sink failed, or would block for too long.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Input that was accepted for the guest.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// How the registers reach the work that somebody drives.
struct Driver {
    /// Makes the work flush.
    timer: Arc<OwnedFd>,
    /// Makes the work read on.
    kick: Arc<EventFd>,
    /// The timer is running.
    armed: bool,
    /// The work stopped reading because the backlog was full.
    throttled: bool,
}

impl Driver {
    /// Has the work flush after `delay`; false if the host refuses.
    fn arm(&mut self, delay: Duration) -> bool {
        let value = Timespec { tv_sec: 0, tv_nsec: delay.subsec_nanos().into() };
        let timer = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        self.armed = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer).is_ok();
        self.armed
    }
}

/// When output is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// Now, on this thread.
    Now,
    /// Now if nobody else is writing, and the timer is to be started: this is the first byte after a pause.
    First,
    /// There is none, or the timer is running.
    Later,
}

struct Registers {
    uart: Uart,
    driver: Option<Driver>,
}

impl Registers {
    /// When the pending output is to be written.
    fn due(&mut self) -> Due {
        let pending = self.uart.pending();
        let (Some(last), len) = (pending.last(), pending.len()) else { return Due::Later };
        let whole = *last == b'\n' || len >= LONG_LINE;
        let Some(driver) = self.driver.as_mut().filter(|_| !whole) else { return Due::Now };
        if driver.armed { Due::Later } else { Due::First }
    }

    /// Has the work read on once half the backlog is free.
    fn unthrottle(&mut self) {
        if let Some(driver) = &mut self.driver
            && driver.throttled
            && self.uart.backlog() <= BACKLOG / 2
        {
            driver.throttled = false;
            if let Err(error) = driver.kick.write(1) {
                tracing::warn!(%error, "cannot wake the serial port's work");
            }
        }
    }
}

/// A serial port: eight registers on a bus, output to a writer, input by [`receive`](Self::receive) or a [`SerialPlug`].
pub struct Serial {
    registers: Mutex<Registers>,
    sink: Mutex<Sink>,
    counters: Arc<SerialCounters>,
}

impl Serial {
    /// A serial port that interrupts by `irq` and writes to `output`, each byte at once.
    ///
    /// `output` may fail: what it does not take is lost and counted. If it blocks, so does the vCPU. If it would block
    /// (`WouldBlock`), the bytes are kept and tried again with the next ones.
    pub fn new(irq: Irq, output: impl Write + Send + 'static) -> Self {
        Self::with_counters(irq, Box::new(output), Arc::default())
    }

    fn with_counters(irq: Irq, output: Box<dyn Write + Send>, counters: Arc<SerialCounters>) -> Self {
        Self {
            registers: Mutex::new(Registers { uart: Uart::new(irq), driver: None }),
            sink: Mutex::new(Sink::new(output)),
            counters,
        }
    }

    /// What went through so far.
    pub fn counters(&self) -> Arc<SerialCounters> {
        Arc::clone(&self.counters)
    }

    /// Gives the guest input and returns how many bytes were accepted: all, unless 64 KiB wait for the guest already.
    pub fn receive(&self, input: &[u8]) -> usize {
        let mut registers = self.registers();
        let accepted = input.len().min(BACKLOG.saturating_sub(registers.uart.backlog()));
        registers.uart.receive(input.get(..accepted).unwrap_or_default());
        self.counters.received.fetch_add(accepted as u64, Ordering::Relaxed);
        accepted
    }

    /// Writes all output, as far as the sink takes it.
    pub fn flush(&self) {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        self.drain(&mut sink);
    }

    /// What the port is, for a snapshot: its registers, what was received and not read, what was sent and not written. Nobody
    /// should drive its work meanwhile.
    pub fn state(&self) -> SerialState {
        let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        self.registers().uart.state(sink.unwritten())
    }

    /// Becomes what was saved. What was sent and not written comes with the next output or [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`Error::BadState`]; the port is then unchanged. [`Error::Io`] if it cannot interrupt.
    pub fn set_state(&self, state: &SerialState) -> Result<()> {
        self.registers().uart.set_state(state)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes pending output. The sink is held from taking the bytes to writing them: this keeps them in order.
    fn drain(&self, sink: &mut Sink) -> Drain {
        sink.take(self.registers().uart.pending(), &self.counters);
        let drain = sink.drain(&self.counters);
        if drain == Drain::Again {
            self.arm(RETRY_DELAY);
        }
        drain
    }

    fn arm(&self, delay: Duration) {
        if let Some(driver) = &mut self.registers().driver {
            driver.arm(delay);
        }
    }

    /// The timer went off, or something else woke the work: writes output unless somebody is at it.
    fn flush_late(&self) {
        if let Some(driver) = &mut self.registers().driver {
            driver.armed = false;
        }
        let mut sink = match self.sink.try_lock() {
            Ok(sink) => sink,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A vCPU is writing. It may have taken its bytes before the last ones came: look again.
            Err(TryLockError::WouldBlock) => return self.arm(RETRY_DELAY),
        };
        self.drain(&mut sink);
    }

    /// Writes all output, also to a sink that would block, which gets [`LAST_TRIES`]; what is then left is lost.
    fn flush_for_good(&self) {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..LAST_TRIES {
            if self.drain(&mut sink) == Drain::Empty {
                return;
            }
            std::thread::sleep(RETRY_DELAY);
        }
        sink.give_up(&self.counters);
    }
}

impl IoDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let first = isa::first_port(offset, data.len(), PORTS)?;
        let mut registers = self.registers();
        for (port, byte) in (first..PORTS).zip(data) {
            *byte = registers.uart.read(port);
        }
        registers.unthrottle();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        let first = isa::first_port(offset, data.len(), PORTS)?;
        let when = {
            let mut registers = self.registers();
            for (port, byte) in (first..PORTS).zip(data) {
                registers.uart.write(port, *byte);
            }
            registers.unthrottle();
            registers.due()
        };
        match when {
            Due::Now => self.flush(),
            Due::First => {
                // The byte goes first and the timer second: somebody may be waiting for that byte.
                if let Ok(mut sink) = self.sink.try_lock() {
                    self.drain(&mut sink);
                }
                let armed = match &mut self.registers().driver {
                    Some(driver) => driver.armed || driver.arm(FLUSH_DELAY),
                    None => false,
                };
                if !armed {
                    self.flush();
                }
            }
            Due::Later => {}
        }
        Ok(())
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("counters", &self.counters).finish_non_exhaustive()
    }
}

/// The work of a serial port: reads its input, and writes output that waited.
struct SerialWork {
    serial: Arc<Serial>,
    input: Option<SerialInput>,
    timer: Arc<OwnedFd>,
    kick: Arc<EventFd>,
    /// Input that was read and filtered.
    filtered: Vec<u8>,
}

impl SerialWork {
    fn new(serial: Arc<Serial>, input: Option<SerialInput>) -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(Error::io("create a timer for the serial port"))?;
        let kick = EventFd::new(EFD_NONBLOCK).map_err(Error::io("create an eventfd for the serial port"))?;
        Ok(Self { serial, input, timer: Arc::new(timer), kick: Arc::new(kick), filtered: Vec::new() })
    }

    /// From now on somebody drives this work: output may wait for it.
    fn attach(&self) {
        let (timer, kick) = (Arc::clone(&self.timer), Arc::clone(&self.kick));
        self.serial.registers().driver = Some(Driver { timer, kick, armed: false, throttled: false });
    }

    /// Room in the backlog; if there is none, the guest's reads will wake the work.
    fn room(&self) -> usize {
        let mut registers = self.serial.registers();
        let room = BACKLOG.saturating_sub(registers.uart.backlog());
        if room == 0
            && let Some(driver) = &mut registers.driver
        {
            driver.throttled = true;
        }
        room
    }
}

impl Work for SerialWork {
    fn sources(&self) -> Vec<Source> {
        let mut sources: Vec<Source> =
            vec![Arc::clone(&self.kick) as Source, Arc::clone(&self.timer) as Source];
        // Last, because a regular file cannot be watched; it is read to its end without that.
        sources.extend(self.input.as_ref().map(|input| input.fd() as Source));
        sources
    }

    fn process(&mut self) -> Progress {
        self.serial.flush_late();
        let room = self.room();
        let Some(input) = self.input.as_mut().filter(|_| room > 0) else { return Progress::Idle };
        self.filtered.clear();
        let fill = input.fill(room, &mut self.filtered);
        // A filter may only take away, so this is within the room; one that adds overshoots by a read at most.
        self.serial.registers().uart.receive(&self.filtered);
        self.serial.counters.received.fetch_add(self.filtered.len() as u64, Ordering::Relaxed);
        match fill {
            Fill::Some => Progress::More,
            Fill::Nothing => Progress::Idle,
        }
    }
}
