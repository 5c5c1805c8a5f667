//! The machine's virtio devices, from what the command line says. This is the only place that knows them all.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use freestone_vmm::block::{
    self, Backing, DiskOptions, Engine, FormatChoice, Image, ImageFormat, RawImage, RawOptions,
};
use freestone_vmm::bus::{Spawn, ThreadSpawner};
use freestone_vmm::virtio::balloon::{Balloon, BalloonConfig};
use freestone_vmm::virtio::blk::{Block, BlockConfig, CacheMode};
use freestone_vmm::virtio::console::ConsoleHandle;
use freestone_vmm::virtio::rng::Rng;
use freestone_vmm::virtio::vsock::{UnixHost, Vsock, VsockConfig};
use freestone_vmm::virtio::{Mem, MemConfig, Pmem, PmemConfig, Transport, VirtioDevice, VirtioPlug};

use crate::cli::{self, ConsoleKind, Run};
use crate::console::Console;
use crate::control::Controls;
use crate::demo;
use crate::disk::DiskSpec;
use crate::failure::Failure;
use crate::limits::limiter;
use crate::metadata::Metadata;
use crate::net::{self, Pump, Threads};

/// The most disks: as many as there are letters. A transport may have less room.
const MAX_DISKS: usize = 26;
/// Virtio devices that a transport has room for: PCI has 32 device numbers, of which the host bridge has one; each device on
/// MMIO has a line of the I/O APIC from 5 to 23, of which the power button and the generation ID have one each.
const ROOM_ON_PCI: usize = 31;
const ROOM_ON_MMIO: usize = 17;
/// Queues of a disk if none are asked for: one for each vCPU, up to this.
const DEFAULT_QUEUES: u32 = 4;

/// Devices on their way into a machine, and what controls them.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) plugs: Vec<VirtioPlug>,
    pub(crate) controls: Controls,
    /// The virtio console, if there is one.
    pub(crate) console: Option<ConsoleHandle>,
    /// What joins switches with those of other processes, and who is to drive it; nobody: the machine.
    pub(crate) pumps: Vec<(Pump, Option<Arc<Threads>>)>,
    transport: Transport,
}

impl Attached {
    /// Makes all devices that the command line asks for. The first disk comes first: it is the guest's first.
    pub(crate) fn new(args: &Run, console: &Console) -> Result<Self, Failure> {
        let transport = match args.transport {
            cli::Transport::Pci => Transport::Pci,
            cli::Transport::Mmio => Transport::Mmio,
        };
        let mut attached = Self {
            plugs: Vec::new(),
            controls: Controls::default(),
            console: None,
            pumps: Vec::new(),
            transport,
        };
        net::check(&args.nets)?;
        args.mmds.as_ref().map_or(Ok(()), |mmds| net::check_metadata(&args.nets, mmds))?;
        room(args)?;
        attached.disks(args)?;
        attached.nets(args)?;
        if args.console == ConsoleKind::Virtio {
            let device = console.virtio()?;
            attached.console = Some(device.handle());
            attached.device(device, "console");
        }
        attached.memory(args)?;
        if let Some(spec) = &args.rng {
            let rng = Rng::new().limit(limiter(spec.bandwidth, spec.iops));
            attached.controls.rng = Some(rng.handle());
            attached.device(rng, "rng");
        }
        if let Some(spec) = &args.vsock {
            let host = UnixHost::bind(&spec.path, UnixHost::DEFAULT_MODE)?;
            attached.device(Vsock::new(host, VsockConfig::new(spec.cid))?, "vsock");
        }
        Ok(attached)
    }

    /// Balloon, persistent memory and memory to plug.
    fn memory(&mut self, args: &Run) -> Result<(), Failure> {
        if let Some(spec) = &args.balloon {
            let config = BalloonConfig::new()
                .target(spec.target)
                .deflate_on_oom(spec.deflate_on_oom)
                .reporting(spec.reporting)
                .hinting(spec.hinting);
            let balloon = Balloon::new(config)?;
            let handle = balloon.handle();
            if let Some(seconds) = spec.stats {
                handle.set_statistics_interval(Some(Duration::from_secs(seconds.into())))?;
            }
            self.controls.balloon = Some(handle);
            self.device(balloon, "balloon");
        }
        for (number, spec) in args.pmems.iter().enumerate() {
            let mut config = PmemConfig::new().read_only(spec.read_only).reserve(spec.reserve);
            if let Some(limiter) = limiter(spec.bandwidth, spec.iops) {
                config = config.rate_limiter(limiter);
            }
            let name = format!("pmem{number}");
            // A flush waits until the file is durable: not on the thread of the other devices.
            let thread = Arc::new(ThreadSpawner::new(&name)?);
            let pmem = Pmem::open(&spec.path, config)?;
            self.controls.pmems.push((name.clone(), pmem.handle()));
            self.device_on(pmem, &name, Some(thread));
        }
        if let Some(spec) = &args.memory_hotplug {
            let mut config = MemConfig::new(spec.most).requested(spec.requested);
            if let Some(block) = spec.block {
                config = config.block_size(block);
            }
            let mem = Mem::new(&config)?;
            self.controls.memory = Some(mem.handle());
            self.device(mem, "mem");
        }
        Ok(())
    }

    /// The disks in order. The built-in guest has a disk of its own in front.
    fn disks(&mut self, args: &Run) -> Result<(), Failure> {
        let most = MAX_DISKS - usize::from(args.kernel.is_none());
        if args.disks.len() > most {
            let asked = args.disks.len();
            return Err(Failure::usage(format!(
                "{asked} disks are too many: --disk may be given {most} times"
            )));
        }
        let mut letters = 'a'..='z';
        let mut next_name = || format!("vd{}", letters.next().unwrap_or('?'));
        if args.kernel.is_none() {
            let name = next_name();
            let config = BlockConfig::new().serial(freestone_guest::DEMO_DISK_ID);
            self.disk(Arc::new(demo::disk()?), config, name, None);
        }
        for spec in &args.disks {
            let name = next_name();
            let queues = spec.queues.unwrap_or(u16::try_from(args.cpus.min(DEFAULT_QUEUES)).unwrap_or(1));
            let cache = if spec.writethrough { CacheMode::Writethrough } else { CacheMode::Writeback };
            let mut config = BlockConfig::new()
                .read_only(spec.read_only)
                .serial(spec.serial.clone().unwrap_or_else(|| name.clone()))
                .queues(queues)
                .engine(spec.engine)
                .cache(cache);
            if let Some(size) = spec.block_size {
                config = config.logical_block(size);
            }
            if let Some(limiter) = limiter(spec.bandwidth, spec.iops) {
                config = config.rate_limiter(limiter);
            }
            let (image, blocks) = open(spec)?;
            let thread: Option<Arc<dyn Spawn>> = match spec.thread.unwrap_or(blocks) {
                true => Some(Arc::new(ThreadSpawner::new(&name)?)),
                false => None,
            };
            self.disk(image, config, name, thread);
        }
        Ok(())
    }

    fn disk(
        &mut self,
        image: Arc<dyn Image>,
        config: BlockConfig,
        name: String,
        spawner: Option<Arc<dyn Spawn>>,
    ) {
        let device = Block::new(image, config);
        self.controls.disks.push((name.clone(), device.handle()));
        self.device_on(device, &name, spawner);
    }

    fn nets(&mut self, args: &Run) -> Result<(), Failure> {
        let metadata = args.mmds.clone().map(|spec| {
            let store = args.metadata.clone().unwrap_or_default();
            Metadata { spec, store }
        });
        let (cards, nics) = net::attach(&args.nets, metadata.as_ref())?;
        self.controls.nics = nics;
        for card in cards {
            self.pumps.extend(card.pump.map(|pump| (pump, card.threads.clone())));
            self.device_on(card.device, &card.name, card.threads.map(|threads| threads as Arc<dyn Spawn>));
        }
        Ok(())
    }

    fn device(&mut self, device: impl VirtioDevice + 'static, name: &str) {
        self.device_on(device, name, None);
    }

    fn device_on(
        &mut self,
        device: impl VirtioDevice + 'static,
        name: &str,
        spawner: Option<Arc<dyn Spawn>>,
    ) {
        let mut plug = VirtioPlug::new(self.transport, device, name);
        if let Some(spawner) = spawner {
            plug = plug.spawner(spawner);
        }
        self.controls.stats.push(plug.stats());
        self.plugs.push(plug);
    }
}

/// Whether there is room for all devices, said before any file is touched.
fn room(args: &Run) -> Result<(), Failure> {
    let single = [
        args.kernel.is_none(),
        args.console == ConsoleKind::Virtio,
        args.rng.is_some(),
        args.balloon.is_some(),
        args.vsock.is_some(),
        args.memory_hotplug.is_some(),
    ];
    let many = args.disks.len() + args.pmems.len() + net::count(&args.nets);
    let asked = many + single.iter().filter(|asked| **asked).count();
    match args.transport {
        cli::Transport::Mmio if asked > ROOM_ON_MMIO => Err(Failure::usage(format!(
            "{asked} virtio devices are too many: MMIO has room for {ROOM_ON_MMIO}, and --transport pci for {ROOM_ON_PCI}"
        ))),
        cli::Transport::Pci if asked > ROOM_ON_PCI => Err(Failure::usage(format!(
            "{asked} virtio devices are too many: PCI has room for {ROOM_ON_PCI}"
        ))),
        _ => Ok(()),
    }
}

/// Opens a disk's image. Also says whether its requests hold up the thread they are made on.
pub(crate) fn open(spec: &DiskSpec) -> Result<(Arc<dyn Image>, bool), Failure> {
    let format = block::choose(&spec.path, spec.format.choice())?;
    if format == ImageFormat::Raw {
        let options = RawOptions::new().read_only(spec.read_only).direct(spec.direct);
        return Ok((Arc::new(raw(&spec.path, options)?), false));
    }
    // Said here, not by a disk that fails when the guest starts it.
    let raw_only = [(spec.direct, "direct"), (spec.engine == Engine::Uring, "engine=uring")];
    if let Some((_, option)) = raw_only.iter().find(|(asked, _)| *asked) {
        return Err(Failure::usage(format!("disk {:?}: {option} is for raw images", spec.path)));
    }
    let backing = if spec.backing { Backing::Allow } else { Backing::Deny };
    let options = DiskOptions::new().format(FormatChoice::Given(format)).read_only(spec.read_only);
    Ok((options.backing(backing).open(&spec.path)?, true))
}

fn raw(path: &Path, options: RawOptions) -> Result<RawImage, Failure> {
    let image = RawImage::open(path, options)?;
    if image.unused_bytes() != 0 {
        let unused = image.unused_bytes();
        tracing::warn!(disk = ?path, "the last {unused} bytes are less than a sector and not part of the disk");
    }
    Ok(image)
}
