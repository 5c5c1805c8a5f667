//! The vCPUs of a machine: values before it starts, threads afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use freestone_hypervisor::Vcpu;
use freestone_hypervisor::x86::VcpuState;
use freestone_memory::GuestMem;
use freestone_vcpu::stats::{ExitStats, StatsReader};
use freestone_vcpu::{
    Control, Crash, Dispatcher, NoObserver, Observer, Outcome, RunLoop, VcpuThread, spawn_vcpu,
};

use crate::exit::{ExitReason, Shared};
use crate::{Error, Result};

/// A vCPU's thread, whoever observes it.
trait Running: Send {
    fn control(&self) -> &Arc<Control>;
    fn stop(self: Box<Self>) -> freestone_vcpu::Result<()>;
}

impl<V: Vcpu + 'static, O: Observer + 'static> Running for VcpuThread<V, O> {
    fn control(&self) -> &Arc<Control> {
        self.control()
    }

    fn stop(self: Box<Self>) -> freestone_vcpu::Result<()> {
        (*self).stop().map(drop)
    }
}

/// The vCPUs of a machine.
pub(crate) struct Vcpus<V> {
    idle: Vec<V>,
    threads: Vec<Box<dyn Running>>,
    observed: bool,
    stats: Vec<StatsReader>,
}

impl<V: Vcpu + 'static> Vcpus<V> {
    pub(crate) fn new(idle: Vec<V>, observed: bool) -> Self {
        Self { idle, threads: Vec::new(), observed, stats: Vec::new() }
    }

    /// Gives each vCPU a dispatcher and a thread, on which it runs, or waits to be resumed if it is `paused`.
    pub(crate) fn start(
        &mut self,
        paused: bool,
        dispatcher: impl Fn() -> Dispatcher,
        memory: &GuestMem,
        shared: &Arc<Shared>,
    ) -> Result<()> {
        let awake = Arc::new(AtomicUsize::new(self.idle.len()));
        for vcpu in std::mem::take(&mut self.idle) {
            let end = End { memory: memory.clone(), shared: Arc::clone(shared), awake: Arc::clone(&awake) };
            let thread = if self.observed {
                let stats = ExitStats::new();
                self.stats.push(stats.reader());
                thread(RunLoop::with_observer(vcpu, dispatcher(), stats), paused, end)?
            } else {
                thread(RunLoop::with_observer(vcpu, dispatcher(), NoObserver), paused, end)?
            };
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Makes all leave the guest and wait. All are asked before any is waited for.
    pub(crate) fn pause(&self) -> Result<()> {
        self.threads.iter().for_each(|t| t.control().request_pause());
        self.threads.iter().try_for_each(|t| t.control().pause().map_err(Error::Vcpu))
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.idle.len() + self.threads.len()
    }

    /// The state of each, by index. They must be paused, or not have run.
    pub(crate) fn save(&mut self) -> Result<Vec<VcpuState>> {
        let mut states = Vec::with_capacity(self.idle.len().max(self.threads.len()));
        for vcpu in &mut self.idle {
            states.push(vcpu.save()?);
        }
        for thread in &self.threads {
            states.push(thread.control().call(|vcpu| vcpu.save()).map_err(Error::Vcpu)??);
        }
        Ok(states)
    }

    pub(crate) fn resume(&self) {
        self.threads.iter().for_each(|t| t.control().resume());
    }

    pub(crate) fn stats(&self) -> &[StatsReader] {
        &self.stats
    }
}

impl<V> Vcpus<V> {
    /// Makes all leave the guest for good and joins their threads.
    pub(crate) fn stop(&mut self) -> Result<()> {
        self.idle.clear();
        self.threads.iter().for_each(|t| t.control().request_stop());
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            result = result.and(thread.stop().map_err(Error::Vcpu));
        }
        result
    }
}

impl<V> Drop for Vcpus<V> {
    /// For a machine that does not come to be: one that is, has stopped them before.
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a vCPU does not stop");
        }
    }
}

/// What a vCPU's thread does when its loop is over.
struct End {
    memory: GuestMem,
    shared: Arc<Shared>,
    /// vCPUs that have not halted for good.
    awake: Arc<AtomicUsize>,
}

fn thread<V: Vcpu + 'static, O: Observer + 'static>(
    run_loop: RunLoop<V, O>,
    paused: bool,
    end: End,
) -> Result<Box<dyn Running>> {
    if paused {
        run_loop.control().request_pause();
    }
    let thread = spawn_vcpu(run_loop, move |outcome, run_loop| {
        let vcpu = run_loop.vcpu();
        match outcome {
            Ok(Outcome::Halted) => {
                if end.awake.fetch_sub(1, Ordering::Relaxed) == 1 {
                    end.shared.end(ExitReason::Halted);
                }
            }
            Ok(Outcome::Guest(reason)) => {
                end.shared.guest_stopped(*reason, || Crash::collect(vcpu, &end.memory, *reason));
            }
            Ok(_) => {}
            Err(error) => {
                let error = describe(error);
                end.shared.end(ExitReason::Failed { vcpu: vcpu.index(), error });
            }
        }
    })?;
    Ok(Box::new(thread))
}

/// The error and what caused it, on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
