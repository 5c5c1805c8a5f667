//! A machine without a guest: gives a device under test all it asks for, and shows what the device does with it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use freestone_bus::pci::PciSegment;
use freestone_bus::{
    Bus, Description, Device, Doorbells, Error as BusError, FixedHardware, GuestEvent, IoDevice, Irq,
    ManualSpawner, MemorySlots, MsiMessage, MsiSource, Notifier, Plug, Spawn, Wiring,
};
use freestone_hypervisor::{DEVICE_SLOTS, MapFlags};
use freestone_memory::layout::{MMIO_END, MMIO_START, PAGE_SIZE, RAM_ABOVE_HOLE};
use freestone_memory::{Address, GuestMem, GuestMemoryRegion};

use crate::log::Edges;
use crate::msi::{MessageSource, Messages};
use crate::scripted::{BellHandle, Bells, DeviceSlots, Slot, Slots};
use crate::{Error, Result};

/// Interrupt lines that [`TestWiring`] hands out when a device does not name one.
const FREE_LINES: std::ops::Range<u32> = 5..24;

/// Device memory starts at a multiple of this, as it does in a real machine.
const DEVICE_MEMORY_ALIGN: u64 = 1 << 30;
/// End (exclusive) of the address space for device memory.
const DEVICE_MEMORY_END: u64 = 1 << 40;

/// A [`Wiring`] for tests, benches and fuzzers: one thread, nothing of the host but memory.
pub struct TestWiring {
    memory: GuestMem,
    pio: Bus,
    mmio: Bus,
    mmio_devices: Vec<(u64, u64, Arc<dyn IoDevice>)>,
    pio_devices: Vec<(u16, u16, Arc<dyn IoDevice>)>,
    next_mmio: u64,
    next_memory: u64,
    pci: Option<Arc<PciSegment>>,
    lines: BTreeSet<u32>,
    edges: Arc<Edges>,
    messages: Option<Arc<Messages>>,
    slots: Option<Arc<Slots>>,
    bells: Option<Arc<Bells>>,
    spawner: ManualSpawner,
    events: Arc<Mutex<Vec<GuestEvent>>>,
    descriptions: Vec<Description>,
    fixed: Vec<FixedHardware>,
}

impl TestWiring {
    /// A machine with this memory and no doorbells: every kick is a register write that reaches the device. It has
    /// message-signalled interrupts and memory slots; a PCI segment is there once a root was plugged in.
    pub fn new(memory: GuestMem) -> Self {
        let edges = Arc::<Edges>::default();
        Self {
            next_memory: end_of_ram(&memory).max(RAM_ABOVE_HOLE).next_multiple_of(DEVICE_MEMORY_ALIGN),
            pci: None,
            messages: Some(Messages::new(Arc::clone(&edges))),
            slots: Some(Arc::new(slots_of_ram(&memory))),
            memory,
            pio: Bus::new(),
            mmio: Bus::new(),
            mmio_devices: Vec::new(),
            pio_devices: Vec::new(),
            next_mmio: MMIO_START,
            lines: BTreeSet::new(),
            edges,
            bells: None,
            spawner: ManualSpawner::new(),
            events: Arc::default(),
            descriptions: Vec::new(),
            fixed: Vec::new(),
        }
    }

    /// Gives the machine doorbells.
    #[must_use]
    pub fn with_doorbells(mut self) -> Self {
        self.bells = Some(Arc::default());
        self
    }

    /// Takes the message-signalled interrupts away.
    #[must_use]
    pub fn without_msi(mut self) -> Self {
        self.messages = None;
        self
    }

    /// Gives the machine this many routes for message-signalled interrupts only.
    #[must_use]
    pub fn with_msi_routes(self, n: usize) -> Self {
        if let Some(messages) = &self.messages {
            messages.limit(n);
        }
        self
    }

    /// Takes the memory slots away.
    #[must_use]
    pub fn without_memory_slots(mut self) -> Self {
        self.slots = None;
        self
    }

    /// Plugs a device in.
    ///
    /// # Errors
    /// [`Error::Plug`] if the device refuses.
    pub fn plug(&mut self, device: impl Plug + 'static) -> Result<Box<dyn Device>> {
        self.plug_boxed(Box::new(device))
    }

    /// As [`plug`](Self::plug), for a device whose type is not known.
    ///
    /// # Errors
    /// As [`plug`](Self::plug).
    pub fn plug_boxed(&mut self, device: Box<dyn Plug>) -> Result<Box<dyn Device>> {
        device.plug(self).map_err(Error::Plug)
    }

    /// I/O ports.
    pub fn pio_bus(&self) -> &Bus {
        &self.pio
    }

    /// Guest-physical addresses.
    pub fn mmio_bus(&self) -> &Bus {
        &self.mmio
    }

    /// The device that claimed guest-physical addresses as the `n`th, from 0.
    pub fn mmio_device(&self, n: usize) -> Option<Arc<dyn IoDevice>> {
        self.mmio_devices.get(n).map(|(_, _, device)| Arc::clone(device))
    }

    /// Base and length of what [`mmio_device`](Self::mmio_device) gives.
    pub fn mmio_range(&self, n: usize) -> Option<(u64, u64)> {
        self.mmio_devices.get(n).map(|(base, len, _)| (*base, *len))
    }

    /// The device that claimed I/O ports as the `n`th, from 0.
    pub fn pio_device(&self, n: usize) -> Option<Arc<dyn IoDevice>> {
        self.pio_devices.get(n).map(|(_, _, device)| Arc::clone(device))
    }

    /// Edges on interrupt line `gsi` so far.
    pub fn edges(&self, gsi: u32) -> u64 {
        self.edges.count(gsi)
    }

    /// Interrupt lines that devices have claimed.
    pub fn lines(&self) -> Vec<u32> {
        self.lines.iter().copied().collect()
    }

    /// How often `message` was delivered.
    pub fn msi_count(&self, message: MsiMessage) -> u64 {
        self.messages.as_ref().map_or(0, |m| m.count(message))
    }

    /// Every message that was delivered, with how often, sorted by address and data.
    pub fn msi_delivered(&self) -> Vec<(MsiMessage, u64)> {
        self.messages.as_ref().map_or_else(Vec::new, |m| m.delivered())
    }

    /// The message of every route that devices hold, oldest first.
    pub fn msi_routes(&self) -> Vec<Option<MsiMessage>> {
        self.messages.as_ref().map_or_else(Vec::new, |m| m.routes())
    }

    /// Triggers that were lost because their route had no message.
    pub fn msi_lost(&self) -> u64 {
        self.messages.as_ref().map_or(0, |m| m.lost())
    }

    /// Refuses every message that is set from now on, as a host does that has no room, or takes them again.
    pub fn refuse_msi(&self, refuse: bool) {
        if let Some(messages) = &self.messages {
            messages.refuse(refuse);
        }
    }

    /// Memory that devices have put into the guest-physical address space now, by slot.
    pub fn device_memory(&self) -> Vec<Slot> {
        let mut slots = self.slots.as_ref().map_or_else(Vec::new, |s| s.list());
        slots.retain(|slot| slot.slot >= DEVICE_SLOTS);
        slots
    }

    /// Doorbells bound now.
    pub fn doorbells_bound(&self) -> usize {
        self.bells.as_ref().map_or(0, |b| b.len())
    }

    /// Writes as a guest would: a doorbell takes the write if there is one, the bus otherwise.
    ///
    /// # Errors
    /// [`Error::Register`] if no device takes it.
    pub fn guest_mmio_write(&self, gpa: u64, data: &[u8]) -> Result<()> {
        if self.bells.as_ref().is_some_and(|b| b.ring(freestone_bus::IoAddr::Mmio(gpa), data)) {
            return Ok(());
        }
        self.mmio.view().write(gpa, data).map_err(|source| Error::Register {
            op: "write",
            offset: gpa,
            len: data.len(),
            source,
        })
    }

    /// Gives the devices' work turns until all are idle or `max_turns` are spent; returns the turns taken.
    pub fn run_work(&self, max_turns: usize) -> usize {
        self.spawner.run(max_turns)
    }

    /// Drives the devices' work.
    pub fn manual_spawner(&self) -> &ManualSpawner {
        &self.spawner
    }

    /// What devices told the machine so far.
    pub fn events(&self) -> Vec<GuestEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How devices described themselves.
    pub fn descriptions(&self) -> &[Description] {
        &self.descriptions
    }

    /// Fixed hardware that devices announced.
    pub fn fixed(&self) -> &[FixedHardware] {
        &self.fixed
    }

    fn exhausted(what: &'static str) -> BusError {
        BusError::Exhausted { what, device: "under test".to_owned() }
    }
}

impl Wiring for TestWiring {
    fn memory(&self) -> GuestMem {
        self.memory.clone()
    }

    fn pio(&mut self, base: u16, len: u16, device: Arc<dyn IoDevice>) -> freestone_bus::Result<()> {
        self.pio.insert(base.into(), len.into(), Arc::clone(&device))?;
        self.pio_devices.push((base, len, device));
        Ok(())
    }

    fn alloc_mmio(&mut self, len: u64) -> freestone_bus::Result<u64> {
        let base = self.next_mmio;
        let end = len
            .max(1)
            .checked_next_multiple_of(PAGE_SIZE)
            .and_then(|len| base.checked_add(len))
            .filter(|end| *end <= MMIO_END)
            .ok_or_else(|| Self::exhausted("device address space"))?;
        self.next_mmio = end;
        Ok(base)
    }

    fn mmio(&mut self, base: u64, len: u64, device: Arc<dyn IoDevice>) -> freestone_bus::Result<()> {
        self.mmio.insert(base, len, Arc::clone(&device))?;
        self.mmio_devices.push((base, len, device));
        Ok(())
    }

    fn irq(&mut self, gsi: Option<u32>) -> freestone_bus::Result<(u32, Irq)> {
        let free = gsi.or_else(|| FREE_LINES.into_iter().find(|l| !self.lines.contains(l)));
        let line = free.ok_or_else(|| Self::exhausted("interrupt line"))?;
        if !self.lines.insert(line) {
            return Err(Self::exhausted("interrupt line of that number"));
        }
        Ok((line, self.edges.irq(line)))
    }

    fn mmio_bus(&self) -> Bus {
        self.mmio.clone()
    }

    fn msi(&self) -> Option<Arc<dyn MsiSource>> {
        let messages = self.messages.as_ref()?;
        Some(Arc::new(MessageSource(Arc::clone(messages))))
    }

    fn pci(&self) -> Option<Arc<PciSegment>> {
        self.pci.clone()
    }

    fn provide_pci(&mut self, segment: Arc<PciSegment>) -> freestone_bus::Result<()> {
        if self.pci.is_some() {
            return Err(Self::exhausted("place for a PCI root"));
        }
        self.pci = Some(segment);
        Ok(())
    }

    fn memory_slots(&self) -> Option<Arc<dyn MemorySlots>> {
        let slots = self.slots.as_ref()?;
        Some(Arc::new(DeviceSlots::new(Arc::clone(slots), drop)))
    }

    fn alloc_memory(&mut self, len: u64, align: u64) -> freestone_bus::Result<u64> {
        let base = self.next_memory.checked_next_multiple_of(align.max(PAGE_SIZE));
        let range = base.and_then(|base| Some((base, base.checked_add(len)?)));
        let (base, end) = range
            .filter(|&(_, end)| align.is_power_of_two() && len > 0 && end <= DEVICE_MEMORY_END)
            .ok_or_else(|| Self::exhausted("address space for device memory"))?;
        self.next_memory = end;
        Ok(base)
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        let bells = self.bells.as_ref()?;
        Some(Arc::new(BellHandle(Arc::clone(bells))))
    }

    fn spawner(&self) -> Arc<dyn Spawn> {
        Arc::new(self.spawner.clone())
    }

    fn notifier(&self) -> Notifier {
        let events = Arc::clone(&self.events);
        Notifier::new(move |event| events.lock().unwrap_or_else(PoisonError::into_inner).push(event))
    }

    fn describe(&mut self, description: Description) {
        self.descriptions.push(description);
    }

    fn fixed_hardware(&mut self, hardware: FixedHardware) {
        self.fixed.push(hardware);
    }
}

/// First address beyond all RAM.
fn end_of_ram(memory: &GuestMem) -> u64 {
    let ends = memory.regions().iter().map(|r| r.last_addr().raw_value().saturating_add(1));
    ends.max().unwrap_or(0)
}

/// Slots with the RAM in them, so that devices cannot map over it.
fn slots_of_ram(memory: &GuestMem) -> Slots {
    let slots = Slots::default();
    for (slot, region) in (0..).zip(memory.regions()) {
        // Regions of one memory do not overlap, and the slots are empty.
        let _ = slots.insert(slot, Arc::clone(region), MapFlags::empty());
    }
    slots
}

impl fmt::Debug for TestWiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestWiring")
            .field("pio", &self.pio)
            .field("mmio", &self.mmio)
            .field("lines", &self.lines)
            .field("msi_routes", &self.msi_routes())
            .field("device_memory", &self.device_memory())
            .finish_non_exhaustive()
    }
}
