//! Finding virtio devices, and what the driver crate needs from its surroundings.

use core::cell::UnsafeCell;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use virtio_drivers::transport::SomeTransport;
use virtio_drivers::transport::mmio::{MmioError, MmioTransport, VirtIOHeader};
use virtio_drivers::transport::pci::bus::{Command, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, VirtioPciError, virtio_device_type};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::acpi::Acpi;
use crate::apic;
use crate::pci::{Ecam, Vectors};
use crate::phys::{self, MAPPED};
use crate::pvh::StartInfo;

/// The vendor of virtio functions on PCI (4.1.2).
const VENDOR: u16 = 0x1AF4;
/// Virtio device id of a network card.
pub const NETWORK: u32 = 1;
/// Virtio device id of a disk.
pub const BLOCK: u32 = 2;
/// Virtio device id of an entropy source.
pub const ENTROPY: u32 = 4;

/// The devices that the command line names, and those on PCI.
#[derive(Debug)]
pub struct Devices {
    command_line: &'static str,
    ecam: Option<Ecam>,
}

/// A virtio device.
#[derive(Debug)]
pub struct Device {
    /// Virtio device id.
    id: u32,
    place: Place,
}

/// Where a device is.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// One `virtio_mmio.device=SIZE@ADDRESS:IRQ`.
    Mmio { size: u64, address: u64, irq: u32 },
    /// A function of bus 0.
    Pci { ecam: Ecam, function: DeviceFunction },
}

impl Devices {
    /// Those of the command line in the start info, and those of the bus that ACPI names.
    pub fn new(info: Option<StartInfo>, acpi: Option<&Acpi>) -> Self {
        Self { command_line: info.map_or("", StartInfo::command_line), ecam: Ecam::find(acpi) }
    }

    /// Those whose words can be understood and where something is.
    pub fn iter(&self) -> impl Iterator<Item = Device> {
        let words = self.command_line.split_ascii_whitespace();
        let mmio = words.filter_map(|word| Device::parse(word.strip_prefix("virtio_mmio.device=")?));
        let pci = self.ecam.into_iter().flat_map(|ecam| {
            PciRoot::new(ecam).enumerate_bus(0).filter_map(move |(function, info)| {
                // A modern function's number says the device (virtio 1.2, 4.1.2); the driver crate does not know all of them.
                let id = match (info.vendor_id, info.device_id) {
                    (VENDOR, number @ 0x1040..=0x107F) => u32::from(number - 0x1040),
                    _ => virtio_device_type(&info)? as u32,
                };
                Some(Device { id, place: Place::Pci { ecam, function } })
            })
        });
        mmio.chain(pci)
    }
}

fn number(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 1 << 10),
        b'M' | b'm' => (text.get(..text.len() - 1)?, 1 << 20),
        _ => (text, 1),
    };
    let value = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => digits.parse::<u64>(),
    };
    value.ok()?.checked_mul(unit)
}

/// The interrupt of a device on its way to this processor.
#[derive(Debug)]
pub enum Interrupt {
    /// By the I/O APIC.
    Line,
    /// By a message, once the queue has its vector.
    Message(Vectors),
}

impl Device {
    fn parse(text: &str) -> Option<Self> {
        let (size, rest) = text.split_once('@')?;
        let mut rest = rest.split(':');
        let (size, address, irq) = (number(size)?, number(rest.next()?)?, number(rest.next()?)? as u32);
        let end = address.checked_add(size)?;
        if !address.is_multiple_of(4) || size < 0x100 || end > MAPPED {
            return None;
        }
        let id = match phys::read::<u32>(address) {
            Some(0x7472_6976) => phys::read(address + 8).filter(|&id| id != 0)?,
            _ => return None,
        };
        Some(Self { id, place: Place::Mmio { size, address, irq } })
    }

    /// Virtio device id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Leads the device's interrupt to vector `32 + line`; nothing where that cannot be done.
    pub fn interrupt(&self, line: u32) -> Option<Interrupt> {
        match self.place {
            Place::Mmio { irq, .. } => apic::route(irq, line).then_some(Interrupt::Line),
            Place::Pci { ecam, function } => Vectors::enable(ecam, function, line).map(Interrupt::Message),
        }
    }

    /// A transport for a driver.
    ///
    /// # Errors
    /// If the device is not what it says it is.
    pub fn transport(&self) -> Result<SomeTransport<'static>, Failure> {
        match self.place {
            Place::Mmio { size, address, .. } => {
                let header = core::ptr::with_exposed_provenance_mut::<VirtIOHeader>(address as usize);
                let header = NonNull::new(header).ok_or(Failure::NoAddress)?;
                // SAFETY: the command line says that a device's registers are here, `parse` saw to it that they are mapped,
                // and one transport at a time uses them.
                let transport = unsafe { MmioTransport::new(header, size as usize) };
                transport.map(SomeTransport::Mmio).map_err(Failure::Mmio)
            }
            Place::Pci { ecam, function } => {
                let mut root = PciRoot::new(ecam);
                root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
                let transport = PciTransport::new::<Identity, _>(&mut root, function);
                transport.map(SomeTransport::Pci).map_err(Failure::Pci)
            }
        }
    }
}

/// Why a transport does not come up.
#[derive(Debug)]
pub enum Failure {
    /// There is no address.
    NoAddress,
    /// The registers are wrong.
    Mmio(MmioError),
    /// The function is wrong.
    Pci(VirtioPciError),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAddress => f.write_str("no address"),
            Self::Mmio(error) => error.fmt(f),
            Self::Pci(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id {
            1 => f.write_str("virtio-net")?,
            2 => f.write_str("virtio-blk")?,
            3 => f.write_str("virtio-console")?,
            4 => f.write_str("virtio-rng")?,
            5 => f.write_str("virtio-balloon")?,
            19 => f.write_str("virtio-vsock")?,
            24 => f.write_str("virtio-mem")?,
            27 => f.write_str("virtio-pmem")?,
            id => write!(f, "virtio device {id}")?,
        }
        match self.place {
            Place::Mmio { address, irq, .. } => {
                let version: u32 = phys::read(address + 4).unwrap_or(0);
                write!(f, " at {address:#x}, interrupt {irq}, mmio version {version}")
            }
            Place::Pci { function, .. } => write!(f, " at PCI {function}"),
        }
    }
}

/// Memory for queues: 32 pages, at their own addresses.
#[repr(C, align(4096))]
struct Pool(UnsafeCell<[[u8; PAGE_SIZE]; 32]>);

// SAFETY: a page belongs to whoever holds its bit in `USED`.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(UnsafeCell::new([[0; PAGE_SIZE]; 32]));
static USED: AtomicU32 = AtomicU32::new(0);

fn mask(pages: usize) -> Option<u32> {
    (1..32).contains(&pages).then(|| (1 << pages) - 1)
}

/// Guest-physical addresses are the addresses that the program uses.
#[derive(Debug)]
pub struct Identity;

// SAFETY: pages are given out once until they are returned, page-aligned and zeroed; mapping is the identity.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let used = USED.load(Ordering::Acquire);
        let found = mask(pages).and_then(|mask| {
            (0..=32 - pages).map(|first| (first, mask << first)).find(|(_, bits)| used & bits == 0)
        });
        let Some((first, bits)) = found else {
            return (0, NonNull::dangling());
        };
        USED.store(used | bits, Ordering::Release);
        let Some(start) = NonNull::new(POOL.0.get().cast::<u8>().wrapping_add(first * PAGE_SIZE)) else {
            return (0, NonNull::dangling());
        };
        // SAFETY: the pages lie in the pool and are nobody else's now.
        unsafe { start.write_bytes(0, pages * PAGE_SIZE) };
        (start.as_ptr().expose_provenance() as u64, start)
    }

    unsafe fn dma_dealloc(at: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        let first = (at as usize - POOL.0.get().addr()) / PAGE_SIZE;
        let Some(mask) = mask(pages) else { return -1 };
        USED.fetch_and(!(mask << first), Ordering::AcqRel);
        0
    }

    unsafe fn mmio_phys_to_virt(at: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(at as usize)).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>().expose_provenance() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
