//! Saved vCPUs and VMs: the sections of a snapshot that hold what [`CpuState::save`] and [`SaveVm::save`] give.
//!
//! The types here are apart from those of a running machine, so that a snapshot changes only with its version. What comes out
//! of a snapshot is checked on its way back: a [`VcpuState`] made here has lengths and counts that a hypervisor may take.
//! Whether the values fit the host, [`compat`](crate::compat) says before, and the hypervisor at last.
//!
//! [`CpuState::save`]: freestone_hypervisor::CpuState::save
//! [`SaveVm::save`]: freestone_hypervisor::SaveVm::save
//! [`VcpuState`]: freestone_hypervisor::x86::VcpuState

mod bytes;
mod registers;
mod vcpu;
mod vm;

pub use vcpu::VcpuSection;
pub use vm::VmSection;
