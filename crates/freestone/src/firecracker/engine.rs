//! The engine behind the API: the real machine, on a thread of its own.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use freestone_kvm::Kvm;
use freestone_vmm::ExitReason;
use freestone_vmm::devices::I8042Handle;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::store::{Kind, StorePaths, Watch};
use freestone_vmm::virtio::balloon::{BalloonHandle, HintRun};
use serde_json::{Map, Value, json};

use super::translate::{from_run, interval, per_second, to_args};
use crate::api::engine::{Done, DriveChange, Engine};
use crate::api::fault::Fault;
use crate::api::mailbox::Notifier;
use crate::api::model::{
    BackendType, BalloonHinting, BalloonStats, Fork, Forked, Forward, MemoryHotplugStatus, RateLimiter,
    SnapshotCreate, SnapshotLoad, SnapshotType,
};
use crate::api::resources::{OWN_NETWORK, VmResources};
use crate::cli::Run;
use crate::console::Console;
use crate::control::{Controls, Request};
use crate::failure::Failure;
use crate::machine::{
    Commander, Config, MemorySource, Named, Origin, PageSource, Remap, RestoreRequest, SnapshotRequest, Vm,
    restore,
};
use crate::net::NetSpec;
use crate::specs::VsockSpec;

/// The machine, once there is one.
struct Live {
    commander: Commander,
    controls: Arc<Controls>,
    keys: I8042Handle,
    /// Names of the disks by the API's, in order.
    disks: Vec<String>,
    /// The guest's vCPUs and what they did, for the metrics.
    slot_mib: u32,
}

/// Makes one machine, on a thread of its own.
pub(super) struct Real {
    notifier: Notifier,
    pci: bool,
    live: Arc<Mutex<Option<Live>>>,
}

impl Real {
    pub(super) fn new(notifier: Notifier, pci: bool) -> Self {
        Self { notifier, pci, live: Arc::default() }
    }

    /// Does `job` with the machine, quickly; or says that there is none.
    fn with<T>(&self, job: impl FnOnce(&Live) -> Result<T, Fault>) -> Result<T, Fault> {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        job(live.as_ref().ok_or_else(|| Fault::internal("The machine is gone."))?)
    }

    /// Has the machine's own thread do `job`.
    fn send<T: Send + 'static>(
        &self,
        done: Done<T>,
        job: impl FnOnce(&mut Vm) -> Result<T, Failure> + Send + 'static,
    ) {
        match self.with(|live| Ok(live.commander.clone())) {
            Ok(commander) => commander.send(move |vm| done.answer(job(vm).map_err(Fault::from))),
            Err(fault) => done.answer(Err(fault)),
        }
    }

    /// Asks the devices' controls on a thread that may wait: some answers come from the machine's own.
    fn ask<T: Send + 'static>(
        &self,
        done: Done<T>,
        question: impl FnOnce(&Controls) -> Result<T, String> + Send + 'static,
    ) {
        let controls = match self.with(|live| Ok(Arc::clone(&live.controls))) {
            Ok(controls) => controls,
            Err(fault) => return done.answer(Err(fault)),
        };
        let answer = move || done.answer(question(&controls).map_err(Fault::bad_request));
        // What could not be asked was dropped, which answers.
        drop(thread::Builder::new().name("api-ask".to_owned()).spawn(answer));
    }

    fn balloon<T>(&self, job: impl FnOnce(&BalloonHandle) -> Result<T, Fault>) -> Result<T, Fault> {
        self.with(|live| {
            let none = || Fault::bad_request("There is no balloon device.");
            job(live.controls.balloon.as_ref().ok_or_else(none)?)
        })
    }

    /// Makes a machine by `make` on a thread of its own, and conducts it there; `done` is told when it is made.
    fn conduct<T: Send + 'static>(
        &self,
        slot_mib: u32,
        done: Done<T>,
        make: impl FnOnce(&Kvm, &Console) -> Result<(Vm, Run, T), Failure> + Send + 'static,
        go: bool,
    ) {
        let (live, notifier) = (Arc::clone(&self.live), self.notifier.clone());
        let machine = move || {
            let console = Console::new();
            let made = Kvm::open().map_err(Failure::from).and_then(|kvm| {
                let (mut vm, run, answer) = make(&kvm, &console)?;
                let terminal = console.attach(vm.machine.handle())?;
                if go {
                    vm.go()?;
                }
                Ok((vm, run, answer, terminal))
            });
            let (mut vm, run, answer, terminal) = match made {
                Ok(made) => made,
                Err(failure) => return done.answer(Err(failure.into())),
            };
            let names = ('a'..='z').zip(&run.disks);
            let disks =
                names.map(|(letter, disk)| disk.serial.clone().unwrap_or_else(|| format!("vd{letter}")));
            let new = Live {
                commander: vm.commander(),
                controls: Arc::clone(&vm.controls),
                keys: vm.keys.clone(),
                disks: disks.collect(),
                slot_mib,
            };
            *live.lock().unwrap_or_else(PoisonError::into_inner) = Some(new);
            done.ok(answer);
            let reason = vm.conduct();
            *live.lock().unwrap_or_else(PoisonError::into_inner) = None;
            drop(vm);
            drop(terminal);
            let (status, reason) = match reason {
                Ok(reason) => (status(&reason), reason.to_string()),
                Err(failure) => (crate::failure::FAILURE, failure.to_string()),
            };
            notifier.ended(status, reason);
        };
        // What could not be started was dropped, which answers.
        drop(thread::Builder::new().name("machine".to_owned()).spawn(machine));
    }
}

/// The exit status of the process: a guest that ended is no failure, however it did.
fn status(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::PowerOff
        | ExitReason::Halted
        | ExitReason::Reset
        | ExitReason::Panicked
        | ExitReason::Stopped => 0,
        _ => crate::failure::FAILURE,
    }
}

impl Engine for Real {
    fn start(&mut self, vm: &VmResources, done: Done<()>) {
        let args = match check(vm).and_then(|()| to_args(vm, self.pci)) {
            Ok(args) => args,
            Err(fault) => return done.answer(Err(fault)),
        };
        let vm = vm.clone();
        let slot = vm.memory_hotplug.map_or(0, |memory| memory.slot_size_mib);
        let make = move |kvm: &Kvm, console: &Console| {
            let config = Config::new(args, std::env::current_dir()?);
            let run = config.parse()?;
            let made = Vm::create(kvm, config, &run, console, Origin::Boot)?;
            limit(&vm, &made.controls);
            Ok((made, run, ()))
        };
        self.conduct(slot, done, make, true);
    }

    fn pause(&mut self, done: Done<()>) {
        self.send(done, Vm::pause);
    }

    fn resume(&mut self, done: Done<()>) {
        self.send(done, Vm::go);
    }

    fn snapshot(&mut self, what: SnapshotCreate, done: Done<()>) {
        let kind = match what.snapshot_type {
            SnapshotType::Full => Kind::Full,
            SnapshotType::Diff => Kind::Diff,
        };
        let paths = StorePaths::files(what.snapshot_path, what.mem_file_path);
        let notifier = self.notifier.clone();
        let mut told = 0;
        let mut progress = move |bytes: u64, all: u64| {
            // A few dozen of them, not one for each page.
            let percent = bytes.saturating_mul(100) / all.max(1);
            if percent >= told + 5 {
                told = percent;
                notifier.event(json!({"event": "snapshot-progress", "bytes": bytes, "all": all}));
            }
        };
        self.send(done, move |vm| vm.snapshot(&SnapshotRequest { paths, kind }, &mut progress).map(drop));
    }

    fn load(&mut self, what: SnapshotLoad, done: Done<VmResources>) {
        let request = match request(&what) {
            Ok(request) => request,
            Err(fault) => return done.answer(Err(fault)),
        };
        let make = move |kvm: &Kvm, console: &Console| {
            let (vm, run) = restore(kvm, &request, console, &mut |_, _| {})?;
            let resources = from_run(&run);
            Ok((vm, run, resources))
        };
        self.conduct(128, done, make, what.resume_vm);
    }

    fn patch_drive(&mut self, id: &str, change: DriveChange, done: Done<()>) {
        let outcome = self.with(|live| {
            let place = live.disks.iter().position(|name| name == id);
            let found = place.and_then(|place| live.controls.disks.get(place));
            let (_, disk) = found.ok_or_else(|| Fault::bad_request(format!("There is no drive {id:?}.")))?;
            if let Some(limiter) = change.limiter {
                disk.set_rate_limiter(limiter.limiter());
            }
            if change.path.is_some() {
                // The image is looked at again: its size may be another.
                disk.resize().map_err(|error| Fault::bad_request(format!("drive {id}: {error}")))?;
            }
            Ok(())
        });
        done.answer(outcome);
    }

    fn patch_net(&mut self, id: &str, rx: Option<RateLimiter>, tx: Option<RateLimiter>, done: Done<()>) {
        let rate = |limiter: Option<RateLimiter>, pick: fn(RateLimiter) -> _| {
            limiter.and_then(pick).and_then(per_second)
        };
        let request = Request::NetLimit {
            nic: id.to_owned(),
            rx_bandwidth: rate(rx, |limiter| limiter.bandwidth),
            rx_iops: rate(rx, |limiter| limiter.ops),
            tx_bandwidth: rate(tx, |limiter| limiter.bandwidth),
            tx_iops: rate(tx, |limiter| limiter.ops),
        };
        self.ask(done, move |controls| controls.nics.carry_out(request).map(drop));
    }

    fn patch_pmem(&mut self, _id: &str, _limiter: RateLimiter, done: Done<()>) {
        done.fail("Persistent memory has no rate limit here.");
    }

    fn balloon_target(&mut self, mib: u32, done: Done<()>) {
        done.answer(self.balloon(|balloon| {
            balloon.set_target(u64::from(mib) << 20);
            Ok(())
        }));
    }

    fn balloon_interval(&mut self, seconds: u16, done: Done<()>) {
        done.answer(self.balloon(|balloon| {
            balloon.set_statistics_interval(interval(seconds)).map_err(|e| Fault::from(Failure::from(e)))
        }));
    }

    fn balloon_stats(&mut self, done: Done<BalloonStats>) {
        done.answer(self.balloon(|balloon| Ok(statistics(balloon))));
    }

    fn hinting_start(&mut self, _acknowledge: bool, done: Done<()>) {
        done.answer(
            self.balloon(|balloon| balloon.start_hinting().map_err(|e| Fault::from(Failure::from(e)))),
        );
    }

    fn hinting_status(&mut self, done: Done<BalloonHinting>) {
        done.answer(self.balloon(|balloon| {
            // 0 and 1 mean stop and done (virtio 1.2, 5.5.6.5); a run has a number above.
            let (host_cmd, guest_cmd) = match balloon.hint_run() {
                HintRun::Requested => (2, None),
                HintRun::Running => (2, Some(2)),
                _ => (1, None),
            };
            Ok(BalloonHinting { host_cmd, guest_cmd })
        }));
    }

    fn hinting_stop(&mut self, done: Done<()>) {
        done.answer(self.balloon(|balloon| {
            balloon.stop_hinting();
            Ok(())
        }));
    }

    fn memory_size(&mut self, mib: u32, done: Done<()>) {
        done.answer(self.with(|live| {
            let memory = live.controls.memory.as_ref();
            let memory = memory.ok_or_else(|| Fault::bad_request("There is no hotpluggable memory."))?;
            memory.request(u64::from(mib) << 20).map_err(|e| Fault::from(Failure::from(e)))
        }));
    }

    fn memory_status(&mut self, done: Done<MemoryHotplugStatus>) {
        done.answer(self.with(|live| {
            let memory = live.controls.memory.as_ref();
            let memory = memory.ok_or_else(|| Fault::bad_request("There is no hotpluggable memory."))?;
            let mib = |bytes: u64| u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
            Ok(MemoryHotplugStatus {
                total_size_mib: mib(memory.region_size()),
                slot_size_mib: live.slot_mib,
                block_size_mib: mib(memory.block_size()),
                plugged_size_mib: mib(memory.plugged()),
                requested_size_mib: mib(memory.requested()),
            })
        }));
    }

    fn ctrl_alt_del(&mut self, done: Done<()>) {
        done.answer(self.with(|live| live.keys.ctrl_alt_del().map_err(|e| Fault::from(Failure::from(e)))));
    }

    fn mmds(&mut self, _contents: &Value) {
        // Guests cannot read it yet: see `check`.
    }

    fn metrics(&mut self, done: Done<Map<String, Value>>) {
        self.ask(done, |controls| Ok(Map::from_iter([("devices".to_owned(), device_stats(controls))])));
    }

    fn fork(&mut self, _what: Fork, done: Done<Vec<Forked>>) {
        done.fail("Forks by the API are not supported yet.");
    }

    fn forwards(&mut self, done: Done<Vec<Forward>>) {
        self.ask(done, |controls| {
            let net = controls.nics.carry_out(Request::Net)?;
            let nics = net.get("nics").and_then(Value::as_array).cloned().unwrap_or_default();
            Ok(nics.iter().flat_map(forwards_of).collect())
        });
    }

    fn forward_add(&mut self, forward: Forward, done: Done<()>) {
        let request = Request::NetForwardAdd { nic: forward.iface_id, forward: forward.forward };
        self.ask(done, move |controls| controls.nics.carry_out(request).map(drop));
    }

    fn forward_remove(&mut self, forward: Forward, done: Done<()>) {
        let request = Request::NetForwardRemove { nic: forward.iface_id, forward: forward.forward };
        self.ask(done, move |controls| controls.nics.carry_out(request).map(drop));
    }

    fn stats(&mut self, done: Done<Value>) {
        self.ask(done, |controls| Ok(device_stats(controls)));
    }

    fn stop(&mut self) {
        // A machine that is not there need not be stopped.
        drop(self.with(|live| {
            live.commander.stop();
            Ok(())
        }));
    }
}

/// What the API takes and this machine cannot be yet.
fn check(vm: &VmResources) -> Result<(), Fault> {
    let serial = vm.serial.as_ref();
    let missing = [
        (vm.mmds_config.is_some(), "the metadata service (mmds-config)"),
        (serial.is_some_and(|serial| serial.serial_out_path.is_some()), "serial_out_path"),
        (serial.is_some_and(|serial| serial.rate_limiter.is_some()), "a rate limit of the serial port"),
        (vm.pmem.iter().any(|pmem| pmem.rate_limiter.is_some()), "a rate limit of persistent memory"),
    ];
    match missing.iter().find(|(asked, _)| *asked) {
        Some((_, what)) => {
            Err(Fault::bad_request(format!("Cannot start the microVM: {what} is not supported.")))
        }
        None => Ok(()),
    }
}

/// Limits in the form in which the command line has none: with a time and a burst.
fn limit(vm: &VmResources, controls: &Controls) {
    for (drive, (_, disk)) in vm.drives.iter().zip(&controls.disks) {
        disk.set_rate_limiter(drive.rate_limiter.and_then(|limiter| limiter.limiter()));
    }
    if let (Some(entropy), Some(rng)) = (vm.entropy, &controls.rng) {
        rng.limit(entropy.rate_limiter.and_then(|limiter| limiter.limiter()));
    }
    if let (Some(config), Some(balloon)) = (vm.balloon, &controls.balloon)
        && let Some(interval) = interval(config.stats_polling_interval_s)
        && let Err(error) = balloon.set_statistics_interval(Some(interval))
    {
        tracing::warn!(%error, "the balloon has no statistics");
    }
}

fn request(what: &SnapshotLoad) -> Result<RestoreRequest, Fault> {
    let (memory, source) = match (&what.mem_backend, &what.mem_file_path) {
        (Some(backend), _) if backend.backend_type == BackendType::Uffd => {
            // A handler need not keep its socket: what it has to keep is the descriptor.
            let source = PageSource { socket: backend.backend_path.clone(), watch: Watch::Process };
            (&backend.backend_path, MemorySource::Uffd(source))
        }
        (Some(backend), _) => (&backend.backend_path, MemorySource::File),
        (None, Some(path)) => (path, MemorySource::File),
        (None, None) => return Err(Fault::bad_request("missing field `mem_backend`")),
    };
    let mut request = RestoreRequest::new(StorePaths::files(&what.snapshot_path, memory));
    request.memory = source;
    request.clock = if what.clock_realtime { ClockPolicy::Advance } else { ClockPolicy::Continue };
    request.track = what.track_dirty_pages || what.enable_diff_snapshots;
    let net = |card: &crate::api::model::NetworkOverride| {
        let spec = match card.host_dev_name.strip_prefix(OWN_NETWORK) {
            Some(own) => own.to_owned(),
            None => format!("tap={}", card.host_dev_name.replace(',', ",,")),
        };
        let text = format!("{id}={spec},id={id}", id = card.iface_id);
        let named: Named<NetSpec> =
            text.parse().map_err(|e| Fault::bad_request(format!("network_overrides: {e}")))?;
        Ok::<_, Fault>(named)
    };
    request.remap = Remap {
        nets: what.network_overrides.iter().map(net).collect::<Result<_, _>>()?,
        vsock: what
            .vsock_override
            .as_ref()
            // The number is the machine's.
            .map(|vsock| VsockSpec { path: vsock.uds_path.clone(), cid: 3 }),
        ..Remap::default()
    };
    Ok(request)
}

fn statistics(balloon: &BalloonHandle) -> BalloonStats {
    let pages = |bytes: u64| u32::try_from(bytes >> 12).unwrap_or(u32::MAX);
    let mib = |bytes: u64| u32::try_from(bytes >> 20).unwrap_or(u32::MAX);
    let guest = balloon.statistics().unwrap_or_default();
    balloon.request_statistics();
    BalloonStats {
        target_pages: pages(balloon.target()),
        actual_pages: pages(balloon.actual()),
        target_mib: mib(balloon.target()),
        actual_mib: mib(balloon.actual()),
        swap_in: guest.swap_in,
        swap_out: guest.swap_out,
        major_faults: guest.major_faults,
        minor_faults: guest.minor_faults,
        free_memory: guest.free,
        total_memory: guest.total,
        available_memory: guest.available,
        disk_caches: guest.caches,
        hugetlb_allocations: guest.huge_pages_allocated,
        hugetlb_failures: guest.huge_pages_failed,
        ..BalloonStats::default()
    }
}

fn device_stats(controls: &Controls) -> Value {
    controls.stats()
}

fn forwards_of(nic: &Value) -> Vec<Forward> {
    let id = nic.get("id").and_then(Value::as_str);
    let forwards = nic.pointer("/user/forwards").and_then(Value::as_array).cloned().unwrap_or_default();
    let text = |forward: &Value| {
        let part = |name| forward.get(name).and_then(Value::as_str);
        Some(format!("{}:{}-{}", part("protocol")?, part("host")?, part("guest")?))
    };
    let known = forwards.iter().filter_map(text);
    known.map(|forward| Forward { iface_id: id.map(str::to_owned), forward }).collect()
}
