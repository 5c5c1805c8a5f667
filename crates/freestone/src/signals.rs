//! Signals that end the command, as work on the event loop: the machine is shut down in order and the terminal restored.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use freestone_vmm::MachineHandle;
use freestone_vmm::bus::{Progress, Source, Work};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// Stops the machine on SIGTERM, SIGINT and SIGHUP.
pub(crate) struct StopOnSignal {
    signals: SignalDelivery<Arc<UnixStream>, SignalOnly>,
    machine: MachineHandle,
}

impl StopOnSignal {
    /// Catches the signals from now on.
    pub(crate) fn install(machine: MachineHandle) -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        // One pipe for all three; it is read and written without waiting, whatever its mode.
        let signals =
            SignalDelivery::with_pipe(Arc::new(read), write, SignalOnly, [SIGTERM, SIGINT, SIGHUP])?;
        Ok(Self { signals, machine })
    }
}

impl Work for StopOnSignal {
    fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(self.signals.get_read()) as Source]
    }

    fn process(&mut self) -> Progress {
        if self.signals.pending().next().is_some() {
            tracing::info!("stopped by a signal");
            self.machine.stop();
        }
        Progress::Idle
    }
}
