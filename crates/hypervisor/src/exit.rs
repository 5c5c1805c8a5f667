//! Why a vCPU came back from the guest.

use std::fmt;

/// One exit, borrowing its data from the vCPU: nothing is copied or allocated.
///
/// The data slices of reads are filled in by whoever handles the exit; the next `run` hands them to the guest.
#[derive(Debug)]
#[non_exhaustive]
pub enum Exit<'a> {
    /// `in` or `ins`: `data.len()` is a multiple of `size`; more than one access for string instructions.
    PioRead {
        /// I/O port.
        port: u16,
        /// Width of one access in bytes: 1, 2 or 4.
        size: u8,
        /// Where the values go.
        data: &'a mut [u8],
    },
    /// `out` or `outs`.
    PioWrite {
        /// I/O port.
        port: u16,
        /// Width of one access in bytes: 1, 2 or 4.
        size: u8,
        /// The values.
        data: &'a [u8],
    },
    /// A load from guest-physical memory that no slot backs.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// Where the value goes; 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// A store to guest-physical memory that no slot backs.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// The value; 1 to 8 bytes.
        data: &'a [u8],
    },
    /// A hypercall that the hypervisor leaves to user space.
    Hypercall {
        /// Number of the call.
        number: u64,
        /// Arguments.
        args: [u64; 6],
        /// What the guest gets back.
        ret: &'a mut u64,
    },
    /// `hlt` with no in-kernel interrupt controller to wait on.
    Halt,
    /// The guest crashed beyond repair: a triple fault on x86.
    Shutdown,
    /// The guest asked the hypervisor for something that concerns the machine.
    SystemEvent(SystemEvent),
    /// `run` was interrupted by a kick or a signal.
    Interrupted,
    /// The I/O APIC needs to know of an end of interrupt (split interrupt controller).
    IoapicEoi {
        /// Interrupt vector.
        vector: u8,
    },
    /// A debug event: breakpoint or single step.
    Debug {
        /// Linear address of the instruction.
        pc: u64,
        /// Exception vector (1 or 3).
        exception: u32,
    },
    /// The hypervisor could not go on: an instruction it cannot emulate, for example.
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
    /// A reason that this backend does not know or does not expect.
    Unhandled {
        /// Code of the hypervisor (KVM: `KVM_EXIT_*`).
        reason: u32,
    },
}

impl Exit<'_> {
    /// The kind of this exit, for counting.
    #[inline]
    pub fn reason(&self) -> ExitReason {
        match self {
            Self::PioRead { .. } => ExitReason::PioRead,
            Self::PioWrite { .. } => ExitReason::PioWrite,
            Self::MmioRead { .. } => ExitReason::MmioRead,
            Self::MmioWrite { .. } => ExitReason::MmioWrite,
            Self::Hypercall { .. } => ExitReason::Hypercall,
            Self::Halt => ExitReason::Halt,
            Self::Shutdown => ExitReason::Shutdown,
            Self::SystemEvent(_) => ExitReason::SystemEvent,
            Self::Interrupted => ExitReason::Interrupted,
            Self::IoapicEoi { .. } => ExitReason::IoapicEoi,
            Self::Debug { .. } => ExitReason::Debug,
            Self::InternalError { .. } => ExitReason::InternalError,
            Self::FailEntry { .. } => ExitReason::FailEntry,
            Self::Unhandled { .. } => ExitReason::Unhandled,
        }
    }
}

/// What a guest asked of the machine through the hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SystemEvent {
    /// Power off.
    Shutdown,
    /// Reset.
    Reset,
    /// The guest reports that it crashed.
    Crash,
    /// Another event, by the hypervisor's number.
    Other(u32),
}

/// Up to 15 bytes of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct InstructionBytes {
    bytes: [u8; 15],
    len: u8,
}

impl InstructionBytes {
    /// Keeps the first 15 of `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        let mut kept = Self::default();
        for (to, from) in kept.bytes.iter_mut().zip(bytes) {
            *to = *from;
            kept.len += 1;
        }
        kept
    }

    /// The bytes; empty if the hypervisor did not tell.
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len.into()).unwrap_or_default()
    }
}

impl fmt::Display for InstructionBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, b) in self.as_slice().iter().enumerate() {
            write!(f, "{}{b:02x}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for InstructionBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

macro_rules! exit_reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Kinds of exit, without their data.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum ExitReason { $($(#[$doc])* $name,)* }

        impl ExitReason {
            /// Every reason, in the order of [`index`](Self::index).
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// A short name for tables and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// A number below [`ALL`](Self::ALL)`.len()`, for arrays of counters.
            #[inline]
            pub const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

exit_reasons! {
    /// [`Exit::PioRead`].
    PioRead = "pio_read",
    /// [`Exit::PioWrite`].
    PioWrite = "pio_write",
    /// [`Exit::MmioRead`].
    MmioRead = "mmio_read",
    /// [`Exit::MmioWrite`].
    MmioWrite = "mmio_write",
    /// [`Exit::Hypercall`].
    Hypercall = "hypercall",
    /// [`Exit::Halt`].
    Halt = "halt",
    /// [`Exit::Shutdown`].
    Shutdown = "shutdown",
    /// [`Exit::SystemEvent`].
    SystemEvent = "system_event",
    /// [`Exit::Interrupted`].
    Interrupted = "interrupted",
    /// [`Exit::IoapicEoi`].
    IoapicEoi = "ioapic_eoi",
    /// [`Exit::Debug`].
    Debug = "debug",
    /// [`Exit::InternalError`].
    InternalError = "internal_error",
    /// [`Exit::FailEntry`].
    FailEntry = "fail_entry",
    /// [`Exit::Unhandled`].
    Unhandled = "unhandled",
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_bytes_print_as_hex_and_keep_fifteen() {
        assert_eq!(InstructionBytes::new(&[0x0f, 0x0b]).to_string(), "0f 0b");
        assert_eq!(InstructionBytes::new(&[1; 20]).as_slice(), [1; 15]);
        assert_eq!(InstructionBytes::new(&[]).to_string(), "");
    }

    #[test]
    fn reasons_index_their_own_table() {
        for (i, r) in ExitReason::ALL.iter().enumerate() {
            assert_eq!(r.index(), i);
        }
    }
}
