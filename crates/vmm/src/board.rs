//! The board: what devices are plugged into. It hands out ports, addresses and interrupt lines, and collects what firmware
//! must tell the guest.

use std::sync::Arc;

use freestone_bus::{
    Bus, Description, Doorbells, Error, FixedHardware, IoDevice, Irq, IrqChip, LoopHandle, MemorySlots,
    MsiSource, Notifier, Result, Spawn, Wiring, pci::PciSegment,
};
use freestone_memory::{Address, GuestMem, GuestMemoryRegion, layout};
use freestone_vcpu::Dispatcher;
use vm_allocator::{AddressAllocator, AllocPolicy, IdAllocator};

/// Interrupt lines below this one belong to devices that ask for them by number (timer, keyboard, serial ports).
const FIRST_FREE_GSI: u32 = 5;
/// Device address space is handed out in pages.
const MMIO_ALIGN: u64 = 0x1000;
/// Device memory starts at a multiple of this, so that a guest may map it by its largest pages.
const DEVICE_MEMORY_ALIGN: u64 = 1 << 30;
/// Guests with 4-level page tables map all physical memory in half of a 48-bit space, so nothing is put beyond these bits.
const DEVICE_MEMORY_BITS: u8 = 46;

/// What the hypervisor has and the board hands on.
#[derive(Default)]
pub(crate) struct Supply {
    pub(crate) chip: Option<Arc<dyn IrqChip>>,
    pub(crate) doorbells: Option<Arc<dyn Doorbells>>,
    pub(crate) slots: Option<Arc<dyn MemorySlots>>,
    /// Bits of a guest-physical address.
    pub(crate) phys_bits: u8,
}

/// The wiring of a [`Machine`](crate::Machine).
pub(crate) struct Board {
    memory: GuestMem,
    pio: Bus,
    mmio: Bus,
    chip: Option<Arc<dyn IrqChip>>,
    doorbells: Option<Arc<dyn Doorbells>>,
    slots: Option<Arc<dyn MemorySlots>>,
    spawner: LoopHandle,
    notifier: Notifier,
    addresses: Option<AddressAllocator>,
    device_memory: Option<AddressAllocator>,
    lines: Option<IdAllocator>,
    pci: Option<Arc<PciSegment>>,
    pub(crate) descriptions: Vec<Description>,
    pub(crate) fixed: Vec<FixedHardware>,
    /// Name of the device that is being plugged in, for messages.
    pub(crate) plugging: String,
}

impl Board {
    pub(crate) fn new(memory: GuestMem, supply: Supply, spawner: LoopHandle, notifier: Notifier) -> Self {
        let Supply { chip, doorbells, slots, phys_bits } = supply;
        let lines = chip.as_ref().and_then(|c| {
            let last = c.pins().checked_sub(1)?;
            IdAllocator::new(FIRST_FREE_GSI, last).ok()
        });
        let addresses = AddressAllocator::new(layout::MMIO_START, layout::MMIO_END - layout::MMIO_START).ok();
        let device_memory = device_memory(&memory, phys_bits);
        Self {
            memory,
            pio: Bus::new(),
            mmio: Bus::new(),
            chip,
            doorbells,
            slots,
            spawner,
            notifier,
            addresses,
            device_memory,
            lines,
            pci: None,
            descriptions: Vec::new(),
            fixed: Vec::new(),
            plugging: String::new(),
        }
    }

    /// A dispatcher over the board's address spaces, for one vCPU.
    pub(crate) fn dispatcher(&self) -> Dispatcher {
        Dispatcher::new(self.pio.view(), self.mmio.view())
    }

    pub(crate) fn has_irq_chip(&self) -> bool {
        self.chip.is_some()
    }

    fn exhausted(&self, what: &'static str) -> Error {
        Error::Exhausted { what, device: self.plugging.clone() }
    }
}

/// The addresses for memory of devices: from behind all RAM and 4 GiB to the end of what the guest can address.
fn device_memory(memory: &GuestMem, phys_bits: u8) -> Option<AddressAllocator> {
    let ram = memory.regions().iter().map(|region| region.last_addr().raw_value()).max()?;
    let start = ram.checked_add(1)?.max(layout::RAM_ABOVE_HOLE);
    let start = start.checked_next_multiple_of(DEVICE_MEMORY_ALIGN)?;
    let end = 1_u64 << phys_bits.min(DEVICE_MEMORY_BITS);
    AddressAllocator::new(start, end.checked_sub(start)?).ok()
}

impl Drop for Board {
    fn drop(&mut self) {
        // The PCI root is in a space that it holds.
        self.pio.clear();
        self.mmio.clear();
    }
}

impl Wiring for Board {
    fn memory(&self) -> GuestMem {
        self.memory.clone()
    }

    fn pio(&mut self, base: u16, len: u16, device: Arc<dyn IoDevice>) -> Result<()> {
        if u32::from(base) + u32::from(len) > 0x1_0000 {
            return Err(Error::BadRange { base: base.into(), len: len.into() });
        }
        self.pio.insert(base.into(), len.into(), device)
    }

    fn alloc_mmio(&mut self, len: u64) -> Result<u64> {
        let exhausted = self.exhausted("device address space below 4 GiB");
        self.addresses
            .as_mut()
            .and_then(|a| a.allocate(len, MMIO_ALIGN, AllocPolicy::FirstMatch).ok())
            .map(|range| range.start())
            .ok_or(exhausted)
    }

    fn mmio(&mut self, base: u64, len: u64, device: Arc<dyn IoDevice>) -> Result<()> {
        self.mmio.insert(base, len, device)
    }

    fn irq(&mut self, gsi: Option<u32>) -> Result<(u32, Irq)> {
        let Some(chip) = &self.chip else {
            return Err(Error::Missing { what: "an interrupt controller", device: self.plugging.clone() });
        };
        let gsi = match gsi {
            Some(gsi) => gsi,
            None => self
                .lines
                .as_mut()
                .and_then(|l| l.allocate_id().ok())
                .ok_or_else(|| self.exhausted("interrupt line"))?,
        };
        let irq = chip.edge(gsi).map_err(Error::io("claim an interrupt line"))?;
        Ok((gsi, irq))
    }

    fn mmio_bus(&self) -> Bus {
        self.mmio.clone()
    }

    fn msi(&self) -> Option<Arc<dyn MsiSource>> {
        self.chip.as_ref()?.msi()
    }

    fn pci(&self) -> Option<Arc<PciSegment>> {
        self.pci.clone()
    }

    fn provide_pci(&mut self, segment: Arc<PciSegment>) -> Result<()> {
        if self.pci.is_some() {
            return Err(Error::Exhausted { what: "place for a PCI root", device: self.plugging.clone() });
        }
        self.pci = Some(segment);
        Ok(())
    }

    fn memory_slots(&self) -> Option<Arc<dyn MemorySlots>> {
        self.slots.clone()
    }

    fn alloc_memory(&mut self, len: u64, align: u64) -> Result<u64> {
        let exhausted = self.exhausted("guest-physical address space above RAM");
        let len = len.checked_next_multiple_of(layout::PAGE_SIZE);
        self.device_memory
            .as_mut()
            .zip(len)
            .and_then(|(a, len)| a.allocate(len, align.max(layout::PAGE_SIZE), AllocPolicy::FirstMatch).ok())
            .map(|range| range.start())
            .ok_or(exhausted)
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        self.doorbells.clone()
    }

    fn spawner(&self) -> Arc<dyn Spawn> {
        Arc::new(self.spawner.clone())
    }

    fn notifier(&self) -> Notifier {
        self.notifier.clone()
    }

    fn describe(&mut self, description: Description) {
        self.descriptions.push(description);
    }

    fn fixed_hardware(&mut self, hardware: FixedHardware) {
        self.fixed.push(hardware);
    }
}

#[cfg(test)]
mod tests {
    use freestone_bus::{Access, EventLoop};

    use super::*;

    struct Nothing;

    impl IoDevice for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) -> Access {
            Ok(())
        }
        fn write(&self, _: u64, _: &[u8]) -> Access {
            Ok(())
        }
    }

    struct Chip;

    impl IrqChip for Chip {
        fn pins(&self) -> u32 {
            24
        }
        fn edge(&self, _: u32) -> std::io::Result<Irq> {
            Ok(Irq::null())
        }
    }

    fn board(chip: Option<Arc<dyn IrqChip>>) -> Board {
        with_memory(
            GuestMem::anonymous(1 << 20).unwrap(),
            Supply { chip, phys_bits: 40, ..Supply::default() },
        )
    }

    fn with_memory(memory: GuestMem, supply: Supply) -> Board {
        let handle = EventLoop::new().unwrap().handle();
        let mut board = Board::new(memory, supply, handle, Notifier::new(|_| {}));
        board.plugging = "probe".into();
        board
    }

    #[test]
    fn interrupt_lines_are_handed_out_once_and_end_with_a_clear_error() {
        let mut board = board(Some(Arc::new(Chip)));
        let lines: Vec<u32> = (5..24).map(|_| board.irq(None).unwrap().0).collect();
        assert_eq!(lines, (5..24).collect::<Vec<_>>());
        assert_eq!(board.irq(None).unwrap_err().to_string(), "no interrupt line left for device probe");
    }

    #[test]
    fn a_machine_without_an_interrupt_controller_says_so() {
        let error = board(None).irq(None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "device probe needs an interrupt controller, which this machine does not have"
        );
    }

    #[test]
    fn device_addresses_are_page_aligned_and_inside_the_window() {
        let mut board = board(None);
        assert_eq!(board.alloc_mmio(0x200).unwrap(), layout::MMIO_START);
        assert_eq!(board.alloc_mmio(0x1000).unwrap(), layout::MMIO_START + 0x1000);
        assert!(board.alloc_mmio(layout::MMIO_END - layout::MMIO_START).is_err());
        assert!(board.alloc_mmio(0).is_err());
    }

    #[test]
    fn device_memory_is_above_ram_and_4_gib_and_below_the_end_of_addresses() {
        let mut board = board(None);
        assert_eq!(board.alloc_memory(0x200, 1).unwrap(), 1 << 32);
        assert_eq!(board.alloc_memory(0x1000, 0x1000).unwrap(), (1 << 32) + 0x1000);
        assert_eq!(board.alloc_memory(1 << 30, 1 << 30).unwrap(), 5 << 30);
        let end = 1 << 40;
        assert!(board.alloc_memory(end - (6 << 30) + 0x1000, 0x1000).is_err());
        assert_eq!(board.alloc_memory(end - (6 << 30), 0x1000).unwrap(), 6 << 30);
        assert!(board.alloc_memory(0, 0x1000).is_err() && board.alloc_memory(u64::MAX, 0x1000).is_err());
        let error = board.alloc_memory(1 << 40, 1 << 21).unwrap_err();
        assert_eq!(error.to_string(), "no guest-physical address space above RAM left for device probe");
    }

    #[test]
    fn device_memory_starts_at_the_next_gib_behind_ram() {
        let supply = Supply { phys_bits: 52, ..Supply::default() };
        let memory = GuestMem::anonymous(layout::HOLE_START + (2 << 30) + 0x1000).unwrap();
        let mut board = with_memory(memory, supply);
        assert_eq!(board.alloc_memory(0x1000, 0x1000).unwrap(), 7 << 30);
        assert!(board.alloc_memory(1 << 46, 0x1000).is_err(), "46 bits at most");
    }

    #[test]
    fn processor_that_addresses_no_more_than_ram_has_no_device_memory() {
        let supply = Supply { phys_bits: 32, ..Supply::default() };
        let mut board = with_memory(GuestMem::anonymous(1 << 20).unwrap(), supply);
        assert!(matches!(board.alloc_memory(0x1000, 0x1000), Err(Error::Exhausted { .. })));
    }

    #[test]
    fn ports_may_not_reach_past_the_last_one() {
        let mut board = board(None);
        assert!(board.pio(0xffff, 1, Arc::new(Nothing)).is_ok());
        assert!(matches!(board.pio(0xfff0, 0x11, Arc::new(Nothing)), Err(Error::BadRange { .. })));
    }
}
