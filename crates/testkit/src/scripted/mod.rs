//! A hypervisor that runs scripts instead of a guest: for tests of everything above the hypervisor traits.
//!
//! A [`Script`] says what a vCPU does, step by step. [`ScriptedHypervisor`] is given one for each vCPU and behaves as KVM
//! does as far as the traits go: kicks are sticky, memory is mapped in slots, doorbells swallow writes, exits are completed
//! by the next `run`. A [`Probe`] shows afterwards what happened.
//!
//! It executes no instructions and starts no thread.

mod doorbells;
mod memory;
mod probe;
mod repeat;
mod script;
mod vcpu;
mod vm;
mod vm_state;

pub(crate) use doorbells::{BellHandle, Bells};
pub(crate) use memory::{DeviceSlots, Slots};
pub use probe::{CpuSnapshot, Probe, Record, Slot};
pub use repeat::RepeatVcpu;
pub use script::{Code, Done, Guest, Op, Round, Script};
pub use vcpu::ScriptedVcpu;
pub use vm::{ScriptedHypervisor, ScriptedVm, made_up_cpuid};
