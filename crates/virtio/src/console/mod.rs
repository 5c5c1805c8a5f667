//! virtio-console (virtio 1.2, section 5.3): ports that carry bytes between the guest and the host.
//!
//! With one port it is a plain console with a size; with more, VIRTIO_CONSOLE_F_MULTIPORT names, opens and closes them by
//! control messages. The host's ends are [`PortInput`] and [`PortOutput`]; the device knows no terminal.

mod control;
mod port;
mod state;
mod worker;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{EFD_NONBLOCK, EventFd};
use freestone_snapshot::{Restoring, Saving};

pub use port::{Port, PortCounts, PortInput, PortOutput, ReadInput};
pub use state::{ConsoleState, SavedPort};

use crate::device::{DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::{DeviceControl, Error, Result};
use control::Control;
use port::PortState;
use worker::ConsoleWorker;

/// Feature bits of this device type, as masks (5.3.3).
pub mod feature {
    /// `VIRTIO_CONSOLE_F_SIZE`: the configuration has the size of the console.
    pub const SIZE: u64 = 1 << 0;
    /// `VIRTIO_CONSOLE_F_MULTIPORT`: there are several ports, managed by control messages.
    pub const MULTIPORT: u64 = 1 << 1;
    /// `VIRTIO_CONSOLE_F_EMERG_WRITE`: the configuration takes single characters before there are queues.
    pub const EMERG_WRITE: u64 = 1 << 2;
}

/// Most ports: each costs the guest two queues and an interrupt vector for each.
pub const MAX_PORTS: usize = 31;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;
/// Bytes of the configuration space (5.3.4).
const CONFIG_LEN: u32 = 12;
/// Where the emergency write register is in it.
const EMERG_WR: usize = 8;

/// Size of a console in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

impl Default for Size {
    fn default() -> Self {
        Self { cols: 80, rows: 25 }
    }
}

/// What outlives a worker: the host's ends and what the driver was told.
#[derive(Debug)]
struct State {
    size: Size,
    /// Somebody set the size, so that a restored one does not replace it.
    size_set: bool,
    /// The driver is to be told of the size when the device starts.
    size_changed: bool,
    ports: Vec<PortState>,
    control: Control,
    /// Present while a driver uses the device.
    driver: Option<DeviceControl>,
    multiport: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the worker after a change from outside.
    wake: Arc<EventFd>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A virtio console.
pub struct Console {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

impl Console {
    /// A console with these ports; the first is the one that a kernel takes as its console.
    ///
    /// # Errors
    /// [`Error::Config`] without a port or with more than [`MAX_PORTS`]; [`Error::Io`] if the host gives no eventfd.
    pub fn new(ports: Vec<Port>) -> Result<Self> {
        let reason = match ports.len() {
            0 => Some("a console needs a port"),
            n if n > MAX_PORTS => Some("a console has 31 ports at most"),
            _ => None,
        };
        if let Some(reason) = reason {
            return Err(Error::Config { device: "console".to_owned(), reason });
        }
        let several = ports.len() > 1;
        let features = feature::SIZE | feature::EMERG_WRITE | if several { feature::MULTIPORT } else { 0 };
        // Two queues for each port, and two for control messages after the first port's.
        let queues = if several { 2 * ports.len() + 2 } else { 2 };
        let info = DeviceInfo {
            device_type: DeviceType::CONSOLE,
            features,
            queue_max_sizes: vec![QUEUE_SIZE; queues],
            config_len: CONFIG_LEN,
        };
        let wake = EventFd::new(EFD_NONBLOCK).map_err(Error::io("create an eventfd"))?;
        let state = State {
            size: Size::default(),
            size_set: false,
            size_changed: false,
            ports: ports.into_iter().map(PortState::new).collect(),
            control: Control::default(),
            driver: None,
            multiport: false,
        };
        Ok(Self { info, shared: Arc::new(Shared { state: Mutex::new(state), wake: Arc::new(wake) }) })
    }

    /// A handle for whoever owns the host's ends.
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle { shared: Arc::clone(&self.shared) }
    }
}

impl VirtioDevice for Console {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let state = self.shared.lock();
        let ports = u32::try_from(state.ports.len()).unwrap_or(0);
        let [c0, c1] = state.size.cols.to_le_bytes();
        let [r0, r1] = state.size.rows.to_le_bytes();
        let [p0, p1, p2, p3] = ports.to_le_bytes();
        let space = [c0, c1, r0, r1, p0, p1, p2, p3, 0, 0, 0, 0];
        let rest = space.get(offset..).unwrap_or_default();
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    }

    /// The only writable field takes one character (5.3.4).
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == EMERG_WR
            && let (Some(byte), Some(port)) = (data.first(), self.shared.lock().ports.first_mut())
        {
            port.emergency(*byte);
        }
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let mut state = self.shared.lock();
        state.multiport = resources.features & feature::MULTIPORT != 0;
        if std::mem::take(&mut state.size_changed) {
            resources.control.config_changed();
        }
        state.driver = Some(resources.control.clone());
        drop(state);
        let worker = ConsoleWorker::new(resources, Arc::clone(&self.shared))?;
        Ok(vec![Box::new(worker)])
    }

    fn reset(&mut self) {
        let mut state = self.shared.lock();
        state.driver = None;
        state.multiport = false;
        state.size_changed = false;
        state.control = Control::default();
        state.ports.iter_mut().for_each(PortState::reset);
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.save_state(state)
    }

    fn restore(&mut self, features: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restore_state(features, state)
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Changes a console from outside; cheap to clone.
#[derive(Clone)]
pub struct ConsoleHandle {
    shared: Arc<Shared>,
}

impl ConsoleHandle {
    /// Tells the guest that the console's size changed.
    ///
    /// # Errors
    /// If the worker cannot be woken.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        let mut state = self.shared.lock();
        state.size_set = true;
        if state.size == size {
            return Ok(());
        }
        state.size = size;
        if state.multiport {
            state.control.resize(0, size);
            drop(state);
            self.shared.wake.write(1)
        } else {
            if let Some(driver) = &state.driver {
                driver.config_changed();
            }
            Ok(())
        }
    }

    /// Tells the guest that the host's end of port `port` was opened or closed. Without several ports there is no way to say
    /// so.
    ///
    /// # Errors
    /// `NotFound` if there is no such port; if the worker cannot be woken.
    pub fn set_open(&self, port: usize, open: bool) -> io::Result<()> {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let target = state.ports.get_mut(port).ok_or(io::ErrorKind::NotFound)?;
        target.host_open = open;
        if state.multiport && target.ready {
            state.control.open(u32::try_from(port).unwrap_or(u32::MAX), open);
        }
        drop(guard);
        self.shared.wake.write(1)
    }

    /// What went over port `port` so far.
    pub fn counts(&self, port: usize) -> Option<PortCounts> {
        self.shared.lock().ports.get(port).map(|port| port.counts)
    }

    /// Whether the guest has port `port` open.
    pub fn guest_open(&self, port: usize) -> bool {
        self.shared.lock().ports.get(port).is_some_and(|port| port.guest_open)
    }
}

impl fmt::Debug for ConsoleHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConsoleHandle")
    }
}
