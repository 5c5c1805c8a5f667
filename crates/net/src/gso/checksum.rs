//! The Internet checksum (RFC 1071), over bytes and frames, in parts.

use freestone_memory::Bytes;

use crate::Frame;

/// Bytes of guest memory that are copied out at once to be added up.
const CHUNK: usize = 2048;

/// A ones' complement sum of 16-bit words. What is added goes behind what was added before: parts may have odd lengths.
#[derive(Debug, Clone, Copy, Default)]
pub struct Checksum {
    /// Words in the byte order of this machine: RFC 1071, section 2 (B), shows that the order does not matter until the end.
    sum: u64,
    /// Bytes so far were odd in number: the next is the second of its word.
    odd: bool,
}

impl Checksum {
    /// Nothing added up.
    pub fn new() -> Self {
        Self::default()
    }

    /// The pseudo header of TCP and UDP: both addresses of IPv4 (RFC 9293, section 3.1) or of IPv6 (RFC 8200, section 8.1), the
    /// protocol, and the length of the transport's header and data.
    pub fn pseudo(source: &[u8], destination: &[u8], protocol: u8, len: u32) -> Self {
        let mut sum = Self::new();
        sum.add(source);
        sum.add(destination);
        sum.add(&len.to_be_bytes());
        sum.add(&[0, protocol]);
        sum
    }

    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        // Words of four bytes into sums of eight: there is no carry to look after before 2^32 words, and the compiler makes
        // vectors of it.
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
        let (halves, rest) = rest.as_chunks::<2>();
        sum += halves.iter().map(|half| u64::from(u16::from_ne_bytes(*half))).sum::<u64>();
        if let [last] = rest {
            sum += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        let part = fold(sum);
        let part = if self.odd { part.swap_bytes() } else { part };
        self.sum = u64::from(fold(self.sum)) + u64::from(part);
        self.odd ^= bytes.len() % 2 == 1;
    }

    /// Adds the bytes of a frame, each read once.
    pub fn add_frame(&mut self, frame: &Frame<'_, '_>) {
        let range = frame.range();
        let (mut skip, mut left) = (range.start, range.end.saturating_sub(range.start));
        let mut chunk = [0; CHUNK];
        for slice in frame.slices() {
            if left == 0 {
                break;
            }
            let mut at = skip.min(slice.len());
            skip -= at;
            while left > 0 && at < slice.len() {
                let want = chunk.get_mut(..left.min(CHUNK)).unwrap_or_default();
                let n = slice.read(want, at).unwrap_or(0);
                if n == 0 {
                    return;
                }
                self.add(want.get(..n).unwrap_or_default());
                at += n;
                left -= n;
            }
        }
    }

    /// The sum so far, as a number in a packet (big-endian there).
    pub fn sum(self) -> u16 {
        u16::from_be(fold(self.sum))
    }

    /// The checksum, as a number in a packet: the complement of the sum. Over bytes that have a right checksum in them it is 0.
    pub fn value(self) -> u16 {
        !self.sum()
    }

    /// The same for the field of TCP and UDP, where 0 stands for "none" (RFC 768) and the other zero is taken instead.
    pub fn transport(self) -> u16 {
        match self.value() {
            0 => 0xFFFF,
            value => value,
        }
    }
}

/// Adds up the four words of a sum until there is one.
fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xFFFF_FFFF);
    let sum = (sum >> 16) + (sum & 0xFFFF);
    let sum = (sum >> 16) + (sum & 0xFFFF);
    let sum = (sum >> 16) + (sum & 0xFFFF);
    // No more than 16 bits are left: 2^33 became at most 2^17 + 2^16, then at most 2^16 + 2, then less.
    u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
    use proptest::prelude::*;

    use super::*;

    /// As RFC 1071 says it, a word at a time.
    fn plainly(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum >> 16) + (sum & 0xFFFF);
        }
        !u16::try_from(sum).unwrap()
    }

    #[test]
    fn the_example_of_the_rfc() {
        let mut sum = Checksum::new();
        sum.add(&[0x00, 0x01, 0xF2, 0x03, 0xF4, 0xF5, 0xF6, 0xF7]);
        assert_eq!(sum.sum(), 0xDDF2);
        assert_eq!(sum.value(), !0xDDF2);
    }

    #[test]
    fn the_largest_sums_carry_around() {
        for len in [0, 1, 2, 3, 4, 7, 8, 65535, 1 << 20] {
            let bytes = vec![0xFF; len];
            let mut sum = Checksum::new();
            sum.add(&bytes);
            assert_eq!(sum.value(), plainly(&bytes), "{len}");
        }
    }

    #[test]
    fn a_transport_never_says_that_it_has_none() {
        let mut sum = Checksum::new();
        sum.add(&[0xFF, 0xFF]);
        assert_eq!((sum.value(), sum.transport()), (0, 0xFFFF));
    }

    proptest! {
        #[test]
        fn parts_add_up_to_the_whole(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..8)) {
            let mut sum = Checksum::new();
            for part in &parts {
                sum.add(part);
            }
            prop_assert_eq!(sum.value(), plainly(&parts.concat()));
        }

        #[test]
        fn a_frame_is_added_up_across_its_slices(lens in proptest::collection::vec(0usize..3000, 0..5), skip in 0usize..4000, seed: u8) {
            let mem = GuestMem::anonymous(0x1_0000).unwrap();
            let view = mem.view();
            let (mut at, mut all, mut slices) = (0u64, Vec::new(), Vec::new());
            for len in lens {
                let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 256).to_le_bytes()[0].wrapping_add(seed)).collect();
                view.write_slice(&bytes, GuestAddress(at)).unwrap();
                slices.push(view.get_slice(GuestAddress(at), len).unwrap());
                at += len as u64 + 5;
                all.extend(bytes);
            }
            let frame = Frame::new(&slices).after(skip);
            let mut sum = Checksum::new();
            sum.add_frame(&frame);
            prop_assert_eq!(sum.value(), plainly(all.get(skip..).unwrap_or_default()));
        }
    }
}
