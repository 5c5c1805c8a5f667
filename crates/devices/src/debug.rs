//! The debug port: bytes written to it appear on the host at once. A guest needs no driver for it.

use std::fmt;
use std::io::Write;

use freestone_bus::{Device, Plug, Result, Wiring};

use crate::isa::{self, BytePorts, byte_device};

/// Port of Bochs, QEMU's default and most small kernels.
pub const BOCHS_DEBUG_PORT: u16 = 0xe9;
/// Port to which SeaBIOS and OVMF write their log.
pub const FIRMWARE_DEBUG_PORT: u16 = 0x402;

/// What a read gives: the sign by which a guest knows that the port is there.
const SIGNATURE: u8 = 0xe9;

/// The debug port. Bytes that the sink refuses are counted and dropped.
pub struct DebugPort {
    output: Box<dyn Write + Send>,
    lost: u64,
}

impl DebugPort {
    /// A port that writes to `output`.
    pub fn new(output: impl Write + Send + 'static) -> Self {
        Self { output: Box::new(output), lost: 0 }
    }

    /// Bytes that the sink refused.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

impl fmt::Debug for DebugPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugPort").field("lost", &self.lost).finish_non_exhaustive()
    }
}

impl BytePorts for DebugPort {
    const PORTS: u8 = 1;

    fn inb(&mut self, _port: u8) -> u8 {
        SIGNATURE
    }

    fn outb(&mut self, _port: u8, value: u8) {
        if let Err(error) = self.output.write_all(&[value]).and_then(|()| self.output.flush()) {
            if self.lost == 0 {
                tracing::warn!(%error, "the debug port's output fails; it is dropped");
            }
            self.lost = self.lost.saturating_add(1);
        }
    }
}

byte_device!(DebugPort);

/// Plugs a [`DebugPort`] in, by default at [`BOCHS_DEBUG_PORT`].
#[derive(Debug)]
pub struct DebugPlug {
    port: u16,
    device: DebugPort,
}

impl DebugPlug {
    /// A debug port that writes to `output`.
    pub fn new(output: impl Write + Send + 'static) -> Self {
        Self { port: BOCHS_DEBUG_PORT, device: DebugPort::new(output) }
    }

    /// Puts it at another port.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }
}

impl Plug for DebugPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        isa::plug_stateless(wiring, "debug", self.port, self.device)
    }
}
