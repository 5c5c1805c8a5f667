//! A device behind the virtio-mmio registers, from the driver's side (virtio 1.2, sections 3.1 and 4.2).

use std::fmt;
use std::sync::Arc;

use freestone_bus::IoDevice;
use freestone_memory::GuestMem;

use super::{Arena, DriverQueue, features};
use crate::{Error, Result};

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

/// Bits of the device status (2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u32 = 4;
    /// The features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on before a reset.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// How often a reset is looked for: devices reset at once or when their work is stopped.
const RESET_POLLS: u32 = 1000;

/// Drives a virtio-mmio device by its registers.
#[derive(Clone)]
pub struct MmioDriver {
    device: Arc<dyn IoDevice>,
    negotiated: u64,
}

impl MmioDriver {
    /// A driver for the registers of `device`, at offset 0.
    pub fn new(device: Arc<dyn IoDevice>) -> Self {
        Self { device, negotiated: 0 }
    }

    /// Reads a 32-bit register.
    ///
    /// # Errors
    /// [`Error::Register`] if the device refuses.
    pub fn read(&self, offset: u64) -> Result<u32> {
        let mut data = [0xff; 4];
        let read = self.device.read(offset, &mut data);
        read.map_err(|source| Error::Register { op: "read", offset, len: 4, source })?;
        Ok(u32::from_le_bytes(data))
    }

    /// Writes a 32-bit register.
    ///
    /// # Errors
    /// [`Error::Register`] if the device refuses.
    pub fn write(&self, offset: u64, value: u32) -> Result<()> {
        let written = self.device.write(offset, &value.to_le_bytes());
        written.map_err(|source| Error::Register { op: "write", offset, len: 4, source })
    }

    /// The registers themselves, for accesses of any width.
    pub fn device(&self) -> &Arc<dyn IoDevice> {
        &self.device
    }

    /// Checks that a virtio-mmio device of version 2 is there and returns its device ID.
    ///
    /// # Errors
    /// [`Error::Protocol`] if it is something else.
    pub fn probe(&self) -> Result<u32> {
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

    /// The device's feature bits.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn device_features(&self) -> Result<u64> {
        let mut bits = 0;
        for half in [0, 1] {
            self.write(regs::DEVICE_FEATURES_SEL, half)?;
            bits |= u64::from(self.read(regs::DEVICE_FEATURES)?) << (32 * half);
        }
        Ok(bits)
    }

    /// Writes the driver's feature bits.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn set_driver_features(&self, bits: u64) -> Result<()> {
        let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
        for (half, value) in [(0, [a, b, c, d]), (1, [e, f, g, h])] {
            self.write(regs::DRIVER_FEATURES_SEL, half)?;
            self.write(regs::DRIVER_FEATURES, u32::from_le_bytes(value))?;
        }
        Ok(())
    }

    /// The device status.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn status(&self) -> Result<u32> {
        self.read(regs::STATUS)
    }

    /// Sets further bits of the device status.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn add_status(&self, bits: u32) -> Result<()> {
        self.write(regs::STATUS, self.status()? | bits)
    }

    /// Resets the device and waits until it says so (2.4).
    ///
    /// # Errors
    /// [`Error::Protocol`] if the status does not become 0.
    pub fn reset(&mut self) -> Result<()> {
        self.negotiated = 0;
        self.write(regs::STATUS, 0)?;
        for _ in 0..RESET_POLLS {
            if self.status()? == 0 {
                return Ok(());
            }
        }
        Err(Error::protocol("reset", "2.4", format!("the status stays {:#x}", self.status()?)))
    }

    /// Steps 1 to 6 of the initialization (3.1.1): reset, find the driver, agree on those of `wanted` that the device has.
    /// Returns them.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the device does not keep FEATURES_OK.
    pub fn negotiate(&mut self, wanted: u64) -> Result<u64> {
        self.reset()?;
        self.add_status(status::ACKNOWLEDGE)?;
        self.add_status(status::DRIVER)?;
        let bits = self.device_features()? & (wanted | features::VERSION_1);
        self.set_driver_features(bits)?;
        self.add_status(status::FEATURES_OK)?;
        if self.status()? & status::FEATURES_OK == 0 {
            let detail = format!("the device refuses its own features {bits:#x}");
            return Err(Error::protocol("feature negotiation", "3.1.1", detail));
        }
        self.negotiated = bits;
        Ok(bits)
    }

    /// The features agreed on.
    pub fn negotiated(&self) -> u64 {
        self.negotiated
    }

    /// Largest size of queue `index`; 0 if the device has no such queue.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn queue_max(&self, index: u16) -> Result<u32> {
        self.write(regs::QUEUE_SEL, index.into())?;
        self.read(regs::QUEUE_NUM_MAX)
    }

    /// Number of queues: the first that does not exist ends them.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn queue_count(&self) -> Result<u16> {
        let mut n = 0;
        while n < 64 && self.queue_max(n)? != 0 {
            n += 1;
        }
        Ok(n)
    }

    /// Lays queue `index` out in `arena` and makes it live (4.2.3.2), with `size` descriptors or the device's maximum if that
    /// is less.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the queue does not exist, is live already or does not become live.
    pub fn setup_queue(
        &self,
        mem: &GuestMem,
        arena: &mut Arena,
        index: u16,
        size: u16,
    ) -> Result<DriverQueue> {
        let max = self.queue_max(index)?;
        if max == 0 {
            return Err(Error::protocol("queue", "4.2.3.2", format!("there is no queue {index}")));
        }
        let size = u16::try_from(max).unwrap_or(u16::MAX).min(size);
        let queue = DriverQueue::negotiated(mem, arena, size, self.negotiated)?;
        self.enable_queue(index, &queue)?;
        Ok(queue)
    }

    /// Tells the device where `queue` is and makes it live.
    ///
    /// # Errors
    /// As [`setup_queue`](Self::setup_queue).
    pub fn enable_queue(&self, index: u16, queue: &DriverQueue) -> Result<()> {
        self.write(regs::QUEUE_SEL, index.into())?;
        if self.read(regs::QUEUE_READY)? != 0 {
            return Err(Error::protocol("queue", "4.2.3.2", format!("queue {index} is live already")));
        }
        self.write(regs::QUEUE_NUM, queue.size().into())?;
        let parts = [
            (regs::QUEUE_DESC_LOW, queue.desc_addr()),
            (regs::QUEUE_DRIVER_LOW, queue.avail_addr()),
            (regs::QUEUE_DEVICE_LOW, queue.used_addr()),
        ];
        for (register, gpa) in parts {
            let [a, b, c, d, e, f, g, h] = gpa.to_le_bytes();
            self.write(register, u32::from_le_bytes([a, b, c, d]))?;
            self.write(register + 4, u32::from_le_bytes([e, f, g, h]))?;
        }
        self.write(regs::QUEUE_READY, 1)?;
        if self.read(regs::QUEUE_READY)? != 1 {
            return Err(Error::protocol("queue", "4.2.3.2", format!("queue {index} does not become live")));
        }
        Ok(())
    }

    /// The last step of the initialization: the device may work.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the device does not take it.
    pub fn driver_ok(&self) -> Result<()> {
        self.add_status(status::DRIVER_OK)?;
        let now = self.status()?;
        if now & (status::DRIVER_OK | status::NEEDS_RESET) != status::DRIVER_OK {
            return Err(Error::protocol("DRIVER_OK", "3.1.1", format!("the status is {now:#x}")));
        }
        Ok(())
    }

    /// Kicks a queue.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn kick(&self, queue: u16) -> Result<()> {
        self.write(regs::QUEUE_NOTIFY, queue.into())
    }

    /// Reads and acknowledges why the device interrupted: bit 0 used buffers, bit 1 configuration change.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn take_interrupt(&self) -> Result<u32> {
        let why = self.read(regs::INTERRUPT_STATUS)?;
        if why != 0 {
            self.write(regs::INTERRUPT_ACK, why)?;
        }
        Ok(why)
    }

    /// Reads of the configuration space, of any length.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn read_config(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let (offset, len) = (regs::CONFIG + offset, data.len());
        self.device.read(offset, data).map_err(|source| Error::Register { op: "read", offset, len, source })
    }

    /// Reads a little-endian number of the configuration space, by the accesses that 4.2.2.2 asks for: a 64-bit field in two
    /// halves, and again if the generation changed between them.
    ///
    /// # Errors
    /// [`Error::Register`]; [`Error::Protocol`] if the generation never rests.
    pub fn config_u64(&self, offset: u64) -> Result<u64> {
        for _ in 0..RESET_POLLS {
            let before = self.read(regs::CONFIG_GENERATION)?;
            let low = self.read(regs::CONFIG + offset)?;
            let high = self.read(regs::CONFIG + offset + 4)?;
            if self.read(regs::CONFIG_GENERATION)? == before {
                return Ok(u64::from(low) | u64::from(high) << 32);
            }
        }
        Err(Error::protocol("configuration generation", "2.5.1", "it changes with every read"))
    }
}

impl fmt::Debug for MmioDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioDriver").field("negotiated", &self.negotiated).finish_non_exhaustive()
    }
}
