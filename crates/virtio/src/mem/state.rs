//! The saved state of a memory device: which blocks are plugged. What is in them is guest memory.

use freestone_bus::Error;
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::Mem;
use super::blocks::Misfit;

/// What a [`Mem`] device remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemState {
    pub(super) base: u64,
    pub(super) region: u64,
    pub(super) block: u64,
    /// Memory comes and goes in pieces of this size, and stands in the image of memory so.
    pub(super) chunk: u64,
    pub(super) usable: u64,
    pub(super) requested: u64,
    /// A bit for each block, the lowest first: whether it is plugged.
    pub(super) plugged: Vec<u8>,
}

impl Section for MemState {
    const NAME: &'static str = "virtio-mem";
    const VERSION: u32 = 1;
}

impl Mem {
    pub(super) fn save_state(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        let saved = self.shared.blocks().state_of_all();
        state.put(&saved).map_err(Error::state("save"))
    }

    /// Puts the memory of all plugged blocks where it was. Its contents come later.
    pub(super) fn restore_state(&self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let saved: MemState = state.take().map_err(Error::state("restore"))?;
        self.shared.blocks().restore(&saved).map_err(|misfit| match misfit {
            Misfit::State(what, value) => {
                Error::BadState { device: state.instance().to_owned(), what, value }
            }
            Misfit::Host(source) => Error::Io { op: "plug the memory of the saved machine", source },
        })
    }
}

#[cfg(test)]
mod tests {
    use freestone_memory::{GuestMem, GuestMemoryRegion};
    use freestone_testkit::TestWiring;
    use proptest::prelude::*;

    use super::*;
    use crate::device::VirtioDevice;
    use crate::mem::MemConfig;
    use crate::mem::blocks::Answer;
    use crate::state_tests::{body, golden, restore, restore_body, save};

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 2 * MIB;

    fn plugged_in(region: u64) -> (Mem, GuestMem) {
        let memory = GuestMem::anonymous(MIB).unwrap();
        let mut mem = Mem::new(&MemConfig::new(region).requested(region)).unwrap();
        mem.attach(&mut TestWiring::new(memory.clone())).unwrap();
        (mem, memory)
    }

    /// A device with some blocks plugged, in its first and its last chunk.
    fn driven() -> (Mem, GuestMem) {
        let (mem, memory) = plugged_in(300 * MIB);
        let mut blocks = mem.shared.blocks();
        let base = blocks.sizes().base;
        for (first, count) in [(1, 3), (140, 10)] {
            assert_eq!(blocks.plug(base + first * BLOCK, count), Answer::Ack);
        }
        blocks.request(64 * MIB).unwrap();
        drop(blocks);
        (mem, memory)
    }

    fn regions(memory: &GuestMem) -> Vec<(u64, usize)> {
        memory.regions().iter().map(|region| (region.start_addr().0, region.size())).collect()
    }

    #[test]
    fn memory_is_at_the_same_addresses_again() {
        let (saved, memory) = driven();
        let (mut restored, new_memory) = plugged_in(300 * MIB);
        assert_eq!(regions(&new_memory).len(), 1);
        restore(&mut restored, 0, &save(&saved)).unwrap();
        assert_eq!(regions(&new_memory), regions(&memory));
        assert_eq!((restored.handle().plugged(), restored.handle().requested()), (26 * MIB, 64 * MIB));
        let (mut is, mut was) = ([0; 56], [0; 56]);
        restored.read_config(0, &mut is);
        saved.read_config(0, &mut was);
        assert_eq!(is, was);
    }

    #[test]
    fn a_device_of_another_size_or_in_no_machine_is_not_restored() {
        let state = save(&driven().0);
        restore(&mut plugged_in(302 * MIB).0, 0, &state).unwrap_err();
        restore(&mut Mem::new(&MemConfig::new(300 * MIB)).unwrap(), 0, &state).unwrap_err();
    }

    #[test]
    fn the_golden_state_reads_as_ever() {
        golden("virtio-mem-1", &driven().0, &mut plugged_in(300 * MIB).0, 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_state_is_refused_or_gives_a_device_that_adds_up(
            changes in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..3),
        ) {
            let mut body = body(&driven().0);
            for (at, value) in changes {
                let at = at.index(body.len());
                body[at] = value;
            }
            let (mut restored, memory) = plugged_in(300 * MIB);
            let done = restore_body(&mut restored, 0, "virtio-mem", &body);
            let mut blocks = restored.shared.blocks();
            let sizes = blocks.sizes();
            prop_assert!(sizes.plugged <= sizes.usable && sizes.usable <= sizes.region);
            prop_assert!(done.is_ok() || sizes.plugged == 0);
            blocks.unplug_all();
            prop_assert_eq!(regions(&memory).len(), 1, "nothing is left");
        }
    }
}
