//! Random drivers against models of what the specification allows.

use std::collections::BTreeSet;

use freestone_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use freestone_testkit::driver::Buffer;
use freestone_virtio::{Balloon, BalloonConfig, Mem, MemConfig};
use proptest::prelude::*;

use super::support::{ANSWER, FREE, MIB, RAM, REQUEST, Rig};

const BLOCK: u64 = 2 * MIB;
const REGION: u64 = 768 * MIB;
const BLOCKS: u64 = REGION / BLOCK;

/// A request type, an address relative to the region, and a number of blocks.
fn requests() -> impl Strategy<Value = (u16, u64, u16)> {
    let near = (0..BLOCKS + 4).prop_map(|block| block * BLOCK);
    let address = prop_oneof![8 => near, 1 => any::<u64>(), 1 => 0..REGION];
    let count = prop_oneof![8 => 0..20u16, 2 => 0..400u16, 1 => any::<u16>()];
    (prop_oneof![8 => 0..2u16, 1 => 2..3u16, 4 => 3..4u16, 1 => any::<u16>()], address, count)
}

/// What the specification says a device does.
#[derive(Default)]
struct Model {
    plugged: BTreeSet<u64>,
}

impl Model {
    /// The answer and the state, for a usable region of the whole region.
    fn answer(&mut self, (kind, offset, count): (u16, u64, u16), requested: u64) -> (u16, u16) {
        const ERROR: (u16, u16) = (3, 0);
        if kind == 2 {
            self.plugged.clear();
            return (0, 0);
        }
        let first = offset / BLOCK;
        let outside = u128::from(offset) + u128::from(count) * u128::from(BLOCK) > u128::from(REGION);
        if kind > 3 || count == 0 || !offset.is_multiple_of(BLOCK) || outside {
            return ERROR;
        }
        let blocks: BTreeSet<u64> = (first..first + u64::from(count)).collect();
        let common = blocks.intersection(&self.plugged).count();
        match kind {
            0 if common > 0 => ERROR,
            0 if (self.plugged.len() + blocks.len()) as u64 * BLOCK > requested => (1, 0),
            0 => {
                self.plugged.extend(blocks);
                (0, 0)
            }
            1 if common < blocks.len() => ERROR,
            1 => {
                self.plugged.retain(|block| !blocks.contains(block));
                (0, 0)
            }
            _ if common == blocks.len() => (0, 0),
            _ if common == 0 => (0, 1),
            _ => (0, 2),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_memory_device_answers_as_the_specification_says(
        sequence in prop::collection::vec(requests(), 1..40),
        requested in 0..=BLOCKS,
    ) {
        let mem = Mem::new(&MemConfig::new(REGION).requested(REGION)).unwrap();
        let handle = mem.handle();
        let mut rig = Rig::new(mem);
        let base = rig.driver.config_u64(16).unwrap();
        handle.request(requested * BLOCK).unwrap();
        let mut model = Model::default();
        for request in sequence {
            // Unplugging everything lets the usable region shrink, which the model does not know.
            handle.request(REGION).unwrap();
            handle.request(requested * BLOCK).unwrap();
            let (kind, offset, count) = request;
            rig.write(REQUEST, kind);
            rig.write(REQUEST + 8, base.wrapping_add(offset));
            rig.write(REQUEST + 16, count);
            rig.request(0, &[Buffer::readable(REQUEST, 24), Buffer::writable(ANSWER, 10)]);
            // An address that wraps is below the region, and so is the model's: beyond it.
            let expected = model.answer(request, requested * BLOCK);
            prop_assert_eq!((rig.read(ANSWER), rig.read(ANSWER + 8)), expected, "{:?}", request);
            prop_assert_eq!(handle.plugged(), model.plugged.len() as u64 * BLOCK);
            // Every plugged block is memory, and no chunk without one is.
            let view = rig.mem.view();
            for block in &model.plugged {
                prop_assert!(view.address_in_range(GuestAddress(base + block * BLOCK)));
            }
            let chunks: BTreeSet<u64> = model.plugged.iter().map(|block| block / 64).collect();
            prop_assert_eq!(rig.wiring.device_memory().len(), chunks.len());
        }
        prop_assert!(!rig.needs_reset());
    }

    #[test]
    fn the_balloon_takes_the_pages_it_is_told_and_no_others(
        pages in prop::collection::vec(prop_oneof![8 => FREE / 4096 - 8..RAM / 4096 + 8, 1 => 0..=u64::from(u32::MAX)], 0..300),
    ) {
        let mut rig = Rig::new(Balloon::new(BalloonConfig::new()).unwrap());
        let low = FREE - 8 * 4096;
        rig.fill(low, RAM - low);
        for (at, page) in (REQUEST..).step_by(4).zip(&pages) {
            rig.write(at, u32::try_from(*page).unwrap());
        }
        let bytes = u32::try_from(pages.len() * 4).unwrap();
        rig.offer(0, &[Buffer::readable(REQUEST, bytes)]);
        rig.kick(0);
        let view = rig.mem.view();
        for page in low / 4096..RAM / 4096 {
            let byte: u8 = view.read_obj(GuestAddress(page * 4096 + 5)).unwrap();
            prop_assert_eq!(byte, u8::from(!pages.contains(&page)), "page {:#x}", page);
        }
    }
}
