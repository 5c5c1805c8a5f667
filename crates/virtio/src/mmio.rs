//! The MMIO transport (virtio 1.2, section 4.2), version 2.
//!
//! Notifications and interrupt acknowledgement take no lock: with several vCPUs they never wait for one another.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{
    Access, AccessError, Description, Device, DoorbellGuard, Doorbells, EventFd, IoAddr, IoDevice, Irq,
    IrqTarget, Plug, Resource, Spawn, Wiring,
};
use freestone_memory::GuestMem;
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::device::VirtioDevice;
use crate::plug::{Lifecycle, Parts, Plugged, bus_error};
use crate::stats::DeviceStats;
use crate::transport::{DeviceCore, Half, Kicks, QueueArea, TransportOps};

/// Length of the register window in bytes: registers, then the configuration space.
pub const MMIO_LEN: u64 = 0x1000;

/// Register offsets (virtio 1.2, section 4.2.2).
pub mod reg {
    #![expect(missing_docs, reason = "the names are those of the specification")]
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_SEL: u64 = 0x0ac;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Value of the magic register: `virt`.
const MAGIC: u32 = 0x7472_6976;
/// Value of the version register.
const VERSION: u32 = 2;
/// Value of the vendor register.
const VENDOR: u32 = u32::from_le_bytes(*b"FRST");

/// Bit of the interrupt registers: used buffer notification.
const INTERRUPT_USED: u32 = 1;
/// Bit of the interrupt registers: configuration change notification.
const INTERRUPT_CONFIG: u32 = 2;

/// The one interrupt line of the device, with the register that says why it was raised.
#[derive(Debug)]
struct Line {
    status: AtomicU32,
    irq: Irq,
}

/// Raises the line for one reason.
struct LineIrq {
    line: Arc<Line>,
    reason: u32,
}

impl IrqTarget for LineIrq {
    fn trigger(&self) -> io::Result<()> {
        self.line.status.fetch_or(self.reason, Ordering::AcqRel);
        self.line.irq.trigger()
    }
}

/// What MMIO supplies to the status machine.
struct MmioOps {
    line: Arc<Line>,
    doorbells: Option<Arc<dyn Doorbells>>,
    base: u64,
}

impl MmioOps {
    fn irq(&self, reason: u32) -> Irq {
        Irq::new(LineIrq { line: Arc::clone(&self.line), reason })
    }
}

impl TransportOps for MmioOps {
    fn queue_irq(&self, _queue: u16) -> Irq {
        self.irq(INTERRUPT_USED)
    }

    fn config_irq(&self) -> Irq {
        self.irq(INTERRUPT_CONFIG)
    }

    fn bind_doorbell(&self, queue: u16, kick: &EventFd) -> io::Result<Option<DoorbellGuard>> {
        let Some(doorbells) = &self.doorbells else { return Ok(None) };
        let addr = IoAddr::Mmio(self.base.saturating_add(reg::QUEUE_NOTIFY));
        doorbells.bind(addr, Some(queue.into()), kick).map(Some)
    }

    fn reset(&mut self) {
        self.line.status.store(0, Ordering::Release);
    }
}

/// What a machine gives to a [`MmioTransport`].
pub struct MmioWiring {
    /// Guest-physical address of the registers.
    pub base: u64,
    /// Guest memory.
    pub mem: GuestMem,
    /// The interrupt line.
    pub irq: Irq,
    /// Doorbells, where there are any.
    pub doorbells: Option<Arc<dyn Doorbells>>,
    /// Who drives the device's workers.
    pub spawner: Arc<dyn Spawn>,
}

impl std::fmt::Debug for MmioWiring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioWiring").field("base", &self.base).finish_non_exhaustive()
    }
}

/// What the transport adds to [`CoreState`](crate::transport::state::CoreState): the section `virtio-mmio`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// Guest-physical address of the registers.
    pub base: u64,
    /// The interrupt line, where the transport was plugged in.
    pub gsi: Option<u32>,
    /// The interrupt status register.
    pub interrupt_status: u32,
}

impl Section for MmioState {
    const NAME: &'static str = "virtio-mmio";
    const VERSION: u32 = 1;
}

/// A virtio device behind MMIO registers. Most users want [`VirtioMmioPlug`], which makes one and wires it up.
#[derive(Debug)]
pub struct MmioTransport {
    core: Mutex<DeviceCore<MmioOps>>,
    line: Arc<Line>,
    kicks: Kicks,
}

impl MmioTransport {
    /// Puts `device` behind registers. `name` is for messages.
    ///
    /// # Errors
    /// As [`DeviceCore::new`].
    pub fn new(name: &str, device: Box<dyn VirtioDevice>, wiring: MmioWiring) -> Result<Self> {
        let MmioWiring { base, mem, irq, doorbells, spawner } = wiring;
        let line = Arc::new(Line { status: AtomicU32::new(0), irq });
        let ops = MmioOps { line: Arc::clone(&line), doorbells, base };
        let core = DeviceCore::new(name, device, ops, mem, spawner)?;
        Ok(Self { kicks: core.kicks(), core: Mutex::new(core), line })
    }

    /// As [`DeviceCore::set_stats`].
    pub fn set_stats(&self, stats: DeviceStats) {
        self.lock().set_stats(stats);
    }

    /// As [`DeviceCore::stats`].
    pub fn stats(&self) -> DeviceStats {
        self.lock().stats()
    }

    /// As [`DeviceCore::pause`].
    pub fn pause(&self) {
        self.lock().pause();
    }

    /// As [`DeviceCore::resume`].
    ///
    /// # Errors
    /// As [`DeviceCore::resume`].
    pub fn resume(&self) -> Result<()> {
        self.lock().resume()
    }

    /// As [`DeviceCore::halt`].
    pub fn halt(&self) {
        self.lock().halt();
    }

    /// As [`DeviceCore::shutdown`].
    ///
    /// # Errors
    /// As [`DeviceCore::shutdown`].
    pub fn shutdown(&self) -> Result<()> {
        self.lock().shutdown()
    }

    /// As [`DeviceCore::faults`].
    pub fn faults(&self) -> u64 {
        self.lock().faults()
    }

    /// Writes the section `virtio-mmio`, and as [`DeviceCore::save`].
    ///
    /// # Errors
    /// As [`DeviceCore::save`].
    pub fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.save_on(None, state)
    }

    /// As [`DeviceCore::restore`]. The registers must be at the same address.
    ///
    /// # Errors
    /// As [`DeviceCore::restore`].
    pub fn restore(&self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restore_on(None, state)
    }

    fn save_on(&self, gsi: Option<u32>, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        let core = self.lock();
        let interrupt_status = self.line.status.load(Ordering::Acquire);
        let saved = MmioState { base: core.ops().base, gsi, interrupt_status };
        state.put(&saved).map_err(freestone_bus::Error::state("save"))?;
        core.save(state)
    }

    fn restore_on(&self, gsi: Option<u32>, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let mut core = self.lock();
        let saved: MmioState = state.take().map_err(freestone_bus::Error::state("restore"))?;
        let line = |gsi: Option<u32>| gsi.map_or(u64::MAX, u64::from);
        let rules = [
            (saved.base == core.ops().base, "address of the registers", saved.base),
            (saved.gsi == gsi, "interrupt line", line(saved.gsi)),
            (
                saved.interrupt_status & !(INTERRUPT_USED | INTERRUPT_CONFIG) == 0,
                "interrupt status",
                saved.interrupt_status.into(),
            ),
        ];
        if let Some(&(_, what, value)) = rules.iter().find(|(kept, ..)| !kept) {
            let device = state.instance().to_owned();
            return Err(freestone_bus::Error::BadState { device, what, value });
        }
        self.line.status.store(saved.interrupt_status, Ordering::Release);
        core.restore(state)
    }

    fn lock(&self) -> MutexGuard<'_, DeviceCore<MmioOps>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> std::result::Result<u32, AccessError> {
        Ok(match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => VERSION,
            reg::VENDOR_ID => VENDOR,
            reg::INTERRUPT_STATUS => self.line.status.load(Ordering::Acquire),
            reg::DEVICE_ID => self.lock().device().info().device_type.0,
            reg::DEVICE_FEATURES => self.lock().device_features(),
            reg::QUEUE_NUM_MAX => self.lock().queue_max_size().into(),
            reg::QUEUE_READY => self.lock().queue_ready().into(),
            reg::STATUS => self.lock().status().into(),
            reg::CONFIG_GENERATION => self.lock().config_generation(),
            // There is no shared memory region: length and address of -1 say so.
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => u32::MAX,
            _ => return Err(AccessError::NoRegister),
        })
    }

    fn write_register(&self, offset: u64, value: u32) -> Access {
        match offset {
            reg::QUEUE_NOTIFY => self.kicks.kick(value),
            reg::INTERRUPT_ACK => {
                self.line.status.fetch_and(!value, Ordering::AcqRel);
            }
            reg::DEVICE_FEATURES_SEL => self.lock().select_device_features(value),
            reg::DRIVER_FEATURES => self.lock().set_driver_features(value),
            reg::DRIVER_FEATURES_SEL => self.lock().select_driver_features(value),
            // No device has a queue 65535, so that number stands for all that do not fit.
            reg::QUEUE_SEL => self.lock().select_queue(u16::try_from(value).unwrap_or(u16::MAX)),
            // 0 is no valid size: what does not fit is not valid either.
            reg::QUEUE_NUM => self.lock().set_queue_size(u16::try_from(value).unwrap_or(0)),
            reg::QUEUE_READY => self.lock().set_queue_ready(value & 1 != 0),
            // Only the low byte of the register is defined.
            reg::STATUS => self.lock().set_status(value.to_le_bytes()[0]),
            reg::QUEUE_DESC_LOW => self.set_address(QueueArea::Descriptors, Half::Low, value),
            reg::QUEUE_DESC_HIGH => self.set_address(QueueArea::Descriptors, Half::High, value),
            reg::QUEUE_DRIVER_LOW => self.set_address(QueueArea::Driver, Half::Low, value),
            reg::QUEUE_DRIVER_HIGH => self.set_address(QueueArea::Driver, Half::High, value),
            reg::QUEUE_DEVICE_LOW => self.set_address(QueueArea::Device, Half::Low, value),
            reg::QUEUE_DEVICE_HIGH => self.set_address(QueueArea::Device, Half::High, value),
            reg::SHM_SEL => {}
            _ => return Err(AccessError::NoRegister),
        }
        Ok(())
    }

    fn set_address(&self, area: QueueArea, half: Half, value: u32) {
        self.lock().set_queue_address(area, half, value);
    }
}

impl IoDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            self.lock().read_config(offset, data);
            return Ok(());
        }
        let data: &mut [u8; 4] = aligned(offset, data.try_into())?;
        *data = self.read_register(offset)?.to_le_bytes();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            self.lock().write_config(offset, data);
            return Ok(());
        }
        let data: &[u8; 4] = aligned(offset, data.try_into())?;
        self.write_register(offset, u32::from_le_bytes(*data))
    }
}

/// Registers are accessed by aligned words of 32 bits only (4.2.2.2).
fn aligned<T, E>(offset: u64, word: std::result::Result<T, E>) -> std::result::Result<T, AccessError> {
    word.ok().filter(|_| offset.is_multiple_of(4)).ok_or(AccessError::Width)
}

/// A virtio device that can be plugged into a machine as an MMIO device, described to the guest as ACPI `LNRO0005`.
#[derive(Debug)]
pub struct VirtioMmioPlug(Parts);

impl VirtioMmioPlug {
    /// Makes `device` pluggable; `name`, such as `virtio-blk0`, is for messages.
    pub fn new(device: impl VirtioDevice + 'static, name: impl Into<String>) -> Self {
        Self(Parts::new(Box::new(device), name.into()))
    }

    /// What the device's queues will count, to be kept by whoever wants to read it.
    pub fn stats(&self) -> DeviceStats {
        self.0.stats.clone()
    }
}

impl Plug for VirtioMmioPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        plug(self.0, wiring)
    }
}

/// Wires a device up behind registers.
pub(crate) fn plug(mut parts: Parts, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
    parts.device.attach(wiring)?;
    let spawner = parts.spawner(wiring);
    let base = wiring.alloc_mmio(MMIO_LEN)?;
    let (gsi, irq) = wiring.irq(None)?;
    let wires = MmioWiring { base, mem: wiring.memory(), irq, doorbells: wiring.doorbells(), spawner };
    let transport = MmioTransport::new(&parts.name, parts.device, wires);
    let transport = Arc::new(transport.map_err(bus_error("set up a virtio device"))?);
    transport.set_stats(parts.stats);
    wiring.mmio(base, MMIO_LEN, transport.clone())?;
    let resources = vec![Resource::Mmio { base, len: MMIO_LEN }, Resource::Irq { gsi }];
    wiring.describe(Description { hid: "LNRO0005", resources });
    Ok(Box::new(Plugged::new(parts.name, Arc::new(Placed { transport, gsi }))))
}

/// A transport with its interrupt line.
struct Placed {
    transport: Arc<MmioTransport>,
    gsi: u32,
}

impl Lifecycle for Placed {
    fn pause(&self) {
        self.transport.pause();
    }

    fn resume(&self) -> Result<()> {
        self.transport.resume()
    }

    fn shutdown(&self) -> Result<()> {
        self.transport.shutdown()
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.transport.save_on(Some(self.gsi), state)
    }

    fn restore(&self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.transport.restore_on(Some(self.gsi), state)
    }

    fn unplug(&self) {
        self.transport.halt();
    }
}
