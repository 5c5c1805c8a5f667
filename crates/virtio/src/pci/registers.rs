//! The registers in BAR 0: what a driver does with the device once it has found it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::pci::Msix;
use freestone_bus::{
    Access, AccessError, DoorbellGuard, Doorbells, EventFd, IoAddr, IoDevice, Irq, IrqTarget, MsiSource,
};

use crate::transport::{DeviceCore, Half, Kicks, QueueArea, TransportOps};
use crate::{Error, Result};

/// Offset of the common configuration (4.1.4.3).
pub const COMMON: u64 = 0x0000;
/// Length of the common configuration: up to and with the queue addresses. What comes behind belongs to features that are not
/// offered.
pub const COMMON_LEN: u64 = 56;
/// Offset of the interrupt status (4.1.4.5).
pub const ISR: u64 = 0x1000;
/// Offset of the device's configuration space (4.1.4.6).
pub const CONFIG: u64 = 0x2000;
/// Offset of the notifications (4.1.4.4).
pub const NOTIFY: u64 = 0x3000;
/// Bytes between the notifications of two queues.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Offset of the MSI-X table.
pub const MSIX: u64 = 0x4000;
/// Length of each part but the last.
pub const PART_LEN: u64 = 0x1000;
/// Most queues of a device: their notifications fill a page.
pub const MAX_QUEUES: usize = 1024;
/// Stands for no vector (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Offsets in the common configuration.
pub mod common {
    #![expect(missing_docs, reason = "the names are those of the specification")]
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// Bit of the interrupt status: used buffer notification.
pub(super) const ISR_QUEUE: u8 = 1;
/// Bit of the interrupt status: configuration change notification.
pub(super) const ISR_CONFIG: u8 = 2;
/// Stands for a BAR that is nowhere.
const UNMAPPED: u64 = u64::MAX;

/// What the registers, the interrupts and the function share; no part of it needs a lock.
pub(super) struct Shared {
    pub(super) msix: Msix,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    /// Where BAR 0 is in the guest-physical address space.
    base: AtomicU64,
    doorbells: Option<Arc<dyn Doorbells>>,
}

impl Shared {
    /// For a device of `queues` queues: a vector for each and one for the configuration.
    pub(super) fn new(
        name: &str,
        queues: usize,
        msi: Option<Arc<dyn MsiSource>>,
        doorbells: Option<Arc<dyn Doorbells>>,
    ) -> Result<Self> {
        let too_many = || Error::Config { device: name.to_owned(), reason: "PCI has room for 1024 queues" };
        let count = u16::try_from(queues).ok().filter(|_| queues <= MAX_QUEUES).ok_or_else(too_many)?;
        Ok(Self {
            msix: Msix::new(count.saturating_add(1), msi)?,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            base: AtomicU64::new(UNMAPPED),
            doorbells,
        })
    }

    /// BAR 0 is at `address` now.
    pub(super) fn set_base(&self, address: Option<u64>) {
        self.base.store(address.unwrap_or(UNMAPPED), Ordering::SeqCst);
    }

    fn interrupt(&self, reason: u8, vector: &AtomicU16) -> io::Result<()> {
        self.isr.fetch_or(reason, Ordering::AcqRel);
        match vector.load(Ordering::Acquire) {
            NO_VECTOR => Ok(()),
            vector => self.msix.trigger(vector),
        }
    }

    /// The driver maps an event to a vector; what does not exist is mapped to none (4.1.5.1.2.1).
    fn set_vector(&self, of: &AtomicU16, vector: u16) {
        let vector = if vector < self.msix.count() { vector } else { NO_VECTOR };
        of.store(vector, Ordering::Release);
    }

    /// Interrupt status, and the vectors of the configuration and of each queue.
    pub(super) fn interrupts(&self) -> (u8, u16, Vec<u16>) {
        let vector = |of: &AtomicU16| of.load(Ordering::Acquire);
        let queues = self.queue_vectors.iter().map(vector).collect();
        (self.isr.load(Ordering::Acquire), vector(&self.config_vector), queues)
    }

    /// Sets what [`interrupts`](Self::interrupts) gives, vectors as a driver does.
    pub(super) fn set_interrupts(&self, isr: u8, config: u16, queues: &[u16]) {
        self.isr.store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
        self.set_vector(&self.config_vector, config);
        for (of, vector) in self.queue_vectors.iter().zip(queues) {
            self.set_vector(of, *vector);
        }
    }

    fn queue_vector(&self, queue: u16) -> Option<&AtomicU16> {
        self.queue_vectors.get(usize::from(queue))
    }
}

/// The used buffer notification of one queue.
struct QueueIrq {
    shared: Arc<Shared>,
    queue: u16,
}

impl IrqTarget for QueueIrq {
    fn trigger(&self) -> io::Result<()> {
        let vector = self.shared.queue_vector(self.queue);
        vector.map_or(Ok(()), |vector| self.shared.interrupt(ISR_QUEUE, vector))
    }
}

/// The configuration change notification.
struct ConfigIrq(Arc<Shared>);

impl IrqTarget for ConfigIrq {
    fn trigger(&self) -> io::Result<()> {
        self.0.interrupt(ISR_CONFIG, &self.0.config_vector)
    }
}

/// What PCI supplies to the status machine.
pub(super) struct PciOps(pub(super) Arc<Shared>);

impl TransportOps for PciOps {
    fn queue_irq(&self, queue: u16) -> Irq {
        Irq::new(QueueIrq { shared: Arc::clone(&self.0), queue })
    }

    fn config_irq(&self) -> Irq {
        Irq::new(ConfigIrq(Arc::clone(&self.0)))
    }

    fn bind_doorbell(&self, queue: u16, kick: &EventFd) -> io::Result<Option<DoorbellGuard>> {
        let base = self.0.base.load(Ordering::SeqCst);
        let Some(doorbells) = self.0.doorbells.as_ref().filter(|_| base != UNMAPPED) else { return Ok(None) };
        let offset = NOTIFY + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER);
        // Drivers write 16 bits here; the address alone says which queue.
        doorbells.bind(IoAddr::Mmio(base.saturating_add(offset)), None, kick).map(Some)
    }

    fn reset(&mut self) {
        let vectors = self.0.queue_vectors.iter().chain([&self.0.config_vector]);
        vectors.for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
        self.0.isr.store(0, Ordering::Release);
        self.0.msix.clear_pending();
    }
}

/// BAR 0 of a device.
pub(super) struct Registers {
    pub(super) shared: Arc<Shared>,
    core: Mutex<DeviceCore<PciOps>>,
    kicks: Kicks,
}

impl Registers {
    pub(super) fn new(core: DeviceCore<PciOps>, shared: Arc<Shared>) -> Self {
        Self { kicks: core.kicks(), core: Mutex::new(core), shared }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, DeviceCore<PciOps>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A field of the common configuration; each is accessed by its own width, addresses by their halves as well.
    fn read_common(&self, offset: u64, width: usize) -> std::result::Result<u64, AccessError> {
        let core = self.lock();
        let vector = |of: Option<&AtomicU16>| of.map_or(NO_VECTOR, |v| v.load(Ordering::Acquire)).into();
        Ok(match (offset, width) {
            (common::DEVICE_FEATURE_SELECT, 4) => core.device_features_select().into(),
            (common::DEVICE_FEATURE, 4) => core.device_features().into(),
            (common::DRIVER_FEATURE_SELECT, 4) => core.driver_features_select().into(),
            (common::DRIVER_FEATURE, 4) => core.driver_features().into(),
            (common::CONFIG_MSIX_VECTOR, 2) => vector(Some(&self.shared.config_vector)),
            (common::NUM_QUEUES, 2) => core.queue_count().into(),
            (common::DEVICE_STATUS, 1) => core.status().into(),
            (common::CONFIG_GENERATION, 1) => u64::from(core.config_generation()) & 0xff,
            (common::QUEUE_SELECT, 2) => core.selected_queue().into(),
            (common::QUEUE_SIZE, 2) => core.queue_size().into(),
            (common::QUEUE_MSIX_VECTOR, 2) => vector(self.shared.queue_vector(core.selected_queue())),
            (common::QUEUE_ENABLE, 2) => core.queue_ready().into(),
            (common::QUEUE_NOTIFY_OFF, 2) if core.queue_exists() => core.selected_queue().into(),
            (common::QUEUE_NOTIFY_OFF, 2) => 0,
            _ => {
                let area = address_field(offset, width)?;
                let half = |half| u64::from(core.queue_address(area, half));
                match (width, offset % 8) {
                    (8, _) => half(Half::High) << 32 | half(Half::Low),
                    (_, 0) => half(Half::Low),
                    _ => half(Half::High),
                }
            }
        })
    }

    fn write_common(&self, offset: u64, width: usize, value: u64) -> Access {
        let mut core = self.lock();
        let [b0, b1, b2, b3, b4, b5, b6, b7] = value.to_le_bytes();
        let word = u32::from_le_bytes([b0, b1, b2, b3]);
        let short = u16::from_le_bytes([b0, b1]);
        match (offset, width) {
            (common::DEVICE_FEATURE_SELECT, 4) => core.select_device_features(word),
            (common::DRIVER_FEATURE_SELECT, 4) => core.select_driver_features(word),
            (common::DRIVER_FEATURE, 4) => core.set_driver_features(word),
            (common::CONFIG_MSIX_VECTOR, 2) => self.shared.set_vector(&self.shared.config_vector, short),
            (common::DEVICE_STATUS, 1) => core.set_status(b0),
            (common::QUEUE_SELECT, 2) => core.select_queue(short),
            (common::QUEUE_SIZE, 2) => core.set_queue_size(short),
            (common::QUEUE_MSIX_VECTOR, 2) => {
                if let Some(of) = self.shared.queue_vector(core.selected_queue()) {
                    self.shared.set_vector(of, short);
                }
            }
            // A driver must not write 0 (4.1.4.3.2): a queue is disabled by a reset alone.
            (common::QUEUE_ENABLE, 2) if short == 1 => core.set_queue_ready(true),
            (common::QUEUE_ENABLE, 2) => {}
            // Read-only fields.
            (common::DEVICE_FEATURE, 4)
            | (common::NUM_QUEUES | common::QUEUE_NOTIFY_OFF, 2)
            | (common::CONFIG_GENERATION, 1) => {}
            _ => {
                let area = address_field(offset, width)?;
                let half = if offset.is_multiple_of(8) { Half::Low } else { Half::High };
                core.set_queue_address(area, half, word);
                if width == 8 {
                    core.set_queue_address(area, Half::High, u32::from_le_bytes([b4, b5, b6, b7]));
                }
            }
        }
        Ok(())
    }
}

/// The part of a queue whose address, or half of it, is at `offset`.
fn address_field(offset: u64, width: usize) -> std::result::Result<QueueArea, AccessError> {
    let area = match offset & !7 {
        common::QUEUE_DESC => QueueArea::Descriptors,
        common::QUEUE_DRIVER => QueueArea::Driver,
        common::QUEUE_DEVICE => QueueArea::Device,
        ..COMMON_LEN => return Err(AccessError::Width),
        _ => return Err(AccessError::NoRegister),
    };
    let whole = matches!(width, 4 | 8) && offset.is_multiple_of(width as u64);
    if whole { Ok(area) } else { Err(AccessError::Width) }
}

/// The part of BAR 0 that an access is about, the offset there, and whether the access stays inside.
fn part(offset: u64, width: usize) -> std::result::Result<(u64, u64), AccessError> {
    if let Some(inside) = offset.checked_sub(MSIX) {
        return Ok((MSIX, inside));
    }
    let inside = offset % PART_LEN;
    if width as u64 > PART_LEN - inside {
        return Err(AccessError::Width);
    }
    Ok((offset - inside, inside))
}

impl IoDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        match part(offset, data.len())? {
            (COMMON, at) => {
                let value = self.read_common(at, data.len())?.to_le_bytes();
                data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
                Ok(())
            }
            (ISR, 0) => {
                let [byte] = data else { return Err(AccessError::Width) };
                *byte = self.shared.isr.swap(0, Ordering::AcqRel);
                Ok(())
            }
            (CONFIG, at) => {
                self.lock().read_config(at, data);
                Ok(())
            }
            (MSIX, at) => self.shared.msix.read(at, data),
            _ => Err(AccessError::NoRegister),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        match part(offset, data.len())? {
            (COMMON, at) => {
                let mut value = [0; 8];
                let bytes = value.get_mut(..data.len()).ok_or(AccessError::Width)?;
                bytes.copy_from_slice(data);
                self.write_common(at, data.len(), u64::from_le_bytes(value))
            }
            (NOTIFY, at) if at.is_multiple_of(NOTIFY_MULTIPLIER.into()) => {
                let queue = at / u64::from(NOTIFY_MULTIPLIER);
                self.kicks.kick(u32::try_from(queue).unwrap_or(u32::MAX));
                Ok(())
            }
            (CONFIG, at) => {
                self.lock().write_config(at, data);
                Ok(())
            }
            (MSIX, at) => self.shared.msix.write(at, data),
            _ => Err(AccessError::NoRegister),
        }
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registers")
            .field("core", &*self.lock())
            .field("msix", &self.shared.msix)
            .finish_non_exhaustive()
    }
}
