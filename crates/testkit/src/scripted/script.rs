//! What a scripted vCPU does.

use std::collections::VecDeque;
use std::fmt;

use freestone_hypervisor::x86::Regs;
use freestone_hypervisor::{InstructionBytes, SystemEvent};
use freestone_memory::{Bytes, GuestAddress, MemoryMap};

/// Code of [`Op::Then`].
pub type Code = Box<dyn FnOnce(&mut Guest<'_>) -> Script + Send>;
/// What makes the steps of one round of [`Op::Until`].
pub type Round = Box<dyn FnMut() -> Script + Send>;
/// What looks at the last load after each round of [`Op::Until`].
pub type Done = Box<dyn FnMut(&[u8]) -> bool + Send>;

/// One step of a script.
#[non_exhaustive]
pub enum Op {
    /// `out`; with more data than `size`, `rep outs`.
    PioWrite {
        /// I/O port.
        port: u16,
        /// Width of one access.
        size: u8,
        /// Values.
        data: Vec<u8>,
    },
    /// `in`; with more than one value, `rep ins`.
    PioRead {
        /// I/O port.
        port: u16,
        /// Width of one access.
        size: u8,
        /// Bytes in all.
        len: usize,
        /// What must come back, if that matters.
        expect: Option<Vec<u8>>,
    },
    /// A store to device memory.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// Value, 1 to 8 bytes.
        data: Vec<u8>,
    },
    /// A load from device memory.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes, 1 to 8.
        len: usize,
        /// What must come back, if that matters.
        expect: Option<Vec<u8>>,
    },
    /// A store to RAM: no exit. Marks the pages in the dirty log.
    MemWrite {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        data: Vec<u8>,
    },
    /// A load from RAM: no exit.
    MemRead {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        len: usize,
        /// What must be there, if that matters.
        expect: Option<Vec<u8>>,
    },
    /// A hypercall.
    Hypercall {
        /// Number.
        number: u64,
        /// Arguments.
        args: [u64; 6],
    },
    /// `hlt` without an interrupt controller.
    Halt,
    /// A triple fault.
    Shutdown,
    /// A power-off, reset or the like.
    SystemEvent(SystemEvent),
    /// Something the hypervisor cannot go on after.
    InternalError {
        /// Code.
        suberror: u32,
        /// Instruction bytes.
        instruction: InstructionBytes,
    },
    /// The processor does not enter the guest.
    FailEntry {
        /// Reason.
        reason: u64,
        /// Physical CPU.
        cpu: u32,
    },
    /// A debug event.
    Debug {
        /// Linear address.
        pc: u64,
        /// Vector.
        exception: u32,
    },
    /// A signal that is not a kick.
    Interrupted,
    /// An end of interrupt.
    IoapicEoi {
        /// Vector.
        vector: u8,
    },
    /// An exit that nobody knows.
    Unhandled {
        /// Reason.
        reason: u32,
    },
    /// The hypervisor itself fails.
    Fail(&'static str),
    /// Stays in the guest until a kick comes.
    WaitKick,
    /// Stays in the guest (`hlt` with an interrupt controller) until an edge comes on this line, and takes it.
    WaitIrq {
        /// Global system interrupt.
        gsi: u32,
    },
    /// Code: looks at the guest's memory, registers and last load, and says what to do next.
    Then(Code),
    /// Does this again and again until the last load satisfies the function: polling.
    Until {
        /// Makes the script of one round.
        round: Round,
        /// Whether the last load is what was waited for.
        done: Done,
        /// Rounds left.
        left: u32,
    },
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PioWrite { port, size, data } => write!(f, "out{size} {port:#x}, {data:02x?}"),
            Self::PioRead { port, size, len, .. } => write!(f, "in{size} {port:#x} ({len} bytes)"),
            Self::MmioWrite { gpa, data } => write!(f, "mmio write {gpa:#x}, {data:02x?}"),
            Self::MmioRead { gpa, len, .. } => write!(f, "mmio read {gpa:#x} ({len} bytes)"),
            Self::MemWrite { gpa, data } => write!(f, "write {gpa:#x} ({} bytes)", data.len()),
            Self::MemRead { gpa, len, .. } => write!(f, "read {gpa:#x} ({len} bytes)"),
            Self::Hypercall { number, .. } => write!(f, "hypercall {number}"),
            Self::Halt => f.write_str("halt"),
            Self::Shutdown => f.write_str("triple fault"),
            Self::SystemEvent(event) => write!(f, "system event {event:?}"),
            Self::InternalError { suberror, .. } => write!(f, "internal error {suberror}"),
            Self::FailEntry { reason, .. } => write!(f, "fail entry {reason:#x}"),
            Self::Debug { pc, .. } => write!(f, "debug at {pc:#x}"),
            Self::Interrupted => f.write_str("signal"),
            Self::IoapicEoi { vector } => write!(f, "end of interrupt {vector}"),
            Self::Unhandled { reason } => write!(f, "unhandled exit {reason}"),
            Self::Fail(op) => write!(f, "hypervisor failure: {op}"),
            Self::WaitKick => f.write_str("wait for a kick"),
            Self::WaitIrq { gsi } => write!(f, "wait for interrupt {gsi}"),
            Self::Then(_) => f.write_str("code"),
            Self::Until { left, .. } => write!(f, "poll, {left} rounds left"),
        }
    }
}

/// What code in a script can see and change.
#[derive(Debug)]
pub struct Guest<'a> {
    /// Guest memory as it is mapped now; `None` before anything is mapped.
    pub memory: Option<&'a MemoryMap>,
    /// The registers.
    pub regs: &'a mut Regs,
    /// What the last load gave.
    pub last_read: &'a [u8],
}

impl Guest<'_> {
    /// The last load as a little-endian number; its first eight bytes.
    pub fn last_value(&self) -> u64 {
        self.last_read.iter().take(8).rev().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    /// Reads RAM; `None` where there is none.
    pub fn read(&self, gpa: u64, len: usize) -> Option<Vec<u8>> {
        let mut data = vec![0; len];
        self.memory?.read_slice(&mut data, GuestAddress(gpa)).ok()?;
        Some(data)
    }
}

/// Steps of a vCPU, in order. After the last the vCPU halts, and halts again.
///
/// ```
/// use freestone_testkit::Script;
///
/// let script = Script::new().out8(0x3f8, b'A').expect_in8(0x3fd, 0x60).halt();
/// assert_eq!(script.len(), 3);
/// ```
#[derive(Debug, Default)]
pub struct Script {
    pub(crate) ops: VecDeque<Op>,
}

impl Script {
    /// No steps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there is no step.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Adds a step.
    #[must_use]
    pub fn op(mut self, op: Op) -> Self {
        self.ops.push_back(op);
        self
    }

    /// Adds the steps of `other`.
    #[must_use]
    pub fn append(mut self, mut other: Self) -> Self {
        self.ops.append(&mut other.ops);
        self
    }

    /// `out` of one byte.
    #[must_use]
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.pio_write(port, 1, &[value])
    }

    /// `out` of one byte for each of `text`.
    #[must_use]
    pub fn print(self, port: u16, text: &str) -> Self {
        text.bytes().fold(self, |script, b| script.out8(port, b))
    }

    /// `out` of `size` bytes, or `rep outs` if there are more.
    #[must_use]
    pub fn pio_write(self, port: u16, size: u8, data: &[u8]) -> Self {
        self.op(Op::PioWrite { port, size, data: data.to_vec() })
    }

    /// `in` of `size` bytes, `count` times.
    #[must_use]
    pub fn pio_read(self, port: u16, size: u8, count: usize) -> Self {
        self.op(Op::PioRead { port, size, len: usize::from(size) * count, expect: None })
    }

    /// `in` of `size` bytes that must give `data`; `rep ins` if that is more.
    #[must_use]
    pub fn expect_pio(self, port: u16, size: u8, data: &[u8]) -> Self {
        self.op(Op::PioRead { port, size, len: data.len(), expect: Some(data.to_vec()) })
    }

    /// `in` of one byte that must be `value`.
    #[must_use]
    pub fn expect_in8(self, port: u16, value: u8) -> Self {
        self.expect_pio(port, 1, &[value])
    }

    /// A store to device memory.
    #[must_use]
    pub fn mmio_write(self, gpa: u64, data: &[u8]) -> Self {
        self.op(Op::MmioWrite { gpa, data: data.to_vec() })
    }

    /// A 32-bit store to device memory.
    #[must_use]
    pub fn mmio_write32(self, gpa: u64, value: u32) -> Self {
        self.mmio_write(gpa, &value.to_le_bytes())
    }

    /// A load from device memory.
    #[must_use]
    pub fn mmio_read(self, gpa: u64, len: usize) -> Self {
        self.op(Op::MmioRead { gpa, len, expect: None })
    }

    /// A load from device memory that must give `data`.
    #[must_use]
    pub fn expect_mmio(self, gpa: u64, data: &[u8]) -> Self {
        self.op(Op::MmioRead { gpa, len: data.len(), expect: Some(data.to_vec()) })
    }

    /// A 32-bit load from device memory that must give `value`.
    #[must_use]
    pub fn expect_mmio32(self, gpa: u64, value: u32) -> Self {
        self.expect_mmio(gpa, &value.to_le_bytes())
    }

    /// A store to RAM.
    #[must_use]
    pub fn mem_write(self, gpa: u64, data: &[u8]) -> Self {
        self.op(Op::MemWrite { gpa, data: data.to_vec() })
    }

    /// A load from RAM.
    #[must_use]
    pub fn mem_read(self, gpa: u64, len: usize) -> Self {
        self.op(Op::MemRead { gpa, len, expect: None })
    }

    /// A load from RAM that must give `data`.
    #[must_use]
    pub fn expect_mem(self, gpa: u64, data: &[u8]) -> Self {
        self.op(Op::MemRead { gpa, len: data.len(), expect: Some(data.to_vec()) })
    }

    /// `hlt` without an interrupt controller.
    #[must_use]
    pub fn halt(self) -> Self {
        self.op(Op::Halt)
    }

    /// A triple fault.
    #[must_use]
    pub fn shutdown(self) -> Self {
        self.op(Op::Shutdown)
    }

    /// Stays in the guest until a kick.
    #[must_use]
    pub fn wait_kick(self) -> Self {
        self.op(Op::WaitKick)
    }

    /// Stays in the guest until an edge on `gsi`.
    #[must_use]
    pub fn wait_irq(self, gsi: u32) -> Self {
        self.op(Op::WaitIrq { gsi })
    }

    /// Something the hypervisor cannot go on after.
    #[must_use]
    pub fn internal_error(self, suberror: u32, instruction: &[u8]) -> Self {
        self.op(Op::InternalError { suberror, instruction: InstructionBytes::new(instruction) })
    }

    /// Code that sees memory, registers and the last load, and gives the next steps.
    #[must_use]
    pub fn then(self, code: impl FnOnce(&mut Guest<'_>) -> Self + Send + 'static) -> Self {
        self.op(Op::Then(Box::new(code)))
    }

    /// Code that gives no further steps.
    #[must_use]
    pub fn call(self, code: impl FnOnce(&mut Guest<'_>) + Send + 'static) -> Self {
        self.then(|guest| {
            code(guest);
            Self::new()
        })
    }

    /// Polls: does the steps of `round` until `done` likes what its last load gave, at most `limit` times.
    #[must_use]
    pub fn until(
        self,
        limit: u32,
        round: impl FnMut() -> Self + Send + 'static,
        done: impl FnMut(&[u8]) -> bool + Send + 'static,
    ) -> Self {
        self.op(Op::Until { round: Box::new(round), done: Box::new(done), left: limit })
    }
}
