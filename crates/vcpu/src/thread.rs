//! A thread for a run loop: the simplest way to drive a vCPU.

use std::fmt;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use freestone_hypervisor::Vcpu;

use crate::{Control, Error, NoObserver, Observer, Outcome, Result, RunLoop};

/// What a vCPU's thread leaves behind: how the loop ended, and the loop.
pub type Ended<V, O> = (Result<Outcome>, RunLoop<V, O>);

/// A vCPU that runs on a thread of its own.
///
/// Dropping it asks the vCPU to stop and does not wait.
pub struct VcpuThread<V, O = NoObserver> {
    control: Arc<Control>,
    join: Option<JoinHandle<Ended<V, O>>>,
}

/// Starts the thread `vcpuN` and drives `run_loop` on it.
///
/// `on_end` is called on that thread when the loop has ended, with the loop, so that a crash report can be made while the
/// state is at hand. It must not wait for this thread.
///
/// To start paused, call [`Control::request_pause`] first.
///
/// # Errors
/// [`Error::Thread`] if the host gives no thread; the vCPU is then dropped.
pub fn spawn_vcpu<V, O>(
    mut run_loop: RunLoop<V, O>,
    on_end: impl FnOnce(&Result<Outcome>, &mut RunLoop<V, O>) + Send + 'static,
) -> Result<VcpuThread<V, O>>
where
    V: Vcpu + 'static,
    O: Observer + 'static,
{
    let control = run_loop.control();
    let index = control.index();
    let guard = EndGuard(Arc::clone(&control));
    let body = move || {
        let _guard = guard;
        let outcome = run_loop.run();
        on_end(&outcome, &mut run_loop);
        (outcome, run_loop)
    };
    let join = Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(body)
        .map_err(|source| Error::Thread { index, source })?;
    Ok(VcpuThread { control, join: Some(join) })
}

/// Marks the vCPU as ended even if its thread panics, so that nobody waits for it in vain.
struct EndGuard(Arc<Control>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl<V, O> VcpuThread<V, O> {
    /// The handle that pauses and stops the vCPU.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Whether the thread is over and [`join`](Self::join) would not wait.
    pub fn is_finished(&self) -> bool {
        self.join.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until the loop ends by itself, and gives it back.
    ///
    /// # Errors
    /// [`Error::Panicked`] if the thread panicked. How the vCPU ended is inside of [`Ended`].
    pub fn join(mut self) -> Result<Ended<V, O>> {
        let panicked = Error::Panicked { index: self.control.index() };
        self.join.take().and_then(|join| join.join().ok()).ok_or(panicked)
    }

    /// Stops the vCPU and gives its loop back.
    ///
    /// # Errors
    /// [`Error::Timeout`] if it does not leave the guest, [`Error::Panicked`] if its thread panicked.
    pub fn stop(self) -> Result<Ended<V, O>> {
        self.control.stop()?;
        self.join()
    }
}

impl<V, O> Drop for VcpuThread<V, O> {
    fn drop(&mut self) {
        if self.join.is_some() {
            self.control.request_stop();
        }
    }
}

impl<V, O> fmt::Debug for VcpuThread<V, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuThread").field("control", &self.control).finish_non_exhaustive()
    }
}
