//! A virtio device on PCI, from the driver's side (virtio 1.2, section 4.1; PCI 3.0, sections 6.2 and 6.8).

mod config;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use config::Config;
use freestone_bus::pci::{PciAddress, PciSegment};
use freestone_bus::{Access, AccessError, Bus, IoDevice, MsiMessage, Wiring};
use freestone_memory::layout::{PCI_MMIO_END, PCI_MMIO_START};

use super::transport::halves;
use super::{DriverTransport, QueuePart, Registers, VirtioDriver};
use crate::hostile::Source;
use crate::{Error, Result, TestWiring};

/// Offsets of the common configuration (4.1.4.3).
pub mod common {
    /// Which 32 of the device's feature bits; 32 bits.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// 32 of the device's feature bits.
    pub const DEVICE_FEATURE: u64 = 4;
    /// Which 32 of the driver's feature bits; 32 bits.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// 32 of the driver's feature bits.
    pub const DRIVER_FEATURE: u64 = 12;
    /// Vector of configuration changes; 16 bits.
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    /// Number of queues; 16 bits.
    pub const NUM_QUEUES: u64 = 18;
    /// Device status; 8 bits.
    pub const DEVICE_STATUS: u64 = 20;
    /// Changes with the configuration space; 8 bits.
    pub const CONFIG_GENERATION: u64 = 21;
    /// Which queue the registers from here on are about; 16 bits.
    pub const QUEUE_SELECT: u64 = 22;
    /// Size of the queue; 16 bits.
    pub const QUEUE_SIZE: u64 = 24;
    /// Vector of the queue; 16 bits.
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    /// The queue is live; 16 bits.
    pub const QUEUE_ENABLE: u64 = 28;
    /// Where the queue is notified, in units of the multiplier; 16 bits.
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// Descriptor area; 64 bits.
    pub const QUEUE_DESC: u64 = 32;
    /// Driver area; 64 bits.
    pub const QUEUE_DRIVER: u64 = 40;
    /// Device area; 64 bits.
    pub const QUEUE_DEVICE: u64 = 48;
    /// Length of what every device has.
    pub const LEN: u64 = 56;
}

/// Section of the specification that says what is found where.
const SECTION: &str = "4.1";
const VENDOR: u32 = 0x1af4;
const DEVICE_BASE: u32 = 0x1040;
/// There is no vector (4.1.5.1.2).
const NO_VECTOR: u32 = 0xffff;
/// Capabilities that fit into a configuration space.
const MAX_CAPABILITIES: usize = 48;
const CAP_VENDOR: u32 = 0x09;
const CAP_MSIX: u32 = 0x11;
/// Command register: memory accesses, and mastering the bus.
const COMMAND: u16 = 0x04;
const COMMAND_ON: u32 = 0x6;
const MSIX_ENABLE: u32 = 0x8000;

/// Registers in a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciPart {
    /// Number of the BAR.
    pub bar: u8,
    /// Offset there.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Functions and the addresses that their registers are at, as a driver reaches them.
#[derive(Clone)]
pub struct PciRegisters {
    segment: Arc<PciSegment>,
    bus: Bus,
    address: PciAddress,
    /// Address and length of each BAR.
    bars: [Option<(u64, u64)>; 6],
    capabilities: Vec<(u16, u32)>,
    common: PciPart,
    notify: PciPart,
    multiplier: u64,
    isr: PciPart,
    config: Option<PciPart>,
    window: u16,
    /// Offset of the MSI-X capability, number of vectors, table and pending bits.
    msix: (u16, u16, PciPart, PciPart),
}

/// Drives a virtio device on PCI.
pub type PciDriver = VirtioDriver<PciRegisters>;

fn missing(what: &'static str) -> impl FnOnce() -> Error {
    move || Error::protocol(what, SECTION, "there is none")
}

impl PciRegisters {
    /// Finds the virtio function at `address`.
    ///
    /// # Errors
    /// [`Error::Protocol`] if there is none, or it lacks what the specification asks of it.
    pub fn at(wiring: &TestWiring, address: PciAddress) -> Result<Self> {
        let segment = wiring.pci().ok_or_else(missing("PCI segment"))?;
        let config = Config(segment.function(address).ok_or_else(missing("PCI function"))?);
        let capabilities = config.capabilities()?;
        let mut bars = [None; 6];
        let mut skip = false;
        for (index, bar) in (0..).zip(&mut bars) {
            *bar = config.bar(index).filter(|_| !skip);
            skip = bar.is_some() && config.read(0x10 + 4 * u16::from(index), 4) & 0b110 == 0b100;
        }
        let virtio = |kind| {
            let vendor = capabilities.iter().filter(|(_, id)| *id == CAP_VENDOR);
            vendor.map(|&(at, _)| (at, config.virtio(at))).find(|(_, (found, _))| *found == kind)
        };
        let part = |kind, name| virtio(kind).map(|(_, (_, part))| part).ok_or_else(missing(name));
        let (notify_at, _) = virtio(2).ok_or_else(missing("notification capability"))?;
        let msix = capabilities.iter().find(|(_, id)| *id == CAP_MSIX).ok_or_else(missing("MSI-X"))?;
        let registers = Self {
            common: part(1, "common configuration")?,
            notify: part(2, "notification capability")?,
            multiplier: config.read(notify_at + 16, 4).into(),
            isr: part(3, "interrupt status")?,
            config: part(4, "device configuration").ok(),
            window: virtio(5).ok_or_else(missing("configuration access capability"))?.0,
            msix: config.msix(msix.0),
            bus: wiring.mmio_bus().clone(),
            segment,
            address,
            bars,
            capabilities,
        };
        registers.restore()?;
        Ok(registers)
    }

    /// Where the function is.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// The address space of the BARs.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Address and length of each BAR, as they were found.
    pub fn bars(&self) -> &[Option<(u64, u64)>; 6] {
        &self.bars
    }

    /// Offset and ID of each capability, in the order of the list.
    pub fn capabilities(&self) -> &[(u16, u32)] {
        &self.capabilities
    }

    /// What capabilities of virtio point to, and the MSI-X table and pending bits.
    pub fn parts(&self) -> Vec<PciPart> {
        let (_, _, table, pending) = self.msix;
        [self.common, self.notify, self.isr, table, pending].into_iter().chain(self.config).collect()
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.msix.1
    }

    /// Reads configuration space: 1, 2 or 4 bytes.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the function has gone.
    pub fn config_read(&self, offset: u16, width: usize) -> Result<u32> {
        Ok(self.function()?.read(offset, width))
    }

    /// Writes configuration space: 1, 2 or 4 bytes.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the function has gone.
    pub fn config_write(&self, offset: u16, width: usize, value: u32) -> Result<()> {
        self.function()?.write(offset, width, value);
        Ok(())
    }

    /// Points BAR `index` at `gpa`.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the function has gone.
    pub fn move_bar(&self, index: u8, gpa: u64) -> Result<()> {
        let (low, high) = halves(gpa);
        let register = 0x10 + 4 * u16::from(index);
        self.config_write(register, 4, low)?;
        if self.config_read(register, 4)? & 0b110 == 0b100 {
            self.config_write(register + 4, 4, high)?;
        }
        Ok(())
    }

    /// The message that [`restore`](DriverTransport::restore) gives to `vector`.
    pub fn message(&self, vector: u16) -> MsiMessage {
        let device = u64::from(self.address.device);
        MsiMessage { address: 0xfee0_0000 | device << 12, data: 0x20 + u32::from(vector) }
    }

    /// Masks or unmasks `vector`.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn mask_vector(&self, vector: u16, masked: bool) -> Result<()> {
        let (_, _, table, _) = self.msix;
        self.write(table, u64::from(vector) * 16 + 12, 4, masked.into())
    }

    /// Whether the interrupt of `vector` waits.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn is_pending(&self, vector: u16) -> Result<bool> {
        let (_, _, _, pending) = self.msix;
        let word = self.read(pending, u64::from(vector / 32) * 4, 4)?;
        Ok(word >> (vector % 32) & 1 != 0)
    }

    /// Writes the MSI-X message control: enable and function mask.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the function has gone.
    pub fn set_msix(&self, enabled: bool, masked: bool) -> Result<()> {
        let value = u32::from(enabled) << 15 | u32::from(masked) << 14;
        self.config_write(self.msix.0 + 2, 2, value)
    }

    /// Maps the event of a queue, or of configuration changes, to a vector; returns what the device then says it is mapped to.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn set_vector(&self, queue: Option<u16>, vector: u16) -> Result<u32> {
        let register = match queue {
            Some(queue) => {
                self.select(queue)?;
                common::QUEUE_MSIX_VECTOR
            }
            None => common::CONFIG_MSIX_VECTOR,
        };
        self.write(self.common, register, 2, vector.into())?;
        self.read(self.common, register, 2)
    }

    /// Reads a field of the common configuration.
    ///
    /// # Errors
    /// [`Error::Register`] if the device refuses.
    pub fn common_read(&self, offset: u64, width: usize) -> Result<u32> {
        self.read(self.common, offset, width)
    }

    /// Writes a field of the common configuration.
    ///
    /// # Errors
    /// [`Error::Register`] if the device refuses.
    pub fn common_write(&self, offset: u64, width: usize, value: u32) -> Result<()> {
        self.write(self.common, offset, width, value)
    }

    /// Reads a BAR through configuration space (4.1.4.9).
    ///
    /// # Errors
    /// [`Error::Protocol`] if the function has gone.
    pub fn window_read(&self, bar: u8, offset: u32, width: u32) -> Result<u32> {
        self.aim_window(bar, offset, width)?;
        self.config_read(self.window + 16, usize::try_from(width).unwrap_or(4))
    }

    /// Writes a BAR through configuration space (4.1.4.9).
    ///
    /// # Errors
    /// [`Error::Protocol`] if the function has gone.
    pub fn window_write(&self, bar: u8, offset: u32, width: u32, value: u32) -> Result<()> {
        self.aim_window(bar, offset, width)?;
        self.config_write(self.window + 16, usize::try_from(width).unwrap_or(4), value)
    }

    fn aim_window(&self, bar: u8, offset: u32, width: u32) -> Result<()> {
        self.config_write(self.window + 4, 1, bar.into())?;
        self.config_write(self.window + 8, 4, offset)?;
        self.config_write(self.window + 12, 4, width)
    }

    /// Where `part` is in the guest-physical address space.
    pub fn gpa(&self, part: PciPart) -> u64 {
        let bar = self.bars.get(usize::from(part.bar)).copied().flatten();
        bar.map_or(u64::MAX, |(base, _)| base.saturating_add(part.offset))
    }

    /// The common configuration.
    pub fn common(&self) -> PciPart {
        self.common
    }

    /// Where queue `index` is notified: the offset in the notifications.
    ///
    /// # Errors
    /// [`Error::Register`].
    pub fn notify_offset(&self, index: u16) -> Result<u64> {
        self.select(index)?;
        Ok(u64::from(self.read(self.common, common::QUEUE_NOTIFY_OFF, 2)?) * self.multiplier)
    }

    fn function(&self) -> Result<Config> {
        Ok(Config(self.segment.function(self.address).ok_or_else(missing("PCI function"))?))
    }

    fn read(&self, part: PciPart, offset: u64, width: usize) -> Result<u32> {
        let mut data = [0; 4];
        let bytes = data.get_mut(..width).unwrap_or_default();
        let read = self.bus.view().read(self.gpa(part).saturating_add(offset), bytes);
        read.map_err(|source| Error::Register { op: "read", offset, len: width, source })?;
        Ok(u32::from_le_bytes(data))
    }

    fn write(&self, part: PciPart, offset: u64, width: usize, value: u32) -> Result<()> {
        let data = value.to_le_bytes();
        let data = data.get(..width).unwrap_or_default();
        let written = self.bus.view().write(self.gpa(part).saturating_add(offset), data);
        written.map_err(|source| Error::Register { op: "write", offset, len: width, source })
    }

    fn select(&self, queue: u16) -> Result<()> {
        self.write(self.common, common::QUEUE_SELECT, 2, queue.into())
    }

    /// `range` of `part`, as registers on the bus.
    fn registers(&self, part: PciPart, range: Range<u64>) -> Registers {
        (Arc::new(OnBus { bus: self.bus.clone(), base: self.gpa(part) }), range)
    }
}

impl DriverTransport for PciRegisters {
    /// A segment, if no root was plugged in.
    fn prepare(wiring: &mut TestWiring) -> Result<()> {
        if wiring.pci().is_none() {
            let window = (PCI_MMIO_START, PCI_MMIO_END - PCI_MMIO_START);
            let segment = PciSegment::new(wiring.mmio_bus().clone(), window);
            wiring.provide_pci(Arc::new(segment)).map_err(Error::Plug)?;
        }
        Ok(())
    }

    fn find(wiring: &TestWiring) -> Result<Self> {
        let segment = wiring.pci().ok_or_else(missing("PCI segment"))?;
        let is_virtio = |address: &PciAddress| {
            segment.function(*address).is_some_and(|function| Config(function).read(0, 2) == VENDOR)
        };
        let address = segment.addresses().into_iter().find(is_virtio);
        Self::at(wiring, address.ok_or_else(missing("virtio function"))?)
    }

    fn follow(&self, wiring: &TestWiring) -> Result<Self> {
        let segment = wiring.pci().ok_or_else(missing("PCI segment"))?;
        segment.function(self.address).ok_or_else(missing("PCI function"))?;
        Ok(Self { segment, bus: wiring.mmio_bus().clone(), ..self.clone() })
    }

    /// BARs where they were found, decoded; every vector with a message of its own, unmasked.
    fn restore(&self) -> Result<()> {
        self.config_write(COMMAND, 2, 0)?;
        for (index, bar) in (0..).zip(self.bars) {
            if let Some((base, _)) = bar {
                self.move_bar(index, base)?;
            }
        }
        self.config_write(COMMAND, 2, COMMAND_ON)?;
        let (at, vectors, table, _) = self.msix;
        self.config_write(at + 2, 2, 0)?;
        for vector in 0..vectors {
            let message = self.message(vector);
            let (low, high) = halves(message.address);
            let entry = [low, high, message.data, 0];
            for (offset, value) in (u64::from(vector) * 16..).step_by(4).zip(entry) {
                self.write(table, offset, 4, value)?;
            }
        }
        self.config_write(at + 2, 2, MSIX_ENABLE)
    }

    fn enable_config_interrupt(&self) -> Result<()> {
        match self.set_vector(None, 0)? {
            0 => Ok(()),
            other => {
                Err(Error::protocol("configuration vector", "4.1.5.1.2", format!("{other:#x} and not 0")))
            }
        }
    }

    /// A modern virtio device is there.
    fn probe(&self) -> Result<u32> {
        let (vendor, device) = (self.config_read(0, 2)?, self.config_read(2, 2)?);
        if vendor != VENDOR || !(DEVICE_BASE + 1..=DEVICE_BASE + 0x3f).contains(&device) {
            return Err(Error::protocol("device ID", "4.1.2", format!("{vendor:04x}:{device:04x}")));
        }
        Ok(device - DEVICE_BASE)
    }

    fn device_features(&self, select: u32) -> Result<u32> {
        self.write(self.common, common::DEVICE_FEATURE_SELECT, 4, select)?;
        self.read(self.common, common::DEVICE_FEATURE, 4)
    }

    fn set_driver_features(&self, select: u32, bits: u32) -> Result<()> {
        self.write(self.common, common::DRIVER_FEATURE_SELECT, 4, select)?;
        self.write(self.common, common::DRIVER_FEATURE, 4, bits)
    }

    fn status(&self) -> Result<u32> {
        self.read(self.common, common::DEVICE_STATUS, 1)
    }

    fn set_status(&self, value: u32) -> Result<()> {
        self.write(self.common, common::DEVICE_STATUS, 1, value)
    }

    fn queue_max(&self, index: u16) -> Result<u32> {
        self.select(index)?;
        self.read(self.common, common::QUEUE_SIZE, 2)
    }

    fn queue_is_live(&self, index: u16) -> Result<bool> {
        self.select(index)?;
        Ok(self.read(self.common, common::QUEUE_ENABLE, 2)? == 1)
    }

    /// What does not fit is written as 0xffff.
    fn set_queue_size(&self, index: u16, size: u32) -> Result<()> {
        self.select(index)?;
        self.write(self.common, common::QUEUE_SIZE, 2, size.min(0xffff))
    }

    fn set_queue_address(&self, index: u16, part: QueuePart, gpa: u64) -> Result<()> {
        self.select(index)?;
        let register = match part {
            QueuePart::Descriptors => common::QUEUE_DESC,
            QueuePart::Driver => common::QUEUE_DRIVER,
            QueuePart::Device => common::QUEUE_DEVICE,
        };
        let (low, high) = halves(gpa);
        self.write(self.common, register, 4, low)?;
        self.write(self.common, register + 4, 4, high)
    }

    /// With a vector of its own, if there are as many.
    fn set_queue_live(&self, index: u16) -> Result<()> {
        let vector = index.saturating_add(1);
        if vector < self.vectors() && self.set_vector(Some(index), vector)? == NO_VECTOR {
            return Err(Error::protocol("queue vector", "4.1.5.1.2", format!("{vector} is not taken")));
        }
        self.select(index)?;
        self.write(self.common, common::QUEUE_ENABLE, 2, 1)
    }

    /// A driver must not do so (4.1.4.3.2).
    fn set_queue_dead(&self, index: u16) -> Result<()> {
        self.select(index)?;
        self.write(self.common, common::QUEUE_ENABLE, 2, 0)
    }

    fn kick(&self, queue: u16) -> Result<()> {
        let offset = self.notify_offset(queue)?;
        self.write(self.notify, offset, 2, queue.into())
    }

    fn take_interrupt(&self) -> Result<u32> {
        self.read(self.isr, 0, 1)
    }

    fn config_generation(&self) -> Result<u32> {
        self.read(self.common, common::CONFIG_GENERATION, 1)
    }

    fn config_range(&self) -> Registers {
        // Without a configuration space, what nobody is at.
        let none = PciPart { bar: u8::MAX, offset: 0, len: 0 };
        self.registers(self.config.unwrap_or(none), 0..0x1000)
    }

    fn register_ranges(&self) -> Vec<Registers> {
        let (_, _, table, _) = self.msix;
        vec![
            self.registers(self.common, 0..common::LEN + 16),
            self.registers(self.notify, 0..self.notify.len + 16),
            self.registers(self.isr, 0..8),
            self.registers(table, 0..table.len + 16),
        ]
    }

    fn scribble(&self, source: &mut Source<'_>) {
        let value = if source.below(2) == 0 { source.next_u32() } else { source.next_u32() & 0xff };
        let (_, _, table, _) = self.msix;
        let (part, align) = match source.below(8) {
            0 => (self.notify, 4),
            1 => (table, 4),
            _ => (self.common, 1),
        };
        let offset = source.below(part.len.max(1)) / align * align;
        let width = if align == 4 { 4 } else { 1 << source.below(3) };
        // Refusing is as good as taking.
        let _refused =
            self.write(part, offset, width, value).and_then(|()| self.read(part, offset, width).map(drop));
    }
}

impl fmt::Debug for PciRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciRegisters")
            .field("address", &self.address)
            .field("bars", &self.bars)
            .finish_non_exhaustive()
    }
}

/// Addresses from `base` on, whoever is there.
struct OnBus {
    bus: Bus,
    base: u64,
}

impl IoDevice for OnBus {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let gpa = self.base.checked_add(offset).ok_or(AccessError::Unclaimed)?;
        self.bus.view().read(gpa, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        let gpa = self.base.checked_add(offset).ok_or(AccessError::Unclaimed)?;
        self.bus.view().write(gpa, data)
    }
}
