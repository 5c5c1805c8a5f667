//! The MMIO registers and the status machine behind them, as a driver sees them.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

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

#[test]
fn the_registers_identify_a_version_2_device() {
    let (_, machine) = recorder();
    assert_eq!(machine.read(reg::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(machine.read(reg::VERSION), 2);
    assert_eq!(machine.read(reg::DEVICE_ID), 42);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn the_device_offers_its_own_features_and_those_of_the_transport() {
    let (_, machine) = recorder();
    assert_eq!(machine.device_features(), 1 << 3 | 1 << 40 | 1 << 28 | 1 << 29 | 1 << 32);
    machine.write(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(machine.read(reg::DEVICE_FEATURES), 0);
    machine.write(reg::DEVICE_FEATURES_SEL, u32::MAX);
    assert_eq!(machine.read(reg::DEVICE_FEATURES), 0);
}

#[test]
fn a_driver_that_keeps_the_order_gets_a_running_device() {
    let (recorder, machine) = running();
    assert_eq!(machine.status(), 0b1111);
    assert_eq!(recorder.starts(), [vec![0, 1, 2]]);
    let negotiated = recorder.log().starts.first().unwrap().0;
    assert_eq!(negotiated, machine.device_features());
    assert_eq!(machine.spawner.len(), 1);
}

#[test]
fn several_status_bits_may_be_written_at_once() {
    let (recorder, machine) = recorder();
    machine.set_status(0);
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.set_driver_features(features::VERSION_1);
    machine.set_status(SET_UP | DRIVER_OK);
    assert_eq!(machine.status(), 0b1111);
    assert_eq!(recorder.starts(), [Vec::<u16>::new()], "no queue was enabled");
}

#[test]
fn status_bits_out_of_order_are_not_set() {
    let (recorder, machine) = recorder();
    for value in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | FEATURES_OK | DRIVER_OK] {
        machine.set_status(value);
        assert_eq!(machine.status(), 0, "{value:#x}");
    }
    machine.set_status(ACKNOWLEDGE | FEATURES_OK | DRIVER_OK);
    assert_eq!(machine.status(), ACKNOWLEDGE);
    machine.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
    assert!(recorder.log().starts.is_empty());
}

#[test]
fn status_bits_can_only_be_cleared_by_a_reset() {
    let (recorder, machine) = running();
    for value in [ACKNOWLEDGE, DRIVER_OK, FEATURES_OK | DRIVER] {
        machine.set_status(value);
        assert_eq!(machine.status(), 0b1111);
    }
    assert_eq!(recorder.log().starts.len(), 1);
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
}

#[test]
fn status_bits_that_the_driver_does_not_own_cannot_be_set() {
    let (_, machine) = recorder();
    machine.set_status(0x70 | ACKNOWLEDGE);
    assert_eq!(machine.status(), ACKNOWLEDGE);
    machine.write(reg::STATUS, 0xffff_ff00 | u32::from(DRIVER));
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_driver_that_gave_up_gets_no_further() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_status(SET_UP | FAILED);
    machine.set_status(SET_UP | FAILED | DRIVER_OK);
    assert_eq!(machine.status(), SET_UP | FAILED);
    assert!(recorder.log().starts.is_empty());
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for unknown in [1 << 0, 1 << 34, 1 << 63] {
        let (_, machine) = recorder();
        machine.set_status(ACKNOWLEDGE | DRIVER);
        machine.set_driver_features(features::VERSION_1 | unknown);
        machine.set_status(SET_UP);
        assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER, "{unknown:#x}");
        // The driver may think again.
        machine.set_driver_features(features::VERSION_1);
        machine.set_status(SET_UP);
        assert_eq!(machine.status(), SET_UP);
    }
}

#[test]
fn features_beyond_bit_63_are_not_accepted() {
    let (_, machine) = recorder();
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.write(reg::DRIVER_FEATURES_SEL, 7);
    machine.write(reg::DRIVER_FEATURES, 1);
    machine.set_driver_features(features::VERSION_1);
    machine.set_status(SET_UP);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_legacy_driver_is_not_accepted() {
    let (_, machine) = recorder();
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.set_driver_features(1 << 3);
    machine.set_status(SET_UP);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn features_changed_after_negotiation_are_ignored() {
    let (recorder, machine) = recorder();
    machine.negotiate(features::VERSION_1);
    machine.set_driver_features(u64::MAX);
    machine.set_status(SET_UP | DRIVER_OK);
    machine.set_driver_features(0);
    machine.registers.pause();
    machine.registers.resume().unwrap();
    let log = recorder.log();
    assert!(log.starts.iter().all(|(bits, _)| *bits == features::VERSION_1), "{:?}", log.starts);
}

#[test]
fn each_queue_has_its_own_registers() {
    let (_, machine) = recorder();
    let max = |queue| {
        machine.write(reg::QUEUE_SEL, queue);
        (machine.read(reg::QUEUE_NUM_MAX), machine.read(reg::QUEUE_READY))
    };
    assert_eq!([max(0), max(1), max(2)], [(64, 0), (16, 0), (8, 0)]);
    machine.negotiate(u64::MAX);
    machine.set_queue(1, config(&machine, 16));
    assert_eq!([max(0), max(1), max(2)], [(64, 0), (16, 1), (8, 0)]);
}

#[test]
fn a_queue_that_does_not_exist_reads_as_absent_and_takes_no_writes() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    for queue in [3, 4, 0xffff, 0x1_0000, 0x1_0001, u32::MAX] {
        machine.set_queue(queue, config(&machine, 8));
        assert_eq!((machine.read(reg::QUEUE_NUM_MAX), machine.read(reg::QUEUE_READY)), (0, 0), "{queue:#x}");
        machine.write(reg::QUEUE_READY, 0);
    }
    machine.set_status(SET_UP | DRIVER_OK);
    assert_eq!(recorder.starts(), [Vec::<u16>::new()]);
    assert!(!machine.needs_reset());
}

#[test]
fn kicks_of_queues_that_do_not_exist_are_ignored() {
    let (_, machine) = running();
    for queue in [3, 0xffff, 0x1_0000, u32::MAX] {
        machine.write(reg::QUEUE_NOTIFY, queue);
    }
    assert!(!machine.needs_reset());
}

#[test]
fn a_queue_s_registers_cannot_be_changed_while_it_is_enabled() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, config(&machine, 64));
    machine.write(reg::QUEUE_NUM, 3);
    machine.write(reg::QUEUE_DESC_LOW, u32::try_from(HOLE).unwrap());
    machine.set_status(SET_UP | DRIVER_OK);
    assert!(!machine.needs_reset());
    assert_eq!(recorder.starts(), [vec![0]]);
}

#[test]
fn registers_changed_after_activation_have_no_effect() {
    let image = TestImage::new(4);
    let mut machine = Machine::started(&image);
    let junk = QueueConfig { size: 3, descriptors: u64::MAX, driver: HOLE, device: 1 };
    machine.set_queue(0, junk);
    machine.registers.pause();
    machine.set_queue(0, junk);
    machine.registers.resume().unwrap();
    assert_eq!(machine.block_request(0, 1, &[(0x9000, 512, true)]), (0, 513));
}

#[test]
fn a_queue_can_be_set_up_again_before_the_driver_is_ready() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, QueueConfig { size: 5, ..config(&machine, 8) });
    machine.write(reg::QUEUE_READY, 0);
    assert_eq!(machine.read(reg::QUEUE_READY), 0);
    machine.set_queue(0, config(&machine, 8));
    machine.set_status(SET_UP | DRIVER_OK);
    assert!(!machine.needs_reset());
    assert_eq!(recorder.starts(), [vec![0]]);
}

#[test]
fn no_queue_can_be_enabled_after_the_driver_is_ready() {
    let (recorder, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, config(&machine, 64));
    machine.set_status(SET_UP | DRIVER_OK);
    machine.set_queue(1, config(&machine, 16));
    assert_eq!(machine.read(reg::QUEUE_READY), 0);
    assert_eq!(recorder.starts(), [vec![0]]);
}

#[test]
fn a_queue_disabled_while_it_runs_is_taken_from_the_device() {
    for one_worker in [true, false] {
        let recorder = Recorder { one_worker, ..Recorder::new() };
        let machine = Machine::new(recorder.clone());
        start_all(&machine);
        machine.write(reg::QUEUE_SEL, 1);
        machine.write(reg::QUEUE_READY, 0);
        machine.write(reg::QUEUE_READY, 0);
        assert_eq!(machine.read(reg::QUEUE_READY), 0);
        assert_eq!(recorder.starts(), [vec![0, 1, 2], vec![0, 2]]);
        assert!(!machine.needs_reset());
    }
}

#[test]
fn a_queue_disabled_while_the_device_is_paused_does_not_come_back() {
    let (recorder, machine) = running();
    machine.registers.pause();
    machine.write(reg::QUEUE_SEL, 0);
    machine.write(reg::QUEUE_READY, 0);
    assert_eq!(recorder.log().starts.len(), 1);
    machine.registers.resume().unwrap();
    assert_eq!(recorder.starts(), [vec![0, 1, 2], vec![1, 2]]);
}

#[test]
fn a_queue_that_cannot_work_breaks_the_device_at_activation() {
    let bad = [
        QueueConfig { size: 0, descriptors: 0x1000, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 128, descriptors: 0x1000, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 7, descriptors: 0x1000, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 8, descriptors: HOLE, driver: 0x2000, device: 0x3000 },
        QueueConfig { size: 8, descriptors: 0x1000, driver: 0x2001, device: 0x3000 },
        QueueConfig { size: 8, descriptors: 0x1000, driver: 0x2000, device: u64::MAX - 3 },
    ];
    for config in bad {
        let image = TestImage::new(4);
        let mut machine = Machine::new(block(&image));
        machine.negotiate(u64::MAX);
        machine.set_queue(0, config);
        machine.set_status(SET_UP | DRIVER_OK);
        assert_eq!(machine.status(), 0b1111 | DEVICE_NEEDS_RESET, "{config:?}");
        assert!(machine.spawner.is_empty());
        machine.assert_broken_until_reset();
    }
}

#[test]
fn queue_sizes_that_do_not_fit_the_register_are_not_cut_to_size() {
    let (_, machine) = recorder();
    machine.negotiate(u64::MAX);
    machine.set_queue(0, config(&machine, 8));
    machine.write(reg::QUEUE_READY, 0);
    machine.write(reg::QUEUE_NUM, 0x1_0008);
    machine.write(reg::QUEUE_READY, 1);
    machine.set_status(SET_UP | DRIVER_OK);
    assert!(machine.needs_reset());
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let (recorder, machine) = recorder();
    recorder.log().refuse = true;
    start_all(&machine);
    assert!(machine.needs_reset());
    assert_eq!(machine.registers.faults(), 1);
    recorder.log().refuse = false;
    start_all(&machine);
    assert_eq!(machine.status(), 0b1111);
}

#[test]
fn a_fault_interrupts_once_and_is_counted() {
    let (recorder, machine) = running();
    let control = recorder.log().control.clone().unwrap();
    let before = machine.interrupts.load(Ordering::SeqCst);
    control.fault(&Error::Direction);
    control.fault(&Error::Direction);
    assert_eq!(machine.status(), 0b1111 | DEVICE_NEEDS_RESET);
    assert_eq!(machine.interrupts.load(Ordering::SeqCst), before + 1);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2);
    assert_eq!(machine.registers.faults(), 2);
}

#[test]
fn a_fault_from_before_a_reset_does_not_break_the_device_after_it() {
    let (recorder, machine) = running();
    let old = recorder.log().control.clone().unwrap();
    machine.set_status(0);
    start_all(&machine);
    old.fault(&Error::Direction);
    assert!(!machine.needs_reset());
}

#[test]
fn a_configuration_change_raises_the_generation_and_interrupts() {
    let (recorder, machine) = running();
    let generation = machine.read(reg::CONFIG_GENERATION);
    recorder.log().control.clone().unwrap().config_changed();
    assert_ne!(machine.read(reg::CONFIG_GENERATION), generation);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2);
    machine.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 2, "the other reason was acknowledged");
    machine.write(reg::INTERRUPT_ACK, 2);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn a_reset_clears_everything_a_driver_can_see() {
    let (recorder, machine) = running();
    recorder.log().control.clone().unwrap().fault(&Error::Direction);
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.read(reg::INTERRUPT_STATUS), 0);
    for queue in 0..3 {
        machine.write(reg::QUEUE_SEL, queue);
        assert_eq!(machine.read(reg::QUEUE_READY), 0);
    }
    assert!(machine.spawner.is_empty());
    assert_eq!(recorder.log().resets, 2, "one at the start, one now");
    // No feature of the last driver is left over.
    machine.set_status(ACKNOWLEDGE | DRIVER);
    machine.set_status(SET_UP);
    assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn a_reset_of_a_device_that_never_ran_is_harmless() {
    let (recorder, machine) = recorder();
    machine.set_status(0);
    machine.set_status(ACKNOWLEDGE);
    machine.set_status(0);
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
    assert!(recorder.log().starts.is_empty());
    start_all(&machine);
    assert_eq!(machine.status(), 0b1111);
}

#[test]
fn a_reset_while_paused_leaves_nothing_to_resume() {
    let (recorder, machine) = running();
    machine.registers.pause();
    machine.set_status(0);
    machine.registers.resume().unwrap();
    assert_eq!(recorder.log().starts.len(), 1);
    assert!(machine.spawner.is_empty());
}

#[test]
fn pause_and_resume_give_the_device_the_same_queues() {
    for one_worker in [true, false] {
        let recorder = Recorder { one_worker, ..Recorder::new() };
        let machine = Machine::new(recorder.clone());
        start_all(&machine);
        machine.registers.pause();
        assert!(machine.spawner.is_empty());
        machine.registers.resume().unwrap();
        assert_eq!(recorder.starts(), [vec![0, 1, 2], vec![0, 1, 2]]);
        assert_eq!(recorder.log().resets, 1, "that of the driver at the start");
    }
}

#[test]
fn a_kick_storm_and_kicks_of_a_stopped_device_are_harmless() {
    let image = TestImage::new(4);
    let mut machine = Machine::new(block(&image));
    for _ in 0..1000 {
        machine.kick();
    }
    machine.start(u64::MAX);
    for _ in 0..1000 {
        machine.kick();
    }
    assert_eq!(machine.block_request(0, 0, &[(0x9000, 512, true)]), (0, 513));
    machine.set_status(0);
    for _ in 0..1000 {
        machine.run();
    }
    machine.assert_works_after_reset();
}

#[test]
fn registers_take_aligned_words_only() {
    let (_, machine) = recorder();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (0, 0), (1, 4), (2, 4), (0x70, 1), (0x51, 4), (0x70, 16)] {
        let mut data = vec![0xff; len];
        assert_eq!(machine.registers.read(offset, &mut data), Err(AccessError::Width), "{offset:#x} {len}");
        assert!(data.iter().all(|byte| *byte == 0xff));
        assert_eq!(machine.registers.write(offset, &data), Err(AccessError::Width), "{offset:#x} {len}");
    }
    assert_eq!(machine.status(), 0);
}

#[test]
fn registers_answer_in_their_own_direction_only() {
    let (_, machine) = recorder();
    let written_only = [
        reg::DEVICE_FEATURES_SEL,
        reg::DRIVER_FEATURES,
        reg::DRIVER_FEATURES_SEL,
        reg::QUEUE_SEL,
        reg::QUEUE_NUM,
        reg::QUEUE_NOTIFY,
        reg::INTERRUPT_ACK,
        reg::QUEUE_DESC_LOW,
        reg::QUEUE_DEVICE_HIGH,
        reg::SHM_SEL,
    ];
    for offset in written_only {
        assert_eq!(machine.registers.read(offset, &mut [0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
        assert_eq!(machine.registers.write(offset, &[0; 4]), Ok(()), "{offset:#x}");
    }
    let read_only = [
        reg::MAGIC_VALUE,
        reg::VERSION,
        reg::DEVICE_ID,
        reg::VENDOR_ID,
        reg::DEVICE_FEATURES,
        reg::QUEUE_NUM_MAX,
        reg::INTERRUPT_STATUS,
        reg::SHM_LEN_LOW,
        reg::CONFIG_GENERATION,
    ];
    for offset in read_only {
        assert_eq!(machine.registers.read(offset, &mut [0; 4]), Ok(()), "{offset:#x}");
        assert_eq!(machine.registers.write(offset, &[0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
    }
    for offset in [0x18, 0x1c, 0x28, 0x3c, 0x40, 0x48, 0x54, 0x68, 0x74, 0x88, 0xc0, 0xf8] {
        assert_eq!(machine.registers.read(offset, &mut [0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
        assert_eq!(machine.registers.write(offset, &[0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
    }
}

#[test]
fn there_is_no_shared_memory_region() {
    let (_, machine) = recorder();
    for region in [0, 1, 255] {
        machine.write(reg::SHM_SEL, region);
        for offset in [reg::SHM_LEN_LOW, reg::SHM_LEN_HIGH, reg::SHM_BASE_LOW, reg::SHM_BASE_HIGH] {
            assert_eq!(machine.read(offset), u32::MAX);
        }
    }
}

#[test]
fn the_configuration_space_is_read_at_any_offset_and_width() {
    let (_, machine) = recorder();
    let read = |offset, len| {
        let mut data = vec![0xff; len];
        machine.registers.read(reg::CONFIG + offset, &mut data).unwrap();
        data
    };
    assert_eq!(read(0, 1), [0xa0]);
    assert_eq!(read(3, 4), [0xa3, 0xa4, 0xa5, 0xa6]);
    assert_eq!(read(1, 8), [0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8]);
    assert_eq!(read(8, 4), [0xa8, 0xa9, 0, 0], "beyond its end there are zeros");
    assert_eq!(read(10, 2), [0, 0]);
    assert_eq!(read(0xeff, 1), [0]);
    assert_eq!(read(u64::MAX - reg::CONFIG, 8), [0; 8]);
    assert_eq!(read(5, 0), []);
}

#[test]
fn the_configuration_space_is_written_inside_its_bounds_only() {
    let (recorder, machine) = recorder();
    let write = |offset, data: &[u8]| machine.registers.write(reg::CONFIG + offset, data).unwrap();
    write(9, &[1]);
    write(1, &[1, 2, 3]);
    write(9, &[1, 2]);
    write(10, &[1]);
    write(u64::MAX - reg::CONFIG, &[1]);
    write(0, &[0; 11]);
    assert_eq!(recorder.log().config_writes, [(9, vec![1]), (1, vec![1, 2, 3])]);
}

#[test]
fn queue_sizes_that_no_driver_could_use_are_refused_when_the_device_is_made() {
    for size in [0, 3, 40_000] {
        let mut recorder = Recorder::new();
        recorder.info.queue_max_sizes = vec![8, size];
        let wiring = freestone_virtio::MmioWiring {
            base: 0,
            mem: common::memory(),
            irq: freestone_bus::Irq::null(),
            doorbells: None,
            spawner: Arc::new(freestone_bus::ManualSpawner::new()),
        };
        let error = freestone_virtio::MmioTransport::new("odd", Box::new(recorder), wiring).unwrap_err();
        assert!(error.to_string().starts_with("device odd: queue sizes must be"), "{error}");
    }
}
