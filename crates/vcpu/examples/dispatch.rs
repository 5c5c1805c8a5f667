//! Runs a scripted guest through the dispatcher with statistics on, then measures what the dispatcher itself costs.
//!
//! `cargo run --release --example dispatch`

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use freestone_bus::{Access, Bus, IoDevice};
use freestone_hypervisor::{Hypervisor, Vm};
use freestone_testkit::{RepeatVcpu, Script, ScriptedHypervisor};
use freestone_vcpu::{Dispatcher, ExitStats, RunLoop};

/// Counts writes; reads give the count.
#[derive(Default)]
struct Counter(AtomicU64);

impl IoDevice for Counter {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Access {
        let count = self.0.load(Ordering::Relaxed).to_le_bytes();
        data.iter_mut().zip(count).for_each(|(to, from)| *to = from);
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Access {
        self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        Ok(())
    }
}

const PORT: u16 = 0x3f8;
const GPA: u64 = 0xd000_0000;

fn main() -> Result<(), Box<dyn Error>> {
    let (pio, mmio) = (Bus::new(), Bus::new());
    // A dozen devices, as a small machine has, so that the lookup is a real one.
    for n in 0..6 {
        pio.insert(0x40 + n * 0x20, 8, Arc::new(Counter::default()))?;
        mmio.insert(GPA + 0x1_0000 + n * 0x1000, 0x1000, Arc::new(Counter::default()))?;
    }
    pio.insert(PORT.into(), 8, Arc::new(Counter::default()))?;
    mmio.insert(GPA, 0x1000, Arc::new(Counter::default()))?;

    let script =
        Script::new().print(PORT, "hello").pio_read(PORT, 1, 4).mmio_write32(GPA, 1).mmio_read(GPA, 4);
    let vm = ScriptedHypervisor::new(script.pio_read(0x1f0, 1, 1).halt()).create_vm()?;
    let dispatcher = Dispatcher::new(pio.view(), mmio.view());
    let mut run_loop = RunLoop::with_observer(vm.create_vcpu(0)?, dispatcher, ExitStats::new());
    let outcome = run_loop.run()?;
    println!("the guest ended: {outcome:?}\n\n{}\n", run_loop.observer().snapshot());
    println!("refused: {:?}\n", run_loop.dispatcher().refused());

    let guests = [
        ("PIO write", RepeatVcpu::pio_write(PORT)),
        ("PIO read", RepeatVcpu::pio_read(PORT)),
        ("MMIO write", RepeatVcpu::mmio_write(GPA)),
        ("MMIO read", RepeatVcpu::mmio_read(GPA)),
        ("unclaimed", RepeatVcpu::mmio_write(GPA + 0x8000)),
    ];
    for (name, vcpu) in guests {
        let mut run_loop = RunLoop::new(vcpu, Dispatcher::new(pio.view(), mmio.view()));
        let best = (0..5).map(|_| measure(&mut run_loop)).min().transpose()?.unwrap_or(0);
        println!(
            "{name:<11} {:>3}.{} ns from the exit to its device and back",
            best / 1000,
            best % 1000 / 100
        );
    }
    Ok(())
}

/// Picoseconds for a step.
fn measure(run_loop: &mut RunLoop<RepeatVcpu>) -> Result<u128, String> {
    const STEPS: u32 = 2_000_000;
    let start = Instant::now();
    for _ in 0..STEPS {
        let _turn = black_box(run_loop.step().map_err(|e| e.to_string())?);
    }
    Ok(start.elapsed().as_nanos() * 1000 / u128::from(STEPS))
}
