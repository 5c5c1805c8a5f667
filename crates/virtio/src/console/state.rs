//! What a console remembers: its size, what either side knows of the ports, and bytes and messages that are under way.

use freestone_bus::{Error as BusError, Result as BusResult};
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::control::{MAX_MESSAGE, MAX_WAITING};
use super::port::CHUNK;
use super::worker::MAX_REQUEST;
use super::{Console, Size, State, feature};

/// The section `virtio-console`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Columns and rows.
    pub size: (u16, u16),
    /// The size changed and the driver was not told yet.
    pub size_changed: bool,
    /// A driver works with `VIRTIO_CONSOLE_F_MULTIPORT`.
    pub multiport: bool,
    /// Control messages that wait for the driver, oldest first.
    pub messages: Vec<Vec<u8>>,
    /// The ports.
    pub ports: Vec<SavedPort>,
}

/// A port of a [`ConsoleState`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPort {
    /// Its name.
    pub name: String,
    /// It is a console.
    pub console: bool,
    /// The driver knows it.
    pub ready: bool,
    /// The guest has it open.
    pub guest_open: bool,
    /// The host has it open.
    pub host_open: bool,
    /// Bytes of the host that the guest has not taken.
    pub input: Vec<u8>,
    /// Bytes of the guest that the host has not taken.
    pub output: Vec<u8>,
}

impl Section for ConsoleState {
    const NAME: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}

impl ConsoleState {
    /// Whether it is of a console with the ports of `state`, whose driver accepted `features`, and within bounds.
    fn check(&self, features: u64, state: &State) -> Result<(), (&'static str, u64)> {
        let count = |n: usize| n as u64;
        let multiport = features & feature::MULTIPORT != 0;
        let longest = self.messages.iter().map(Vec::len).max().unwrap_or(0);
        let mut rules = vec![
            (self.ports.len() == state.ports.len(), "number of ports", count(self.ports.len())),
            (multiport || !self.multiport, "several ports with features", features),
            (self.messages.len() <= MAX_WAITING, "control messages", count(self.messages.len())),
            (longest <= MAX_MESSAGE, "length of a control message", count(longest)),
        ];
        for (number, (saved, port)) in (0u64..).zip(self.ports.iter().zip(&state.ports)) {
            rules.extend([
                (saved.name == port.name && saved.console == port.console, "name or kind of port", number),
                (saved.input.len() <= CHUNK, "bytes for the guest", count(saved.input.len())),
                (saved.output.len() <= MAX_REQUEST, "bytes of the guest", count(saved.output.len())),
            ]);
        }
        rules.iter().find(|(kept, ..)| !kept).map_or(Ok(()), |&(_, what, value)| Err((what, value)))
    }
}

impl Console {
    pub(super) fn save_state(&self, state: &mut Saving<'_>) -> BusResult<()> {
        let now = self.shared.lock();
        let port = |port: &super::port::PortState| SavedPort {
            name: port.name.clone(),
            console: port.console,
            ready: port.ready,
            guest_open: port.guest_open,
            host_open: port.host_open,
            input: port.waiting.clone(),
            output: port.unsent.clone(),
        };
        let saved = ConsoleState {
            size: (now.size.cols, now.size.rows),
            size_changed: now.size_changed,
            multiport: now.multiport,
            messages: now.control.waiting().cloned().collect(),
            ports: now.ports.iter().map(port).collect(),
        };
        drop(now);
        state.put(&saved).map_err(BusError::state("save"))
    }

    /// What the host's side has changed by now, compared to what the driver knows, is told to the driver: a size that was set, and
    /// ends that are open or closed.
    pub(super) fn restore_state(&mut self, features: u64, state: &mut Restoring<'_>) -> BusResult<()> {
        let saved: ConsoleState = state.take().map_err(BusError::state("restore"))?;
        let mut guard = self.shared.lock();
        let now = &mut *guard;
        saved.check(features, now).map_err(|(what, value)| BusError::BadState {
            device: state.instance().to_owned(),
            what,
            value,
        })?;
        now.multiport = saved.multiport;
        now.size_changed = saved.size_changed;
        now.control.restore(saved.messages);
        let multiport = saved.multiport;
        for (number, (port, saved)) in (0u32..).zip(now.ports.iter_mut().zip(saved.ports)) {
            port.ready = saved.ready;
            port.guest_open = saved.guest_open;
            port.waiting = saved.input;
            port.unsent = saved.output;
            if multiport && saved.ready && port.host_open != saved.host_open {
                now.control.open(number, port.host_open);
            }
        }
        let (cols, rows) = saved.size;
        let size = Size { cols, rows };
        match now.size_set {
            true if now.size != size && now.multiport => now.control.resize(0, now.size),
            true => now.size_changed |= now.size != size,
            false => now.size = size,
        }
        Ok(())
    }
}
