//! Requests that are put back: as if they had not been taken, in either format.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use freestone_memory::GuestMem;
use freestone_testkit::driver::{Arena, Buffer, DriverQueue};
use freestone_virtio::{ChainBuffers, QueueConfig, QueueStats, VirtQueue, features};

const MEMORY: u64 = 1 << 20;
const RINGS: [u64; 4] =
    [0, features::RING_EVENT_IDX, features::RING_PACKED, features::RING_PACKED | features::RING_EVENT_IDX];

struct Fixture {
    mem: GuestMem,
    driver: DriverQueue,
    queue: VirtQueue,
    stats: Arc<QueueStats>,
}

fn set_up(size: u16, bits: u64) -> Fixture {
    let mem = GuestMem::anonymous(MEMORY).unwrap();
    let driver = DriverQueue::negotiated(&mem, &mut Arena::new(0x1000, MEMORY), size, bits).unwrap();
    let config = QueueConfig {
        size,
        descriptors: driver.desc_addr(),
        driver: driver.avail_addr(),
        device: driver.used_addr(),
    };
    let stats = Arc::new(QueueStats::new());
    let queue = VirtQueue::new(config, size, bits, &mem.view()).unwrap().with_stats(Arc::clone(&stats));
    Fixture { mem, driver, queue, stats }
}

impl Fixture {
    /// Offers a chain of `parts` descriptors; whether the device wants to be told.
    fn offer(&mut self, parts: usize) -> bool {
        self.driver.add_chain(&vec![Buffer::readable(0x8_0000, 3); parts]).unwrap();
        self.driver.publish().unwrap()
    }

    /// Takes all there are, puts back all but the first `keep`, and completes those. Returns how many there were.
    fn look(&mut self, keep: usize) -> usize {
        let view = self.mem.view();
        let mut buffers = ChainBuffers::new();
        let mut queue = self.queue.attach(&view).unwrap();
        let mut taken = Vec::new();
        while let Some(chain) = queue.pop(&mut buffers).unwrap() {
            taken.push(chain);
        }
        let count = taken.len();
        while taken.len() > keep {
            queue.undo(taken.pop().unwrap());
        }
        for chain in taken {
            queue.push_used(chain, 0).unwrap();
        }
        queue.publish().unwrap();
        count
    }
}

#[test]
fn what_was_put_back_is_taken_again_in_the_same_order_however_often_the_ring_is_gone_round() {
    for bits in RINGS {
        for (size, parts) in [(4, 1), (4, 3), (8, 2), (16, 5)] {
            let mut fixture = set_up(size, bits);
            let most = usize::from(size) / parts;
            let (mut offered, mut used) = (Vec::new(), Vec::new());
            // More than 65536 chains, so that the index of a split ring wraps as well.
            let rounds = if size == 4 && parts == 1 { 33_000 } else { 200 };
            for round in 0..rounds {
                while fixture.driver.in_flight() < most {
                    let chain = vec![Buffer::readable(0x8_0000, 3); parts];
                    offered.push(fixture.driver.add_chain(&chain).unwrap());
                }
                fixture.driver.publish().unwrap();
                assert_eq!(fixture.look(0), most);
                assert_eq!(fixture.look(round % most + 1), most);
                while let Some(chain) = fixture.driver.used().unwrap() {
                    used.push(chain.head);
                }
            }
            assert!(offered.starts_with(&used), "{bits:#x} {size} {parts}");
            let counts = fixture.stats.snapshot();
            assert_eq!((counts.requests, counts.completed), (used.len() as u64, used.len() as u64));
            assert_eq!(counts.bytes_in, (3 * parts * used.len()) as u64);
        }
    }
}

#[test]
fn the_position_is_as_if_nothing_had_been_taken() {
    for bits in RINGS {
        let mut fixture = set_up(4, bits);
        for _ in 0..9 {
            fixture.offer(3);
            let before = fixture.queue.state();
            assert_eq!(fixture.look(0), 1);
            assert_eq!(fixture.queue.state(), before);
            fixture.look(1);
            fixture.driver.used().unwrap().unwrap();
        }
    }
}

#[test]
fn kicks_are_wanted_for_what_comes_after_all_that_was_taken() {
    for bits in RINGS {
        let mut fixture = set_up(8, bits);
        for round in 0..20 {
            fixture.offer(2);
            let view = fixture.mem.view();
            let mut queue = fixture.queue.attach(&view).unwrap();
            queue.disable_kicks().unwrap();
            let chain = queue.pop(&mut ChainBuffers::new()).unwrap().unwrap();
            assert_eq!(chain.descriptors(), 2);
            assert!(!queue.enable_kicks().unwrap(), "nothing more");
            queue.undo(chain);
            assert!(queue.has_next().unwrap());
            assert!(fixture.offer(1), "{bits:#x} {round}");
            assert_eq!(fixture.look(2), 2);
            while fixture.driver.used().unwrap().is_some() {}
        }
    }
}

#[test]
fn an_interrupt_is_wanted_for_what_was_completed_alone() {
    for bits in RINGS {
        let mut fixture = set_up(8, bits);
        fixture.offer(1);
        assert_eq!(fixture.look(0), 1);
        let view = fixture.mem.view();
        let mut queue = fixture.queue.attach(&view).unwrap();
        assert!(!queue.needs_interrupt().unwrap());
        let chain = queue.pop(&mut ChainBuffers::new()).unwrap().unwrap();
        queue.push_used(chain, 0).unwrap();
        queue.publish().unwrap();
        assert!(queue.needs_interrupt().unwrap());
    }
}
