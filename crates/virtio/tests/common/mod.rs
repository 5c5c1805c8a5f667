//! The driver's side of a virtio-mmio device, for tests: registers, a split queue, and memory with holes in it.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(dead_code, reason = "no test file uses all of it")]

pub mod hand;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use freestone_block::{Engine, Image, IoQueue, SyncQueue};
use freestone_bus::{EventFd, IoDevice, Irq, ManualSpawner, Spawn};
use freestone_memory::layout::RamRange;
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemBuilder, MemorySlice};
use freestone_virtio::mmio::reg;
use freestone_virtio::transport::status;
use freestone_virtio::{Block, BlockConfig, MmioTransport, MmioWiring, QueueConfig, VirtioDevice, features};

/// Guest-physical address of the device's registers: not RAM.
pub const REGISTERS: u64 = 0x1000_0000;
/// RAM ends here, and goes on at [`RAM_AFTER_HOLE`].
pub const HOLE: u64 = 0x20_0000;
pub const RAM_AFTER_HOLE: u64 = 0x30_0000;
pub const RAM_END: u64 = 0x40_0000;
/// Two regions of RAM touch here.
pub const SEAM: u64 = 0x10_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Memory in three regions: two that touch, a hole, and one more.
pub fn memory() -> GuestMem {
    let range = |start, end| RamRange { start, len: end - start };
    GuestMemBuilder::with_ranges(vec![range(0, SEAM), range(SEAM, HOLE), range(RAM_AFTER_HOLE, RAM_END)])
        .dirty_log(true)
        .build()
        .unwrap()
}

/// Whether the driver here uses packed rings: in tests whose name says so, which run the tests of other files once more.
pub fn packed() -> bool {
    env!("CARGO_CRATE_NAME").ends_with("_packed")
}

/// What a driver that wants `wanted` accepts, in the format of this test.
pub fn in_format(wanted: u64) -> u64 {
    if packed() { wanted | features::RING_PACKED } else { wanted & !features::RING_PACKED }
}

const PACKED_AVAIL: u16 = 1 << 7;
const PACKED_USED: u16 = 1 << 15;

/// The driver's side of a queue in the format of this test.
#[derive(Debug, Clone)]
pub struct Ring {
    pub mem: GuestMem,
    pub config: QueueConfig,
    pub next_descriptor: u16,
    pub avail: u16,
    pub seen_used: u16,
    /// Descriptors of each chain in a packed ring, by its first, and the wrap counter of the next chain.
    pub lengths: std::collections::BTreeMap<u16, u16>,
    pub wrap: bool,
    pub used_wrap: bool,
    pub last: Vec<(u64, u32, bool)>,
}

impl Ring {
    /// A queue of `size` entries at its usual place.
    pub fn new(mem: &GuestMem, size: u16) -> Self {
        let config = QueueConfig { size, descriptors: 0x1000, driver: 0x1_2000, device: 0x1_4000 };
        Self::at(mem, config)
    }

    pub fn at(mem: &GuestMem, config: QueueConfig) -> Self {
        Self {
            mem: mem.clone(),
            config,
            next_descriptor: 0,
            avail: 0,
            seen_used: 0,
            lengths: Default::default(),
            wrap: true,
            used_wrap: true,
            last: Vec::new(),
        }
    }

    pub fn write<T: freestone_memory::ByteValued>(&self, addr: u64, value: T) {
        self.mem.view().write_obj(value, GuestAddress(addr)).unwrap();
    }

    pub fn read<T: freestone_memory::ByteValued>(&self, addr: u64) -> T {
        self.mem.view().read_obj(GuestAddress(addr)).unwrap()
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor_in(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.write(at, addr);
        self.write(at + 8, len);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    pub fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_in(self.config.descriptors, index, addr, len, flags, next);
    }

    /// Offers the chain at `head`; in a packed ring, the same buffers as the last time.
    pub fn offer(&mut self, head: u16) {
        if packed() {
            let buffers = self.last.clone();
            self.add(&buffers);
            return;
        }
        let slot = u64::from(self.avail % self.config.size);
        self.write(self.config.driver + 4 + 2 * slot, head);
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(self.avail);
    }

    pub fn set_avail(&self, index: u16) {
        self.write(self.config.driver + 2, index);
    }

    /// Makes a chain of buffers (address, length, device-writable) and offers it. Returns its head.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let size = self.config.size;
        let head = self.next_descriptor;
        if packed() {
            self.add_packed(head, buffers);
            return head;
        }
        for (i, &(addr, len, writable)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % size;
            let last = i + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if writable { WRITE } else { 0 };
            self.descriptor(index, addr, len, flags, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    /// Writes the chain backwards: its first descriptor makes it available. The id is the first descriptor's index.
    fn add_packed(&mut self, head: u16, buffers: &[(u64, u32, bool)]) {
        let size = self.config.size;
        let count = u16::try_from(buffers.len()).unwrap();
        for (i, &(addr, len, writable)) in (0..count).zip(buffers).rev() {
            let wrap = self.wrap ^ (head + i >= size);
            let whose = if wrap { PACKED_AVAIL } else { PACKED_USED };
            let flags = whose | if i + 1 < count { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.descriptor((head + i) % size, addr, len, head, flags);
        }
        self.wrap ^= head + count >= size;
        self.next_descriptor = (head + count) % size;
        self.lengths.insert(head, count);
        self.last = buffers.to_vec();
    }

    fn used_packed(&mut self) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        loop {
            let at = self.config.descriptors + 16 * u64::from(self.seen_used);
            let flags: u16 = self.read(at + 14);
            let whose = (flags & PACKED_AVAIL != 0, flags & PACKED_USED != 0);
            if whose != (self.used_wrap, self.used_wrap) {
                return used;
            }
            let id: u16 = self.read(at + 12);
            let len = if flags & WRITE != 0 { self.read(at + 8) } else { 0 };
            let next = self.seen_used + self.lengths.remove(&id).unwrap();
            self.used_wrap ^= next >= self.config.size;
            self.seen_used = next % self.config.size;
            used.push((u32::from(id), len));
        }
    }

    pub fn used_index(&self) -> u16 {
        self.read(self.config.device + 2)
    }

    /// Completions since the last call: head and length.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        if packed() {
            return self.used_packed();
        }
        let mut used = Vec::new();
        while self.seen_used != self.used_index() {
            let at = self.config.device + 4 + 8 * u64::from(self.seen_used % self.config.size);
            used.push((self.read(at), self.read(at + 4)));
            self.seen_used = self.seen_used.wrapping_add(1);
        }
        used
    }

    /// Where the driver says which completion it wants to hear of.
    pub fn set_used_event(&self, event: u16) {
        self.write(self.config.driver + 4 + 2 * u64::from(self.config.size), event);
    }

    /// Where the device says which request it wants to hear of.
    pub fn avail_event(&self) -> u16 {
        self.read(self.config.device + 4 + 8 * u64::from(self.config.size))
    }
}

/// A disk in memory that can be told to fail or to wait.
pub struct TestImage {
    pub data: Mutex<Vec<u8>>,
    /// Called at the beginning of every request.
    pub hook: Mutex<Option<Box<dyn Fn() + Send>>>,
    pub read_only: bool,
    pub fail: AtomicBool,
    pub flushes: AtomicUsize,
    /// Requests wait here while the mutex is held by the test.
    pub gate: Mutex<()>,
    pub entered: AtomicUsize,
}

impl TestImage {
    pub fn new(sectors: usize) -> Arc<Self> {
        Self::with(sectors, false)
    }

    pub fn with(sectors: usize, read_only: bool) -> Arc<Self> {
        let data = (0..sectors * 512).map(|i| u8::try_from(i / 512 % 251).unwrap()).collect();
        Arc::new(Self {
            data: Mutex::new(data),
            hook: Mutex::new(None),
            read_only,
            fail: AtomicBool::new(false),
            flushes: AtomicUsize::new(0),
            gate: Mutex::new(()),
            entered: AtomicUsize::new(0),
        })
    }

    pub fn set_hook(&self, hook: impl Fn() + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    fn enter(&self) -> io::Result<()> {
        self.entered.fetch_add(1, Ordering::SeqCst);
        drop(self.gate.lock().unwrap());
        if let Some(hook) = &*self.hook.lock().unwrap() {
            hook();
        }
        if self.fail.load(Ordering::SeqCst) { Err(io::Error::other("told to fail")) } else { Ok(()) }
    }
}

impl std::fmt::Debug for TestImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TestImage")
    }
}

impl Image for TestImage {
    fn size(&self) -> u64 {
        self.data.lock().unwrap().len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        self.enter()?;
        let data = self.data.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for buf in bufs {
            buf.copy_from(data.get(at..at + buf.len()).unwrap());
            at += buf.len();
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[MemorySlice<'_>], offset: u64) -> io::Result<()> {
        self.enter()?;
        let mut data = self.data.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for buf in bufs {
            buf.copy_to(data.get_mut(at..at + buf.len()).unwrap());
            at += buf.len();
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.enter()?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn open_queue(self: Arc<Self>, _engine: Engine, _depth: u16) -> io::Result<Box<dyn IoQueue>> {
        Ok(Box::new(SyncQueue::new(self)))
    }
}

/// A device behind registers, and its driver.
#[derive(Debug)]
pub struct Machine {
    pub mem: GuestMem,
    pub registers: Arc<MmioTransport>,
    pub spawner: ManualSpawner,
    pub interrupts: Arc<AtomicUsize>,
    pub ring: Ring,
}

/// Block devices that never spin: tests drive them by hand.
pub fn block(image: &Arc<TestImage>) -> Block {
    Block::new(image.clone(), BlockConfig::new().queue_size(64).serial("FREESTONE-0").poll(Duration::ZERO))
}

impl Machine {
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        let spawner = ManualSpawner::new();
        let driver: Arc<dyn Spawn> = Arc::new(spawner.clone());
        Self::on(device, driver, spawner)
    }

    pub fn on(device: impl VirtioDevice + 'static, driver: Arc<dyn Spawn>, spawner: ManualSpawner) -> Self {
        let mem = memory();
        let interrupts = Arc::new(AtomicUsize::new(0));
        let count = interrupts.clone();
        let irq = Irq::from_fn(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let wiring = MmioWiring { base: REGISTERS, mem: mem.clone(), irq, doorbells: None, spawner: driver };
        let registers = Arc::new(MmioTransport::new("test", Box::new(device), wiring).unwrap());
        let ring = Ring::new(&mem, 64);
        Self { mem, registers, spawner, interrupts, ring }
    }

    /// A block device on `image` whose driver is ready.
    pub fn started(image: &Arc<TestImage>) -> Self {
        let mut machine = Self::new(block(image));
        machine.start(u64::MAX);
        machine
    }

    pub fn read(&self, register: u64) -> u32 {
        let mut data = [0xff; 4];
        self.registers.read(register, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    pub fn write(&self, register: u64, value: u32) {
        self.registers.write(register, &value.to_le_bytes()).unwrap();
    }

    pub fn status(&self) -> u8 {
        u8::try_from(self.read(reg::STATUS)).unwrap()
    }

    pub fn set_status(&self, value: u8) {
        self.write(reg::STATUS, value.into());
    }

    pub fn needs_reset(&self) -> bool {
        self.status() & status::DEVICE_NEEDS_RESET != 0
    }

    pub fn device_features(&self) -> u64 {
        let half = |select| {
            self.write(reg::DEVICE_FEATURES_SEL, select);
            u64::from(self.read(reg::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub fn set_driver_features(&self, bits: u64) {
        for (select, bits) in [(0, bits & 0xffff_ffff), (1, bits >> 32)] {
            self.write(reg::DRIVER_FEATURES_SEL, select);
            self.write(reg::DRIVER_FEATURES, u32::try_from(bits).unwrap());
        }
    }

    /// Resets and goes up to FEATURES_OK with those of the offered features that are in `wanted`.
    pub fn negotiate(&self, wanted: u64) {
        self.set_status(0);
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.set_driver_features(self.device_features() & in_format(wanted) | features::VERSION_1);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert_eq!(self.status(), 0b1011);
    }

    /// Writes the registers of queue `index` and enables it.
    pub fn set_queue(&self, index: u32, config: QueueConfig) {
        let low = |v: u64| u32::try_from(v & 0xffff_ffff).unwrap();
        let high = |v: u64| u32::try_from(v >> 32).unwrap();
        self.write(reg::QUEUE_SEL, index);
        self.write(reg::QUEUE_NUM, config.size.into());
        self.write(reg::QUEUE_DESC_LOW, low(config.descriptors));
        self.write(reg::QUEUE_DESC_HIGH, high(config.descriptors));
        self.write(reg::QUEUE_DRIVER_LOW, low(config.driver));
        self.write(reg::QUEUE_DRIVER_HIGH, high(config.driver));
        self.write(reg::QUEUE_DEVICE_LOW, low(config.device));
        self.write(reg::QUEUE_DEVICE_HIGH, high(config.device));
        self.write(reg::QUEUE_READY, 1);
    }

    /// A full start with fresh rings and those of the offered features that are in `wanted`.
    pub fn start(&mut self, wanted: u64) {
        self.negotiate(wanted);
        self.ring = Ring::new(&self.mem, 64);
        self.mem.view().write_slice(&[0; 0x1000], GuestAddress(self.ring.config.descriptors)).unwrap();
        self.mem.view().write_slice(&[0; 0x1000], GuestAddress(self.ring.config.driver)).unwrap();
        self.mem.view().write_slice(&[0; 0x1000], GuestAddress(self.ring.config.device)).unwrap();
        if packed() {
            // The driver wants to hear of the first completion, as with a used event of 0 in split rings.
            self.ring.write(self.ring.config.driver, 2u32 << 16 | 1 << 15);
        }
        self.set_queue(0, self.ring.config);
        self.set_status(0b1111);
    }

    pub fn kick(&self) {
        self.write(reg::QUEUE_NOTIFY, 0);
    }

    /// Kicks and lets the device work until it is idle.
    pub fn run(&self) {
        self.kick();
        assert!(self.spawner.run(100_000) < 100_000, "the device never comes to rest");
    }

    /// Offers a block request with its header at 0x8000, status at 0x8010, and these data buffers.
    pub fn offer_block(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u16 {
        self.ring.write(0x8000, kind);
        self.ring.write(0x8008, sector);
        self.ring.write(0x8010, 0xffu8);
        let mut chain = vec![(0x8000, 16, false)];
        chain.extend(data);
        chain.push((0x8010, 1, true));
        self.ring.add(&chain)
    }

    /// Carries out one block request and returns its status and the length in the used ring.
    pub fn block_request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        let head = self.offer_block(kind, sector, data);
        self.run();
        let mut used = self.ring.used();
        // A request of an asynchronous engine takes its time.
        for _ in 0..10_000 {
            if !used.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
            self.run();
            used = self.ring.used();
        }
        assert_eq!(used.len(), 1, "one request, one completion");
        assert_eq!(used.first().unwrap().0, u32::from(head));
        (self.ring.read(0x8010), used.first().unwrap().1)
    }

    /// Asserts that the device gave up and is as good as new after a reset.
    pub fn assert_broken_until_reset(&mut self) {
        assert!(self.needs_reset(), "DEVICE_NEEDS_RESET is not set");
        assert_eq!(self.read(reg::INTERRUPT_STATUS) & 2, 2, "no configuration change notification");
        assert_eq!(self.spawner.run(100), self.spawner.len(), "a broken device rests");
        self.assert_works_after_reset();
    }

    /// Resets the device and reads the first sector.
    pub fn assert_works_after_reset(&mut self) {
        self.start(u64::MAX);
        assert_eq!(self.status(), 0b1111);
        assert_eq!(self.block_request(0, 0, &[(0x9000, 512, true)]), (0, 513));
    }
}

/// An eventfd's counter, without waiting.
pub fn counter(fd: &EventFd) -> u64 {
    fd.read().unwrap_or(0)
}
