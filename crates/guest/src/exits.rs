//! The contract of [`EXITS`](crate::EXITS).
//!
//! The program reads a command from the parameter block at [`PARAMS`](crate::PARAMS), does it, writes 1 to [`DONE_PORT`](crate::DONE_PORT),
//! and reads the next command when that write returns; so the host changes the block while it handles the exit.
//! An unknown command writes 2 instead. The image brings a first command of its own (one byte to port 0x80), so the host
//! writes its first command before the processor runs, or at the first 1.
//!
//! ```
//! use freestone_guest::exits::{Command, Operation};
//!
//! let command = Command { operation: Operation::PortOut, level_0: false, count: 10_000, address: 0x80 };
//! let block = command.to_bytes(); // to be written at `PARAMS`
//! assert_eq!(block[..16], [1, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x27, 0, 0, 0, 0, 0, 0]);
//! ```

/// What the program does again and again; the numbers are those of word 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Operation {
    /// The end: a reset through the keyboard controller.
    End = 0,
    /// One byte (0x55) to a port.
    PortOut = 1,
    /// One byte from a port.
    PortIn = 2,
    /// Four bytes (0x55) to a guest-physical address below 4 GiB.
    MmioWrite = 3,
    /// Four bytes from a guest-physical address below 4 GiB.
    MmioRead = 4,
    /// A string of 64 bytes to a port by `rep outsb`.
    StringOut = 5,
    /// An empty loop, to know what the loop itself costs.
    Nothing = 6,
}

impl Operation {
    /// All that make exits.
    pub const ALL: [Self; 5] =
        [Self::PortOut, Self::PortIn, Self::MmioWrite, Self::MmioRead, Self::StringOut];
}

/// A command, words 0 to 2 of the parameter block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command {
    /// What to do.
    pub operation: Operation,
    /// At privilege level 0 instead of 3 (bit 8 of word 0).
    pub level_0: bool,
    /// How often (word 1).
    pub count: u64,
    /// Port, or guest-physical address (word 2).
    pub address: u64,
}

impl Command {
    /// The bytes to be written at [`PARAMS`](crate::PARAMS).
    pub fn to_bytes(self) -> [u8; 24] {
        let mode = self.operation as u64 | if self.level_0 { 0x100 } else { 0 };
        let mut bytes = [0; 24];
        for (to, word) in bytes.chunks_exact_mut(8).zip([mode, self.count, self.address]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Word of the parameter block in which the program leaves the time stamp counter's ticks of the last command.
pub const TICKS: usize = 3;
/// Written to [`DONE_PORT`](crate::DONE_PORT): the command is done.
pub const DONE: u8 = 1;
/// Written to [`DONE_PORT`](crate::DONE_PORT): no such operation.
pub const UNKNOWN: u8 = 2;
