//! The exit dispatcher: from an [`Exit`] to the device that claims the address, and back.
//!
//! It is the only one in the workspace. It takes no lock, allocates nothing and decides nothing about the machine: what a
//! guest's halt, crash or event means is up to the caller.

use std::fmt;

use freestone_bus::{Access, AccessError, BusView};
use freestone_hypervisor::{Exit, ExitReason, InstructionBytes, SystemEvent, Vcpu};

use crate::stats::{NoObserver, Observer};
use crate::{Error, Result};

/// What an unknown hypercall returns: `-KVM_ENOSYS` (Linux, `include/uapi/linux/kvm_para.h`).
pub const KVM_ENOSYS: i64 = 1000;

/// What one trip into the guest and back came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Step {
    /// The exit was handled: go on.
    Continue,
    /// A kick or a signal interrupted the guest.
    Interrupted,
    /// The guest waits for an interrupt, and the hypervisor has no interrupt controller to wait on.
    Halted,
    /// The guest does not go on by itself.
    Stop(StopReason),
}

/// Why a guest does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// A triple fault: an exception while an exception was being delivered, twice.
    Shutdown,
    /// The guest asked the hypervisor for power-off, reset or the like.
    SystemEvent(SystemEvent),
    /// A breakpoint or single step, with nobody to take it.
    Debug {
        /// Linear address of the instruction.
        pc: u64,
        /// Exception vector (1 or 3).
        exception: u32,
    },
    /// The hypervisor could not go on.
    InternalError {
        /// Code of the hypervisor (KVM: `KVM_INTERNAL_ERROR_*`).
        suberror: u32,
        /// Bytes at the instruction pointer, as far as the hypervisor tells them.
        instruction: InstructionBytes,
    },
    /// The processor refused to enter the guest.
    FailEntry {
        /// Reason code of the hardware.
        reason: u64,
        /// Physical CPU on which it happened.
        cpu: u32,
    },
    /// An exit that neither the backend nor the dispatcher knows.
    Unhandled {
        /// Code of the hypervisor (KVM: `KVM_EXIT_*`).
        reason: u32,
    },
}

impl StopReason {
    /// Whether the guest ended by a fault of its own or of the host, and not on purpose.
    pub const fn is_crash(&self) -> bool {
        !matches!(self, Self::SystemEvent(SystemEvent::Shutdown | SystemEvent::Reset))
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("triple fault"),
            Self::SystemEvent(SystemEvent::Shutdown) => f.write_str("the guest powered off"),
            Self::SystemEvent(SystemEvent::Reset) => f.write_str("the guest asked for a reset"),
            Self::SystemEvent(SystemEvent::Crash) => f.write_str("the guest reported a crash"),
            Self::SystemEvent(SystemEvent::Other(n)) => write!(f, "unknown system event {n}"),
            Self::SystemEvent(_) => f.write_str("unknown system event"),
            Self::Debug { pc, exception } => write!(f, "debug exception {exception} at {pc:#x}"),
            Self::InternalError { suberror, instruction } => {
                write!(f, "internal error {suberror} of the hypervisor ({})", internal_error(*suberror))?;
                if instruction.as_slice().is_empty() {
                    Ok(())
                } else {
                    write!(f, " at instruction [{instruction}]")
                }
            }
            Self::FailEntry { reason, cpu } => {
                write!(f, "the processor refused to enter the guest (reason {reason:#x}, physical CPU {cpu})")
            }
            Self::Unhandled { reason } => write!(f, "unknown exit reason {reason} of the hypervisor"),
        }
    }
}

/// What a `KVM_INTERNAL_ERROR_*` code means (Linux, `include/uapi/linux/kvm.h`).
const fn internal_error(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction cannot be emulated",
        2 => "an exception came up while another event was being delivered",
        3 => "an event cannot be delivered because of an exit in its middle",
        4 => "the hardware reported an unknown exit reason",
        _ => "unknown code",
    }
}

/// How many accesses no device took, by why. The guest read all ones or its write was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Refused {
    /// No device at the address.
    pub unclaimed: u64,
    /// The device has no such register.
    pub no_register: u64,
    /// The device does not take this width there, or the access straddles its end.
    pub width: u64,
    /// Any other reason.
    pub other: u64,
}

impl Refused {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.unclaimed.saturating_add(self.no_register).saturating_add(self.width).saturating_add(self.other)
    }

    #[inline]
    fn count(&mut self, access: Access) {
        if let Err(error) = access {
            self.count_error(error);
        }
    }

    #[cold]
    fn count_error(&mut self, error: AccessError) {
        let counter = match error {
            AccessError::Unclaimed => &mut self.unclaimed,
            AccessError::NoRegister => &mut self.no_register,
            AccessError::Width => &mut self.width,
            _ => &mut self.other,
        };
        *counter = counter.saturating_add(1);
    }
}

/// Takes exits to devices. One for each vCPU.
#[derive(Debug)]
pub struct Dispatcher {
    pio: BusView,
    mmio: BusView,
    refused: Refused,
}

impl Dispatcher {
    /// A dispatcher over these views of the machine's I/O ports and guest-physical addresses.
    pub fn new(pio: BusView, mmio: BusView) -> Self {
        Self { pio, mmio, refused: Refused::default() }
    }

    /// Enters the guest once and handles the exit.
    ///
    /// # Errors
    /// [`Error::Hypervisor`] if the vCPU cannot be run; nothing the guest does is an error.
    #[inline]
    pub fn step<V: Vcpu + ?Sized>(&mut self, vcpu: &mut V) -> Result<Step> {
        self.step_observed(vcpu, &mut NoObserver)
    }

    /// As [`step`](Self::step), and tells `observer` of it.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    #[inline(always)]
    pub fn step_observed<V, O>(&mut self, vcpu: &mut V, observer: &mut O) -> Result<Step>
    where
        V: Vcpu + ?Sized,
        O: Observer,
    {
        observer.enter();
        let exit = vcpu.run().map_err(Error::hv("run the vCPU"))?;
        let reason: ExitReason = exit.reason();
        observer.exit(reason);
        let step = self.handle(exit);
        observer.handled(reason);
        Ok(step)
    }

    /// Handles one exit.
    #[inline(always)]
    pub fn handle(&mut self, exit: Exit<'_>) -> Step {
        match exit {
            // String instructions come as one exit; each access goes to the same port.
            Exit::PioRead { port, size, data } => {
                for access in data.chunks_mut(usize::from(size).max(1)) {
                    let outcome = self.pio.read(port.into(), access);
                    self.refused.count(outcome);
                }
            }
            Exit::PioWrite { port, size, data } => {
                for access in data.chunks(usize::from(size).max(1)) {
                    let outcome = self.pio.write(port.into(), access);
                    self.refused.count(outcome);
                }
            }
            Exit::MmioRead { gpa, data } => {
                let outcome = self.mmio.read(gpa, data);
                self.refused.count(outcome);
            }
            Exit::MmioWrite { gpa, data } => {
                let outcome = self.mmio.write(gpa, data);
                self.refused.count(outcome);
            }
            other => return Self::handle_rare(other),
        }
        Step::Continue
    }

    /// Everything that is not an access to a device.
    #[cold]
    fn handle_rare(exit: Exit<'_>) -> Step {
        match exit {
            Exit::Hypercall { ret, .. } => {
                *ret = (-KVM_ENOSYS).cast_unsigned();
                Step::Continue
            }
            // Nobody here models an I/O APIC outside the hypervisor, so nobody waits for this.
            Exit::IoapicEoi { .. } => Step::Continue,
            Exit::Interrupted => Step::Interrupted,
            Exit::Halt => Step::Halted,
            Exit::Shutdown => Step::Stop(StopReason::Shutdown),
            Exit::SystemEvent(event) => Step::Stop(StopReason::SystemEvent(event)),
            Exit::Debug { pc, exception } => Step::Stop(StopReason::Debug { pc, exception }),
            Exit::InternalError { suberror, instruction } => {
                Step::Stop(StopReason::InternalError { suberror, instruction })
            }
            Exit::FailEntry { reason, cpu } => Step::Stop(StopReason::FailEntry { reason, cpu }),
            Exit::Unhandled { reason } => Step::Stop(StopReason::Unhandled { reason }),
            // A kind of exit that is younger than this dispatcher.
            _ => Step::Stop(StopReason::Unhandled { reason: u32::MAX }),
        }
    }

    /// Accesses that no device took, so far.
    pub fn refused(&self) -> Refused {
        self.refused
    }
}
