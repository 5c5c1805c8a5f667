//! A vCPU whose guest does one thing for ever, as quickly as possible: for benches of what is above it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use freestone_hypervisor::x86::{CpuidLeaf, MpState, Msr, Regs, SpecialRegs};
use freestone_hypervisor::{CpuState, Error, Exit, Kick, Kicker, Result, Vcpu};

#[derive(Debug, Clone, Copy)]
enum What {
    PioWrite(u16),
    PioRead(u16),
    MmioWrite(u64),
    MmioRead(u64),
}

/// A vCPU that exits with the same access each time. It allocates nothing and takes no lock.
#[derive(Debug)]
pub struct RepeatVcpu {
    what: What,
    data: [u8; 4],
    len: usize,
    kicked: Arc<Flag>,
}

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Kick for Flag {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl RepeatVcpu {
    fn new(what: What, len: usize) -> Self {
        Self { what, data: [0; 4], len, kicked: Arc::default() }
    }

    /// `out` of one byte.
    pub fn pio_write(port: u16) -> Self {
        Self::new(What::PioWrite(port), 1)
    }

    /// `in` of one byte.
    pub fn pio_read(port: u16) -> Self {
        Self::new(What::PioRead(port), 1)
    }

    /// A 32-bit store.
    pub fn mmio_write(gpa: u64) -> Self {
        Self::new(What::MmioWrite(gpa), 4)
    }

    /// A 32-bit load.
    pub fn mmio_read(gpa: u64) -> Self {
        Self::new(What::MmioRead(gpa), 4)
    }
}

impl Vcpu for RepeatVcpu {
    fn index(&self) -> u32 {
        0
    }

    #[inline]
    fn run(&mut self) -> Result<Exit<'_>> {
        // A load first: the swap would be a locked instruction each time.
        if self.kicked.0.load(Ordering::Relaxed) && self.kicked.0.swap(false, Ordering::AcqRel) {
            return Ok(Exit::Interrupted);
        }
        let data = self.data.get_mut(..self.len).unwrap_or_default();
        Ok(match self.what {
            What::PioWrite(port) => Exit::PioWrite { port, size: 1, data },
            What::PioRead(port) => Exit::PioRead { port, size: 1, data },
            What::MmioWrite(gpa) => Exit::MmioWrite { gpa, data },
            What::MmioRead(gpa) => Exit::MmioRead { gpa, data },
        })
    }

    fn complete_exit(&mut self) -> Result<()> {
        Ok(())
    }

    fn kicker(&self) -> Kicker {
        Arc::clone(&self.kicked) as Kicker
    }
}

const NO_STATE: Error = Error::Unsupported("register state of a repeating vCPU");

impl CpuState for RepeatVcpu {
    fn regs(&self) -> Result<Regs> {
        Err(NO_STATE)
    }

    fn set_regs(&mut self, _: &Regs) -> Result<()> {
        Err(NO_STATE)
    }

    fn special_regs(&self) -> Result<SpecialRegs> {
        Err(NO_STATE)
    }

    fn set_special_regs(&mut self, _: &SpecialRegs) -> Result<()> {
        Err(NO_STATE)
    }

    fn set_cpuid(&mut self, _: &[CpuidLeaf]) -> Result<()> {
        Err(NO_STATE)
    }

    fn msrs(&self, _: &mut [Msr]) -> Result<()> {
        Err(NO_STATE)
    }

    fn set_msrs(&mut self, _: &[Msr]) -> Result<()> {
        Err(NO_STATE)
    }

    fn mp_state(&self) -> Result<MpState> {
        Err(NO_STATE)
    }

    fn set_mp_state(&mut self, _: MpState) -> Result<()> {
        Err(NO_STATE)
    }

    fn lapic(&self) -> Result<[u8; 1024]> {
        Err(NO_STATE)
    }

    fn set_lapic(&mut self, _: &[u8; 1024]) -> Result<()> {
        Err(NO_STATE)
    }
}
