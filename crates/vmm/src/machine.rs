//! A machine and its life: created, running, paused, stopped.

use std::fmt;
use std::sync::Arc;

use freestone_bus::{EventLoop, Task, Work, spawn};
use freestone_hypervisor::x86::{ClockPolicy, ClockState};
use freestone_hypervisor::{Hypervisor, Vm};
use freestone_memory::image::ImageLayout;
use freestone_memory::{DirtyPages, GuestMem};
use freestone_vcpu::stats::{Snapshot, StatsReader};

use crate::board::Board;
use crate::builder::MachineBuilder;
use crate::exit::{ExitReason, Shared};
use crate::inventory::Inventory;
use crate::paused::Paused;
use crate::saved::MachineSection;
use crate::store::Tracker;
use crate::vcpus::Vcpus;
use crate::{Error, Result};
use freestone_vcpu::state::VcpuSection;

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Built; nothing ran yet.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs and devices stand still.
    Paused,
    /// Ended; only to be dropped.
    Stopped,
}

impl State {
    /// The state as a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A virtual machine.
///
/// It belongs to one thread, which drives the devices' work in [`wait`](Self::wait); every vCPU has a thread of its own.
///
/// | call | Created | Running | Paused | Stopped |
/// |---|---|---|---|---|
/// | [`start`](Self::start) | starts | error | error | error |
/// | [`wait`](Self::wait) | error | until the guest ends | error | error |
/// | [`attend`](Self::attend) | until called | until the guest ends or called | until called | error |
/// | [`pause`](Self::pause) | error | pauses | nothing | error |
/// | [`resume`](Self::resume) | error | nothing | resumes | error |
/// | [`paused`](Self::paused) | error | error | gives [`Paused`](crate::Paused) | error |
/// | [`stop`](Self::stop) | stops | stops | stops | nothing |
///
/// A machine that was [restored](MachineBuilder::restore) begins as paused. Dropping a machine stops it.
pub struct Machine<H: Hypervisor> {
    // Dropped in this order: vCPUs leave the guest before devices, memory and VM go.
    pub(crate) vcpus: Vcpus<<H::Vm as Vm>::Vcpu>,
    pub(crate) inventory: Inventory,
    pub(crate) board: Board,
    event_loop: EventLoop,
    shared: Arc<Shared>,
    pub(crate) vm: H::Vm,
    pub(crate) memory: GuestMem,
    state: State,
    /// The log of writes, while differences are asked for.
    pub(crate) tracker: Option<Tracker>,
    /// What the guest's clock is set to when a restored machine goes on.
    clock: Option<(ClockState, ClockPolicy)>,
}

/// What [`Machine::attend`] came back for.
#[derive(Debug)]
pub enum Attention {
    /// The guest ended, or somebody stopped the machine. It is still to be [stopped](Machine::stop).
    Ended(ExitReason),
    /// Somebody has [called](MachineHandle::call).
    Called,
}

impl<H: Hypervisor> Machine<H> {
    /// Starts a description of a machine on `hypervisor`.
    pub fn builder(hypervisor: &H) -> MachineBuilder<'_, H> {
        MachineBuilder::new(hypervisor)
    }

    pub(crate) fn assemble(parts: Parts<H>) -> Self {
        let Parts { vm, memory, board, inventory, event_loop, shared, vcpus } = parts;
        Self {
            vcpus,
            inventory,
            board,
            event_loop,
            shared,
            vm,
            memory,
            state: State::Created,
            tracker: None,
            clock: None,
        }
    }

    /// The machine as one that was saved and is to go on.
    pub(crate) fn into_restored(mut self, clock: Option<(ClockState, ClockPolicy)>) -> Self {
        self.state = State::Paused;
        self.clock = clock;
        self
    }

    /// Starts, waits until the guest ends, and stops: the whole life in one call.
    ///
    /// # Errors
    /// As [`start`](Self::start), [`wait`](Self::wait) and [`stop`](Self::stop).
    pub fn run(&mut self) -> Result<ExitReason> {
        self.start()?;
        let reason = self.wait()?;
        self.stop()?;
        Ok(reason)
    }

    /// Starts the vCPUs, each on a thread of its own.
    ///
    /// # Errors
    /// [`Error::State`], or [`Error::Vcpu`] if the host gives no thread; the machine is then stopped.
    pub fn start(&mut self) -> Result<()> {
        self.expect("start", State::Created)?;
        self.start_vcpus()
    }

    fn start_vcpus(&mut self) -> Result<()> {
        self.state = State::Running;
        let (board, memory, shared) = (&self.board, &self.memory, &self.shared);
        let started = self.vcpus.start(false, || board.dispatcher(), memory, shared);
        if started.is_err() {
            self.stop()?;
        }
        started
    }

    /// Drives the devices until the guest ends or somebody stops the machine. The machine is still to be stopped then.
    ///
    /// # Errors
    /// [`Error::State`], or [`Error::Bus`] if the event loop fails.
    pub fn wait(&mut self) -> Result<ExitReason> {
        self.expect("wait for", State::Running)?;
        let shared = Arc::clone(&self.shared);
        self.event_loop.run_until(|| shared.ended())?;
        Ok(shared.take_end())
    }

    /// Drives the devices until the guest ends, or until somebody [calls](MachineHandle::call): for owners who do more than to
    /// wait, such as pausing and saving the machine when they are asked to. A call is never lost; several may be told as one.
    ///
    /// # Errors
    /// [`Error::State`] if the machine is stopped, or [`Error::Bus`] if the event loop fails.
    pub fn attend(&mut self) -> Result<Attention> {
        if self.state == State::Stopped {
            return Err(Error::State { doing: "attend to", state: self.state.name() });
        }
        let shared = Arc::clone(&self.shared);
        self.event_loop.run_until(|| shared.called() || shared.ended())?;
        if shared.take_call() {
            return Ok(Attention::Called);
        }
        Ok(Attention::Ended(shared.take_end()))
    }

    /// The machine as one that stands still, which can be saved.
    ///
    /// # Errors
    /// [`Error::State`] if it is not paused.
    pub fn paused(&mut self) -> Result<Paused<'_, H>> {
        self.expect("save", State::Paused)?;
        Ok(Paused::new(self))
    }

    /// Makes vCPUs and then devices stand still. Their state is whole and nothing touches guest memory any more.
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::Vcpu`] or [`Error::Device`] if one does not stand still: the machine then runs on.
    pub fn pause(&mut self) -> Result<()> {
        if self.state == State::Paused {
            return Ok(());
        }
        self.expect("pause", State::Running)?;
        let paused = self.vcpus.pause().and_then(|()| self.inventory.pause());
        if paused.is_err() {
            self.vcpus.resume();
            return paused;
        }
        self.state = State::Paused;
        Ok(())
    }

    /// Goes on after [`pause`](Self::pause).
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::Device`] if a device cannot go on, or the hypervisor's: the machine then stays paused.
    pub fn resume(&mut self) -> Result<()> {
        if self.state == State::Running {
            return Ok(());
        }
        self.expect("resume", State::Paused)?;
        // Kept until nothing can fail any more: the next attempt sets it again.
        if let Some((clock, policy)) = self.clock
            && let Some(vm) = self.vm.state()
        {
            vm.set_clock(&clock, policy)?;
        }
        self.inventory.resume()?;
        self.clock = None;
        self.vcpus.resume();
        self.state = State::Running;
        Ok(())
    }

    /// Stops vCPUs and shuts the devices down, so that disks hold what the guest believes written.
    ///
    /// # Errors
    /// [`Error::Vcpu`] or [`Error::Device`] of the first part that failed; the others are stopped all the same.
    pub fn stop(&mut self) -> Result<()> {
        if self.state == State::Stopped {
            return Ok(());
        }
        self.state = State::Stopped;
        let vcpus = self.vcpus.stop();
        self.inventory.shutdown().and(vcpus)
    }

    /// Where the machine is in its life.
    pub fn state(&self) -> State {
        self.state
    }

    /// A handle for other threads.
    pub fn handle(&self) -> MachineHandle {
        MachineHandle { shared: Arc::clone(&self.shared) }
    }

    /// Hands further work to the event loop, which drives it beside the devices' while [`wait`](Self::wait) runs.
    ///
    /// # Errors
    /// [`Error::Io`] if the event loop cannot be woken.
    pub fn drive<W: Work + 'static>(&self, work: W) -> Result<Task<W>> {
        spawn(&self.event_loop.handle(), work).map_err(|source| Error::Io { op: "hand over work", source })
    }

    /// The VM below.
    pub fn vm(&self) -> &H::Vm {
        &self.vm
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMem {
        &self.memory
    }

    /// The devices.
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Whether writes are logged for differences: see [`Paused::track`].
    pub fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }

    /// What the machine is made of, as a snapshot says it: for the target of a [migration](crate::migrate::send).
    pub fn describe(&self) -> MachineSection {
        MachineSection::new(self.vcpus.len(), &self.memory, self.board.has_irq_chip())
    }

    /// The first processor as it is now, which all others are like, for the target of a [migration](crate::migrate::send) to compare with
    /// what it has. A machine that runs stands still for a moment.
    ///
    /// # Errors
    /// [`Error::Vcpu`] or the hypervisor's.
    pub fn describe_cpu(&mut self) -> Result<VcpuSection> {
        let running = self.state == State::Running;
        if running {
            self.vcpus.pause()?;
        }
        let saved = self.vcpus.save();
        if running {
            self.vcpus.resume();
        }
        let first = saved?.into_iter().next().ok_or(Error::NotSaved)?;
        Ok(VcpuSection::try_from(first)?)
    }

    /// Begins to log what guest and devices write, also while the machine runs; whether memory and hypervisor can. A log that was kept for
    /// differences goes on from here: the next difference needs a full snapshot before it.
    pub(crate) fn begin_tracking(&mut self) -> Result<bool> {
        let Some(log) = self.vm.dirty_log().filter(|_| self.memory.logs_dirty()) else { return Ok(false) };
        let mut tracker = Tracker::default();
        tracker.start(log, &self.memory, false)?;
        self.tracker = Some(tracker);
        Ok(true)
    }

    /// The pages that were written since the last call; whoever calls keeps them.
    pub(crate) fn take_written(&mut self) -> Result<Vec<DirtyPages>> {
        match (&mut self.tracker, self.vm.dirty_log()) {
            (Some(tracker), Some(log)) => {
                tracker.collect(log, &self.memory)?;
                let pages = tracker.pages(&ImageLayout::of_all(&self.memory)?);
                tracker.forget();
                Ok(pages)
            }
            _ => Err(Error::NotTracked),
        }
    }

    /// Whether the guest has ended, or somebody has stopped the machine, which is still to be [stopped](Self::stop).
    pub fn has_ended(&self) -> bool {
        self.shared.ended()
    }

    /// The clock of a restored machine that did not go on yet.
    pub(crate) fn clock(&self) -> Option<ClockState> {
        self.clock.map(|(clock, _)| clock)
    }

    /// Exit statistics of each vCPU; empty unless the builder asked for them.
    pub fn stats(&self) -> Vec<Snapshot> {
        self.vcpus.stats().iter().map(StatsReader::snapshot).collect()
    }

    fn expect(&self, doing: &'static str, wanted: State) -> Result<()> {
        if self.state == wanted { Ok(()) } else { Err(Error::State { doing, state: self.state.name() }) }
    }
}

impl<H: Hypervisor> AsMut<Self> for Machine<H> {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

impl<H: Hypervisor> Drop for Machine<H> {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "the machine did not stop in order");
        }
    }
}

impl<H: Hypervisor> fmt::Debug for Machine<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("state", &self.state)
            .field("devices", &self.inventory)
            .finish_non_exhaustive()
    }
}

/// What a [`Machine`] is put together from.
pub(crate) struct Parts<H: Hypervisor> {
    pub(crate) vm: H::Vm,
    pub(crate) memory: GuestMem,
    pub(crate) board: Board,
    pub(crate) inventory: Inventory,
    pub(crate) event_loop: EventLoop,
    pub(crate) shared: Arc<Shared>,
    pub(crate) vcpus: Vcpus<<H::Vm as Vm>::Vcpu>,
}

/// Calls and ends a machine from any thread.
#[derive(Clone)]
pub struct MachineHandle {
    shared: Arc<Shared>,
}

impl MachineHandle {
    /// Makes [`Machine::attend`] return. Does not wait.
    pub fn call(&self) {
        self.shared.call();
    }

    /// Makes [`Machine::wait`] return [`ExitReason::Stopped`], unless the guest ended first. Does not wait.
    pub fn stop(&self) {
        self.shared.end(ExitReason::Stopped);
    }
}

impl fmt::Debug for MachineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MachineHandle")
    }
}
