#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod conformance;
pub mod driver;
mod error;
pub mod footprint;
pub mod hostile;
pub mod life;
mod log;
mod msi;
pub mod scripted;
mod skip;
mod wiring;

pub use error::{Error, Result};
pub use scripted::{Op, Probe, Record, RepeatVcpu, Script, ScriptedHypervisor, ScriptedVcpu, ScriptedVm};
pub use skip::{SKIP_LOG, dev_kvm_usable, skip};
pub use wiring::TestWiring;
