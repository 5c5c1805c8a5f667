//! An engine without a machine: it remembers what it was asked, and answers at once, later, or never.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};

use crate::api::engine::{Done, DriveChange, Engine};
use crate::api::mailbox::Notifier;
use crate::api::model::{
    BalloonHinting, BalloonStats, Family, Fork, Forked, Forward, MemoryHotplugStatus, RateLimiter,
    SnapshotCreate, SnapshotLoad,
};
use crate::api::resources::VmResources;

/// What a test knows of the engine.
#[derive(Default)]
pub(super) struct Seen {
    /// Calls in order.
    pub(super) calls: Vec<String>,
    /// Whether calls fail.
    pub(super) fails: bool,
    /// Whether answers are held back.
    pub(super) holds: bool,
    pub(super) held: VecDeque<Box<dyn FnOnce() + Send>>,
    pub(super) forwards: Vec<Forward>,
}

#[derive(Clone)]
pub(super) struct Fake {
    pub(super) seen: Arc<Mutex<Seen>>,
    pub(super) notifier: Notifier,
}

impl Fake {
    fn answer<T: Send + 'static>(&self, call: String, value: T, done: Done<T>) {
        let mut seen = self.seen.lock().unwrap();
        seen.calls.push(call);
        let fails = seen.fails;
        let answer = move || if fails { done.fail("The fake was told to fail.") } else { done.ok(value) };
        if seen.holds {
            seen.held.push_back(Box::new(answer));
        } else {
            // As an engine does: from another thread, some time.
            std::thread::spawn(answer);
        }
    }

    /// Gives the answer that was held back the longest.
    pub(super) fn release(&self) {
        let answer = self.seen.lock().unwrap().held.pop_front().unwrap();
        answer();
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.seen.lock().unwrap().calls.clone()
    }
}

impl Engine for Fake {
    fn start(&mut self, vm: &VmResources, done: Done<()>) {
        self.answer(format!("start with {} drives", vm.drives.len()), (), done);
    }

    fn pause(&mut self, done: Done<()>) {
        self.answer("pause".into(), (), done);
    }

    fn resume(&mut self, done: Done<()>) {
        self.answer("resume".into(), (), done);
    }

    fn snapshot(&mut self, _vm: &VmResources, what: SnapshotCreate, done: Done<()>) {
        self.answer(format!("snapshot {:?} {:?}", what.snapshot_path, what.snapshot_type), (), done);
    }

    fn load(&mut self, what: SnapshotLoad, done: Done<VmResources>) {
        let vm = VmResources { vsock: Some(Default::default()), ..VmResources::default() };
        self.answer(format!("load {:?}", what.snapshot_path), vm, done);
    }

    fn patch_drive(&mut self, id: &str, change: DriveChange, done: Done<()>) {
        self.answer(format!("drive {id} {} {}", change.path.is_some(), change.limiter.is_some()), (), done);
    }

    fn patch_net(&mut self, id: &str, rx: Option<RateLimiter>, tx: Option<RateLimiter>, done: Done<()>) {
        self.answer(format!("net {id} {} {}", rx.is_some(), tx.is_some()), (), done);
    }

    fn patch_pmem(&mut self, id: &str, _limiter: RateLimiter, done: Done<()>) {
        self.answer(format!("pmem {id}"), (), done);
    }

    fn balloon_target(&mut self, mib: u32, done: Done<()>) {
        self.answer(format!("balloon {mib}"), (), done);
    }

    fn balloon_interval(&mut self, seconds: u16, done: Done<()>) {
        self.answer(format!("balloon interval {seconds}"), (), done);
    }

    fn balloon_stats(&mut self, done: Done<BalloonStats>) {
        let stats = BalloonStats { target_mib: 7, free_memory: Some(9), ..BalloonStats::default() };
        self.answer("balloon stats".into(), stats, done);
    }

    fn hinting_start(&mut self, acknowledge: bool, done: Done<()>) {
        self.answer(format!("hinting start {acknowledge}"), (), done);
    }

    fn hinting_status(&mut self, done: Done<BalloonHinting>) {
        self.answer("hinting status".into(), BalloonHinting { host_cmd: 2, guest_cmd: None }, done);
    }

    fn hinting_stop(&mut self, done: Done<()>) {
        self.answer("hinting stop".into(), (), done);
    }

    fn memory_size(&mut self, mib: u32, done: Done<()>) {
        self.answer(format!("memory {mib}"), (), done);
    }

    fn memory_status(&mut self, done: Done<MemoryHotplugStatus>) {
        let status = MemoryHotplugStatus { total_size_mib: 1024, ..MemoryHotplugStatus::default() };
        self.answer("memory status".into(), status, done);
    }

    fn ctrl_alt_del(&mut self, done: Done<()>) {
        self.answer("ctrl-alt-del".into(), (), done);
    }

    fn mmds(&mut self, contents: &Value) {
        self.seen.lock().unwrap().calls.push(format!("mmds {contents}"));
    }

    fn metrics(&mut self, done: Done<Map<String, Value>>) {
        self.answer("metrics".into(), Map::from_iter([("vcpu".to_owned(), json!({"exits": 3}))]), done);
    }

    fn fork(&mut self, what: Fork, done: Done<Family>) {
        let child = |n| Forked {
            id: format!("c{n}"),
            pid: n,
            control: what.socket_dir.clone().unwrap_or_default().join(format!("c{n}.sock")),
        };
        let family = Family { children: (0..what.count).map(child).collect(), paused: true };
        self.answer(format!("fork {} {}", what.name.clone().unwrap_or_default(), what.count), family, done);
    }

    fn forwards(&mut self, done: Done<Vec<Forward>>) {
        let forwards = self.seen.lock().unwrap().forwards.clone();
        self.answer("forwards".into(), forwards, done);
    }

    fn forward_add(&mut self, forward: Forward, done: Done<()>) {
        self.seen.lock().unwrap().forwards.push(forward);
        self.answer("forward add".into(), (), done);
    }

    fn forward_remove(&mut self, forward: Forward, done: Done<()>) {
        self.seen.lock().unwrap().forwards.retain(|f| *f != forward);
        self.answer("forward remove".into(), (), done);
    }

    fn stats(&mut self, done: Done<Value>) {
        self.answer("stats".into(), json!({"vda": {}}), done);
    }

    fn stop(&mut self) {
        self.seen.lock().unwrap().calls.push("stop".into());
    }
}
