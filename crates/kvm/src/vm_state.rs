//! Save and restore of what KVM keeps of a VM: the interrupt controllers, the timer, the clock.
//!
//! Routes of interrupts and irqfds are not here: those who made them make them again. Restoring the chips leaves them alone.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{SystemTime, UNIX_EPOCH};

use freestone_hypervisor::x86::{ChipKind, ChipState, ClockPolicy, ClockState, VmState};
use freestone_hypervisor::{Error, Result, SaveVm};
use kvm_bindings::*;
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr};

use crate::error::{call, io_error};
use crate::vm::KvmVm;

const PIT_LEN: usize = size_of::<kvm_pit_state2>();
#[expect(clippy::cast_possible_truncation, reason = "112 fits")]
const KVM_GET_PIT2: libc::c_ulong = ioctl_expr(_IOC_READ, KVMIO, 0x9f, PIT_LEN as u32);
#[expect(clippy::cast_possible_truncation, reason = "112 fits")]
const KVM_SET_PIT2: libc::c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xa0, PIT_LEN as u32);

/// The chips behind `KVM_GET_IRQCHIP`, in the order in which they are restored.
const IRQ_CHIPS: [ChipKind; 3] = [ChipKind::PicMaster, ChipKind::PicSlave, ChipKind::IoApic];

/// Number in KVM's API and length of the registers of a chip; `None` for what is not behind `KVM_GET_IRQCHIP`.
fn irq_chip(kind: ChipKind) -> Option<(u32, usize)> {
    match kind {
        ChipKind::PicMaster => Some((KVM_IRQCHIP_PIC_MASTER, size_of::<kvm_pic_state>())),
        ChipKind::PicSlave => Some((KVM_IRQCHIP_PIC_SLAVE, size_of::<kvm_pic_state>())),
        ChipKind::IoApic => Some((KVM_IRQCHIP_IOAPIC, size_of::<kvm_ioapic_state>())),
        _ => None,
    }
}

impl SaveVm for KvmVm {
    fn save(&self) -> Result<VmState> {
        let vm = &*self.0.fd;
        let mut chips = Vec::new();
        if let Some(chip) = self.0.created_irq_chip() {
            for (kind, (id, len)) in IRQ_CHIPS.into_iter().filter_map(|kind| Some((kind, irq_chip(kind)?))) {
                chips.push(ChipState { kind, registers: get_irq_chip(vm, id, len)? });
            }
            if chip.pit {
                chips.push(ChipState { kind: ChipKind::Pit, registers: get_pit(vm)? });
            }
        }
        let clock = vm.get_clock().map_err(call("KVM_GET_CLOCK"))?;
        Ok(VmState { chips, clock: Some(from_clock(&clock)) })
    }

    fn restore(&self, state: &VmState) -> Result<()> {
        let vm = &*self.0.fd;
        let Some(chip) = self.0.created_irq_chip() else {
            return match state.chips.first() {
                Some(_) => {
                    Err(Error::Unsupported("an interrupt controller's state in a VM that was given none"))
                }
                None => Ok(()),
            };
        };
        for ChipState { kind, registers } in &state.chips {
            match (irq_chip(*kind), kind) {
                (Some((id, len)), _) => set_irq_chip(vm, id, exactly(registers, len)?)?,
                (None, ChipKind::Pit) if chip.pit => set_pit(vm, exactly(registers, PIT_LEN)?)?,
                _ => return Err(Error::Unsupported("the state of a chip that this VM has not")),
            }
        }
        Ok(())
    }

    fn set_clock(&self, clock: &ClockState, policy: ClockPolicy) -> Result<()> {
        match policy {
            ClockPolicy::Continue => set_clock(&self.0.fd, clock.guest_ns, None),
            ClockPolicy::Advance => {
                let since = clock
                    .host_realtime_ns
                    .ok_or(Error::Unsupported("advancing a clock of which nobody knows when it was saved"))?;
                match set_clock(&self.0.fd, clock.guest_ns, Some(since)) {
                    // Kernels before 5.16 cannot add the time themselves.
                    Err(Error::Call { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                        let passed = realtime_ns().saturating_sub(since);
                        set_clock(&self.0.fd, clock.guest_ns.saturating_add(passed), None)
                    }
                    result => result,
                }
            }
            _ => Err(Error::Unsupported("this policy for the clock")),
        }
    }
}

fn exactly(registers: &[u8], len: usize) -> Result<&[u8]> {
    if registers.len() == len {
        return Ok(registers);
    }
    Err(Error::OutOfRange {
        what: "length of a chip's state",
        value: registers.len() as u64,
        reason: "KVM's structure has another",
    })
}

fn get_irq_chip(vm: &VmFd, chip_id: u32, len: usize) -> Result<Vec<u8>> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(call("KVM_GET_IRQCHIP"))?;
    // SAFETY: all members of the union are integers, and the kernel has written all 512 bytes, of which it was given zeros.
    let bytes = unsafe { chip.chip.dummy };
    Ok(bytes.iter().take(len).map(|byte| byte.cast_unsigned()).collect())
}

fn set_irq_chip(vm: &VmFd, chip_id: u32, registers: &[u8]) -> Result<()> {
    let mut dummy = [0; 512];
    for (to, from) in dummy.iter_mut().zip(registers) {
        *to = from.cast_signed();
    }
    let chip = kvm_irqchip { chip_id, pad: 0, chip: kvm_irqchip__bindgen_ty_1 { dummy } };
    vm.set_irqchip(&chip).map_err(call("KVM_SET_IRQCHIP"))
}

/// As bytes, which have no padding to care for. The times at which the host loaded the counters mean nothing elsewhere, and
/// KVM sets them anew: they are zeros.
fn get_pit(vm: &VmFd) -> Result<Vec<u8>> {
    let mut state = [0_u8; PIT_LEN];
    // SAFETY: the descriptor is a VM's, and the kernel writes a `kvm_pit_state2`, which is as long as the array.
    if unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_PIT2, state.as_mut_ptr()) } < 0 {
        return Err(Error::Call { op: "KVM_GET_PIT2", source: io::Error::last_os_error() });
    }
    let channel = size_of::<kvm_pit_channel_state>();
    let loaded = std::mem::offset_of!(kvm_pit_channel_state, count_load_time);
    for channel in state.chunks_exact_mut(channel).take(3) {
        channel.get_mut(loaded..).unwrap_or_default().fill(0);
    }
    Ok(state.to_vec())
}

fn set_pit(vm: &VmFd, registers: &[u8]) -> Result<()> {
    let state: [u8; PIT_LEN] = registers.try_into().unwrap_or([0; PIT_LEN]);
    // SAFETY: the descriptor is a VM's, and the kernel reads a `kvm_pit_state2`, which is as long as the array.
    if unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_PIT2, state.as_ptr()) } < 0 {
        return Err(Error::Call { op: "KVM_SET_PIT2", source: io::Error::last_os_error() });
    }
    Ok(())
}

fn from_clock(clock: &kvm_clock_data) -> ClockState {
    let known = |flag, value| (clock.flags & flag != 0).then_some(value);
    ClockState {
        guest_ns: clock.clock,
        host_realtime_ns: Some(known(KVM_CLOCK_REALTIME, clock.realtime).unwrap_or_else(realtime_ns)),
        host_tsc: known(KVM_CLOCK_HOST_TSC, clock.host_tsc),
    }
}

/// Sets the clock, or, with the time of day at which it was that, to what it would be now.
fn set_clock(vm: &VmFd, guest_ns: u64, since: Option<u64>) -> Result<()> {
    let clock = kvm_clock_data {
        clock: guest_ns,
        flags: if since.is_some() { KVM_CLOCK_REALTIME } else { 0 },
        realtime: since.unwrap_or(0),
        ..Default::default()
    };
    vm.set_clock(&clock).map_err(|error| Error::Call { op: "KVM_SET_CLOCK", source: io_error(error) })
}

fn realtime_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}
