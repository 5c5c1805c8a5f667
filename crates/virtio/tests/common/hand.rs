//! A disk whose requests stay under way until the test releases them, one by one and in any order.
#![expect(clippy::indexing_slicing, reason = "tests")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};

use freestone_block::{Engine, Image, IoQueue, Limits, Op, Submitted, SyncQueue};
use freestone_bus::{EFD_NONBLOCK, EventFd};
use freestone_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemorySlice, MemoryView};

/// Guest addresses and lengths.
type Buffers = Vec<(u64, usize)>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    Read(u64, Buffers),
    Write(u64, Buffers),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
}

#[derive(Debug)]
struct Pending {
    queue: usize,
    tag: u64,
    asked: Asked,
    view: MemoryView,
    committed: bool,
}

#[derive(Debug, Default)]
struct State {
    data: Vec<u8>,
    under_way: VecDeque<Pending>,
    /// Queue, tag, outcome.
    completed: Vec<(usize, u64, io::Result<()>)>,
    /// What reached the data, in order.
    done: Vec<Asked>,
    commits: usize,
    /// Of the queues, which may be gone.
    events: Vec<Weak<EventFd>>,
}

#[derive(Debug)]
pub struct HandImage {
    state: Mutex<State>,
    changed: Condvar,
    pub limits: Limits,
    pub read_only: bool,
    /// Requests are carried out on the spot.
    pub sync: AtomicBool,
    /// An engine that is waited for completes the newest request by itself.
    pub completes_when_waited_for: AtomicBool,
    /// Requests that an engine has room for.
    pub room: AtomicUsize,
    /// Waiting fails.
    pub broken: AtomicBool,
    /// So many commits fail.
    pub failing_commits: AtomicUsize,
    pub waits: AtomicUsize,
}

impl HandImage {
    /// Sector `n` is full of the byte `n`.
    pub fn new(sectors: usize) -> Arc<Self> {
        Self::with(sectors, false, true)
    }

    pub fn with(sectors: usize, read_only: bool, ranges: bool) -> Arc<Self> {
        let data = (0..sectors * 512).map(|i| u8::try_from(i / 512 % 251).unwrap()).collect();
        let mut limits = Limits::default();
        (limits.discard, limits.write_zeroes) = (ranges, ranges);
        (limits.physical_block, limits.optimal_io) = (4096, 65536);
        Arc::new(Self {
            state: Mutex::new(State { data, ..State::default() }),
            changed: Condvar::new(),
            limits,
            read_only,
            sync: AtomicBool::new(false),
            completes_when_waited_for: AtomicBool::new(false),
            room: AtomicUsize::new(usize::MAX),
            broken: AtomicBool::new(false),
            failing_commits: AtomicUsize::new(0),
            waits: AtomicUsize::new(0),
        })
    }

    /// The same, with everything done on the spot.
    pub fn sync(sectors: usize) -> Arc<Self> {
        let image = Self::new(sectors);
        image.sync.store(true, Ordering::SeqCst);
        image
    }

    pub fn set_size(&self, sectors: usize) {
        self.state.lock().unwrap().data.resize(sectors * 512, 0xee);
    }

    pub fn sector(&self, sector: usize) -> Vec<u8> {
        self.state.lock().unwrap().data[sector * 512..][..512].to_vec()
    }

    /// What is under way and known to the engine, oldest first.
    pub fn under_way(&self) -> Vec<Asked> {
        let state = self.state.lock().unwrap();
        state.under_way.iter().filter(|p| p.committed).map(|p| p.asked.clone()).collect()
    }

    pub fn done(&self) -> Vec<Asked> {
        self.state.lock().unwrap().done.clone()
    }

    pub fn commits(&self) -> usize {
        self.state.lock().unwrap().commits
    }

    /// Carries out request `index` of those under way.
    pub fn release(&self, index: usize) {
        self.state.lock().unwrap().complete(index, None);
        self.changed.notify_all();
    }

    /// Lets request `index` fail.
    pub fn fail(&self, index: usize) {
        let error = io::Error::other("told to fail");
        self.state.lock().unwrap().complete(index, Some(error));
        self.changed.notify_all();
    }

    pub fn release_all(&self) {
        while !self.under_way().is_empty() {
            self.release(0);
        }
    }

    fn run(&self, asked: Asked, view: Option<&MemoryView>) -> io::Result<()> {
        self.state.lock().unwrap().run(asked, view)
    }
}

impl State {
    fn complete(&mut self, index: usize, error: Option<io::Error>) {
        let Pending { queue, tag, asked, view, committed } = self.under_way.remove(index).unwrap();
        assert!(committed, "nobody told the engine of it");
        let result = match error {
            Some(error) => Err(error),
            None => self.run(asked, Some(&view)),
        };
        self.completed.push((queue, tag, result));
        if let Some(event) = self.events[queue].upgrade() {
            event.write(1).unwrap();
        }
    }

    fn run(&mut self, asked: Asked, view: Option<&MemoryView>) -> io::Result<()> {
        self.done.push(asked.clone());
        let at = |offset: u64| usize::try_from(offset).unwrap();
        match asked {
            Asked::Flush | Asked::Discard(..) => {}
            Asked::WriteZeroes(offset, len, _) => self.data[at(offset)..][..at(len)].fill(0),
            Asked::Read(offset, buffers) => {
                let mut data = &self.data[at(offset)..];
                for (gpa, len) in buffers {
                    view.unwrap().write_slice(&data[..len], GuestAddress(gpa)).unwrap();
                    data = &data[len..];
                }
            }
            Asked::Write(offset, buffers) => {
                let mut data = &mut self.data[at(offset)..];
                for (gpa, len) in buffers {
                    view.unwrap().read_slice(&mut data[..len], GuestAddress(gpa)).unwrap();
                    data = &mut data[len..];
                }
            }
        }
        Ok(())
    }
}

impl Image for HandImage {
    fn size(&self) -> u64 {
        self.state.lock().unwrap().data.len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for buf in bufs {
            buf.copy_from(&state.data[at..at + buf.len()]);
            at += buf.len();
        }
        state.done.push(Asked::Read(offset, Vec::new()));
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for buf in bufs {
            buf.copy_to(&mut state.data[at..at + buf.len()]);
            at += buf.len();
        }
        state.done.push(Asked::Write(offset, Vec::new()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.run(Asked::Flush, None)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run(Asked::Discard(offset, len), None)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.run(Asked::WriteZeroes(offset, len, unmap), None)
    }

    fn open_queue(self: Arc<Self>, engine: Engine, _depth: u16) -> io::Result<Box<dyn IoQueue>> {
        if engine == Engine::Uring {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if self.sync.load(Ordering::SeqCst) {
            return Ok(Box::new(SyncQueue::new(self)));
        }
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let mut state = self.state.lock().unwrap();
        state.events.push(Arc::downgrade(&event));
        let index = state.events.len() - 1;
        drop(state);
        Ok(Box::new(HandQueue { image: self, index, event }))
    }
}

#[derive(Debug)]
struct HandQueue {
    image: Arc<HandImage>,
    index: usize,
    event: Arc<EventFd>,
}

fn addresses(view: &MemoryView, bufs: &[MemorySlice<'_>]) -> Buffers {
    let address = |buf: &MemorySlice<'_>| {
        let at = buf.ptr_guard().as_ptr().addr();
        let region = view.iter().find(|r| at.wrapping_sub(r.as_ptr().addr()) < r.size()).unwrap();
        (region.start_addr().0 + (at - region.as_ptr().addr()) as u64, buf.len())
    };
    bufs.iter().map(address).collect()
}

impl IoQueue for HandQueue {
    fn submit<'m>(&mut self, tag: u64, view: &'m MemoryView, op: Op<'_, 'm>) -> Submitted {
        if self.in_flight() >= self.image.room.load(Ordering::SeqCst) {
            return Submitted::Done(Err(io::ErrorKind::WouldBlock.into()));
        }
        let asked = match op {
            Op::Read { bufs, offset } => Asked::Read(offset, addresses(view, bufs)),
            Op::Write { bufs, offset } => Asked::Write(offset, addresses(view, bufs)),
            Op::Flush => Asked::Flush,
            Op::Discard { offset, len } => Asked::Discard(offset, len),
            Op::WriteZeroes { offset, len, unmap } => Asked::WriteZeroes(offset, len, unmap),
            _ => return Submitted::Done(Err(io::ErrorKind::Unsupported.into())),
        };
        let mut state = self.image.state.lock().unwrap();
        let queue = self.index;
        assert!(!state.under_way.iter().any(|p| p.queue == queue && p.tag == tag), "a tag used twice");
        state.under_way.push_back(Pending { queue, tag, asked, view: view.clone(), committed: false });
        Submitted::Pending
    }

    fn commit(&mut self) -> io::Result<()> {
        if self.image.failing_commits.load(Ordering::SeqCst) > 0 {
            self.image.failing_commits.fetch_sub(1, Ordering::SeqCst);
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let mut state = self.image.state.lock().unwrap();
        let fresh = state.under_way.iter_mut().filter(|p| p.queue == self.index && !p.committed);
        let fresh = fresh.map(|p| p.committed = true).count();
        state.commits += usize::from(fresh > 0);
        Ok(())
    }

    fn reap(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        let mut state = self.image.state.lock().unwrap();
        let (mine, others) = state.completed.drain(..).partition(|(queue, ..)| *queue == self.index);
        state.completed = others;
        drop(state);
        let mine: Vec<_> = mine;
        mine.into_iter().for_each(|(_, tag, result)| done(tag, result));
    }

    fn wait(&mut self) -> io::Result<()> {
        self.image.waits.fetch_add(1, Ordering::SeqCst);
        if self.image.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("told not to wait"));
        }
        let mut state = self.image.state.lock().unwrap();
        while !state.completed.iter().any(|(queue, ..)| *queue == self.index) {
            let Some(newest) = state.under_way.iter().rposition(|p| p.queue == self.index) else { break };
            if self.image.completes_when_waited_for.load(Ordering::SeqCst) {
                state.complete(newest, None);
            } else {
                state = self.image.changed.wait(state).unwrap();
            }
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        let state = self.image.state.lock().unwrap();
        let under_way = state.under_way.iter().filter(|p| p.queue == self.index).count();
        under_way + state.completed.iter().filter(|(queue, ..)| *queue == self.index).count()
    }

    fn completion_source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        Some(self.event.clone())
    }
}

impl Drop for HandQueue {
    /// As an engine must: what is under way ends before the queue does.
    fn drop(&mut self) {
        let mut state = self.image.state.lock().unwrap();
        while let Some(index) = state.under_way.iter().position(|p| p.queue == self.index) {
            let Pending { asked, view, .. } = state.under_way.remove(index).unwrap();
            state.run(asked, Some(&view)).unwrap();
        }
        state.completed.retain(|(queue, ..)| *queue != self.index);
    }
}
