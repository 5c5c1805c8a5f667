//! [`Frame`]: an Ethernet frame, or room for one, as slices of guest memory.

use freestone_memory::{Bytes, MemorySlice};

/// Slices of guest memory taken as one sequence of bytes: a frame without its vnet header, or room for one.
///
/// The guest can change the bytes at any moment. What decides something must be copied once and then checked.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a, 'm> {
    slices: &'a [MemorySlice<'m>],
    /// Bytes of the slices before the frame.
    skip: usize,
    len: usize,
}

impl<'a, 'm> Frame<'a, 'm> {
    /// All of `slices`.
    pub fn new(slices: &'a [MemorySlice<'m>]) -> Self {
        let len = slices.iter().fold(0usize, |sum, slice| sum.saturating_add(slice.len()));
        Self { slices, skip: 0, len }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slices, for vectored I/O together with [`range`](Self::range).
    pub fn slices(&self) -> &'a [MemorySlice<'m>] {
        self.slices
    }

    /// Where the frame is in its slices taken as one sequence.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.skip..self.skip.saturating_add(self.len)
    }

    /// Its first `len` bytes, or all if it has fewer.
    #[must_use]
    pub fn truncate(mut self, len: usize) -> Self {
        self.len = self.len.min(len);
        self
    }

    /// What comes after the first `len` bytes.
    #[must_use]
    pub fn after(mut self, len: usize) -> Self {
        let len = len.min(self.len);
        self.len -= len;
        self.skip += len;
        while let [first, rest @ ..] = self.slices
            && self.skip >= first.len()
        {
            self.skip -= first.len();
            self.slices = rest;
        }
        self
    }

    /// Copies bytes from `offset` on to `data`; returns how many there were.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        let part = self.after(offset);
        let mut data = data.get_mut(..part.len.min(data.len())).unwrap_or_default();
        let (mut skip, mut done) = (part.skip, 0);
        for slice in part.slices {
            if data.is_empty() {
                break;
            }
            let n = slice.read(data, skip).unwrap_or(0);
            skip = 0;
            done += n;
            data = data.get_mut(n..).unwrap_or_default();
        }
        done
    }

    /// Copies `data` to the bytes from `offset` on; returns how many there was room for.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        let part = self.after(offset);
        let mut data = data.get(..part.len.min(data.len())).unwrap_or_default();
        let (mut skip, mut done) = (part.skip, 0);
        for slice in part.slices {
            if data.is_empty() {
                break;
            }
            let n = slice.write(data, skip).unwrap_or(0);
            skip = 0;
            done += n;
            data = data.get(n..).unwrap_or_default();
        }
        done
    }

    /// The first `N` bytes, if there are so many.
    pub fn first<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read_at(0, &mut bytes) == N).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};

    use super::*;

    #[test]
    fn parts_of_a_frame_are_read_and_written_across_slices() {
        let mem = GuestMem::anonymous(0x1_0000).unwrap();
        let view = mem.view();
        let slices = [(0x1000, 3), (0x3000, 0), (0x2000, 4), (0x5000, 2)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let frame = Frame::new(&slices);
        assert_eq!(frame.len(), 9);
        assert_eq!(frame.write_at(0, b"abcdefghijk"), 9);
        let mut all = [0; 9];
        assert_eq!(frame.read_at(0, &mut all), 9);
        assert_eq!(&all, b"abcdefghi");
        for start in 0..=10 {
            for len in 0..=10 {
                let part = frame.after(start).truncate(len);
                let mut data = vec![0; 12];
                let n = part.read_at(0, &mut data);
                let want = all.get(start..).unwrap_or_default();
                let want = &want[..want.len().min(len)];
                assert_eq!(&data[..n], want);
                assert_eq!(part.len(), want.len());
            }
        }
        assert_eq!(frame.after(2).write_at(3, b"XY"), 2);
        assert_eq!(frame.first(), Some(*b"abcdeXYhi"));
        assert_eq!(frame.first::<10>(), None);
        assert_eq!(frame.truncate(4).write_at(3, b"123"), 1);
    }
}
