//! The saved types of this crate: what is in a snapshot, apart from the types of the running devices.
//!
//! Each is a section with a version. A type that is changed gets the next version and an upgrade from the one before; the
//! golden files of the tests hold what every version looked like. What is read may come from anywhere: the devices check it.

use freestone_snapshot::Section;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Refuses a state.
pub(crate) fn bad<T>(device: &'static str, what: &'static str, value: impl Into<u64>) -> Result<T> {
    Err(Error::BadState { device, what, value: value.into() })
}

/// Refuses a state unless `holds`.
pub(crate) fn check(
    device: &'static str,
    what: &'static str,
    holds: bool,
    value: impl Into<u64>,
) -> Result<()> {
    if holds { Ok(()) } else { bad(device, what, value) }
}

macro_rules! section {
    ($type:ty, $name:literal, $version:literal) => {
        impl Section for $type {
            const NAME: &'static str = $name;
            const VERSION: u32 = $version;
        }
    };
}
section!(SerialState, "serial", 1);
section!(I8042State, "i8042", 1);
section!(RtcState, "rtc", 1);
section!(PowerState, "power", 1);
section!(ProgressState, "progress", 1);
section!(VmGenIdState, "vmgenid", 1);
section!(PowerButtonState, "power-button", 1);
section!(PciConfigState, "pci-config", 1);

/// Saved state of a [`Serial`](crate::Serial).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    pub(crate) divisor: u16,
    pub(crate) interrupt_enable: u8,
    /// A received-data interrupt is pending.
    pub(crate) received_pending: bool,
    /// A transmitter-empty interrupt is pending.
    pub(crate) transmitter_empty_pending: bool,
    /// A transmitter-empty interrupt is pending behind a received-data one that was read.
    pub(crate) transmitter_empty_hidden: bool,
    pub(crate) line_control: u8,
    pub(crate) modem_control: u8,
    pub(crate) modem_status: u8,
    pub(crate) scratch: u8,
    pub(crate) fifos_enabled: bool,
    /// Received bytes that the driver can read. The line status follows from it.
    pub(crate) fifo: Vec<u8>,
    /// Something in the FIFO came by loopback.
    pub(crate) looped: bool,
    /// Input that arrived and has no room in the FIFO yet.
    pub(crate) backlog: Vec<u8>,
    /// The driver does not listen yet.
    pub(crate) deaf: bool,
    /// Reads of the line status while deaf.
    pub(crate) polls: u8,
    /// What the driver has sent and the host has not taken.
    pub(crate) output: Vec<u8>,
}

/// Saved state of an [`I8042`](crate::I8042).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    pub(crate) control_b: u8,
    /// The side of the keyboard, if there is one.
    pub(crate) port: Option<PortState>,
}

/// The side of an i8042 that has a keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortState {
    pub(crate) keyboard: KeyboardState,
    pub(crate) config: u8,
    /// The command whose argument comes next.
    pub(crate) command: Option<u8>,
    pub(crate) last_was_command: bool,
    pub(crate) output: Option<u8>,
}

/// A keyboard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeyboardState {
    /// Bytes that wait to be sent.
    pub(crate) buffer: Vec<u8>,
    /// The command whose argument comes next.
    pub(crate) command: Option<u8>,
    pub(crate) scanning: bool,
    pub(crate) set: u8,
}

/// Saved state of an [`Rtc`](crate::Rtc).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    pub(crate) index: u8,
    /// 128 bytes.
    pub(crate) ram: Vec<u8>,
    pub(crate) reg_a: u8,
    pub(crate) reg_b: u8,
    /// Seconds by which the guest's time is ahead of the host's.
    pub(crate) ahead: i64,
}

/// Saved state of [`Power`](crate::Power).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    pub(crate) control: u8,
}

/// Saved state of a [`ProgressPort`](crate::ProgressPort).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgressState {
    pub(crate) last: u8,
}

/// Saved state of [`ConfigPorts`](crate::ConfigPorts).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciConfigState {
    pub(crate) address: u32,
}

/// Where the guest was told that its generation ID is. The ID itself is in its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmGenIdState {
    pub(crate) address: u64,
    pub(crate) gsi: u32,
}

/// How the guest was told that it hears of the power button.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PowerButtonState {
    pub(crate) gsi: u32,
}
