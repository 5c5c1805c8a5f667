//! The device alone: a driver on the bench's thread feeds its workers, and nothing else is between them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use freestone_benches::disk::{BLOCK, Batch, Calls, Random, Ring};
use freestone_benches::rounds::CycleFrom;
use freestone_benches::{Fallible, host};
use freestone_block::{Engine, Image};
use freestone_bus::{EventFd, Irq, Progress, Source};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend, MemorySlice, MemoryView};
use freestone_virtio::{
    ActiveQueue, Block, BlockConfig, DeviceControl, QueueConfig, Resources, VirtQueue, VirtioDevice, Worker,
    features,
};
use serde_json::Value;

use crate::image::{FORMATS, provide};
use crate::{Args, Processors, Times, head, line};

/// Entries of a queue: chains of three for all requests.
const SIZE: u16 = 128;
/// Guest memory of a queue: descriptor area, driver area, device area, then a line for each request and its data.
const AREA: usize = 1 << 20;
const DRIVER: usize = 0x1000;
const DEVICE: usize = 0x2000;
const LINES: usize = 0x4000;
const DATA: usize = 0x1_0000;
/// The status in a request's line, after the header, and what it is before the device writes it.
const STATUS: usize = 16;
const PENDING: u8 = 0xFF;

/// Flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A device and the driver's side of its queues.
struct Subject {
    view: MemoryView,
    queues: Vec<Queue>,
}

struct Queue {
    worker: Box<dyn Worker>,
    events: Events,
    /// Guest-physical address of its memory.
    base: u64,
    write: bool,
    packed: bool,
    /// Index of a split ring, place in a packed one.
    next: u16,
    wrap: bool,
}

/// What is measured.
#[derive(Clone, Copy)]
struct Kind {
    engine: Engine,
    packed: bool,
    queues: u16,
    write: bool,
}

impl Subject {
    fn new(image: Arc<dyn Image>, kind: Kind) -> Fallible<Self> {
        let mem = GuestMem::anonymous(AREA as u64 * u64::from(kind.queues))?;
        let view = mem.view();
        // The driver is on the same thread: looking at an empty queue would be in vain.
        let config = BlockConfig::new().queues(kind.queues).engine(kind.engine).poll(Duration::ZERO);
        let mut block = Block::new(image, config);
        let mut features = features::VERSION_1 | features::RING_EVENT_IDX;
        if kind.packed {
            features |= features::RING_PACKED;
        }
        let mut queues = Vec::new();
        for index in 0..kind.queues {
            let at = |offset: usize| AREA as u64 * u64::from(index) + offset as u64;
            let config =
                QueueConfig { size: SIZE, descriptors: at(0), driver: at(DRIVER), device: at(DEVICE) };
            let queue = VirtQueue::new(config, SIZE, features, &view)?;
            // EFD_NONBLOCK is O_NONBLOCK.
            let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
            queues.push(ActiveQueue { index, queue, kick, irq: Irq::null() });
        }
        let control = DeviceControl::detached("disk");
        let workers = block.start(Resources { mem, features, queues, control })?;
        let queues = workers.into_iter().zip(0..);
        let queues = queues.map(|(worker, n)| Queue::new(&view, worker, AREA as u64 * n, kind));
        let queues = queues.collect::<Fallible<_>>()?;
        Ok(Self { view, queues })
    }
}

impl Queue {
    fn new(view: &MemoryView, worker: Box<dyn Worker>, base: u64, kind: Kind) -> Fallible<Self> {
        let Kind { packed, write, .. } = kind;
        let events = Events::new(&worker.sources())?;
        let queue = Self { worker, events, base, write, packed, next: 0, wrap: true };
        let area = queue.area(view)?;
        // Packed: no interrupts. Split: the event index is passed once in 65536 requests.
        area.write_obj(u16::from(packed), DRIVER + 2 * usize::from(packed))?;
        for slot in 0..usize::from(SIZE / 3) {
            area.write_obj(u32::from(write), LINES + 64 * slot)?;
            if !packed {
                for (i, (addr, len, flags)) in queue.buffers(slot).into_iter().enumerate() {
                    let index = 3 * slot + i;
                    put_descriptor(&area, 16 * index, (addr, len), flags, u16::try_from(index + 1)?)?;
                }
            }
        }
        Ok(queue)
    }

    fn area<'m>(&self, view: &'m MemoryView) -> Fallible<MemorySlice<'m>> {
        Ok(view.get_slice(GuestAddress(self.base), AREA)?)
    }

    /// Header, data and status of a request: address, length, flags.
    fn buffers(&self, slot: usize) -> [(u64, u32, u16); 3] {
        let (line, data) = (self.base + (LINES + 64 * slot) as u64, self.base + (DATA + BLOCK * slot) as u64);
        let direction = if self.write { 0 } else { WRITE };
        [(line, 16, NEXT), (data, 4096, NEXT | direction), (line + STATUS as u64, 1, WRITE)]
    }

    /// Puts a request for the block at `offset` into the ring.
    fn submit(&mut self, area: &MemorySlice<'_>, slot: usize, offset: u64) -> Fallible<()> {
        let line = LINES + 64 * slot;
        area.write_obj(offset / 512, line + 8)?;
        area.write_obj(PENDING, line + STATUS)?;
        if !self.packed {
            let entry = DRIVER + 4 + 2 * usize::from(self.next % SIZE);
            area.write_obj(u16::try_from(3 * slot)?, entry)?;
            self.next = self.next.wrapping_add(1);
            return Ok(());
        }
        let (first, first_marks) = (self.next, self.marks());
        let mut first_flags = 0;
        for (i, (addr, len, flags)) in self.buffers(slot).into_iter().enumerate() {
            let at = 16 * usize::from(self.next);
            // The flags of the first come last: they make the chain available.
            let flags = if i == 0 {
                first_flags = flags | first_marks;
                first_marks ^ (AVAIL | USED)
            } else {
                flags | self.marks()
            };
            put_descriptor(area, at, (addr, len), u16::try_from(slot)?, flags)?;
            self.next += 1;
            if self.next == SIZE {
                (self.next, self.wrap) = (0, !self.wrap);
            }
        }
        Ok(area.store(first_flags, 16 * usize::from(first) + 14, Ordering::Release)?)
    }

    /// The flags that make a descriptor of a packed ring available.
    fn marks(&self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Drives the worker until it has nothing to do.
    fn turn(&mut self) {
        while self.worker.process() == Progress::More {}
    }

    /// Lets the device do the first `count` requests.
    fn finish(&mut self, area: &MemorySlice<'_>, count: usize) -> Fallible<()> {
        if !self.packed {
            area.store(self.next, DRIVER + 2, Ordering::Release)?;
        }
        // Whether the device wants a kick does not matter: this is one.
        self.turn();
        for slot in 0..count {
            loop {
                match area.read_obj::<u8>(LINES + 64 * slot + STATUS)? {
                    0 => break,
                    // An asynchronous engine: what came of it is seen in a further step.
                    PENDING => {
                        self.events.wait()?;
                        self.turn();
                    }
                    other => return Err(format!("a request ended with status {other}").into()),
                }
            }
        }
        Ok(())
    }
}

/// Waits for what an event loop would wait for: edges of the worker's sources.
struct Events(OwnedFd);

impl Events {
    fn new(sources: &[Source]) -> Fallible<Self> {
        // SAFETY: the call takes a number.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: the kernel has just made it, and nobody else knows it.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        for source in sources {
            let mut event =
                libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET).cast_unsigned(), u64: 0 };
            let (epoll, fd) = (epoll.as_raw_fd(), source.as_raw_fd());
            // SAFETY: both are open, and the event is valid for the time of the call.
            if unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) } < 0 {
                return Err(io::Error::last_os_error().into());
            }
        }
        Ok(Self(epoll))
    }

    fn wait(&self) -> Fallible<()> {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: there is room for the one event that is asked for.
        match unsafe { libc::epoll_wait(self.0.as_raw_fd(), &raw mut event, 1, 10_000) } {
            1 => Ok(()),
            0 => Err("the device does not answer".into()),
            _ => Err(io::Error::last_os_error().into()),
        }
    }
}

/// Writes a descriptor: `a` and `b` are flags and next of a split ring, id and flags of a packed one.
fn put_descriptor(
    area: &MemorySlice<'_>,
    at: usize,
    (addr, len): (u64, u32),
    a: u16,
    b: u16,
) -> Fallible<()> {
    area.write_obj(addr, at)?;
    Ok(area.write_obj(u64::from(len) | u64::from(a) << 32 | u64::from(b) << 48, at + 8)?)
}

impl Batch for Subject {
    fn batch(&mut self, offsets: &[u64]) -> Fallible<()> {
        let Self { view, queues } = self;
        let each = offsets.len().div_ceil(queues.len());
        for (queue, offsets) in queues.iter_mut().zip(offsets.chunks(each)) {
            let area = queue.area(view)?;
            for (slot, offset) in offsets.iter().enumerate() {
                queue.submit(&area, slot, *offset)?;
            }
        }
        for (queue, offsets) in queues.iter_mut().zip(offsets.chunks(each)) {
            let area = queue.area(view)?;
            queue.finish(&area, offsets.len())?;
        }
        Ok(())
    }
}

/// Measures all combinations.
pub fn bench(args: &Args, folder: &Path, on: Processors) -> Fallible<Value> {
    // The kernel's threads of an io_uring stay there too.
    host::pin(on.device)?;
    let mut results = Vec::new();
    for format in &FORMATS {
        // One image for all devices: no two may write to the same file by themselves.
        let path = provide(format, folder, args.size)?;
        let image = (format.open)(&path)?;
        for write in [false, true] {
            for depth in [1, 32] {
                let operation = if write { "writes" } else { "reads" };
                let mut cases = Vec::new();
                for &(engine_name, engine) in format.engines {
                    for (ring, packed) in [("split", false), ("packed", true)] {
                        for queues in [1, 2] {
                            if usize::from(queues) > depth {
                                continue;
                            }
                            let name = format!(
                                "{}, {engine_name}, {ring}, {queues} queue{}, {operation}, QD{depth}",
                                format.name,
                                if queues == 1 { "" } else { "s" }
                            );
                            if args.wants(&name) {
                                let kind = Kind { engine, packed, queues, write };
                                let subject = Subject::new(Arc::clone(&image), kind)?;
                                cases.push((name, Box::new(subject) as Box<dyn Batch>, Times::new()));
                            }
                        }
                    }
                }
                if !cases.is_empty() {
                    results.extend(measure(args, &path, operation, depth, write, cases)?);
                }
            }
        }
        // Writes left zeros.
        std::fs::remove_file(path)?;
    }
    Ok(Value::Array(results))
}

type Case = (String, Box<dyn Batch>, Times);

fn measure(
    args: &Args,
    path: &Path,
    operation: &str,
    depth: usize,
    write: bool,
    cases: Vec<Case>,
) -> Fallible<Vec<Value>> {
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let mut subjects: Vec<Case> = vec![
        (
            "floor: preadv, pwritev".to_owned(),
            Box::new(Calls::new(file.try_clone()?, depth, write)),
            Vec::new(),
        ),
        (
            "floor: pread, pwrite".to_owned(),
            Box::new(Calls::new(file.try_clone()?, depth, write).plain()),
            Vec::new(),
        ),
        ("floor: io_uring".to_owned(), Box::new(Ring::new(&file, depth, write)?), Vec::new()),
    ];
    subjects.extend(cases);
    let mut random = Random::default();
    let count = usize::try_from(args.count)?;
    for round in 0..=args.rounds {
        let offsets = random.offsets(count, u64::from(args.size) << 20);
        for (_, subject, times) in subjects.iter_mut().cycle_from(round as usize) {
            let begin = Instant::now();
            for offsets in offsets.chunks(depth) {
                subject.batch(offsets)?;
            }
            // The first round warms the caches.
            if round > 0 {
                times.push(begin.elapsed().as_secs_f64() * 1e9 / f64::from(args.count));
            }
        }
    }
    head(&format!("The device without a hypervisor, {operation}, {depth} at a time"));
    let floors = [0, 2].map(|n| subjects.get(n).map_or(Vec::new(), |(_, _, times)| times.clone()));
    let [calls, ring] = floors;
    let lines = subjects.iter().map(|(name, _, times)| {
        let floor = if name.contains("uring") { &ring } else { &calls };
        line(name, times, floor, None)
    });
    let lines = lines.collect();
    println!();
    Ok(lines)
}
