//! On which host a snapshot was made, and whether its vCPUs fit this one.
//!
//! To compare a vCPU with what the hypervisor supports takes a few system calls and a VM made for it. A snapshot that comes back
//! to a host like the one it was made on is spared that: it has a fingerprint, which costs a dozen CPUID instructions.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use freestone_hypervisor::Hypervisor;
use freestone_hypervisor::x86::{CpuidLeaf, VcpuState};
use freestone_snapshot::Section;
use freestone_vcpu::compat::{self, Mismatch};
use freestone_vcpu::state::VcpuSection;
use serde::{Deserialize, Serialize};

use super::read::Stored;
use crate::Result;

/// Which host: section `host`. Equal ones have the same processor as far as a guest can tell, and the same kernel.
///
/// The version of the microcode is not in it, but what it adds to or takes from the processor's features is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSection {
    cpu: CpuModel,
    /// Of the leaves of CPUID that describe the processor and not its state.
    cpuid: u64,
    /// Release and version of the kernel, and with it of its hypervisor.
    kernel: String,
}

impl Section for HostSection {
    const NAME: &'static str = "host";
    const VERSION: u32 = 1;
    // Whoever does not know it compares more.
    const OPTIONAL: bool = true;
}

/// Leaves and subleaves of CPUID that say what the processor can, with the bits of EAX, EBX, ECX and EDX that do not depend on the
/// processor's number or on what the operating system has enabled.
const LEAVES: [(u32, u32, [u32; 4]); 17] = [
    (0, 0, [!0; 4]),
    (1, 0, [!0, 0xff00, !0, !0]),
    (7, 0, [!0; 4]),
    (7, 1, [!0; 4]),
    (7, 2, [!0; 4]),
    (0xd, 0, [!0, 0, !0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (0x14, 0, [!0; 4]),
    (0x15, 0, [!0; 4]),
    (0x1d, 1, [!0; 4]),
    (0x8000_0000, 0, [!0; 4]),
    (0x8000_0001, 0, [!0; 4]),
    (0x8000_0007, 0, [!0; 4]),
    (0x8000_0008, 0, [!0, !0, 0, !0]),
    (0x8000_000a, 0, [!0; 4]),
    (0x8000_001f, 0, [!0; 4]),
    (0x8000_0021, 0, [!0; 4]),
];

impl HostSection {
    /// This host. It is looked at once in the life of the process.
    pub fn here() -> &'static Self {
        static HERE: OnceLock<HostSection> = OnceLock::new();
        HERE.get_or_init(|| {
            let basic = __cpuid_count(0, 0).eax;
            let extended = __cpuid_count(0x8000_0000, 0).eax;
            let known = |leaf: u32| leaf <= if leaf < 0x8000_0000 { basic } else { extended };
            let leaves = LEAVES.iter().filter(|(leaf, ..)| known(*leaf)).map(|&(function, index, mask)| {
                let answer = __cpuid_count(function, index);
                let [a, b, c, d] = mask;
                let (eax, ebx) = (answer.eax & a, answer.ebx & b);
                let (ecx, edx) = (answer.ecx & c, answer.edx & d);
                CpuidLeaf { function, index, indexed: true, eax, ebx, ecx, edx }
            });
            let leaves: Vec<_> = leaves.collect();
            let kernel = rustix::system::uname();
            Self {
                cpu: CpuModel::of(&leaves),
                cpuid: hash(&leaves),
                kernel: format!(
                    "{} {}",
                    kernel.release().to_string_lossy(),
                    kernel.version().to_string_lossy()
                ),
            }
        })
    }

    /// The processor.
    pub fn cpu(&self) -> &CpuModel {
        &self.cpu
    }

    /// Release and version of the kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }
}

/// FNV-1a: the same wherever it is computed. It is no protection against anybody.
fn hash(leaves: &[CpuidLeaf]) -> u64 {
    let words = leaves.iter().flat_map(|l| [l.function, l.index, l.eax, l.ebx, l.ecx, l.edx]);
    let bytes = words.flat_map(u32::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What processor it is, by CPUID.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    vendor: String,
    family: u32,
    model: u32,
    stepping: u32,
}

impl CpuModel {
    /// By leaves 0 and 1; zeros where there is none.
    pub fn of(leaves: &[CpuidLeaf]) -> Self {
        let leaf = |function| leaves.iter().find(|leaf| leaf.function == function).copied();
        let first = leaf(0).unwrap_or_default();
        let name = [first.ebx, first.edx, first.ecx].map(u32::to_le_bytes);
        let signature = leaf(1).unwrap_or_default().eax;
        let (family, model) = (signature >> 8 & 0xf, signature >> 4 & 0xf);
        // SDM vol. 2A, CPUID, "EAX = 01H"; APM vol. 3, Fn0000_0001_EAX.
        let extended_family = if family == 0xf { signature >> 20 & 0xff } else { 0 };
        let extended_model = if matches!(family, 6 | 0xf) { signature >> 16 & 0xf } else { 0 };
        Self {
            vendor: name.as_flattened().escape_ascii().to_string(),
            family: family + extended_family,
            model: extended_model << 4 | model,
            stepping: signature & 0xf,
        }
    }

    /// Who made it: `GenuineIntel`, `AuthenticAMD`.
    pub fn vendor(&self) -> &str {
        &self.vendor
    }

    /// Family, the extended one included.
    pub fn family(&self) -> u32 {
        self.family
    }

    /// Model, the extended one included.
    pub fn model(&self) -> u32 {
        self.model
    }

    /// Stepping.
    pub fn stepping(&self) -> u32 {
        self.stepping
    }
}

/// The processor's name that a guest was told, by leaves 0x80000002 to 0x80000004; empty if there is none.
fn brand(leaves: &[CpuidLeaf]) -> String {
    let parts = (0x8000_0002..=0x8000_0004).filter_map(|at| leaves.iter().find(|leaf| leaf.function == at));
    let bytes = parts.flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]).flat_map(u32::to_le_bytes);
    let text: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    text.trim_ascii().escape_ascii().to_string()
}

impl Stored {
    /// The host that the snapshot was made on, if it says so.
    ///
    /// # Errors
    /// [`Error::Snapshot`](crate::Error::Snapshot) if what it says is damaged.
    pub fn host(&self) -> Result<Option<HostSection>> {
        let there = self.sections.names().any(|name| name == HostSection::NAME);
        Ok(if there { Some(self.sections.peek()?) } else { None })
    }

    /// The processor that the guest has: its model, and its name.
    ///
    /// # Errors
    /// As [`check_cpu`](Self::check_cpu).
    pub fn cpu(&self) -> Result<(CpuModel, String)> {
        let states = self.vcpus()?;
        let leaves = states.first().map(|state| state.cpuid.as_slice()).unwrap_or_default();
        Ok((CpuModel::of(leaves), brand(leaves)))
    }

    /// What of the snapshot's vCPUs does not fit the host of `hypervisor`, what matters most first; nothing if all does. On a host
    /// [like the one](HostSection) that it was made on nothing is compared. To be called before a restore.
    ///
    /// # Errors
    /// [`Error::Snapshot`](crate::Error::Snapshot) or [`Error::Vcpu`](crate::Error::Vcpu) if a vCPU is missing or damaged, or as the
    /// hypervisor fails.
    pub fn check_cpu<H: Hypervisor>(&self, hypervisor: &H) -> Result<Vec<Mismatch>> {
        if self.host()?.as_ref() == Some(HostSection::here()) {
            return Ok(Vec::new());
        }
        let host = hypervisor.host_cpu()?;
        let mut found: Vec<Mismatch> = Vec::new();
        for state in self.vcpus()? {
            for mismatch in compat::check(&state, &host) {
                if !found.contains(&mismatch) {
                    found.push(mismatch);
                }
            }
        }
        found.sort_by_key(|mismatch| std::cmp::Reverse(mismatch.severity));
        Ok(found)
    }

    fn vcpus(&self) -> Result<Vec<VcpuState>> {
        self.machine.check_cpus()?;
        let mut sections = self.sections.clone();
        let states = (0..self.machine.cpus()).map(|index| {
            Ok(VcpuState::try_from(sections.take_instance::<VcpuSection>(&index.to_string())?)?)
        });
        states.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { function, eax, ebx, ecx, edx, ..CpuidLeaf::default() }
    }

    #[test]
    fn a_model_is_read_with_its_extensions() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let name = [0, word(b"Auth"), word(b"cAMD"), word(b"enti")];
        let model = CpuModel::of(&[leaf(0, name), leaf(1, [0x00a2_0f12, 0, 0, 0])]);
        assert_eq!(
            (model.vendor(), model.family(), model.model(), model.stepping()),
            ("AuthenticAMD", 0x19, 0x21, 2)
        );
        assert_eq!(CpuModel::of(&[leaf(1, [0x0009_06ed, 0, 0, 0])]).model(), 0x9e);
        assert_eq!(CpuModel::of(&[]).family(), 0);
    }

    #[test]
    fn a_name_is_shown_without_what_pads_it() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let leaves = [leaf(0x8000_0002, [word(b"  A "), word(b"CPU "), word(b"\x1b1 \0"), 7])];
        assert_eq!(brand(&leaves), r"A CPU \x1b1");
        assert_eq!(brand(&[]), "");
    }

    #[test]
    fn this_host_is_like_itself_and_not_like_one_with_another_kernel() {
        let here = HostSection::here();
        assert!(!here.cpu().vendor().is_empty() && !here.kernel().is_empty());
        assert_eq!(here, HostSection::here());
        assert_ne!(here, &HostSection { kernel: "other".to_owned(), ..here.clone() });
    }

    #[test]
    fn every_bit_of_a_leaf_makes_another_hash() {
        let leaves = [leaf(7, [1, 2, 3, 4])];
        for bit in 0..32 {
            assert_ne!(hash(&leaves), hash(&[leaf(7, [1, 2 ^ 1 << bit, 3, 4])]));
        }
    }
}
