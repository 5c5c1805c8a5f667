//! virtio-mem (virtio 1.2, section 5.15): memory that is plugged and unplugged in small blocks while the guest runs.
//!
//! The host asks for an amount; the driver picks the blocks. The device's range of addresses is divided into chunks of 128 MiB or
//! more. A chunk has memory, which the guest and all devices can reach, from its first plugged block to its last; a block that is
//! unplugged in a chunk that stays goes back to the host at once.

mod blocks;
mod request;
mod state;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{MemorySlots, Wiring};
use freestone_memory::{Backing, GuestMem, RegionBuilder};
use freestone_snapshot::{Restoring, Saving};

use crate::device::{DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::device_memory::DeviceMemory;
use crate::worker::QueueWorker;
use crate::{DeviceControl, Error, Result};
use blocks::{Blocks, ChunkSource};
use request::Requests;

/// Feature bits of this device type that are offered, as masks (5.15.3).
pub mod feature {
    /// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver must not touch memory that is not plugged.
    pub const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
}

/// Smallest chunk: a block of Linux's memory map.
const MIN_CHUNK: u64 = 128 << 20;
/// Most chunks of one device: each is a memory slot, of which the host has a limited number, and takes milliseconds to add or
/// remove. One request can be about all of them.
const MAX_CHUNKS: u64 = 128;
/// How far the usable region goes beyond what was asked for, so that the driver has a choice of blocks: two of the blocks in
/// which Linux handles memory.
const SLACK: u64 = 256 << 20;
/// The same for a guest with so much RAM that these blocks have 2 GiB.
const SLACK_LARGE: u64 = 4 << 30;
const LARGE_RAM: u64 = 64 << 30;
/// Largest block of Linux's memory map, which begins at a multiple of its size.
const ALIGN: u64 = 2 << 30;
/// Smallest block: a huge page of the host, so that what is unplugged does not split one.
const MIN_BLOCK: u64 = 2 << 20;
/// Largest region: each block costs a byte of the host's memory.
const MAX_REGION: u64 = 1 << 44;
/// The whole configuration space (5.15.4).
const CONFIG_LEN: u32 = 56;

/// What a [`Mem`] device is made with.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MemConfig {
    /// Bytes that can be plugged at most: a multiple of the block size.
    pub region_size: u64,
    /// Bytes of a block: a power of two from 2 MiB to 128 MiB. Linux plugs 4 MiB at once or more. Default: 2 MiB.
    pub block_size: u64,
    /// Bytes of a chunk, the unit in which memory comes from the host: a power of two from 128 MiB, and no less than a 128th of the
    /// region. Default: the smallest.
    pub slot_size: Option<u64>,
    /// Bytes to plug at first: a multiple of the block size. Default: 0.
    pub requested: u64,
    /// Entries of the queue: a power of two. Drivers send one request at a time, and a step of the device serves a queue's
    /// worth, so it is best small. Default: 4.
    pub queue_size: u16,
}

impl MemConfig {
    /// A device that can plug `region_size` bytes.
    pub fn new(region_size: u64) -> Self {
        Self { region_size, block_size: MIN_BLOCK, slot_size: None, requested: 0, queue_size: 4 }
    }

    /// Sets [`block_size`](Self::block_size).
    #[must_use]
    pub fn block_size(mut self, block_size: u64) -> Self {
        self.block_size = block_size;
        self
    }

    /// Sets [`slot_size`](Self::slot_size).
    #[must_use]
    pub fn slot_size(mut self, slot_size: u64) -> Self {
        self.slot_size = Some(slot_size);
        self
    }

    /// Sets [`requested`](Self::requested).
    #[must_use]
    pub fn requested(mut self, requested: u64) -> Self {
        self.requested = requested;
        self
    }

    /// Sets [`queue_size`](Self::queue_size).
    #[must_use]
    pub fn queue_size(mut self, queue_size: u16) -> Self {
        self.queue_size = queue_size;
        self
    }

    fn check(&self) -> Result<()> {
        let Self { region_size, block_size, requested, .. } = *self;
        let block_ok = block_size.is_power_of_two() && (MIN_BLOCK..=MIN_CHUNK).contains(&block_size);
        let refuse = |reason| Err(Error::Config { device: "virtio-mem".to_owned(), reason });
        if !block_ok {
            return refuse("the block size must be a power of two from 2 MiB to 128 MiB");
        }
        if region_size == 0 || region_size > MAX_REGION || !region_size.is_multiple_of(block_size) {
            return refuse("the region must be one or more whole blocks, and at most 16 TiB");
        }
        if self.slot_size.is_some_and(|slot| !slot.is_power_of_two() || slot < self.smallest_chunk()) {
            return refuse(
                "the slot size must be a power of two from 128 MiB, and no less than a 128th of the region",
            );
        }
        if requested > region_size || !requested.is_multiple_of(block_size) {
            return refuse("what is requested must be whole blocks, and at most the region");
        }
        Ok(())
    }

    /// Bytes of a chunk.
    fn chunk_size(&self) -> u64 {
        self.slot_size.unwrap_or_else(|| self.smallest_chunk())
    }

    fn smallest_chunk(&self) -> u64 {
        (self.region_size.div_ceil(MAX_CHUNKS)).next_power_of_two().max(MIN_CHUNK)
    }
}

/// Host memory for chunks, from the machine that the device is plugged into.
struct Machine {
    mem: GuestMem,
    slots: Arc<dyn MemorySlots>,
}

impl ChunkSource for Machine {
    type Chunk = DeviceMemory;

    fn add(&self, gpa: u64, len: u64) -> io::Result<DeviceMemory> {
        // As shareable as the guest's other memory. Huge pages would have to be reserved here, and could run out.
        let backing = match self.mem.backing() {
            Backing::Anonymous | Backing::Image => Backing::Anonymous,
            _ => Backing::Memfd,
        };
        let builder = RegionBuilder::new(gpa, len).backing(backing).dirty_log(self.mem.logs_dirty());
        let region = builder.build().map_err(io::Error::other)?;
        DeviceMemory::insert(&self.mem, &*self.slots, region, false)
    }

    fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.mem.discard(gpa, len).map(drop).map_err(io::Error::other)
    }
}

/// What device, worker and handles share.
struct Shared {
    blocks: Mutex<Blocks<Machine>>,
    control: Mutex<Option<DeviceControl>>,
    /// Bytes of a chunk.
    slot_size: u64,
}

impl Shared {
    fn blocks(&self) -> MutexGuard<'_, Blocks<Machine>> {
        lock(&self.blocks)
    }
}

/// No state here is left half changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sizes of a [`Mem`] device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemStatus {
    /// What can be plugged at most.
    pub region_size: u64,
    /// A chunk: the unit in which memory comes from the host.
    pub slot_size: u64,
    /// A block: the unit in which the guest plugs.
    pub block_size: u64,
    /// What is plugged.
    pub plugged: u64,
    /// What was asked for.
    pub requested: u64,
}

/// The host's side of a [`Mem`] device: cheap to clone, to be used from any thread, at any time.
#[derive(Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
}

impl MemHandle {
    /// Asks the driver to have `bytes` plugged, a multiple of the block size. It plugs and unplugs what it can, in its own time:
    /// see [`plugged`](Self::plugged).
    ///
    /// # Errors
    /// [`Error::Config`] if `bytes` are not whole blocks or more than the region; nothing changes then.
    pub fn request(&self, bytes: u64) -> Result<()> {
        self.shared.blocks().request(bytes)?;
        if let Some(control) = &*lock(&self.shared.control) {
            control.config_changed();
        }
        Ok(())
    }

    /// Bytes asked for.
    pub fn requested(&self) -> u64 {
        self.shared.blocks().sizes().requested
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.shared.blocks().sizes().plugged
    }

    /// Bytes that can be plugged at most.
    pub fn region_size(&self) -> u64 {
        self.shared.blocks().sizes().region
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.shared.blocks().sizes().block
    }

    /// All sizes at one moment.
    pub fn status(&self) -> MemStatus {
        let sizes = self.shared.blocks().sizes();
        MemStatus {
            region_size: sizes.region,
            slot_size: self.shared.slot_size,
            block_size: sizes.block,
            plugged: sizes.plugged,
            requested: sizes.requested,
        }
    }

    /// Takes all memory away, as a reset of the whole machine does; the guest must not run. A reset by the driver alone leaves the
    /// memory as it is (5.15.5.2).
    pub fn system_reset(&self) {
        self.shared.blocks().unplug_all();
    }
}

impl std::fmt::Debug for MemHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemHandle").field("sizes", &self.shared.blocks().sizes()).finish()
    }
}

/// A virtio memory device.
pub struct Mem {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

impl Mem {
    /// A device as `config` says, with nothing plugged.
    ///
    /// # Errors
    /// [`Error::Config`] if sizes do not fit together.
    pub fn new(config: &MemConfig) -> Result<Self> {
        config.check()?;
        let info = DeviceInfo {
            device_type: DeviceType::MEM,
            features: feature::UNPLUGGED_INACCESSIBLE,
            queue_max_sizes: vec![config.queue_size],
            config_len: CONFIG_LEN,
        };
        let mut blocks = Blocks::new(config.region_size, config.block_size, config.chunk_size());
        blocks.request(config.requested)?;
        let shared =
            Shared { blocks: Mutex::new(blocks), control: Mutex::default(), slot_size: config.chunk_size() };
        Ok(Self { info, shared: Arc::new(shared) })
    }

    /// The host's side of the device.
    pub fn handle(&self) -> MemHandle {
        MemHandle { shared: Arc::clone(&self.shared) }
    }

    fn config_space(&self) -> [u8; CONFIG_LEN as usize] {
        let sizes = self.shared.blocks().sizes();
        // The node and its padding are 0: VIRTIO_MEM_F_ACPI_PXM is not offered.
        let node = 0;
        let fields =
            [sizes.block, node, sizes.base, sizes.region, sizes.usable, sizes.plugged, sizes.requested];
        let mut space = [0; CONFIG_LEN as usize];
        for (to, field) in space.chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        space
    }
}

impl std::fmt::Debug for Mem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mem").field("sizes", &self.shared.blocks().sizes()).finish_non_exhaustive()
    }
}

impl VirtioDevice for Mem {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn attach(&mut self, wiring: &mut dyn Wiring) -> freestone_bus::Result<()> {
        let slots = wiring.memory_slots().ok_or_else(|| freestone_bus::Error::Missing {
            what: "memory slots",
            device: "virtio-mem".to_owned(),
        })?;
        let mut blocks = self.shared.blocks();
        let base = wiring.alloc_memory(blocks.sizes().region, ALIGN)?;
        let mem = wiring.memory();
        let slack = if mem.size() < LARGE_RAM { SLACK } else { SLACK_LARGE };
        blocks.attach(base, slack, Machine { mem, slots });
        Ok(())
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = self.config_space();
        data.iter_mut().zip(space.iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        if !self.shared.blocks().is_attached() {
            let reason = "it was not plugged into a machine, so it has no addresses";
            return Err(Error::Config { device: "virtio-mem".to_owned(), reason });
        }
        let Resources { mem, queues, control, .. } = resources;
        *lock(&self.shared.control) = Some(control.clone());
        let workers = queues.into_iter().map(|queue| {
            let requests = Requests::new(Arc::clone(&self.shared));
            Box::new(QueueWorker::new(mem.clone(), queue, control.clone(), requests)) as Box<dyn Worker>
        });
        Ok(workers.collect())
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.save_state(state)
    }

    /// Memory is put where blocks are plugged; its contents come later, with those of all guest memory.
    fn restore(&mut self, _: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restore_state(state)
    }

    /// Plugged memory stays as it is (5.15.5.2): the next driver, such as a crash kernel, may want to read it.
    fn reset(&mut self) {
        *lock(&self.shared.control) = None;
    }
}

impl Drop for Mem {
    /// Handles may outlive the device; its memory does not.
    fn drop(&mut self) {
        self.shared.blocks().detach();
    }
}
