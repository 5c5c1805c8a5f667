//! A report of a guest that cannot go on: what helps to find out why, in one page.

use std::fmt;

use freestone_hypervisor::Vcpu;
use freestone_hypervisor::x86::{Regs, SpecialRegs};
use freestone_memory::GuestMem;
use freestone_memory::paging::{self, EFER_LMA, PagingState};

use crate::StopReason;

/// Longest instruction of x86, in bytes: what is read at the instruction pointer.
const CODE_BYTES: usize = 15;

/// State of a vCPU at the moment its guest could not go on.
///
/// `Display` gives a report of several lines; [`summary`](Self::summary) one line.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Crash {
    /// Number of the vCPU.
    pub vcpu: u32,
    /// Why it stopped.
    pub reason: StopReason,
    /// General registers, unless the hypervisor could not tell.
    pub regs: Option<Regs>,
    /// Special registers, unless the hypervisor could not tell.
    pub special: Option<SpecialRegs>,
    /// Where the instruction pointer is in guest-physical memory, or why that cannot be told.
    pub rip_gpa: Result<u64, String>,
    /// Bytes at the instruction pointer, as guest memory has them now.
    pub code: Vec<u8>,
}

impl Crash {
    /// Reads the state of `vcpu` after `reason`. What cannot be read is left out: a report never fails.
    pub fn collect<V: Vcpu + ?Sized>(vcpu: &V, mem: &GuestMem, reason: StopReason) -> Self {
        let (regs, special) = (vcpu.regs().ok(), vcpu.special_regs().ok());
        let (rip_gpa, code) = match (&regs, &special) {
            (Some(regs), Some(special)) => code_at(mem, regs, special),
            _ => (Err("the registers cannot be read".to_owned()), Vec::new()),
        };
        Self { vcpu: vcpu.index(), reason, regs, special, rip_gpa, code }
    }

    /// One line: which vCPU, why, and where.
    pub fn summary(&self) -> String {
        let at = self.regs.map_or_else(String::new, |r| format!(" (rip {:#x})", r.rip));
        format!("vCPU {}: {}{at}", self.vcpu, self.reason)
    }
}

/// Where the next instruction is, and its bytes.
fn code_at(mem: &GuestMem, regs: &Regs, special: &SpecialRegs) -> (Result<u64, String>, Vec<u8>) {
    // The base of CS counts in every mode: in 64-bit mode it is zero. Outside of long mode linear addresses have 32 bits.
    let sum = special.cs.base.wrapping_add(regs.rip);
    let linear = if special.efer & EFER_LMA == 0 { sum & u64::from(u32::MAX) } else { sum };
    let state = PagingState::new(special.cr0, special.cr3, special.cr4, special.efer);
    let view = mem.view();
    let gpa = paging::translate(&*view, &state, linear).map(|t| t.gpa.0).map_err(|e| e.to_string());
    let mut code = vec![0; CODE_BYTES];
    match paging::read_virtual(&*view, &state, linear, &mut code) {
        Ok(read) => code.truncate(read),
        Err(error) => return (gpa.and(Err(error.to_string())), Vec::new()),
    }
    (gpa, code)
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary())?;
        match &self.rip_gpa {
            Ok(gpa) => {
                write!(f, "code at guest-physical {gpa:#x}:")?;
                self.code.iter().try_for_each(|b| write!(f, " {b:02x}"))?;
                writeln!(f)?;
            }
            Err(why) => writeln!(f, "no code at the instruction pointer: {why}")?,
        }
        match &self.regs {
            Some(regs) => write!(f, "{regs}")?,
            None => writeln!(f, "general registers: not readable")?,
        }
        match &self.special {
            Some(special) => write!(f, "{special}"),
            None => f.write_str("special registers: not readable"),
        }
    }
}
