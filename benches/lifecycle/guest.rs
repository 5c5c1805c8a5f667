//! The guests of the bench, the device that hears of their first instruction, and machines of both.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use freestone_benches::Fallible;
use freestone_benches::floor::{self, Host, Order};
use freestone_benches::saved::Saved;
use freestone_kvm::Kvm;
use freestone_vmm::bus::{self, Access, Device, IoDevice, Plug, Wiring};
use freestone_vmm::loader::FlatMode;
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem};
use freestone_vmm::snapshot::{Restoring, Saving};
use freestone_vmm::{Machine, MachineBuilder, Payload};

/// Where flat guests are, and the port they write to.
pub(crate) const AT: u64 = 0x10_0000;
const PORT: u16 = 0x10;

/// Writes to its port for ever: `mov al, 1; 1: out 0x10, al; jmp 1b`.
pub(crate) const SIGNAL: &[u8] = &[0xB0, 0x01, 0xE6, 0x10, 0xEB, 0xFC];

/// Writes to its port once and spins: `mov al, 1; out 0x10, al; 1: jmp 1b`.
pub(crate) const SPIN: &[u8] = &[0xB0, 0x01, 0xE6, 0x10, 0xEB, 0xFE];

/// Where a flat guest writes, if it does.
pub(crate) const TOUCHED: u64 = 0x20_0000;

/// Writes a word to each of `pages` pages from 2 MiB on, again and again, with `pause` turns of a loop after each.
pub(crate) fn writer(pages: u32, pause: u32) -> Vec<u8> {
    let mut code = vec![0xBF, 0x00, 0x00, 0x20, 0x00]; // 1: mov edi, 0x200000
    code.push(0xB9); // mov ecx, pages
    code.extend(pages.to_le_bytes());
    code.extend([0x89, 0x0F]); // 2: mov [edi], ecx
    code.extend([0x81, 0xC7, 0x00, 0x10, 0x00, 0x00]); // add edi, 4096
    code.push(0xBA); // mov edx, pause
    code.extend(pause.to_le_bytes());
    code.extend([0x4A, 0x75, 0xFD]); // 3: dec edx; jnz 3b
    code.extend([0x49, 0x75, 0xED]); // dec ecx; jnz 2b
    code.extend([0xE6, 0x10]); // out 0x10, al
    code.extend([0xEB, 0xDF]); // jmp 1b
    code
}

/// Whether what is measured is marked for strace.
pub(crate) static MARKED: AtomicBool = AtomicBool::new(false);

/// Begins what is measured.
pub(crate) fn begin() -> Instant {
    mark(b"begin");
    Instant::now()
}

/// Ends it: microseconds.
pub(crate) fn end(begin: Instant) -> f64 {
    let elapsed = begin.elapsed();
    mark(b"end");
    micros(elapsed)
}

pub(crate) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn mark(text: &'static [u8]) {
    if MARKED.load(Ordering::Relaxed) {
        // SAFETY: a descriptor that cannot be open, and a slice that is there.
        unsafe { libc::write(-1, text.as_ptr().cast(), text.len()) };
    }
}

/// Notes when the guest writes to its port first.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    /// When the machine began.
    begin: Mutex<Option<(Instant, Thread)>>,
    /// Nanoseconds from then to the first write.
    nanos: AtomicU64,
}

impl Signal {
    pub(crate) fn begin(&self) {
        let begin = begin();
        *self.begin.lock().unwrap_or_else(PoisonError::into_inner) = Some((begin, thread::current()));
    }

    /// The same for a machine that ran before and stands still.
    pub(crate) fn begin_again(&self) {
        self.nanos.store(0, Ordering::Release);
        self.begin();
    }

    /// Waits for the first write: microseconds since the beginning.
    pub(crate) fn wait(&self) -> Fallible<f64> {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            match self.nanos.load(Ordering::Acquire) {
                0 if Instant::now() > limit => return Err("the guest does not say that it runs".into()),
                0 => thread::park_timeout(Duration::from_secs(1)),
                nanos => return Ok(micros(Duration::from_nanos(nanos))),
            }
        }
    }
}

impl IoDevice for Signal {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(0);
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Access {
        if self.nanos.load(Ordering::Relaxed) == 0 {
            let (begin, waiting) = match &*self.begin.lock().unwrap_or_else(PoisonError::into_inner) {
                Some((begin, waiting)) => (*begin, waiting.clone()),
                None => return Ok(()),
            };
            let elapsed = begin.elapsed();
            mark(b"end");
            self.nanos.store(u64::try_from(elapsed.as_nanos()).unwrap_or(1).max(1), Ordering::Release);
            waiting.unpark();
        }
        Ok(())
    }
}

struct SignalPlug(Arc<Signal>);

impl Plug for SignalPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> bus::Result<Box<dyn Device>> {
        wiring.pio(PORT, 1, Arc::clone(&self.0) as _)?;
        Ok(self)
    }
}

impl Device for SignalPlug {
    fn name(&self) -> &str {
        "signal"
    }

    fn save(&mut self, _state: &mut Saving<'_>) -> bus::Result<()> {
        Ok(())
    }

    fn restore(&mut self, _state: &mut Restoring<'_>) -> bus::Result<()> {
        Ok(())
    }
}

/// A machine's description with the device.
pub(crate) fn builder<'h>(kvm: &'h Kvm, signal: &Arc<Signal>) -> MachineBuilder<'h, Kvm> {
    MachineBuilder::new(kvm).device(SignalPlug(Arc::clone(signal)))
}

/// The flat guest `code` as a payload.
pub(crate) fn flat(code: &[u8]) -> Payload {
    Payload::Flat { bytes: code.to_vec().into(), at: AT, mode: FlatMode::Protected32 }
}

/// A machine that runs `code`, with `touched` bytes of its memory written to.
pub(crate) fn running(kvm: &Kvm, memory: GuestMem, code: &[u8], touched: u64) -> Fallible<Machine<Kvm>> {
    let signal = Arc::new(Signal::default());
    touch(&memory, touched)?;
    let mut machine = builder(kvm, &signal).memory(memory).payload(flat(code)).build()?;
    signal.begin();
    machine.start()?;
    signal.wait()?;
    Ok(machine)
}

/// Writes `bytes` of random data to memory from 2 MiB on.
pub(crate) fn touch(memory: &GuestMem, bytes: u64) -> Fallible<()> {
    let view = memory.view();
    let mut word = 0x9E37_79B9_7F4A_7C15_u64;
    let mut chunk = vec![0; 1 << 20];
    for at in (0..bytes).step_by(chunk.len()) {
        for part in chunk.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            part.copy_from_slice(&word.to_le_bytes());
        }
        view.write_slice(&chunk, GuestAddress(TOUCHED + at))?;
    }
    Ok(())
}

/// A raw VM that was saved after the first exit of `code`, and its memory.
pub(crate) struct Raw {
    pub(crate) host: Arc<Host>,
    pub(crate) saved: Saved,
    pub(crate) image: std::fs::File,
}

impl Raw {
    pub(crate) fn new(size: u64, code: &[u8], image: std::fs::File) -> Fallible<Self> {
        let host = Host::open()?;
        let mut vm = floor::Vm::on(&host, size, Order::MemoryFirst)?;
        vm.boot_flat(code, AT)?;
        vm.run()?;
        let saved = vm.save()?;
        vm.write_image(&image, 2 << 20)?;
        Ok(Self { host, saved, image })
    }

    /// Microseconds from nothing to the first exit.
    pub(crate) fn restore(&self) -> Fallible<f64> {
        let begun = begin();
        let mut vm = floor::Vm::restore(&self.host, &self.saved, &self.image)?;
        vm.run()?;
        Ok(end(begun))
    }
}
