//! [`ChainBuffers`]: the buffers of one request, as slices of guest memory.

use freestone_memory::{Bytes, MemorySlice};

use crate::{Error, Result};

/// So many slices that were taken off are forgotten at once.
const COMPACT: usize = 256;

/// The buffers of one request: first those the device reads, then those it writes.
///
/// Where one descriptor ends and the next begins means nothing (virtio 1.2, section 2.7.4): a device takes headers from the
/// front with [`read`](Self::read) and [`write`](Self::write), the last bytes with [`split_last`](Self::split_last), and hands
/// what is left to vectored I/O.
///
/// One value serves many requests: it keeps its allocation. What a header says must be read once and then checked, because
/// the driver can change guest memory at any time; [`read`](Self::read) copies for that reason.
#[derive(Debug, Default)]
pub struct ChainBuffers<'m> {
    slices: Vec<MemorySlice<'m>>,
    /// Readable slices are `slices[front..middle]`, writable ones `slices[middle_front..]`.
    front: usize,
    middle: usize,
    middle_front: usize,
    readable_len: u32,
    writable_len: u32,
}

impl<'m> ChainBuffers<'m> {
    /// No buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps the allocation for another view of guest memory, and perhaps another thread.
    #[must_use]
    pub fn into_spare(self) -> SpareBuffers {
        SpareBuffers(reuse(self.slices))
    }

    /// Forgets all buffers.
    pub(crate) fn clear(&mut self) {
        self.slices.clear();
        (self.front, self.middle, self.middle_front) = (0, 0, 0);
        (self.readable_len, self.writable_len) = (0, 0);
    }

    /// Adds `len` bytes to the total of its direction.
    pub(crate) fn account(&mut self, len: u32, writable: bool) -> Result<()> {
        let total = self.readable_len.checked_add(self.writable_len).and_then(|n| n.checked_add(len));
        total.ok_or(Error::ChainBytes)?;
        if writable {
            self.writable_len += len;
        } else if self.middle < self.slices.len() {
            return Err(Error::Direction);
        } else {
            self.readable_len += len;
        }
        Ok(())
    }

    /// Adds a slice whose length was accounted for.
    pub(crate) fn push(&mut self, slice: MemorySlice<'m>, writable: bool) {
        self.slices.push(slice);
        if !writable {
            self.middle = self.slices.len();
            self.middle_front = self.middle;
        }
    }

    /// What is left of the device-readable buffers.
    pub fn readable(&self) -> &[MemorySlice<'m>] {
        self.slices.get(self.front..self.middle).unwrap_or_default()
    }

    /// What is left of the device-writable buffers.
    pub fn writable(&self) -> &[MemorySlice<'m>] {
        self.slices.get(self.middle_front..).unwrap_or_default()
    }

    /// Bytes left to read.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes left to write.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Copies the first device-readable bytes into `data` and takes them off.
    ///
    /// # Errors
    /// [`Error::ShortRequest`] if there are fewer; nothing is taken then.
    pub fn read(&mut self, data: &mut [u8]) -> Result<()> {
        let want = data.len();
        if (self.readable_len as usize) < want {
            return Err(self.short("device-readable", self.readable_len, want));
        }
        let mut rest = data;
        while !rest.is_empty() {
            let Some(slice) = self.slices.get_mut(self.front) else { break };
            let n = slice.read(rest, 0)?;
            rest = rest.get_mut(n..).unwrap_or_default();
            *slice = slice.offset(n)?;
            self.readable_len = self.readable_len.saturating_sub(u32::try_from(n).unwrap_or(u32::MAX));
            if slice.is_empty() {
                self.front += 1;
            }
        }
        Ok(())
    }

    /// Copies `data` to the first device-writable bytes and takes them off.
    ///
    /// # Errors
    /// [`Error::ShortRequest`] if there is less room; nothing is written then.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        if (self.writable_len as usize) < data.len() {
            return Err(self.short("device-writable", self.writable_len, data.len()));
        }
        let mut rest = data;
        while !rest.is_empty() {
            let Some(slice) = self.slices.get_mut(self.middle_front) else { break };
            let n = slice.write(rest, 0)?;
            rest = rest.get(n..).unwrap_or_default();
            *slice = slice.offset(n)?;
            self.writable_len = self.writable_len.saturating_sub(u32::try_from(n).unwrap_or(u32::MAX));
            if slice.is_empty() {
                self.middle_front += 1;
            }
        }
        Ok(())
    }

    /// Takes the last device-writable byte off and returns it: where many devices put their status.
    ///
    /// # Errors
    /// [`Error::ShortRequest`] if there is none.
    pub fn split_last(&mut self) -> Result<MemorySlice<'m>> {
        let last = if self.writable_len == 0 { None } else { self.slices.pop() };
        let Some(slice) = last else {
            return Err(self.short("device-writable", 0, 1));
        };
        let (rest, last) = slice.split_at(slice.len().saturating_sub(1))?;
        if !rest.is_empty() {
            self.slices.push(rest);
        }
        self.writable_len -= 1;
        Ok(last)
    }

    /// Adds the device-writable buffers of `other` behind those that are here, of which none are device-readable. Returns how many
    /// slices they are.
    pub(crate) fn append_writable(&mut self, other: &Self) -> usize {
        self.slices.extend_from_slice(other.writable());
        self.writable_len = self.writable_len.saturating_add(other.writable_len);
        other.writable().len()
    }

    /// Takes off the first `slices` device-writable slices, which have `bytes` bytes.
    pub(crate) fn drop_writable(&mut self, slices: usize, bytes: u32) {
        self.middle_front = self.middle_front.saturating_add(slices).min(self.slices.len());
        self.writable_len = self.writable_len.saturating_sub(bytes);
        // So that what was taken off does not pile up while there is always something left.
        if self.middle_front >= COMPACT && self.middle == 0 {
            self.slices.drain(..self.middle_front);
            self.middle_front = 0;
        }
    }

    fn short(&self, direction: &'static str, have: u32, want: usize) -> Error {
        Error::ShortRequest { direction, have: have.into(), want: want as u64 }
    }
}

/// The allocation of a [`ChainBuffers`] between two uses: borrows nothing and may be sent to another thread.
#[derive(Debug, Default)]
pub struct SpareBuffers(Vec<Blank>);

/// As large as a slice, and as strictly aligned.
type Blank = [usize; size_of::<MemorySlice<'static>>() / size_of::<usize>()];

impl SpareBuffers {
    /// No allocation yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empty buffers that use the allocation; gets it back from [`ChainBuffers::into_spare`].
    #[must_use]
    pub fn take<'m>(&mut self) -> ChainBuffers<'m> {
        ChainBuffers { slices: reuse(std::mem::take(&mut self.0)), ..ChainBuffers::new() }
    }
}

/// An empty vector in the allocation of another. That is what the standard library does when it collects items of equal
/// layout out of a vector; nothing but speed rests on it.
fn reuse<A, B>(mut from: Vec<A>) -> Vec<B> {
    from.clear();
    from.into_iter().filter_map(|_| None).collect()
}

#[cfg(test)]
mod tests {
    use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend, MemoryView};

    use super::*;

    fn fill<'m>(view: &'m MemoryView, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> ChainBuffers<'m> {
        let mut bufs = ChainBuffers::new();
        let all = readable.iter().map(|b| (b, false)).chain(writable.iter().map(|b| (b, true)));
        for (&(addr, len), dir) in all {
            bufs.account(len, dir).unwrap();
            bufs.push(view.get_slice(GuestAddress(addr), len as usize).unwrap(), dir);
        }
        bufs
    }

    #[test]
    fn a_header_may_be_spread_over_descriptors() {
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        view.write_slice(b"head", GuestAddress(0x10)).unwrap();
        view.write_slice(b"er+data", GuestAddress(0x3000)).unwrap();
        let mut bufs = fill(&view, &[(0x10, 4), (0x3000, 7)], &[]);
        let mut header = [0; 6];
        bufs.read(&mut header).unwrap();
        assert_eq!(&header, b"header");
        assert_eq!(bufs.readable_len(), 5);
        let mut rest = [0; 5];
        bufs.readable()[0].read(&mut rest, 0).unwrap();
        assert_eq!(&rest, b"+data");
    }

    #[test]
    fn a_short_read_takes_nothing() {
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        let mut bufs = fill(&view, &[(0x10, 4)], &[(0x20, 100)]);
        let error = bufs.read(&mut [0; 5]).unwrap_err();
        assert_eq!(error.to_string(), "request has 4 device-readable bytes where 5 are needed");
        assert_eq!((bufs.readable_len(), bufs.writable_len()), (4, 100));
    }

    #[test]
    fn the_status_byte_is_split_off_the_last_descriptor() {
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        let mut bufs = fill(&view, &[(0x10, 4)], &[(0x20, 8), (0x40, 5)]);
        bufs.split_last().unwrap().write_obj(9u8, 0).unwrap();
        assert_eq!(view.read_obj::<u8>(GuestAddress(0x44)).unwrap(), 9);
        assert_eq!((bufs.writable().len(), bufs.writable_len()), (2, 12));
        let mut bufs = fill(&view, &[], &[(0x20, 8), (0x40, 1)]);
        bufs.split_last().unwrap();
        assert_eq!((bufs.writable().len(), bufs.writable_len()), (1, 8));
    }

    #[test]
    fn without_a_writable_byte_there_is_no_status() {
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        let mut bufs = fill(&view, &[(0x10, 4)], &[]);
        bufs.split_last().unwrap_err();
        assert_eq!(bufs.readable_len(), 4);
        ChainBuffers::new().split_last().unwrap_err();
    }

    #[test]
    fn writes_go_over_descriptors_and_not_beyond() {
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        let mut bufs = fill(&view, &[], &[(0x20, 2), (0x40, 2)]);
        bufs.write(b"abc").unwrap();
        assert_eq!(bufs.writable_len(), 1);
        bufs.write(b"xy").unwrap_err();
        assert_eq!(view.read_obj::<[u8; 2]>(GuestAddress(0x20)).unwrap(), *b"ab");
        assert_eq!(view.read_obj::<[u8; 2]>(GuestAddress(0x40)).unwrap(), *b"c\0");
    }

    #[test]
    fn the_allocation_outlives_the_view() {
        let mem = GuestMem::anonymous(0x4000).unwrap();
        let view = mem.view();
        let bufs = fill(&view, &[(0x10, 4); 100], &[]);
        let (before, capacity) = (bufs.slices.as_ptr() as usize, bufs.slices.capacity());
        let mut spare = bufs.into_spare();
        let other = spare.take();
        assert_eq!(other.slices.as_ptr() as usize, before);
        assert!(other.slices.capacity() >= capacity);
        assert_eq!(other.readable_len(), 0);
    }
}
