//! The engine behind the API: the real machine, on a thread of its own.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use freestone_kvm::Kvm;
use freestone_vmm::ExitReason;
use freestone_vmm::devices::I8042Handle;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::net::mmds::MmdsStore;
use freestone_vmm::store::{Kind, StorePaths, Watch};
use freestone_vmm::virtio::balloon::BalloonHandle;
use serde_json::{Map, Value, json};

use super::fork;
use super::translate::{from_run, interval, to_args};
use crate::api::engine::{Done, DriveChange, Engine};
use crate::api::fault::Fault;
use crate::api::mailbox::Notifier;
use crate::api::model::{
    BackendType, BalloonHinting, BalloonStats, Family, Fork, Forward, MemoryHotplugStatus, NetworkOverride,
    RateLimiter, SnapshotCreate, SnapshotLoad, SnapshotType,
};
use crate::api::resources::{OWN_NETWORK, VmResources};
use crate::attach::open;
use crate::cli::Run;
use crate::console::Console;
use crate::control::{Controls, Request};
use crate::disk::DiskSpec;
use crate::failure::Failure;
use crate::machine::{
    Commander, Config, MemorySource, Named, Origin, PageSource, Remap, RestoreRequest, SnapshotRequest, Vm,
    restore,
};
use crate::net::NetSpec;

/// The option that keeps what the API knows.
const API_CONFIG: &str = "api-config";

/// The machine, once there is one.
struct Live {
    commander: Commander,
    controls: Arc<Controls>,
    keys: I8042Handle,
    /// The disks in order, by the API's names.
    disks: Vec<(String, DiskSpec)>,
    /// The API's names of persistent memories.
    pmems: Vec<String>,
    slot_mib: u32,
}

/// Makes one machine, on a thread of its own.
pub(super) struct Real {
    notifier: Notifier,
    pci: bool,
    live: Arc<Mutex<Option<Live>>>,
    /// What the guest reads from the metadata service.
    metadata: MmdsStore,
}

impl Real {
    pub(super) fn new(notifier: Notifier, pci: bool, mmds_limit: usize) -> Self {
        Self { notifier, pci, live: Arc::default(), metadata: MmdsStore::new(mmds_limit) }
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
        done: Done<T>,
        make: impl FnOnce(&Kvm, &Console) -> Result<(Vm, Run, VmResources, T), Failure> + Send + 'static,
        go: bool,
    ) {
        let (live, notifier) = (Arc::clone(&self.live), self.notifier.clone());
        let machine = move || {
            let console = Console::new();
            let made = Kvm::open().map_err(Failure::from).and_then(|kvm| {
                let (mut vm, run, resources, answer) = make(&kvm, &console)?;
                let terminal = console.attach(vm.machine.handle())?;
                if go {
                    vm.go()?;
                }
                Ok((vm, run, resources, answer, terminal))
            });
            let (mut vm, run, resources, answer, terminal) = match made {
                Ok(made) => made,
                Err(failure) => return done.answer(Err(failure.into())),
            };
            let drives = resources.drives.iter().map(|drive| drive.drive_id.clone());
            let new = Live {
                commander: vm.commander(),
                controls: Arc::clone(&vm.controls),
                keys: vm.keys.clone(),
                disks: drives.zip(run.disks).collect(),
                pmems: resources.pmem.iter().map(|pmem| pmem.id.clone()).collect(),
                slot_mib: resources.memory_hotplug.map_or(0, |memory| memory.slot_size_mib),
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
        let args = match to_args(vm, self.pci) {
            Ok(args) => args,
            Err(fault) => return done.answer(Err(fault)),
        };
        let vm = vm.clone();
        let metadata = self.metadata.clone();
        let make = move |kvm: &Kvm, console: &Console| {
            let config = Config::new(args, std::env::current_dir()?);
            let mut run = config.parse()?;
            run.metadata = Some(metadata);
            let made = Vm::create(kvm, config, &run, console, Origin::Boot)?;
            Ok((made, run, vm, ()))
        };
        self.conduct(done, make, true);
    }

    fn pause(&mut self, done: Done<()>) {
        self.send(done, Vm::pause);
    }

    fn resume(&mut self, done: Done<()>) {
        self.send(done, Vm::go);
    }

    fn snapshot(&mut self, vm: &VmResources, what: SnapshotCreate, done: Done<()>) {
        // What the API knows is kept with the machine: whoever loads it knows it again.
        let known = VmResources { logger: None, metrics: None, ..vm.clone() };
        let known = match serde_json::to_string(&known) {
            Ok(known) => known,
            Err(error) => return done.answer(Err(Fault::internal(format!("no JSON: {error}")))),
        };
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
        self.send(done, move |vm| {
            vm.config_mut().set(API_CONFIG, &known);
            vm.snapshot(&SnapshotRequest { paths, kind }, &mut progress).map(drop)
        });
    }

    fn load(&mut self, what: SnapshotLoad, done: Done<VmResources>) {
        let mut request = match request(&what) {
            Ok(request) => request,
            Err(fault) => return done.answer(Err(fault)),
        };
        request.remap.metadata = Some(self.metadata.clone());
        let go = what.resume_vm;
        let make = move |kvm: &Kvm, console: &Console| {
            let (mut vm, run) = restore(kvm, &request, console, &mut |_, _| {})?;
            let resources = known(&run, &what)?;
            if run.api_config.is_some() {
                limit(&resources, &vm.controls);
            }
            moved(&mut vm, &what);
            Ok((vm, run, resources.clone(), resources))
        };
        self.conduct(done, make, go);
    }

    fn patch_drive(&mut self, id: &str, change: DriveChange, done: Done<()>) {
        let live = Arc::clone(&self.live);
        let found = self.with(|live| {
            let found = live.disks.iter().enumerate().find(|(_, (name, _))| name == id);
            let (number, (_, spec)) = found.ok_or_else(|| no_drive(id))?;
            // The built-in guest has a disk of its own in front.
            let own = live.controls.disks.len().saturating_sub(live.disks.len());
            let (_, disk) = live.controls.disks.get(number + own).ok_or_else(|| no_drive(id))?;
            Ok((number, spec.clone(), disk.clone(), live.commander.clone()))
        });
        let (number, mut spec, disk, commander) = match found {
            Ok(found) => found,
            Err(fault) => return done.answer(Err(fault)),
        };
        if let Some(limiter) = change.limiter {
            disk.set_rate_limiter(limiter.limiter());
        }
        let Some(path) = change.path else { return done.ok(()) };
        let id = id.to_owned();
        // Not on the API's thread: a file may be slow to open.
        let exchange = move || {
            let absolute = std::path::absolute(&path).unwrap_or(path);
            spec.path.clone_from(&absolute);
            let replaced =
                open(&spec).and_then(|(image, _)| disk.replace(image).map(drop).map_err(Failure::from));
            if let Err(failure) = replaced {
                return done.fail(format!("drive {id}: {failure}"));
            }
            if let Some(live) = live.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
                && let Some((_, kept)) = live.disks.get_mut(number)
            {
                *kept = spec;
            }
            let known = move |vm: &mut Vm| {
                let path = absolute.to_string_lossy();
                vm.config_mut().amend("disk", number, |text| with_path(text, &path));
                done.ok(());
            };
            commander.send(known);
        };
        // What could not be started was dropped, which answers.
        drop(thread::Builder::new().name("api-drive".to_owned()).spawn(exchange));
    }

    fn patch_net(&mut self, id: &str, rx: Option<RateLimiter>, tx: Option<RateLimiter>, done: Done<()>) {
        done.answer(self.with(|live| {
            let limiter = |limiter: Option<RateLimiter>| limiter.map(|limiter| limiter.limiter());
            live.controls.nics.limit(id, limiter(rx), limiter(tx)).map_err(Fault::bad_request)
        }));
    }

    fn patch_pmem(&mut self, id: &str, limiter: RateLimiter, done: Done<()>) {
        done.answer(self.with(|live| {
            let place = live.pmems.iter().position(|name| name == id);
            let pmem = place.and_then(|place| live.controls.pmems.get(place)).map(|(_, pmem)| pmem);
            let none = || Fault::bad_request(format!("There is no pmem device {id:?}."));
            pmem.ok_or_else(none)?.set_rate_limiter(limiter.limiter());
            Ok(())
        }));
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

    fn hinting_start(&mut self, acknowledge: bool, done: Done<()>) {
        done.answer(self.balloon(|balloon| {
            let started = match acknowledge {
                true => balloon.start_hinting(),
                false => balloon.start_hinting_and_hold(),
            };
            started.map_err(|e| Fault::from(Failure::from(e)))
        }));
    }

    fn hinting_status(&mut self, done: Done<BalloonHinting>) {
        done.answer(self.balloon(|balloon| {
            let status = balloon.hinting_status();
            Ok(BalloonHinting { host_cmd: status.host_command, guest_cmd: status.guest_command })
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

    fn mmds(&mut self, contents: &Value) {
        // The API has looked at it: it is an object, and not too large.
        if let Err(error) = self.metadata.put(contents.clone()) {
            tracing::warn!(%error, "the guest does not see the new metadata");
        }
    }

    fn metrics(&mut self, done: Done<Map<String, Value>>) {
        self.ask(done, |controls| Ok(Map::from_iter([("devices".to_owned(), device_stats(controls))])));
    }

    fn fork(&mut self, what: Fork, done: Done<Family>) {
        let commander = self.with(|live| Ok(live.commander.clone()));
        let (commander, request) = match commander.and_then(|it| Ok((it, fork::request(&what)?))) {
            Ok(found) => found,
            Err(fault) => return done.answer(Err(fault)),
        };
        let work = move || fork::conduct(&commander, &request, done);
        // What could not be started was dropped, which answers.
        drop(thread::Builder::new().name("api-fork".to_owned()).spawn(work));
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

fn no_drive(id: &str) -> Fault {
    Fault::bad_request(format!("There is no drive {id:?}."))
}

/// The text of a disk, with another image.
fn with_path(text: &str, path: &str) -> String {
    let is_path = |number: usize, key: Option<&str>| key == Some("path") || (number == 0 && key.is_none());
    crate::options::map(text, |number, key, _| is_path(number, key).then(|| path.to_owned()))
}

/// What a restored machine is, with what `what` has in place of what it had.
fn known(run: &Run, what: &SnapshotLoad) -> Result<VmResources, Failure> {
    let mut vm = match &run.api_config {
        Some(text) => serde_json::from_str(text)
            .map_err(|e| Failure::new(format!("the snapshot's configuration by the API: {e}")))?,
        None => from_run(run),
    };
    vm.boot_source = None;
    vm.machine_config.track_dirty_pages = run.track_dirty;
    for other in &what.network_overrides {
        if let Ok(net) = vm.net(&other.iface_id) {
            net.host_dev_name.clone_from(&other.host_dev_name);
        }
    }
    if let (Some(vsock), Some(other)) = (&mut vm.vsock, &what.vsock_override) {
        vsock.uds_path.clone_from(&other.uds_path);
    }
    Ok(vm)
}

/// Has the next snapshot know where the machine is now.
fn moved(vm: &mut Vm, what: &SnapshotLoad) {
    if let Some(other) = &what.vsock_override
        && let Ok(path) = std::path::absolute(&other.uds_path)
    {
        vm.config_mut().amend("vsock", 0, |text| with_path(text, &path.to_string_lossy()));
    }
}

/// Limits as they were when the machine was saved: they may be others than when it was started.
fn limit(vm: &VmResources, controls: &Controls) {
    let limiter = |limiter: Option<RateLimiter>| limiter.and_then(|limiter| limiter.limiter());
    for net in &vm.network_interfaces {
        let (rx, tx) = (limiter(net.rx_rate_limiter), limiter(net.tx_rate_limiter));
        if let Err(error) = controls.nics.limit(&net.iface_id, Some(rx), Some(tx)) {
            tracing::warn!(error, "a network card has no limits");
        }
    }
    for (pmem, (_, handle)) in vm.pmem.iter().zip(&controls.pmems) {
        handle.set_rate_limiter(limiter(pmem.rate_limiter));
    }
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
    let net = |card: &NetworkOverride| {
        let named: Named<NetSpec> =
            plug(card).parse().map_err(|e| Fault::bad_request(format!("network_overrides: {e}")))?;
        Ok::<_, Fault>(named)
    };
    request.remap = Remap {
        net_kinds: what.network_overrides.iter().map(net).collect::<Result<_, _>>()?,
        vsock_path: what.vsock_override.as_ref().map(|vsock| vsock.uds_path.clone()),
        ..Remap::default()
    };
    Ok(request)
}

/// A card and what it is plugged into, as `--net` of `freestone restore` takes them.
pub(super) fn plug(card: &NetworkOverride) -> String {
    let spec = match card.host_dev_name.strip_prefix(OWN_NETWORK) {
        Some(own) => own.to_owned(),
        None => format!("tap={}", card.host_dev_name.replace(',', ",,")),
    };
    format!("{id}={spec},id={id}", id = card.iface_id)
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
