//! A PCI root: the ways in which a guest reaches configuration space, and the host bridge at 00:00.0.
//!
//! There are two ways, and both lead to the same [`PciSegment`]: memory accesses (ECAM, PCI Express 6.0, section 7.2.2), and the
//! ports 0xcf8 and 0xcfc (configuration mechanism 1, PCI 3.0, section 3.2.2.3.2), which a guest has before it has read ACPI tables.
//! There is one bus. Devices are not here: they join the segment.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use freestone_bus::pci::{ConfigSpace, Identity, PciAddress, PciFunction, PciSegment};
use freestone_bus::{Access, AccessError, Device, FixedHardware, IoDevice, Plug, Result, Wiring};
use freestone_memory::layout::{PCI_ECAM, PCI_ECAM_BUS_LEN, PCI_MMIO_END, PCI_MMIO_START};
use freestone_snapshot::{Restoring, Saving};

use crate::isa::{save, take};
use crate::state::{PciConfigState, check};

const NAME: &str = "PCI root";

/// First port of configuration mechanism 1: the address, and 4 ports later the data.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Ports of configuration mechanism 1.
const PORTS: u16 = 8;
/// Offset of the data behind the first port.
const DATA: u64 = 4;

/// Vendor and device ID of the host bridge: Red Hat's number for a generic host bridge of a virtual machine.
///
/// No system has a driver for it or takes it for a chipset that it knows the faults of, as it would with the number of a bridge
/// that was once made of silicon. The class code alone says what it is.
const HOST_BRIDGE: (u16, u16) = (0x1b36, 0x0008);
/// Class code: host bridge.
const CLASS_HOST_BRIDGE: u32 = 0x06_00_00;

/// Bit of the address port: the data port reaches configuration space.
const ENABLE: u32 = 1 << 31;
/// Bits of the address port that exist.
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;

/// The function at 00:00.0: nothing but its header.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        let (vendor, device) = HOST_BRIDGE;
        Self(ConfigSpace::new(&Identity {
            vendor,
            device,
            revision: 0,
            class: CLASS_HOST_BRIDGE,
            subsystem_vendor: 0,
            subsystem: 0,
        }))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    /// There is nothing to configure: the bridge always forwards.
    fn write_config(&self, _: u16, _: &[u8]) {}
}

/// Whether `len` bytes at `offset` are an aligned access of 1, 2 or 4 bytes, as configuration space takes them.
fn is_config_access(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64)
}

/// Low bits of a number of bus, device or function.
fn bits(value: u64, shift: u32, mask: u8) -> u8 {
    let [low, ..] = (value >> shift).to_le_bytes();
    low & mask
}

/// Configuration space in memory: 4 KiB for each function (ECAM).
#[derive(Debug)]
pub struct Ecam(Arc<PciSegment>);

impl Ecam {
    /// The configuration space of the functions of `segment`, bus 0 at offset 0.
    pub fn new(segment: Arc<PciSegment>) -> Self {
        Self(segment)
    }

    /// The function that is there, and the register.
    fn find(
        &self,
        offset: u64,
        len: usize,
    ) -> std::result::Result<(Option<Arc<dyn PciFunction>>, u16), AccessError> {
        if offset >= PCI_ECAM_BUS_LEN {
            return Err(AccessError::NoRegister);
        }
        if !is_config_access(offset, len) {
            return Err(AccessError::Width);
        }
        let address = PciAddress { bus: 0, device: bits(offset, 15, 0x1f), function: bits(offset, 12, 7) };
        Ok((self.0.function(address), u16::try_from(offset & 0xfff).unwrap_or(0)))
    }
}

impl IoDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        // A function that is not there reads as ones: so a guest learns that.
        if let (Some(function), register) = self.find(offset, data.len())? {
            function.read_config(register, data);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        if let (Some(function), register) = self.find(offset, data.len())? {
            function.write_config(register, data);
        }
        Ok(())
    }
}

/// Configuration mechanism 1: the ports 0xcf8 (address) and 0xcfc (data).
///
/// The address is accessed by 32 bits only. Anything narrower is not for it: other chipsets have a reset register at 0xcf9.
#[derive(Debug)]
pub struct ConfigPorts {
    segment: Arc<PciSegment>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// Ports to the configuration space of the functions of `segment`.
    pub fn new(segment: Arc<PciSegment>) -> Self {
        Self { segment, address: AtomicU32::new(0) }
    }

    /// The function that the address port names, if there is one, and the register at `offset` behind the data port.
    fn find(
        &self,
        offset: u64,
        len: usize,
    ) -> std::result::Result<(Option<Arc<dyn PciFunction>>, u16), AccessError> {
        let byte = offset.checked_sub(DATA).filter(|byte| *byte < 4).ok_or(AccessError::NoRegister)?;
        if !is_config_access(byte, len) {
            return Err(AccessError::Width);
        }
        let chosen = self.address.load(Ordering::Acquire);
        let number = u64::from(chosen);
        let address = PciAddress {
            bus: bits(number, 16, 0xff),
            device: bits(number, 11, 0x1f),
            function: bits(number, 8, 7),
        };
        let function = self.segment.function(address).filter(|_| chosen & ENABLE != 0);
        Ok((function, u16::try_from((number & 0xfc) + byte).unwrap_or(0)))
    }
}

impl IoDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        if offset == 0
            && let Ok(data) = <&mut [u8; 4]>::try_from(&mut *data)
        {
            *data = self.address.load(Ordering::Acquire).to_le_bytes();
            return Ok(());
        }
        if let (Some(function), register) = self.find(offset, data.len())? {
            function.read_config(register, data);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        if offset == 0
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.address.store(u32::from_le_bytes(data) & ADDRESS_BITS, Ordering::Release);
            return Ok(());
        }
        if let (Some(function), register) = self.find(offset, data.len())? {
            function.write_config(register, data);
        }
        Ok(())
    }
}

/// A PCI root that is plugged in. All that it remembers is the address port: the host bridge has nothing that can be written,
/// and the functions on the bus are devices of their own.
struct PciRoot(Arc<ConfigPorts>);

impl Device for PciRoot {
    fn name(&self) -> &str {
        NAME
    }

    fn save(&mut self, state: &mut Saving<'_>) -> Result<()> {
        save(state, &PciConfigState { address: self.0.address.load(Ordering::Acquire) })
    }

    fn restore(&mut self, state: &mut Restoring<'_>) -> Result<()> {
        let PciConfigState { address } = take(state)?;
        check(NAME, "address port", address & !ADDRESS_BITS == 0, address)?;
        self.0.address.store(address, Ordering::Release);
        Ok(())
    }
}

/// Plugs a PCI root in: configuration space at [`PCI_ECAM`] and at [`PCI_CONFIG_PORT`], base address registers in
/// [`PCI_MMIO_START`]`..`[`PCI_MMIO_END`], the host bridge at 00:00.0. Devices that are plugged in later can join.
#[derive(Debug, Default)]
pub struct PciRootPlug(());

impl PciRootPlug {
    /// A root with one bus.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Plug for PciRootPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>> {
        let window = (PCI_MMIO_START, PCI_MMIO_END - PCI_MMIO_START);
        let segment = Arc::new(PciSegment::new(wiring.mmio_bus(), window));
        segment.insert(NAME, Arc::new(HostBridge::new()))?;
        wiring.mmio(PCI_ECAM, PCI_ECAM_BUS_LEN, Arc::new(Ecam::new(Arc::clone(&segment))))?;
        let ports = Arc::new(ConfigPorts::new(Arc::clone(&segment)));
        wiring.pio(PCI_CONFIG_PORT, PORTS, Arc::clone(&ports) as _)?;
        wiring.provide_pci(segment)?;
        wiring.fixed_hardware(FixedHardware::PciRoot {
            ecam: PCI_ECAM,
            first_bus: 0,
            last_bus: 0,
            mmio_base: PCI_MMIO_START,
            mmio_len: PCI_MMIO_END - PCI_MMIO_START,
        });
        Ok(Box::new(PciRoot(ports)))
    }
}
