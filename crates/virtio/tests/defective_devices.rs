//! The checks of all transports find the defects they are for: a small device that does one thing wrong, and registers that do.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use freestone_bus::pci::PciSegment;
use freestone_bus::{
    Access, Bus, Description, Device, Doorbells, IoDevice, Irq, MemorySlots, MsiSource, Notifier, Plug,
    Progress, Registration, Source, Spawn, Wiring, Work,
};
use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_snapshot::{Restoring, Saving, Section};
use freestone_testkit::conformance::{CHECKS, virtio_mmio, virtio_pci};
use freestone_virtio::mmio::reg;
use freestone_virtio::{
    ActiveQueue, DeviceInfo, DeviceType, Resources, Result, SpareBuffers, Transport, VirtioDevice,
    VirtioPlug, Worker,
};
use serde::{Deserialize, Serialize};

/// What may be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Defect {
    None,
    // Of the device.
    LosesRequestOnPause,
    CompletesTwice,
    ClaimsTooMuch,
    WritesAfterReset,
    WorksWhilePaused,
    PanicsOnConfigOffset,
    TornConfig,
    DeadAfterReset,
    ForgetsOnSave,
    LosesRequestOnRestore,
    PanicsOnState,
    // Of the registers.
    QueueFollowsItsRegisters,
    ActivatedTwice,
    WorksBeforeDriverOk,
    MissingQueueIsTheFirst,
    DisabledQueueGoesOn,
}

/// Where the device writes what it must not write: memory that the driver uses.
const ASTRAY: u64 = 0x1_0000;

struct Faulty {
    defect: Defect,
    info: DeviceInfo,
    astray: Option<Arc<Astray>>,
    task: Option<Registration>,
    resets: usize,
    /// That it was started: what is in a snapshot.
    remembered: u8,
    restored: bool,
}

#[derive(Serialize, Deserialize)]
struct FaultyState(u8);

impl Section for FaultyState {
    const NAME: &'static str = "faulty";
    const VERSION: u32 = 1;
}

impl Faulty {
    fn new(defect: Defect) -> Self {
        let queue_max_sizes = vec![16, 16];
        let info = DeviceInfo { device_type: DeviceType(42), features: 0, queue_max_sizes, config_len: 16 };
        Self { defect, info, astray: None, task: None, resets: 0, remembered: 0, restored: false }
    }
}

/// Work that nobody stops.
struct Astray {
    mem: GuestMem,
    active: AtomicBool,
    value: Mutex<u8>,
}

impl freestone_bus::Pollable for Astray {
    fn poll(&self) -> freestone_bus::Turn {
        if self.active.load(Ordering::SeqCst) {
            let mut value = self.value.lock().unwrap();
            *value = value.wrapping_add(1);
            self.mem.view().write_obj(*value, GuestAddress(ASTRAY)).unwrap();
        }
        freestone_bus::Turn::Idle
    }
}

impl VirtioDevice for Faulty {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn attach(&mut self, wiring: &mut dyn Wiring) -> freestone_bus::Result<()> {
        let astray = Arc::new(Astray {
            mem: wiring.memory(),
            active: AtomicBool::new(false),
            value: Mutex::default(),
        });
        self.task = Some(wiring.spawner().register(astray.clone(), Vec::new()).unwrap());
        self.astray = Some(astray);
        Ok(())
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let torn = self.defect == Defect::TornConfig && data.len() == 8;
        let space = [if torn { 1 } else { 0 }; 16];
        let end =
            if self.defect == Defect::PanicsOnConfigOffset && offset == 5 { 20 } else { offset + data.len() };
        data.copy_from_slice(&space[offset..end]);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        if let (Defect::WorksWhilePaused, Some(astray)) = (self.defect, &self.astray) {
            astray.active.store(true, Ordering::SeqCst);
        }
        let dead = self.defect == Defect::DeadAfterReset && self.resets > 1
            || self.defect == Defect::LosesRequestOnRestore && self.restored;
        self.remembered = 1;
        let Resources { mem, queues, .. } = resources;
        let worker = |active| FaultyWorker { defect: self.defect, mem: mem.clone(), active, dead };
        Ok(queues.into_iter().map(|active| Box::new(worker(active)) as Box<dyn Worker>).collect())
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.restored = false;
        self.remembered = 0;
        if let Some(astray) = &self.astray {
            astray.active.store(self.defect == Defect::WritesAfterReset, Ordering::SeqCst);
        }
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        state.put(&FaultyState(self.remembered)).map_err(freestone_bus::Error::state("save"))
    }

    fn restore(&mut self, _features: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let FaultyState(remembered) = state.take().map_err(freestone_bus::Error::state("restore"))?;
        assert!(self.defect != Defect::PanicsOnState || remembered <= 1);
        self.restored = true;
        self.remembered = if self.defect == Defect::ForgetsOnSave { 0 } else { remembered };
        Ok(())
    }
}

/// Takes one request in a turn.
struct FaultyWorker {
    defect: Defect,
    mem: GuestMem,
    active: ActiveQueue,
    dead: bool,
}

impl Work for FaultyWorker {
    fn sources(&self) -> Vec<Source> {
        vec![self.active.kick.clone()]
    }

    fn process(&mut self) -> Progress {
        let view = self.mem.view();
        // A broken queue is looked at no more.
        let Ok(mut queue) = self.active.queue.attach(&view) else { return Progress::Idle };
        let mut buffers = SpareBuffers::new().take();
        let Ok(Some(chain)) = queue.pop(&mut buffers) else {
            let _broken = queue.enable_kicks();
            return Progress::Idle;
        };
        if self.dead {
            return Progress::Idle;
        }
        let head = chain.head();
        let len = if self.defect == Defect::ClaimsTooMuch { 0x10_0000 } else { 0 };
        // The last of a run: what follows would write over it.
        let twice = self.defect == Defect::CompletesTwice && head == 9;
        let _broken = queue.push_used(chain, len);
        let _broken = queue.publish();
        if twice {
            let at = self.active.queue.config().device;
            let index: u16 = self.mem.view().read_obj(GuestAddress(at + 2)).unwrap_or(0);
            let _broken =
                self.mem.view().write_obj(u32::from(head), GuestAddress(at + 4 + 8 * u64::from(index % 16)));
            let _broken = self.mem.view().write_obj(index.wrapping_add(1), GuestAddress(at + 2));
        }
        Progress::More
    }
}

impl Worker for FaultyWorker {
    fn into_queues(mut self: Box<Self>) -> Vec<ActiveQueue> {
        if self.defect == Defect::LosesRequestOnPause {
            let view = self.mem.view();
            let mut buffers = SpareBuffers::new().take();
            if let Ok(mut queue) = self.active.queue.attach(&view) {
                let _lost = queue.pop(&mut buffers);
            }
        }
        vec![self.active]
    }
}

/// Registers that do one thing more.
struct SpoiledRegisters {
    defect: Defect,
    registers: Arc<dyn IoDevice>,
    mem: GuestMem,
    /// The driver is told that its queues are not live.
    hidden: AtomicBool,
}

impl SpoiledRegisters {
    fn register(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.registers.read(offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_le_bytes()).unwrap();
    }
}

impl IoDevice for SpoiledRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        self.registers.read(offset, data)?;
        if offset == reg::QUEUE_READY && self.hidden.load(Ordering::SeqCst) {
            data.fill(0);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        const DRIVER_OK: u32 = 4;
        let value = data.try_into().map_or(0, u32::from_le_bytes);
        let running = self.register(reg::STATUS) & DRIVER_OK != 0;
        match (self.defect, offset) {
            (Defect::QueueFollowsItsRegisters, reg::QUEUE_NUM) if running => self.set(reg::QUEUE_READY, 0),
            (Defect::ActivatedTwice, reg::STATUS) if running && value & DRIVER_OK != 0 => {
                self.set(reg::QUEUE_SEL, 0);
                self.set(reg::QUEUE_READY, 0);
            }
            (Defect::WorksBeforeDriverOk, reg::QUEUE_NOTIFY) if !running => {
                let view = self.mem.view();
                let old: u8 = view.read_obj(GuestAddress(ASTRAY)).unwrap();
                view.write_obj(old.wrapping_add(1), GuestAddress(ASTRAY)).unwrap();
            }
            (Defect::MissingQueueIsTheFirst, reg::QUEUE_NOTIFY) if running && value > 1 => {
                self.set(reg::QUEUE_SEL, 0);
                self.set(reg::QUEUE_READY, 0);
            }
            (Defect::DisabledQueueGoesOn, reg::QUEUE_READY) if running && value == 0 => {
                self.hidden.store(true, Ordering::SeqCst);
                return Ok(());
            }
            (Defect::DisabledQueueGoesOn, reg::STATUS) if value == 0 => {
                self.hidden.store(false, Ordering::SeqCst);
            }
            _ => {}
        }
        self.registers.write(offset, data)
    }
}

/// A machine that puts [`SpoiledRegisters`] before the registers of a device.
struct Spoiling<'a>(&'a mut dyn Wiring, Defect);

impl Wiring for Spoiling<'_> {
    fn memory(&self) -> GuestMem {
        self.0.memory()
    }

    fn pio(&mut self, base: u16, len: u16, device: Arc<dyn IoDevice>) -> freestone_bus::Result<()> {
        self.0.pio(base, len, device)
    }

    fn alloc_mmio(&mut self, len: u64) -> freestone_bus::Result<u64> {
        self.0.alloc_mmio(len)
    }

    fn mmio(&mut self, base: u64, len: u64, device: Arc<dyn IoDevice>) -> freestone_bus::Result<()> {
        let mem = self.0.memory();
        self.0.mmio(
            base,
            len,
            Arc::new(SpoiledRegisters {
                defect: self.1,
                registers: device,
                mem,
                hidden: AtomicBool::new(false),
            }),
        )
    }

    fn irq(&mut self, gsi: Option<u32>) -> freestone_bus::Result<(u32, Irq)> {
        self.0.irq(gsi)
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        self.0.doorbells()
    }

    fn mmio_bus(&self) -> Bus {
        self.0.mmio_bus()
    }

    fn msi(&self) -> Option<Arc<dyn MsiSource>> {
        self.0.msi()
    }

    fn pci(&self) -> Option<Arc<PciSegment>> {
        self.0.pci()
    }

    fn memory_slots(&self) -> Option<Arc<dyn MemorySlots>> {
        self.0.memory_slots()
    }

    fn spawner(&self) -> Arc<dyn Spawn> {
        self.0.spawner()
    }

    fn notifier(&self) -> Notifier {
        self.0.notifier()
    }

    fn describe(&mut self, description: Description) {
        self.0.describe(description);
    }
}

struct SpoiledPlug(Transport, Defect);

impl Plug for SpoiledPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let plug = VirtioPlug::new(self.0, Faulty::new(self.1), "faulty");
        Box::new(plug).plug(&mut Spoiling(wiring, self.1))
    }
}

#[test]
fn without_a_defect_all_checks_pass_on_both_transports() {
    virtio_mmio(|| Box::new(SpoiledPlug(Transport::Mmio, Defect::None))).unwrap();
    virtio_pci(|| Box::new(SpoiledPlug(Transport::Pci, Defect::None))).unwrap();
}

#[test]
fn each_defect_is_found_by_the_check_that_is_for_it() {
    let cases = [
        (Defect::LosesRequestOnPause, "loses_nothing_when_paused"),
        (Defect::CompletesTwice, "loses_nothing_when_paused"),
        (Defect::ClaimsTooMuch, "loses_nothing_when_paused"),
        (Defect::WorksWhilePaused, "loses_nothing_when_paused"),
        (Defect::WritesAfterReset, "resets_at_every_point"),
        (Defect::WritesAfterReset, "resets_while_paused"),
        (Defect::DeadAfterReset, "resets_at_every_point"),
        (Defect::LosesRequestOnPause, "loses_nothing_when_restored"),
        (Defect::LosesRequestOnRestore, "loses_nothing_when_restored"),
        (Defect::ForgetsOnSave, "restores_at_every_point"),
        (Defect::ForgetsOnSave, "restores_what_is_broken"),
        (Defect::PanicsOnState, "survives_damaged_states"),
        (Defect::PanicsOnConfigOffset, "reads_config_consistently"),
        (Defect::TornConfig, "reads_config_consistently"),
        (Defect::QueueFollowsItsRegisters, "keeps_live_queues"),
        (Defect::ActivatedTwice, "is_activated_once"),
        (Defect::WorksBeforeDriverOk, "waits_for_driver_ok"),
        (Defect::MissingQueueIsTheFirst, "survives_kick_storms"),
        (Defect::DisabledQueueGoesOn, "disables_queues"),
    ];
    for (defect, name) in cases {
        let (_, check) = CHECKS.iter().find(|(n, _)| *n == name).unwrap();
        let run = || check(&|| Box::new(SpoiledPlug(Transport::Mmio, defect)));
        let found = catch_unwind(AssertUnwindSafe(run)).map_or(true, |checked| checked.is_err());
        assert!(found, "{defect:?} is not found by {name}");
    }
}
