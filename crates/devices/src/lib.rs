#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod date;
mod debug;
mod error;
mod i8042;
mod isa;
mod pci;
mod power;
mod progress;
mod pvpanic;
mod rtc;
mod serial;

pub use debug::{BOCHS_DEBUG_PORT, DebugPlug, DebugPort, FIRMWARE_DEBUG_PORT};
pub use error::{Error, Result};
pub use i8042::{I8042, I8042_PORT, I8042Plug};
pub use pci::{ConfigPorts, Ecam, PCI_CONFIG_PORT, PciRootPlug};
pub use power::{Power, PowerPlug, RESET_PORT, RESET_VALUE, S5_TYPE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
pub use progress::{PROGRESS_PORT, ProgressPlug, ProgressPort};
pub use pvpanic::{PVPANIC_PORT, PvPanic, PvPanicPlug};
pub use rtc::{CENTURY_INDEX, RTC_PORT, Rtc, RtcPlug};
pub use serial::{
    COM1_GSI, COM1_PORT, COM2_GSI, COM2_PORT, ESCAPE_HELP, EscapeAction, EscapeFilter, Escaped, InputFilter,
    OutputLimit, Serial, SerialCounters, SerialFile, SerialInput, SerialPlug,
};
