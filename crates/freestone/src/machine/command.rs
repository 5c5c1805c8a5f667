//! How other threads reach a [`Vm`].

use std::fmt;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::time::Duration;

use freestone_vmm::MachineHandle;

use super::Vm;
use crate::failure::Failure;

/// What a [`Vm`] is to do, on its own thread.
pub(super) type Job = Box<dyn FnOnce(&mut Vm) + Send>;

/// Sends a [`Vm`] what to do. Clones command the same machine.
#[derive(Clone)]
pub(crate) struct Commander {
    jobs: Sender<Job>,
    machine: MachineHandle,
}

impl Commander {
    pub(super) fn new(jobs: Sender<Job>, machine: MachineHandle) -> Self {
        Self { jobs, machine }
    }

    /// Has the machine's thread do `job`, between two steps of its devices, and does not wait. A machine that has ended drops it.
    pub(crate) fn send(&self, job: impl FnOnce(&mut Vm) + Send + 'static) {
        // Fails when the machine is gone; the job is dropped with its channel for the answer then.
        if self.jobs.send(Box::new(job)).is_ok() {
            self.machine.call();
        }
    }

    /// The same, and waits for the answer. Not to be called on the machine's own thread.
    ///
    /// Fails if the machine ends before, or does not answer within `limit`; it may do the job all the same then.
    pub(crate) fn ask<R: Send + 'static>(
        &self,
        limit: Duration,
        job: impl FnOnce(&mut Vm) -> R + Send + 'static,
    ) -> Result<R, Failure> {
        let (answer, answered): (SyncSender<R>, _) = sync_channel(1);
        self.send(move |vm| drop(answer.try_send(job(vm))));
        answered.recv_timeout(limit).map_err(|error| match error {
            std::sync::mpsc::RecvTimeoutError::Timeout => {
                Failure::new(format!("the machine did not answer within {limit:?}"))
            }
            std::sync::mpsc::RecvTimeoutError::Disconnected => Failure::new("the machine has ended"),
        })
    }

    /// Ends the machine, whatever it does.
    pub(crate) fn stop(&self) {
        self.machine.stop();
    }
}

impl fmt::Debug for Commander {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Commander")
    }
}
