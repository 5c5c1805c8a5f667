//! The contract of [`WRITER`](crate::WRITER).
//!
//! The command line `first=N` says with which write it begins. Write `n` fills block [`block`] of [`BLOCK`] bytes with [`word`]s.
//! After every fourth write it flushes the disk, and then prints `durable n` on COM1: every write up to `n` has to survive from then
//! on, whatever happens to the VMM.

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// The block of write `n` on a disk of `blocks` blocks.
///
/// ```
/// assert!(freestone_guest::writer::block(1, 100) < 100);
/// ```
pub const fn block(n: u64, blocks: u64) -> u64 {
    let mixed = (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 17).wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 7;
    if blocks == 0 { 0 } else { mixed % blocks }
}

/// Word `i` of the block of write `n`, of which all are below 2^48.
pub const fn word(n: u64, i: u64) -> u64 {
    n ^ i << 48
}

/// The write that a block's bytes are of, if they are of one.
pub fn write_of(bytes: &[u8]) -> Option<u64> {
    let words = bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let mut numbered = words.zip(0..).map(|(word, i)| word ^ (i << 48));
    let first = numbered.next()?;
    numbered.all(|n| n == first).then_some(first).filter(|_| bytes.len() == BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_its_write_and_a_torn_one_does_not() {
        let mut bytes: Vec<u8> = (0..512).flat_map(|i| word(77, i).to_le_bytes()).collect();
        assert_eq!(write_of(&bytes), Some(77));
        bytes[4000] ^= 1;
        assert_eq!(write_of(&bytes), None);
        assert_eq!(write_of(&bytes[..100]), None);
    }
}
