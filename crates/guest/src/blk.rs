//! The contract of [`BLK`](crate::BLK).
//!
//! The program looks for the first virtio disk on PCI (by the ACPI table MCFG) and then on its command line
//! (`virtio_mmio.device=4K@0xd0000000:5`). It writes 1 to [`DONE_PORT`](crate::DONE_PORT), and when that write returns it reads a command
//! from the parameter block at [`PARAMS`](crate::PARAMS), does it, leaves the [`Outcome`] in the block, and begins again. So the host
//! changes the block while it handles the exit. Instead of 1 it writes what [`why`] explains.
//!
//! Each command resets the device and negotiates anew. All requests are blocks of 4096 bytes. The driver polls: it never wants an
//! interrupt, and kicks when the device asks for it.
//!
//! ```
//! use freestone_guest::blk::{Command, EVENT_IDX, Operation};
//!
//! let command = Command { depth: 32, features: EVENT_IDX, ..Command::new(Operation::Read, 100_000) };
//! let block = command.to_bytes(); // to be written at `PARAMS`
//! assert_eq!((block[0], block[16]), (2, 32));
//! ```

/// Bytes of a request.
pub const BLOCK: usize = 4096;
/// Most requests of a queue at once.
pub const MAX_DEPTH: u64 = 128;
/// Most queues.
pub const MAX_QUEUES: u64 = 2;

/// Indirect descriptors, which the driver uses where chains of three do not fit the queue (virtio 1.2, 2.7.5.3).
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Event indices (2.7.10).
pub const EVENT_IDX: u64 = 1 << 29;
/// Packed rings (2.8).
pub const RING_PACKED: u64 = 1 << 34;
/// More than one queue (5.2.3).
pub const MULTI_QUEUE: u64 = 1 << 12;

/// What the program does; the numbers are those of word 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Operation {
    /// The end: a reset through the keyboard controller.
    End = 0,
    /// Reads block after block from the first on, and compares each with [`pattern`].
    Verify = 1,
    /// Reads at random.
    Read = 2,
    /// Writes at random, blocks of [`FILL`].
    Write = 3,
}

/// Every byte that [`Operation::Write`] writes.
pub const FILL: u8 = 0x57;

/// A command, words 0 to 5 of the parameter block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command {
    /// What to do.
    pub operation: Operation,
    /// Requests.
    pub count: u64,
    /// Requests of each queue at once, from 1 to [`MAX_DEPTH`].
    pub depth: u64,
    /// Queues, from 1 to [`MAX_QUEUES`].
    pub queues: u64,
    /// What the sequence of blocks begins with.
    pub seed: u64,
    /// Features that the driver takes if the device has them; of those it knows, the constants here.
    pub features: u64,
}

impl Command {
    /// One request at a time on one queue, with all features but packed rings.
    pub fn new(operation: Operation, count: u64) -> Self {
        let features = INDIRECT_DESC | EVENT_IDX | MULTI_QUEUE;
        Self { operation, count, depth: 1, queues: 1, seed: 0x9E37_79B9_7F4A_7C15, features }
    }

    /// The bytes to be written at [`PARAMS`](crate::PARAMS).
    pub fn to_bytes(self) -> [u8; 48] {
        let Self { operation, count, depth, queues, seed, features } = self;
        let mut bytes = [0; 48];
        let words = [operation as u64, count, depth, queues, seed, features];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// What came of a command: words 8 to 13 of the parameter block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The time stamp counter's ticks from the first request to the last completion.
    pub ticks: u64,
    /// How often the device asked for a kick and got one.
    pub kicks: u64,
    /// Requests that failed, and blocks that were not as expected.
    pub wrong: u64,
    /// Blocks of the disk.
    pub blocks: u64,
    /// 1: MMIO, 2: PCI.
    pub transport: u64,
    /// Negotiated features.
    pub features: u64,
}

impl Outcome {
    /// Where it is, in bytes from [`PARAMS`](crate::PARAMS).
    pub const OFFSET: u64 = 64;

    /// From the bytes that are there.
    pub fn from_bytes(bytes: [u8; 48]) -> Self {
        let mut words = [0; 6];
        for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = from.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        let [ticks, kicks, wrong, blocks, transport, features] = words;
        Self { ticks, kicks, wrong, blocks, transport, features }
    }
}

/// Why the program wrote another value than 1 to [`DONE_PORT`](crate::DONE_PORT).
pub fn why(value: u8) -> &'static str {
    match value {
        1 => "done",
        2 => "no such operation",
        3 => "no virtio disk found",
        4 => "the device refused features or queues, or has too few",
        5 => "the device does not answer",
        _ => "not a value of this program",
    }
}

/// What [`Operation::Verify`] expects in block `number` of the disk.
pub fn pattern(number: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for (word, to) in (1..).zip(bytes.chunks_exact_mut(8)) {
        let value = number.wrapping_mul(512).wrapping_add(word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        to.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_is_six_words() {
        let mut bytes = [0; 48];
        for (n, byte) in bytes.iter_mut().step_by(8).enumerate() {
            *byte = u8::try_from(n).unwrap();
        }
        let expected = Outcome { ticks: 0, kicks: 1, wrong: 2, blocks: 3, transport: 4, features: 5 };
        assert_eq!(Outcome::from_bytes(bytes), expected);
    }

    #[test]
    fn no_two_blocks_of_the_pattern_are_alike() {
        assert_ne!(pattern(0)[..8], pattern(1)[..8]);
        assert_eq!(pattern(0)[8..16], pattern(0)[8..16]);
        assert_ne!(pattern(0)[4088..], pattern(1)[..8]);
    }
}
