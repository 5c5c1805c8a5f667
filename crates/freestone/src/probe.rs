//! Whether this host's KVM can run an operating system kernel, found out by running a small guest.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use freestone_guest::{DONE_PORT, PARAMS, probe};
use freestone_kvm::Kvm;
use freestone_vmm::bus::{self, Access, Device, IoDevice, Plug, Wiring};
use freestone_vmm::devices::I8042Plug;
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem};
use freestone_vmm::{ExitReason, MachineBuilder, Payload};

/// How long the probe may take; it has no loops, so only a hypervisor that hangs needs this.
const LIMIT: Duration = Duration::from_secs(5);

/// Whether Linux can run here; the reason if not.
pub(crate) fn can_run_linux(kvm: &Kvm) -> Result<(), String> {
    let answer = Arc::new(AtomicU8::new(0));
    let memory = GuestMem::anonymous(16 << 20).map_err(|e| e.to_string())?;
    let mut machine = MachineBuilder::new(kvm)
        .memory(memory.clone())
        .device(DonePlug(Arc::clone(&answer)))
        .device(I8042Plug::new())
        .payload(Payload::Image { bytes: Cow::Borrowed(freestone_guest::PROBE), cmdline: String::new() })
        .build()
        .map_err(|e| e.to_string())?;

    let handle = machine.handle();
    let (finished, watch) = std::sync::mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if watch.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            handle.stop();
        }
    });
    let began = Instant::now();
    let reason = machine.run();
    drop(finished);
    drop(watchdog.join());
    tracing::debug!(?reason, took = ?began.elapsed(), "probe guest");

    if answer.load(Ordering::Acquire) == probe::YES {
        return Ok(());
    }
    let step =
        memory.view().read_obj::<u64>(GuestAddress(PARAMS + 8 * probe::STEP as u64)).unwrap_or(u64::MAX);
    let how = match reason {
        Ok(ExitReason::Crashed(_)) => "this KVM cannot execute it",
        Ok(ExitReason::Stopped) => "it hangs",
        Ok(_) => "it does not work as on a processor",
        Err(error) => return Err(error.to_string()),
    };
    Err(format!("{}: {how}", probe::step_name(step)))
}

/// The port by which the probe guest answers.
struct DonePlug(Arc<AtomicU8>);

impl Plug for DonePlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> bus::Result<Box<dyn Device>> {
        wiring.pio(DONE_PORT, 1, Arc::new(Done(Arc::clone(&self.0))))?;
        Ok(self)
    }
}

impl Device for DonePlug {
    fn name(&self) -> &str {
        "probe-answer"
    }
}

struct Done(Arc<AtomicU8>);

impl IoDevice for Done {
    fn read(&self, _: u64, _: &mut [u8]) -> Access {
        Ok(())
    }

    fn write(&self, _: u64, data: &[u8]) -> Access {
        if let Some(answer) = data.first() {
            self.0.store(*answer, Ordering::Release);
        }
        Ok(())
    }
}
