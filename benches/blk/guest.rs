//! The device in a whole machine, driven by a guest that polls: vCPU on one processor, event loop on another.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use freestone_benches::disk::{Batch, Calls, Random, Ring};
use freestone_benches::{Fallible, host};
use freestone_block::Engine;
use freestone_bus::{Access, Device, IoDevice, Plug, Wiring};
use freestone_guest::blk::{self, Command, Operation, Outcome};
use freestone_guest::{BLK, DONE_PORT, PARAMS};
use freestone_kvm::Kvm;
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_virtio::{Block, BlockConfig, DeviceStats, Transport, VirtioPlug};
use freestone_vmm::devices::{I8042Plug, PciRootPlug, PowerPlug};
use freestone_vmm::{MachineBuilder, Payload};
use serde_json::{Value, json};

use crate::image::{FORMATS, Format, provide};
use crate::{Args, Processors, Times, head, line, number};

/// Memory of the guest.
const MEMORY: u64 = 64 << 20;
const QUEUES: u16 = 2;
/// What is measured; each has a machine of its own.
const MACHINES: [(&str, Transport, Engine); 3] = [
    ("pci, sync", Transport::Pci, Engine::Sync),
    ("pci, uring", Transport::Pci, Engine::Uring),
    ("mmio, sync", Transport::Mmio, Engine::Sync),
];

/// A machine with one disk, on threads of its own.
struct Subject {
    memory: GuestMem,
    commands: Option<Sender<Command>>,
    answers: Receiver<u8>,
    stats: DeviceStats,
    thread: Option<JoinHandle<Result<(), String>>>,
}

/// What the guest writes to when it is done: waits for the next command and puts it where the guest looks.
struct Port {
    memory: GuestMem,
    cpu: usize,
    wires: Mutex<(Receiver<Command>, Sender<u8>)>,
}

impl IoDevice for Port {
    fn read(&self, _offset: u64, _data: &mut [u8]) -> Access {
        Ok(())
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Access {
        // This is the vCPU's thread.
        let pinned = host::pin(self.cpu);
        let wires = self.wires.lock().unwrap_or_else(PoisonError::into_inner);
        let (commands, answers) = &*wires;
        let answer = data.first().copied().unwrap_or(0);
        let sent = answers.send(if pinned.is_ok() { answer } else { 0 });
        let end = Command::new(Operation::End, 0);
        let command = sent.ok().and_then(|()| commands.recv().ok()).unwrap_or(end);
        let _written = self.memory.view().write_slice(&command.to_bytes(), GuestAddress(PARAMS));
        Ok(())
    }
}

impl Plug for Port {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        wiring.pio(DONE_PORT, 1, Arc::<Self>::from(self))?;
        Ok(Box::new(DonePort))
    }
}

struct DonePort;

impl Device for DonePort {
    fn name(&self) -> &str {
        "done"
    }
}

impl Subject {
    fn new(
        (transport, engine): (Transport, Engine),
        format: &Format,
        path: &Path,
        on: Processors,
    ) -> Fallible<Self> {
        let memory = GuestMem::anonymous(MEMORY)?;
        let (commands, to_guest) = channel();
        let (from_guest, answers) = channel();
        let Processors { vcpu, device } = on;
        let port = Port { memory: memory.clone(), cpu: vcpu, wires: Mutex::new((to_guest, from_guest)) };
        let config = BlockConfig::new().queues(QUEUES).engine(engine);
        let disk = VirtioPlug::new(transport, Block::new((format.open)(path)?, config), "disk");
        let stats = disk.stats();
        let guest_memory = memory.clone();
        let thread = std::thread::spawn(move || {
            host::pin(device).map_err(|error| error.to_string())?;
            run(transport, guest_memory, port, disk).map_err(|error| error.to_string())
        });
        let mut subject = Self { memory, commands: Some(commands), answers, stats, thread: Some(thread) };
        subject.answer()?;
        Ok(subject)
    }

    /// The outcome of a command.
    fn command(&mut self, command: Command) -> Fallible<Outcome> {
        self.commands.as_ref().ok_or("the machine is stopped")?.send(command)?;
        self.answer()?;
        let mut bytes = [0; 48];
        self.memory.view().read_slice(&mut bytes, GuestAddress(PARAMS + Outcome::OFFSET))?;
        let outcome = Outcome::from_bytes(bytes);
        if outcome.wrong > 0 {
            return Err(
                format!("{} requests failed or brought wrong data: {command:?}", outcome.wrong).into()
            );
        }
        Ok(outcome)
    }

    fn answer(&mut self) -> Fallible<()> {
        match self.answers.recv_timeout(Duration::from_secs(60)) {
            Ok(1) => Ok(()),
            Ok(other) => Err(format!("the guest says: {}", blk::why(other)).into()),
            Err(error) => match self.thread.take_if(|thread| thread.is_finished()).map(JoinHandle::join) {
                Some(Ok(Err(message))) => Err(message.into()),
                _ => Err(format!("the guest does not answer: {error}").into()),
            },
        }
    }

    /// Interrupts so far, and how many the driver did not want.
    fn interrupts(&self) -> (u64, u64) {
        let counts = self.stats.snapshot();
        counts.iter().fold((0, 0), |(sent, not), queue| (sent + queue.interrupts, not + queue.suppressed))
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            eprintln!("blk: a machine's thread panicked");
        }
    }
}

fn run(transport: Transport, memory: GuestMem, port: Port, disk: VirtioPlug) -> Fallible<()> {
    let kvm = Kvm::open()?;
    let mut builder =
        MachineBuilder::new(&kvm).memory(memory).device(PowerPlug::new()).device(I8042Plug::new());
    if matches!(transport, Transport::Pci) {
        builder = builder.device(PciRootPlug::new());
    }
    let payload = Payload::Image { bytes: BLK.into(), cmdline: String::new() };
    builder.device(port).device(disk).payload(payload).build()?.run()?;
    Ok(())
}

/// A line of the table.
struct Case {
    name: String,
    subject: usize,
    command: Command,
    times: Times,
    kicks: Vec<f64>,
}

/// Measures reads, and at last writes, because they change the image.
pub fn bench(args: &Args, folder: &Path, on: Processors) -> Fallible<Value> {
    let names = MACHINES.map(|(name, ..)| name);
    let tables: Vec<_> = [(false, 1), (false, 32), (true, 1), (true, 32)]
        .into_iter()
        .map(|(write, depth)| (write, depth, cases(args, &names, depth, write)))
        .filter(|(.., cases)| !cases.is_empty())
        .collect();
    if tables.is_empty() {
        return Ok(Value::Null);
    }
    let Processors { vcpu, device } = on;
    let ticks = host::ticks_per_nanosecond();
    let [format, ..] = &FORMATS;
    let path = provide(format, folder, args.size)?;
    let mut subjects = Vec::new();
    for (_, transport, engine) in MACHINES {
        subjects.push(Subject::new((transport, engine), format, &path, on)?);
    }
    host::pin(device)?;
    for subject in &mut subjects {
        verify(subject)?;
    }
    let mut results = Vec::new();
    for (write, depth, mut cases) in tables {
        head(&format!(
            "Driven by a guest that polls, {}, {depth} at a time: vCPU on processor {vcpu}, event loop on {device}",
            operation(write)
        ));
        results.extend(measure(args, &path, &mut subjects, &mut cases, (write, depth), ticks)?);
        println!();
    }
    for (name, subject) in names.iter().zip(&subjects) {
        let (sent, suppressed) = subject.interrupts();
        println!("{name}: {sent} interrupts, {suppressed} not wanted by the driver");
    }
    Ok(Value::Array(results))
}

/// Reads the whole image with every kind of ring, and compares it.
fn verify(subject: &mut Subject) -> Fallible<()> {
    for packed in [0, blk::RING_PACKED] {
        for (depth, queues) in [(1, 1), (32, 1), (blk::MAX_DEPTH, 2)] {
            let mut command = Command { depth, queues, ..Command::new(Operation::Verify, 0) };
            command.features |= packed;
            let blocks = subject.command(command)?.blocks;
            command.count = if depth == 1 { blocks / 16 } else { blocks };
            let outcome = subject.command(command)?;
            if outcome.features & packed != packed {
                return Err("the device has no packed rings".into());
            }
        }
    }
    Ok(())
}

fn operation(write: bool) -> &'static str {
    if write { "writes" } else { "reads" }
}

fn cases(args: &Args, names: &[&str], depth: u64, write: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    for (subject, name) in names.iter().enumerate() {
        for (ring, packed, queues) in
            [("split", 0, 1), ("packed", blk::RING_PACKED, 1), ("split, 2 queues", 0, u64::from(QUEUES))]
        {
            let name = format!("{name}, {ring}, {}, QD{depth}", operation(write));
            if !args.wants(&name) {
                continue;
            }
            let operation = if write { Operation::Write } else { Operation::Read };
            // As many at once on all queues together.
            let each = depth / queues;
            let mut command = Command { depth: each, queues, ..Command::new(operation, args.count.into()) };
            command.features |= packed;
            if each > 0 {
                cases.push(Case { name, subject, command, times: Vec::new(), kicks: Vec::new() });
            }
        }
    }
    cases
}

fn measure(
    args: &Args,
    path: &Path,
    subjects: &mut [Subject],
    cases: &mut [Case],
    (write, depth): (bool, u64),
    ticks: f64,
) -> Fallible<Vec<Value>> {
    let depth = usize::try_from(depth)?;
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let plain = Calls::new(file.try_clone()?, depth, write).plain();
    let mut floors: [(&str, Box<dyn Batch>, Times); 3] = [
        ("floor: preadv, pwritev", Box::new(Calls::new(file.try_clone()?, depth, write)), Vec::new()),
        ("floor: pread, pwrite", Box::new(plain), Vec::new()),
        ("floor: io_uring", Box::new(Ring::new(&file, depth, write)?), Vec::new()),
    ];
    let mut random = Random::default();
    let count = usize::try_from(args.count)?;
    for round in 0..=args.rounds {
        let offsets = random.offsets(count, u64::from(args.size) << 20);
        for (_, floor, times) in &mut floors {
            let begin = Instant::now();
            for offsets in offsets.chunks(depth) {
                floor.batch(offsets)?;
            }
            times.push(begin.elapsed().as_secs_f64() * 1e9 / f64::from(args.count));
        }
        for case in &mut *cases {
            let subject = subjects.get_mut(case.subject).ok_or("no such machine")?;
            let seed = case.command.seed.wrapping_add(u64::from(round) << 17);
            let outcome = subject.command(Command { seed, ..case.command })?;
            if round > 0 {
                case.times.push(number(outcome.ticks) / ticks / f64::from(args.count));
                case.kicks.push(number(outcome.kicks) * 1e3 / f64::from(args.count));
            }
        }
        if round == 0 {
            // It warmed the caches.
            floors.iter_mut().for_each(|(_, _, times)| times.clear());
        }
    }
    let [(_, _, calls), ..] = &floors;
    let mut results: Vec<Value> =
        floors.iter().map(|(name, _, times)| line(name, times, calls, None)).collect();
    for case in cases {
        let kicks = freestone_benches::rounds::median(&case.kicks);
        results.push(json!({ "depth": depth, "line": line(&case.name, &case.times, calls, Some(kicks)) }));
    }
    Ok(results)
}
