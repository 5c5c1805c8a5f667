//! A machine without a guest: gives a device under test all it asks for, and shows what the device does with it.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use freestone_bus::{
    Bus, Description, Device, Doorbells, Error as BusError, FixedHardware, GuestEvent, IoDevice, Irq,
    ManualSpawner, Notifier, Plug, Spawn, Wiring,
};
use freestone_memory::GuestMem;
use freestone_memory::layout::{MMIO_END, MMIO_START, PAGE_SIZE};

use crate::log::Edges;
use crate::scripted::{BellHandle, Bells};
use crate::{Error, Result};

/// Interrupt lines that [`TestWiring`] hands out when a device does not name one.
const FREE_LINES: std::ops::Range<u32> = 5..24;

/// A [`Wiring`] for tests, benches and fuzzers: one thread, nothing of the host but memory.
pub struct TestWiring {
    memory: GuestMem,
    pio: Bus,
    mmio: Bus,
    mmio_devices: Vec<(u64, u64, Arc<dyn IoDevice>)>,
    pio_devices: Vec<(u16, u16, Arc<dyn IoDevice>)>,
    next_mmio: u64,
    lines: BTreeSet<u32>,
    edges: Arc<Edges>,
    bells: Option<Arc<Bells>>,
    spawner: ManualSpawner,
    events: Arc<Mutex<Vec<GuestEvent>>>,
    descriptions: Vec<Description>,
    fixed: Vec<FixedHardware>,
}

impl TestWiring {
    /// A machine with this memory and no doorbells: every kick is a register write that reaches the device.
    pub fn new(memory: GuestMem) -> Self {
        Self {
            memory,
            pio: Bus::new(),
            mmio: Bus::new(),
            mmio_devices: Vec::new(),
            pio_devices: Vec::new(),
            next_mmio: MMIO_START,
            lines: BTreeSet::new(),
            edges: Arc::default(),
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

impl fmt::Debug for TestWiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestWiring")
            .field("pio", &self.pio)
            .field("mmio", &self.mmio)
            .field("lines", &self.lines)
            .finish_non_exhaustive()
    }
}
