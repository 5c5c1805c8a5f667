//! The checks pass a device that follows the specification and find the defects they are for.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};

use freestone_bus::{
    Access, AccessError, Device, Error, IoDevice, IoDeviceMut, Plug, Progress, Source, Task, Wiring, Work,
    spawn,
};
use freestone_snapshot::{Restoring, Saving, Section};
use freestone_testkit::conformance::{self, CHECKS};
use freestone_testkit::driver::{features, regs, status};
use serde::{Deserialize, Serialize};

/// What a device may do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Defect {
    None,
    WrongMagic,
    LegacyOnly,
    AcceptsAnyFeature,
    FeaturesBeyond64,
    FeaturesChangeLater,
    OddQueueSize,
    GhostQueue,
    NoQueue,
    StatusOutlivesReset,
    QueueOutlivesReset,
    InterruptOutlivesReset,
    NeverIdle,
    LosesQueueOnResume,
    PauseFails,
    ShutdownFails,
}

/// The registers of a device with one queue, from which it takes nothing.
struct Registers {
    defect: Defect,
    status: u32,
    device_sel: u32,
    driver_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    ready: u32,
    interrupt: u32,
    kicked: bool,
}

impl Registers {
    fn new(defect: Defect) -> Self {
        Self {
            defect,
            status: 0,
            device_sel: 0,
            driver_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            ready: 0,
            interrupt: 0,
            kicked: false,
        }
    }

    fn features(&self) -> u64 {
        if self.defect == Defect::LegacyOnly { 1 } else { features::VERSION_1 | 1 }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            if self.defect != Defect::StatusOutlivesReset {
                self.status = 0;
            }
            if self.defect != Defect::QueueOutlivesReset {
                self.ready = 0;
            }
            if self.defect != Defect::InterruptOutlivesReset {
                self.interrupt = 0;
            }
            self.driver_features = 0;
            return;
        }
        let refused =
            self.driver_features & !self.features() != 0 && self.defect != Defect::AcceptsAnyFeature;
        self.status = if refused { value & !status::FEATURES_OK } else { value };
    }

    fn get(&self, offset: u64) -> Option<u32> {
        let defect = self.defect;
        Some(match offset {
            regs::MAGIC if defect == Defect::WrongMagic => 0,
            regs::MAGIC => 0x7472_6976,
            regs::VERSION => 2,
            regs::DEVICE_ID => 4,
            regs::DEVICE_FEATURES => match self.device_sel {
                0 => 1,
                1 => u32::from(self.features() & features::VERSION_1 != 0),
                _ => u32::from(defect == Defect::FeaturesBeyond64),
            },
            regs::QUEUE_NUM_MAX => match self.queue_sel {
                0 if defect == Defect::NoQueue => 0,
                0 if defect == Defect::OddQueueSize => 48,
                0 => 64,
                0xffff if defect == Defect::GhostQueue => 64,
                _ => 0,
            },
            regs::QUEUE_READY if self.queue_sel == 0 => self.ready,
            regs::QUEUE_READY | regs::VENDOR_ID | regs::CONFIG_GENERATION => 0,
            regs::INTERRUPT_STATUS => self.interrupt,
            regs::STATUS => self.status,
            _ => return None,
        })
    }

    fn set(&mut self, offset: u64, value: u32) {
        match offset {
            regs::DEVICE_FEATURES_SEL => self.device_sel = value,
            regs::DRIVER_FEATURES_SEL => self.driver_sel = value,
            // Agreed on is agreed on.
            regs::DRIVER_FEATURES
                if self.status & status::FEATURES_OK != 0 && self.defect != Defect::FeaturesChangeLater => {}
            regs::DRIVER_FEATURES if self.driver_sel < 2 => {
                let shift = 32 * self.driver_sel;
                self.driver_features =
                    self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            regs::QUEUE_SEL => self.queue_sel = value,
            regs::QUEUE_READY if self.queue_sel == 0 => self.ready = value & 1,
            regs::QUEUE_NOTIFY => {
                self.kicked = true;
                self.interrupt |= 1;
            }
            regs::INTERRUPT_ACK => self.interrupt &= !value,
            regs::STATUS => self.set_status(value),
            _ => {}
        }
    }
}

impl IoDeviceMut for Registers {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access {
        let data: &mut [u8; 4] = data.try_into().map_err(|_| AccessError::Width)?;
        *data = self.get(offset).ok_or(AccessError::NoRegister)?.to_le_bytes();
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Access {
        let data: [u8; 4] = data.try_into().map_err(|_| AccessError::Width)?;
        self.set(offset, u32::from_le_bytes(data));
        Ok(())
    }
}

struct Worker(Arc<Mutex<Registers>>);

impl Work for Worker {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn process(&mut self) -> Progress {
        let mut registers = self.0.lock().unwrap();
        if registers.kicked && registers.defect == Defect::NeverIdle {
            return Progress::More;
        }
        registers.kicked = false;
        Progress::Idle
    }
}

struct FakeDevice {
    registers: Arc<Mutex<Registers>>,
    _task: Task<Worker>,
}

fn failure() -> freestone_bus::Result<()> {
    Err(Error::Missing { what: "a heart", device: "fake".to_owned() })
}

/// What the registers hold.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    status: u32,
    device_sel: u32,
    driver_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    ready: u32,
    interrupt: u32,
}

impl Section for Saved {
    const NAME: &'static str = "fake";
    const VERSION: u32 = 1;
}

impl Device for FakeDevice {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn save(&mut self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        let registers = self.registers.lock().unwrap();
        let Registers {
            status, device_sel, driver_sel, driver_features, queue_sel, ready, interrupt, ..
        } = *registers;
        let saved = Saved { status, device_sel, driver_sel, driver_features, queue_sel, ready, interrupt };
        state.put(&saved).map_err(Error::state("save"))
    }
    fn restore(&mut self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let saved: Saved = state.take().map_err(Error::state("restore"))?;
        let mut registers = self.registers.lock().unwrap();
        let Saved { status, device_sel, driver_sel, driver_features, queue_sel, ready, interrupt } = saved;
        let defect = registers.defect;
        *registers = Registers {
            defect,
            status,
            device_sel,
            driver_sel,
            driver_features,
            queue_sel,
            ready,
            interrupt,
            kicked: false,
        };
        Ok(())
    }
    fn pause(&mut self) -> freestone_bus::Result<()> {
        if self.registers.lock().unwrap().defect == Defect::PauseFails { failure() } else { Ok(()) }
    }
    fn resume(&mut self) -> freestone_bus::Result<()> {
        let mut registers = self.registers.lock().unwrap();
        if registers.defect == Defect::LosesQueueOnResume {
            registers.ready = 0;
        }
        Ok(())
    }
    fn shutdown(&mut self) -> freestone_bus::Result<()> {
        if self.registers.lock().unwrap().defect == Defect::ShutdownFails { failure() } else { Ok(()) }
    }
}

struct FakePlug(Defect);

impl Plug for FakePlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> freestone_bus::Result<Box<dyn Device>> {
        let registers = Arc::new(Mutex::new(Registers::new(self.0)));
        let base = wiring.alloc_mmio(0x200)?;
        wiring.mmio(base, 0x200, Arc::clone(&registers) as Arc<dyn IoDevice>)?;
        let task = spawn(&*wiring.spawner(), Worker(Arc::clone(&registers)))
            .map_err(Error::io("spawn the worker"))?;
        Ok(Box::new(FakeDevice { registers, _task: task }))
    }
}

fn make(defect: Defect) -> Box<dyn Plug> {
    Box::new(FakePlug(defect))
}

freestone_testkit::virtio_mmio_conformance!(a_device_without_defect, || super::make(super::Defect::None));

#[test]
fn all_checks_together_pass_a_device_without_defect() {
    conformance::virtio_mmio(|| make(Defect::None)).unwrap();
}

#[test]
fn each_defect_is_found_by_the_check_that_is_for_it() {
    let cases = [
        (Defect::WrongMagic, "is_found"),
        (Defect::LegacyOnly, "is_found"),
        (Defect::NoQueue, "is_found"),
        (Defect::AcceptsAnyFeature, "negotiates_features"),
        (Defect::FeaturesBeyond64, "negotiates_features"),
        (Defect::FeaturesChangeLater, "is_activated_once"),
        (Defect::OddQueueSize, "keeps_queue_limits"),
        (Defect::GhostQueue, "keeps_queue_limits"),
        (Defect::StatusOutlivesReset, "resets"),
        (Defect::QueueOutlivesReset, "resets"),
        (Defect::InterruptOutlivesReset, "resets"),
        (Defect::NeverIdle, "survives_hostile_chains"),
        (Defect::LosesQueueOnResume, "pauses_and_resumes"),
        (Defect::PauseFails, "pauses_and_resumes"),
        (Defect::ShutdownFails, "pauses_and_resumes"),
    ];
    for (defect, name) in cases {
        let (_, check) = CHECKS.iter().find(|(n, _)| *n == name).unwrap();
        check(&|| make(defect)).expect_err(&format!("{defect:?} is not found by {name}"));
        conformance::virtio_mmio(|| make(defect)).unwrap_err();
    }
}
