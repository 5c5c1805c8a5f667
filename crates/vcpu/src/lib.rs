#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod boot;
pub mod compat;
pub mod cpuid;
mod crash;
mod dispatch;
mod error;
pub mod lapic;
pub mod msr;
mod run;
pub mod state;
pub mod stats;
pub mod template;
mod thread;

pub use boot::{BootState, configure_boot};
pub use compat::{Mismatch, Severity};
pub use cpuid::{CpuidConfig, Topology};
pub use crash::Crash;
pub use dispatch::{Dispatcher, KVM_ENOSYS, Refused, Step, StopReason};
pub use error::{Error, Result};
pub use run::{ACK_TIMEOUT, Control, Outcome, RunLoop, State, Turn};
pub use state::{VcpuSection, VmSection};
pub use stats::{ExitStats, NoObserver, Observer};
pub use template::CpuTemplate;
pub use thread::{Ended, VcpuThread, spawn_vcpu};
