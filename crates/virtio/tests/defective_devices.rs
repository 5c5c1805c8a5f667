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
use freestone_testkit::conformance::{CHECKS, virtio_mmio, virtio_pci};
use freestone_virtio::mmio::reg;
use freestone_virtio::{
    ActiveQueue, DeviceInfo, DeviceType, Resources, Result, SpareBuffers, Transport, VirtioDevice, VirtioPlug,
    Worker,
};

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
    EveryKickIsARequest,
    // Of the registers.
    QueueFollowsItsRegisters,
    ActivatedTwice,
    WorksBeforeDriverOk,
    MissingQueueIsTheFirst,
}

/// Where the device writes what it must not write: memory that the driver uses.
const ASTRAY: u64 = 0x1_0000;

struct Faulty {
    defect: Defect,
    info: DeviceInfo,
    astray: Option<Arc<Astray>>,
    task: Option<Registration>,
    resets: usize,
}

impl Faulty {
    fn new(defect: Defect) -> Self {
        let queue_max_sizes = vec![16, 16];
        let info = DeviceInfo { device_type: DeviceType(42), features: 0, queue_max_sizes, config_len: 16 };
        Self { defect, info, astray: None, task: None, resets: 0 }
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
        let end = if self.defect == Defect::PanicsOnConfigOffset && offset == 5 { 20 } else { offset + data.len() };
        data.copy_from_slice(&space[offset..end]);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        if let (Defect::WorksWhilePaused, Some(astray)) = (self.defect, &self.astray) {
            astray.active.store(true, Ordering::SeqCst);
        }
        let dead = self.defect == Defect::DeadAfterReset && self.resets > 1;
        let Resources { mem, queues, .. } = resources;
        let worker = |active| FaultyWorker { defect: self.defect, mem: mem.clone(), active, dead };
        Ok(queues.into_iter().map(|active| Box::new(worker(active)) as Box<dyn Worker>).collect())
    }

    fn reset(&mut self) {
        self.resets += 1;
        if let Some(astray) = &self.astray {
            astray.active.store(self.defect == Defect::WritesAfterReset, Ordering::SeqCst);
        }
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
        let twice = self.defect == Defect::CompletesTwice && head == 3;
        let _broken = queue.push_used(chain, len);
        let _broken = queue.publish();
        if twice {
            let at = self.active.queue.config().device;
            let index: u16 = self.mem.view().read_obj(GuestAddress(at + 2)).unwrap_or(0);
            let _broken = self.mem.view().write_obj(u32::from(head), GuestAddress(at + 4 + 8 * u64::from(index % 16)));
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
