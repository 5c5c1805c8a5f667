#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod exit;
mod traits;
pub mod x86;

pub use error::{Error, Result};
pub use exit::{Exit, ExitReason, InstructionBytes, SystemEvent};
pub use traits::{CpuState, DEVICE_SLOTS, DirtyLog, Hypervisor, Kick, Kicker, MapFlags, SaveVm, Vcpu, Vm};
