//! What a disk remembers beside its image, which is not in a snapshot.

use std::sync::atomic::Ordering;

use freestone_bus::{Error as BusError, Result as BusResult};
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::{Block, RangeLimits, feature};

/// The section `virtio-blk`: what the driver was told of the disk, and the cache mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// The capacity changed and no driver was told.
    pub capacity_missed: bool,
    /// Bytes of a logical block.
    pub logical_block: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Bounds of discard requests: sectors and segments.
    pub discard: (u32, u32),
    /// Bounds of write-zeroes requests: sectors and segments.
    pub write_zeroes: (u32, u32),
    /// Whether a write may be durable later than when it completes.
    pub writeback: bool,
    /// The driver chose so.
    pub cache_chosen: bool,
}

impl Section for BlockState {
    const NAME: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}

fn pair(limits: RangeLimits) -> (u32, u32) {
    (limits.max_sectors, limits.max_segments)
}

impl Block {
    fn state(&self) -> BlockState {
        let shared = &self.shared;
        BlockState {
            capacity: shared.capacity.load(Ordering::Acquire),
            capacity_missed: shared.driver().missed,
            logical_block: shared.config.logical_block,
            read_only: self.read_only,
            discard: pair(shared.config.discard),
            write_zeroes: pair(shared.config.write_zeroes),
            writeback: shared.writeback.load(Ordering::Relaxed),
            cache_chosen: self.cache_chosen,
        }
    }

    /// Nothing is under way: workers wait for that when they stop. Whoever opens the image after this finds all that was written.
    pub(super) fn save_state(&self, state: &mut Saving<'_>) -> BusResult<()> {
        if !self.read_only {
            self.shared.image().flush().map_err(BusError::io("flush a disk to save its device"))?;
        }
        state.put(&self.state()).map_err(BusError::state("save"))
    }

    /// The image must be such that the driver finds no difference; that it has the same content is for the caller.
    pub(super) fn restore_state(&mut self, state: &mut Restoring<'_>) -> BusResult<()> {
        let saved: BlockState = state.take().map_err(BusError::state("restore"))?;
        let here = self.state();
        let within = |(sectors, segments), here: (u32, u32)| sectors <= here.0 && segments <= here.1;
        let may_choose = self.info.features & feature::CONFIG_WCE != 0;
        let rules = [
            (
                saved.capacity == here.capacity,
                "capacity, in sectors, which is not that of the image:",
                saved.capacity,
            ),
            (saved.logical_block == here.logical_block, "logical block size", saved.logical_block.into()),
            (saved.read_only == here.read_only, "read-only disk", saved.read_only.into()),
            (within(saved.discard, here.discard), "bound of discards", saved.discard.0.into()),
            (
                within(saved.write_zeroes, here.write_zeroes),
                "bound of write-zeroes",
                saved.write_zeroes.0.into(),
            ),
            (may_choose || !saved.cache_chosen, "cache mode that a driver chose", saved.writeback.into()),
        ];
        if let Some(&(_, what, value)) = rules.iter().find(|(kept, ..)| !kept) {
            return Err(BusError::BadState { device: state.instance().to_owned(), what, value });
        }
        self.shared.driver().missed = saved.capacity_missed;
        self.shared.writeback.store(saved.writeback, Ordering::Relaxed);
        self.cache_chosen = saved.cache_chosen;
        Ok(())
    }
}
