//! The MMIO registers and the status machine behind them, as a driver sees them.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod access;
#[path = "../common/mod.rs"]
mod common;
mod life;
mod queues;
mod status;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{HOLE, Machine, Ring, TestImage, block};
use freestone_bus::{AccessError, IoDevice, Progress, Source, Work};
use freestone_virtio::mmio::reg;
use freestone_virtio::transport::status::{
    ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK,
};
use freestone_virtio::{
    ActiveQueue, DeviceControl, DeviceInfo, DeviceType, Error, QueueConfig, Resources, VirtioDevice, Worker,
    features,
};

/// A device with three queues that records what happens to it.
#[derive(Debug, Clone)]
struct Recorder {
    info: DeviceInfo,
    log: Arc<Mutex<Log>>,
    /// One worker for all queues, or one for each.
    one_worker: bool,
}

#[derive(Debug, Default)]
struct Log {
    starts: Vec<(u64, Vec<u16>)>,
    resets: usize,
    config_writes: Vec<(usize, Vec<u8>)>,
    control: Option<DeviceControl>,
    refuse: bool,
}

impl Recorder {
    fn new() -> Self {
        let info = DeviceInfo {
            device_type: DeviceType(42),
            features: 1 << 3 | 1 << 40,
            queue_max_sizes: vec![64, 16, 8],
            config_len: 10,
        };
        Self { info, log: Arc::default(), one_worker: true }
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    fn starts(&self) -> Vec<Vec<u16>> {
        self.log().starts.iter().map(|(_, queues)| queues.clone()).collect()
    }
}

#[derive(Debug)]
struct Holder(Vec<ActiveQueue>);

impl Work for Holder {
    fn sources(&self) -> Vec<Source> {
        self.0.iter().map(|q| q.kick.clone() as Source).collect()
    }
    fn process(&mut self) -> Progress {
        Progress::Idle
    }
}

impl Worker for Holder {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        self.0
    }
}

impl VirtioDevice for Recorder {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        assert!(offset + data.len() <= 10, "the transport promised to stay inside");
        let at = u8::try_from(offset).unwrap();
        data.iter_mut().zip(at..).for_each(|(byte, n)| *byte = 0xa0 + n);
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= 10, "the transport promised to stay inside");
        self.log().config_writes.push((offset, data.to_vec()));
    }
    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>, Error> {
        let mut log = self.log();
        log.starts.push((resources.features, resources.queues.iter().map(|q| q.index).collect()));
        log.control = Some(resources.control);
        if log.refuse {
            return Err(Error::Config { device: "recorder".into(), reason: "told to refuse" });
        }
        Ok(if self.one_worker {
            vec![Box::new(Holder(resources.queues))]
        } else {
            resources.queues.into_iter().rev().map(|q| Box::new(Holder(vec![q])) as _).collect()
        })
    }
    fn reset(&mut self) {
        self.log().resets += 1;
    }
}

const SET_UP: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

fn recorder() -> (Recorder, Machine) {
    let recorder = Recorder::new();
    (recorder.clone(), Machine::new(recorder))
}

fn config(machine: &Machine, size: u16) -> QueueConfig {
    Ring::new(&machine.mem, size).config
}

/// A recorder whose driver enabled all three queues and is ready.
fn running() -> (Recorder, Machine) {
    let (recorder, machine) = recorder();
    start_all(&machine);
    (recorder, machine)
}

fn start_all(machine: &Machine) {
    machine.negotiate(u64::MAX);
    for (queue, size) in [(0, 64), (1, 16), (2, 8)] {
        machine.set_queue(queue, config(machine, size));
    }
    machine.set_status(SET_UP | DRIVER_OK);
}
