//! A vCPU without a processor: it plays a list of exits to a run loop that knows only the traits.
//!
//! This is how a run loop and the devices behind it are tested on any machine.
//! `cargo run -p freestone-hypervisor --example scripted_exit`

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use freestone_hypervisor::x86::{CpuidLeaf, MpState, Msr, Regs, SpecialRegs};
use freestone_hypervisor::{CpuState, Error, Exit, Kick, Kicker, Result, Vcpu};

const SERIAL_DATA: u16 = 0x3F8;
const SERIAL_STATUS: u16 = 0x3FD;
/// Bits of the line status of a 16550: transmitter empty, holding register empty.
const READY: u8 = 0x60;

/// One step of the script.
#[derive(Debug, Clone, Copy)]
enum Step {
    Out(u16, &'static [u8]),
    In(u16),
    Halt,
}

/// What kickers share with the vCPU.
#[derive(Debug, Default)]
struct Kicked(AtomicBool);

impl Kick for Kicked {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

#[derive(Debug)]
struct ScriptedVcpu {
    script: std::vec::IntoIter<Step>,
    /// What the run loop answered to reads.
    answer: [u8; 1],
    answers: Vec<u8>,
    reading: bool,
    kicked: Arc<Kicked>,
    regs: Regs,
}

impl ScriptedVcpu {
    fn new(script: Vec<Step>) -> Self {
        Self {
            script: script.into_iter(),
            answer: [0],
            answers: Vec::new(),
            reading: false,
            kicked: Arc::default(),
            regs: Regs::default(),
        }
    }
}

impl Vcpu for ScriptedVcpu {
    fn index(&self) -> u32 {
        0
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        self.complete_exit()?;
        if self.kicked.0.swap(false, Ordering::Acquire) {
            return Ok(Exit::Interrupted);
        }
        Ok(match self.script.next() {
            Some(Step::Out(port, data)) => Exit::PioWrite { port, size: 1, data },
            Some(Step::In(port)) => {
                self.reading = true;
                Exit::PioRead { port, size: 1, data: &mut self.answer }
            }
            Some(Step::Halt) | None => Exit::Halt,
        })
    }

    fn complete_exit(&mut self) -> Result<()> {
        if std::mem::take(&mut self.reading) {
            self.answers.extend(self.answer);
        }
        Ok(())
    }

    fn kicker(&self) -> Kicker {
        self.kicked.clone()
    }
}

/// The state that a script needs; the rest is refused.
impl CpuState for ScriptedVcpu {
    fn regs(&self) -> Result<Regs> {
        Ok(self.regs)
    }
    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.regs = *regs;
        Ok(())
    }
    fn special_regs(&self) -> Result<SpecialRegs> {
        Err(Error::Unsupported("a special register"))
    }
    fn set_special_regs(&mut self, _: &SpecialRegs) -> Result<()> {
        Err(Error::Unsupported("a special register"))
    }
    fn set_cpuid(&mut self, _: &[CpuidLeaf]) -> Result<()> {
        Err(Error::Unsupported("CPUID"))
    }
    fn msrs(&self, _: &mut [Msr]) -> Result<()> {
        Err(Error::Unsupported("an MSR"))
    }
    fn set_msrs(&mut self, _: &[Msr]) -> Result<()> {
        Err(Error::Unsupported("an MSR"))
    }
    fn mp_state(&self) -> Result<MpState> {
        Ok(MpState::Runnable)
    }
    fn set_mp_state(&mut self, _: MpState) -> Result<()> {
        Err(Error::Unsupported("waiting"))
    }
    fn lapic(&self) -> Result<[u8; 1024]> {
        Err(Error::Unsupported("a local APIC"))
    }
    fn set_lapic(&mut self, _: &[u8; 1024]) -> Result<()> {
        Err(Error::Unsupported("a local APIC"))
    }
}

/// A machine with a serial port, for any hypervisor. Returns how often `run` was interrupted.
fn run(
    vcpu: &mut impl Vcpu,
    console: &mut impl Write,
) -> std::result::Result<u32, Box<dyn std::error::Error>> {
    let mut interrupted = 0;
    loop {
        match vcpu.run()? {
            Exit::PioWrite { port: SERIAL_DATA, data, .. } => console.write_all(data)?,
            Exit::PioRead { port: SERIAL_STATUS, data, .. } => data.fill(READY),
            Exit::PioRead { data, .. } => data.fill(0xFF),
            Exit::Interrupted => interrupted += 1,
            Exit::Halt => return Ok(interrupted),
            other => return Err(format!("not in this machine: {other:?}").into()),
        }
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let script = vec![
        Step::In(SERIAL_STATUS),
        Step::Out(SERIAL_DATA, b"played, not run\n"),
        Step::In(0x80),
        Step::Halt,
    ];
    let mut vcpu = ScriptedVcpu::new(script);
    vcpu.kicker().kick();
    let interrupted = run(&mut vcpu, &mut io::stdout())?;
    println!("the guest read {:02x?} and was interrupted {interrupted} time", vcpu.answers);
    Ok(())
}
