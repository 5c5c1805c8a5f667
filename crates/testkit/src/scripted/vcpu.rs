//! The scripted vCPU.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use freestone_bus::IoAddr;
use freestone_hypervisor::x86::{CpuidLeaf, MpState, Msr, Regs, SpecialRegs, VcpuState};
use freestone_hypervisor::{CpuState, Error, Exit, Kick, Kicker, Result, Vcpu};

use super::probe::{Cpu, CpuSnapshot, Record, Shared};
use super::script::{Code, Done, Guest, Op, Round, Script};
use crate::log::Edges;

/// What to do where a script waits.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wait {
    /// Blocks at most this long, then fails.
    Block(Duration),
    /// Returns `Exit::Interrupted` and tries again in the next `run`.
    Poll,
}

/// A kick that lasts until a `run` sees it.
struct StickyKick {
    kicked: AtomicBool,
    edges: Arc<Edges>,
}

impl Kick for StickyKick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
        self.edges.wake();
    }
}

/// What is to be done when the handler of the last exit is through.
enum Pending {
    None,
    Read { what: Load, expect: Option<Vec<u8>> },
    Hypercall { number: u64 },
}

#[derive(Clone, Copy)]
enum Load {
    Pio(u16),
    Mmio(u64),
    Mem(u64),
}

/// An exit without its borrowed data, which is in the vCPU's buffer.
enum Out {
    PioRead { port: u16, size: u8 },
    PioWrite { port: u16, size: u8 },
    MmioRead(u64),
    MmioWrite(u64),
    Hypercall { number: u64, args: [u64; 6] },
    Plain(Exit<'static>),
}

/// A vCPU that runs a script.
pub struct ScriptedVcpu {
    index: u32,
    script: Script,
    shared: Arc<Shared>,
    kick: Arc<StickyKick>,
    wait: Wait,
    refused_msrs: Vec<u32>,
    pending: Pending,
    buf: Vec<u8>,
    ret: u64,
    last_read: Vec<u8>,
    step: usize,
}

impl ScriptedVcpu {
    pub(crate) fn new(
        index: u32,
        script: Script,
        shared: Arc<Shared>,
        wait: Wait,
        refused_msrs: Vec<u32>,
    ) -> Self {
        let kick = Arc::new(StickyKick { kicked: AtomicBool::new(false), edges: Arc::clone(&shared.edges) });
        Self {
            index,
            script,
            shared,
            kick,
            wait,
            refused_msrs,
            pending: Pending::None,
            buf: Vec::new(),
            ret: 0,
            last_read: Vec::new(),
            step: 0,
        }
    }

    /// Steps not yet done.
    pub fn steps_left(&self) -> usize {
        self.script.len()
    }

    fn record(&self, record: Record) {
        self.shared.with_cpu(self.index, |cpu| cpu.records.push(record));
    }

    fn state<R>(&self, f: impl FnOnce(&mut Cpu) -> R) -> R {
        self.shared.with_cpu(self.index, f)
    }

    /// Takes in what the handler of the last exit left, as KVM does on the next entry.
    fn finish(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.pending, Pending::None) {
            Pending::None => Ok(()),
            Pending::Hypercall { number } => {
                self.record(Record::Hypercall { number, ret: self.ret });
                let ret = self.ret;
                self.state(|cpu| cpu.state.regs.rax = ret);
                Ok(())
            }
            Pending::Read { what, expect } => self.loaded(what, expect),
        }
    }

    fn loaded(&mut self, what: Load, expect: Option<Vec<u8>>) -> Result<()> {
        self.last_read.clone_from(&self.buf);
        let data = self.buf.clone();
        let name = match what {
            Load::Pio(port) => format!("port {port:#x}"),
            Load::Mmio(gpa) => format!("device memory at {gpa:#x}"),
            Load::Mem(gpa) => format!("memory at {gpa:#x}"),
        };
        self.record(match what {
            Load::Pio(port) => Record::PioRead { port, data: data.clone() },
            Load::Mmio(gpa) => Record::MmioRead { gpa, data: data.clone() },
            Load::Mem(gpa) => Record::MemRead { gpa, data: data.clone() },
        });
        match expect {
            Some(expect) if expect != data => {
                let text =
                    format!("step {}: {name} gave {data:02x?}, the script expects {expect:02x?}", self.step);
                self.record(Record::Mismatch(text.clone()));
                Err(Error::Call { op: "scripted expectation", source: io::Error::other(text) })
            }
            _ => Ok(()),
        }
    }

    /// Does steps until one leaves the guest.
    fn advance(&mut self) -> Result<Out> {
        loop {
            if self.kick.kicked.swap(false, Ordering::AcqRel) {
                self.record(Record::Kicked);
                return Ok(Out::Plain(Exit::Interrupted));
            }
            let Some(op) = self.script.ops.pop_front() else {
                return Ok(Out::Plain(Exit::Halt));
            };
            self.step += 1;
            if let Some(out) = self.execute(op)? {
                return Ok(out);
            }
        }
    }

    /// Does one step; `None` if it does not leave the guest.
    fn execute(&mut self, op: Op) -> Result<Option<Out>> {
        match op {
            Op::PioWrite { port, size, data } => return Ok(self.store(IoAddr::Pio(port), size, data)),
            Op::MmioWrite { gpa, data } => return Ok(self.store(IoAddr::Mmio(gpa), 0, data)),
            Op::PioRead { port, size, len, expect } => {
                self.expect_load(Load::Pio(port), len, expect);
                return Ok(Some(Out::PioRead { port, size }));
            }
            Op::MmioRead { gpa, len, expect } => {
                self.expect_load(Load::Mmio(gpa), len, expect);
                return Ok(Some(Out::MmioRead(gpa)));
            }
            Op::MemWrite { gpa, data } => self.shared.slots.write(gpa, &data)?,
            Op::MemRead { gpa, len, expect } => {
                self.buf = self.shared.slots.read(gpa, len)?;
                self.loaded(Load::Mem(gpa), expect)?;
            }
            Op::Hypercall { number, args } => {
                self.ret = 0;
                self.pending = Pending::Hypercall { number };
                return Ok(Some(Out::Hypercall { number, args }));
            }
            Op::Fail(op) => return Err(Error::Call { op, source: io::Error::other("as scripted") }),
            Op::WaitKick => return self.wait_for(Op::WaitKick, |_| false),
            Op::WaitIrq { gsi } => {
                let out = self.wait_for(Op::WaitIrq { gsi }, |edges| edges.take(gsi))?;
                if out.is_none() {
                    self.record(Record::Irq { gsi });
                }
                return Ok(out);
            }
            Op::Then(code) => self.code(code),
            Op::Until { round, done, left } => self.poll(round, done, left)?,
            other => return Ok(Some(Out::Plain(plain_exit(&other)))),
        }
        Ok(None)
    }

    fn expect_load(&mut self, what: Load, len: usize, expect: Option<Vec<u8>>) {
        // Not all ones: a handler that forgets to fill it in is seen.
        self.buf = vec![0xa5; len];
        self.pending = Pending::Read { what, expect };
    }

    fn store(&mut self, addr: IoAddr, size: u8, data: Vec<u8>) -> Option<Out> {
        if self.shared.bells.ring(addr, &data) {
            self.record(Record::Doorbell);
            return None;
        }
        self.buf = data;
        Some(match addr {
            IoAddr::Pio(port) => Out::PioWrite { port, size },
            IoAddr::Mmio(gpa) => Out::MmioWrite(gpa),
        })
    }

    fn code(&mut self, code: Code) {
        let memory = self.shared.slots.map();
        let mut regs = self.state(|cpu| cpu.state.regs);
        let mut guest = Guest { memory: memory.as_deref(), regs: &mut regs, last_read: &self.last_read };
        let next = code(&mut guest);
        self.state(|cpu| cpu.state.regs = regs);
        self.go_on_with(next);
    }

    fn go_on_with(&mut self, mut next: Script) {
        next.ops.append(&mut self.script.ops);
        self.script = next;
    }

    fn poll(&mut self, mut round: Round, mut done: Done, left: u32) -> Result<()> {
        let Some(left) = left.checked_sub(1) else {
            let text = format!("step {}: polling did not end", self.step);
            self.record(Record::Mismatch(text.clone()));
            return Err(Error::Call { op: "scripted expectation", source: io::Error::other(text) });
        };
        let once = round();
        let check = Script::new().then(move |guest| {
            if done(guest.last_read) {
                Script::new()
            } else {
                Script::new().op(Op::Until { round, done, left })
            }
        });
        self.go_on_with(once.append(check));
        Ok(())
    }

    /// Stays in the guest until `ready` or a kick; `op` is tried again after a kick.
    fn wait_for(&mut self, op: Op, ready: impl Fn(&Edges) -> bool) -> Result<Option<Out>> {
        if ready(&self.shared.edges) {
            return Ok(None);
        }
        let kick = Arc::clone(&self.kick);
        let is_kick_wait = matches!(op, Op::WaitKick);
        let kicked = || kick.kicked.swap(false, Ordering::AcqRel);
        let timeout = match self.wait {
            Wait::Poll => Duration::ZERO,
            Wait::Block(timeout) => timeout,
        };
        let (mut came, mut was_kicked) = (false, false);
        self.shared.edges.wait(timeout, || {
            came = ready(&self.shared.edges);
            was_kicked = !came && kicked();
            came || was_kicked
        });
        if came {
            return Ok(None);
        }
        if was_kicked {
            self.record(Record::Kicked);
            if !is_kick_wait {
                self.script.ops.push_front(op);
            }
            return Ok(Some(Out::Plain(Exit::Interrupted)));
        }
        if matches!(self.wait, Wait::Poll) {
            self.script.ops.push_front(op);
            return Ok(Some(Out::Plain(Exit::Interrupted)));
        }
        let text = format!("step {}: {op:?}: nothing came within {timeout:?}", self.step);
        self.record(Record::Mismatch(text.clone()));
        Err(Error::Call { op: "scripted wait", source: io::Error::other(text) })
    }
}

/// Exits without data.
fn plain_exit(op: &Op) -> Exit<'static> {
    match *op {
        Op::Shutdown => Exit::Shutdown,
        Op::SystemEvent(event) => Exit::SystemEvent(event),
        Op::InternalError { suberror, instruction } => Exit::InternalError { suberror, instruction },
        Op::FailEntry { reason, cpu } => Exit::FailEntry { reason, cpu },
        Op::Debug { pc, exception } => Exit::Debug { pc, exception },
        Op::Interrupted => Exit::Interrupted,
        Op::IoapicEoi { vector } => Exit::IoapicEoi { vector },
        Op::Unhandled { reason } => Exit::Unhandled { reason },
        // `Halt`, and whatever has been handled before.
        _ => Exit::Halt,
    }
}

impl Vcpu for ScriptedVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        self.finish()?;
        Ok(match self.advance()? {
            Out::PioRead { port, size } => Exit::PioRead { port, size, data: &mut self.buf },
            Out::PioWrite { port, size } => Exit::PioWrite { port, size, data: &self.buf },
            Out::MmioRead(gpa) => Exit::MmioRead { gpa, data: &mut self.buf },
            Out::MmioWrite(gpa) => Exit::MmioWrite { gpa, data: &self.buf },
            Out::Hypercall { number, args } => Exit::Hypercall { number, args, ret: &mut self.ret },
            Out::Plain(exit) => exit,
        })
    }

    fn complete_exit(&mut self) -> Result<()> {
        self.finish()
    }

    fn kicker(&self) -> Kicker {
        Arc::clone(&self.kick) as Kicker
    }
}

impl CpuState for ScriptedVcpu {
    fn regs(&self) -> Result<Regs> {
        Ok(self.state(|cpu| cpu.state.regs))
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.state(|cpu| cpu.state.regs = *regs);
        Ok(())
    }

    fn special_regs(&self) -> Result<SpecialRegs> {
        Ok(self.state(|cpu| cpu.state.special))
    }

    fn set_special_regs(&mut self, regs: &SpecialRegs) -> Result<()> {
        self.state(|cpu| cpu.state.special = *regs);
        Ok(())
    }

    fn set_cpuid(&mut self, leaves: &[CpuidLeaf]) -> Result<()> {
        self.state(|cpu| cpu.state.cpuid = leaves.to_vec());
        Ok(())
    }

    fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        for msr in msrs {
            check_msr(&self.refused_msrs, msr.index)?;
            msr.value = self.state(|cpu| cpu.state.msrs.get(&msr.index).copied().unwrap_or(0));
        }
        Ok(())
    }

    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        for msr in msrs {
            check_msr(&self.refused_msrs, msr.index)?;
            self.state(|cpu| cpu.state.msrs.insert(msr.index, msr.value));
        }
        Ok(())
    }

    /// The registers. What the script has still to do is not part of the state: a guest's memory says where it is.
    ///
    /// Fails if the last exit is not completed, which on a real processor would lose an instruction.
    fn save(&mut self) -> Result<VcpuState> {
        if !matches!(self.pending, Pending::None) {
            let source = io::Error::other("the last exit is not completed");
            return Err(Error::Call { op: "saving the scripted vCPU", source });
        }
        let has_lapic = self.shared.has_irq_chip();
        let cpu = self.state(|cpu| cpu.state.clone());
        Ok(VcpuState {
            cpuid: cpu.cpuid,
            tsc_khz: cpu.tsc_khz,
            mp_state: cpu.mp_state,
            regs: cpu.regs,
            special_regs: cpu.special,
            xcrs: cpu.xcrs,
            xsave: cpu.xsave,
            debug_regs: cpu.debug_regs,
            lapic: has_lapic.then(|| Box::new(cpu.lapic)),
            msrs: cpu.msrs.into_iter().map(|(index, value)| Msr { index, value }).collect(),
            events: cpu.events,
        })
    }

    fn restore(&mut self, state: &VcpuState) -> Result<()> {
        let refused = |msr: &&Msr| msr.value != 0 && self.refused_msrs.contains(&msr.index);
        if let Some(&Msr { index, value }) = state.msrs.iter().find(refused) {
            return Err(Error::MsrValue { index, value });
        }
        if state.lapic.is_some() != self.shared.has_irq_chip() {
            return Err(Error::Unsupported("a local APIC without the interrupt controller, or the reverse,"));
        }
        self.state(|cpu| {
            cpu.state = CpuSnapshot {
                regs: state.regs,
                special: state.special_regs,
                cpuid: state.cpuid.clone(),
                msrs: state.msrs.iter().map(|msr| (msr.index, msr.value)).collect(),
                mp_state: state.mp_state,
                lapic: state.lapic.as_deref().copied().unwrap_or([0; 1024]),
                xcrs: state.xcrs.clone(),
                xsave: state.xsave.clone(),
                debug_regs: state.debug_regs,
                events: state.events,
                tsc_khz: state.tsc_khz,
            };
        });
        self.shared.call(format!("restore {}", self.index));
        Ok(())
    }

    fn mp_state(&self) -> Result<MpState> {
        Ok(self.state(|cpu| cpu.state.mp_state))
    }

    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        self.state(|cpu| cpu.state.mp_state = state);
        Ok(())
    }

    fn lapic(&self) -> Result<[u8; 1024]> {
        Ok(self.state(|cpu| cpu.state.lapic))
    }

    fn set_lapic(&mut self, lapic: &[u8; 1024]) -> Result<()> {
        self.state(|cpu| cpu.state.lapic = *lapic);
        Ok(())
    }
}

fn check_msr(refused: &[u32], index: u32) -> Result<()> {
    if refused.contains(&index) {
        return Err(Error::OutOfRange { what: "MSR", value: index.into(), reason: "this host refuses it" });
    }
    Ok(())
}

impl fmt::Debug for ScriptedVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedVcpu")
            .field("index", &self.index)
            .field("step", &self.step)
            .field("script", &self.script)
            .finish_non_exhaustive()
    }
}
