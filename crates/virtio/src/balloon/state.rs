//! What a balloon remembers. Memory that was given up is not part of it: it is a hole in the guest's memory, and stays one.

use std::sync::atomic::Ordering;

use freestone_bus::{Error as BusError, Result as BusResult};
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::handle::{DONE, HintRun, lock};
use super::{Balloon, BalloonStatistics, feature};

/// The section `virtio-balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// `num_pages`: pages that the host asked for.
    pub target: u32,
    /// `actual`: pages in the balloon, as the driver says.
    pub actual: u32,
    /// `free_page_hint_cmd_id`.
    pub hint_command: u32,
    /// `poison_val`.
    pub poison: u32,
    /// How far the run of free page hinting is.
    pub hint_run: SavedRun,
    /// ID of the last run.
    pub last_hint_id: u32,
    /// Whether the driver is to wait for the host when it has no more hints.
    pub hint_hold: bool,
    /// The statistics that the driver sent last, by their tag.
    pub statistics: Option<[Option<u64>; 16]>,
    /// The host asked for statistics, and the driver was not asked yet.
    pub statistics_requested: bool,
}

impl Section for BalloonState {
    const NAME: &'static str = "virtio-balloon";
    const VERSION: u32 = 1;
}

/// As [`HintRun`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedRun {
    /// There is none.
    Idle,
    /// The driver has not begun.
    Requested,
    /// The driver sends hints.
    Running,
    /// The driver has no more hints and waits.
    Finished,
}

impl From<HintRun> for SavedRun {
    fn from(run: HintRun) -> Self {
        match run {
            HintRun::Idle => Self::Idle,
            HintRun::Requested => Self::Requested,
            HintRun::Running => Self::Running,
            HintRun::Finished => Self::Finished,
        }
    }
}

impl From<SavedRun> for HintRun {
    fn from(run: SavedRun) -> Self {
        match run {
            SavedRun::Idle => Self::Idle,
            SavedRun::Requested => Self::Requested,
            SavedRun::Running => Self::Running,
            SavedRun::Finished => Self::Finished,
        }
    }
}

impl BalloonState {
    /// A run has an ID of its own, and a driver that can be asked.
    fn check(&self, offered: u64) -> Result<(), (&'static str, u64)> {
        let hinting = offered & feature::FREE_PAGE_HINT != 0;
        let idle = self.hint_run == SavedRun::Idle;
        let command = self.hint_command;
        let known = if idle { command <= DONE } else { command > DONE && command == self.last_hint_id };
        let rules = [
            (hinting || idle, "run of free page hints, which are not offered,", command),
            (known, "command ID of free page hints", command),
            (self.last_hint_id == 0 || self.last_hint_id > DONE, "last run of hints", self.last_hint_id),
        ];
        let broken = rules.iter().find(|(kept, ..)| !kept);
        broken.map_or(Ok(()), |&(_, what, value)| Err((what, value.into())))
    }
}

impl Balloon {
    pub(super) fn save_state(&self, state: &mut Saving<'_>) -> BusResult<()> {
        let shared = &self.shared;
        let (hint_run, last_hint_id, hint_hold, hint_command) = {
            let hinting = shared.hinting();
            (hinting.run.into(), hinting.last_id, hinting.hold, shared.command.load(Ordering::Acquire))
        };
        let saved = BalloonState {
            target: shared.target.load(Ordering::Acquire),
            actual: shared.actual.load(Ordering::Acquire),
            hint_command,
            poison: shared.poison.load(Ordering::Acquire),
            hint_run,
            last_hint_id,
            hint_hold,
            statistics: lock(&shared.statistics).map(BalloonStatistics::to_array),
            statistics_requested: shared.clock.is_requested(),
        };
        state.put(&saved).map_err(BusError::state("save"))
    }

    /// The driver goes on with the target that it knows; the host may change it afterwards as ever.
    pub(super) fn restore_state(&mut self, state: &mut Restoring<'_>) -> BusResult<()> {
        let saved: BalloonState = state.take().map_err(BusError::state("restore"))?;
        saved.check(self.info.features).map_err(|(what, value)| BusError::BadState {
            device: state.instance().to_owned(),
            what,
            value,
        })?;
        let shared = &self.shared;
        shared.target.store(saved.target, Ordering::Release);
        shared.actual.store(saved.actual, Ordering::Release);
        shared.poison.store(saved.poison, Ordering::Release);
        let mut hinting = shared.hinting();
        hinting.run = saved.hint_run.into();
        hinting.last_id = saved.last_hint_id;
        hinting.hold = saved.hint_hold;
        shared.command.store(saved.hint_command, Ordering::Release);
        drop(hinting);
        *lock(&shared.statistics) = saved.statistics.map(BalloonStatistics::from_array);
        if saved.statistics_requested {
            shared.clock.request();
        }
        Ok(())
    }
}
