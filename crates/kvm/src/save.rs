//! Save and restore of a vCPU.
//!
//! The order matters. Saving: the state of INIT and SIPI first, because KVM takes in what is pending when it is asked, which
//! changes registers; events last. Restoring: CPUID first, by which KVM checks the rest; the APIC base (in SREGS) before the
//! APIC; the APIC and the time-stamp counter before the deadline of the APIC's timer; events last, as other calls touch them.

use freestone_hypervisor::x86::{DebugRegs, MpState, Msr, VcpuEvents, VcpuState};
use freestone_hypervisor::{CpuState, Error, Result};
use kvm_bindings::*;

use crate::error::{call, io_error};
use crate::saved_msrs::IA32_TSC;
use crate::state::{MSRS_PER_CALL, merge_special_regs, to_msrs};
use crate::vcpu::KvmVcpu;
use crate::xsave;

/// Where the guest's kvmclock is: bit 0 says that it is on. The second is the old number of the same register.
const KVM_SYSTEM_TIME: [u32; 2] = [0x4b56_4d01, 0x12];

/// Far from any counter that is to be written (6 minutes at 3 GHz), see [`KvmVcpu::restore_msrs`].
const ANOTHER_TIME: u64 = 1 << 40;

/// The most MSRs a restored state may have. KVM lists fewer than 300.
const MOST_MSRS: usize = 1024;

impl KvmVcpu {
    pub(crate) fn save_state(&mut self) -> Result<VcpuState> {
        let mp_state = self.mp_state()?;
        let regs = self.regs()?;
        let special_regs = self.special_regs()?;
        let xcrs = self.fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        let xsave = xsave::get(&self.fd, &self.vm.fd)?;
        let debug = self.fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?;
        let lapic = if self.has_lapic { Some(Box::new(self.lapic()?)) } else { None };
        let msrs = self.save_msrs()?;
        // It is no error not to know: the kernel says EIO where the counter is not stable.
        let tsc_khz = self.fd.get_tsc_khz().ok().filter(|&khz| khz > 0);
        let events = self.fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            cpuid: self.cpuid.clone(),
            tsc_khz,
            mp_state,
            regs,
            special_regs,
            xcrs: from_xcrs(&xcrs),
            xsave,
            debug_regs: DebugRegs { db: debug.db, dr6: debug.dr6, dr7: debug.dr7 },
            lapic,
            msrs,
            events: from_events(&events),
        })
    }

    pub(crate) fn restore_state(&mut self, state: &VcpuState) -> Result<()> {
        match (&state.lapic, self.has_lapic) {
            (Some(_), true) | (None, false) => {}
            (Some(_), false) => {
                return Err(Error::Unsupported("a local APIC in a VM without interrupt controller"));
            }
            (None, true) => return Err(Error::Unsupported("a vCPU without the local APIC that its VM has")),
        }
        if !state.cpuid.is_empty() {
            self.set_cpuid(&state.cpuid)?;
        }
        if let Some(khz) = state.tsc_khz {
            self.fd.set_tsc_khz(khz).map_err(|error| Error::OutOfRange {
                what: "frequency of the time-stamp counter in kHz",
                value: khz.into(),
                reason: match error.errno() {
                    libc::EINVAL => "this host cannot give a vCPU another frequency than its own",
                    _ => "KVM_SET_TSC_KHZ failed",
                },
            })?;
        }
        // Without the controller a vCPU runs, and KVM has no state to set.
        if self.has_lapic || state.mp_state != MpState::Runnable {
            self.set_mp_state(state.mp_state)?;
        }
        self.set_regs(&state.regs)?;
        // The bitmap of pending interrupts stays empty: the events tell of the one that counts.
        let mut sregs = kvm_sregs::default();
        merge_special_regs(&mut sregs, &state.special_regs);
        self.fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
        if !state.xcrs.is_empty() {
            self.fd.set_xcrs(&to_xcrs(&state.xcrs)?).map_err(call("KVM_SET_XCRS"))?;
        }
        xsave::set(&self.fd, &self.vm.fd, &state.xsave)?;
        let DebugRegs { db, dr6, dr7 } = state.debug_regs;
        let debug = kvm_debugregs { db, dr6, dr7, ..Default::default() };
        self.fd.set_debug_regs(&debug).map_err(call("KVM_SET_DEBUGREGS"))?;
        if let Some(lapic) = &state.lapic {
            self.set_lapic(lapic)?;
        }
        self.restore_msrs(&state.msrs)?;
        self.fd.set_vcpu_events(&to_events(&state.events)).map_err(call("KVM_SET_VCPU_EVENTS"))?;
        if has_kvmclock(&state.msrs) { self.tell_paused() } else { Ok(()) }
    }

    /// Reads the MSRs of the list; those that this vCPU has not are left out, now and for the other vCPUs of the VM.
    fn save_msrs(&self) -> Result<Vec<Msr>> {
        let list = self.vm.msrs.to_save(&self.vm.kvm)?;
        let mut msrs: Vec<_> = list.iter().map(|&index| Msr { index, value: 0 }).collect();
        let mut refused = Vec::new();
        let mut begin = 0;
        while begin < msrs.len() {
            let end = msrs.len().min(begin + MSRS_PER_CALL);
            let chunk = msrs.get_mut(begin..end).unwrap_or_default();
            let mut entries = to_msrs(chunk)?;
            let done = self.fd.get_msrs(&mut entries).map_err(call("KVM_GET_MSRS"))?;
            for (msr, entry) in chunk.iter_mut().zip(entries.as_slice()).take(done) {
                msr.value = entry.data;
            }
            if let Some(msr) = chunk.get(done) {
                tracing::debug!(msr = format_args!("{:#x}", msr.index), "the vCPU has no such MSR to save");
                refused.push(msr.index);
                msrs.remove(begin + done);
            }
            begin += done;
        }
        if !refused.is_empty() {
            self.vm.msrs.leave_out(&refused);
        }
        Ok(msrs)
    }

    /// Writes the MSRs in order. One that is refused was zero, as it is after reset, or it is an error.
    ///
    /// KVM keeps the counters of a VM's vCPUs in step: it takes one that is written within a second of where another stands
    /// as that other. This is what makes them agree again. But older kernels (before 6.6) compare with the counter of a
    /// vCPU that was just made, too: one saved in the first second of its life would go back. So the first of the VM is
    /// written twice: to another time altogether, then to its own.
    fn restore_msrs(&self, msrs: &[Msr]) -> Result<()> {
        if msrs.len() > MOST_MSRS {
            return Err(Error::OutOfRange {
                what: "number of MSRs",
                value: msrs.len() as u64,
                reason: "no vCPU has more than 1024",
            });
        }
        let counter = msrs.iter().position(|msr| msr.index == IA32_TSC);
        let with_detour: Vec<Msr>;
        let mut rest = match counter.and_then(|at| Some((at, msrs.get(at)?))) {
            Some((at, msr)) if self.vm.msrs.first_time() => {
                let away = Msr { value: msr.value.wrapping_add(ANOTHER_TIME), ..*msr };
                let (before, after) = msrs.split_at(at);
                with_detour = before.iter().chain([&away]).chain(after).copied().collect();
                with_detour.as_slice()
            }
            _ => msrs,
        };
        while !rest.is_empty() {
            let chunk = rest.get(..MSRS_PER_CALL).unwrap_or(rest);
            let done = self.fd.set_msrs(&to_msrs(chunk)?).map_err(call("KVM_SET_MSRS"))?;
            let refused = match chunk.get(done) {
                Some(msr) if msr.value != 0 => {
                    return Err(Error::MsrValue { index: msr.index, value: msr.value });
                }
                refused => usize::from(refused.is_some()),
            };
            rest = rest.get(done + refused..).unwrap_or_default();
        }
        Ok(())
    }

    pub(crate) fn tell_kvmclock(&self) -> Result<()> {
        match self.fd.kvmclock_ctrl() {
            Ok(()) => Ok(()),
            // The guest does not use kvmclock.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            Err(error) => Err(Error::Call { op: "KVM_KVMCLOCK_CTRL", source: io_error(error) }),
        }
    }
}

fn has_kvmclock(msrs: &[Msr]) -> bool {
    msrs.iter().any(|msr| KVM_SYSTEM_TIME.contains(&msr.index) && msr.value & 1 != 0)
}

fn from_xcrs(xcrs: &kvm_xcrs) -> Vec<(u32, u64)> {
    let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
    xcrs.xcrs.iter().take(count).map(|xcr| (xcr.xcr, xcr.value)).collect()
}

fn to_xcrs(xcrs: &[(u32, u64)]) -> Result<kvm_xcrs> {
    let mut to = kvm_xcrs::default();
    if xcrs.len() > to.xcrs.len() {
        return Err(Error::OutOfRange {
            what: "number of extended control registers",
            value: xcrs.len() as u64,
            reason: "KVM takes at most 16",
        });
    }
    for (to, &(xcr, value)) in to.xcrs.iter_mut().zip(xcrs) {
        *to = kvm_xcr { xcr, reserved: 0, value };
    }
    // At most 16, as checked above.
    to.nr_xcrs = u32::try_from(xcrs.len()).unwrap_or(0);
    Ok(to)
}

fn from_events(events: &kvm_vcpu_events) -> VcpuEvents {
    let kvm_vcpu_events { exception, interrupt, nmi, smi, .. } = *events;
    // Without this flag KVM reports an exception that is pending as injected, too, and does not take it back as pending.
    let payload = events.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0;
    VcpuEvents {
        exception_injected: exception.injected != 0,
        exception_nr: exception.nr,
        exception_has_error_code: exception.has_error_code != 0,
        exception_pending: payload && exception.pending != 0,
        exception_error_code: exception.error_code,
        exception_has_payload: payload && events.exception_has_payload != 0,
        exception_payload: if payload { events.exception_payload } else { 0 },
        interrupt_injected: interrupt.injected != 0,
        interrupt_nr: interrupt.nr,
        interrupt_soft: interrupt.soft != 0,
        interrupt_shadow: interrupt.shadow,
        nmi_injected: nmi.injected != 0,
        nmi_pending: nmi.pending != 0,
        nmi_masked: nmi.masked != 0,
        sipi_vector: events.sipi_vector,
        smi_smm: smi.smm != 0,
        smi_pending: smi.pending != 0,
        smi_inside_nmi: smi.smm_inside_nmi != 0,
        smi_latched_init: smi.latched_init != 0,
        triple_fault_pending: events.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0
            && events.triple_fault.pending != 0,
    }
}

/// The flags claim a part only where there is something in it: a host without SMM, say, refuses even an empty one.
fn to_events(events: &VcpuEvents) -> kvm_vcpu_events {
    let mut to = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        sipi_vector: events.sipi_vector,
        exception_has_payload: events.exception_has_payload.into(),
        exception_payload: events.exception_payload,
        ..Default::default()
    };
    to.exception.injected = events.exception_injected.into();
    to.exception.nr = events.exception_nr;
    to.exception.has_error_code = events.exception_has_error_code.into();
    to.exception.pending = events.exception_pending.into();
    to.exception.error_code = events.exception_error_code;
    to.interrupt.injected = events.interrupt_injected.into();
    to.interrupt.nr = events.interrupt_nr;
    to.interrupt.soft = events.interrupt_soft.into();
    to.interrupt.shadow = events.interrupt_shadow;
    to.nmi.injected = events.nmi_injected.into();
    to.nmi.pending = events.nmi_pending.into();
    to.nmi.masked = events.nmi_masked.into();
    to.smi.smm = events.smi_smm.into();
    to.smi.pending = events.smi_pending.into();
    to.smi.smm_inside_nmi = events.smi_inside_nmi.into();
    to.smi.latched_init = events.smi_latched_init.into();
    to.triple_fault.pending = events.triple_fault_pending.into();
    let claims = [
        (events.sipi_vector != 0, KVM_VCPUEVENT_VALID_SIPI_VECTOR),
        (events.exception_pending || events.exception_has_payload, KVM_VCPUEVENT_VALID_PAYLOAD),
        (
            events.smi_smm || events.smi_pending || events.smi_inside_nmi || events.smi_latched_init,
            KVM_VCPUEVENT_VALID_SMM,
        ),
        (events.triple_fault_pending, KVM_VCPUEVENT_VALID_TRIPLE_FAULT),
    ];
    to.flags |= claims.iter().filter(|(there, _)| *there).map(|(_, flag)| flag).sum::<u32>();
    to
}
