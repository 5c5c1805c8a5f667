//! Virtio on PCI, as its driver sees it.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod interrupts;
mod life;
mod registers;
mod storm;

use freestone_bus::{Device, Wiring};
use freestone_memory::GuestMem;
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{
    Arena, Buffer, DriverQueue, DriverTransport, PciDriver, PciPart, PciRegisters, VirtioDriver,
};
use freestone_virtio::{
    ChainBuffers, DeviceInfo, DeviceType, QueueWorker, RequestHandler, Resources, Result, VirtioDevice,
    VirtioPciPlug, Worker,
};

/// Fills what it is given; a device of any type with any number of queues.
struct Fill(DeviceInfo);

impl Fill {
    fn new(device_type: DeviceType, queues: usize) -> Self {
        Self(DeviceInfo { device_type, features: 0, queue_max_sizes: vec![16; queues], config_len: 10 })
    }
}

struct Filler;

impl RequestHandler for Filler {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> Result<u32> {
        buffers.write(&[0xaa])?;
        Ok(1)
    }
}

impl VirtioDevice for Fill {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.iter_mut().zip(offset..).for_each(|(to, at)| *to = at.to_le_bytes()[0]);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let Resources { mem, queues, control, .. } = resources;
        let worker = |queue| {
            let worker = QueueWorker::new(mem.clone(), queue, control.clone(), Filler);
            Box::new(worker.poll(std::time::Duration::ZERO)) as Box<dyn Worker>
        };
        Ok(queues.into_iter().map(worker).collect())
    }
}

const MEMORY: u64 = 1 << 20;

/// A machine with one device on PCI, and its driver.
struct Machine {
    wiring: TestWiring,
    device: Option<Box<dyn Device>>,
    driver: PciDriver,
    arena: Arena,
}

fn wiring() -> TestWiring {
    let mut wiring = TestWiring::new(GuestMem::anonymous(MEMORY).unwrap());
    PciRegisters::prepare(&mut wiring).unwrap();
    wiring
}

impl Machine {
    /// With a device of this many queues.
    fn new(queues: usize) -> Self {
        Self::on(wiring(), queues)
    }

    fn on(mut wiring: TestWiring, queues: usize) -> Self {
        let device = wiring.plug(VirtioPciPlug::new(Fill::new(DeviceType::RNG, queues), "fill")).unwrap();
        Self::with(wiring, device)
    }

    /// With a device that is plugged in already.
    fn with(wiring: TestWiring, device: Box<dyn Device>) -> Self {
        let driver = VirtioDriver::on(PciRegisters::find(&wiring).unwrap());
        Self { wiring, device: Some(device), driver, arena: Arena::new(0x1000, MEMORY) }
    }

    fn pci(&self) -> &PciRegisters {
        self.driver.transport()
    }

    /// Plays the driver up to DRIVER_OK.
    fn start(&mut self) -> Vec<DriverQueue> {
        self.arena = Arena::new(0x1000, MEMORY);
        let memory = self.wiring.memory();
        // No EVENT_IDX: every completion interrupts.
        self.driver.negotiate(0).unwrap();
        let count = self.driver.queue_count().unwrap();
        let set_up = |i| self.driver.setup_queue(&memory, &mut self.arena, i, 16).unwrap();
        let queues = (0..count).map(set_up).collect();
        self.driver.driver_ok().unwrap();
        queues
    }

    /// Sends a request, kicking with 16 bits as Linux does, and says whether it was answered.
    fn request(&self, queue: &mut DriverQueue, index: u16) -> bool {
        queue.add_chain(&[Buffer::writable(0x8_0000, 1)]).unwrap();
        queue.publish().unwrap();
        let notify = self.notify(index);
        let _unclaimed = self.wiring.guest_mmio_write(notify, &index.to_le_bytes());
        self.wiring.run_work(100);
        queue.used().unwrap().is_some()
    }

    /// Where queue `index` is notified, going by where the BAR is now.
    fn notify(&self, index: u16) -> u64 {
        let notify = PciPart { bar: 0, offset: 0x3000, len: 0 };
        let bar = u64::from(self.pci().config_read(0x10, 4).unwrap());
        bar + notify.offset + self.pci().notify_offset(index).unwrap_or(u64::from(index) * 4)
    }
}
