//! A bounded buffer of bytes on their way from the guest to a host stream.

use crate::Result;

/// Bytes that a connection buffers at most: the credit its guest is given.
pub(super) const CAPACITY: usize = 64 << 10;
/// [`CAPACITY`] as packets name it.
pub(super) const CREDIT: u32 = 64 << 10;

/// Takes its memory with the first byte and not before.
#[derive(Default)]
pub(super) struct ByteRing {
    data: Box<[u8]>,
    start: usize,
    len: usize,
}

impl ByteRing {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `n` bytes that `read` supplies in one piece or two. The caller saw to it that they fit.
    pub fn append(&mut self, n: usize, mut read: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        if self.data.is_empty() {
            self.data = vec![0; CAPACITY].into_boxed_slice();
        }
        let n = n.min(CAPACITY - self.len);
        let end = (self.start + self.len) % CAPACITY;
        let first = n.min(CAPACITY - end);
        read(self.data.get_mut(end..end + first).unwrap_or_default())?;
        read(self.data.get_mut(..n - first).unwrap_or_default())?;
        self.len += n;
        Ok(())
    }

    /// The oldest bytes; not all of them where the ring wraps around.
    pub fn front(&self) -> &[u8] {
        let end = (self.start + self.len).min(CAPACITY);
        self.data.get(self.start..end).unwrap_or_default()
    }

    /// Drops the oldest `n` bytes.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        // What is empty starts at the front again, so that the next bytes are in one piece.
        self.start = if self.len == 0 { 0 } else { (self.start + n) % CAPACITY };
    }

    /// Drops all bytes, and the memory.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

impl std::fmt::Debug for ByteRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ByteRing").field("start", &self.start).field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(ring: &mut ByteRing, mut bytes: &[u8]) {
        let n = bytes.len();
        ring.append(n, |to| {
            let (now, later) = bytes.split_at(to.len());
            to.copy_from_slice(now);
            bytes = later;
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn bytes_come_out_in_order_around_the_end() {
        let mut ring = ByteRing::default();
        append(&mut ring, &[1; CAPACITY]);
        ring.consume(CAPACITY - 2);
        append(&mut ring, &[2; 5]);
        assert_eq!(ring.len(), 7);
        assert_eq!(ring.front(), [1, 1]);
        ring.consume(2);
        assert_eq!(ring.front(), [2; 5]);
        ring.consume(5);
        assert!(ring.front().is_empty());
    }

    #[test]
    fn an_idle_ring_has_no_memory() {
        let mut ring = ByteRing::default();
        assert!(ring.data.is_empty());
        append(&mut ring, b"x");
        assert_eq!(ring.data.len(), CAPACITY);
        ring.clear();
        assert!(ring.data.is_empty());
    }
}
