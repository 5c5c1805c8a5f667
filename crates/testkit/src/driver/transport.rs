//! What a driver does the same way whatever the transport: find features, negotiate, set queues up, reset (virtio 1.2, section 3.1).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use freestone_bus::IoDevice;
use freestone_memory::GuestMem;

use super::{Arena, DriverQueue, QueuePart, features, status};
use crate::hostile::Source;
use crate::{Error, Result, TestWiring};

/// How often a reset is looked for: devices reset at once or when their work is stopped.
const RESET_POLLS: u32 = 1000;

/// The operations in which transports differ, from the driver's side.
///
/// None of them checks what a hostile test asks of it; an error means that the device refused the access itself.
pub trait DriverTransport: fmt::Debug + Sized {
    /// Gives the machine what devices of this transport need, before they are plugged in.
    ///
    /// # Errors
    /// If the machine does not take it.
    fn prepare(wiring: &mut TestWiring) -> Result<()> {
        let _ = wiring;
        Ok(())
    }

    /// Finds the first device of this transport in a machine and makes its registers reachable.
    ///
    /// # Errors
    /// [`Error::Protocol`] if there is none, or it is not as the specification says.
    fn find(wiring: &TestWiring) -> Result<Self>;

    /// Lets go of the device, which is about to end: it must not live on only because its driver knows it. Before the next access
    /// there is a [`follow`](Self::follow).
    fn let_go(&mut self) {}

    /// The same registers in front of a device that took this one's place in another machine. Nothing is written.
    ///
    /// # Errors
    /// [`Error::Protocol`] if there is none.
    fn follow(&self, wiring: &TestWiring) -> Result<Self>;

    /// Sets up again what [`find`](Self::find) set up, after a test has broken it.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    fn restore(&self) -> Result<()> {
        Ok(())
    }

    /// The driver is there: time to ask for configuration interrupts, which a reset took away.
    ///
    /// # Errors
    /// If the device refuses.
    fn enable_config_interrupt(&self) -> Result<()> {
        Ok(())
    }

    /// Checks that a virtio device is there and returns its device ID.
    ///
    /// # Errors
    /// [`Error::Protocol`] if it is something else.
    fn probe(&self) -> Result<u32>;

    /// 32 of the device's feature bits.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn device_features(&self, select: u32) -> Result<u32>;

    /// Writes 32 of the driver's feature bits.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn set_driver_features(&self, select: u32, bits: u32) -> Result<()>;

    /// The device status.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn status(&self) -> Result<u32>;

    /// Writes the device status.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn set_status(&self, value: u32) -> Result<()>;

    /// Size of queue `index`, the largest until another was set; 0 if the device has no such queue.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn queue_max(&self, index: u16) -> Result<u32>;

    /// Whether queue `index` is live.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn queue_is_live(&self, index: u16) -> Result<bool>;

    /// Sets the size of queue `index`.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn set_queue_size(&self, index: u16, size: u32) -> Result<()>;

    /// Sets where a part of queue `index` is.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn set_queue_address(&self, index: u16, part: QueuePart, gpa: u64) -> Result<()>;

    /// Makes queue `index` live.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn set_queue_live(&self, index: u16) -> Result<()>;

    /// Asks that queue `index` be live no more. A device may ignore that.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn set_queue_dead(&self, index: u16) -> Result<()>;

    /// Kicks a queue.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn kick(&self, queue: u16) -> Result<()>;

    /// Reads and acknowledges why the device interrupted: bit 0 used buffers, bit 1 configuration change.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn take_interrupt(&self) -> Result<u32>;

    /// A number that changes with the configuration space.
    ///
    /// # Errors
    /// [`Error::Register`].
    fn config_generation(&self) -> Result<u32>;

    /// The device's configuration space, for accesses of any width: registers, and which of their offsets it has.
    fn config_range(&self) -> Registers;

    /// All other registers, for accesses of any width.
    fn register_ranges(&self) -> Vec<Registers>;

    /// Writes something to a register, by an access that the device takes in principle.
    fn scribble(&self, source: &mut Source<'_>);
}

/// Registers of a device: what answers, and at which offsets.
pub type Registers = (Arc<dyn IoDevice>, Range<u64>);

/// Drives a device behind any transport.
#[derive(Debug, Clone)]
pub struct VirtioDriver<T> {
    pub(super) transport: T,
    negotiated: u64,
}

impl<T: DriverTransport> VirtioDriver<T> {
    /// A driver for the device behind `transport`.
    pub fn on(transport: T) -> Self {
        Self { transport, negotiated: 0 }
    }

    /// The same driver, as one that does not notice that its device is another: see [`DriverTransport::follow`].
    ///
    /// # Errors
    /// As [`DriverTransport::follow`].
    pub fn follow(&self, wiring: &TestWiring) -> Result<Self> {
        Ok(Self { transport: self.transport.follow(wiring)?, negotiated: self.negotiated })
    }

    /// As [`DriverTransport::let_go`].
    pub fn let_go(&mut self) {
        self.transport.let_go();
    }

    /// The transport, for what this driver does not do.
    pub fn transport(&self) -> &T {
        &self.transport
    }

    /// As [`DriverTransport::probe`].
    ///
    /// # Errors
    /// As [`DriverTransport::probe`].
    pub fn probe(&self) -> Result<u32> {
        self.transport.probe()
    }

    /// The device's feature bits.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn device_features(&self) -> Result<u64> {
        let low = self.transport.device_features(0)?;
        Ok(u64::from(low) | u64::from(self.transport.device_features(1)?) << 32)
    }

    /// Writes the driver's feature bits.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn set_driver_features(&self, bits: u64) -> Result<()> {
        let (low, high) = halves(bits);
        self.transport.set_driver_features(0, low)?;
        self.transport.set_driver_features(1, high)
    }

    /// The device status.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn status(&self) -> Result<u32> {
        self.transport.status()
    }

    /// Sets further bits of the device status.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn add_status(&self, bits: u32) -> Result<()> {
        self.transport.set_status(self.status()? | bits)
    }

    /// Resets the device and waits until it says so (2.4).
    ///
    /// # Errors
    /// [`Error::Protocol`] if the status does not become 0.
    pub fn reset(&mut self) -> Result<()> {
        self.negotiated = 0;
        self.transport.set_status(0)?;
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
        self.transport.enable_config_interrupt()?;
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

    /// As [`DriverTransport::queue_max`].
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn queue_max(&self, index: u16) -> Result<u32> {
        self.transport.queue_max(index)
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

    /// Lays queue `index` out in `arena` and makes it live, with `size` descriptors or the device's maximum if that is less.
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
            return Err(Error::protocol("queue", "3.1.1", format!("there is no queue {index}")));
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
        self.describe_queue(index, queue)?;
        self.transport.set_queue_live(index)?;
        if !self.transport.queue_is_live(index)? {
            return Err(Error::protocol("queue", "3.1.1", format!("queue {index} does not become live")));
        }
        Ok(())
    }

    /// Tells the device where `queue` is and does not make it live yet.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the queue is live already.
    pub fn describe_queue(&self, index: u16, queue: &DriverQueue) -> Result<()> {
        if self.transport.queue_is_live(index)? {
            return Err(Error::protocol("queue", "3.1.1", format!("queue {index} is live already")));
        }
        self.transport.set_queue_size(index, queue.size().into())?;
        self.transport.set_queue_address(index, QueuePart::Descriptors, queue.desc_addr())?;
        self.transport.set_queue_address(index, QueuePart::Driver, queue.avail_addr())?;
        self.transport.set_queue_address(index, QueuePart::Device, queue.used_addr())
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
        self.transport.kick(queue)
    }

    /// As [`DriverTransport::take_interrupt`].
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn take_interrupt(&self) -> Result<u32> {
        self.transport.take_interrupt()
    }

    /// Reads of the configuration space, of any length.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn read_config(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let (device, range) = self.transport.config_range();
        let (offset, len) = (range.start.saturating_add(offset), data.len());
        device.read(offset, data).map_err(|source| Error::Register { op: "read", offset, len, source })
    }

    /// Writes of the configuration space, of any length.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn write_config(&self, offset: u64, data: &[u8]) -> Result<()> {
        let (device, range) = self.transport.config_range();
        let (offset, len) = (range.start.saturating_add(offset), data.len());
        device.write(offset, data).map_err(|source| Error::Register { op: "write", offset, len, source })
    }

    /// Reads a little-endian number of the configuration space, by the accesses that 4.1.3.1 and 4.2.2.2 ask for: a 64-bit field
    /// in two halves, and again if the generation changed between them.
    ///
    /// # Errors
    /// [`Error::Register`]; [`Error::Protocol`] if the generation never rests.
    pub fn config_u64(&self, offset: u64) -> Result<u64> {
        for _ in 0..RESET_POLLS {
            let before = self.transport.config_generation()?;
            let (mut low, mut high) = ([0; 4], [0; 4]);
            self.read_config(offset, &mut low)?;
            self.read_config(offset + 4, &mut high)?;
            if self.transport.config_generation()? == before {
                return Ok(u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32);
            }
        }
        Err(Error::protocol("configuration generation", "2.5.1", "it changes with every read"))
    }
}

/// Low and high half.
pub(super) fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}
