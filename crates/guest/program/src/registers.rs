//! A virtio device's registers on either transport (virtio 1.2, sections 4.1 and 4.2), for drivers of the programs' own, which are
//! written for speed. Other programs use `virtio-drivers`, by [`crate::virtio`].

use crate::acpi::Acpi;
use crate::apic;
use crate::phys::{self, MAPPED, Plain, Register};
use crate::pvh::StartInfo;

/// `VIRTIO_F_VERSION_1`, which the driver always takes.
pub const VERSION_1: u64 = 1 << 32;

const MAGIC: u32 = 0x7472_6976;
/// Vendor in the lower, device in the upper half: virtio 1.2 names PCI devices 0x1040 and their id.
const PCI_DEVICE: u32 = 0x1040_1AF4;

/// Bits of the device status.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// Registers of the MMIO transport.
mod mmio {
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_ADDRESSES: [u64; 3] = [0x80, 0x90, 0xA0];
    pub const CONFIG: u64 = 0x100;
}

/// Registers of the common configuration structure on PCI.
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const STATUS: u64 = 20;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_ADDRESSES: [u64; 3] = [32, 40, 48];
}

/// Where a device's registers are.
#[derive(Debug)]
pub enum Device {
    /// The MMIO transport.
    Mmio {
        /// The first register.
        base: u64,
    },
    /// A function of PCI.
    Pci {
        /// The common configuration.
        common: u64,
        /// Where queues are kicked.
        notify: u64,
        /// How far apart.
        multiplier: u64,
        /// The device's own configuration.
        config: u64,
        /// Its configuration space.
        function: u64,
    },
}

/// Where a queue is kicked, and how.
#[derive(Debug, Clone, Copy)]
pub struct Notify {
    at: u64,
    queue: u16,
    wide: bool,
}

impl Notify {
    /// Kicks it.
    pub fn kick(self) {
        if self.wide { put(self.at, u32::from(self.queue)) } else { put(self.at, self.queue) }
    }
}

/// Reads a register of the device that was found.
fn get<T: Copy>(at: u64) -> T {
    // SAFETY: `find` saw that a device's registers are here; every bit pattern is a value of the integers that are read.
    unsafe { core::ptr::with_exposed_provenance::<T>(at as usize).read_volatile() }
}

/// Writes a register of the device that was found.
fn put<T: Copy>(at: u64, value: T) {
    // SAFETY: as above.
    unsafe { core::ptr::with_exposed_provenance_mut::<T>(at as usize).write_volatile(value) }
}

impl Device {
    /// The first with this virtio device id on PCI, or else of the command line.
    pub fn find(id: u32, info: Option<StartInfo>, acpi: Option<&Acpi>) -> Option<Self> {
        Self::find_pci(id, acpi).or_else(|| Self::find_mmio(id, info?.command_line()))
    }

    /// From words such as `virtio_mmio.device=4K@0xd0000000:5`.
    fn find_mmio(id: u32, command_line: &str) -> Option<Self> {
        command_line.split_ascii_whitespace().find_map(|word| {
            let (_, place) = word.strip_prefix("virtio_mmio.device=")?.split_once('@')?;
            let base = u64::from_str_radix(place.split(':').next()?.strip_prefix("0x")?, 16).ok()?;
            let ours = base + 0x1000 <= MAPPED
                && phys::read::<u32>(base) == Some(MAGIC)
                && phys::read::<u32>(base + 8) == Some(id);
            ours.then_some(Self::Mmio { base })
        })
    }

    /// From the functions 0 of the bus that the table MCFG names.
    fn find_pci(id: u32, acpi: Option<&Acpi>) -> Option<Self> {
        let ecam = acpi?.table(b"MCFG")?.u64(44);
        if ecam == 0 || ecam + (1 << 20) > MAPPED {
            return None;
        }
        (0..32).find_map(|device| {
            // SAFETY: MCFG says that configuration space is here.
            let register =
                |offset: u64| unsafe { Register::new((ecam + (device << 15) + (offset & 0xFFC)) as u32) };
            if register(0).read() != PCI_DEVICE + (id << 16) {
                return None;
            }
            // Memory space and bus mastering.
            register(4).write(register(4).read() & 0xFFFF | 6);
            Self::from_capabilities(ecam + (device << 15), |offset| register(offset).read())
        })
    }

    fn from_capabilities(function: u64, read: impl Fn(u64) -> u32) -> Option<Self> {
        const VENDOR: u32 = 9;
        let (mut common, mut notify, mut config, mut multiplier) = (None, None, None, 0);
        let mut at = u64::from(read(0x34) & 0xFC);
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let header = read(at);
            if header & 0xFF == VENDOR {
                let bar = read(0x10 + 4 * u64::from(read(at + 4) & 0xFF));
                let place = u64::from(bar & !0xF) + u64::from(read(at + 8));
                match header >> 24 {
                    1 => common = Some(place),
                    2 => (notify, multiplier) = (Some(place), u64::from(read(at + 16))),
                    4 => config = Some(place),
                    _ => {}
                }
            }
            at = u64::from(header >> 8 & 0xFC);
        }
        Some(Self::Pci { common: common?, notify: notify?, multiplier, config: config?, function })
    }

    /// Has a queue of a device on PCI interrupt this processor at vector `32 + index`, by the first entry of the MSI-X table
    /// (PCI 3.0, 6.8.2); whether it will. After [`begin`](Self::begin), before the queue is enabled.
    pub fn interrupt(&self, queue: u16, index: u32) -> bool {
        const MSI_X: u32 = 0x11;
        let Self::Pci { common, function, .. } = *self else { return false };
        let register = |offset: u64| get::<u32>(function + (offset & 0xFFC));
        let mut at = u64::from(register(0x34) & 0xFC);
        for _ in 0..48 {
            if at == 0 || register(at) & 0xFF == MSI_X {
                break;
            }
            at = u64::from(register(at) >> 8 & 0xFC);
        }
        if at == 0 {
            return false;
        }
        let table = register(at + 4);
        let bar = register(0x10 + 4 * u64::from(table & 7));
        let entry = u64::from(bar & !0xF) + u64::from(table & !7);
        let words = [0xFEE0_0000 | apic::id() << 12, 0, apic::VECTORS + index, 0];
        (0..).zip(words).for_each(|(n, word)| put(entry + 4 * n, word));
        put(function + at, register(at) & !(1 << 30) | 1 << 31);
        put(common + common::QUEUE_SELECT, queue);
        put(common + common::QUEUE_MSIX_VECTOR, 0u16);
        get::<u16>(common + common::QUEUE_MSIX_VECTOR) == 0
    }

    /// 1: MMIO, 2: PCI.
    pub fn transport(&self) -> u64 {
        match self {
            Self::Mmio { .. } => 1,
            Self::Pci { .. } => 2,
        }
    }

    fn set_status(&self, status: u32) {
        match *self {
            Self::Mmio { base } => put(base + mmio::STATUS, status),
            Self::Pci { common, .. } => put(common + common::STATUS, status as u8),
        }
    }

    fn status(&self) -> u32 {
        match *self {
            Self::Mmio { base } => get(base + mmio::STATUS),
            Self::Pci { common, .. } => u32::from(get::<u8>(common + common::STATUS)),
        }
    }

    /// Resets the device and waits until that is done.
    pub fn reset(&self) {
        self.set_status(0);
        while self.status() != 0 {
            core::hint::spin_loop();
        }
    }

    /// Resets it and negotiates those of the `wanted` features that it has; which they are, unless it refuses.
    pub fn begin(&self, wanted: u64) -> Option<u64> {
        self.reset();
        self.set_status(ACKNOWLEDGE | DRIVER);
        let features = self.features() & (wanted | VERSION_1);
        for (half, bits) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
            match *self {
                Self::Mmio { base } => {
                    put(base + mmio::DRIVER_FEATURES_SEL, half as u32);
                    put(base + mmio::DRIVER_FEATURES, bits);
                }
                Self::Pci { common, .. } => {
                    put(common + common::DRIVER_FEATURE_SELECT, half as u32);
                    put(common + common::DRIVER_FEATURE, bits);
                }
            }
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        (self.status() & FEATURES_OK != 0).then_some(features)
    }

    fn features(&self) -> u64 {
        let [low, high] = [0, 1].map(|half: u32| match *self {
            Self::Mmio { base } => {
                put(base + mmio::DEVICE_FEATURES_SEL, half);
                u64::from(get::<u32>(base + mmio::DEVICE_FEATURES))
            }
            Self::Pci { common, .. } => {
                put(common + common::DEVICE_FEATURE_SELECT, half);
                u64::from(get::<u32>(common + common::DEVICE_FEATURE))
            }
        });
        high << 32 | low
    }

    /// All queues are enabled: lets the device work.
    pub fn go(&self) {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// A value of the device's own configuration.
    pub fn config<T: Plain>(&self, offset: u64) -> T {
        let start = match *self {
            Self::Mmio { base } => base + mmio::CONFIG,
            Self::Pci { config, .. } => config,
        };
        get(start + offset)
    }

    /// The largest size of a queue.
    pub fn queue_size(&self, queue: usize) -> u16 {
        match *self {
            Self::Mmio { base } => {
                put(base + mmio::QUEUE_SEL, queue as u32);
                get::<u32>(base + mmio::QUEUE_SIZE_MAX) as u16
            }
            Self::Pci { common, .. } => {
                put(common + common::QUEUE_SELECT, queue as u16);
                get(common + common::QUEUE_SIZE)
            }
        }
    }

    /// Tells the device the size of a queue and where its areas are.
    pub fn enable_queue(&self, queue: usize, size: u16, rings: [u64; 3]) -> Option<Notify> {
        let halves = |at: u64, address: u64| {
            put(at, address as u32);
            put(at + 4, (address >> 32) as u32);
        };
        let number = queue as u16;
        match *self {
            Self::Mmio { base } => {
                put(base + mmio::QUEUE_SEL, queue as u32);
                put(base + mmio::QUEUE_SIZE, u32::from(size));
                mmio::QUEUE_ADDRESSES.iter().zip(rings).for_each(|(at, ring)| halves(base + at, ring));
                put(base + mmio::QUEUE_READY, 1u32);
                let ready = get::<u32>(base + mmio::QUEUE_READY) == 1;
                ready.then_some(Notify { at: base + mmio::QUEUE_NOTIFY, queue: number, wide: true })
            }
            Self::Pci { common, notify, multiplier, .. } => {
                put(common + common::QUEUE_SELECT, number);
                put(common + common::QUEUE_SIZE, size);
                common::QUEUE_ADDRESSES.iter().zip(rings).for_each(|(at, ring)| halves(common + at, ring));
                let offset: u16 = get(common + common::QUEUE_NOTIFY_OFF);
                put(common + common::QUEUE_ENABLE, 1u16);
                let at = notify + multiplier * u64::from(offset);
                (get::<u16>(common + common::QUEUE_ENABLE) == 1).then_some(Notify {
                    at,
                    queue: number,
                    wide: false,
                })
            }
        }
    }
}
