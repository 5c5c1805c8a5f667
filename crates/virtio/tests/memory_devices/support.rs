//! A machine with one device and its driver.

use std::os::unix::fs::FileExt;

use freestone_bus::Device;
use freestone_memory::{ByteValued, Bytes, GuestAddress, GuestMem, Region};
use freestone_snapshot::{Arch, Header, State};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::{VirtioDevice, VirtioMmioPlug};

pub const MIB: u64 = 1 << 20;
/// RAM of the machine.
pub const RAM: u64 = 32 * MIB;
/// Where requests are written.
pub const REQUEST: u64 = 2 * MIB;
/// Where answers are expected.
pub const ANSWER: u64 = 3 * MIB;
/// RAM that is free for tests, in MiB 16 to 31.
pub const FREE: u64 = 16 * MIB;

pub struct Rig {
    pub wiring: TestWiring,
    pub device: Box<dyn Device>,
    pub driver: MmioDriver,
    pub queues: Vec<DriverQueue>,
    pub mem: GuestMem,
}

impl Rig {
    /// A machine with `device`, whose driver is ready.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with(GuestMem::anonymous(RAM).unwrap(), device, u64::MAX)
    }

    pub fn with(mem: GuestMem, device: impl VirtioDevice + 'static, wanted: u64) -> Self {
        let mut wiring = TestWiring::new(mem.clone());
        let device = wiring.plug(VirtioMmioPlug::new(device, "test")).unwrap();
        let driver = MmioDriver::new(wiring.mmio_device(0).unwrap());
        let mut rig = Self { wiring, device, driver, queues: Vec::new(), mem };
        // So that requests do not change what is resident.
        rig.fill(REQUEST, 0x1000);
        rig.fill(ANSWER, 0x1000);
        rig.start(wanted);
        rig
    }

    /// Resets the device and starts it with those of its features that are in `wanted`.
    pub fn start(&mut self, wanted: u64) {
        self.driver.negotiate(wanted).unwrap();
        let mut arena = Arena::new(MIB, 2 * MIB);
        let count = self.driver.queue_count().unwrap();
        let setup = |index| self.driver.setup_queue(&self.mem, &mut arena, index, 64).unwrap();
        self.queues = (0..count).map(setup).collect();
        self.driver.driver_ok().unwrap();
        self.settle();
    }

    /// The device saves itself and goes on as `device` in another machine with the same memory.
    pub fn move_on(&mut self, device: impl VirtioDevice + 'static) {
        self.device.pause().unwrap();
        let mut state = State::new();
        self.device.save(&mut state.of("test")).unwrap();
        self.wiring = TestWiring::new(self.mem.clone());
        self.device = self.wiring.plug(VirtioMmioPlug::new(device, "test")).unwrap();
        self.driver = self.driver.follow(&self.wiring).unwrap();
        let header = Header::new(Arch::host(), "tests").unwrap();
        self.device.restore(&mut state.into_sections(header).of("test")).unwrap();
        self.device.resume().unwrap();
        self.settle();
    }

    pub fn settle(&self) {
        assert!(self.wiring.run_work(1000) < 1000, "the device never comes to rest");
    }

    /// Adds a request without telling the device.
    pub fn offer(&mut self, queue: usize, buffers: &[Buffer]) {
        self.queues[queue].add_chain(buffers).unwrap();
        self.queues[queue].publish().unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.driver.kick(u16::try_from(queue).unwrap()).unwrap();
        self.settle();
    }

    /// Lengths of the requests that the device has used since the last time.
    pub fn used(&mut self, queue: usize) -> Vec<u32> {
        std::iter::from_fn(|| self.queues[queue].used().unwrap()).map(|used| used.len).collect()
    }

    /// Carries out one request and returns the length that the device wrote.
    pub fn request(&mut self, queue: usize, buffers: &[Buffer]) -> u32 {
        self.offer(queue, buffers);
        self.kick(queue);
        let used = self.used(queue);
        assert_eq!(used.len(), 1, "one request, one completion");
        used[0]
    }

    pub fn needs_reset(&self) -> bool {
        self.driver.status().unwrap() & 64 != 0
    }

    pub fn write<T: ByteValued>(&self, gpa: u64, value: T) {
        self.mem.view().write_obj(value, GuestAddress(gpa)).unwrap();
    }

    pub fn read<T: ByteValued>(&self, gpa: u64) -> T {
        self.mem.view().read_obj(GuestAddress(gpa)).unwrap()
    }

    pub fn fill(&self, gpa: u64, len: u64) {
        self.mem.view().write_slice(&vec![1; usize::try_from(len).unwrap()], GuestAddress(gpa)).unwrap();
    }

    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.driver.device().write(0x100 + offset, data).unwrap();
    }

    pub fn config_u32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.driver.read_config(offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    /// Whether the device announced a change of its configuration since the last time.
    pub fn config_changed(&self) -> bool {
        self.driver.take_interrupt().unwrap() & 2 != 0
    }

    /// Pages of the RAM that the host keeps in memory.
    pub fn resident(&self) -> u64 {
        resident(&self.mem.regions()[0])
    }
}

/// Pages of a region that are in this process's memory, by `/proc/self/pagemap`.
pub fn resident(region: &Region) -> u64 {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; region.size() / 4096 * 8];
    pagemap.read_exact_at(&mut entries, region.as_ptr() as u64 / 4096 * 8).unwrap();
    entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count().try_into().unwrap()
}
