//! The golden file of each section: what a release has written is read for ever, and is what is written today. A change of a saved
//! type needs a new version, with an upgrade and a file of its own (`FREESTONE_BLESS=1`); the files of older versions stay.
#![cfg(all(feature = "blk", feature = "console", feature = "balloon"))]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fmt::Debug;
use std::io::Write;

use freestone_bus::pci::{ConfigState, MsixState};
use freestone_snapshot::{Arch, Header, Limits, Reader, Section, Sections, State, Writer};
use freestone_virtio::balloon::{BalloonState, SavedRun};
use freestone_virtio::blk::BlockState;
use freestone_virtio::console::{ConsoleState, SavedPort};
use freestone_virtio::mmio::MmioState;
use freestone_virtio::pci::PciState;
use freestone_virtio::transport::state::{CoreState, SavedQueue, SavedRing};

fn header() -> Header {
    Header::new(Arch::X86_64, "tests 0.1").unwrap()
}

fn snapshot_of<S: Section>(section: &S) -> Vec<u8> {
    let mut state = State::new();
    state.of("golden").put(section).unwrap();
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    state.write_to(&mut writer).unwrap();
    writer.finish().unwrap()
}

fn is_golden<S: Section + PartialEq + Debug>(section: &S) {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let path = format!("{dir}/{}-{}.snapshot", S::NAME, S::VERSION);
    if std::env::var_os("FREESTONE_BLESS").is_some() {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path).unwrap();
        file.write_all(&snapshot_of(section)).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    let mut read = Sections::load(Reader::new(golden.as_slice(), Limits::default()).unwrap()).unwrap();
    assert_eq!(read.of("golden").take::<S>().unwrap(), *section);
    assert!(snapshot_of(section) == golden, "{} has changed: it needs a new version", S::NAME);
}

#[test]
fn virtio() {
    let queue = SavedQueue {
        max_size: 256,
        size: 128,
        descriptors: 0x1000,
        driver: 0x2000,
        device: 0x1_2345_6000,
        ready: true,
        ring: Some(SavedRing::Split { next_avail: 300, next_used: 299 }),
    };
    let ring = Some(SavedRing::Packed { next_avail: (3, true), next_used: (127, false) });
    is_golden(&CoreState {
        device_type: 2,
        offered: 0x5_7000_0000,
        driver_features: 0x1_2000_0000,
        unknown_features: false,
        device_features_select: 1,
        driver_features_select: 2,
        queue_select: 3,
        status: 0xf,
        needs_reset: true,
        config_generation: 70_000,
        active: true,
        queues: vec![queue, SavedQueue { ring, ..queue }, SavedQueue { ready: false, ring: None, ..queue }],
    });
}

#[test]
fn virtio_mmio() {
    is_golden(&MmioState { base: 0xd000_0000, gsi: Some(5), interrupt_status: 3 });
}

#[test]
fn virtio_pci() {
    is_golden(&PciState {
        address: Some((0, 3, 0)),
        config: ConfigState { values: (0..=255).collect() },
        bar: Some(0xd800_0000),
        msix: MsixState { entries: vec![[0xfee0_0000, 0, 0x41, 1], [1, 2, 3, 0]], pending: vec![2] },
        isr: 1,
        config_vector: 0xffff,
        queue_vectors: vec![1],
    });
}

#[test]
fn virtio_blk() {
    is_golden(&BlockState {
        capacity: 1 << 40,
        capacity_missed: true,
        logical_block: 4096,
        read_only: false,
        discard: (1 << 22, 16),
        write_zeroes: (1 << 20, 17),
        writeback: true,
        cache_chosen: false,
    });
}

#[test]
fn virtio_console() {
    let port = SavedPort {
        name: "é".into(),
        console: true,
        ready: true,
        guest_open: false,
        host_open: true,
        input: b"in".to_vec(),
        output: b"out".to_vec(),
    };
    is_golden(&ConsoleState {
        size: (80, 25),
        size_changed: false,
        multiport: true,
        messages: vec![vec![0; 8], vec![1; 12]],
        ports: vec![port.clone(), SavedPort { console: false, ..port }],
    });
}

#[test]
fn virtio_balloon() {
    let mut statistics = [None; 16];
    statistics[4] = Some(1 << 33);
    statistics[15] = Some(5);
    is_golden(&BalloonState {
        target: 1000,
        actual: 999,
        hint_command: 7,
        poison: 0xaa,
        hint_run: SavedRun::Running,
        hint_hold: true,
        last_hint_id: 7,
        statistics: Some(statistics),
        statistics_requested: true,
    });
}
