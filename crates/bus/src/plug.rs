//! How a device joins a machine: [`Plug`] asks, [`Wiring`] gives, [`Device`] is what stays.
//!
//! A device crate implements [`Plug`] once and is then usable by the reference VMM, by a VMM of somebody else and by a test
//! bench, because all three are only a [`Wiring`].

use std::fmt;
use std::sync::Arc;

use freestone_memory::GuestMem;
use freestone_snapshot::{Restoring, Saving};

use crate::pci::PciSegment;
use crate::{Bus, Doorbells, Error, IoDevice, Irq, MemorySlots, MsiSource, Result, Spawn};

/// Something a guest did that concerns the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestEvent {
    /// The guest turned its power off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel reported a panic; a reset or a halt usually follows.
    Panicked,
    /// The guest loaded a crash kernel after a panic.
    CrashLoaded,
    /// The guest wrote this value to the boot-progress port.
    Progress(u8),
}

/// Where devices report [`GuestEvent`]s; cheap to clone.
#[derive(Clone)]
pub struct Notifier(Arc<dyn Fn(GuestEvent) + Send + Sync>);

impl Notifier {
    /// Calls `f` on every event, on the thread of the vCPU that caused it: `f` must not block.
    pub fn new(f: impl Fn(GuestEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }

    /// Reports `event`.
    pub fn notify(&self, event: GuestEvent) {
        (self.0)(event);
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notifier")
    }
}

/// A resource of a device, as firmware tables describe it to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resource {
    /// Registers in guest-physical memory.
    Mmio {
        /// First guest-physical address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// I/O ports.
    Pio {
        /// First port.
        base: u16,
        /// Number of ports.
        len: u16,
    },
    /// An edge-triggered, active-high interrupt line.
    Irq {
        /// Global system interrupt.
        gsi: u32,
    },
}

/// How a device is announced to the guest (ACPI 6.5, section 6: `_HID`, `_UID`, `_CRS`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Hardware ID: an ACPI ID such as `LNRO0005` or an EISA ID such as `PNP0501`.
    pub hid: &'static str,
    /// Resources, in the order of `_CRS`.
    pub resources: Vec<Resource>,
}

/// Hardware that firmware announces in fixed tables, not as a device (ACPI 6.5, section 5.2.9, FADT).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FixedHardware {
    /// The sleep control and status registers of a hardware-reduced platform.
    Sleep {
        /// I/O port of the control register.
        control: u16,
        /// I/O port of the status register.
        status: u16,
        /// `SLP_TYP` of soft-off.
        s5_type: u8,
    },
    /// The reset register.
    Reset {
        /// I/O port.
        port: u16,
        /// Value that resets.
        value: u8,
    },
    /// An i8042 keyboard controller.
    Keyboard8042,
    /// The generation ID of the virtual machine, 16 bytes in reserved memory.
    GenerationId {
        /// Guest-physical address.
        address: u64,
        /// Global system interrupt, edge-triggered, that tells of a change.
        gsi: u32,
    },
    /// A power button (ACPI 6.5, section 4.8.2.2.1.2).
    PowerButton {
        /// Global system interrupt, edge-triggered, that tells of a press.
        gsi: u32,
    },
    /// A CMOS real-time clock at ports 0x70 and 0x71.
    CmosRtc {
        /// CMOS register of the century; 0: none.
        century: u8,
    },
    /// A PCI Express root with its configuration space in memory (ACPI 6.5, section 5.2.6 and PCI Firmware 3.3, MCFG).
    PciRoot {
        /// Guest-physical address of the configuration space of the first bus.
        ecam: u64,
        /// First bus.
        first_bus: u8,
        /// Last bus.
        last_bus: u8,
        /// First guest-physical address of the window for base address registers.
        mmio_base: u64,
        /// Length of that window in bytes.
        mmio_len: u64,
    },
}

/// What a machine gives to a device that is being plugged in.
pub trait Wiring {
    /// Guest memory, for devices that read and write it.
    fn memory(&self) -> GuestMem;

    /// Claims I/O ports for `device`.
    ///
    /// # Errors
    /// If the ports are taken.
    fn pio(&mut self, base: u16, len: u16, device: Arc<dyn IoDevice>) -> Result<()>;

    /// Reserves `len` bytes of device address space below 4 GiB, aligned to 4 KiB, and returns the first address.
    ///
    /// # Errors
    /// If none is left.
    fn alloc_mmio(&mut self, len: u64) -> Result<u64>;

    /// Claims guest-physical addresses for `device`: a range of [`alloc_mmio`](Self::alloc_mmio) or a fixed one.
    ///
    /// # Errors
    /// If the range is taken.
    fn mmio(&mut self, base: u64, len: u64, device: Arc<dyn IoDevice>) -> Result<()>;

    /// An interrupt line: `gsi` itself, or any free one; returns the line's number with it.
    ///
    /// # Errors
    /// If the line is taken or none is left, or the machine has no interrupt controller.
    fn irq(&mut self, gsi: Option<u32>) -> Result<(u32, Irq)>;

    /// Doorbells, where the hypervisor has them.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>>;

    /// The address space of device registers, for devices that the guest may move (PCI base address registers).
    fn mmio_bus(&self) -> Bus;

    /// Message-signalled interrupts, where the machine has them.
    fn msi(&self) -> Option<Arc<dyn MsiSource>> {
        None
    }

    /// The PCI segment that devices may join, once a root was plugged in.
    fn pci(&self) -> Option<Arc<PciSegment>> {
        None
    }

    /// Offers `segment` to all devices that are plugged in later: what a PCI root does. A machine takes one.
    ///
    /// # Errors
    /// If the machine has a segment already, or takes none.
    fn provide_pci(&mut self, segment: Arc<PciSegment>) -> Result<()> {
        drop(segment);
        Err(Error::Missing { what: "a machine that takes a PCI root", device: "PCI root".to_owned() })
    }

    /// Puts host memory into the guest-physical address space, where the hypervisor can; see [`MemorySlots`].
    fn memory_slots(&self) -> Option<Arc<dyn MemorySlots>> {
        None
    }

    /// Reserves `len` bytes of guest-physical address space above all RAM for memory of a device (persistent memory,
    /// hot-plugged memory), aligned to `align`, a power of two. Returns the first address.
    ///
    /// # Errors
    /// If none is left, or the machine gives none.
    fn alloc_memory(&mut self, len: u64, align: u64) -> Result<u64> {
        let _ = (len, align);
        Err(Error::Exhausted { what: "address space for device memory", device: String::new() })
    }

    /// Who drives the device's work.
    fn spawner(&self) -> Arc<dyn Spawn>;

    /// Where to report events of the whole machine.
    fn notifier(&self) -> Notifier;

    /// Announces the device to the guest.
    fn describe(&mut self, description: Description);

    /// Announces hardware that has its place in the firmware's fixed tables. A machine without such tables ignores it.
    fn fixed_hardware(&mut self, hardware: FixedHardware) {
        let _ = hardware;
    }
}

/// A device that can be plugged into a machine.
pub trait Plug {
    /// Takes what it needs from `wiring` and becomes a live device.
    ///
    /// # Errors
    /// If the machine cannot give what the device needs.
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> Result<Box<dyn Device>>;
}

/// What a machine needs of every device it owns, however it is wired.
///
/// The machine calls these from one thread. vCPUs are stopped during `pause`, `resume` and `reset`.
pub trait Device: Send {
    /// A name for messages, such as `serial` or `virtio-blk`.
    fn name(&self) -> &str;

    /// Stops the device's own work; when this returns, it touches neither guest memory nor host resources.
    ///
    /// # Errors
    /// If work in flight could not be ended; the device is then as it was.
    fn pause(&mut self) -> Result<()> {
        Ok(())
    }

    /// Goes on after [`pause`](Self::pause).
    ///
    /// # Errors
    /// If the work cannot be started again.
    fn resume(&mut self) -> Result<()> {
        Ok(())
    }

    /// Writes what the device is, as its driver knows it. Called between [`pause`](Self::pause) and [`resume`](Self::resume),
    /// and changes nothing: the device may go on afterwards. A device without any state says so by an empty function.
    ///
    /// # Errors
    /// If there is no way to save this device, which is so by default, or the state cannot be written.
    fn save(&mut self, state: &mut Saving<'_>) -> Result<()> {
        Err(Error::NotSaved { device: state.instance().to_owned() })
    }

    /// Becomes what was saved. Called at most once, on a device that was just plugged in, in a machine whose devices are
    /// plugged in as they were in the one that was saved; guest memory holds what it held. The device is then paused:
    /// [`resume`](Self::resume) lets it go on. The state is untrusted: it may come from anywhere.
    ///
    /// # Errors
    /// If the state is missing, or cannot be that of this device. The device is then only to be dropped.
    fn restore(&mut self, state: &mut Restoring<'_>) -> Result<()> {
        Err(Error::NotSaved { device: state.instance().to_owned() })
    }

    /// Ends the device's work for good and flushes what the guest believes written.
    ///
    /// # Errors
    /// If flushing fails.
    fn shutdown(&mut self) -> Result<()> {
        Ok(())
    }
}

impl fmt::Debug for dyn Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}
