//! Which blocks are plugged, and the memory behind them. Knows no queue.

use std::io;
use std::ops::Range;

use super::state::MemState;
use crate::{Error, Result};

/// Where the memory of chunks comes from.
pub(super) trait ChunkSource {
    /// Keeps a chunk in the guest.
    type Chunk;

    /// Puts memory at these guest-physical addresses.
    fn add(&self, gpa: u64, len: u64) -> io::Result<Self::Chunk>;

    /// Gives the pages of part of a chunk back to the host.
    fn discard(&self, gpa: u64, len: u64) -> io::Result<()>;
}

/// The answer to a request (5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// `VIRTIO_MEM_RESP_ACK`.
    Ack,
    /// `VIRTIO_MEM_RESP_NACK`: more than was requested.
    Nack,
    /// `VIRTIO_MEM_RESP_BUSY`: not now.
    Busy,
    /// `VIRTIO_MEM_RESP_ERROR`.
    Error,
}

/// Why a saved state is refused.
#[derive(Debug)]
pub(super) enum Misfit {
    /// What of it cannot be, and its value.
    State(&'static str, u64),
    /// The host has no memory for it.
    Host(io::Error),
}

/// The state of some blocks (5.15.6.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

/// The numbers of the configuration space, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) block: u64,
    /// First guest-physical address; 0 before the device is attached.
    pub(super) base: u64,
    pub(super) region: u64,
    pub(super) usable: u64,
    pub(super) plugged: u64,
    pub(super) requested: u64,
}

/// A chunk of the region.
struct Chunk<C> {
    /// There while a block is plugged.
    memory: Option<C>,
    plugged: u64,
}

pub(super) struct Blocks<S: ChunkSource> {
    sizes: Sizes,
    /// How far the usable region goes beyond what is requested.
    slack: u64,
    chunk_size: u64,
    /// Whether each block is plugged.
    plugged: Vec<bool>,
    chunks: Vec<Chunk<S::Chunk>>,
    source: Option<S>,
}

impl<S: ChunkSource> Blocks<S> {
    /// All sizes are multiples of `block`, but for the chunk size that of the region need not be one.
    pub(super) fn new(region: u64, block: u64, chunk_size: u64) -> Self {
        let count = usize::try_from(region / block).unwrap_or(usize::MAX);
        let chunks = (0..region.div_ceil(chunk_size)).map(|_| Chunk { memory: None, plugged: 0 });
        Self {
            sizes: Sizes { block, base: 0, region, usable: 0, plugged: 0, requested: 0 },
            slack: 0,
            chunk_size,
            plugged: vec![false; count],
            chunks: chunks.collect(),
            source: None,
        }
    }

    pub(super) fn sizes(&self) -> Sizes {
        self.sizes
    }

    pub(super) fn attach(&mut self, base: u64, slack: u64, source: S) {
        self.sizes.base = base;
        self.slack = slack;
        self.sizes.usable = self.usable_for(self.sizes.requested);
        self.source = Some(source);
    }

    pub(super) fn is_attached(&self) -> bool {
        self.source.is_some()
    }

    /// Takes all memory away, for good.
    pub(super) fn detach(&mut self) {
        self.unplug_all();
        self.source = None;
    }

    /// Changes how much is asked for. The usable region grows with it, and does not shrink (5.15.4.2).
    pub(super) fn request(&mut self, bytes: u64) -> Result<()> {
        if bytes > self.sizes.region || !bytes.is_multiple_of(self.sizes.block) {
            let reason = "what is requested must be whole blocks, and at most the region";
            return Err(Error::Config { device: "virtio-mem".to_owned(), reason });
        }
        self.sizes.requested = bytes;
        self.sizes.usable = self.sizes.usable.max(self.usable_for(bytes));
        Ok(())
    }

    fn usable_for(&self, requested: u64) -> u64 {
        if requested == 0 { 0 } else { requested.saturating_add(self.slack).min(self.sizes.region) }
    }

    /// The blocks of a request, if they are in the usable region.
    fn range(&self, addr: u64, count: u16) -> Option<Range<usize>> {
        let offset = addr.checked_sub(self.sizes.base)?;
        let len = u64::from(count).checked_mul(self.sizes.block)?;
        let end = offset.checked_add(len)?;
        if count == 0 || !offset.is_multiple_of(self.sizes.block) || end > self.sizes.usable {
            return None;
        }
        let index = |offset: u64| usize::try_from(offset / self.sizes.block).ok();
        Some(index(offset)?..index(end)?)
    }

    fn count_plugged(&self, range: Range<usize>) -> usize {
        self.plugged.get(range).unwrap_or_default().iter().filter(|plugged| **plugged).count()
    }

    /// The state of `count` blocks, or `None` if they are not all in the usable region.
    pub(super) fn state(&self, addr: u64, count: u16) -> Option<State> {
        let range = self.range(addr, count)?;
        let len = range.len();
        Some(match self.count_plugged(range) {
            0 => State::Unplugged,
            n if n == len => State::Plugged,
            _ => State::Mixed,
        })
    }

    /// A PLUG request (5.15.6.3): all of it or nothing.
    pub(super) fn plug(&mut self, addr: u64, count: u16) -> Answer {
        let Some(range) = self.range(addr, count) else { return Answer::Error };
        if self.count_plugged(range.clone()) > 0 {
            return Answer::Error;
        }
        let bytes = u64::from(count) * self.sizes.block;
        if self.sizes.plugged.saturating_add(bytes) > self.sizes.requested {
            return Answer::Nack;
        }
        let parts = self.by_chunk(&range);
        if let Err(error) = self.add_chunks(&parts) {
            self.drop_empty(&parts);
            tracing::warn!(%error, addr, bytes, "no host memory to plug");
            return Answer::Busy;
        }
        for (index, blocks) in parts {
            if let Some(chunk) = self.chunks.get_mut(index) {
                chunk.plugged += blocks.len() as u64;
            }
            self.mark(blocks, true);
        }
        Answer::Ack
    }

    /// An UNPLUG request (5.15.6.4): all of it or nothing.
    pub(super) fn unplug(&mut self, addr: u64, count: u16) -> Answer {
        let Some(range) = self.range(addr, count) else { return Answer::Error };
        if self.count_plugged(range.clone()) < range.len() {
            return Answer::Error;
        }
        let parts = self.by_chunk(&range);
        // Chunks that become empty go as a whole. The pages of the others go first, because that can fail.
        let stays = |(index, blocks): &&(usize, Range<usize>)| {
            self.chunks.get(*index).is_some_and(|chunk| chunk.plugged > blocks.len() as u64)
        };
        if let Some(error) = parts.iter().filter(stays).find_map(|(_, blocks)| self.discard(blocks).err()) {
            tracing::warn!(%error, addr, count, "the host does not take unplugged memory back");
            return Answer::Busy;
        }
        for (index, blocks) in parts.iter().cloned() {
            if let Some(chunk) = self.chunks.get_mut(index) {
                chunk.plugged = chunk.plugged.saturating_sub(blocks.len() as u64);
            }
            self.mark(blocks, false);
        }
        self.drop_empty(&parts);
        Answer::Ack
    }

    /// An UNPLUG ALL request (5.15.6.5). The usable region shrinks to what the host asks for now.
    pub(super) fn unplug_all(&mut self) {
        self.plugged.fill(false);
        for chunk in &mut self.chunks {
            *chunk = Chunk { memory: None, plugged: 0 };
        }
        self.sizes.plugged = 0;
        self.sizes.usable = self.usable_for(self.sizes.requested);
    }

    /// Everything, to be saved.
    pub(super) fn state_of_all(&self) -> MemState {
        let bits =
            |blocks: &[bool]| blocks.iter().rev().fold(0_u8, |bits, plugged| bits << 1 | u8::from(*plugged));
        let Sizes { block, base, region, usable, requested, .. } = self.sizes;
        let plugged = self.plugged.chunks(8).map(bits).collect();
        MemState { base, region, block, chunk: self.chunk_size, usable, requested, plugged }
    }

    /// Becomes what was saved: all of it or nothing. No block is plugged before.
    pub(super) fn restore(&mut self, state: &MemState) -> std::result::Result<(), Misfit> {
        let plugged = self.check(state)?;
        let blocks = 0..plugged.len();
        let mut parts = Vec::new();
        for (index, blocks) in self.by_chunk(&blocks) {
            let count = plugged.get(blocks).unwrap_or_default().iter().filter(|plugged| **plugged).count();
            if count > 0 {
                parts.push((index, 0..count));
            }
        }
        if let Err(error) = self.add_chunks(&parts) {
            self.drop_empty(&parts);
            return Err(Misfit::Host(error));
        }
        for (index, blocks) in parts {
            if let Some(chunk) = self.chunks.get_mut(index) {
                chunk.plugged = blocks.len() as u64;
            }
            self.sizes.plugged += blocks.len() as u64 * self.sizes.block;
        }
        self.plugged = plugged;
        (self.sizes.usable, self.sizes.requested) = (state.usable, state.requested);
        Ok(())
    }

    /// Whether each block is plugged in `state`, if that can be of this device.
    fn check(&self, state: &MemState) -> std::result::Result<Vec<bool>, Misfit> {
        let Sizes { block, base, region, .. } = self.sizes;
        let len = self.plugged.len();
        let in_region = |bytes: u64| bytes <= region && bytes.is_multiple_of(block);
        let checks = [
            (state.region == region, "its region has another size than", state.region),
            (state.block == block, "its blocks have another size than", state.block),
            (state.base == base, "its region is elsewhere than at", state.base),
            (state.chunk == self.chunk_size, "it keeps memory in other pieces than of", state.chunk),
            (in_region(state.usable), "size of the usable region", state.usable),
            (in_region(state.requested), "requested size", state.requested),
            (state.plugged.len() == len.div_ceil(8), "length of the bitmap", state.plugged.len() as u64),
        ];
        if let Some((_, what, value)) = checks.into_iter().find(|(holds, ..)| !holds) {
            return Err(Misfit::State(what, value));
        }
        let bits = |byte: &u8| {
            let byte = *byte;
            (0..8).map(move |bit| byte >> bit & 1 != 0)
        };
        let mut plugged: Vec<bool> = state.plugged.iter().flat_map(bits).collect();
        // What is beyond the region or the usable part of it is not plugged.
        let usable = usize::try_from(state.usable / block).unwrap_or(usize::MAX);
        if plugged.iter().skip(usable).any(|plugged| *plugged) {
            return Err(Misfit::State("a block is plugged beyond the usable region of", state.usable));
        }
        plugged.truncate(len);
        Ok(plugged)
    }

    fn mark(&mut self, blocks: Range<usize>, plugged: bool) {
        let bytes = blocks.len() as u64 * self.sizes.block;
        let total = self.sizes.plugged;
        self.sizes.plugged = if plugged { total + bytes } else { total.saturating_sub(bytes) };
        self.plugged.get_mut(blocks).unwrap_or_default().fill(plugged);
    }

    /// Splits blocks by the chunk they are in.
    fn by_chunk(&self, range: &Range<usize>) -> Vec<(usize, Range<usize>)> {
        let per_chunk = usize::try_from(self.chunk_size / self.sizes.block).unwrap_or(usize::MAX);
        let mut parts = Vec::new();
        let mut from = range.start;
        while from < range.end {
            let index = from / per_chunk;
            let to = index.saturating_add(1).saturating_mul(per_chunk).min(range.end);
            parts.push((index, from..to));
            from = to;
        }
        parts
    }

    fn add_chunks(&mut self, parts: &[(usize, Range<usize>)]) -> io::Result<()> {
        let source = self.source.as_ref().ok_or_else(|| io::Error::other("the device is in no machine"))?;
        for (index, _) in parts {
            let Some(chunk) = self.chunks.get_mut(*index).filter(|chunk| chunk.memory.is_none()) else {
                continue;
            };
            // The index is below the number of chunks, so these are within the region.
            let offset = *index as u64 * self.chunk_size;
            let len = self.chunk_size.min(self.sizes.region - offset);
            chunk.memory = Some(source.add(self.sizes.base + offset, len)?);
        }
        Ok(())
    }

    fn drop_empty(&mut self, parts: &[(usize, Range<usize>)]) {
        for (index, _) in parts {
            if let Some(chunk) = self.chunks.get_mut(*index).filter(|chunk| chunk.plugged == 0) {
                chunk.memory = None;
            }
        }
    }

    fn discard(&self, blocks: &Range<usize>) -> io::Result<()> {
        let Some(source) = &self.source else { return Ok(()) };
        let (first, count) = (blocks.start as u64, blocks.len() as u64);
        source.discard(self.sizes.base + first * self.sizes.block, count * self.sizes.block)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use super::*;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 2 * MIB;
    const CHUNK: u64 = 8 * MIB;
    const BASE: u64 = 1 << 32;
    const REGION: u64 = 1 << 30;

    /// Writes down what is asked of the host, and refuses on request.
    #[derive(Default, Clone)]
    struct Host {
        chunks: Rc<RefCell<Vec<(u64, u64)>>>,
        discarded: Rc<RefCell<Vec<(u64, u64)>>>,
        /// Chunks that it still gives.
        left: Rc<Cell<Option<u32>>>,
        refuses_discard: Rc<Cell<bool>>,
    }

    struct Given(Host, u64);

    impl Drop for Given {
        fn drop(&mut self) {
            self.0.chunks.borrow_mut().retain(|(gpa, _)| *gpa != self.1);
        }
    }

    impl ChunkSource for Host {
        type Chunk = Given;

        fn add(&self, gpa: u64, len: u64) -> io::Result<Given> {
            if let Some(left) = self.left.get() {
                let left = left.checked_sub(1).ok_or_else(|| io::Error::other("no more"))?;
                self.left.set(Some(left));
            }
            self.chunks.borrow_mut().push((gpa - BASE, len));
            Ok(Given(self.clone(), gpa - BASE))
        }

        fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
            if self.refuses_discard.get() {
                return Err(io::Error::other("refused"));
            }
            self.discarded.borrow_mut().push((gpa - BASE, len));
            Ok(())
        }
    }

    fn blocks(requested: u64) -> (Blocks<Host>, Host) {
        let host = Host::default();
        let mut blocks = Blocks::new(REGION, BLOCK, CHUNK);
        blocks.attach(BASE, 256 * MIB, host.clone());
        blocks.request(requested).unwrap();
        (blocks, host)
    }

    #[test]
    fn the_first_block_brings_its_chunk_and_the_last_takes_it_away() {
        let (mut blocks, host) = blocks(32 * MIB);
        assert_eq!(blocks.plug(BASE + BLOCK, 1), Answer::Ack);
        assert_eq!(blocks.plug(BASE + 2 * BLOCK, 1), Answer::Ack);
        assert_eq!(*host.chunks.borrow(), [(0, CHUNK)]);
        assert_eq!(blocks.unplug(BASE + BLOCK, 1), Answer::Ack);
        assert_eq!(*host.discarded.borrow(), [(BLOCK, BLOCK)]);
        assert_eq!(blocks.unplug(BASE + 2 * BLOCK, 1), Answer::Ack);
        assert_eq!(*host.chunks.borrow(), []);
        assert_eq!(host.discarded.borrow().len(), 1, "the chunk went as a whole");
        assert_eq!(blocks.sizes().plugged, 0);
    }

    #[test]
    fn a_request_can_span_chunks() {
        let (mut blocks, host) = blocks(32 * MIB);
        assert_eq!(blocks.plug(BASE + 3 * BLOCK, 6), Answer::Ack);
        assert_eq!(*host.chunks.borrow(), [(0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, CHUNK)]);
        assert_eq!(blocks.sizes().plugged, 6 * BLOCK);
        assert_eq!(blocks.unplug(BASE + 4 * BLOCK, 4), Answer::Ack);
        assert_eq!(*host.chunks.borrow(), [(0, CHUNK), (2 * CHUNK, CHUNK)]);
    }

    #[test]
    fn the_last_chunk_ends_with_the_region() {
        let host = Host::default();
        let mut blocks = Blocks::new(5 * BLOCK, BLOCK, CHUNK);
        blocks.attach(BASE, 256 * MIB, host.clone());
        blocks.request(5 * BLOCK).unwrap();
        assert_eq!(blocks.plug(BASE, 5), Answer::Ack);
        assert_eq!(*host.chunks.borrow(), [(0, CHUNK), (CHUNK, BLOCK)]);
    }

    #[test]
    fn what_is_misaligned_empty_or_outside_is_an_error() {
        let (mut blocks, host) = blocks(32 * MIB);
        let usable = blocks.sizes().usable;
        for (addr, count) in [
            (BASE + 1, 1),
            (BASE + MIB, 1),
            (BASE, 0),
            (BASE - BLOCK, 1),
            (0, 1),
            (BASE + usable, 1),
            (BASE + usable - BLOCK, 2),
            (BASE, u16::MAX),
            (!(BLOCK - 1), 1),
            (u64::MAX, u16::MAX),
        ] {
            assert_eq!(blocks.plug(addr, count), Answer::Error, "plug {addr:#x} {count}");
            assert_eq!(blocks.unplug(addr, count), Answer::Error, "unplug {addr:#x} {count}");
            assert_eq!(blocks.state(addr, count), None, "state {addr:#x} {count}");
        }
        assert_eq!((blocks.sizes().plugged, host.chunks.borrow().len()), (0, 0));
    }

    #[test]
    fn plugged_blocks_cannot_be_plugged_nor_unplugged_ones_unplugged() {
        let (mut blocks, _) = blocks(32 * MIB);
        assert_eq!(blocks.plug(BASE + BLOCK, 2), Answer::Ack);
        assert_eq!(blocks.plug(BASE, 2), Answer::Error);
        assert_eq!(blocks.unplug(BASE, 2), Answer::Error);
        assert_eq!(blocks.unplug(BASE + BLOCK, 3), Answer::Error);
        assert_eq!(blocks.sizes().plugged, 2 * BLOCK);
    }

    #[test]
    fn more_than_requested_is_not_given() {
        let (mut blocks, host) = blocks(3 * BLOCK);
        assert_eq!(blocks.plug(BASE, 4), Answer::Nack);
        assert_eq!(host.chunks.borrow().len(), 0);
        assert_eq!(blocks.plug(BASE, 3), Answer::Ack);
        assert_eq!(blocks.plug(BASE + 8 * BLOCK, 1), Answer::Nack);
        blocks.request(0).unwrap();
        assert_eq!(blocks.plug(BASE + 8 * BLOCK, 1), Answer::Nack);
        assert_eq!(blocks.sizes().plugged, 3 * BLOCK, "what is plugged stays until the driver unplugs it");
    }

    #[test]
    fn when_the_host_has_no_memory_nothing_is_plugged() {
        let (mut blocks, host) = blocks(32 * MIB);
        host.left.set(Some(1));
        assert_eq!(blocks.plug(BASE + 3 * BLOCK, 2), Answer::Busy);
        assert_eq!((blocks.sizes().plugged, host.chunks.borrow().len()), (0, 0));
        host.left.set(None);
        assert_eq!(blocks.plug(BASE + 3 * BLOCK, 2), Answer::Ack);
    }

    #[test]
    fn when_the_host_does_not_take_pages_back_the_blocks_stay_plugged() {
        let (mut blocks, host) = blocks(32 * MIB);
        assert_eq!(blocks.plug(BASE, 2), Answer::Ack);
        host.refuses_discard.set(true);
        assert_eq!(blocks.unplug(BASE, 1), Answer::Busy);
        assert_eq!(blocks.state(BASE, 2), Some(State::Plugged));
    }

    #[test]
    fn the_state_of_blocks_is_plugged_unplugged_or_mixed() {
        let (mut blocks, _) = blocks(32 * MIB);
        blocks.plug(BASE + BLOCK, 2);
        assert_eq!(blocks.state(BASE, 1), Some(State::Unplugged));
        assert_eq!(blocks.state(BASE + BLOCK, 2), Some(State::Plugged));
        assert_eq!(blocks.state(BASE, 2), Some(State::Mixed));
    }

    #[test]
    fn the_usable_region_grows_with_requests_and_shrinks_only_when_all_is_unplugged() {
        let (mut blocks, host) = blocks(0);
        assert_eq!(blocks.sizes().usable, 0);
        blocks.request(128 * MIB).unwrap();
        assert_eq!(blocks.sizes().usable, 384 * MIB);
        blocks.request(1 << 30).unwrap();
        assert_eq!(blocks.sizes().usable, REGION, "never beyond the region");
        blocks.request(BLOCK).unwrap();
        assert_eq!(blocks.sizes().usable, REGION);
        blocks.plug(BASE, 1);
        blocks.unplug_all();
        assert_eq!((blocks.sizes().usable, blocks.sizes().plugged), (258 * MIB, 0));
        assert_eq!(host.chunks.borrow().len(), 0);
    }

    #[test]
    fn what_cannot_be_requested_is_refused_and_changes_nothing() {
        let (mut blocks, _) = blocks(BLOCK);
        for bytes in [1, BLOCK + 1, REGION + BLOCK, u64::MAX] {
            blocks.request(bytes).unwrap_err();
        }
        assert_eq!(blocks.sizes().requested, BLOCK);
    }

    #[test]
    fn a_restored_device_has_the_blocks_of_the_saved_one_in_the_same_chunks() {
        let (mut saved, host) = blocks(64 * MIB);
        for (block, count) in [(0, 3), (5, 1), (11, 9), (30, 1)] {
            assert_eq!(saved.plug(BASE + block * BLOCK, count), Answer::Ack);
        }
        assert_eq!(saved.unplug(BASE + BLOCK, 1), Answer::Ack);
        saved.request(16 * MIB).unwrap();
        let (mut restored, new_host) = blocks(0);
        restored.restore(&saved.state_of_all()).unwrap();
        assert_eq!(restored.state_of_all(), saved.state_of_all());
        assert_eq!(restored.sizes(), saved.sizes());
        assert_eq!(*new_host.chunks.borrow(), *host.chunks.borrow());
        assert_eq!(restored.state(BASE, 3), Some(State::Mixed));
        for (block, count) in [(0, 1), (2, 1), (5, 1), (11, 9), (30, 1)] {
            assert_eq!(restored.unplug(BASE + block * BLOCK, count), Answer::Ack, "{block}");
        }
        assert_eq!((restored.sizes().plugged, new_host.chunks.borrow().len()), (0, 0));
    }

    #[test]
    fn a_host_without_memory_restores_nothing() {
        let (mut saved, _) = blocks(64 * MIB);
        assert_eq!(saved.plug(BASE + 3 * BLOCK, 2), Answer::Ack);
        let (mut restored, host) = blocks(0);
        host.left.set(Some(1));
        assert!(matches!(restored.restore(&saved.state_of_all()), Err(Misfit::Host(_))));
        assert_eq!((restored.sizes().plugged, host.chunks.borrow().len()), (0, 0));
    }

    #[test]
    fn a_state_of_another_device_or_of_none_is_refused() {
        let (mut saved, _) = blocks(64 * MIB);
        saved.plug(BASE, 2);
        let state = saved.state_of_all();
        let bad: [fn(&mut MemState); 10] = [
            |state| state.region += BLOCK,
            |state| state.block *= 2,
            |state| state.base += CHUNK,
            |state| state.chunk *= 2,
            |state| state.usable = REGION + BLOCK,
            |state| state.usable += 1,
            |state| state.usable = BLOCK,
            |state| state.requested = u64::MAX,
            |state| state.plugged.push(0),
            |state| *state.plugged.last_mut().unwrap() = 0x80,
        ];
        for (index, change) in bad.iter().enumerate() {
            let mut state = state.clone();
            change(&mut state);
            let (mut restored, host) = blocks(0);
            assert!(matches!(restored.restore(&state), Err(Misfit::State(..))), "{index}");
            assert_eq!((restored.sizes().plugged, host.chunks.borrow().len()), (0, 0));
        }
    }
}
