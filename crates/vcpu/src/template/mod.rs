//! CPU templates: changes to what CPUID says and to model-specific registers, so that guests find the same processor on
//! different hosts.
//!
//! The words are those of Firecracker's custom CPU templates; with the feature `serde` a [`CpuTemplate`] is read from their JSON
//! (x86-64). A template is applied after [`cpuid::filter`](crate::cpuid::filter), and what says which vCPU of which VM it is stays
//! as the filter made it: so a template that was taken from one vCPU fits all.
//!
//! It does not know what a processor of some name can do.

mod bits;
mod json;

use freestone_hypervisor::CpuState;
use freestone_hypervisor::x86::{CpuidLeaf, Msr};

use crate::cpuid::MAX_LEAVES;
use crate::{Error, Result};
pub use bits::Bits;
use bits::number;

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the leaf has subleaves.
pub const FLAG_INDEXED: u32 = 1;

/// A register of an answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Register {
    /// EAX
    Eax,
    /// EBX
    Ebx,
    /// ECX
    Ecx,
    /// EDX
    Edx,
}

impl Register {
    /// Reads a name in lower case.
    ///
    /// # Errors
    /// [`Error::Template`] for all but `eax`, `ebx`, `ecx` and `edx`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "eax" => Ok(Self::Eax),
            "ebx" => Ok(Self::Ebx),
            "ecx" => Ok(Self::Ecx),
            "edx" => Ok(Self::Edx),
            _ => Err(refused("register", name, "there are eax, ebx, ecx and edx")),
        }
    }

    fn of(self, leaf: &mut CpuidLeaf) -> &mut u32 {
        match self {
            Self::Eax => &mut leaf.eax,
            Self::Ebx => &mut leaf.ebx,
            Self::Ecx => &mut leaf.ecx,
            Self::Edx => &mut leaf.edx,
        }
    }
}

/// Changes to one answer of CPUID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuidModifier {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry, if the leaf has subleaves; else 0.
    pub subleaf: u32,
    /// Whether it has: what counts for a leaf that the template adds.
    pub indexed: bool,
    /// Bits of registers, each at most once.
    pub registers: Vec<(Register, Bits<u32>)>,
}

impl CpuidModifier {
    /// Reads the parts as they are written in a template: numbers as `0x..`, `0b..` or decimal, flags as KVM has them, bits as
    /// [`Bits::parse`] has them.
    ///
    /// # Errors
    /// [`Error::Template`] that names what is wrong.
    pub fn parse(leaf: &str, subleaf: &str, flags: u32, registers: &[(&str, &str)]) -> Result<Self> {
        if flags > 7 {
            return Err(refused("flags of a CPUID leaf", &flags.to_string(), "there are three bits"));
        }
        let mut made: Vec<(Register, Bits<u32>)> = Vec::new();
        for (name, bits) in registers {
            let register = Register::parse(name)?;
            if made.iter().any(|(other, _)| *other == register) {
                return Err(refused("register", name, "it is there twice in one leaf"));
            }
            made.push((register, Bits::<u32>::parse(bits)?));
        }
        let (leaf, subleaf) = (number("CPUID leaf", leaf)?, number("CPUID subleaf", subleaf)?);
        Ok(Self { leaf, subleaf, indexed: flags & FLAG_INDEXED != 0, registers: made })
    }

    fn change(&self, leaf: &mut CpuidLeaf) {
        for (register, bits) in &self.registers {
            let value = register.of(leaf);
            *value = bits.apply(*value);
        }
    }
}

/// Changes to a model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrModifier {
    /// Number of the register.
    pub index: u32,
    /// Its bits.
    pub bits: Bits<u64>,
}

impl MsrModifier {
    /// Reads the parts as they are written in a template.
    ///
    /// # Errors
    /// [`Error::Template`] that names what is wrong.
    pub fn parse(addr: &str, bitmap: &str) -> Result<Self> {
        Ok(Self { index: number("address of an MSR", addr)?, bits: Bits::<u64>::parse(bitmap)? })
    }
}

/// A capability of the hypervisor that guests with this template need, or do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilityModifier {
    /// Its number: `KVM_CAP_...`.
    pub number: u32,
    /// Whether it must be there. If not, it need not be, even if guests would need it otherwise.
    pub required: bool,
}

impl CapabilityModifier {
    /// Reads `"121"`, required, or `"!121"`, not required.
    ///
    /// # Errors
    /// [`Error::Template`] if that is no number.
    pub fn parse(text: &str) -> Result<Self> {
        let digits = text.strip_prefix('!');
        let number = number("KVM capability", digits.unwrap_or(text))?;
        Ok(Self { number, required: digits.is_none() })
    }
}

/// What is different in the processors of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CpuTemplate {
    /// Answers of CPUID.
    pub cpuid: Vec<CpuidModifier>,
    /// Model-specific registers.
    pub msrs: Vec<MsrModifier>,
    /// Capabilities of the hypervisor. Whoever knows the hypervisor checks them: see
    /// [`required_capabilities`](Self::required_capabilities).
    pub capabilities: Vec<CapabilityModifier>,
}

impl CpuTemplate {
    /// Nothing is different.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it can be applied to anything at all.
    ///
    /// # Errors
    /// [`Error::Template`] if something is there twice.
    pub fn check(&self) -> Result<()> {
        for (at, one) in self.cpuid.iter().enumerate() {
            let twice = self.cpuid.iter().take(at).any(|o| (o.leaf, o.subleaf) == (one.leaf, one.subleaf));
            if twice {
                let name = format!("{:#x}.{:#x}", one.leaf, one.subleaf);
                return Err(refused("CPUID leaf", &name, "it is there twice"));
            }
        }
        for (at, one) in self.msrs.iter().enumerate() {
            if self.msrs.iter().take(at).any(|other| other.index == one.index) {
                return Err(refused("MSR", &format!("{:#x}", one.index), "it is there twice"));
            }
        }
        Ok(())
    }

    /// Capabilities that the hypervisor must have.
    pub fn required_capabilities(&self) -> impl Iterator<Item = u32> + '_ {
        self.capabilities.iter().filter(|capability| capability.required).map(|capability| capability.number)
    }

    /// Changes `leaves`, those of one vCPU as [`cpuid::filter`](crate::cpuid::filter) made them of `host`. They stay sorted.
    ///
    /// A leaf that the host has and the filter hides is added, with what the template sets in it and nothing else. Topology and
    /// APIC IDs stay as they are.
    ///
    /// # Errors
    /// [`Error::Template`] if bits are to be set in a leaf that the host does not have, or if there are too many leaves.
    pub fn apply_cpuid(&self, leaves: &mut Vec<CpuidLeaf>, host: &[CpuidLeaf]) -> Result<()> {
        for modifier in &self.cpuid {
            let key = (modifier.leaf, modifier.subleaf);
            match leaves.binary_search_by_key(&key, |leaf| (leaf.function, leaf.index)) {
                Ok(at) => {
                    if let Some(leaf) = leaves.get_mut(at) {
                        let before = *leaf;
                        modifier.change(leaf);
                        keep_identity(leaf, &before);
                    }
                }
                Err(at) => {
                    let (function, index) = key;
                    let mut leaf =
                        CpuidLeaf { function, index, indexed: modifier.indexed, ..CpuidLeaf::default() };
                    let before = leaf;
                    modifier.change(&mut leaf);
                    keep_identity(&mut leaf, &before);
                    // A leaf that is not there reads as zeros.
                    if leaf == before {
                        continue;
                    }
                    let name = format!("{function:#x}.{index:#x}");
                    if !host.iter().any(|leaf| (leaf.function, leaf.index) == key) {
                        return Err(refused("CPUID leaf", &name, "this host does not have it"));
                    }
                    if leaves.len() >= MAX_LEAVES {
                        return Err(refused("CPUID leaf", &name, "there are too many"));
                    }
                    leaves.insert(at, leaf);
                }
            }
        }
        Ok(())
    }

    /// Changes the registers of a vCPU, after all others who set them.
    ///
    /// # Errors
    /// [`Error::TemplateMsr`] if the hypervisor does not have a register, or does not take its value.
    pub fn apply_msrs(&self, vcpu: &mut dyn CpuState) -> Result<()> {
        for modifier in &self.msrs {
            let index = modifier.index;
            let fail = |op| move |source| Error::TemplateMsr { op, index, source };
            let mut msr = Msr { index, value: 0 };
            vcpu.msrs(std::slice::from_mut(&mut msr)).map_err(fail("read"))?;
            msr.value = modifier.bits.apply(msr.value);
            vcpu.set_msrs(&[msr]).map_err(fail("set"))?;
        }
        Ok(())
    }
}

/// Takes from `before` what says which vCPU of which VM this is.
fn keep_identity(leaf: &mut CpuidLeaf, before: &CpuidLeaf) {
    let keep = |value: &mut u32, before: u32, mask: u32| *value = *value & !mask | before & mask;
    match leaf.function {
        // APIC ID and threads; several threads, hypervisor.
        0x1 => {
            keep(&mut leaf.ebx, before.ebx, 0xffff_0000);
            keep(&mut leaf.ecx, before.ecx, 1 << 31);
            keep(&mut leaf.edx, before.edx, 1 << 28);
        }
        // Who shares the cache; cores.
        0x4 => keep(&mut leaf.eax, before.eax, 0xffff_c000),
        0x8000_001d => keep(&mut leaf.eax, before.eax, 0x03ff_c000),
        // Threads and bits of the APIC ID.
        0x8000_0008 => keep(&mut leaf.ecx, before.ecx, 0x0000_f0ff),
        0xb | 0x1f | 0x8000_001e => *leaf = *before,
        _ => {}
    }
}

fn refused(what: &'static str, value: &str, reason: &'static str) -> Error {
    // Enough to find it, whatever somebody wrote there.
    Error::Template { what, value: value.chars().take(100).collect(), reason }
}

#[cfg(test)]
mod tests;
