//! Each operation in each state.

use serde_json::{Value, json};

use super::controller::{Controller, Outcome, Reply, to_json};
use super::engine::DriveChange;
use super::fault::Fault;
use super::mailbox::Ticket;
use super::model::{
    self, DriveUpdate, Forwards, InstanceInfo, NetworkUpdate, PmemUpdate, SnapshotCreate, SnapshotLoad,
    Version, VmState,
};
use super::operation::Operation;
use super::resources::{VmResources, check_file};
use super::{API_VERSION, APP_NAME};

/// The most children of one request.
const MAX_CHILDREN: u32 = 1000;

/// When an operation has a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    Before,
    After,
}

impl Operation {
    /// Whether the answer is known without waiting for the engine.
    pub(super) fn is_known_anyway(&self) -> bool {
        matches!(
            self,
            Self::DescribeInstance
                | Self::GetVersion
                | Self::GetVmConfig
                | Self::GetMachineConfig
                | Self::GetBalloon
                | Self::GetMmds
        )
    }

    fn when(&self) -> When {
        match self {
            Self::DescribeInstance
            | Self::GetVersion
            | Self::GetVmConfig
            | Self::GetMachineConfig
            | Self::GetBalloon
            | Self::PatchBalloon(_)
            | Self::PatchBalloonStats(_)
            | Self::GetMmds
            | Self::PutMmds(_)
            | Self::PatchMmds(_)
            | Self::PutLogger(_)
            | Self::PutMetrics(_)
            | Self::Events => When::Always,
            Self::PutMachineConfig(_)
            | Self::PatchMachineConfig(_)
            | Self::PutBootSource(_)
            | Self::PutCpuConfig(_)
            | Self::PutDrive(_)
            | Self::PutPmem(_)
            | Self::PutNetwork(_)
            | Self::PutVsock(_)
            | Self::PutEntropy(_)
            | Self::PutSerial(_)
            | Self::PutBalloon(_)
            | Self::PutMemoryHotplug(_)
            | Self::PutMmdsConfig(_)
            | Self::InstanceStart
            | Self::LoadSnapshot(_) => When::Before,
            Self::PatchDrive(_)
            | Self::PatchPmem(_)
            | Self::PatchNetwork(_)
            | Self::GetBalloonStats
            | Self::StartHinting(_)
            | Self::GetHinting
            | Self::StopHinting
            | Self::GetMemoryHotplug
            | Self::PatchMemoryHotplug(_)
            | Self::FlushMetrics
            | Self::SendCtrlAltDel
            | Self::Pause
            | Self::Resume
            | Self::CreateSnapshot(_)
            | Self::Fork(_)
            | Self::GetForwards
            | Self::AddForward(_)
            | Self::RemoveForward(_)
            | Self::GetStats => When::After,
        }
    }
}

impl Controller {
    /// Does it, or has the engine do it, or says why not.
    pub(super) fn carry_out(&mut self, ticket: Ticket, operation: Operation) -> Outcome {
        let started = self.state != VmState::NotStarted;
        match operation.when() {
            When::Before if started => Outcome::Now(Err(Fault::started())),
            When::After if !started => Outcome::Now(Err(Fault::not_started())),
            When::Before => self.before(ticket, operation),
            When::After => self.after(ticket, operation).unwrap_or_else(|fault| Outcome::Now(Err(fault))),
            When::Always => self.always(ticket, operation).unwrap_or_else(|fault| Outcome::Now(Err(fault))),
        }
    }

    fn always(&mut self, ticket: Ticket, operation: Operation) -> Result<Outcome, Fault> {
        let reply = match operation {
            Operation::DescribeInstance => to_json(&InstanceInfo {
                app_name: APP_NAME,
                id: self.instance.id.clone(),
                state: self.state,
                vmm_version: env!("CARGO_PKG_VERSION"),
            }),
            Operation::GetVersion => to_json(&Version { firecracker_version: API_VERSION }),
            Operation::GetVmConfig => to_json(&self.vm),
            Operation::GetMachineConfig => to_json(&self.vm.machine_config),
            Operation::GetBalloon => to_json(self.vm.balloon()?),
            Operation::GetMmds => Ok(Reply::Json(self.mmds.get())),
            Operation::PutMmds(contents) => self.put_mmds(contents).map(|()| Reply::Nothing),
            Operation::PatchMmds(patch) => {
                let contents = self.mmds.patch(&patch)?;
                self.engine.mmds(contents);
                Ok(Reply::Nothing)
            }
            Operation::PutLogger(logger) => self.set_logger(logger).map(|()| Reply::Nothing),
            Operation::PutMetrics(metrics) => self.set_metrics(metrics).map(|()| Reply::Nothing),
            Operation::PatchBalloon(update) => return self.patch_balloon(ticket, update.amount_mib),
            Operation::PatchBalloonStats(update) => {
                return self.patch_balloon_stats(ticket, update.stats_polling_interval_s);
            }
            _ => Err(Fault::internal("This operation has no meaning here.")),
        };
        Ok(Outcome::Now(reply))
    }

    fn before(&mut self, ticket: Ticket, operation: Operation) -> Outcome {
        let vm = &mut self.vm;
        let outcome = match operation {
            Operation::InstanceStart => return self.start(ticket),
            Operation::LoadSnapshot(load) => return self.load(ticket, load),
            Operation::PutMachineConfig(config) => vm.set_machine(config),
            Operation::PatchMachineConfig(update) => vm.update_machine(&update),
            Operation::PutBootSource(source) => vm.set_boot_source(source),
            Operation::PutCpuConfig(config) => vm.set_cpu_config(config),
            Operation::PutDrive(drive) => vm.set_drive(drive),
            Operation::PutPmem(pmem) => vm.set_pmem(pmem),
            Operation::PutNetwork(net) => vm.set_net(net),
            Operation::PutVsock(vsock) => vm.set_vsock(vsock),
            Operation::PutBalloon(balloon) => vm.set_balloon(balloon),
            Operation::PutMemoryHotplug(memory) => vm.set_memory_hotplug(memory),
            Operation::PutMmdsConfig(mmds) => vm.set_mmds(mmds),
            Operation::PutEntropy(entropy) => {
                vm.entropy = Some(entropy);
                Ok(())
            }
            Operation::PutSerial(serial) => {
                vm.serial = Some(serial);
                Ok(())
            }
            _ => Err(Fault::internal("This operation has no meaning here.")),
        };
        self.configured |= outcome.is_ok();
        outcome.into()
    }

    fn start(&mut self, ticket: Ticket) -> Outcome {
        if let Err(fault) = self.vm.check_start() {
            return Outcome::Now(Err(fault));
        }
        let done = self.done_then(ticket, |controller| controller.enter(VmState::Running));
        self.engine.start(&self.vm, done);
        Outcome::Later
    }

    fn load(&mut self, ticket: Ticket, load: SnapshotLoad) -> Outcome {
        let refuse = |message: &str| Outcome::Now(Err(Fault::bad_request(message)));
        if self.configured {
            return refuse(
                "Loading a microVM snapshot not allowed after configuring boot-specific resources.",
            );
        }
        match (&load.mem_file_path, &load.mem_backend) {
            (Some(_), Some(_)) => {
                return refuse("mem_backend: mem_file_path is given too, and one is enough.");
            }
            (None, None) => {
                return refuse("missing field: either `mem_backend` or `mem_file_path` is required");
            }
            _ => {}
        }
        if let Err(fault) = check_file("snapshot_path", &load.snapshot_path, true, false) {
            return Outcome::Now(Err(fault));
        }
        let resumed = load.resume_vm;
        let done = self.done(ticket, move |controller, vm: VmResources| {
            // Log and metrics are this process's, not the machine's.
            let (logger, metrics) = (controller.vm.logger.take(), controller.vm.metrics.take());
            controller.vm = VmResources { logger, metrics, ..vm };
            controller.enter(if resumed { VmState::Running } else { VmState::Paused });
            Ok(Reply::Nothing)
        });
        self.engine.load(load, done);
        Outcome::Later
    }

    fn after(&mut self, ticket: Ticket, operation: Operation) -> Result<Outcome, Fault> {
        match operation {
            Operation::PatchDrive(update) => return self.patch_drive(ticket, update),
            Operation::PatchPmem(update) => return self.patch_pmem(ticket, update),
            Operation::PatchNetwork(update) => return self.patch_net(ticket, update),
            Operation::CreateSnapshot(what) => return self.snapshot(ticket, what),
            Operation::GetBalloonStats => {
                if self.vm.balloon()?.stats_polling_interval_s == 0 {
                    return Err(Fault::bad_request("The balloon's statistics are not enabled."));
                }
                self.engine.balloon_stats(self.done_json(ticket));
            }
            Operation::StartHinting(start) => {
                self.check_hinting()?;
                let done = self.done_then(ticket, |_| {});
                self.engine.hinting_start(start.acknowledge_on_stop, done);
            }
            Operation::GetHinting => {
                self.check_hinting()?;
                self.engine.hinting_status(self.done_json(ticket));
            }
            Operation::StopHinting => {
                self.check_hinting()?;
                self.engine.hinting_stop(self.done_then(ticket, |_| {}));
            }
            Operation::GetMemoryHotplug => {
                self.vm.check_hotplug(0)?;
                self.engine.memory_status(self.done_json(ticket));
            }
            Operation::PatchMemoryHotplug(update) => {
                self.vm.check_hotplug(update.requested_size_mib)?;
                self.engine.memory_size(update.requested_size_mib, self.done_then(ticket, |_| {}));
            }
            Operation::FlushMetrics => {
                let done = self.done(ticket, |controller, groups| {
                    let counts = controller.counts();
                    controller.metrics.write(groups, counts).map(|()| Reply::Nothing)
                });
                self.engine.metrics(done);
            }
            Operation::SendCtrlAltDel => self.engine.ctrl_alt_del(self.done_then(ticket, |_| {})),
            Operation::Pause | Operation::Resume => return Ok(self.pause_or_resume(ticket, &operation)),
            Operation::Fork(mut fork) => {
                if !(1..=MAX_CHILDREN).contains(&fork.count) {
                    let message = format!("count: {} is not a number from 1 to {MAX_CHILDREN}.", fork.count);
                    return Err(Fault::bad_request(message));
                }
                fork.name.get_or_insert_with(|| self.instance.id.clone());
                let done = self.done(ticket, |controller, family: model::Family| {
                    if family.paused {
                        controller.enter(VmState::Paused);
                    }
                    to_json(&family)
                });
                self.engine.fork(fork, done);
            }
            Operation::GetForwards => {
                let done = self.done(ticket, |_, forwards| to_json(&Forwards { forwards }));
                self.engine.forwards(done);
            }
            Operation::AddForward(forward) => {
                self.engine.forward_add(forward, self.done_then(ticket, |_| {}));
            }
            Operation::RemoveForward(forward) => {
                self.engine.forward_remove(forward, self.done_then(ticket, |_| {}));
            }
            Operation::GetStats => {
                let done = self.done(ticket, |controller, devices: Value| {
                    Ok(Reply::Json(json!({ "devices": devices, "api": controller.counts() })))
                });
                self.engine.stats(done);
            }
            _ => return Err(Fault::internal("This operation has no meaning here.")),
        }
        Ok(Outcome::Later)
    }

    fn pause_or_resume(&mut self, ticket: Ticket, operation: &Operation) -> Outcome {
        let pause = *operation == Operation::Pause;
        let wanted = if pause { VmState::Paused } else { VmState::Running };
        if self.state == wanted {
            return Outcome::Now(Ok(Reply::Nothing));
        }
        let done = self.done_then(ticket, move |controller| controller.enter(wanted));
        if pause {
            self.engine.pause(done);
        } else {
            self.engine.resume(done);
        }
        Outcome::Later
    }

    fn snapshot(&mut self, ticket: Ticket, what: SnapshotCreate) -> Result<Outcome, Fault> {
        if self.state != VmState::Paused {
            return Err(Fault::bad_request("Cannot create a snapshot of a running microVM: pause it first."));
        }
        if what.mem_file_path == what.snapshot_path {
            return Err(Fault::bad_request("mem_file_path: it is the same file as snapshot_path."));
        }
        let event = json!({"event": "snapshot", "path": what.snapshot_path.display().to_string(), "type": what.snapshot_type});
        let done = self.done_then(ticket, |controller| controller.tell(event));
        self.engine.snapshot(&self.vm, what, done);
        Ok(Outcome::Later)
    }

    fn patch_drive(&mut self, ticket: Ticket, update: DriveUpdate) -> Result<Outcome, Fault> {
        let drive = self.vm.drive(&update.drive_id)?;
        if let Some(path) = &update.path_on_host {
            check_file("path_on_host", path, true, !drive.is_read_only.unwrap_or(false))?;
        }
        let limiter =
            update.rate_limiter.map(|change| drive.rate_limiter.unwrap_or_default().updated(&change));
        let change = DriveChange { path: update.path_on_host, limiter };
        let (id, after) = (update.drive_id.clone(), change.clone());
        let done = self.done_then(ticket, move |controller| {
            if let Ok(drive) = controller.vm.drive(&id) {
                drive.path_on_host = after.path.or(drive.path_on_host.take());
                drive.rate_limiter = after.limiter.or(drive.rate_limiter);
            }
        });
        self.engine.patch_drive(&update.drive_id, change, done);
        Ok(Outcome::Later)
    }

    fn patch_net(&mut self, ticket: Ticket, update: NetworkUpdate) -> Result<Outcome, Fault> {
        let net = self.vm.net(&update.iface_id)?;
        let rx = update.rx_rate_limiter.map(|new| net.rx_rate_limiter.unwrap_or_default().updated(&new));
        let tx = update.tx_rate_limiter.map(|new| net.tx_rate_limiter.unwrap_or_default().updated(&new));
        let id = update.iface_id.clone();
        let done = self.done_then(ticket, move |controller| {
            if let Ok(net) = controller.vm.net(&id) {
                net.rx_rate_limiter = rx.or(net.rx_rate_limiter);
                net.tx_rate_limiter = tx.or(net.tx_rate_limiter);
            }
        });
        self.engine.patch_net(&update.iface_id, rx, tx, done);
        Ok(Outcome::Later)
    }

    fn patch_pmem(&mut self, ticket: Ticket, update: PmemUpdate) -> Result<Outcome, Fault> {
        let pmem = self.vm.pmem_device(&update.id)?;
        let Some(new) = update.rate_limiter else {
            return Ok(Outcome::Now(Ok(Reply::Nothing)));
        };
        let limiter = pmem.rate_limiter.unwrap_or_default().updated(&new);
        let id = update.id.clone();
        let done = self.done_then(ticket, move |controller| {
            if let Ok(pmem) = controller.vm.pmem_device(&id) {
                pmem.rate_limiter = Some(limiter);
            }
        });
        self.engine.patch_pmem(&update.id, limiter, done);
        Ok(Outcome::Later)
    }

    fn patch_balloon(&mut self, ticket: Ticket, mib: u32) -> Result<Outcome, Fault> {
        let started = self.state != VmState::NotStarted;
        self.vm.balloon()?;
        self.vm.check_target(mib)?;
        if !started {
            self.vm.balloon()?.amount_mib = mib;
            return Ok(Outcome::Now(Ok(Reply::Nothing)));
        }
        let done = self.done_then(ticket, move |controller| {
            if let Ok(balloon) = controller.vm.balloon() {
                balloon.amount_mib = mib;
            }
        });
        self.engine.balloon_target(mib, done);
        Ok(Outcome::Later)
    }

    fn patch_balloon_stats(&mut self, ticket: Ticket, seconds: u16) -> Result<Outcome, Fault> {
        if self.state == VmState::NotStarted {
            self.vm.balloon()?.stats_polling_interval_s = seconds;
            return Ok(Outcome::Now(Ok(Reply::Nothing)));
        }
        self.vm.check_interval(seconds)?;
        if seconds == 0 {
            return Ok(Outcome::Now(Ok(Reply::Nothing)));
        }
        let done = self.done_then(ticket, move |controller| {
            if let Ok(balloon) = controller.vm.balloon() {
                balloon.stats_polling_interval_s = seconds;
            }
        });
        self.engine.balloon_interval(seconds, done);
        Ok(Outcome::Later)
    }

    fn check_hinting(&mut self) -> Result<(), Fault> {
        if self.vm.balloon()?.free_page_hinting {
            return Ok(());
        }
        Err(Fault::bad_request("The balloon's free page hinting is not enabled."))
    }

    pub(crate) fn set_logger(&mut self, logger: model::Logger) -> Result<(), Fault> {
        crate::log::configure(&super::logger::settings(&logger, &self.instance.id))
            .map_err(|error| Fault::bad_request(format!("log_path: cannot open it: {error}")))?;
        self.vm.logger = Some(logger);
        Ok(())
    }

    pub(crate) fn set_metrics(&mut self, metrics: model::Metrics) -> Result<(), Fault> {
        if self.vm.metrics.is_some() {
            return Err(Fault::bad_request("The metrics system is initialized already."));
        }
        self.metrics.open(&metrics)?;
        self.vm.metrics = Some(metrics);
        Ok(())
    }
}
