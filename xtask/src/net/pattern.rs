//! Bytes that look random, can be made at any speed that matters here, and are known to both ends by a seed.

use std::io::Read;

use anyhow::{Context, Result};

/// Bytes that are made and compared at a time.
const CHUNK: usize = 64 << 10;

/// A generator of 64-bit numbers (xorshift64*), good enough that no two parts of a pattern are alike.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// An endless pattern.
#[derive(Debug, Clone)]
pub struct Pattern {
    numbers: Numbers,
    rest: [u8; 8],
    /// Bytes of `rest` that were given out.
    used: usize,
}

impl Pattern {
    /// The pattern of a seed.
    pub fn new(seed: u64) -> Self {
        Self { numbers: Numbers::new(seed), rest: [0; 8], used: 8 }
    }
}

impl Read for Pattern {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len();
        let left = self.rest.get(self.used..).unwrap_or_default();
        let head = left.len().min(len);
        let (first, buf) = buf.split_at_mut(head);
        first.copy_from_slice(left.get(..head).unwrap_or_default());
        self.used += head;
        let mut words = buf.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.numbers.next().to_le_bytes());
        }
        let tail = words.into_remainder();
        if !tail.is_empty() {
            self.rest = self.numbers.next().to_le_bytes();
            self.used = tail.len();
            tail.copy_from_slice(self.rest.get(..tail.len()).unwrap_or_default());
        }
        Ok(len)
    }
}

/// Compares what arrives with a pattern.
#[derive(Debug)]
pub struct Checker {
    pattern: Pattern,
    received: u64,
    wrong_at: Option<u64>,
}

impl Checker {
    /// For the pattern of a seed.
    pub fn new(seed: u64) -> Self {
        Self { pattern: Pattern::new(seed), received: 0, wrong_at: None }
    }

    /// Takes everything up to the end of a stream.
    pub fn read_all(&mut self, from: &mut impl Read) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut expected = vec![0; CHUNK];
        loop {
            let length = from.read(&mut buffer).with_context(|| format!("reading byte {}", self.received))?;
            if length == 0 {
                return Ok(());
            }
            let (Some(got), Some(want)) = (buffer.get(..length), expected.get_mut(..length)) else {
                return Ok(());
            };
            self.pattern.read_exact(want).context("making the pattern")?;
            if self.wrong_at.is_none() && got != want {
                let at = got.iter().zip(want.iter()).position(|(a, b)| a != b).unwrap_or_default();
                self.wrong_at = Some(self.received + u64::try_from(at)?);
            }
            self.received += u64::try_from(length)?;
        }
    }

    /// Whether exactly `bytes` bytes came and all were right.
    pub fn is_right(&self, bytes: u64) -> bool {
        self.wrong_at.is_none() && self.received == bytes
    }

    /// One line on what came.
    pub fn verdict(&self, bytes: u64) -> String {
        match self.wrong_at {
            Some(at) => format!("wrong at byte {at} of {}", self.received),
            None if self.received == bytes => format!("right {bytes} bytes"),
            None => format!("wrong: {} bytes instead of {bytes}", self.received),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_the_same_in_whatever_pieces_it_is_read() {
        let mut whole = [0; 1000];
        Pattern::new(7).read_exact(&mut whole).unwrap();
        let mut pieces = Pattern::new(7);
        for piece in whole.chunks(13) {
            let mut got = vec![0; piece.len()];
            pieces.read_exact(&mut got).unwrap();
            assert_eq!(got, piece);
        }
    }

    #[test]
    fn a_changed_byte_is_found() {
        let mut bytes = vec![0; 200_000];
        Pattern::new(1).read_exact(&mut bytes).unwrap();
        bytes[150_000] ^= 1;
        let mut checker = Checker::new(1);
        checker.read_all(&mut bytes.as_slice()).unwrap();
        assert_eq!(checker.verdict(200_000), "wrong at byte 150000 of 200000");
    }

    #[test]
    fn a_missing_byte_is_found() {
        let mut checker = Checker::new(1);
        checker.read_all(&mut Pattern::new(1).take(99)).unwrap();
        assert!(!checker.is_right(100));
        assert!(checker.is_right(99));
    }
}
