//! A device behind the virtio-mmio registers, from the driver's side (virtio 1.2, sections 3.1 and 4.2).

use std::fmt;
use std::sync::Arc;

use freestone_bus::{Access, AccessError, IoDevice};

use super::transport::halves;
use super::{DriverTransport, QueuePart, Registers, VirtioDriver};
use crate::hostile::Source;
use crate::{Error, Result, TestWiring};

/// Offsets of the registers (4.2.2, table 4.1).
pub mod regs {
    /// "virt".
    pub const MAGIC: u64 = 0x000;
    /// Version of the register layout: 2.
    pub const VERSION: u64 = 0x004;
    /// Kind of device; 0 for none.
    pub const DEVICE_ID: u64 = 0x008;
    /// Vendor.
    pub const VENDOR_ID: u64 = 0x00c;
    /// 32 of the device's feature bits.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Which 32.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// 32 of the driver's feature bits.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Which 32.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// Which queue the queue registers are about.
    pub const QUEUE_SEL: u64 = 0x030;
    /// Largest size of the queue; 0 if there is none.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// Size of the queue.
    pub const QUEUE_NUM: u64 = 0x038;
    /// The queue is live.
    pub const QUEUE_READY: u64 = 0x044;
    /// Kick.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Why the device interrupted.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// Clears bits of it.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// Device status.
    pub const STATUS: u64 = 0x070;
    /// Descriptor table, low half; the high half follows.
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    /// Avail ring.
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    /// Used ring.
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    /// Changes with the configuration space.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// First byte of the configuration space.
    pub const CONFIG: u64 = 0x100;
}

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// A virtio-mmio device, by its registers.
#[derive(Clone)]
pub struct MmioRegisters {
    device: Arc<dyn IoDevice>,
}

/// Drives a virtio-mmio device.
pub type MmioDriver = VirtioDriver<MmioRegisters>;

impl VirtioDriver<MmioRegisters> {
    /// A driver for the registers of `device`, at offset 0.
    pub fn new(device: Arc<dyn IoDevice>) -> Self {
        Self::on(MmioRegisters { device })
    }

    /// Reads a 32-bit register.
    ///
    /// # Errors
    /// [`Error::Register`] if the device refuses.
    pub fn read(&self, offset: u64) -> Result<u32> {
        self.transport.read(offset)
    }

    /// Writes a 32-bit register.
    ///
    /// # Errors
    /// [`Error::Register`] if the device refuses.
    pub fn write(&self, offset: u64, value: u32) -> Result<()> {
        self.transport.write(offset, value)
    }

    /// The registers themselves, for accesses of any width.
    pub fn device(&self) -> &Arc<dyn IoDevice> {
        &self.transport.device
    }
}

/// Stands for a device that was let go: its addresses answer no more.
struct Gone;

impl IoDevice for Gone {
    fn read(&self, _offset: u64, _data: &mut [u8]) -> Access {
        Err(AccessError::NoRegister)
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Access {
        Err(AccessError::NoRegister)
    }
}

impl MmioRegisters {
    fn read(&self, offset: u64) -> Result<u32> {
        let mut data = [0xff; 4];
        let read = self.device.read(offset, &mut data);
        read.map_err(|source| Error::Register { op: "read", offset, len: 4, source })?;
        Ok(u32::from_le_bytes(data))
    }

    fn write(&self, offset: u64, value: u32) -> Result<()> {
        let written = self.device.write(offset, &value.to_le_bytes());
        written.map_err(|source| Error::Register { op: "write", offset, len: 4, source })
    }

    fn select(&self, queue: u16) -> Result<()> {
        self.write(regs::QUEUE_SEL, queue.into())
    }
}

impl DriverTransport for MmioRegisters {
    fn find(wiring: &TestWiring) -> Result<Self> {
        let device = wiring.mmio_device(0);
        let missing = || Error::protocol("registers", "4.2.2", "no MMIO range was claimed");
        Ok(Self { device: device.ok_or_else(missing)? })
    }

    fn let_go(&mut self) {
        self.device = Arc::new(Gone);
    }

    fn follow(&self, wiring: &TestWiring) -> Result<Self> {
        Self::find(wiring)
    }

    /// A virtio-mmio device of version 2 is there.
    fn probe(&self) -> Result<u32> {
        let magic = self.read(regs::MAGIC)?;
        if magic != MAGIC {
            return Err(Error::protocol("magic value", "4.2.2.1", format!("{magic:#x}")));
        }
        let version = self.read(regs::VERSION)?;
        if version != 2 {
            return Err(Error::protocol("version", "4.2.2.1", format!("{version} and not 2")));
        }
        match self.read(regs::DEVICE_ID)? {
            0 => Err(Error::protocol("device ID", "4.2.2", "there is no device")),
            id => Ok(id),
        }
    }

    fn device_features(&self, select: u32) -> Result<u32> {
        self.write(regs::DEVICE_FEATURES_SEL, select)?;
        self.read(regs::DEVICE_FEATURES)
    }

    fn set_driver_features(&self, select: u32, bits: u32) -> Result<()> {
        self.write(regs::DRIVER_FEATURES_SEL, select)?;
        self.write(regs::DRIVER_FEATURES, bits)
    }

    fn status(&self) -> Result<u32> {
        self.read(regs::STATUS)
    }

    fn set_status(&self, value: u32) -> Result<()> {
        self.write(regs::STATUS, value)
    }

    fn queue_max(&self, index: u16) -> Result<u32> {
        self.select(index)?;
        self.read(regs::QUEUE_NUM_MAX)
    }

    fn queue_is_live(&self, index: u16) -> Result<bool> {
        self.select(index)?;
        Ok(self.read(regs::QUEUE_READY)? == 1)
    }

    fn set_queue_size(&self, index: u16, size: u32) -> Result<()> {
        self.select(index)?;
        self.write(regs::QUEUE_NUM, size)
    }

    fn set_queue_address(&self, index: u16, part: QueuePart, gpa: u64) -> Result<()> {
        self.select(index)?;
        let register = match part {
            QueuePart::Descriptors => regs::QUEUE_DESC_LOW,
            QueuePart::Driver => regs::QUEUE_DRIVER_LOW,
            QueuePart::Device => regs::QUEUE_DEVICE_LOW,
        };
        let (low, high) = halves(gpa);
        self.write(register, low)?;
        self.write(register + 4, high)
    }

    fn set_queue_live(&self, index: u16) -> Result<()> {
        self.select(index)?;
        self.write(regs::QUEUE_READY, 1)
    }

    fn set_queue_dead(&self, index: u16) -> Result<()> {
        self.select(index)?;
        self.write(regs::QUEUE_READY, 0)
    }

    fn kick(&self, queue: u16) -> Result<()> {
        self.write(regs::QUEUE_NOTIFY, queue.into())
    }

    fn take_interrupt(&self) -> Result<u32> {
        let why = self.read(regs::INTERRUPT_STATUS)?;
        if why != 0 {
            self.write(regs::INTERRUPT_ACK, why)?;
        }
        Ok(why)
    }

    fn config_generation(&self) -> Result<u32> {
        self.read(regs::CONFIG_GENERATION)
    }

    fn config_range(&self) -> Registers {
        (Arc::clone(&self.device), regs::CONFIG..0x1100)
    }

    fn register_ranges(&self) -> Vec<Registers> {
        vec![(Arc::clone(&self.device), 0..regs::CONFIG)]
    }

    fn scribble(&self, source: &mut Source<'_>) {
        let offset = source.below(0x40) * 4;
        let value = if source.below(2) == 0 { source.next_u32() } else { source.next_u32() & 0xff };
        // Refusing is as good as taking.
        let _refused = self.write(offset, value).and_then(|()| self.read(offset));
    }
}

impl fmt::Debug for MmioRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MmioRegisters")
    }
}
