//! [`PciTransport`]: the function that a driver finds, with its capabilities and the window into BAR 0.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::pci::{Bar, BarMapping, BarSpace, ConfigSpace, Identity, Msix, PciFunction, cap};
use freestone_bus::{Doorbells, IoDevice, MsiSource, Spawn};
use freestone_memory::GuestMem;

use super::registers::{self, PciOps, Registers, Shared};
use crate::device::{DeviceInfo, DeviceType, VirtioDevice};
use crate::stats::DeviceStats;
use crate::transport::DeviceCore;
use crate::{Error, Result};

/// Vendor ID of all virtio devices (4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device ID of type 0 (4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;
/// Largest device type that has a device ID.
const MAX_TYPE: u16 = 0x3f;
/// The first of the modern devices (4.1.2.2).
const REVISION: u8 = 1;
/// The register of all memory.
const BAR: u8 = 0;

/// Types of capabilities (4.1.4).
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const WINDOW: u8 = 5;
}

/// Offsets in the capability of the window into the BARs (4.1.4.9).
mod window {
    pub(super) const BAR: u16 = 4;
    pub(super) const OFFSET: u16 = 8;
    pub(super) const LENGTH: u16 = 12;
    pub(super) const DATA: u16 = 16;
    pub(super) const END: u16 = 20;
}

/// What a machine gives to a [`PciTransport`].
pub struct PciWiring {
    /// Where base address registers may lie.
    pub bars: BarSpace,
    /// Guest memory.
    pub mem: GuestMem,
    /// Message-signalled interrupts; without them the driver has to look for itself.
    pub msi: Option<Arc<dyn MsiSource>>,
    /// Doorbells, where there are any.
    pub doorbells: Option<Arc<dyn Doorbells>>,
    /// Who drives the device's workers.
    pub spawner: Arc<dyn Spawn>,
}

impl fmt::Debug for PciWiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciWiring").field("bars", &self.bars).finish_non_exhaustive()
    }
}

/// A virtio device as a function of PCI. Most users want [`VirtioPciPlug`](super::VirtioPciPlug), which makes one and wires it up.
#[derive(Debug)]
pub struct PciTransport {
    pub(super) registers: Arc<Registers>,
    function: Mutex<Function>,
    bars: BarSpace,
    /// Where BAR 0 started out.
    first_bar: u64,
}

#[derive(Debug)]
pub(super) struct Function {
    pub(super) space: ConfigSpace,
    pub(super) bar: BarMapping,
    bar_len: u64,
    /// Offset of the capability of the window.
    window: u16,
    /// The machine took the function away.
    gone: bool,
}

impl PciTransport {
    /// Puts `device` behind a function, and reserves a range for its BAR. `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Config`] if the device has a type or a number of queues that PCI has no room for, [`Error::Wiring`] if there are
    /// no addresses left, and as [`DeviceCore::new`].
    pub fn new(name: &str, device: Box<dyn VirtioDevice>, wiring: PciWiring) -> Result<Self> {
        let PciWiring { bars, mem, msi, doorbells, spawner } = wiring;
        let info = device.info().clone();
        let identity = identity(name, info.device_type)?;
        let shared = Arc::new(Shared::new(name, info.queue_max_sizes.len(), msi, doorbells)?);
        let core = DeviceCore::new(name, device, PciOps(Arc::clone(&shared)), mem, spawner)?;
        let bar_len = (registers::MSIX + shared.msix.block_len()).next_power_of_two();
        let first_bar = bars.alloc(name, bar_len)?;
        let described = describe(identity, &info, &shared.msix, first_bar, bar_len);
        let (space, window) = described.inspect_err(|_| bars.free(first_bar))?;
        let registers = Arc::new(Registers::new(core, shared));
        let bar = BarMapping::new(bars.clone(), bar_len, Arc::clone(&registers) as Arc<dyn IoDevice>);
        let function = Mutex::new(Function { space, bar, bar_len, window, gone: false });
        Ok(Self { registers, function, bars, first_bar })
    }

    /// As [`DeviceCore::set_stats`].
    pub fn set_stats(&self, stats: DeviceStats) {
        self.registers.lock().set_stats(stats);
    }

    /// As [`DeviceCore::stats`].
    pub fn stats(&self) -> DeviceStats {
        self.registers.lock().stats()
    }

    /// As [`DeviceCore::pause`].
    pub fn pause(&self) {
        self.registers.lock().pause();
    }

    /// As [`DeviceCore::resume`].
    ///
    /// # Errors
    /// As [`DeviceCore::resume`].
    pub fn resume(&self) -> Result<()> {
        self.registers.lock().resume()
    }

    /// As [`DeviceCore::halt`], and takes the BAR off the bus for good.
    pub fn unplug(&self) {
        let mut function = self.lock();
        function.gone = true;
        function.bar.set(None);
        self.registers.shared.set_base(None);
        self.registers.lock().halt();
    }

    /// As [`DeviceCore::shutdown`].
    ///
    /// # Errors
    /// As [`DeviceCore::shutdown`].
    pub fn shutdown(&self) -> Result<()> {
        self.registers.lock().shutdown()
    }

    /// As [`DeviceCore::faults`].
    pub fn faults(&self) -> u64 {
        self.registers.lock().faults()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Function> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PciTransport {
    fn drop(&mut self) {
        self.bars.free(self.first_bar);
    }
}

impl Function {
    /// Where the BAR should be.
    pub(super) fn decoded(&self) -> Option<u64> {
        self.space.decoded_bar(BAR).filter(|_| !self.gone)
    }

    /// Keeps the BAR at `wanted`, if that can be, and the doorbells with it.
    pub(super) fn map(&mut self, wanted: Option<u64>, registers: &Registers) {
        let before = self.bar.address();
        let now = self.bar.set(wanted);
        if now != before {
            registers.shared.set_base(now);
            registers.lock().rebind_doorbells();
        }
    }

    /// The vectors hear of the message control.
    pub(super) fn set_msix(&self, registers: &Registers) {
        let (enabled, masked) = self.space.msix_control();
        registers.shared.msix.set_control(enabled, masked);
    }

    /// Whether an access of configuration space is about the data of the window.
    fn is_window(&self, offset: u16, len: usize) -> bool {
        let end = usize::from(offset).saturating_add(len);
        offset < self.window + window::END && end > usize::from(self.window + window::DATA)
    }

    /// What the window looks at: an offset in the BAR and a width, if they are allowed (4.1.4.9.1).
    fn window_target(&self) -> Option<(u64, usize)> {
        let (mut bar, mut offset, mut length) = ([0], [0; 4], [0; 4]);
        self.space.read(self.window + window::BAR, &mut bar);
        self.space.read(self.window + window::OFFSET, &mut offset);
        self.space.read(self.window + window::LENGTH, &mut length);
        let (offset, width) = (u64::from(u32::from_le_bytes(offset)), u32::from_le_bytes(length));
        let good = bar == [BAR]
            && matches!(width, 1 | 2 | 4)
            && offset.is_multiple_of(width.into())
            && offset < self.bar_len;
        Some((offset, usize::try_from(width).ok()?)).filter(|_| good)
    }

    /// The driver reads the data: it shall be what is in the BAR.
    fn read_window(&mut self, registers: &Registers) {
        let Some((offset, width)) = self.window_target() else { return };
        let mut data = [0xff; 4];
        if let Some(data) = data.get_mut(..width) {
            // The guest does not see a refusal: it reads ones.
            let _refused = registers.read(offset, data);
            self.space.put(self.window + window::DATA, data);
        }
    }

    /// The driver wrote the data: it goes to the BAR.
    fn write_window(&self, registers: &Registers) {
        let Some((offset, width)) = self.window_target() else { return };
        let mut data = [0; 4];
        self.space.read(self.window + window::DATA, &mut data);
        if let Some(data) = data.get(..width) {
            // The guest does not see a refusal: the write is dropped.
            let _refused = registers.write(offset, data);
        }
    }
}

impl PciFunction for PciTransport {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut function = self.lock();
        if function.is_window(offset, data.len()) {
            function.read_window(&self.registers);
        }
        function.space.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut function = self.lock();
        let changes = function.space.write(offset, data);
        if function.is_window(offset, data.len()) {
            function.write_window(&self.registers);
        }
        if changes.msix {
            function.set_msix(&self.registers);
        }
        if changes.decoding() {
            let wanted = function.decoded();
            function.map(wanted, &self.registers);
        }
    }
}

/// Who the function says it is. Nothing matches the subsystem IDs; 0x40 and more keep drivers of the legacy devices away.
fn identity(name: &str, device_type: DeviceType) -> Result<Identity> {
    let unknown =
        || Error::Config { device: name.to_owned(), reason: "the device type has no PCI device ID" };
    let number = u16::try_from(device_type.0).ok().filter(|n| *n <= MAX_TYPE).ok_or_else(unknown)?;
    let device = DEVICE_BASE + number;
    let class = class(device_type);
    Ok(Identity {
        vendor: VENDOR,
        device,
        revision: REVISION,
        class,
        subsystem_vendor: VENDOR,
        subsystem: device,
    })
}

/// Class code (PCI 3.0, appendix D). Drivers of virtio go by the device ID; this is for those who list devices.
fn class(device_type: DeviceType) -> u32 {
    match device_type {
        DeviceType::NET => 0x02_00_00,
        // Mass storage, of a kind that has no number.
        DeviceType::BLOCK => 0x01_80_00,
        // Communication, of a kind that has no number.
        DeviceType::CONSOLE => 0x07_80_00,
        // Network, of a kind that has no number.
        DeviceType::VSOCK => 0x02_80_00,
        // Memory, of a kind that has no number.
        DeviceType::MEM | DeviceType::PMEM => 0x05_80_00,
        // No defined class.
        _ => 0xff_00_00,
    }
}

/// The configuration space, and the offset of the capability of the window in it.
fn describe(
    identity: Identity,
    info: &DeviceInfo,
    msix: &Msix,
    address: u64,
    bar_len: u64,
) -> Result<(ConfigSpace, u16)> {
    let notify_len = u64::from(msix.count() - 1) * u64::from(registers::NOTIFY_MULTIPLIER);
    let config_len = u64::from(info.config_len).min(registers::PART_LEN);
    let mut space = ConfigSpace::new(&identity);
    space.add_bar(BAR, Bar::memory32(bar_len), address)?;
    add(&mut space, cfg_type::COMMON, registers::COMMON, registers::COMMON_LEN, &[], &[])?;
    let multiplier = registers::NOTIFY_MULTIPLIER.to_le_bytes();
    add(&mut space, cfg_type::NOTIFY, registers::NOTIFY, notify_len, &multiplier, &[])?;
    add(&mut space, cfg_type::ISR, registers::ISR, 1, &[], &[])?;
    if config_len > 0 {
        add(&mut space, cfg_type::DEVICE, registers::CONFIG, config_len, &[], &[])?;
    }
    // Of the window, the driver chooses BAR, offset, length and data.
    let writable =
        [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let window = add(&mut space, cfg_type::WINDOW, 0, 0, &[0; 4], &writable)?;
    let pending = registers::MSIX + msix.pending_offset();
    space.add_msix(msix.count(), (BAR, word(registers::MSIX)), (BAR, word(pending)))?;
    Ok((space, window))
}

/// Adds `struct virtio_pci_cap` (4.1.4), with what follows it.
fn add(
    space: &mut ConfigSpace,
    kind: u8,
    offset: u64,
    len: u64,
    rest: &[u8],
    writable: &[u8],
) -> Result<u16> {
    // ID and link come first, then this length, which counts them.
    let cap_len = u8::try_from(16 + rest.len()).unwrap_or(u8::MAX);
    let body =
        [&[cap_len, kind, BAR, 0, 0, 0], &word(offset).to_le_bytes()[..], &word(len).to_le_bytes()[..], rest]
            .concat();
    Ok(space.add_capability(cap::VENDOR, &body, writable)?)
}

/// Offsets and lengths in BAR 0 have 32 bits, of which they need 20.
fn word(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
