//! [`PageServer`]: answers page faults from a memory image.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::abi::{self, EVENT_LEN, Event};
use super::{Uffd, UffdRegion, failed, receive_handshake};
use crate::image::{Extent, ImageLayout};
use crate::layout::PAGE_SIZE;
use crate::pages::{PAGE, Span, push};
use crate::{Error, Result};

/// Most regions a monitor may name.
const MAX_REGIONS: usize = 1 << 10;
/// Bytes fetched in advance between two looks at the faults.
const STEP: u64 = 256 << 10;
/// Events read by one system call.
const EVENTS: usize = 64;

/// What a [`PageServer`] has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerStats {
    /// Faults answered.
    pub faults: u64,
    /// Pages filled in from the image, because of a fault or in advance.
    pub copied: u64,
    /// Pages filled with zeros: they are zeros in the image, or were given back.
    pub zeroed: u64,
    /// Pages that the guest gave back.
    pub removed: u64,
    /// Faults at addresses that no region has, and events that were not asked for.
    pub strange: u64,
}

/// Fills the memory of a guest, in this process or in another, from an image: each page when the guest first touches it, and
/// pages that are known to be needed in advance.
///
/// It owns no thread. [`run`](Self::run) is a loop for one; [`step`](Self::step) is for an event loop.
#[derive(Debug)]
pub struct PageServer {
    uffd: Uffd,
    image: File,
    /// By rising offset.
    regions: Vec<UffdRegion>,
    /// Pages of the image, by number, that the guest gave back: they are zeros from then on.
    removed: Bitmap,
    /// Pages that somebody has waited for, and in which order.
    seen: Bitmap,
    order: Vec<u64>,
    /// Addresses that could not be filled in because an event has to be read first.
    waiting: VecDeque<u64>,
    ahead: VecDeque<Span>,
    stats: ServerStats,
    buffer: Vec<u8>,
}

impl PageServer {
    /// Serves the faults of `uffd` in `regions` from `image`.
    ///
    /// # Errors
    /// - [`Error::Handshake`]: the regions overlap, wrap, are not whole pages of 4096 bytes, or are too many or too large.
    /// - [`Error::ImageSize`]: the image does not have them; [`Error::Image`]: its length is not known.
    pub fn new(uffd: Uffd, mut regions: Vec<UffdRegion>, image: File) -> Result<Self> {
        let measure = |source| Error::Image { doing: "measure", offset: 0, source };
        let found = image.metadata().map_err(measure)?.len();
        let expected = check(&mut regions)?;
        if found < expected {
            return Err(Error::ImageSize { expected, found });
        }
        let pages = expected / PAGE_SIZE;
        Ok(Self {
            uffd,
            image,
            regions,
            removed: Bitmap::new(pages),
            seen: Bitmap::new(pages),
            order: Vec::new(),
            waiting: VecDeque::new(),
            ahead: VecDeque::new(),
            stats: ServerStats::default(),
            buffer: Vec::new(),
        })
    }

    /// Receives the handshake of a monitor, and serves it.
    ///
    /// # Errors
    /// As [`receive_handshake`] and [`new`](Self::new).
    pub fn receive(socket: &UnixStream, image: File) -> Result<Self> {
        let (uffd, regions) = receive_handshake(socket)?;
        Self::new(uffd, regions, image)
    }

    /// Has these pages filled in before they are asked for, in this order, while no fault waits. They may come from anywhere:
    /// what is not in a region is passed over.
    pub fn prefetch(&mut self, extents: impl IntoIterator<Item = Extent>) {
        for extent in extents {
            let start = extent.offset - extent.offset % PAGE_SIZE;
            let end = extent.offset.saturating_add(extent.len);
            let mut at = start;
            for region in &self.regions {
                let within = Span { start: region.offset, end: region.offset + region.size };
                if let Some(part) = (Span { start: at, end }).clip(within) {
                    self.ahead.push_back(part);
                    at = part.end;
                }
            }
        }
    }

    /// Has all of the image filled in, so that the guest needs no server some time.
    pub fn prefetch_all(&mut self) {
        self.ahead.extend(
            self.regions.iter().map(|region| Span { start: region.offset, end: region.offset + region.size }),
        );
    }

    /// Whether there is nothing left to be fetched in advance.
    pub fn is_idle(&self) -> bool {
        self.ahead.is_empty() && self.waiting.is_empty()
    }

    /// The pages that somebody waited for, in the order of their first faults: what a later
    /// [`prefetch`](Self::prefetch) of the same image wants. Neighbours that came one after the other are joined.
    pub fn working_set(&self) -> Vec<Extent> {
        let mut spans = Vec::new();
        for page in &self.order {
            push(&mut spans, Span { start: page * PAGE_SIZE, end: (page + 1) * PAGE_SIZE });
        }
        spans.iter().map(|span| Extent { offset: span.start, len: span.end - span.start }).collect()
    }

    /// What was done so far.
    pub fn stats(&self) -> ServerStats {
        self.stats
    }

    /// The descriptor to wait for, readable when there is something to do.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Serves until `stop` is readable or closed at its other end (the socket of the handshake, so that this ends with the
    /// monitor), or until the guest's process is gone.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> Result<()> {
        loop {
            if !self.step()? {
                return Ok(());
            }
            let timeout = if !self.waiting.is_empty() {
                // The thread that gives pages back is about to get on; nothing tells when it has.
                Some(Duration::from_micros(100))
            } else if !self.ahead.is_empty() {
                Some(Duration::ZERO)
            } else {
                None
            };
            let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
            let mut fds =
                [PollFd::new(&self.uffd, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(failed("wait for page faults")(errno.into())),
            }
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
        }
    }

    /// Answers what is waiting, without waiting itself, and then fetches one part of what is wanted in advance. `false` if the
    /// guest's process is gone.
    ///
    /// # Errors
    /// - [`Error::Image`]: the image cannot be read. The guest's thread waits on.
    /// - [`Error::Uffd`]: the kernel refuses to fill a page in.
    pub fn step(&mut self) -> Result<bool> {
        self.read_events()?;
        for _ in 0..self.waiting.len() {
            let Some(address) = self.waiting.pop_front() else { break };
            match self.serve(address)? {
                Filled::Done => {}
                Filled::Later => self.waiting.push_back(address),
                Filled::Gone => return Ok(false),
            }
        }
        if self.waiting.is_empty() { self.fetch_ahead() } else { Ok(true) }
    }

    /// Reads a bounded number of events: removals first take effect, then faults are answered.
    fn read_events(&mut self) -> Result<()> {
        let mut bytes = [0u8; EVENTS * EVENT_LEN];
        let got = match rustix::io::read(&self.uffd, &mut bytes) {
            // Something else than it was said to be.
            Ok(0) => return Err(failed("read page faults")(io::ErrorKind::UnexpectedEof.into())),
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(failed("read page faults")(errno.into())),
        };
        let (events, _) = bytes.get(..got).unwrap_or_default().as_chunks::<EVENT_LEN>();
        for event in events {
            match Event::parse(event) {
                Event::Fault { address } => self.waiting.push_back(address),
                Event::Remove { start, end } => self.remove(start, end),
                Event::Other => self.stats.strange += 1,
            }
        }
        Ok(())
    }

    /// Notes that pages are zeros from now on.
    fn remove(&mut self, start: u64, end: u64) {
        let gone = Span { start, end };
        for region in &self.regions {
            let base = region.base_host_virt_addr;
            let Some(part) = gone.clip(Span { start: base, end: base + region.size }) else { continue };
            let first = (part.start - base + region.offset) / PAGE_SIZE;
            let last = (part.end - base + region.offset).div_ceil(PAGE_SIZE);
            for page in first..last {
                self.removed.set(page);
            }
            self.stats.removed += last - first;
        }
    }

    /// Answers the fault at a host address.
    fn serve(&mut self, address: u64) -> Result<Filled> {
        let Some(offset) = self.regions.iter().find_map(|region| region.offset_of(address)) else {
            self.stats.strange += 1;
            return Ok(Filled::Done);
        };
        let filled = self.fill(offset, PAGE_SIZE)?;
        if filled == Filled::Done {
            self.stats.faults += 1;
            if self.seen.set(offset / PAGE_SIZE) {
                self.order.push(offset / PAGE_SIZE);
            }
        }
        Ok(filled)
    }

    fn fetch_ahead(&mut self) -> Result<bool> {
        let Some(span) = self.ahead.pop_front() else { return Ok(true) };
        let len = STEP.min(span.end - span.start);
        let rest = Span { start: span.start + len, end: span.end };
        match self.fill(span.start, len)? {
            Filled::Gone => return Ok(false),
            Filled::Later => self.ahead.push_front(span),
            Filled::Done if rest.start < rest.end => self.ahead.push_front(rest),
            Filled::Done => {}
        }
        Ok(true)
    }

    /// Fills in pages of the image, within one region.
    fn fill(&mut self, offset: u64, len: u64) -> Result<Filled> {
        let Some(address) = self.regions.iter().find_map(|region| region.address_of(offset)) else {
            return Ok(Filled::Done);
        };
        self.buffer.resize(usize::try_from(len).unwrap_or(PAGE), 0);
        let read = self.image.read_exact_at(&mut self.buffer, offset);
        read.map_err(|source| Error::Image { doing: "read", offset, source })?;
        let first = offset / PAGE_SIZE;
        let (pages, _) = self.buffer.as_chunks::<PAGE>();
        let mut at = 0;
        while at < pages.len() {
            let empty = |index: usize| {
                self.removed.get(first + index as u64)
                    || pages.get(index).is_none_or(|page| *page == [0; PAGE])
            };
            let zero = empty(at);
            let run = (at..pages.len()).take_while(|index| empty(*index) == zero).count();
            let to = address + (at * PAGE) as u64;
            let result = if zero {
                abi::zero(self.uffd.as_fd(), to, (run * PAGE) as u64)
            } else {
                let bytes = self.buffer.get(at * PAGE..(at + run) * PAGE).unwrap_or_default();
                abi::copy(self.uffd.as_fd(), to, bytes)
            };
            match outcome(result)? {
                Outcome::Filled(bytes) => {
                    let done = bytes / PAGE_SIZE;
                    *(if zero { &mut self.stats.zeroed } else { &mut self.stats.copied }) += done;
                    at += usize::try_from(done).unwrap_or(run).max(1);
                }
                Outcome::There => {
                    // Filled in since, for another thread or in advance: whoever still waits looks again.
                    abi::wake(self.uffd.as_fd(), to, PAGE_SIZE).map_err(failed("wake a thread"))?;
                    at += 1;
                }
                Outcome::Unmapped => at += run,
                Outcome::Later => return Ok(Filled::Later),
                Outcome::Gone => return Ok(Filled::Gone),
            }
        }
        Ok(Filled::Done)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filled {
    Done,
    /// An event has to be read first.
    Later,
    /// The guest's process is gone.
    Gone,
}

enum Outcome {
    Filled(u64),
    There,
    Unmapped,
    Later,
    Gone,
}

/// What the kernel says to pages that are filled in.
fn outcome(result: io::Result<u64>) -> Result<Outcome> {
    let error = match result {
        Ok(bytes) => return Ok(Outcome::Filled(bytes)),
        Err(error) => error,
    };
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(Outcome::There),
        Some(libc::EAGAIN) => Ok(Outcome::Later),
        // Unmapped, by a guest that is being torn down.
        Some(libc::ENOENT) => Ok(Outcome::Unmapped),
        Some(libc::ESRCH) => Ok(Outcome::Gone),
        _ => Err(failed("fill a page in")(error)),
    }
}

/// Checks what a monitor said, sorts it, and returns how long the image must be.
fn check(regions: &mut [UffdRegion]) -> Result<u64> {
    let refuse = |reason: &str| Err(Error::Handshake { reason: reason.into() });
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return refuse("there must be one region at least, and 1024 at most");
    }
    for region in &*regions {
        if region.page() != PAGE_SIZE {
            return refuse("only pages of 4096 bytes are served");
        }
        let numbers = [region.base_host_virt_addr, region.size, region.offset];
        if region.size == 0 || numbers.iter().any(|number| !number.is_multiple_of(PAGE_SIZE)) {
            return refuse("a region is not whole pages");
        }
        if region.base_host_virt_addr.checked_add(region.size).is_none() {
            return refuse("a region goes beyond the address space");
        }
        if region.offset.checked_add(region.size).is_none_or(|end| end > ImageLayout::MAX_SIZE) {
            return refuse("a region goes beyond the largest image");
        }
    }
    let overlap = |regions: &[UffdRegion], start: fn(&UffdRegion) -> u64| {
        regions.windows(2).any(|pair| matches!(pair, [a, b] if start(a) + a.size > start(b)))
    };
    regions.sort_by_key(|region| region.base_host_virt_addr);
    if overlap(regions, |region| region.base_host_virt_addr) {
        return refuse("regions overlap in memory");
    }
    regions.sort_by_key(|region| region.offset);
    if overlap(regions, |region| region.offset) {
        return refuse("regions overlap in the image");
    }
    Ok(regions.last().map_or(0, |region| region.offset + region.size))
}

/// One bit for each page of the image.
#[derive(Debug)]
struct Bitmap(Vec<u64>);

impl Bitmap {
    fn new(pages: u64) -> Self {
        // Zeros of this kind cost nothing before they are touched.
        Self(vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(0)])
    }

    fn get(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|index| self.0.get(index));
        word.is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Whether it is new.
    fn set(&mut self, page: u64) -> bool {
        let Some(word) = usize::try_from(page / 64).ok().and_then(|index| self.0.get_mut(index)) else {
            return false;
        };
        let bit = 1 << (page % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(base: u64, size: u64, offset: u64) -> UffdRegion {
        UffdRegion::new(base, size, offset, PAGE_SIZE)
    }

    #[test]
    fn regions_that_make_sense_are_taken_in_any_order() {
        let mut regions = [region(0x10_0000, 0x2000, 0x4000), region(0x20_0000, 0x4000, 0)];
        assert_eq!(check(&mut regions).unwrap(), 0x6000);
        assert_eq!(regions[0].offset, 0);
    }

    #[test]
    fn regions_that_make_no_sense_are_refused() {
        let page = |page_size| UffdRegion::new(0x1000, 0x1000, 0, page_size);
        for mut regions in [
            vec![],
            vec![region(0x1000, 0x1000, 0); MAX_REGIONS + 1],
            vec![region(0x1000, 0, 0)],
            vec![region(0x1001, 0x1000, 0)],
            vec![region(0x1000, 0x1001, 0)],
            vec![region(0x1000, 0x1000, 1)],
            vec![region(!0xFFF, 0x1000, 0)],
            vec![region(0, 0x1000, !0xFFF)],
            vec![region(0, 0x1000, ImageLayout::MAX_SIZE)],
            vec![page(0)],
            vec![page(2 << 20)],
            vec![region(0x1000, 0x2000, 0), region(0x2000, 0x2000, 0x10_0000)],
            vec![region(0x1000, 0x2000, 0), region(0x10_0000, 0x2000, 0x1000)],
        ] {
            let error = check(&mut regions).unwrap_err();
            assert!(matches!(error, Error::Handshake { .. }), "{error:?}");
        }
    }

    #[test]
    fn an_event_is_read_as_the_kernel_lays_it_out() {
        let mut bytes = [0; EVENT_LEN];
        bytes[0] = 0x12;
        bytes[16..24].copy_from_slice(&0x7000u64.to_ne_bytes());
        assert_eq!(Event::parse(&bytes), Event::Fault { address: 0x7000 });
        bytes[0] = 0x15;
        bytes[8..16].copy_from_slice(&0x5000u64.to_ne_bytes());
        assert_eq!(Event::parse(&bytes), Event::Remove { start: 0x5000, end: 0x7000 });
        bytes[0] = 0x13;
        assert_eq!(Event::parse(&bytes), Event::Other);
    }
}
