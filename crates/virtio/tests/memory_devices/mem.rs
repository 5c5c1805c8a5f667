//! virtio-mem: memory that comes and goes in blocks.

use freestone_bus::Plug;
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::Buffer;
use freestone_virtio::{Mem, MemConfig, MemHandle, VirtioMmioPlug};

use super::support::{ANSWER, MIB, RAM, REQUEST, Rig, resident};

const BLOCK: u64 = 2 * MIB;
const CHUNK: u64 = 128 * MIB;
const REGION: u64 = 1024 * MIB;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

/// Fields of the configuration space.
const ADDR: u64 = 16;
const USABLE: u64 = 32;
const PLUGGED: u64 = 40;
const REQUESTED: u64 = 48;

pub fn plug() -> Box<dyn Plug> {
    let mem = Mem::new(&MemConfig::new(REGION).requested(CHUNK)).unwrap();
    Box::new(VirtioMmioPlug::new(mem, "mem"))
}

struct Hot {
    rig: Rig,
    handle: MemHandle,
    base: u64,
}

fn started(requested: u64) -> Hot {
    let mem = Mem::new(&MemConfig::new(REGION).requested(requested)).unwrap();
    let handle = mem.handle();
    let rig = Rig::new(mem);
    let base = rig.driver.config_u64(ADDR).unwrap();
    Hot { rig, handle, base }
}

impl Hot {
    /// Sends a request about `count` blocks from block `first` on; the answer and the state.
    fn request(&mut self, kind: u16, first: u64, count: u16) -> (u16, u16) {
        self.raw(kind, self.base + first * BLOCK, count)
    }

    fn raw(&mut self, kind: u16, addr: u64, count: u16) -> (u16, u16) {
        let rig = &mut self.rig;
        rig.mem.view().write_slice(&[0xff; 24], GuestAddress(REQUEST)).unwrap();
        rig.write(REQUEST, kind);
        rig.write(REQUEST + 8, addr);
        rig.write(REQUEST + 16, count);
        rig.mem.view().write_slice(&[0x55; 10], GuestAddress(ANSWER)).unwrap();
        assert_eq!(rig.request(0, &[Buffer::readable(REQUEST, 24), Buffer::writable(ANSWER, 10)]), 10);
        (rig.read(ANSWER), rig.read(ANSWER + 8))
    }

    fn config(&self, field: u64) -> u64 {
        self.rig.driver.config_u64(field).unwrap()
    }

    /// Whether devices can reach the block.
    fn reachable(&self, block: u64) -> bool {
        self.rig.mem.view().address_in_range(GuestAddress(self.base + block * BLOCK))
    }
}

#[test]
fn at_first_nothing_is_plugged_and_nothing_is_mapped() {
    let hot = started(CHUNK);
    assert_eq!([0, 8, 24].map(|field| hot.config(field)), [BLOCK, 0, REGION]);
    assert_eq!((hot.config(PLUGGED), hot.config(REQUESTED)), (0, CHUNK));
    assert!(hot.base >= 4 << 30 && hot.base.is_multiple_of(2 << 30));
    assert_eq!(hot.rig.wiring.device_memory().len(), 0);
    assert!(!hot.reachable(0));
}

#[test]
fn a_plugged_block_is_memory_for_the_guest_and_for_devices() {
    let mut hot = started(CHUNK);
    assert_eq!(hot.request(PLUG, 1, 2), (ACK, 0));
    assert_eq!((hot.config(PLUGGED), hot.handle.plugged()), (2 * BLOCK, 2 * BLOCK));
    assert_eq!(hot.rig.wiring.device_memory().len(), 1);
    hot.rig.write(hot.base + 3 * BLOCK - 8, 7u64);
    assert_eq!(hot.rig.read::<u64>(hot.base + 3 * BLOCK - 8), 7);
}

#[test]
fn another_device_can_be_told_to_use_plugged_memory() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 0, 1);
    // Here it is the device itself.
    hot.rig.write(hot.base, STATE);
    hot.rig.write(hot.base + 8, hot.base);
    hot.rig.write(hot.base + 16, 1u16);
    let buffers = [Buffer::readable(hot.base, 24), Buffer::writable(hot.base + 64, 10)];
    assert_eq!(hot.rig.request(0, &buffers), 10);
}

#[test]
fn an_unplugged_block_goes_back_to_the_host_at_once() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 0, 4);
    hot.rig.fill(hot.base, 4 * BLOCK);
    let view = hot.rig.mem.view();
    let region = view.find_region(GuestAddress(hot.base)).unwrap();
    assert_eq!(resident(region), 2048);
    assert_eq!(hot.request(UNPLUG, 1, 2), (ACK, 0));
    assert_eq!(resident(region), 1024);
    assert_eq!(hot.rig.read::<u8>(hot.base), 1, "plugged blocks keep what is in them");
}

#[test]
fn a_chunk_without_plugged_blocks_is_not_there() {
    let mut hot = started(REGION);
    let in_chunk = CHUNK / BLOCK;
    hot.request(PLUG, 0, 1);
    hot.request(PLUG, 2 * in_chunk, 1);
    assert_eq!(hot.rig.wiring.device_memory().len(), 2);
    assert_eq!([0, in_chunk, 2 * in_chunk].map(|block| hot.reachable(block)), [true, false, true]);
    hot.request(UNPLUG, 0, 1);
    assert_eq!(hot.rig.wiring.device_memory().len(), 1);
    assert!(!hot.reachable(0));
}

#[test]
fn memory_that_was_unplugged_can_be_plugged_again() {
    let mut hot = started(CHUNK);
    for _ in 0..3 {
        assert_eq!(hot.request(PLUG, 5, 1), (ACK, 0));
        hot.rig.fill(hot.base + 5 * BLOCK, BLOCK);
        assert_eq!(hot.request(UNPLUG, 5, 1), (ACK, 0));
    }
    assert_eq!(hot.handle.plugged(), 0);
}

#[test]
fn more_than_the_host_asks_for_is_not_given() {
    let mut hot = started(2 * BLOCK);
    assert_eq!(hot.request(PLUG, 0, 3).0, NACK);
    assert_eq!(hot.request(PLUG, 0, 2).0, ACK);
    assert_eq!(hot.request(PLUG, 9, 1).0, NACK);
}

#[test]
fn nonsense_is_an_error_and_changes_nothing() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 0, 1);
    let base = hot.base;
    let usable = hot.config(USABLE);
    for kind in [PLUG, UNPLUG, STATE] {
        for (addr, count) in [
            (base + BLOCK / 2, 1),
            (base + 1, 1),
            (base + BLOCK, 0),
            (base + usable, 1),
            (base + usable - BLOCK, 2),
            (base - BLOCK, 1),
            (0, 1),
            (u64::MAX, u16::MAX),
            (!(BLOCK - 1), 2),
        ] {
            assert_eq!(hot.raw(kind, addr, count).0, ERROR, "{kind} {addr:#x} {count}");
        }
    }
    assert_eq!(hot.request(PLUG, 0, 1).0, ERROR, "plugged already");
    assert_eq!(hot.request(UNPLUG, 1, 1).0, ERROR, "not plugged");
    assert_eq!(hot.request(UNPLUG, 0, 2).0, ERROR, "not all plugged");
    for kind in [4, 77, u16::MAX] {
        assert_eq!(hot.request(kind, 0, 1).0, ERROR);
    }
    assert_eq!((hot.handle.plugged(), hot.rig.needs_reset()), (BLOCK, false));
}

#[test]
fn the_state_of_blocks_can_be_asked_for() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 1, 2);
    assert_eq!(hot.request(STATE, 1, 2), (ACK, 0));
    assert_eq!(hot.request(STATE, 3, 2), (ACK, 1));
    assert_eq!(hot.request(STATE, 0, 3), (ACK, 2));
}

#[test]
fn all_memory_can_be_unplugged_at_once() {
    let mut hot = started(REGION);
    hot.request(PLUG, 0, 100);
    hot.handle.request(BLOCK).unwrap();
    assert_eq!(hot.raw(UNPLUG_ALL, u64::MAX, 0).0, ACK);
    assert_eq!((hot.config(PLUGGED), hot.config(USABLE)), (0, 256 * MIB + BLOCK));
    assert_eq!(hot.rig.wiring.device_memory().len(), 0);
}

#[test]
fn the_host_asks_and_the_driver_is_told() {
    let hot = started(0);
    assert_eq!(hot.config(USABLE), 0);
    hot.handle.request(4 * BLOCK).unwrap();
    assert!(hot.rig.config_changed());
    assert_eq!(hot.config(REQUESTED), 4 * BLOCK);
    assert_eq!(hot.config(USABLE), 4 * BLOCK + 256 * MIB);
    for bytes in [BLOCK + 1, REGION + BLOCK, u64::MAX] {
        hot.handle.request(bytes).unwrap_err();
    }
    assert!(!hot.rig.config_changed());
    assert_eq!(hot.handle.requested(), 4 * BLOCK);
}

#[test]
fn a_guest_with_much_memory_has_room_for_its_large_blocks() {
    let mem = Mem::new(&MemConfig::new(16 << 30).requested(BLOCK)).unwrap();
    let rig = Rig::with(GuestMem::anonymous(64 << 30).unwrap(), mem, u64::MAX);
    assert_eq!(rig.driver.config_u64(USABLE).unwrap(), (4 << 30) + BLOCK);
}

#[test]
fn a_large_region_has_larger_chunks_and_not_more() {
    let mem = Mem::new(&MemConfig::new(64 << 30).requested(64 << 30)).unwrap();
    let mut hot = Hot { handle: mem.handle(), rig: Rig::new(mem), base: 0 };
    hot.base = hot.config(ADDR);
    assert_eq!(hot.request(PLUG, 0, 32768), (ACK, 0));
    assert_eq!(hot.rig.wiring.device_memory().len(), 128);
    assert_eq!(hot.raw(UNPLUG_ALL, 0, 0).0, ACK);
}

#[test]
fn a_reset_by_the_driver_leaves_the_memory_and_what_is_in_it() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 3, 1);
    hot.rig.write(hot.base + 3 * BLOCK, 9u64);
    hot.rig.start(u64::MAX);
    assert_eq!(hot.config(PLUGGED), BLOCK);
    assert_eq!(hot.rig.read::<u64>(hot.base + 3 * BLOCK), 9);
    assert_eq!(hot.request(STATE, 3, 1), (ACK, 0));
}

#[test]
fn a_reset_of_the_machine_takes_the_memory_away() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 3, 1);
    hot.handle.system_reset();
    assert_eq!((hot.config(PLUGGED), hot.reachable(3)), (0, false));
}

#[test]
fn a_pause_changes_nothing() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 0, 1);
    hot.rig.write(hot.base, 9u64);
    hot.rig.device.pause().unwrap();
    hot.handle.request(REGION).unwrap();
    hot.rig.device.resume().unwrap();
    assert_eq!((hot.rig.read::<u64>(hot.base), hot.config(REQUESTED)), (9, REGION));
    assert_eq!(hot.request(PLUG, 1, 1), (ACK, 0));
}

#[test]
fn the_memory_goes_away_with_the_device() {
    let mut hot = started(CHUNK);
    hot.request(PLUG, 0, 1);
    let Rig { wiring, device, driver, queues, mem } = hot.rig;
    drop((wiring, device, driver, queues));
    assert!(!mem.view().address_in_range(GuestAddress(hot.base)));
    assert_eq!(hot.handle.plugged(), 0);
}

#[test]
fn a_request_that_is_too_short_breaks_the_device_until_a_reset() {
    for buffers in [
        [Buffer::readable(REQUEST, 23), Buffer::writable(ANSWER, 10)],
        [Buffer::readable(REQUEST, 24), Buffer::writable(ANSWER, 9)],
    ] {
        let mut hot = started(CHUNK);
        hot.rig.write(REQUEST, PLUG);
        hot.rig.write(REQUEST + 8, hot.base);
        hot.rig.write(REQUEST + 16, 1u16);
        hot.rig.offer(0, &buffers);
        hot.rig.kick(0);
        assert!(hot.rig.needs_reset());
        assert_eq!(hot.handle.plugged(), 0, "what cannot be answered is not done");
        hot.rig.start(u64::MAX);
        assert_eq!(hot.request(PLUG, 0, 1), (ACK, 0));
    }
}

#[test]
fn sizes_that_do_not_fit_together_are_refused() {
    for config in [
        MemConfig::new(0),
        MemConfig::new(BLOCK + MIB),
        MemConfig::new(1 << 45),
        MemConfig::new(REGION).block_size(MIB),
        MemConfig::new(REGION).block_size(3 * MIB),
        MemConfig::new(REGION).block_size(256 * MIB),
        MemConfig::new(REGION).requested(MIB),
        MemConfig::new(REGION).requested(REGION + BLOCK),
    ] {
        Mem::new(&config).unwrap_err();
    }
    Mem::new(&MemConfig::new(REGION).block_size(CHUNK)).unwrap();
}

#[test]
fn a_machine_without_memory_slots_refuses_the_device() {
    let mut wiring = TestWiring::new(GuestMem::anonymous(RAM).unwrap()).without_memory_slots();
    let mem = Mem::new(&MemConfig::new(REGION)).unwrap();
    let error = wiring.plug(VirtioMmioPlug::new(mem, "mem0")).unwrap_err();
    assert!(format!("{error:?}").contains("memory slots"), "{error:?}");
}

#[test]
fn the_status_says_all_sizes() {
    let mem = Mem::new(&MemConfig::new(REGION).slot_size(256 * MIB).requested(BLOCK)).unwrap();
    let status = mem.handle().status();
    assert_eq!((status.region_size, status.slot_size, status.block_size), (REGION, 256 * MIB, BLOCK));
    assert_eq!((status.plugged, status.requested), (0, BLOCK));
    assert_eq!(Mem::new(&MemConfig::new(REGION)).unwrap().handle().status().slot_size, CHUNK);
    for bad in [0, 64 * MIB, 129 * MIB] {
        Mem::new(&MemConfig::new(REGION).slot_size(bad)).unwrap_err();
    }
    Mem::new(&MemConfig::new(64 << 30).slot_size(128 * MIB)).unwrap_err();
}
