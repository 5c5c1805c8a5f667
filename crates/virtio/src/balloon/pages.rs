//! The queues in which the driver names pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use freestone_memory::{GuestMem, MemorySlice};

use super::PAGE_SIZE;
use super::handle::{HintRun, Shared};
use crate::Result;
use crate::queue::ChainBuffers;
use crate::worker::RequestHandler;

/// Pages of one request that are looked at: 4 MiB. Drivers send 256 to 1024. More is legal, and since the pages are the guest's
/// loss and the host's gain, the rest may as well stay where it is.
const MAX_PAGES: usize = 1024;
/// Bytes of page numbers that are copied at once.
const CHUNK: usize = 1024;
/// Bytes of a page number.
const NUMBER: usize = 4;

/// Takes the page numbers out of a request, at most [`MAX_PAGES`].
fn page_numbers(buffers: &mut ChainBuffers<'_>, numbers: &mut Vec<u32>) -> Result<()> {
    numbers.clear();
    let mut chunk = [0; CHUNK];
    while numbers.len() < MAX_PAGES {
        let left = buffers.readable_len() as usize;
        let len = (left - left % NUMBER).min(CHUNK);
        let Some(bytes) = chunk.get_mut(..len).filter(|bytes| !bytes.is_empty()) else { break };
        buffers.read(bytes)?;
        let (whole, _) = bytes.as_chunks::<NUMBER>();
        numbers.extend(whole.iter().map(|number| u32::from_le_bytes(*number)));
    }
    Ok(())
}

/// Runs of adjacent pages, first page and count, of `numbers`, which is sorted. A page that is named twice counts once.
fn runs(numbers: &mut Vec<u32>) -> impl Iterator<Item = (u32, u64)> {
    numbers.sort_unstable();
    numbers.dedup();
    numbers
        .chunk_by(|a, b| a.checked_add(1) == Some(*b))
        .filter_map(|run| Some((*run.first()?, run.len() as u64)))
}

/// The driver gives pages to the host.
pub(super) struct Inflate {
    mem: GuestMem,
    shared: Arc<Shared>,
    numbers: Vec<u32>,
}

impl Inflate {
    pub(super) fn new(mem: GuestMem, shared: Arc<Shared>) -> Self {
        Self { mem, shared, numbers: Vec::new() }
    }
}

impl RequestHandler for Inflate {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        page_numbers(buffers, &mut self.numbers)?;
        let counters = &self.shared.counters;
        for (first, pages) in runs(&mut self.numbers) {
            // A 32-bit page number and 1024 pages are far from 2^64.
            let len = pages * PAGE_SIZE;
            let done = self.mem.discard(u64::from(first) * PAGE_SIZE, len);
            let done = self.shared.count(&counters.inflated, done);
            counters.ignored.fetch_add(len.saturating_sub(done), Ordering::Relaxed);
        }
        Ok(0)
    }
}

/// The driver takes pages back. They are there again as soon as they are touched.
pub(super) struct Deflate {
    shared: Arc<Shared>,
}

impl Deflate {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

impl RequestHandler for Deflate {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        let pages = u64::from(buffers.readable_len()) / NUMBER as u64;
        self.shared.counters.deflated.fetch_add(pages * PAGE_SIZE, Ordering::Relaxed);
        Ok(0)
    }
}

/// Gives back what lies in `buffers`.
fn give_back(mem: &GuestMem, shared: &Shared, counter: &AtomicU64, buffers: &[MemorySlice<'_>]) {
    for buffer in buffers {
        shared.count(counter, mem.discard_slice(buffer));
    }
}

/// The driver reports free pages, and waits until they are given back before it uses them (5.5.6.7).
pub(super) struct Reports {
    mem: GuestMem,
    shared: Arc<Shared>,
    /// Whether `poison_val` is valid.
    poison: bool,
}

impl Reports {
    pub(super) fn new(mem: GuestMem, shared: Arc<Shared>, poison: bool) -> Self {
        Self { mem, shared, poison }
    }
}

impl RequestHandler for Reports {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        // A page that went back reads as zeros: if the driver counts on anything else, it must stay (5.5.6.7.2).
        if !self.poison || self.shared.poison.load(Ordering::Acquire) == 0 {
            give_back(&self.mem, &self.shared, &self.shared.counters.reported, buffers.writable());
        }
        Ok(0)
    }
}

/// The driver hints at free pages, on request (5.5.6.5): command IDs in device-readable buffers, pages in device-writable ones.
pub(super) struct Hints {
    mem: GuestMem,
    shared: Arc<Shared>,
}

impl Hints {
    pub(super) fn new(mem: GuestMem, shared: Arc<Shared>) -> Self {
        Self { mem, shared }
    }
}

impl RequestHandler for Hints {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        let mut id = [0; 4];
        if buffers.readable_len() as usize >= id.len() {
            buffers.read(&mut id)?;
            self.shared.hint_command(u32::from_le_bytes(id));
        }
        if !buffers.writable().is_empty() {
            // Kept locked, so that the host cannot end the run between the look and the deed.
            let hinting = self.shared.hinting();
            if hinting.run == HintRun::Running {
                give_back(&self.mem, &self.shared, &self.shared.counters.hinted, buffers.writable());
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs_of(numbers: &[u32]) -> Vec<(u32, u64)> {
        runs(&mut numbers.to_vec()).collect()
    }

    #[test]
    fn adjacent_pages_are_one_run_in_whatever_order_they_come() {
        assert_eq!(runs_of(&[9, 3, 1, 2, 8]), [(1, 3), (8, 2)]);
        assert_eq!(runs_of(&[]), []);
    }

    #[test]
    fn a_page_named_twice_counts_once() {
        assert_eq!(runs_of(&[5, 5, 6, 5]), [(5, 2)]);
    }

    #[test]
    fn the_last_page_number_ends_a_run() {
        assert_eq!(runs_of(&[u32::MAX, 0, u32::MAX - 1]), [(0, 1), (u32::MAX - 1, 2)]);
    }
}
