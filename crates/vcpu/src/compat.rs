//! Whether a saved vCPU fits this host, told before anything runs.
//!
//! [`check`] compares tables and asks nobody. A guest found out at its boot what its processor has; it does not look again
//! when it goes on elsewhere. So what it was told must be there.
//!
//! It does not compare what only describes the VM or the physical machine (topology, caches, names), nor the leaves of the
//! hypervisor: those of a saved vCPU are its own. On the host that saved a vCPU nothing is ever found, even where the
//! hypervisor shows a guest more than it was told to.

mod features;

use std::collections::BTreeSet;
use std::fmt;

use freestone_hypervisor::x86::{CpuidLeaf, HostCpu, VcpuState};

/// How much a [`Mismatch`] matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The guest goes on, and may notice.
    Warn,
    /// The guest would not go on rightly.
    Refuse,
}

/// Something of a saved vCPU that does not fit the host. [`Display`](fmt::Display) says it in a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// How much it matters.
    pub severity: Severity,
    /// What does not fit.
    pub message: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Time-stamp counters whose frequencies differ by less are equal: KVM's `tsc_tolerance_ppm` is 250, in parts per million.
const TOLERANCE_PPM: u64 = 250;
/// Bytes of an XSAVE area that every host takes.
const BASE_XSAVE: usize = 4096;
/// The register that says which extended states are on (XCR0).
const XCR0: u32 = 0;

/// What of `saved` does not fit `host`, what matters most first; nothing if all does.
///
/// ```
/// use freestone_hypervisor::{CpuState, Hypervisor, Vm};
/// use freestone_testkit::scripted::{Script, ScriptedHypervisor};
/// use freestone_vcpu::compat::{self, Severity};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let host = ScriptedHypervisor::new(Script::new());
/// let mut vcpu = host.create_vm()?.create_vcpu(0)?;
/// let mut leaves = host.supported_cpuid()?;
/// vcpu.set_cpuid(&leaves)?;
/// let saved = vcpu.save()?;
/// assert!(compat::check(&saved, &host.host_cpu()?).is_empty());
///
/// // A host whose processor has no AES instructions.
/// leaves.iter_mut().filter(|leaf| leaf.function == 1).for_each(|leaf| leaf.ecx &= !(1 << 25));
/// let other = ScriptedHypervisor::new(Script::new()).cpuid(leaves);
/// let found = compat::check(&saved, &other.host_cpu()?);
/// assert_eq!(found[0].severity, Severity::Refuse);
/// assert_eq!(found[0].to_string(), "the processor lacks what the guest was told it has: aes");
/// # Ok(())
/// # }
/// ```
pub fn check(saved: &VcpuState, host: &HostCpu) -> Vec<Mismatch> {
    let mut found = Vec::new();
    vendor(saved, host, &mut found);
    missing_features(saved, host, &mut found);
    extended_states(saved, host, &mut found);
    time(saved, host, &mut found);
    msrs(saved, host, &mut found);
    found.sort_by_key(|mismatch| std::cmp::Reverse(mismatch.severity));
    found
}

fn refuse(found: &mut Vec<Mismatch>, message: String) {
    found.push(Mismatch { severity: Severity::Refuse, message });
}

fn warn(found: &mut Vec<Mismatch>, message: String) {
    found.push(Mismatch { severity: Severity::Warn, message });
}

/// The answer to a question; zeros if there is none, as a processor gives.
fn leaf(leaves: &[CpuidLeaf], function: u32, index: u32) -> CpuidLeaf {
    let asked = |leaf: &&CpuidLeaf| leaf.function == function && (!leaf.indexed || leaf.index == index);
    leaves.iter().find(asked).copied().unwrap_or_default()
}

fn vendor_name(leaves: &[CpuidLeaf]) -> String {
    let leaf = leaf(leaves, 0, 0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    name.as_flattened().escape_ascii().to_string()
}

/// Kernels choose their mitigations, and other code paths, by the vendor.
fn vendor(saved: &VcpuState, host: &HostCpu, found: &mut Vec<Mismatch>) {
    if saved.cpuid.is_empty() || host.cpuid.is_empty() {
        return;
    }
    let (was, is) = (vendor_name(&saved.cpuid), vendor_name(&host.cpuid));
    if was != is {
        refuse(found, format!("the vCPU was saved on a processor of {was}, this one is of {is}"));
    }
    let (was, is) = (leaf(&saved.cpuid, 1, 0).eax, leaf(&host.cpuid, 1, 0).eax);
    if was != is {
        warn(
            found,
            format!("the vCPU was saved on a processor with signature {was:#x}, this one has {is:#x}"),
        );
    }
}

fn missing_features(saved: &VcpuState, host: &HostCpu, found: &mut Vec<Mismatch>) {
    let mut missing = BTreeSet::new();
    for register in features::REGISTERS {
        let was = register.of(&leaf(&saved.cpuid, register.function, register.index));
        let is = register.of(&leaf(&host.cpuid, register.function, register.index));
        let lost = was & !is & !register.ignored;
        missing.extend((0..32).filter(|bit| lost & 1 << bit != 0).map(|bit| register.name(bit)));
    }
    if !missing.is_empty() {
        let names = missing.into_iter().collect::<Vec<_>>().join(", ");
        refuse(found, format!("the processor lacks what the guest was told it has: {names}"));
    }
}

fn extended_states(saved: &VcpuState, host: &HostCpu, found: &mut Vec<Mismatch>) {
    // Leaf 0xD, subleaf 0: EDX:EAX are the states that XCR0 may have.
    let states = leaf(&host.cpuid, 0xd, 0);
    let can = u64::from(states.edx) << 32 | u64::from(states.eax);
    let on = saved.xcrs.iter().find(|(number, _)| *number == XCR0).map_or(0, |(_, value)| *value);
    // The x87 state is there always, and a host may have no such leaf at all.
    let lost = on & !can & !1;
    if lost != 0 {
        refuse(found, format!("the guest uses extended states {lost:#x} (XCR0) that this processor has not"));
    }
    let len = host.xsave_len.unwrap_or(BASE_XSAVE).max(BASE_XSAVE);
    if saved.xsave.len() > len {
        let saved = saved.xsave.len();
        refuse(found, format!("the XSAVE area has {saved} bytes, this host takes {len}"));
    }
}

fn time(saved: &VcpuState, host: &HostCpu, found: &mut Vec<Mismatch>) {
    let (Some(was), Some(is)) = (saved.tsc_khz, host.tsc_khz) else { return };
    let off = u64::from(was.abs_diff(is)) * 1_000_000;
    if host.tsc_scaling || off <= u64::from(is) * TOLERANCE_PPM {
        return;
    }
    let text = format!(
        "the guest's time-stamp counter runs at {was} kHz, this host's at {is} kHz, which it cannot scale"
    );
    // A counter that should run faster is moved on by KVM whenever it can; one that should run slower cannot be held back.
    if was > is { warn(found, text) } else { refuse(found, text) }
}

fn msrs(saved: &VcpuState, host: &HostCpu, found: &mut Vec<Mismatch>) {
    let Some(known) = &host.msrs else { return };
    let unknown = saved.msrs.iter().filter(|msr| msr.value != 0 && known.binary_search(&msr.index).is_err());
    // A hostile state may have many.
    let names: Vec<_> = unknown.take(16).map(|msr| format!("{:#x}", msr.index)).collect();
    if !names.is_empty() {
        let names = names.join(", ");
        refuse(found, format!("the guest uses MSRs that this host's hypervisor does not know: {names}"));
    }
}
