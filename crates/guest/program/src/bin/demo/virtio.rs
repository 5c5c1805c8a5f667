//! Finding virtio-mmio devices, and what the driver crate needs from its surroundings.

use core::cell::UnsafeCell;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use freestone_guest_program::phys::{self, MAPPED};
use freestone_guest_program::pvh::StartInfo;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

use crate::disk;
use crate::report::Report;

/// The devices that the command line names.
pub struct Devices(&'static str);

/// One `virtio_mmio.device=SIZE@ADDRESS:IRQ`.
pub struct Device {
    pub size: u64,
    pub address: u64,
    pub irq: u32,
}

impl Devices {
    /// Those of the command line in the start info.
    pub fn new(info: Option<StartInfo>) -> Self {
        Self(info.map_or("", StartInfo::command_line))
    }

    /// Those whose words can be understood and where something is.
    pub fn iter(&self) -> impl Iterator<Item = Device> {
        let words = self.0.split_ascii_whitespace();
        words
            .filter_map(|word| Device::parse(word.strip_prefix("virtio_mmio.device=")?))
            .filter(|device| device.id() != 0)
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

impl Device {
    fn parse(text: &str) -> Option<Self> {
        let (size, rest) = text.split_once('@')?;
        let mut rest = rest.split(':');
        let device =
            Self { size: number(size)?, address: number(rest.next()?)?, irq: number(rest.next()?)? as u32 };
        let end = device.address.checked_add(device.size)?;
        (device.address.is_multiple_of(4) && device.size >= 0x100 && end <= MAPPED).then_some(device)
    }

    /// The virtio device id, or 0 where there is no device.
    fn id(&self) -> u32 {
        match phys::read::<u32>(self.address) {
            Some(0x7472_6976) => phys::read(self.address + 8).unwrap_or(0),
            _ => 0,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.id() {
            1 => "net",
            2 => "blk",
            3 => "console",
            4 => "rng",
            5 => "balloon",
            19 => "vsock",
            24 => "mem",
            27 => "pmem",
            id => return write!(f, "virtio device {id} at {:#x}, interrupt {}", self.address, self.irq),
        };
        let version: u32 = phys::read(self.address + 4).unwrap_or(0);
        write!(f, "virtio-{kind} at {:#x}, interrupt {}, mmio version {version}", self.address, self.irq)
    }
}

/// Drives the device, if there is a driver for it.
pub fn work(report: &mut Report, index: usize, device: &Device) {
    let Some(header) =
        NonNull::new(core::ptr::with_exposed_provenance_mut::<VirtIOHeader>(device.address as usize))
    else {
        return;
    };
    // SAFETY: the command line says that a device's registers are here, `parse` saw to it that they are mapped, and one
    // transport at a time uses them.
    let transport = match unsafe { MmioTransport::new(header, device.size as usize) } {
        Ok(transport) => transport,
        Err(error) => {
            report.check("virtio", format_args!("{error} at {:#x}", device.address), false);
            return;
        }
    };
    match transport.device_type() {
        DeviceType::Block => disk::work(report, index, device, transport),
        DeviceType::EntropySource => entropy(report, transport),
        _ => {}
    }
}

fn entropy(report: &mut Report, transport: MmioTransport<'_>) {
    let mut bytes = [0; 32];
    let result = VirtIORng::<Identity, _>::new(transport).and_then(|mut rng| rng.request_entropy(&mut bytes));
    let differ = bytes.iter().any(|&byte| Some(&byte) != bytes.first());
    match result {
        Ok(len) => report.check("rng", format_args!("{len} bytes of entropy"), len > 0 && differ),
        Err(error) => report.check("rng", format_args!("{error}"), false),
    };
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
