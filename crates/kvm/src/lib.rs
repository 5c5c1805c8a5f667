#![doc = include_str!("../README.md")]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod doorbell;
mod error;
mod exit;
mod irq;
mod kick;
mod msi;
pub mod probe;
mod run_page;
mod save;
mod saved_msrs;
mod slots;
mod state;
mod system;
mod vcpu;
mod vm;
mod vm_state;
mod xsave;

pub use freestone_hypervisor::{Error, Result};
pub use system::{DEFAULT_DEVICE, Kvm};
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;
