//! A hundred machines from one: a guest gets warm, becomes a template, and every fork of it goes on with a number of its own.
//!
//! `cargo run --release --example fork [FORKS]`. Needs /dev/kvm.

use std::error::Error;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use freestone_vmm::bus::{self, Access, Device, GuestEvent, IoDevice, Notifier, Plug, Wiring};
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::kvm::Kvm;
use freestone_vmm::loader::FlatMode;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::snapshot::{Restoring, Saving, State};
use freestone_vmm::{Machine, MachineBuilder, MachineHandle, Payload};

/// Writes a word to each of 4096 pages, says so, and then asks for its number and tells it, for ever.
const GUEST: &[u8] = &[
    0x48, 0xc7, 0xc7, 0x00, 0x00, 0x20, 0x00, // mov rdi, 0x200000
    0x48, 0xc7, 0xc1, 0x00, 0x10, 0x00, 0x00, // mov rcx, 4096
    0x48, 0x89, 0x0f, // 1: mov [rdi], rcx
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 4096
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf1, // jnz 1b
    0xe6, 0x10, // out WARM, al
    0xe4, 0x11, // 2: in al, NUMBER
    0xe6, 0x12, // out ANSWER, al
    0xeb, 0xfa, // jmp 2b
];

/// Ports of the [`Counter`], from 0x10 on.
const WARM: u64 = 0;
const ANSWER: u64 = 2;

/// Tells each fork its number and hears it again.
struct Counter {
    number: u8,
    answer: AtomicU8,
    notifier: OnceLock<Notifier>,
    warm: Arc<OnceLock<MachineHandle>>,
}

impl IoDevice for Counter {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(self.number);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        match (offset, self.warm.get(), self.notifier.get()) {
            (WARM, Some(machine), _) => machine.call(),
            // The template may have been made between question and answer: then its number, 0, comes first.
            (ANSWER, None, Some(notifier)) if data != [0] => {
                self.answer.store(data.first().copied().unwrap_or(0), Ordering::Relaxed);
                notifier.notify(GuestEvent::PowerOff);
            }
            _ => {}
        }
        Ok(())
    }
}

struct CounterPlug(Arc<Counter>);

impl Plug for CounterPlug {
    fn plug(self: Box<Self>, wiring: &mut dyn Wiring) -> bus::Result<Box<dyn Device>> {
        let _ = self.0.notifier.set(wiring.notifier());
        wiring.pio(0x10, 3, Arc::clone(&self.0) as _)?;
        Ok(self)
    }
}

impl Device for CounterPlug {
    fn name(&self) -> &str {
        "counter"
    }

    /// A fork has a number of its own: there is nothing to take over.
    fn save(&mut self, _state: &mut Saving<'_>) -> bus::Result<()> {
        Ok(())
    }

    fn restore(&mut self, _state: &mut Restoring<'_>) -> bus::Result<()> {
        Ok(())
    }
}

fn counter(number: u8, warm: &Arc<OnceLock<MachineHandle>>) -> Arc<Counter> {
    Arc::new(Counter { number, answer: AtomicU8::new(0), notifier: OnceLock::new(), warm: Arc::clone(warm) })
}

fn main() -> Result<(), Box<dyn Error>> {
    let forks: u8 = std::env::args().nth(1).map_or(Ok(100), |n| n.parse())?;
    let kvm = Kvm::open()?;
    let warm = Arc::new(OnceLock::new());
    let mut first = MachineBuilder::new(&kvm)
        .memory(GuestMem::anonymous(128 << 20)?)
        .device(CounterPlug(counter(0, &warm)))
        .payload(Payload::Flat { bytes: GUEST.into(), at: 0x10_0000, mode: FlatMode::Long64 })
        .build()?;
    let _ = warm.set(first.handle());
    first.start()?;
    first.attend()?;
    first.pause()?;
    let begin = Instant::now();
    let template = first.paused()?.template("fork example", State::new(), false)?;
    println!("template of {} MiB in {:?}", first.memory().size() >> 20, begin.elapsed());
    drop(first);

    let nobody = Arc::new(OnceLock::new());
    let mut times = Vec::new();
    for number in 1..=forks {
        let counter = counter(number, &nobody);
        let begin = Instant::now();
        let mut child: Machine<Kvm> = MachineBuilder::new(&kvm)
            .memory(template.map(false)?)
            .device(CounterPlug(Arc::clone(&counter)))
            .restore(&mut template.sections()?, ClockPolicy::Continue)?;
        child.resume()?;
        child.wait()?;
        times.push(begin.elapsed());
        child.stop()?;
        let answer = counter.answer.load(Ordering::Relaxed);
        if answer != number {
            return Err(format!("fork {number} says that it is {answer}").into());
        }
    }
    times.sort();
    let median = times.get(times.len() / 2).copied().unwrap_or(Duration::ZERO);
    println!("{forks} forks, each with its own number; from nothing to its answer: {median:?} (median)");
    Ok(())
}
