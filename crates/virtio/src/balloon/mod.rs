//! virtio-balloon (virtio 1.2, section 5.5): takes memory from the guest and gives it back to the host.
//!
//! The driver names pages that it does not use: because the host asked for them (inflate), because they are free anyway (free
//! page reporting), or for one run on the host's request (free page hinting). Their content goes back to the host at once; the
//! memory stays mapped, so that a page the driver names wrongly is lost to the guest and harms nobody else. A page that is used
//! again comes back as a page of zeros by itself, which is why the deflate queue has nothing to do but count.

mod handle;
mod pages;
mod state;
mod statistics;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use freestone_bus::{Progress, Source, Work};
use freestone_snapshot::{Restoring, Saving};

use crate::device::{ActiveQueue, DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::worker::{QueueWorker, RequestHandler};
use crate::{Error, Result};
use handle::Shared;
pub use handle::{BalloonCounts, BalloonHandle, HintRun, HintingStatus};
pub use state::{BalloonState, SavedRun};
pub use statistics::BalloonStatistics;

/// Feature bits of this device type that can be offered, as masks (5.5.3).
pub mod feature {
    /// `VIRTIO_BALLOON_F_STATS_VQ`: the driver reports statistics.
    pub const STATS_VQ: u64 = 1 << 1;
    /// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the driver may take pages back when the guest runs out of memory.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// `VIRTIO_BALLOON_F_FREE_PAGE_HINT`: the driver names free pages on request.
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    /// `VIRTIO_BALLOON_F_PAGE_POISON`: the driver says what free pages are filled with.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// `VIRTIO_BALLOON_F_PAGE_REPORTING`: the driver names free pages of its own accord.
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// Bytes of a balloon page, whatever pages the guest has (5.5.6).
pub const PAGE_SIZE: u64 = 4096;

/// `num_pages`, `actual`, `free_page_hint_cmd_id` and `poison_val` (5.5.4).
const CONFIG_LEN: u32 = 16;
const ACTUAL: usize = 4;
const POISON: usize = 12;

/// What a [`Balloon`] offers to its driver.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BalloonConfig {
    /// Bytes to take from the guest at first; [`BalloonHandle::set_target`] changes it. Default: 0.
    pub target: u64,
    /// Let the driver take pages back when the guest runs out of memory. Default: `true`.
    pub deflate_on_oom: bool,
    /// Ask for statistics; see [`BalloonHandle::set_statistics_interval`]. Default: `true`.
    pub statistics: bool,
    /// Take the free pages that the driver reports of its own accord. Default: `true`.
    pub reporting: bool,
    /// Take the free pages that the driver hints at on request; see [`BalloonHandle::start_hinting`]. Default: `false`.
    ///
    /// The specification lets a driver use a hinted page again before the device has seen the hint (5.5.6.5.1), and Linux does so
    /// when memory is short: what the guest wrote there is then lost. Reporting has no such race. Offer hints only to guests
    /// that are known not to do that.
    pub hinting: bool,
    /// Entries of each queue: a power of two; Linux needs 32 or more for reporting. Default: 128.
    pub queue_size: u16,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            target: 0,
            deflate_on_oom: true,
            statistics: true,
            reporting: true,
            hinting: false,
            queue_size: 128,
        }
    }
}

impl BalloonConfig {
    /// The default configuration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`target`](Self::target).
    #[must_use]
    pub fn target(mut self, target: u64) -> Self {
        self.target = target;
        self
    }

    /// Sets [`deflate_on_oom`](Self::deflate_on_oom).
    #[must_use]
    pub fn deflate_on_oom(mut self, on: bool) -> Self {
        self.deflate_on_oom = on;
        self
    }

    /// Sets [`statistics`](Self::statistics).
    #[must_use]
    pub fn statistics(mut self, on: bool) -> Self {
        self.statistics = on;
        self
    }

    /// Sets [`reporting`](Self::reporting).
    #[must_use]
    pub fn reporting(mut self, on: bool) -> Self {
        self.reporting = on;
        self
    }

    /// Sets [`hinting`](Self::hinting).
    #[must_use]
    pub fn hinting(mut self, on: bool) -> Self {
        self.hinting = on;
        self
    }

    /// Sets [`queue_size`](Self::queue_size).
    #[must_use]
    pub fn queue_size(mut self, queue_size: u16) -> Self {
        self.queue_size = queue_size;
        self
    }

    fn features(&self) -> u64 {
        let on = |on, bit| if on { bit } else { 0 };
        on(self.statistics, feature::STATS_VQ)
            | on(self.deflate_on_oom, feature::DEFLATE_ON_OOM)
            | on(self.hinting, feature::FREE_PAGE_HINT)
            // A driver that fills free pages must not accept reporting without a way to say so (5.5.3.1).
            | on(self.reporting, feature::PAGE_REPORTING | feature::PAGE_POISON)
    }

    /// Queues 0 to 1 always exist; a later one needs those before it to have its number.
    fn queue_count(&self) -> usize {
        match self {
            Self { reporting: true, .. } => 5,
            Self { hinting: true, .. } => 4,
            Self { statistics: true, .. } => 3,
            _ => 2,
        }
    }
}

/// What a queue is for (5.5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hints,
    Reports,
}

impl Role {
    /// All, in the order of their numbers, with the feature that each needs.
    const ALL: [(Self, u64); 5] = [
        (Self::Inflate, 0),
        (Self::Deflate, 0),
        (Self::Statistics, feature::STATS_VQ),
        (Self::Hints, feature::FREE_PAGE_HINT),
        (Self::Reports, feature::PAGE_REPORTING),
    ];

    /// The role of each queue for a driver that accepted `features` and enabled the queues `enabled`.
    ///
    /// Queues have fixed numbers. Linux before 6.11 however counts only the queues whose feature it accepted, so that reporting
    /// without hinting has number 3. Which of the two a driver does can be seen by what it enabled.
    fn assign(features: u64, enabled: &[u16]) -> Vec<(u16, Self)> {
        let used = |need: u64| features & need == need;
        let fixed = (0u16..).zip(Self::ALL).filter(|(_, (_, need))| used(*need));
        let fixed: Vec<_> = fixed.map(|(index, (role, _))| (index, role)).collect();
        if fixed.iter().all(|(index, _)| enabled.contains(index)) {
            return fixed;
        }
        let counted: Vec<_> = (0u16..).zip(fixed.iter().map(|(_, role)| *role)).collect();
        if counted.iter().all(|(index, _)| enabled.contains(index)) { counted } else { fixed }
    }
}

/// A virtio memory balloon.
#[derive(Debug)]
pub struct Balloon {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

impl Balloon {
    /// A balloon that offers what `config` says.
    ///
    /// # Errors
    /// [`Error::Io`] if the host gives no timer or eventfd.
    pub fn new(config: BalloonConfig) -> Result<Self> {
        let features = config.features();
        let info = DeviceInfo {
            device_type: DeviceType::BALLOON,
            features,
            queue_max_sizes: vec![config.queue_size; config.queue_count()],
            config_len: CONFIG_LEN,
        };
        let shared = Shared::new(features).map_err(Error::io("make the timer of a balloon"))?;
        shared.set_target(config.target);
        Ok(Self { info, shared: Arc::new(shared) })
    }

    /// The host's side of the balloon.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle::new(Arc::clone(&self.shared))
    }

    fn config_space(&self) -> [u8; CONFIG_LEN as usize] {
        let shared = &self.shared;
        let fields = [&shared.target, &shared.actual, &shared.command, &shared.poison];
        let mut space = [0; CONFIG_LEN as usize];
        for (to, field) in space.chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.load(Ordering::Acquire).to_le_bytes());
        }
        space
    }
}

impl VirtioDevice for Balloon {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let space = self.config_space();
        data.iter_mut().zip(space.iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut space = self.config_space();
        space.iter_mut().skip(offset).zip(data).for_each(|(to, from)| *to = *from);
        for (at, field) in [(ACTUAL, &self.shared.actual), (POISON, &self.shared.poison)] {
            if let Some(bytes) = space.get(at..).and_then(<[u8]>::first_chunk) {
                field.store(u32::from_le_bytes(*bytes), Ordering::Release);
            }
        }
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let Resources { mem, features, queues, control } = resources;
        let enabled: Vec<u16> = queues.iter().map(|queue| queue.index).collect();
        let roles = Role::assign(features, &enabled);
        self.shared.started(&control);
        let workers = queues.into_iter().map(|queue| -> Box<dyn Worker> {
            let role = roles.iter().find(|(index, _)| *index == queue.index).map(|(_, role)| *role);
            let shared = Arc::clone(&self.shared);
            let (mem, control) = (mem.clone(), control.clone());
            match role {
                None => Box::new(Unserved(queue)),
                Some(Role::Inflate) => {
                    let handler = pages::Inflate::new(mem.clone(), shared);
                    quiet(QueueWorker::new(mem, queue, control, handler))
                }
                Some(Role::Deflate) => {
                    quiet(QueueWorker::new(mem, queue, control, pages::Deflate::new(shared)))
                }
                Some(Role::Statistics) => {
                    Box::new(statistics::StatisticsWorker::new(mem, queue, control, shared))
                }
                Some(Role::Hints) => {
                    let handler = pages::Hints::new(mem.clone(), shared);
                    quiet(QueueWorker::new(mem, queue, control, handler))
                }
                Some(Role::Reports) => {
                    let poison = features & feature::PAGE_POISON != 0;
                    let handler = pages::Reports::new(mem.clone(), shared, poison);
                    quiet(QueueWorker::new(mem, queue, control, handler))
                }
            }
        });
        Ok(workers.collect())
    }

    fn reset(&mut self) {
        self.shared.reset();
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.save_state(state)
    }

    fn restore(&mut self, _features: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restore_state(state)
    }
}

/// A worker that does not look at an empty queue: none of these requests is in a hurry.
fn quiet<H: RequestHandler + 'static>(worker: QueueWorker<H>) -> Box<dyn Worker> {
    Box::new(worker.poll(Duration::ZERO))
}

/// A queue that the driver enabled without accepting the feature it is for.
struct Unserved(ActiveQueue);

impl Work for Unserved {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn process(&mut self) -> Progress {
        Progress::Idle
    }
}

impl Worker for Unserved {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        vec![self.0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = feature::STATS_VQ | feature::FREE_PAGE_HINT | feature::PAGE_REPORTING;

    fn number(role: Role, features: u64, enabled: &[u16]) -> Option<u16> {
        Role::assign(features, enabled).into_iter().find(|(_, r)| *r == role).map(|(index, _)| index)
    }

    #[test]
    fn with_all_features_each_queue_has_its_number() {
        let enabled = [0, 1, 2, 3, 4];
        let roles = [Role::Inflate, Role::Deflate, Role::Statistics, Role::Hints, Role::Reports];
        assert_eq!(roles.map(|role| number(role, ALL, &enabled)), [0, 1, 2, 3, 4].map(Some));
    }

    #[test]
    fn queues_of_features_that_were_not_accepted_keep_their_numbers() {
        let reporting = feature::PAGE_REPORTING;
        assert_eq!(number(Role::Reports, reporting, &[0, 1, 4]), Some(4));
        assert_eq!(number(Role::Reports, reporting, &[0, 1, 2, 3, 4]), Some(4));
        assert_eq!(number(Role::Statistics, reporting, &[0, 1, 4]), None);
    }

    #[test]
    fn a_driver_that_counts_only_accepted_queues_is_understood() {
        let reporting = feature::PAGE_REPORTING;
        assert_eq!(number(Role::Reports, reporting, &[0, 1, 2]), Some(2));
        assert_eq!(number(Role::Reports, reporting | feature::STATS_VQ, &[0, 1, 2, 3]), Some(3));
    }

    #[test]
    fn a_driver_that_leaves_queues_out_gets_the_numbers_of_the_specification() {
        assert_eq!(number(Role::Reports, ALL, &[0, 1]), Some(4));
        assert_eq!(number(Role::Inflate, ALL, &[]), Some(0));
    }
}
