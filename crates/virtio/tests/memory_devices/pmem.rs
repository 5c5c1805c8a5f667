//! virtio-pmem: a file in the guest's address space.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use freestone_bus::Plug;
use freestone_memory::{GuestMem, layout};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::Buffer;
use freestone_virtio::rate::{RateLimiter, TokenBucket};
use freestone_virtio::{Error, Pmem, PmemConfig, VirtioMmioPlug};

use super::support::{ANSWER, MIB, RAM, REQUEST, Rig};

/// A file that is gone at the end of the test.
struct Disk {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn disk(size: u64) -> Disk {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmem.img");
    File::create(&path).unwrap().set_len(size).unwrap();
    Disk { _dir: dir, path }
}

impl Disk {
    fn open(&self, config: PmemConfig) -> Pmem {
        Pmem::open(&self.path, config).unwrap()
    }

    fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        File::open(&self.path).unwrap().read_exact_at(&mut byte, at).unwrap();
        byte[0]
    }
}

pub fn plug() -> Box<dyn Plug> {
    // The file lives as long as its descriptor is open.
    Box::new(VirtioMmioPlug::new(disk(2 * MIB).open(PmemConfig::new()), "pmem"))
}

fn started(disk: &Disk, config: PmemConfig) -> (Rig, u64) {
    let rig = Rig::new(disk.open(config));
    let start = rig.driver.config_u64(0).unwrap();
    (rig, start)
}

/// Sends a request of this type and returns the answer.
fn request(rig: &mut Rig, kind: u32) -> u32 {
    rig.write(REQUEST, kind);
    rig.write(ANSWER, 0x55u32);
    assert_eq!(rig.request(0, &[Buffer::readable(REQUEST, 4), Buffer::writable(ANSWER, 4)]), 4);
    rig.read(ANSWER)
}

#[test]
fn the_file_is_where_the_configuration_space_says() {
    let disk = disk(4 * MIB);
    let (rig, start) = started(&disk, PmemConfig::new());
    assert_eq!(rig.driver.config_u64(8).unwrap(), 4 * MIB);
    assert!(start >= layout::RAM_ABOVE_HOLE && start.is_multiple_of(128 * MIB));
    let slots = rig.wiring.device_memory();
    assert_eq!(slots.len(), 1);
    rig.write(start + 4 * MIB - 1, 9u8);
    assert_eq!(disk.byte(4 * MIB - 1), 9);
}

#[test]
fn a_flush_is_answered_with_success() {
    let disk = disk(2 * MIB);
    let pmem = disk.open(PmemConfig::new());
    let stats = pmem.stats();
    let mut rig = Rig::new(pmem);
    assert_eq!(request(&mut rig, 0), 0);
    let counts = stats.counts();
    assert_eq!((counts.requests, counts.syncs, counts.errors), (1, 1, 0));
}

#[test]
fn flushes_that_wait_together_are_one_sync() {
    let disk = disk(2 * MIB);
    let pmem = disk.open(PmemConfig::new());
    let stats = pmem.stats();
    let mut rig = Rig::new(pmem);
    rig.write(REQUEST, 0u32);
    for i in 0..20 {
        rig.offer(0, &[Buffer::readable(REQUEST, 4), Buffer::writable(ANSWER + 4 * i, 4)]);
    }
    rig.kick(0);
    assert_eq!(rig.used(0), [4; 20]);
    assert_eq!((stats.counts().requests, stats.counts().syncs), (20, 1));
}

#[test]
fn an_unknown_request_is_answered_with_failure_and_syncs_nothing() {
    let disk = disk(2 * MIB);
    let pmem = disk.open(PmemConfig::new());
    let stats = pmem.stats();
    let mut rig = Rig::new(pmem);
    for kind in [1, 7, u32::MAX] {
        assert_eq!(request(&mut rig, kind), u32::MAX);
    }
    assert_eq!((stats.counts().syncs, stats.counts().errors), (0, 3));
}

#[test]
fn a_request_that_cannot_be_answered_breaks_the_device_and_those_before_it_are_answered() {
    let disk = disk(2 * MIB);
    let (mut rig, _) = started(&disk, PmemConfig::new());
    rig.write(REQUEST, 0u32);
    rig.offer(0, &[Buffer::readable(REQUEST, 4), Buffer::writable(ANSWER, 4)]);
    rig.offer(0, &[Buffer::readable(REQUEST, 4), Buffer::writable(ANSWER + 4, 3)]);
    rig.kick(0);
    assert_eq!(rig.used(0), [4]);
    assert!(rig.needs_reset());
    rig.start(u64::MAX);
    assert_eq!(request(&mut rig, 0), 0);
}

#[test]
fn other_devices_reach_the_file_and_even_a_queue_can_be_in_it() {
    let disk = disk(2 * MIB);
    let (mut rig, start) = started(&disk, PmemConfig::new());
    rig.driver.negotiate(u64::MAX).unwrap();
    let mut arena = freestone_testkit::driver::Arena::new(start, start + MIB);
    rig.queues = vec![rig.driver.setup_queue(&rig.mem, &mut arena, 0, 16).unwrap()];
    rig.driver.driver_ok().unwrap();
    rig.write(start + MIB, 0u32);
    assert_eq!(rig.request(0, &[Buffer::readable(start + MIB, 4), Buffer::writable(start + MIB + 8, 4)]), 4);
}

#[test]
fn a_read_only_file_is_never_changed() {
    let disk = disk(2 * MIB);
    let (mut rig, start) = started(&disk, PmemConfig::new().read_only(true));
    assert!(format!("{:?}", rig.wiring.device_memory()).contains("READ_ONLY"));
    // A device that the guest tells to write there neither fails nor reaches the file.
    rig.write(start, 9u8);
    assert_eq!(disk.byte(0), 0);
    assert_eq!(request(&mut rig, 0), 0, "there is nothing to lose");
}

#[test]
fn a_file_that_the_user_may_only_read_can_be_read_only_memory() {
    let disk = disk(2 * MIB);
    let mut permissions = std::fs::metadata(&disk.path).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&disk.path, permissions).unwrap();
    started(&disk, PmemConfig::new().read_only(true));
}

#[test]
fn the_memory_goes_away_with_the_device() {
    let disk = disk(2 * MIB);
    let (rig, start) = started(&disk, PmemConfig::new());
    let Rig { wiring, device, driver, queues, mem } = rig;
    drop((wiring, device, driver, queues));
    assert!(mem.remove_region(start).is_err());
    // And so does the lock.
    disk.open(PmemConfig::new());
}

#[test]
fn the_memory_stays_across_reset_and_pause() {
    let disk = disk(2 * MIB);
    let (mut rig, start) = started(&disk, PmemConfig::new());
    rig.write(start, 3u8);
    rig.start(u64::MAX);
    rig.device.pause().unwrap();
    assert_eq!(rig.read::<u8>(start), 3);
    rig.device.resume().unwrap();
    assert_eq!(rig.driver.config_u64(0).unwrap(), start);
    assert_eq!(request(&mut rig, 0), 0);
}

#[test]
fn the_blocks_of_a_file_that_can_be_written_are_reserved() {
    let disk = disk(8 * MIB);
    let blocks = || std::fs::metadata(&disk.path).unwrap().blocks() * 512;
    assert_eq!(blocks(), 0);
    drop(disk.open(PmemConfig::new().read_only(true)));
    drop(disk.open(PmemConfig::new().reserve(false)));
    assert_eq!(blocks(), 0);
    drop(disk.open(PmemConfig::new()));
    assert!(blocks() >= 8 * MIB);
}

#[test]
fn a_file_of_the_wrong_size_is_refused_with_the_right_one() {
    for (size, next) in [(0, 2 * MIB), (1, 2 * MIB), (2 * MIB + 512, 4 * MIB), (3 * MIB, 4 * MIB)] {
        let disk = disk(size);
        let error = Pmem::open(&disk.path, PmemConfig::new()).unwrap_err();
        assert!(matches!(error, Error::PmemSize { size: s, .. } if s == size), "{error:?}");
        assert!(error.to_string().ends_with(&format!("the next is {next}")), "{error}");
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    for path in ["/dev/null", "/does/not/exist"] {
        let error = Pmem::open(path, PmemConfig::new()).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error:?}");
    }
}

#[test]
fn a_file_in_use_is_refused() {
    let disk = disk(2 * MIB);
    let writer = disk.open(PmemConfig::new());
    for read_only in [true, false] {
        let error = Pmem::open(&disk.path, PmemConfig::new().read_only(read_only)).unwrap_err();
        assert!(matches!(error, Error::File { op: "lock it", .. }), "{error:?}");
    }
    drop(writer);
    let _reader = disk.open(PmemConfig::new().read_only(true));
    disk.open(PmemConfig::new().read_only(true));
    Pmem::open(&disk.path, PmemConfig::new()).unwrap_err();
    disk.open(PmemConfig::new().lock(false));
}

#[test]
fn a_machine_without_memory_slots_refuses_the_device() {
    let disk = disk(2 * MIB);
    let mut wiring = TestWiring::new(GuestMem::anonymous(RAM).unwrap()).without_memory_slots();
    let error = wiring.plug(VirtioMmioPlug::new(disk.open(PmemConfig::new()), "pmem0")).unwrap_err();
    assert!(format!("{error:?}").contains("memory slots"), "{error:?}");
    assert!(wiring.lines().is_empty(), "nothing was taken");
}

#[test]
fn a_file_that_became_smaller_before_it_is_mapped_is_refused() {
    let disk = disk(4 * MIB);
    let pmem = disk.open(PmemConfig::new());
    OpenOptions::new().write(true).open(&disk.path).unwrap().set_len(2 * MIB).unwrap();
    let mut wiring = TestWiring::new(GuestMem::anonymous(RAM).unwrap());
    wiring.plug(VirtioMmioPlug::new(pmem, "pmem0")).unwrap_err();
    assert_eq!(wiring.device_memory().len(), 0);
}

#[test]
fn flushes_beyond_the_limit_wait_until_it_is_taken_away() {
    let disk = disk(2 * MIB);
    let limit = RateLimiter::new().ops(TokenBucket::new(1, Duration::from_secs(3600)));
    let pmem = disk.open(PmemConfig::new().rate_limiter(limit));
    let (handle, stats) = (pmem.handle(), pmem.stats());
    let mut rig = Rig::new(pmem);
    assert_eq!(request(&mut rig, 0), 0);
    rig.write(REQUEST, 0u32);
    rig.offer(0, &[Buffer::readable(REQUEST, 4), Buffer::writable(ANSWER, 4)]);
    rig.kick(0);
    assert_eq!(stats.counts().requests, 1);
    assert!(handle.throttled() > 0);
    handle.set_rate_limiter(None);
    assert_eq!(handle.rate_limiter(), None);
    rig.kick(0);
    assert_eq!(stats.counts().requests, 2);
}
