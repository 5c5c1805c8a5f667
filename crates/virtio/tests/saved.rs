//! What is in a saved device, and what is refused when it comes back. That nothing is lost in between is for the conformance checks.
#![cfg(all(feature = "blk", feature = "rng"))]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::TestImage;
use freestone_bus::{Error, Plug, Wiring};
use freestone_memory::{Bytes, GuestAddress};
use freestone_snapshot::{Arch, Header, Section, Sections, State};
use freestone_testkit::TestWiring;
use freestone_testkit::conformance::Bench;
use freestone_testkit::driver::{
    Buffer, DriverQueue, DriverTransport, MmioRegisters, PciRegisters, features, status,
};
use freestone_virtio::blk::BlockState;
use freestone_virtio::mmio::MmioState;
use freestone_virtio::pci::PciState;
use freestone_virtio::rng::Rng;
use freestone_virtio::transport::state::{CoreState, SavedRing};
use freestone_virtio::{Block, BlockConfig, Transport, VirtioPlug};

const NAME: &str = "under test";
const TEXT: u64 = 0x8_0000;

fn disk(transport: Transport) -> Box<dyn Plug> {
    sized_disk(transport, 128)
}

fn sized_disk(transport: Transport, sectors: usize) -> Box<dyn Plug> {
    let config = BlockConfig::new().poll(Duration::ZERO);
    Box::new(VirtioPlug::new(transport, Block::new(TestImage::new(sectors), config), NAME))
}

fn rng(transport: Transport) -> Box<dyn Plug> {
    Box::new(VirtioPlug::new(transport, Rng::new(), NAME))
}

fn header() -> Header {
    Header::new(Arch::host(), "tests").unwrap()
}

fn save<T: DriverTransport>(bench: &mut Bench<T>) -> Sections {
    bench.device.pause().unwrap();
    let mut state = State::new();
    bench.device.save(&mut state.of(NAME)).unwrap();
    state.into_sections(header())
}

/// A new device in another machine with the same memory.
fn beside<T: DriverTransport>(bench: &Bench<T>, plug: Box<dyn Plug>) -> Bench<T> {
    let mut wiring = TestWiring::new(bench.memory());
    T::prepare(&mut wiring).unwrap();
    let device = plug.plug(&mut wiring).unwrap();
    let driver = bench.driver.follow(&wiring).unwrap();
    Bench { wiring, device, driver, arena: bench.arena.clone() }
}

/// What comes of restoring a disk of `transport` when its section `S` was changed.
fn edited<T: DriverTransport, S: Section>(
    transport: Transport,
    wanted: u64,
    edit: impl FnOnce(&mut S),
) -> Result<(), Error> {
    let mut bench = Bench::<T>::on(disk(transport)).unwrap();
    bench.start(wanted).unwrap();
    bench.settle().unwrap();
    let mut sections = save(&mut bench);
    let mut state = State::new();
    let mut changed: S = sections.of(NAME).take().unwrap();
    edit(&mut changed);
    let mut put = state.of(NAME);
    put.put(&changed).unwrap();
    macro_rules! pass {
        ($($kind:ty),*) => {$(
            if let Ok(Some(section)) = sections.of(NAME).take_if_present::<$kind>() {
                put.put(&section).unwrap();
            }
        )*};
    }
    pass!(CoreState, MmioState, PciState, BlockState);
    let mut other = beside(&bench, disk(transport));
    drop(bench);
    other.device.restore(&mut state.into_sections(header()).of(NAME))
}

fn core(edit: impl FnOnce(&mut CoreState)) -> String {
    let wanted = !features::RING_PACKED;
    whole(edited::<MmioRegisters, CoreState>(Transport::Mmio, wanted, edit).unwrap_err())
}

/// An error with its causes.
fn whole(error: Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(&error);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn queue_of(state: &mut CoreState) -> &mut freestone_virtio::transport::state::SavedQueue {
    &mut state.queues[0]
}

#[test]
fn a_state_that_no_driver_can_bring_about_is_refused_with_what_is_wrong() {
    let says = |found: String, text: &str| assert!(found.contains(text), "{found} does not say {text:?}");
    says(core(|s| s.device_type = 1), "device type 0x1");
    says(core(|s| s.offered |= 1 << 60), "features that are not offered here 0x1000000000000000");
    says(core(|s| s.driver_features |= 1 << 59), "driver features that were not offered 0x800000000000000");
    says(core(|s| s.unknown_features = true), "driver features");
    says(core(|s| s.status = 0x10), "device status 0x10");
    says(core(|s| s.status = 4), "device status 0x4");
    says(core(|s| s.status = 11), "activity with device status 0xb");
    says(core(|s| s.needs_reset = true), "activity with device status 0xf");
    says(core(|s| s.queues.clear()), "number of queues 0x0");
    says(core(|s| queue_of(s).max_size = 512), "largest size of a queue 0x200");
    says(core(|s| queue_of(s).ring = None), "position in a queue");
    says(core(|s| queue_of(s).ready = false), "position in a queue");
    says(core(|s| s.active = false), "position in a queue");
    says(core(|s| queue_of(s).size = 512), "queue size 512");
    says(core(|s| queue_of(s).size = 3), "queue size 3");
    says(core(|s| queue_of(s).descriptors = 0x1001), "descriptor table of a queue of 16 entries at 0x1001");
    says(
        core(|s| queue_of(s).driver = 1 << 60),
        "available ring of a queue of 16 entries at 0x1000000000000000",
    );
    says(core(|s| queue_of(s).device = !3), "used ring of a queue of 16 entries at 0xfffffffffffffffc");
    let split = SavedRing::Split { next_avail: 17, next_used: 0 };
    says(core(|s| queue_of(s).ring = Some(split)), "requests taken from a queue that has fewer entries 0x11");
    let packed = SavedRing::Packed { next_avail: (0, true), next_used: (0, true) };
    says(core(|s| queue_of(s).ring = Some(packed)), "packed queue with driver features");
}

#[test]
fn a_position_beyond_a_packed_ring_is_refused() {
    let beyond = |next_avail, next_used| {
        let ring = Some(SavedRing::Packed { next_avail, next_used });
        let edit = |state: &mut CoreState| state.queues[0].ring = ring;
        whole(edited::<MmioRegisters, CoreState>(Transport::Mmio, u64::MAX, edit).unwrap_err())
    };
    assert!(beyond((16, true), (0, true)).contains("positions 16 and 0"));
    assert!(beyond((0, true), (0xffff, true)).contains("positions 0 and 65535"));
    assert!(beyond((3, true), (4, true)).contains("positions 3 and 4"));
    assert!(beyond((4, false), (3, true)).contains("positions 4 and 3"));
}

#[test]
fn registers_at_another_place_are_refused() {
    let mmio = |edit: fn(&mut MmioState)| {
        edited::<MmioRegisters, MmioState>(Transport::Mmio, 0, edit).unwrap_err().to_string()
    };
    assert!(mmio(|s| s.base += 0x1000).contains("address of the registers"));
    assert!(mmio(|s| s.gsi = Some(9)).contains("interrupt line 0x9"));
    assert!(mmio(|s| s.interrupt_status = 4).contains("interrupt status 0x4"));
    let pci = |edit: fn(&mut PciState)| {
        edited::<PciRegisters, PciState>(Transport::Pci, 0, edit).unwrap_err().to_string()
    };
    assert!(pci(|s| s.address = Some((0, 7, 0))).contains("PCI address 0x700"));
    assert!(pci(|s| s.config.values[2] ^= 1).contains("PCI configuration register 0x2"));
    assert!(
        pci(|s| s.bar = Some(0x1000)).contains("address of BAR 0, which its register does not say, 0x1000")
    );
    assert!(pci(|s| s.config_vector = 9).contains("MSI-X vector of an event 0x9"));
    assert!(pci(|s| s.queue_vectors.clear()).contains("number of queue vectors 0x0"));
    assert!(pci(|s| s.msix.entries.clear()).contains("number of MSI-X vectors 0x0"));
}

#[test]
fn a_state_without_a_section_or_of_another_transport_is_refused() {
    let mut bench = Bench::new(disk(Transport::Mmio)).unwrap();
    let mut sections = save(&mut bench);
    let mut other = Bench::pci(disk(Transport::Pci)).unwrap();
    let error = whole(other.device.restore(&mut sections.of(NAME)).unwrap_err());
    assert!(error.contains("virtio-pci/under test"), "{error}");
}

#[test]
fn a_device_at_work_is_neither_saved_nor_restored() {
    let mut bench = Bench::new(rng(Transport::Mmio)).unwrap();
    let mut fresh = save(&mut bench);
    bench.device.resume().unwrap();
    bench.start(0).unwrap();
    let error = bench.device.save(&mut State::new().of(NAME)).unwrap_err();
    assert!(matches!(error, Error::Busy { op: "save", .. }), "{error}");
    let error = bench.device.restore(&mut fresh.of(NAME)).unwrap_err();
    assert!(matches!(error, Error::Busy { op: "restore", .. }), "{error}");
}

/// Adds a request for entropy, and does not kick.
fn ask(queue: &mut DriverQueue) {
    queue.add_chain(&[Buffer::writable(TEXT, 16)]).unwrap();
    queue.publish().unwrap();
}

#[test]
fn a_kick_before_the_save_is_served_without_another() {
    let mut bench = Bench::new(rng(Transport::Mmio)).unwrap();
    let mut queues = bench.start(u64::MAX).unwrap();
    bench.settle().unwrap();
    bench.device.pause().unwrap();
    ask(&mut queues[0]);
    bench.driver.kick(0).unwrap();
    bench.move_on(&|| rng(Transport::Mmio)).unwrap();
    bench.settle().unwrap();
    assert_eq!(queues[0].used().unwrap().unwrap().len, 16);
    assert_ne!(bench.memory().view().read_obj::<u128>(GuestAddress(TEXT)).unwrap(), 0);
}

#[test]
fn a_restored_device_interrupts_for_each_queue_in_use_once() {
    let mut bench = Bench::pci(rng(Transport::Pci)).unwrap();
    bench.start(u64::MAX).unwrap();
    bench.settle().unwrap();
    bench.move_on(&|| rng(Transport::Pci)).unwrap();
    let message = bench.driver.transport().message(1);
    assert_eq!(bench.wiring.msi_delivered(), [(message, 1)]);
    bench.device.pause().unwrap();
    bench.device.resume().unwrap();
    assert_eq!(bench.wiring.msi_count(message), 1, "a pause needs none");
}

#[cfg(feature = "balloon")]
#[test]
fn what_the_host_changes_before_a_restored_device_goes_on_is_told_to_the_driver() {
    use freestone_virtio::balloon::{Balloon, BalloonConfig, BalloonHandle};

    fn balloon() -> (Box<dyn Plug>, BalloonHandle) {
        let balloon = Balloon::new(BalloonConfig::new()).unwrap();
        let handle = balloon.handle();
        (Box::new(VirtioPlug::new(Transport::Mmio, balloon, NAME)), handle)
    }
    for (target, told) in [(0, 0), (1 << 20, 2)] {
        let mut bench = Bench::new(balloon().0).unwrap();
        bench.start(u64::MAX).unwrap();
        bench.settle().unwrap();
        let mut sections = save(&mut bench);
        let (plug, handle) = balloon();
        let mut other = beside(&bench, plug);
        other.device.restore(&mut sections.of(NAME)).unwrap();
        let generation = other.driver.transport().config_generation().unwrap();
        handle.set_target(target);
        other.device.resume().unwrap();
        assert_eq!(other.driver.take_interrupt().unwrap() & 2, told);
        assert_eq!(other.driver.transport().config_generation().unwrap() != generation, told != 0);
    }
}

#[test]
fn a_restored_device_without_a_driver_interrupts_nobody() {
    let mut bench = Bench::new(rng(Transport::Mmio)).unwrap();
    bench.driver.negotiate(0).unwrap();
    bench.move_on(&|| rng(Transport::Mmio)).unwrap();
    let lines = bench.wiring.lines();
    assert_eq!(lines.iter().map(|line| bench.wiring.edges(*line)).sum::<u64>(), 0);
    assert_eq!(bench.driver.take_interrupt().unwrap(), 0);
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_still_to_be() {
    let mut bench = Bench::new(rng(Transport::Mmio)).unwrap();
    let mut queues = bench.start(0).unwrap();
    ask(&mut queues[0]);
    bench.driver.kick(0).unwrap();
    bench.settle().unwrap();
    let mut sections = save(&mut bench);
    let mut other = beside(&bench, rng(Transport::Mmio));
    other.device.restore(&mut sections.of(NAME)).unwrap();
    assert_eq!(other.driver.take_interrupt().unwrap(), 1);
}

#[test]
fn an_interrupt_behind_a_mask_is_delivered_when_it_is_unmasked_elsewhere() {
    let mut bench = Bench::pci(rng(Transport::Pci)).unwrap();
    let mut queues = bench.start(0).unwrap();
    bench.driver.transport().mask_vector(1, true).unwrap();
    ask(&mut queues[0]);
    bench.driver.kick(0).unwrap();
    bench.settle().unwrap();
    bench.move_on(&|| rng(Transport::Pci)).unwrap();
    assert!(bench.driver.transport().is_pending(1).unwrap());
    let message = bench.driver.transport().message(1);
    assert_eq!(bench.wiring.msi_count(message), 0);
    bench.driver.transport().mask_vector(1, false).unwrap();
    assert_eq!(bench.wiring.msi_count(message), 1);
}

#[test]
fn a_bar_is_where_the_guest_moved_it_and_its_doorbells_with_it() {
    let mut bench = Bench::pci(rng(Transport::Pci)).unwrap();
    bench.start(0).unwrap();
    let (first, len) = bench.driver.transport().bars()[0].unwrap();
    let base = first + 16 * len;
    bench.driver.transport().move_bar(0, base).unwrap();
    let mut sections = save(&mut bench);
    let mut wiring = TestWiring::new(bench.memory()).with_doorbells();
    PciRegisters::prepare(&mut wiring).unwrap();
    let mut device = rng(Transport::Pci).plug(&mut wiring).unwrap();
    device.restore(&mut sections.of(NAME)).unwrap();
    assert_eq!(wiring.pci().unwrap().mmio().ranges(), [(base, base + len - 1)]);
    assert_eq!(wiring.doorbells_bound(), 1);
    device.resume().unwrap();
}

#[test]
fn a_bar_that_is_not_decoded_is_not_mapped() {
    let mut bench = Bench::pci(rng(Transport::Pci)).unwrap();
    bench.driver.transport().config_write(4, 2, 0).unwrap();
    bench.move_on(&|| rng(Transport::Pci)).unwrap();
    assert!(bench.driver.transport().bus().ranges().is_empty());
    bench.driver.transport().config_write(4, 2, 6).unwrap();
    assert_eq!(bench.driver.transport().bus().ranges().len(), 1);
}

#[test]
fn features_that_are_new_are_not_offered_to_the_driver_of_before() {
    let mut bench = Bench::new(sized_disk(Transport::Mmio, 128)).unwrap();
    bench.start(0).unwrap();
    let before = bench.driver.device_features().unwrap();
    let mut sections = save(&mut bench);
    let more = BlockConfig::new().size_max(1 << 16).poll(Duration::ZERO);
    let plug = VirtioPlug::new(Transport::Mmio, Block::new(TestImage::new(128), more), NAME);
    let mut other = beside(&bench, Box::new(plug));
    assert_ne!(other.driver.device_features().unwrap(), before);
    other.device.restore(&mut sections.of(NAME)).unwrap();
    assert_eq!(other.driver.device_features().unwrap(), before);
}

#[test]
fn a_queue_that_was_taken_away_stays_away() {
    let mut bench = Bench::new(rng(Transport::Mmio)).unwrap();
    let mut queues = bench.start(0).unwrap();
    bench.driver.transport().set_queue_dead(0).unwrap();
    bench.move_on(&|| rng(Transport::Mmio)).unwrap();
    assert!(!bench.driver.transport().queue_is_live(0).unwrap());
    ask(&mut queues[0]);
    bench.driver.kick(0).unwrap();
    bench.settle().unwrap();
    assert_eq!(queues[0].used().unwrap(), None);
    assert_eq!(bench.driver.status().unwrap() & status::NEEDS_RESET, 0);
}

#[test]
fn a_disk_of_another_size_is_refused() {
    for sectors in [127, 129] {
        let mut bench = Bench::new(disk(Transport::Mmio)).unwrap();
        let mut sections = save(&mut bench);
        let mut other = beside(&bench, sized_disk(Transport::Mmio, sectors));
        let error = other.device.restore(&mut sections.of(NAME)).unwrap_err().to_string();
        assert!(error.contains("capacity") && error.contains("0x80"), "{error}");
    }
}

#[test]
fn a_disk_that_became_read_only_is_refused() {
    let mut bench = Bench::new(disk(Transport::Mmio)).unwrap();
    let mut sections = save(&mut bench);
    let image: Arc<TestImage> = TestImage::with(128, true);
    let config = BlockConfig::new().poll(Duration::ZERO);
    let plug = VirtioPlug::new(Transport::Mmio, Block::new(image, config), NAME);
    let mut other = beside(&bench, Box::new(plug));
    assert!(matches!(other.device.restore(&mut sections.of(NAME)), Err(Error::BadState { .. })));
}

#[test]
fn the_cache_mode_that_the_driver_chose_is_kept() {
    const WRITEBACK: u64 = 32;
    let mut bench = Bench::new(disk(Transport::Mmio)).unwrap();
    bench.start(u64::MAX).unwrap();
    bench.driver.write_config(WRITEBACK, &[0]).unwrap();
    bench.move_on(&|| disk(Transport::Mmio)).unwrap();
    let mut mode = [9];
    bench.driver.read_config(WRITEBACK, &mut mode).unwrap();
    assert_eq!(mode, [0]);
}
