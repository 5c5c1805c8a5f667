//! Signals that end the command, as work on the event loop: the machine is shut down in order and the terminal restored.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use freestone_vmm::MachineHandle;
use freestone_vmm::bus::{Progress, Source, Work};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Stops the machine on SIGTERM, SIGINT and SIGHUP.
pub(crate) struct StopOnSignal {
    pipe: Arc<UnixStream>,
    machine: MachineHandle,
}

impl StopOnSignal {
    /// Catches the signals from now on.
    pub(crate) fn install(machine: MachineHandle) -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        Ok(Self { pipe: Arc::new(read), machine })
    }
}

impl Work for StopOnSignal {
    fn sources(&self) -> Vec<Source> {
        vec![Arc::clone(&self.pipe) as Source]
    }

    fn process(&mut self) -> Progress {
        let mut signals = [0; 16];
        if matches!((&*self.pipe).read(&mut signals), Ok(n) if n > 0) {
            tracing::info!("stopped by a signal");
            self.machine.stop();
        }
        Progress::Idle
    }
}
