//! What CPUID tells the guest: the host's answers, less what a guest must not rely on, with this VM's topology in them.
//!
//! [`filter`] is a pure function of tables, so it is tested on made-up processors. It hides what the hypervisor cannot
//! give (performance counters, nested virtualization, `monitor`) and what names the physical machine.
//!
//! Bits and leaves are those of the Intel SDM, volume 2, CPUID, of the AMD APM, volume 3, appendix E, and, above
//! `0x4000_0000`, of Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use std::collections::BTreeMap;

use freestone_hypervisor::x86::CpuidLeaf;

/// The most leaves KVM takes (`KVM_MAX_CPUID_ENTRIES`).
pub const MAX_LEAVES: usize = 256;

/// Leaves that [`filter`] may add to those of the host.
const ADDED: usize = 6;

/// How the processors of a VM are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Hardware threads of a core; rounded up to a power of two.
    pub threads_per_core: u32,
    /// Cores of a package; rounded up to a power of two, because APIC IDs are split at bits.
    pub cores_per_package: u32,
}

impl Topology {
    /// One package with `cpus` cores of one thread each.
    pub const fn one_package(cpus: u32) -> Self {
        Self { threads_per_core: 1, cores_per_package: cpus }
    }

    /// Bits of an APIC ID that number the threads of a core.
    fn thread_bits(self) -> u32 {
        bits_for(self.threads_per_core)
    }

    /// Bits of an APIC ID below the package's number.
    fn package_bits(self) -> u32 {
        // An APIC ID has 32 bits.
        (self.thread_bits() + bits_for(self.cores_per_package)).min(31)
    }
}

/// Bits that number `n` things.
fn bits_for(n: u32) -> u32 {
    n.max(1).checked_next_power_of_two().map_or(31, u32::trailing_zeros)
}

/// For which vCPU of which VM the leaves are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Number of vCPUs of the VM.
    pub cpus: u32,
    /// Number of this vCPU, which is its APIC ID too.
    pub index: u32,
    /// How they are grouped.
    pub topology: Topology,
    /// There is a local APIC in the hypervisor. Without one there is no x2APIC and no TSC deadline timer.
    pub lapic: bool,
    /// Guests may use VMX or SVM themselves.
    pub nested: bool,
}

impl CpuidConfig {
    /// vCPU `index` of `cpus` in one package, with a local APIC and no nested virtualization.
    pub const fn new(cpus: u32, index: u32) -> Self {
        Self { cpus, index, topology: Topology::one_package(cpus), lapic: true, nested: false }
    }
}

/// What is left of the host's leaves for the vCPU of `config`, sorted by function and index; at most [`MAX_LEAVES`].
///
/// A bit that the host does not have is set only where it describes the VM (hypervisor present, several threads). Whether
/// the hypervisor has a TSC deadline timer must be in `host`: KVM says so by a capability and not in its leaves.
pub fn filter(host: &[CpuidLeaf], config: &CpuidConfig) -> Vec<CpuidLeaf> {
    let mut leaves: BTreeMap<(u32, u32), CpuidLeaf> = BTreeMap::new();
    for leaf in host.iter().take(MAX_LEAVES - ADDED) {
        // Of two leaves for the same question the first is the answer.
        leaves.entry((leaf.function, leaf.index)).or_insert(*leaf);
    }
    let processor = Processor::of(&leaves);
    leaves.retain(|(function, _), _| keeps(*function, config));
    for leaf in leaves.values_mut() {
        adjust(leaf, config, &processor);
    }
    add_topology(&mut leaves, config, &processor);
    leaves.into_values().collect()
}

/// Bits of a guest-physical address on a processor with these leaves (Intel SDM Vol. 2A, AMD APM Vol. 3: CPUID 0x8000_0008
/// EAX): 36 where they do not say. Less if the hypervisor says that it cannot map them all (bits 23:16, set by KVM).
pub fn physical_address_bits(leaves: &[CpuidLeaf]) -> u8 {
    let sizes = leaves.iter().find(|leaf| leaf.function == 0x8000_0008).map_or(0, |leaf| leaf.eax);
    let [physical, _, guest, _] = sizes.to_le_bytes();
    match (physical, guest) {
        (0, _) => 36,
        (physical, 0) => physical,
        (physical, guest) => physical.min(guest),
    }
}

/// What of the host's processor decides how others of its leaves are read.
struct Processor {
    max_basic: u32,
    amd: bool,
    topology_extensions: bool,
    had_leaf_1f: bool,
}

impl Processor {
    fn of(leaves: &BTreeMap<(u32, u32), CpuidLeaf>) -> Self {
        let leaf = |function| leaves.get(&(function, 0)).copied().unwrap_or_default();
        let vendor = leaf(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        Self {
            max_basic: vendor.eax,
            amd: matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine"),
            topology_extensions: leaf(0x8000_0001).ecx & ext1_ecx::TOPOEXT != 0,
            had_leaf_1f: leaves.contains_key(&(0x1f, 0)),
        }
    }
}

/// Whether a leaf is shown to the guest at all. An absent leaf reads as zeros.
fn keeps(function: u32, config: &CpuidConfig) -> bool {
    match function {
        // Serial number, MONITOR, direct cache access, performance monitoring, RDT, SGX, PT, extended performance monitoring.
        0x3 | 0x5 | 0x9 | 0xa | 0xf | 0x10 | 0x12 | 0x14 | 0x23 => false,
        // Topology is made anew.
        0xb | 0x1f => false,
        // What KVM does not define is not offered: another VMM's guests would take it for something else.
        0x4000_0002..=0x4fff_ffff => false,
        // SVM.
        0x8000_000a => config.nested,
        // IBS, LWP, memory encryption, extended performance monitoring, extended topology.
        0x8000_001b | 0x8000_001c | 0x8000_001f | 0x8000_0022 | 0x8000_0026 => false,
        _ => true,
    }
}

/// Bits of leaf 1 ECX.
mod leaf1_ecx {
    pub(super) const DTES64: u32 = 1 << 2;
    pub(super) const MONITOR: u32 = 1 << 3;
    pub(super) const DS_CPL: u32 = 1 << 4;
    pub(super) const VMX: u32 = 1 << 5;
    pub(super) const SMX: u32 = 1 << 6;
    pub(super) const EIST: u32 = 1 << 7;
    pub(super) const TM2: u32 = 1 << 8;
    pub(super) const PDCM: u32 = 1 << 15;
    pub(super) const DCA: u32 = 1 << 18;
    pub(super) const X2APIC: u32 = 1 << 21;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    pub(super) const HIDDEN: u32 = DTES64 | MONITOR | DS_CPL | SMX | EIST | TM2 | PDCM | DCA;
}

/// Bits of leaf 1 EDX.
mod leaf1_edx {
    pub(super) const PSN: u32 = 1 << 18;
    pub(super) const DS: u32 = 1 << 21;
    pub(super) const ACPI_THERMAL: u32 = 1 << 22;
    pub(super) const HTT: u32 = 1 << 28;
    pub(super) const TM: u32 = 1 << 29;
    pub(super) const PBE: u32 = 1 << 31;
    pub(super) const HIDDEN: u32 = PSN | DS | ACPI_THERMAL | TM | PBE;
}

/// Bits of leaf 7.
mod leaf7 {
    pub(super) const EBX_SGX: u32 = 1 << 2;
    pub(super) const EBX_RDT_M: u32 = 1 << 12;
    pub(super) const EBX_RDT_A: u32 = 1 << 15;
    pub(super) const EBX_PT: u32 = 1 << 25;
    pub(super) const ECX_SGX_LC: u32 = 1 << 30;
    pub(super) const SUB1_EAX_ARCH_PERFMON: u32 = 1 << 8;
}

/// Bits of leaf 0x8000_0001 ECX.
mod ext1_ecx {
    pub(super) const CMP_LEGACY: u32 = 1 << 1;
    pub(super) const SVM: u32 = 1 << 2;
    pub(super) const IBS: u32 = 1 << 10;
    pub(super) const SKINIT: u32 = 1 << 12;
    pub(super) const WDT: u32 = 1 << 13;
    pub(super) const LWP: u32 = 1 << 15;
    pub(super) const NODE_ID: u32 = 1 << 19;
    pub(super) const TOPOEXT: u32 = 1 << 22;
    pub(super) const PERFCTR_CORE: u32 = 1 << 23;
    pub(super) const PERFCTR_NB: u32 = 1 << 24;
    pub(super) const PERFCTR_LLC: u32 = 1 << 28;
    pub(super) const MONITORX: u32 = 1 << 29;
    pub(super) const HIDDEN: u32 =
        IBS | SKINIT | WDT | LWP | NODE_ID | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC | MONITORX;
}

/// Bits of leaf 0x4000_0001 EAX, KVM's paravirtual features, that are not offered.
mod kvm_eax {
    /// Deprecated long ago.
    pub(super) const MMU_OP: u32 = 1 << 2;
    /// These three are calls of the guest to the hypervisor, which not every backend answers.
    pub(super) const PV_UNHALT: u32 = 1 << 7;
    pub(super) const PV_SEND_IPI: u32 = 1 << 11;
    pub(super) const PV_SCHED_YIELD: u32 = 1 << 13;
    /// These three need work in user space.
    pub(super) const MSI_EXT_DEST_ID: u32 = 1 << 15;
    pub(super) const HC_MAP_GPA_RANGE: u32 = 1 << 16;
    pub(super) const MIGRATION_CONTROL: u32 = 1 << 17;
    pub(super) const HIDDEN: u32 = MMU_OP
        | PV_UNHALT
        | PV_SEND_IPI
        | PV_SCHED_YIELD
        | MSI_EXT_DEST_ID
        | HC_MAP_GPA_RANGE
        | MIGRATION_CONTROL;
}

/// The hypervisor leaf with the highest number that is kept.
const KVM_FEATURES: u32 = 0x4000_0001;

fn adjust(leaf: &mut CpuidLeaf, config: &CpuidConfig, processor: &Processor) {
    match (leaf.function, leaf.index) {
        (0x1, _) => adjust_leaf_1(leaf, config),
        (0x4, _) if !processor.amd => adjust_intel_cache(leaf, config),
        // Thermal and power: all but "the APIC timer always runs".
        (0x6, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (leaf.eax & 1 << 2, 0, 0, 0),
        (0x7, 0) => {
            leaf.ebx &= !(leaf7::EBX_SGX | leaf7::EBX_RDT_M | leaf7::EBX_RDT_A | leaf7::EBX_PT);
            leaf.ecx &= !leaf7::ECX_SGX_LC;
        }
        (0x7, 1) => leaf.eax &= !leaf7::SUB1_EAX_ARCH_PERFMON,
        (0x4000_0000, _) => leaf.eax = leaf.eax.clamp(0x4000_0000, KVM_FEATURES),
        (KVM_FEATURES, _) => leaf.eax &= !kvm_eax::HIDDEN,
        (0x8000_0001, _) => adjust_extended_1(leaf, config, processor),
        (0x8000_0008, _) if processor.amd => adjust_amd_sizes(leaf, config),
        (0x8000_001d, _) => set_cache_sharing(leaf, config),
        (0x8000_001e, _) => adjust_amd_topology(leaf, config, processor),
        _ => {}
    }
}

fn adjust_leaf_1(leaf: &mut CpuidLeaf, config: &CpuidConfig) {
    // EBX: initial APIC ID, threads in the package, CLFLUSH size, brand index. The first two are 8 bits wide.
    let threads = threads_in_package(config);
    leaf.ebx = (leaf.ebx & 0xffff) | threads.next_power_of_two().min(255) << 16 | (config.index & 0xff) << 24;
    leaf.ecx = leaf.ecx & !leaf1_ecx::HIDDEN | leaf1_ecx::HYPERVISOR;
    if !config.nested {
        leaf.ecx &= !leaf1_ecx::VMX;
    }
    if !config.lapic {
        leaf.ecx &= !(leaf1_ecx::X2APIC | leaf1_ecx::TSC_DEADLINE);
    }
    leaf.edx &= !(leaf1_edx::HIDDEN | leaf1_edx::HTT);
    if threads > 1 {
        leaf.edx |= leaf1_edx::HTT;
    }
}

/// Leaf 4: EAX 25:14 is the number of threads that share the cache, 31:26 that of the cores in the package, both minus one.
fn adjust_intel_cache(leaf: &mut CpuidLeaf, config: &CpuidConfig) {
    if leaf.eax & 0x1f == 0 {
        return;
    }
    set_cache_sharing(leaf, config);
    let cores = (threads_in_package(config) >> config.topology.thread_bits()).max(1).next_power_of_two();
    leaf.eax = (leaf.eax & !(0x3f << 26)) | (cores - 1).min(0x3f) << 26;
}

/// EAX 7:5 is the level of the cache: the first two belong to a core, the third to the package.
fn set_cache_sharing(leaf: &mut CpuidLeaf, config: &CpuidConfig) {
    if leaf.eax & 0x1f == 0 {
        return;
    }
    let sharing = match leaf.eax >> 5 & 0b111 {
        0..=2 => 1 << config.topology.thread_bits(),
        _ => threads_in_package(config).next_power_of_two(),
    };
    leaf.eax = (leaf.eax & !(0xfff << 14)) | (sharing - 1_u32).min(0xfff) << 14;
}

fn adjust_extended_1(leaf: &mut CpuidLeaf, config: &CpuidConfig, processor: &Processor) {
    leaf.ecx &= !(ext1_ecx::HIDDEN | ext1_ecx::CMP_LEGACY);
    if !config.nested {
        leaf.ecx &= !ext1_ecx::SVM;
    }
    if processor.amd && threads_in_package(config) > 1 {
        leaf.ecx |= ext1_ecx::CMP_LEGACY;
    }
}

/// Leaf 0x8000_0008 ECX: 7:0 is the number of threads minus one, 15:12 the bits of an APIC ID that number them.
fn adjust_amd_sizes(leaf: &mut CpuidLeaf, config: &CpuidConfig) {
    let threads = threads_in_package(config);
    leaf.ecx = (threads - 1).min(0xff) | config.topology.package_bits().min(0xf) << 12;
}

/// Leaf 0x8000_001E: extended APIC ID; core and threads of it; node.
fn adjust_amd_topology(leaf: &mut CpuidLeaf, config: &CpuidConfig, processor: &Processor) {
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
    if processor.topology_extensions {
        let threads = 1 << config.topology.thread_bits();
        leaf.eax = config.index;
        leaf.ebx = (config.index >> config.topology.thread_bits() & 0xff) | (threads - 1_u32).min(0xff) << 8;
        leaf.ecx = config.index >> config.topology.package_bits() & 0xff;
    }
}

/// Threads of the package that this vCPU is in, at least one.
fn threads_in_package(config: &CpuidConfig) -> u32 {
    (1 << config.topology.package_bits()).min(config.cpus.max(1))
}

/// Leaves 0xB and 0x1F: for each level, the bits to shift an APIC ID by and the number of threads below the next level.
fn add_topology(leaves: &mut BTreeMap<(u32, u32), CpuidLeaf>, config: &CpuidConfig, processor: &Processor) {
    const SMT: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let topology = config.topology;
    let threads = (1 << topology.thread_bits()).min(config.cpus.max(1));
    let levels = [
        (topology.thread_bits(), threads, SMT),
        (topology.package_bits(), threads_in_package(config), CORE),
        (0, 0, 0),
    ];
    for function in [0xb, 0x1f] {
        if processor.max_basic < function || (function == 0x1f && !processor.had_leaf_1f) {
            continue;
        }
        for (index, (shift, count, kind)) in (0..).zip(levels) {
            let leaf = CpuidLeaf {
                function,
                index,
                indexed: true,
                eax: shift,
                ebx: count,
                ecx: index | kind,
                edx: config.index,
            };
            leaves.insert((function, index), leaf);
        }
    }
}
