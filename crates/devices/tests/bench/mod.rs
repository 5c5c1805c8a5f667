//! A test bench: a machine that is nothing but buses, interrupt counters, a list of events and a driver of work.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use freestone_bus::pci::PciSegment;
use freestone_bus::{
    Bus, Description, Device, Doorbells, Error, FixedHardware, GuestEvent, IoDevice, Irq, ManualSpawner,
    Notifier, Plug, Result, Spawn, Wiring,
};
use freestone_memory::GuestMem;

/// Interrupt lines of the bench.
const LINES: u32 = 24;

pub struct Bench {
    pub memory: GuestMem,
    pub pio: Bus,
    pub mmio: Bus,
    pub manual: ManualSpawner,
    pub spawner: Arc<dyn Spawn>,
    pub events: Arc<Mutex<Vec<GuestEvent>>>,
    pub descriptions: Vec<Description>,
    pub fixed: Vec<FixedHardware>,
    /// Edges by line; `None` while nobody has the line.
    pub lines: Vec<Option<Arc<AtomicU32>>>,
}

impl Bench {
    pub fn new() -> Self {
        let manual = ManualSpawner::new();
        Self {
            memory: GuestMem::anonymous(1 << 20).unwrap(),
            pio: Bus::new(),
            mmio: Bus::new(),
            spawner: Arc::new(manual.clone()),
            manual,
            events: Arc::default(),
            descriptions: Vec::new(),
            fixed: Vec::new(),
            lines: (0..LINES).map(|_| None).collect(),
        }
    }

    pub fn plug(&mut self, plug: impl Plug + 'static) -> Box<dyn Device> {
        Box::new(plug).plug(self).unwrap()
    }

    pub fn edges(&self, gsi: usize) -> u32 {
        self.lines[gsi].as_ref().map_or(0, |line| line.load(Ordering::Relaxed))
    }

    pub fn events(&self) -> Vec<GuestEvent> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    pub fn inb(&self, port: u16) -> u8 {
        let mut data = [0];
        self.pio.view().read(port.into(), &mut data).unwrap();
        data[0]
    }

    pub fn outb(&self, port: u16, value: u8) {
        self.pio.view().write(port.into(), &[value]).unwrap();
    }
}

impl Wiring for Bench {
    fn memory(&self) -> GuestMem {
        self.memory.clone()
    }

    fn pio(&mut self, base: u16, len: u16, device: Arc<dyn IoDevice>) -> Result<()> {
        self.pio.insert(base.into(), len.into(), device)
    }

    fn alloc_mmio(&mut self, _len: u64) -> Result<u64> {
        Err(Error::Exhausted { what: "device memory", device: "any".into() })
    }

    fn mmio(&mut self, base: u64, len: u64, device: Arc<dyn IoDevice>) -> Result<()> {
        self.mmio.insert(base, len, device)
    }

    fn provide_pci(&mut self, _segment: Arc<PciSegment>) -> Result<()> {
        Ok(())
    }

    fn irq(&mut self, gsi: Option<u32>) -> Result<(u32, Irq)> {
        let free = |from: usize| (from..).find(|gsi| self.lines[*gsi].is_none()).unwrap();
        let gsi = gsi.unwrap_or_else(|| u32::try_from(free(5)).unwrap());
        let line = &mut self.lines[gsi as usize];
        if line.is_some() {
            return Err(Error::Exhausted { what: "interrupt line", device: "any".into() });
        }
        let edges = Arc::new(AtomicU32::new(0));
        *line = Some(Arc::clone(&edges));
        let irq = Irq::from_fn(move || {
            edges.fetch_add(1, Ordering::Relaxed);
        });
        Ok((gsi, irq))
    }

    fn mmio_bus(&self) -> Bus {
        self.mmio.clone()
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }

    fn spawner(&self) -> Arc<dyn Spawn> {
        Arc::clone(&self.spawner)
    }

    fn notifier(&self) -> Notifier {
        let events = Arc::clone(&self.events);
        Notifier::new(move |event| events.lock().unwrap().push(event))
    }

    fn describe(&mut self, description: Description) {
        self.descriptions.push(description);
    }

    fn fixed_hardware(&mut self, hardware: FixedHardware) {
        self.fixed.push(hardware);
    }
}

/// A sink that tests look into, and that can be told to fail.
#[derive(Clone, Default)]
pub struct Screen {
    pub bytes: Arc<Mutex<Vec<u8>>>,
    /// Number of writes.
    pub writes: Arc<AtomicU32>,
    pub failure: Arc<Mutex<Option<io::ErrorKind>>>,
}

impl Screen {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    pub fn fail(&self, kind: Option<io::ErrorKind>) {
        *self.failure.lock().unwrap() = kind;
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        if let Some(kind) = *self.failure.lock().unwrap() {
            return Err(kind.into());
        }
        self.bytes.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
