//! The dispatcher alone: a vCPU that has no guest and makes exits as fast as they are taken.

use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::thread;

use freestone_benches::{Fallible, host, rounds};
use freestone_bus::Bus;
use freestone_hypervisor::x86::{CpuidLeaf, MpState, Msr, Regs, SpecialRegs};
use freestone_hypervisor::{CpuState, Error, Exit, Kick, Kicker, Result, Vcpu};
use freestone_vcpu::{Dispatcher, ExitStats, NoObserver, Observer, RunLoop, Turn};

use crate::devices::{LOCKED_MMIO, LOCKED_PORT, MMIO, PORT};
use crate::whole::buses;

/// Exits of one round.
const EXITS: u32 = 200_000;

/// What the vCPU's exits are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Script {
    /// `out` to a port.
    PortOut(u16),
    /// Loads from an address.
    MmioRead(u64),
    /// Port and memory, in and out, in turns.
    Mixed(u16, u64),
}

/// A vCPU without a guest.
struct ScriptedVcpu {
    script: Script,
    turn: u32,
    data: [u8; 4],
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl Vcpu for ScriptedVcpu {
    fn index(&self) -> u32 {
        0
    }

    #[inline]
    fn run(&mut self) -> Result<Exit<'_>> {
        self.turn = self.turn.wrapping_add(1);
        let data = &mut self.data;
        Ok(match (black_box(self.script), self.turn & 3) {
            (Script::PortOut(port), _) | (Script::Mixed(port, _), 0) => {
                Exit::PioWrite { port, size: 4, data }
            }
            (Script::MmioRead(gpa), _) | (Script::Mixed(_, gpa), 1) => Exit::MmioRead { gpa, data },
            (Script::Mixed(port, _), 2) => Exit::PioRead { port, size: 4, data },
            (Script::Mixed(_, gpa), _) => Exit::MmioWrite { gpa, data },
        })
    }

    fn complete_exit(&mut self) -> Result<()> {
        Ok(())
    }

    fn kicker(&self) -> Kicker {
        Arc::new(NoKick)
    }
}

/// There is no processor behind it.
const NONE: Error = Error::Unsupported("a processor state");

impl CpuState for ScriptedVcpu {
    fn regs(&self) -> Result<Regs> {
        Err(NONE)
    }
    fn set_regs(&mut self, _: &Regs) -> Result<()> {
        Err(NONE)
    }
    fn special_regs(&self) -> Result<SpecialRegs> {
        Err(NONE)
    }
    fn set_special_regs(&mut self, _: &SpecialRegs) -> Result<()> {
        Err(NONE)
    }
    fn set_cpuid(&mut self, _: &[CpuidLeaf]) -> Result<()> {
        Err(NONE)
    }
    fn msrs(&self, _: &mut [Msr]) -> Result<()> {
        Err(NONE)
    }
    fn set_msrs(&mut self, _: &[Msr]) -> Result<()> {
        Err(NONE)
    }
    fn mp_state(&self) -> Result<MpState> {
        Err(NONE)
    }
    fn set_mp_state(&mut self, _: MpState) -> Result<()> {
        Err(NONE)
    }
    fn lapic(&self) -> Result<[u8; 1024]> {
        Err(NONE)
    }
    fn set_lapic(&mut self, _: &[u8; 1024]) -> Result<()> {
        Err(NONE)
    }
}

/// What a row of the table measures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    script: Script,
    stats: bool,
}

const fn case(name: &'static str, script: Script) -> Case {
    Case { name, script, stats: false }
}

/// The rows.
pub(crate) const CASES: [Case; 8] = [
    case("PIO out", Script::PortOut(PORT)),
    case("MMIO read", Script::MmioRead(MMIO)),
    case("mixed", Script::Mixed(PORT, MMIO)),
    case("PIO out, Mutex device", Script::PortOut(LOCKED_PORT)),
    case("MMIO read, Mutex device", Script::MmioRead(LOCKED_MMIO)),
    case("mixed, Mutex device", Script::Mixed(LOCKED_PORT, LOCKED_MMIO)),
    case("mixed, nothing there", Script::Mixed(crate::devices::FREE_PORT, LOCKED_MMIO + 0x1000)),
    Case { name: "mixed, with statistics", script: Script::Mixed(PORT, MMIO), stats: true },
];

/// Nanoseconds per exit with `threads` vCPUs that share the devices, each on a processor of its own: the median of `rounds`.
pub(crate) fn measure(case: Case, threads: usize, rounds: usize) -> Fallible<f64> {
    let (pio, mmio) = buses()?;
    let start = Barrier::new(threads);
    let cpus = host::cpus();
    let results: Vec<Vec<f64>> = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                let (pio, mmio, start) = (&pio, &mmio, &start);
                let cpu = cpus.get(thread).copied();
                scope.spawn(move || {
                    if let Some(cpu) = cpu {
                        let _ = host::pin(cpu);
                    }
                    if case.stats {
                        drive(case.script, pio, mmio, ExitStats::new(), start, rounds)
                    } else {
                        drive(case.script, pio, mmio, NoObserver, start, rounds)
                    }
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap_or_default()).collect()
    });
    let nanos: Vec<f64> = results.into_iter().flatten().collect();
    if nanos.is_empty() { Err("the scripted vCPU failed".into()) } else { Ok(rounds::median(&nanos)) }
}

/// Nanoseconds per exit of each round; none if the loop ends by itself.
fn drive<O: Observer>(
    script: Script,
    pio: &Bus,
    mmio: &Bus,
    observer: O,
    start: &Barrier,
    rounds: usize,
) -> Vec<f64> {
    let vcpu = ScriptedVcpu { script, turn: 0, data: [0x55; 4] };
    let mut run_loop = RunLoop::with_observer(vcpu, Dispatcher::new(pio.view(), mmio.view()), observer);
    let mut results = Vec::with_capacity(rounds);
    for round in 0..=rounds {
        start.wait();
        let begin = host::thread_time();
        for _ in 0..EXITS {
            if !matches!(run_loop.step(), Ok(Turn::Ran)) {
                return Vec::new();
            }
        }
        let nanos = (host::thread_time() - begin) / f64::from(EXITS);
        // The first warms the caches.
        if round > 0 {
            results.push(nanos);
        }
    }
    results
}
