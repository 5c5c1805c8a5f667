//! A virtio device of one's own, outside of the crate: it answers every text with the same text in capitals.
//!
//! One queue; a request is the text in device-readable buffers and room for the answer in device-writable ones. The only field
//! of the configuration space is `le32 max_len`: longer texts get an answer of no bytes.
//!
//! `cargo run -p freestone-virtio --example custom_device`

use std::error::Error;

use freestone_bus::Device;
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_snapshot::{Restoring, Saving};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::{
    ChainBuffers, DeviceInfo, DeviceType, QueueWorker, RequestHandler, Resources, VirtioDevice,
    VirtioMmioPlug, Worker,
};

/// The field of the configuration space: bytes of the longest text.
const MAX_LEN: u32 = 64;

/// What serves the requests. It has no thread, no register and no ring: those are the transport's and the worker's.
struct Capitals;

impl RequestHandler for Capitals {
    fn handle(&mut self, buffers: &mut ChainBuffers<'_>) -> freestone_virtio::Result<u32> {
        // Lengths are the driver's word: bound them before anything is allocated.
        let len = buffers.readable_len();
        if len > MAX_LEN || len > buffers.writable_len() {
            return Ok(0);
        }
        let mut text = vec![0; len as usize];
        buffers.read(&mut text)?;
        text.make_ascii_uppercase();
        buffers.write(&text)?;
        Ok(len)
    }
}

/// The device: what it is, its configuration space, and how its work begins.
struct CapitalsDevice(DeviceInfo);

impl CapitalsDevice {
    fn new() -> Self {
        let device_type = DeviceType(0x3f);
        Self(DeviceInfo { device_type, features: 0, queue_max_sizes: vec![64], config_len: 4 })
    }
}

impl VirtioDevice for CapitalsDevice {
    fn info(&self) -> &DeviceInfo {
        &self.0
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = MAX_LEN.to_le_bytes();
        data.iter_mut().zip(space.iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, resources: Resources) -> freestone_virtio::Result<Vec<Box<dyn Worker>>> {
        let Resources { mem, queues, control, .. } = resources;
        let worker = |queue| QueueWorker::new(mem.clone(), queue, control.clone(), Capitals);
        Ok(queues.into_iter().map(|queue| Box::new(worker(queue)) as Box<dyn Worker>).collect())
    }

    /// Nothing is remembered between two requests; queues and features are the transport's to save.
    fn save(&self, _state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        Ok(())
    }

    fn restore(&mut self, _features: u64, _state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        Ok(())
    }
}

/// A machine with the device, and its driver.
struct Guest {
    memory: GuestMem,
    machine: TestWiring,
    driver: MmioDriver,
    queue: DriverQueue,
    _device: Box<dyn Device>,
}

impl Guest {
    fn new() -> Result<Self, Box<dyn Error>> {
        let memory = GuestMem::anonymous(1 << 20)?;
        let mut machine = TestWiring::new(memory.clone());
        let device = machine.plug(VirtioMmioPlug::new(CapitalsDevice::new(), "capitals0"))?;
        let mut driver = MmioDriver::new(machine.mmio_device(0).ok_or("no registers")?);
        driver.negotiate(u64::MAX)?;
        let queue = driver.setup_queue(&memory, &mut Arena::new(0x1_0000, 1 << 20), 0, 16)?;
        driver.driver_ok()?;
        Ok(Self { memory, machine, driver, queue, _device: device })
    }

    /// Sends `text` through the device.
    fn say(&mut self, text: &str) -> Result<String, Box<dyn Error>> {
        self.memory.view().write_slice(text.as_bytes(), GuestAddress(0x1000))?;
        let len = u32::try_from(text.len())?;
        self.queue.add_chain(&[Buffer::readable(0x1000, len), Buffer::writable(0x2000, 4096)])?;
        self.queue.publish()?;
        self.driver.kick(0)?;
        self.machine.run_work(10);
        let mut answer = vec![0; self.queue.used()?.ok_or("no answer")?.len as usize];
        self.memory.view().read_slice(&mut answer, GuestAddress(0x2000))?;
        Ok(String::from_utf8(answer)?)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("{}", Guest::new()?.say("freestone")?);
    Ok(())
}

#[test]
fn texts_come_back_in_capitals_unless_they_are_longer_than_the_configuration_says() {
    let (mut guest, mut max_len) = (Guest::new().unwrap(), [0; 4]);
    assert_eq!(guest.say("from the guest").unwrap(), "FROM THE GUEST");
    guest.driver.read_config(0, &mut max_len).unwrap();
    assert_eq!(u32::from_le_bytes(max_len), MAX_LEN);
    assert_eq!(guest.say(&"x".repeat(65)).unwrap(), "");
}
