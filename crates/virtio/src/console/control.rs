//! Control messages of a console with several ports (virtio 1.2, section 5.3.6.2): pure bookkeeping, no queue.

use super::Size;
use super::port::PortState;

/// Bytes of a message without what follows it: port, event, value.
pub(super) const MESSAGE_LEN: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Most messages that wait for the driver. A driver that asks without giving buffers gets no more than these.
pub(super) const MAX_WAITING: usize = 256;
/// Bytes of the longest message: that with a port's name.
pub(super) const MAX_MESSAGE: usize = MESSAGE_LEN + super::port::MAX_NAME;

/// Messages that wait for a buffer of the driver.
#[derive(Debug, Default)]
pub(super) struct Control {
    waiting: std::collections::VecDeque<Vec<u8>>,
}

impl Control {
    /// The messages that wait, oldest first.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.waiting.iter()
    }

    /// These messages wait, and no others.
    pub(super) fn restore(&mut self, messages: Vec<Vec<u8>>) {
        self.waiting = messages.into();
    }

    /// Takes the next message.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        self.waiting.pop_front()
    }

    /// Puts a message back that found no buffer.
    pub(super) fn put_back(&mut self, message: Vec<u8>) {
        self.waiting.push_front(message);
    }

    /// Says that the size of `port` changed.
    pub(super) fn resize(&mut self, port: u32, size: Size) {
        let mut payload = Vec::with_capacity(4);
        payload.extend_from_slice(&size.cols.to_le_bytes());
        payload.extend_from_slice(&size.rows.to_le_bytes());
        self.push(port, RESIZE, 0, &payload);
    }

    /// Says that the host's end of `port` is open or closed.
    pub(super) fn open(&mut self, port: u32, open: bool) {
        self.push(port, PORT_OPEN, open.into(), &[]);
    }

    /// Acts on a message of the driver. What it says wrongly is ignored, as it harms nobody but its driver.
    pub(super) fn take(&mut self, message: [u8; MESSAGE_LEN], ports: &mut [PortState], size: Size) {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let event = u16::from_le_bytes([e0, e1]);
        let value = u16::from_le_bytes([v0, v1]);
        if event == DEVICE_READY {
            if value == 1 {
                for (number, _) in (0u32..).zip(ports.iter()) {
                    self.push(number, DEVICE_ADD, 1, &[]);
                }
            }
            return;
        }
        let Some(port) = usize::try_from(id).ok().and_then(|index| ports.get_mut(index)) else {
            tracing::debug!(port = id, event, "a console message for a port that does not exist");
            return;
        };
        match event {
            PORT_READY => {
                port.ready = value == 1;
                if port.ready {
                    self.introduce(id, port, size);
                }
            }
            PORT_OPEN => port.guest_open = value == 1,
            other => tracing::debug!(port = id, event = other, "an unknown console message"),
        }
    }

    /// Tells the driver what a port is.
    fn introduce(&mut self, id: u32, port: &PortState, size: Size) {
        if port.console {
            self.push(id, CONSOLE_PORT, 1, &[]);
            self.resize(id, size);
        }
        if !port.name.is_empty() {
            self.push(id, PORT_NAME, 1, port.name.as_bytes());
        }
        if port.host_open {
            self.open(id, true);
        }
    }

    fn push(&mut self, port: u32, event: u16, value: u16, payload: &[u8]) {
        if self.waiting.len() >= MAX_WAITING {
            tracing::debug!(port, event, "too many console messages wait for the driver");
            return;
        }
        let mut message = Vec::with_capacity(MESSAGE_LEN + payload.len());
        message.extend_from_slice(&port.to_le_bytes());
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        message.extend_from_slice(payload);
        self.waiting.push_back(message);
    }
}
