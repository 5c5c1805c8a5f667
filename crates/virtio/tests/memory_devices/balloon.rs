//! virtio-balloon: pages really go back to the host, and only those.

use freestone_bus::Plug;
use freestone_memory::{Backing, Bytes, GuestAddress, GuestMem, GuestMemBuilder};
use freestone_testkit::driver::Buffer;
use freestone_virtio::balloon::{HintRun, feature};
use freestone_virtio::{Balloon, BalloonConfig, BalloonHandle, VirtioMmioPlug};

use super::support::{ANSWER, FREE, MIB, RAM, REQUEST, Rig};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const HINTS: usize = 3;
const REPORTS: usize = 4;

const TARGET: u64 = 0;
const ACTUAL: u64 = 4;
const COMMAND: u64 = 8;
const POISON: u64 = 12;

fn config() -> BalloonConfig {
    BalloonConfig::new().hinting(true)
}

pub fn plug() -> Box<dyn Plug> {
    Box::new(VirtioMmioPlug::new(Balloon::new(config()).unwrap(), "balloon"))
}

fn started() -> (Rig, BalloonHandle) {
    let balloon = Balloon::new(config()).unwrap();
    let handle = balloon.handle();
    let rig = Rig::new(balloon);
    rig.fill(FREE, RAM - FREE);
    (rig, handle)
}

/// Writes page numbers as a driver does and sends them.
fn send_pages(rig: &mut Rig, queue: usize, pages: &[u64]) {
    for (at, page) in (REQUEST..).step_by(4).zip(pages) {
        rig.write(at, u32::try_from(*page).unwrap());
    }
    let len = u32::try_from(pages.len() * 4).unwrap();
    assert_eq!(rig.request(queue, &[Buffer::readable(REQUEST, len)]), 0);
}

fn page(gpa: u64) -> u64 {
    gpa / 4096
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let (mut rig, handle) = started();
    let before = rig.resident();
    let pages: Vec<u64> = (page(FREE)..page(FREE + MIB)).rev().collect();
    send_pages(&mut rig, INFLATE, &pages);
    assert_eq!(before - rig.resident(), 256);
    assert_eq!(handle.counts().inflated, MIB);
    assert_eq!((rig.read::<u8>(FREE + MIB - 1), rig.read::<u8>(FREE + MIB)), (0, 1));
}

#[test]
fn inflated_pages_of_a_shared_memory_file_go_back_to_the_host() {
    let mem = GuestMemBuilder::new(RAM).backing(Backing::Memfd).build().unwrap();
    let balloon = Balloon::new(config()).unwrap();
    let mut rig = Rig::with(mem, balloon, u64::MAX);
    rig.fill(FREE, MIB);
    let file = freestone_memory::GuestMemoryRegion::file_offset(&*rig.mem.regions()[0]).unwrap().file();
    let blocks = |file: &std::fs::File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    let before = blocks(file);
    let pages: Vec<u64> = (page(FREE)..page(FREE + MIB)).collect();
    let file = file.try_clone().unwrap();
    send_pages(&mut rig, INFLATE, &pages);
    assert_eq!((before - blocks(&file)) * 512, MIB);
}

#[test]
fn a_page_that_the_guest_uses_again_is_zeros_and_works() {
    let (mut rig, handle) = started();
    send_pages(&mut rig, INFLATE, &[page(FREE)]);
    send_pages(&mut rig, DEFLATE, &[page(FREE)]);
    assert_eq!(rig.read::<u64>(FREE), 0);
    rig.write(FREE, 7u64);
    assert_eq!(rig.read::<u64>(FREE), 7);
    assert_eq!(handle.counts().deflated, 4096);
}

#[test]
fn a_page_named_twice_is_given_back_once() {
    let (mut rig, handle) = started();
    send_pages(&mut rig, INFLATE, &[page(FREE); 3]);
    assert_eq!((handle.counts().inflated, handle.counts().ignored), (4096, 0));
}

#[test]
fn pages_that_are_not_there_are_ignored() {
    let (mut rig, handle) = started();
    let before = rig.resident();
    let beyond = [page(RAM), page(RAM) + 7, 0xD_0000, u64::from(u32::MAX)];
    send_pages(&mut rig, INFLATE, &beyond);
    assert_eq!((handle.counts().inflated, handle.counts().ignored), (0, 4 * 4096));
    assert_eq!(rig.resident(), before);
    assert!(!rig.needs_reset());
}

#[test]
fn a_run_over_the_end_of_memory_is_given_back_up_to_there() {
    let (mut rig, handle) = started();
    let last = page(RAM) - 1;
    send_pages(&mut rig, INFLATE, &[last - 1, last, last + 1]);
    assert_eq!((handle.counts().inflated, handle.counts().ignored), (2 * 4096, 4096));
}

#[test]
fn pages_of_the_queue_itself_are_the_loss_of_the_guest_alone() {
    let (mut rig, handle) = started();
    // Rings and the request are in the second and third MiB.
    for (at, page) in (REQUEST..).step_by(4).zip(page(MIB)..page(REQUEST + MIB)) {
        rig.write(at, u32::try_from(page).unwrap());
    }
    rig.offer(INFLATE, &[Buffer::readable(REQUEST, 4 * 512)]);
    rig.kick(INFLATE);
    assert_eq!(handle.counts().inflated, 2 * MIB);
    rig.start(u64::MAX);
    send_pages(&mut rig, INFLATE, &[page(FREE)]);
    assert_eq!(handle.counts().inflated, 2 * MIB + 4096);
}

#[test]
fn of_a_huge_request_only_so_many_pages_are_looked_at() {
    let (mut rig, handle) = started();
    let numbers: Vec<u8> = (0..5000u32).flat_map(|page| (page + 100_000).to_le_bytes()).collect();
    rig.mem.view().write_slice(&numbers, GuestAddress(REQUEST)).unwrap();
    rig.request(INFLATE, &[Buffer::readable(REQUEST, 20_000)]);
    assert_eq!(handle.counts().ignored, 1024 * 4096);
}

#[test]
fn a_request_with_part_of_a_number_loses_that_part() {
    let (mut rig, handle) = started();
    rig.write(REQUEST, u32::try_from(page(FREE)).unwrap());
    rig.request(INFLATE, &[Buffer::readable(REQUEST, 7)]);
    assert_eq!((handle.counts().inflated, handle.counts().ignored), (4096, 0));
}

#[test]
fn the_target_is_in_the_configuration_space_and_a_change_is_announced() {
    let (rig, handle) = started();
    assert!(!rig.config_changed());
    handle.set_target(3 * MIB + 4095);
    assert!(rig.config_changed());
    assert_eq!(rig.config_u32(TARGET), 768);
    assert_eq!(handle.target(), 3 * MIB);
    handle.set_target(u64::MAX);
    assert_eq!(rig.config_u32(TARGET), u32::MAX);
}

#[test]
fn the_driver_says_what_is_in_the_balloon_in_writes_of_any_width() {
    let (rig, handle) = started();
    rig.write_config(ACTUAL, &256u32.to_le_bytes());
    assert_eq!(handle.actual(), MIB);
    rig.write_config(ACTUAL + 1, &[2]);
    assert_eq!(handle.actual(), 2 * MIB);
    assert_eq!(rig.config_u32(ACTUAL), 512);
}

#[test]
fn the_driver_cannot_change_the_target_or_the_command() {
    let (rig, handle) = started();
    handle.set_target(MIB);
    rig.write_config(TARGET, &[0xff; 16]);
    assert_eq!((rig.config_u32(TARGET), rig.config_u32(COMMAND)), (256, 0));
}

#[test]
fn after_a_reset_the_balloon_is_empty_and_the_target_is_as_it_was() {
    let (mut rig, handle) = started();
    handle.set_target(MIB);
    rig.write_config(ACTUAL, &[0xff; 12]);
    handle.start_hinting().unwrap();
    rig.start(u64::MAX);
    assert_eq!((handle.actual(), handle.target()), (0, MIB));
    assert_eq!([COMMAND, POISON].map(|at| rig.config_u32(at)), [0, 0]);
    assert_eq!(handle.hint_run(), HintRun::Idle);
}

#[test]
fn reported_pages_go_back_to_the_host() {
    let (mut rig, handle) = started();
    let before = rig.resident();
    let ranges = [Buffer::writable(FREE, 0x20_0000), Buffer::writable(FREE + 4 * MIB, 0x10_0000)];
    assert_eq!(rig.request(REPORTS, &ranges), 0);
    assert_eq!(before - rig.resident(), 768);
    assert_eq!(handle.counts().reported, 3 * MIB);
}

#[test]
fn only_whole_pages_of_a_report_go_back() {
    let (mut rig, handle) = started();
    rig.request(REPORTS, &[Buffer::writable(FREE + 1, 0x2000), Buffer::writable(FREE + MIB, 0xfff)]);
    assert_eq!(handle.counts().reported, 4096);
    assert_eq!([0, 0x1000, 0x2000].map(|at| rig.read::<u8>(FREE + at)), [1, 0, 1]);
}

#[test]
fn reported_pages_that_are_filled_with_something_stay() {
    let (mut rig, handle) = started();
    rig.write_config(POISON, &0xaaaa_aaaau32.to_le_bytes());
    rig.request(REPORTS, &[Buffer::writable(FREE, 0x10_0000)]);
    assert_eq!((handle.counts().reported, rig.read::<u8>(FREE)), (0, 1));
}

#[test]
fn what_pages_are_filled_with_counts_only_if_it_was_negotiated() {
    let (mut rig, handle) = started();
    rig.start(!feature::PAGE_POISON);
    rig.write_config(POISON, &[1; 4]);
    rig.request(REPORTS, &[Buffer::writable(FREE, 0x10_0000)]);
    assert_eq!(handle.counts().reported, MIB);
}

#[test]
fn pages_that_are_filled_with_zeros_go_back() {
    let (mut rig, handle) = started();
    rig.write_config(POISON, &[0; 4]);
    rig.request(REPORTS, &[Buffer::writable(FREE, 0x10_0000)]);
    assert_eq!((handle.counts().reported, rig.read::<u8>(FREE)), (MIB, 0));
}

#[test]
fn a_report_beyond_memory_breaks_the_device_until_a_reset() {
    let (mut rig, handle) = started();
    rig.offer(REPORTS, &[Buffer::writable(RAM, 0x1000)]);
    rig.kick(REPORTS);
    assert!(rig.needs_reset());
    rig.start(u64::MAX);
    rig.request(REPORTS, &[Buffer::writable(FREE, 0x1000)]);
    assert_eq!(handle.counts().reported, 4096);
}

#[test]
fn a_driver_that_counts_only_the_queues_it_uses_can_report() {
    let balloon = Balloon::new(BalloonConfig::new()).unwrap();
    let handle = balloon.handle();
    let mut rig = Rig::new(balloon);
    rig.driver.negotiate(!feature::STATS_VQ).unwrap();
    let mut arena = freestone_testkit::driver::Arena::new(MIB, 2 * MIB);
    let setup = |index| rig.driver.setup_queue(&rig.mem, &mut arena, index, 64).unwrap();
    rig.queues = (0..3).map(setup).collect();
    rig.driver.driver_ok().unwrap();
    rig.request(2, &[Buffer::writable(FREE, 0x1000)]);
    assert_eq!(handle.counts().reported, 4096);
}

/// Sends a command ID to the hint queue.
fn command(rig: &mut Rig, id: u32) {
    rig.write(ANSWER, id);
    rig.request(HINTS, &[Buffer::readable(ANSWER, 4)]);
}

fn hint(rig: &mut Rig, gpa: u64) {
    rig.request(HINTS, &[Buffer::writable(gpa, 0x1000)]);
}

#[test]
fn hints_go_back_to_the_host_while_a_run_goes_on() {
    let (mut rig, handle) = started();
    handle.start_hinting().unwrap();
    assert!(rig.config_changed());
    let id = rig.config_u32(COMMAND);
    assert!(id >= 2);
    hint(&mut rig, FREE);
    assert_eq!(handle.counts().hinted, 0, "the driver has not begun");
    command(&mut rig, id);
    assert_eq!(handle.hint_run(), HintRun::Running);
    hint(&mut rig, FREE);
    assert_eq!((handle.counts().hinted, rig.read::<u8>(FREE)), (4096, 0));
}

#[test]
fn when_the_driver_has_no_more_hints_it_may_use_its_pages() {
    let (mut rig, handle) = started();
    handle.start_hinting().unwrap();
    let id = rig.config_u32(COMMAND);
    command(&mut rig, id);
    rig.config_changed();
    command(&mut rig, 0);
    assert!(rig.config_changed());
    assert_eq!((rig.config_u32(COMMAND), handle.hint_run()), (1, HintRun::Idle));
    hint(&mut rig, FREE);
    assert_eq!(rig.read::<u8>(FREE), 1);
}

#[test]
fn a_driver_that_is_to_hold_its_pages_waits_for_the_host() {
    let (mut rig, handle) = started();
    assert_eq!(handle.hinting_status().guest_command, None);
    handle.start_hinting_and_hold().unwrap();
    let id = rig.config_u32(COMMAND);
    command(&mut rig, id);
    command(&mut rig, 0);
    let status = handle.hinting_status();
    assert_eq!(
        (status.run, status.host_command, status.guest_command),
        (HintRun::Finished, id, Some(0)),
        "it was not told that it may use its pages"
    );
    hint(&mut rig, FREE);
    assert_eq!(rig.read::<u8>(FREE), 1);
    handle.stop_hinting();
    assert_eq!((rig.config_u32(COMMAND), handle.hint_run()), (1, HintRun::Idle));
}

#[test]
fn the_interval_of_statistics_is_what_was_set_last() {
    let handle = Balloon::new(BalloonConfig::new()).unwrap().handle();
    assert_eq!(
        (handle.statistics_interval(), handle.has_statistics(), handle.has_hinting()),
        (None, true, false)
    );
    let second = std::time::Duration::from_secs(1);
    handle.set_statistics_interval(Some(second)).unwrap();
    assert_eq!(handle.statistics_interval(), Some(second));
    handle.set_statistics_interval(None).unwrap();
    assert_eq!(handle.statistics_interval(), None);
}

#[test]
fn the_host_can_end_a_run_and_later_hints_are_ignored() {
    let (mut rig, handle) = started();
    handle.start_hinting().unwrap();
    let id = rig.config_u32(COMMAND);
    command(&mut rig, id);
    handle.stop_hinting();
    assert_eq!(rig.config_u32(COMMAND), 1);
    hint(&mut rig, FREE);
    assert_eq!((handle.counts().hinted, rig.read::<u8>(FREE)), (0, 1));
}

#[test]
fn hints_with_the_number_of_another_run_are_ignored() {
    let (mut rig, handle) = started();
    handle.start_hinting().unwrap();
    let old = rig.config_u32(COMMAND);
    command(&mut rig, old);
    handle.start_hinting().unwrap();
    assert_ne!(rig.config_u32(COMMAND), old);
    for id in [old, 1, 77] {
        command(&mut rig, id);
        hint(&mut rig, FREE);
    }
    assert_eq!((handle.counts().hinted, handle.hint_run()), (0, HintRun::Requested));
}

#[test]
fn hints_that_nobody_asked_for_are_ignored() {
    let (mut rig, handle) = started();
    for id in [0, 1, 2, 3] {
        command(&mut rig, id);
        hint(&mut rig, FREE);
    }
    assert_eq!((handle.counts().hinted, rig.read::<u8>(FREE)), (0, 1));
}

#[test]
fn a_run_of_hints_survives_a_pause() {
    let (mut rig, handle) = started();
    handle.start_hinting().unwrap();
    let id = rig.config_u32(COMMAND);
    command(&mut rig, id);
    rig.device.pause().unwrap();
    rig.device.resume().unwrap();
    hint(&mut rig, FREE);
    assert_eq!(handle.counts().hinted, 4096);
}

#[test]
fn hinting_is_not_offered_unless_it_was_asked_for() {
    let balloon = Balloon::new(BalloonConfig::new()).unwrap();
    let handle = balloon.handle();
    let rig = Rig::new(balloon);
    assert_eq!(rig.driver.device_features().unwrap() & feature::FREE_PAGE_HINT, 0);
    handle.start_hinting().unwrap_err();
}

#[test]
fn nothing_is_given_back_during_a_pause() {
    let (mut rig, handle) = started();
    rig.device.pause().unwrap();
    rig.write(REQUEST, u32::try_from(page(FREE)).unwrap());
    rig.offer(INFLATE, &[Buffer::readable(REQUEST, 4)]);
    rig.kick(INFLATE);
    assert_eq!(handle.counts().inflated, 0);
    rig.device.resume().unwrap();
    rig.settle();
    assert_eq!(handle.counts().inflated, 4096);
}

#[test]
fn a_balloon_with_nothing_optional_has_two_queues() {
    let config = BalloonConfig::new().statistics(false).reporting(false).deflate_on_oom(false);
    let rig = Rig::new(Balloon::new(config).unwrap());
    assert_eq!(rig.queues.len(), 2);
    let transport = freestone_virtio::features::TRANSPORT;
    assert_eq!(rig.driver.device_features().unwrap() & !transport, 0);
}

#[test]
fn memory_of_the_guest_is_not_touched_by_a_balloon_that_is_told_nothing() {
    let mem = GuestMem::anonymous(RAM).unwrap();
    let rig = Rig::with(mem, Balloon::new(config().target(MIB)).unwrap(), u64::MAX);
    assert_eq!(rig.config_u32(TARGET), 256);
    rig.fill(FREE, MIB);
    rig.settle();
    assert_eq!(rig.read::<u8>(FREE), 1);
}
