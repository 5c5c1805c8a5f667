//! The device alone: a driver on the bench's thread feeds its workers, and nothing else is between them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use freestone_benches::disk::{BLOCK, Batch, Calls, Random, Ring};
use freestone_benches::rounds::CycleFrom;
use freestone_benches::Fallible;
use freestone_block::{Engine, Image};
use freestone_bus::{EventFd, Irq};
use freestone_memory::{Bytes, GuestAddress, GuestMem, MemoryView};
use freestone_virtio::{
    ActiveQueue, Block, BlockConfig, DeviceControl, QueueConfig, Resources, VirtQueue, VirtioDevice, Worker,
    features,
};
use serde_json::Value;

use crate::image::{FORMATS, provide};
use crate::{Args, Times, head, line};

/// Entries of a queue: chains of three for all requests.
const SIZE: u16 = 128;
/// Guest memory of a queue: descriptor area, driver area, device area, then a line for each request and its data.
const AREA: u64 = 1 << 20;
const DRIVER: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const LINES: u64 = 0x4000;
const DATA: u64 = 0x1_0000;

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
    depth: usize,
}

impl Subject {
    fn new(image: Arc<dyn Image>, kind: Kind) -> Fallible<Self> {
        let mem = GuestMem::anonymous(AREA * u64::from(kind.queues))?;
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
            let base = AREA * u64::from(index);
            let config =
                QueueConfig { size: SIZE, descriptors: base, driver: base + DRIVER, device: base + DEVICE };
            let queue = VirtQueue::new(config, SIZE, features, &view)?;
            // EFD_NONBLOCK is O_NONBLOCK.
            let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
            queues.push(ActiveQueue { index, queue, kick, irq: Irq::null() });
        }
        let control = DeviceControl::detached("disk");
        let workers = block.start(Resources { mem, features, queues, control })?;
        let queues = workers.into_iter().zip((0..).map(|n| AREA * n)).map(|(worker, base)| {
            Queue::new(&view, worker, base, kind)
        });
        let queues = queues.collect::<Fallible<_>>()?;
        Ok(Self { view, queues })
    }
}

impl Queue {
    fn new(view: &MemoryView, worker: Box<dyn Worker>, base: u64, kind: Kind) -> Fallible<Self> {
        let Kind { packed, write, .. } = kind;
        // Packed: no interrupts. Split: the event index is passed once in 65536 requests.
        view.write_obj(u16::from(packed), GuestAddress(base + DRIVER + 2 * u64::from(packed)))?;
        for slot in 0..u64::from(SIZE / 3) {
            view.write_obj(u32::from(write), GuestAddress(base + LINES + 64 * slot))?;
            if !packed {
                for (i, (addr, len, flags)) in (0..).zip(buffers(base, write, slot)) {
                    let index = 3 * slot + i;
                    put_descriptor(view, base + 16 * index, addr, len, flags, u16::try_from(index + 1)?)?;
                }
            }
        }
        Ok(Self { worker, base, write, packed, next: 0, wrap: true })
    }

    /// Puts a request for the block at `offset` into the ring.
    fn submit(&mut self, view: &MemoryView, slot: u64, offset: u64) -> Fallible<()> {
        let line = self.base + LINES + 64 * slot;
        view.write_obj(offset / 512, GuestAddress(line + 8))?;
        view.write_obj(0xFFu8, GuestAddress(line + 16))?;
        if !self.packed {
            let entry = self.base + DRIVER + 4 + 2 * u64::from(self.next % SIZE);
            view.write_obj(u16::try_from(3 * slot)?, GuestAddress(entry))?;
            self.next = self.next.wrapping_add(1);
            return Ok(());
        }
        let first = (self.next, self.wrap);
        let mut first_flags = 0;
        for (i, (addr, len, flags)) in buffers(self.base, self.write, slot).into_iter().enumerate() {
            let marks = if self.wrap { AVAIL } else { USED };
            let at = self.base + 16 * u64::from(self.next);
            // The flags of the first come last: they make the chain available.
            if i == 0 {
                first_flags = flags | marks;
            }
            let not_yet = if self.wrap { USED } else { AVAIL };
            let flags = if i == 0 { not_yet } else { flags | marks };
            put_descriptor(view, at, addr, len, u16::try_from(slot)?, flags)?;
            self.step();
        }
        let at = GuestAddress(self.base + 16 * u64::from(first.0) + 14);
        Ok(view.store(first_flags, at, Ordering::Release)?)
    }

    /// One further in a packed ring.
    fn step(&mut self) {
        self.next += 1;
        if self.next == SIZE {
            (self.next, self.wrap) = (0, !self.wrap);
        }
    }

    /// Lets the device do `count` requests.
    fn finish(&mut self, view: &MemoryView, count: usize) -> Fallible<()> {
        if !self.packed {
            view.store(self.next, GuestAddress(self.base + DRIVER + 2), Ordering::Release)?;
        }
        // Whether the device wants a kick does not matter: this is one.
        self.worker.process();
        for slot in 0..count as u64 {
            let status = GuestAddress(self.base + LINES + 64 * slot + 16);
            let mut looks = 0u32;
            loop {
                match view.read_obj::<u8>(status)? {
                    0 => break,
                    0xFF if looks < 1_000_000 => {
                        // An asynchronous engine: what came of it is seen in a further step.
                        looks += 1;
                        self.worker.process();
                    }
                    other => return Err(format!("a request ended with status {other}").into()),
                }
            }
        }
        Ok(())
    }
}

/// Header, data and status of a request: address, length, flags.
fn buffers(base: u64, write: bool, slot: u64) -> [(u64, u32, u16); 3] {
    let (line, data) = (base + LINES + 64 * slot, base + DATA + BLOCK as u64 * slot);
    let direction = if write { 0 } else { WRITE };
    [(line, 16, NEXT), (data, 4096, NEXT | direction), (line + 16, 1, WRITE)]
}

/// Writes a descriptor: `a` and `b` are flags and next of a split ring, id and flags of a packed one.
fn put_descriptor(view: &MemoryView, at: u64, addr: u64, len: u32, a: u16, b: u16) -> Fallible<()> {
    let value =
        u128::from(addr) | u128::from(len) << 64 | u128::from(a) << 96 | u128::from(b) << 112;
    Ok(view.write_slice(&value.to_le_bytes(), GuestAddress(at))?)
}

impl Batch for Subject {
    fn batch(&mut self, offsets: &[u64]) -> Fallible<()> {
        let Self { view, queues } = self;
        let each = offsets.len().div_ceil(queues.len());
        for (queue, offsets) in queues.iter_mut().zip(offsets.chunks(each)) {
            for (slot, offset) in (0..).zip(offsets) {
                queue.submit(view, slot, *offset)?;
            }
        }
        for (queue, offsets) in queues.iter_mut().zip(offsets.chunks(each)) {
            queue.finish(view, offsets.len())?;
        }
        Ok(())
    }
}

/// Measures all combinations.
pub fn bench(args: &Args, folder: &Path) -> Fallible<Value> {
    let mut results = Vec::new();
    for format in &FORMATS {
        let path = provide(format, folder, args.size)?;
        for write in [false, true] {
            for depth in [1, 32] {
                let operation = if write { "writes" } else { "reads" };
                let mut cases = Vec::new();
                for (engine_name, engine) in [("sync", Engine::Sync), ("uring", Engine::Uring)] {
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
                                let kind = Kind { engine, packed, queues, write, depth };
                                let subject = Subject::new((format.open)(&path)?, kind)?;
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
    let floors = [0, 1].map(|n| subjects.get(n).map_or(Vec::new(), |(_, _, times)| times.clone()));
    let [calls, ring] = floors;
    let lines = subjects.iter().map(|(name, _, times)| {
        let floor = if name.contains("uring") { &ring } else { &calls };
        line(name, times, floor, None)
    });
    let lines = lines.collect();
    println!();
    Ok(lines)
}
