//! What the API asks of a machine. One [`Engine`] stands behind one API socket; it makes one machine.
//!
//! No call may wait: the API's thread serves all clients. An engine takes a request, lets another thread do it, and answers by
//! the [`Done`] it was given, from any thread, at any time. The API sends the next request when the last one is answered.

use std::fmt;

use serde_json::{Map, Value};

use super::fault::Fault;
use super::model::{
    BalloonHinting, BalloonStats, Family, Fork, Forward, MemoryHotplugStatus, RateLimiter, SnapshotCreate,
    SnapshotLoad,
};
use super::resources::VmResources;

/// A machine, before, while and after it is one.
///
/// The API keeps the order: [`start`](Self::start) or [`load`](Self::load) comes first, and again only if it failed; everything
/// else, but [`mmds`](Self::mmds) and [`stop`](Self::stop), comes after one succeeded. When a machine ends, the engine says so by
/// [`Notifier::ended`](super::mailbox::Notifier::ended).
pub(crate) trait Engine: Send {
    /// Makes the machine and runs it. If that fails, nothing is left of it.
    fn start(&mut self, vm: &VmResources, done: Done<()>);

    /// Stops the vCPUs and workers. Not called of a paused machine.
    fn pause(&mut self, done: Done<()>);

    /// Runs them again. Not called of a running machine.
    fn resume(&mut self, done: Done<()>);

    /// Writes a snapshot of a paused machine, which is `vm` as far as the API knows.
    fn snapshot(&mut self, vm: &VmResources, what: SnapshotCreate, done: Done<()>);

    /// Makes a machine of a snapshot, and runs it if `what.resume_vm`. Answers with the configuration that it has. If that
    /// fails, nothing is left of it. Exactly one of `what.mem_file_path` and `what.mem_backend` is there.
    fn load(&mut self, what: SnapshotLoad, done: Done<VmResources>);

    /// Another image, another limit of a disk; what is `None` stays.
    fn patch_drive(&mut self, id: &str, change: DriveChange, done: Done<()>);

    /// Other limits of a card, each way; what is `None` stays.
    fn patch_net(&mut self, id: &str, rx: Option<RateLimiter>, tx: Option<RateLimiter>, done: Done<()>);

    /// Another limit of a persistent memory.
    fn patch_pmem(&mut self, id: &str, limiter: RateLimiter, done: Done<()>);

    /// Another target of the balloon, in MiB.
    fn balloon_target(&mut self, mib: u32, done: Done<()>);

    /// Another interval of statistics, in seconds: they are on, and stay so.
    fn balloon_interval(&mut self, seconds: u16, done: Done<()>);

    /// What is known of the balloon.
    fn balloon_stats(&mut self, done: Done<BalloonStats>);

    /// Starts a run of hinting; `acknowledge`: the guest may use the pages again when it has told them all.
    fn hinting_start(&mut self, acknowledge: bool, done: Done<()>);

    /// How far hinting is.
    fn hinting_status(&mut self, done: Done<BalloonHinting>);

    /// Lets the guest use the pages again.
    fn hinting_stop(&mut self, done: Done<()>);

    /// Asks the guest to use so much of the memory to plug, in MiB.
    fn memory_size(&mut self, mib: u32, done: Done<()>);

    /// How far plugging is.
    fn memory_status(&mut self, done: Done<MemoryHotplugStatus>);

    /// Presses the keys by which the guest shuts down.
    fn ctrl_alt_del(&mut self, done: Done<()>);

    /// What the guest reads from the metadata service from now on. Also before the machine is made.
    fn mmds(&mut self, contents: &Value);

    /// What there is to count, by names of groups, for a line of metrics.
    fn metrics(&mut self, done: Done<Map<String, Value>>);

    /// Children that share memory with the machine as it is now. `what.name` is there. All are made, or none.
    fn fork(&mut self, what: Fork, done: Done<Family>);

    /// Ports of the host that lead to the guest.
    fn forwards(&mut self, done: Done<Vec<Forward>>);

    /// One more.
    fn forward_add(&mut self, forward: Forward, done: Done<()>);

    /// One less.
    fn forward_remove(&mut self, forward: Forward, done: Done<()>);

    /// What the devices count.
    fn stats(&mut self, done: Done<Value>);

    /// Ends the machine, if there is one. `Notifier::ended` follows, if there was.
    fn stop(&mut self);
}

/// What changes of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DriveChange {
    /// The image from now on; the same path means to look at its size again.
    pub(crate) path: Option<std::path::PathBuf>,
    /// The whole limiter from now on.
    pub(crate) limiter: Option<RateLimiter>,
}

/// Takes the answer to one request. Dropped without one, it answers that the machine is gone.
pub(crate) struct Done<T>(Option<Then<T>>);

type Then<T> = Box<dyn FnOnce(Result<T, Fault>) + Send>;

impl<T> Done<T> {
    /// Gives the answer to `then`.
    pub(crate) fn new(then: impl FnOnce(Result<T, Fault>) + Send + 'static) -> Self {
        Self(Some(Box::new(then)))
    }

    /// Answers.
    pub(crate) fn answer(mut self, outcome: Result<T, Fault>) {
        if let Some(then) = self.0.take() {
            then(outcome);
        }
    }

    /// Answers that it was done.
    pub(crate) fn ok(self, value: T) {
        self.answer(Ok(value));
    }

    /// Answers why it was not.
    pub(crate) fn fail(self, message: impl Into<String>) {
        self.answer(Err(Fault::bad_request(message)));
    }
}

impl<T> Drop for Done<T> {
    fn drop(&mut self) {
        if let Some(then) = self.0.take() {
            then(Err(Fault::internal("The machine is gone.")));
        }
    }
}

impl<T> fmt::Debug for Done<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Done").field(&self.0.is_some()).finish()
    }
}
