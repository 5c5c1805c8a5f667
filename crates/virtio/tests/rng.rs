//! virtio-rng: bytes for the guest, as many as a request may have and a limit allows.
#![cfg(feature = "rng")]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use freestone_memory::{Bytes, GuestAddress, GuestMem};
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue, MmioDriver};
use freestone_virtio::VirtioMmioPlug;
use freestone_virtio::rate::{RateLimiter, TokenBucket};
use freestone_virtio::rng::{EntropySource, MAX_BYTES, Rng};

const MEMORY: u64 = 4 << 20;

struct Counting;

impl EntropySource for Counting {
    fn fill(&self, data: &mut [u8]) -> io::Result<()> {
        data.fill(0xab);
        Ok(())
    }
}

struct Broken;

impl EntropySource for Broken {
    fn fill(&self, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("no entropy today"))
    }
}

struct Machine {
    wiring: TestWiring,
    _device: Box<dyn freestone_bus::Device>,
    driver: MmioDriver,
    mem: GuestMem,
    arena: Arena,
    queue: DriverQueue,
}

fn machine(rng: Rng) -> Machine {
    let mem = GuestMem::anonymous(MEMORY).unwrap();
    let mut wiring = TestWiring::new(mem.clone());
    let device = wiring.plug(VirtioMmioPlug::new(rng, "rng")).unwrap();
    let mut driver = MmioDriver::new(wiring.mmio_device(0).unwrap());
    let mut arena = Arena::new(0x1_0000, MEMORY);
    driver.negotiate(0).unwrap();
    let queue = driver.setup_queue(&mem, &mut arena, 0, 16).unwrap();
    driver.driver_ok().unwrap();
    Machine { wiring, _device: device, driver, mem, arena, queue }
}

impl Machine {
    fn ask(&mut self, len: u32) -> u64 {
        let gpa = self.arena.alloc(len.into(), 8).unwrap();
        self.queue.add_chain(&[Buffer::writable(gpa, len)]).unwrap();
        self.queue.publish().unwrap();
        self.driver.kick(0).unwrap();
        self.wiring.run_work(100);
        gpa
    }

    fn answered(&mut self) -> Option<u32> {
        self.queue.used().unwrap().map(|used| used.len)
    }
}

#[test]
fn a_request_is_filled_to_its_end_and_no_further() {
    let mut machine = machine(Rng::with_source(Arc::new(Counting)));
    let gpa = machine.ask(5000);
    assert_eq!(machine.answered(), Some(5000));
    let mut bytes = [0; 5008];
    machine.mem.view().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    assert!(bytes.iter().take(5000).all(|&b| b == 0xab) && bytes.iter().skip(5000).all(|&b| b == 0));
}

#[test]
fn the_hosts_bytes_differ_from_request_to_request() {
    let mut machine = machine(Rng::new());
    let places = [machine.ask(64), machine.ask(64)];
    let bytes = places.map(|gpa| machine.mem.view().read_obj::<[u8; 32]>(GuestAddress(gpa)).unwrap());
    assert_ne!(bytes[0], bytes[1]);
}

#[test]
fn a_huge_request_gets_a_bounded_number_of_bytes() {
    let mut machine = machine(Rng::with_source(Arc::new(Counting)));
    machine.ask(1 << 20);
    assert_eq!(machine.answered(), Some(u32::try_from(MAX_BYTES).unwrap()));
}

#[test]
fn a_source_that_fails_gives_an_empty_answer() {
    let mut machine = machine(Rng::with_source(Arc::new(Broken)));
    machine.ask(64);
    assert_eq!(machine.answered(), Some(0));
}

#[test]
fn beyond_the_limit_requests_wait_until_the_limit_is_lifted() {
    let rng = Rng::with_source(Arc::new(Counting));
    let hour = TokenBucket::new(100, Duration::from_secs(3600));
    let rng = rng.limit(Some(RateLimiter::new().bandwidth(hour)));
    let handle = rng.handle();
    let mut machine = machine(rng);
    machine.ask(100);
    machine.ask(100);
    assert_eq!((machine.answered(), machine.answered(), handle.bytes()), (Some(100), None, 100));
    handle.limit(None);
    machine.wiring.run_work(10);
    assert_eq!((machine.answered(), handle.bytes()), (Some(100), 200));
}
